"""
Momentum contrast: a query encoder, a key encoder that follows it, a queue of earlier keys with their labels.

    moco = MoCo(torchvision.models.resnet50)                      # the optimizer gets moco.encoder_q.parameters()
    moco.fill_queue(batches)                                      # or start from random keys without labels
    moco.update_key_encoder()                                     # 1. key encoder <- m key + (1 - m) query
    keys, key_labels = moco.keys(im_k, y)                         # 2. keys of all ranks, without gradient
    q, k = F.normalize(moco.encoder_q(im_q)), moco.own(keys)      # 3. queries, with gradient, and the keys beside them
    kcl_loss(q, k, moco.queue, y, moco.queue_labels).backward()   # 4. the queue as it was before this batch
    moco.enqueue(keys, key_labels)                                # 5. only now: the loss no longer needs the old queue

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


def keep_statistics(module, keep):
    """Whether BatchNorm, which in training normalises by its batch, leaves its running statistics as they are."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.track_running_stats = not keep


class MoCo(nn.Module):
    """encoder: a torchvision-style constructor, encoder(num_classes=dim); for mlp its last layer must be `fc`
    dim: d, the embedding; K: slots in the queue, any number; m: momentum of the key encoder
    mlp: MoCo v2's two-layer head in place of the linear one
    seed: of the shuffle across ranks; the same on every rank
    micro_batches: J, the parts that each rank's batch is encoded in. W ranks then do what V = W J ranks with one part
    each would: BatchNorm sees one part, the shuffle goes over all, and the queue has the order of V ranks. Virtual rank
    v = r + W j is part j of rank r, images j, j + J, ... of its batch, or v, v + V, ... of the batch of all ranks"""

    def __init__(self, encoder, dim=128, K=65536, m=0.999, mlp=False, seed=0, micro_batches=1):
        super().__init__()
        self.K, self.m, self.micro_batches = K, m, micro_batches
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
    def keys(self, im_k, labels, prepare=lambda x: x):
        """Unit keys (W b, d) and labels (W b,) of the images of all W ranks, by (virtual) rank; own() takes a rank's.

        im_k (b, 3, H, W') and labels (b,) int64 of this rank, the same b on all; prepare: what turns the images into
        the encoder's input, after they have travelled (as uint8, if they come so). They are shuffled across ranks
        first and the keys put back in order: a query and its key must not share their BatchNorm batch, through which
        the encoder could otherwise tell which belong together.

        A rank receives of each batch (W - 1) / W * b * 3 * H * W' bytes of uint8 images on average, in an all-to-all,
        and (W - 1) * b * (4 d + 8) bytes of keys and labels, in one all-gather: for 8 ranks of 32 images at 224 px
        4.2 MB and 0.12 MB. The first does not grow with W; the second does, with the batch of all ranks.
        """
        W, J, b = ddp.world(), self.micro_batches, len(im_k) // self.micro_batches
        order = torch.randperm(W * J * b, generator=self.shuffle)         # image i of virtual rank v is number v b + i
        wanted = order.view(J, W, b).transpose(0, 1).reshape(W, J * b)    # row r: the images that rank r encodes
        v, i = wanted // b, wanted % b
        images = ddp.exchange(im_k, owner=v % W, place=i * J + v // W)
        k = []
        for j, part in enumerate(images.split(b)):
            keep_statistics(self.encoder_k, j > 0)                        # the running ones are virtual rank 0's
            k.append(F.normalize(self.encoder_k(prepare(part)).float()))
        keep_statistics(self.encoder_k, False)
        labels = labels.long().view(b, J).T.reshape(-1, 1).view(torch.float32)  # (J b, 2): an int64 as two floats
        packed = ddp.gather(torch.cat([torch.cat(k), labels], dim=1))               # (W J b, d + 2)
        packed = packed.view(W, J, b, -1).transpose(0, 1).flatten(0, 2)   # by virtual rank
        order = order.to(packed.device, non_blocking=True)                # no step waits for the device
        keys = torch.empty_like(packed[:, :-2]).index_copy_(0, order, packed[:, :-2])
        return keys, packed[:, -2:].contiguous().view(torch.int64).flatten()

    def own(self, keys, j=0):
        """This rank's share (b / J, ...) of what keys() gives: part j of its batch."""
        return keys.chunk(ddp.world() * self.micro_batches)[ddp.rank() + ddp.world() * j]

    @torch.no_grad()
    def enqueue(self, keys, labels):
        """Put keys (n, d) and labels (n,), the same on all ranks, over the oldest slots; any n, also more than K."""
        keys, labels = keys[-self.K:], labels[-self.K:]
        slots = (self.ptr + torch.arange(len(keys), device=keys.device)) % self.K
        self.queue[slots], self.queue_labels[slots] = keys.to(self.queue.dtype), labels
        self.ptr = (self.ptr + len(keys)) % self.K

    @torch.no_grad()
    def fill_queue(self, batches, prepare=lambda x: x):
        """Fill all K slots with real keys before step 0, from an iterable of (im_k, labels). The BatchNorm statistics
        that the pass leaves in the key encoder are undone. Ends with the iterable if that has fewer than K keys."""
        before = [x.clone() for x in self.encoder_k.buffers()]
        filled = 0
        for im_k, labels in batches:
            self.enqueue(*self.keys(im_k, labels, prepare))
            filled += len(labels) * ddp.world()
            if filled >= self.K:
                break
        for x, saved in zip(self.encoder_k.buffers(), before):
            x.copy_(saved)
