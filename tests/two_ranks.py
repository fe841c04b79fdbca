"""What only two ranks can show; test_moco.py starts it on two, and torchrun on a machine with two GPUs. Prints ok on rank
0. With the argument `fail` rank 1 raises, while rank 0 waits for it."""
import sys

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import baselines
import ddp
from moco import MoCo


def small(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))


def same_on_both(*tensors):
    both = ddp.gather(torch.cat([x.flatten().double() for x in tensors])[None])
    return torch.equal(both[0], both[1])


def one_queue(rank, device, images, labels):
    """Keys are shuffled across the ranks, come back in order, and fill one queue."""
    moco, seen = MoCo(small, dim=5, K=10).to(device), []
    mine, expected = images.chunk(2)[rank], F.normalize(moco.encoder_k(images))
    moco.encoder_k.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for _ in range(20):
        keys, key_labels = moco.keys(mine, labels.chunk(2)[rank])
        assert torch.allclose(keys, expected, atol=1e-6) and torch.equal(key_labels, labels)
        assert torch.equal(moco.local_keys(key_labels), labels.chunk(2)[rank])
    foreign = sum(not (x == mine).flatten(1).all(1).any() for x in torch.cat(seen))
    assert 0.3 < foreign / 80 < 0.7, foreign                              # half of what a rank encodes is the other's

    moco.enqueue(keys, key_labels)
    assert moco.ptr == 8 and moco.queue_labels.tolist() == [*labels.tolist(), -1, -1]
    assert torch.equal(moco.queue[:8], keys) and same_on_both(moco.queue)


def bytes_received(rank, device):
    """On average a rank receives (W - 1) / W of the uint8 images, and the other ranks' keys of d fp32 and int64 labels."""
    moco, b, d, received, images = MoCo(small, dim=5, K=10).to(device), 4, 5, [], 0
    all_gather, all_to_all = dist.all_gather, dist.all_to_all_single

    def count_gather(out, x):
        received.append(out[1 - rank].numel() * x.element_size())
        all_gather(out, x)

    def count_all_to_all(out, x, from_each, to_each):
        received.append(from_each[1 - rank] * out[0].numel() * x.element_size())
        all_to_all(out, x, from_each, to_each)
    dist.all_gather, dist.all_to_all_single = count_gather, count_all_to_all
    for _ in range(50):
        received.clear()
        images_of_rank = torch.zeros(b, 3, 2, 2, dtype=torch.uint8, device=device)
        moco.keys(images_of_rank, torch.arange(b, device=device), prepare=torch.Tensor.float)
        assert received[1:] == [b * d * 4, b * 8]
        images += received[0] / 50
    dist.all_gather, dist.all_to_all_single = all_gather, all_to_all
    assert 0.8 < images / (1 / 2 * b * 3 * 2 * 2) < 1.2


def loss_of_all(rank, device, images, num_positives):
    """A loss on the embeddings of both ranks has the value and, after DDP's mean, the gradient of one process, with the
    same positives drawn."""
    net = small(5).to(device)
    labels, wrapped = torch.tensor([0, 0, 1, 0], device=device), ddp.wrap(net)
    views = images.view(2, 4, 3, 2, 2)                                    # (views, images, ...)
    share = views[:, 2 * rank:2 * rank + 2].flatten(0, 1)                 # both views of two images
    torch.manual_seed(1)
    loss = baselines.supcon_of_all_ranks(wrapped(share), labels[2 * rank:2 * rank + 2], 0.1, num_positives)
    loss.backward()
    torch.manual_seed(1)
    expected = baselines.supcon_loss(F.normalize(net(images)), labels.repeat(2), 0.1, num_positives)
    assert torch.allclose(loss, expected, atol=1e-5)
    for p, gradient in zip(net.parameters(), torch.autograd.grad(expected, net.parameters())):
        assert gradient.abs().max() > 1e-3 and torch.allclose(p.grad, gradient, atol=1e-5)


def main():
    device = ddp.init()
    rank = ddp.rank()
    if "fail" in sys.argv:
        assert rank == 0, "rank 1 has lost its data"
        dist.all_reduce(torch.zeros(1, device=device))
    assert ddp.world() == 2 and ddp.gather(torch.tensor([[rank, 7]], device=device)).tolist() == [[0, 7], [1, 7]]
    assert ddp.of_all_ranks([rank, "x"]) == [[0, "x"], [1, "x"]]
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 2, 2), torch.arange(8).where(torch.arange(8) < 7, -7)
    images, labels = images.to(device), labels.to(device)
    one_queue(rank, device, images, labels)
    bytes_received(rank, device)
    for num_positives in (None, 2):
        loss_of_all(rank, device, images, num_positives)
    ddp.print0("ok")


if __name__ == "__main__":
    ddp.run(main)
