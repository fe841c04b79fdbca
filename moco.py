"""
Momentum contrast: a query encoder, a key encoder that follows it, a queue of earlier keys with their labels.

    moco = MoCo(torchvision.models.resnet50, dim=128, K=65536, m=0.999)
    optimizer = torch.optim.SGD(moco.encoder_q.parameters(), lr=0.1, momentum=0.9)
    for im_q, im_k, labels in batches:                                    # two views of (B, 3, H, W) images
        moco.update_key_encoder()                                         # 1. key encoder <- m key + (1 - m) query
        keys, key_labels = moco.keys(im_k, labels)                        # 2. keys of all ranks, without gradient
        q, k = F.normalize(moco.encoder_q(im_q)), moco.own(keys)          # 3. queries, and the keys beside them
        loss = kcl_loss(q, k, moco.queue, labels, moco.queue_labels)      # 4. the queue as it was before this batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moco.enqueue(keys, key_labels)                                    # 5. only now: in the queue a query's own key
                                                                          # would count twice, and could be drawn
The queue starts as random vectors of no class; moco.fill_queue((im_k, labels) of some batches) makes them real keys.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020; labels in the queue as KCL
(ICLR 2021, App. A) needs them. Wrap `encoder_q` alone in DistributedDataParallel, not the MoCo, whose queue would be
broadcast in each step: every rank computes the same queue by itself. So build the MoCo under the same torch seed on all
ranks; DDP makes only the `encoder_q` equal. Needs torch and ddp.py.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import ddp


def with_head(encoder, dim, mlp=False):
    """An encoder with a head to (B, dim): linear, or MoCo v2's two layers. The encoder's last layer must be `fc`."""
    e = encoder(num_classes=dim)
    if mlp:
        D = e.fc.in_features
        e.fc = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, dim))
    return e


def keep_statistics(module, keep):
    """keep: BatchNorm leaves its running statistics as they are. In training it normalises by its batch either way."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.track_running_stats = not keep


class MoCo(nn.Module):
    """encoder: a torchvision-style constructor, encoder(num_classes=dim); for mlp its last layer must be `fc`
    dim: d, the embedding; K: slots in the queue, any number; m: momentum of the key encoder
    mlp: MoCo v2's two-layer head in place of the linear one
    seed: of the shuffle across ranks; the same on every rank
    parts: J, the parts that each rank's batch of b J images is encoded in, one by one. W ranks do what W J ranks with
        one part each would do: BatchNorm sees b images, the shuffle goes over all parts, and the queue has the order of
        W J ranks. Virtual rank v = r + W j is part j of rank r: images j, j + J, ... of its batch. With W = 2 and
        J = 2, rank 0 holds virtual ranks 0 and 2, rank 1 holds 1 and 3."""

    def __init__(self, encoder, dim=128, K=65536, m=0.999, mlp=False, seed=0, parts=1):
        super().__init__()
        self.K, self.m, self.parts = K, m, parts
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
        """Unit keys (W J b, d) and labels (W J b,) of the images of all ranks, by virtual rank; own() takes a share.

        im_k (J b, 3, height, width) and labels (J b,) of this rank, equally many on all ranks. prepare: what turns
        images into the encoder's input, after they have travelled as uint8.
        The images are shuffled over all virtual ranks, encoded, and the keys put back in order: a query and its key
        must not share their BatchNorm batch, through which the encoder could tell that they belong together. One rank
        with one part has one batch only, so there they share it.

        A rank receives (W - 1) / W of J b images on average and all other ranks' keys and labels: for 8 ranks of 32
        images at 224 px 4.2 MB, less than 4.8 for any W, and 0.12 MB, which grow with W.
        """
        W, J, b = ddp.world(), self.parts, len(im_k) // self.parts
        order = torch.randperm(W * J * b, generator=self.shuffle)         # image i of virtual rank v is number v b + i
        wanted = order.view(J, W, b).transpose(0, 1).reshape(W, J * b)    # row r: the images that rank r encodes
        v, i = wanted // b, wanted % b
        images = ddp.exchange(im_k, owner=v % W, place=i * J + v // W)

        k = []
        for j, part in enumerate(images.split(b)):
            keep_statistics(self.encoder_k, j > 0)                        # the running ones are the first part's
            k.append(F.normalize(self.encoder_k(prepare(part)).float()))
        keep_statistics(self.encoder_k, False)

        def by_virtual_rank(x):
            """(J b, ...) of each rank, part after part -> (W J b, ...) of all."""
            return ddp.gather(x).view(W, J, b, *x.shape[1:]).transpose(0, 1).flatten(0, 2)

        shuffled = by_virtual_rank(torch.cat(k))                          # (W J b, d)
        order = order.to(shuffled.device, non_blocking=True)
        keys = torch.empty_like(shuffled).index_copy_(0, order, shuffled)
        return keys, by_virtual_rank(labels.reshape(b, J).T.flatten())

    def own(self, keys, j=0):
        """This rank's share (b, ...) of what keys() gives: part j of its batch."""
        return keys.chunk(ddp.world() * self.parts)[ddp.rank() + ddp.world() * j]

    @torch.no_grad()
    def enqueue(self, keys, labels):
        """Put keys (n, d) and labels (n,), the same on all ranks, over the oldest slots; any n, also more than K."""
        keys, labels = keys[-self.K:], labels[-self.K:]
        slots = (self.ptr + torch.arange(len(keys), device=keys.device)) % self.K
        self.queue[slots], self.queue_labels[slots] = keys.to(self.queue.dtype), labels.long()
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
