"""
Momentum contrast: a query encoder, a key encoder that follows it, and a queue of earlier keys with their labels.

    moco = MoCo(torchvision.models.resnet50, dim=128, K=65536, m=0.999)
    optimizer = torch.optim.SGD(moco.encoder_q.parameters(), lr=0.1, momentum=0.9)
    for im_q, im_k, labels in batches:                                    # two views of (B, 3, H, W) images
        moco.update_key_encoder()                                         # 1. key encoder <- m * key + (1 - m) * query
        keys, key_labels = moco.keys(im_k, labels)                        # 2. keys of all ranks, without gradient
        q, k = F.normalize(moco.encoder_q(im_q)), moco.local_keys(keys)   # 3. this rank's queries and their keys
        loss = kcl_loss(q, k, moco.queue, labels, moco.queue_labels)      # 4. the queue does not hold this batch yet
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moco.enqueue(keys, key_labels)                                    # 5. after backward, which reads the old
                                                                          # queue; before the loss, a query's own
                                                                          # key would count twice
Then moco.encoder_q.state_dict() is the backbone, which train_linear.py reads. K is best below the number of images.
The queue starts as random vectors without a class. moco.fill_queue(batches), where a batch is (im_k, labels), replaces
them with real keys.

The method is that of He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020. KCL
adds the labels in the queue (ICLR 2021, App. A). Wrap only `encoder_q` in DistributedDataParallel. If you wrap the
whole MoCo, DDP broadcasts its queue in each step, though every rank computes the same queue by itself. Build the MoCo
under the same torch seed on all ranks, or their queues differ: DDP makes only `encoder_q` equal.

It needs torch and ddp.py.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import ddp


def freeze_bn_statistics(module, frozen):
    """Stop or resume updates of BatchNorm's running statistics. Training uses the batch's own in either case."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.track_running_stats = not frozen


class MoCo(nn.Module):
    """The two encoders and the queue.

    encoder  a constructor: encoder(num_classes=dim) returns a network (B, 3, H, W) -> (B, dim)
    dim      d, the size of an embedding
    K        number of slots in the queue; it need not be a multiple of the batch
    m        momentum of the key encoder
    seed     seed of the shuffle across ranks, the same on every rank
    parts    J: split each rank's batch of J * b images into J parts and encode them one by one. W ranks then train as
             W * J ranks would: BatchNorm sees b images, keys are shuffled over all parts, and they enter the queue
             in the order of W * J ranks. Part j of rank r is called virtual rank r + W * j; it has images j, j + J, ...
    """

    def __init__(self, encoder, dim=128, K=65536, m=0.999, seed=0, parts=1):
        super().__init__()
        self.K, self.m, self.parts = K, m, parts
        self.encoder_q, self.encoder_k = encoder(num_classes=dim), encoder(num_classes=dim)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.parameters_kq = None  # collected once, at the first update: collecting takes longer than the update
        self.register_buffer("queue", F.normalize(torch.randn(K, dim)))   # (K, d)
        self.register_buffer("queue_labels", torch.full((K,), -1))        # (K,), -1 = no real key yet
        self.ptr = 0  # the slot that the next key takes; a Python int, so that no step waits for the device
        self.shuffle = torch.Generator().manual_seed(seed)

    def get_extra_state(self):
        return {"ptr": self.ptr, "shuffle": self.shuffle.get_state()}

    def set_extra_state(self, state):
        self.ptr = state["ptr"]
        self.shuffle.set_state(state["shuffle"].cpu())

    @torch.no_grad()
    def update_key_encoder(self):
        """theta_k <- m * theta_k + (1 - m) * theta_q. Each encoder keeps its own BatchNorm statistics."""
        if self.parameters_kq is None:
            self.parameters_kq = list(self.encoder_k.parameters()), list(self.encoder_q.parameters())
        torch._foreach_lerp_(*self.parameters_kq, 1 - self.m)

    @torch.no_grad()
    def keys(self, im_k, labels, prepare=lambda x: x):
        """Unit keys (W * J * b, d) and labels (W * J * b,) of the images of all ranks, ordered by virtual rank.
        local_keys() picks those of this rank.

        im_k (J * b, 3, height, width) and labels (J * b,) are this rank's. Every rank must have the same number. Ranks
        exchange the images as they are (uint8 in train_rep.py); prepare then turns them into the encoder's input.

        A query and its key must not be in the same BatchNorm batch, or its statistics tell the encoder that the two
        belong together. So the images are shuffled over all virtual ranks and encoded there, and the keys are put back
        in order. With one rank and one part (digits, CIFAR) both encoders see the same batch; shuffling has no effect.

        With 8 ranks of 32 images at 224 px, each rank receives 4.2 MB of images and 0.12 MB of keys. With more ranks
        the images stay below 4.8 MB.
        """
        W, J, b = ddp.world(), self.parts, len(im_k) // self.parts

        # fetch the images that this rank encodes
        order = torch.randperm(W * J * b, generator=self.shuffle)         # image i of virtual rank v: number v * b + i
        wanted = order.view(J, W, b).transpose(0, 1).reshape(W, J * b)    # row r: the images that rank r encodes
        v, i = wanted // b, wanted % b
        images = ddp.exchange(im_k, owner=v % W, place=i * J + v // W)

        # encode them part by part; only the first part updates the running statistics
        encoded = []
        for j, part in enumerate(images.split(b)):
            if J > 1:
                freeze_bn_statistics(self.encoder_k, j > 0)
            encoded.append(F.normalize(self.encoder_k(prepare(part)).float()))
        if J > 1:
            freeze_bn_statistics(self.encoder_k, False)

        # gather the keys of all ranks and put them back in order
        def by_virtual_rank(x):
            """(J * b, ...) of each rank, part after part -> (W * J * b, ...) of all."""
            return ddp.gather(x).view(W, J, b, *x.shape[1:]).transpose(0, 1).flatten(0, 2)

        shuffled = by_virtual_rank(torch.cat(encoded))                    # (W * J * b, d)
        order = order.to(shuffled.device, non_blocking=True)
        keys = torch.empty_like(shuffled).index_copy_(0, order, shuffled)
        return keys, by_virtual_rank(labels.reshape(b, J).T.flatten())

    def local_keys(self, keys, j=0):
        """Pick the keys (b, d) of part j of this rank's batch from all those that keys() returns."""
        return keys.chunk(ddp.world() * self.parts)[ddp.rank() + ddp.world() * j]

    @torch.no_grad()
    def enqueue(self, keys, labels):
        """Overwrite the oldest slots with keys (n, d) and labels (n,), the same on all ranks. n may exceed K."""
        keys, labels = keys[-self.K:], labels[-self.K:]
        slots = (self.ptr + torch.arange(len(keys), device=keys.device)) % self.K
        self.queue[slots] = keys.to(self.queue.dtype)
        self.queue_labels[slots] = labels.long()
        self.ptr = (self.ptr + len(keys)) % self.K

    @torch.no_grad()
    def fill_queue(self, batches, prepare=lambda x: x):
        """Fill all K slots with real keys before training starts, from an iterable of (im_k, labels). If it has fewer
        than K keys, the other slots stay random. The key encoder's BatchNorm statistics are restored at the end."""
        before = [x.clone() for x in self.encoder_k.buffers()]
        filled = 0
        for im_k, labels in batches:
            self.enqueue(*self.keys(im_k, labels, prepare))
            filled += len(labels) * ddp.world()
            if filled >= self.K:
                break
        for x, saved in zip(self.encoder_k.buffers(), before):
            x.copy_(saved)
