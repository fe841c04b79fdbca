"""
Momentum contrast: a query encoder, a key encoder that follows it, a queue of earlier keys with their labels.

    moco = MoCo(torchvision.models.resnet50)                      # the optimizer gets moco.encoder_q.parameters()
    moco.fill_queue(batches)                                      # or start from random keys without labels
    moco.update_key_encoder()                                     # 1. key encoder <- m key + (1 - m) query
    q = F.normalize(moco.encoder_q(im_q))                         # 2. queries, with gradient
    k = moco.keys(im_k)                                           # 3. keys, without
    kcl_loss(q, k, moco.queue, y, moco.queue_labels).backward()   # 4. the queue as it was before this batch
    moco.enqueue(k, y)                                            # 5. only now: the loss no longer needs the old queue

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020; labels in the queue as KCL
(ICLR 2021, App. A) needs them. Not itself wrapped in DistributedDataParallel: wrap `encoder_q`, the only part with
gradients, so that the queue is not broadcast each step. Every rank holds the same queue. Needs torch and ddp.py.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import ddp


def with_head(encoder, dim, mlp=False):
    """An encoder that ends in the projection to (B, dim): linear, or MoCo v2's two layers (its last must be `fc`)."""
    e = encoder(num_classes=dim)
    if mlp:
        D = e.fc.in_features
        e.fc = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, dim))
    return e


class MoCo(nn.Module):
    """encoder: a torchvision-style constructor, encoder(num_classes=dim); for mlp its last layer must be `fc`
    dim: d, the embedding; K: slots in the queue, any number; m: momentum of the key encoder
    mlp: MoCo v2's two-layer head in place of the linear one
    seed: of the shuffle across ranks; the same on every rank"""

    def __init__(self, encoder, dim=128, K=65536, m=0.999, mlp=False, seed=0):
        super().__init__()
        self.K, self.m = K, m
        self.encoder_q, self.encoder_k = with_head(encoder, dim, mlp), with_head(encoder, dim, mlp)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(K, dim)))                # (K, d)
        self.register_buffer("queue_labels", torch.full((K,), -1))                     # (K,), -1 = no real key yet
        self.ptr = 0  # the slot that the next key takes; a Python int, so that no step waits for the device
        self.shuffle = torch.Generator().manual_seed(seed)

    def get_extra_state(self):
        return {"ptr": self.ptr, "shuffle": self.shuffle.get_state()}

    def set_extra_state(self, state):
        self.ptr = state["ptr"]
        self.shuffle.set_state(state["shuffle"].cpu())

    @torch.no_grad()
    def update_key_encoder(self):
        """theta_k <- m theta_k + (1 - m) theta_q. Parameters only: BatchNorm statistics are each encoder's own."""
        torch._foreach_lerp_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.m)

    @torch.no_grad()
    def keys(self, im_k):
        """Unit keys (b, d) of this rank's images (b, 3, H, W).

        The images are shuffled across ranks first and the keys put back in order: a query and its key must not share
        their BatchNorm batch, through which the encoder could otherwise tell which belong together.
        """
        b, everyone = len(im_k), ddp.world() * len(im_k)
        mine = slice(ddp.rank() * b, (ddp.rank() + 1) * b)
        order = torch.randperm(everyone, generator=self.shuffle)
        shuffled = ddp.gather(im_k)[order[mine].to(im_k.device)]
        k = F.normalize(self.encoder_k(shuffled.contiguous(memory_format=torch.channels_last)))
        return ddp.gather(k)[order.argsort()[mine].to(im_k.device)]

    @torch.no_grad()
    def enqueue(self, k, labels):
        """Put the keys (b, d) and labels (b,) of all ranks over the oldest slots; any b, also more than K."""
        k, labels = ddp.gather(k)[-self.K:], ddp.gather(labels)[-self.K:]
        slots = (self.ptr + torch.arange(len(k), device=k.device)) % self.K
        self.queue[slots], self.queue_labels[slots] = k.to(self.queue.dtype), labels
        self.ptr = (self.ptr + len(k)) % self.K

    @torch.no_grad()
    def fill_queue(self, batches):
        """Fill all K slots with real keys before step 0, from an iterable of (im_k, labels). The BatchNorm statistics
        that the pass leaves in the key encoder are undone. Ends with the iterable if that has fewer than K keys."""
        before = [x.clone() for x in self.encoder_k.buffers()]
        filled = 0
        for im_k, labels in batches:
            self.enqueue(self.keys(im_k), labels)
            filled += len(labels) * ddp.world()
            if filled >= self.K:
                break
        for x, saved in zip(self.encoder_k.buffers(), before):
            x.copy_(saved)
