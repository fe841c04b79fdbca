"""Momentum, keys, queue and encoders; two_ranks.py has what only two ranks can show."""
import copy
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import resnet
from moco import MoCo


def tiny(num_classes):
    """An encoder with BatchNorm, whose last layer is `fc`."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.fc = nn.Linear(4, num_classes)
    return net


def test_what_only_two_ranks_show(ranks):
    assert "ok" in ranks(2, "two_ranks")


def test_a_new_moco_has_equal_encoders_and_a_random_queue_without_labels():
    moco = MoCo(tiny, dim=16, K=50)
    assert all(map(torch.equal, moco.encoder_q.parameters(), moco.encoder_k.parameters()))
    assert not any(p.requires_grad for p in moco.encoder_k.parameters())
    assert torch.allclose(moco.queue.norm(dim=1), torch.ones(50)) and (moco.queue_labels == -1).all()
    fc = MoCo(partial(resnet.with_head, resnet.ARCHS["resnet8s"], mlp=True), dim=16, K=4).encoder_q.fc
    assert [tuple(p.shape) for p in fc.parameters()] == [(64, 64), (64,), (16, 64), (16,)]


def test_momentum_update():
    moco = MoCo(tiny, dim=8, K=4, m=0.9)
    for p in moco.encoder_q.parameters():
        nn.init.normal_(p)
    moco.encoder_q[1].running_mean.fill_(3)
    expected = [0.9 * k.double() + 0.1 * q.double()
                for k, q in zip(moco.encoder_k.parameters(), moco.encoder_q.parameters())]
    moco.update_key_encoder()
    for k, e in zip(moco.encoder_k.parameters(), expected):
        assert torch.allclose(k.double(), e, rtol=0, atol=1e-6)
    assert (moco.encoder_k[1].running_mean == 0).all()                    # BatchNorm's statistics are not averaged


# ---- keys

@pytest.mark.parametrize("parts", [1, 2, 4])
def test_one_rank_with_parts_does_what_so_many_ranks_do(parts):
    """Literally: rank v has images v, v + parts, ...; all images are shuffled, encoded batch by batch, put back."""
    torch.manual_seed(0)
    moco, b = MoCo(tiny, dim=8, K=4, seed=5, parts=parts), 3
    images, labels = torch.randint(256, (parts * b, 3, 8, 8), dtype=torch.uint8), torch.arange(2 * parts * b)[::2]
    alone = copy.deepcopy(moco.encoder_k)
    keys, key_labels = moco.keys(images, labels, prepare=torch.Tensor.float)      # labels: a strided view

    of_ranks = [i for v in range(parts) for i in range(v, parts * b, parts)]
    order = torch.randperm(parts * b, generator=torch.Generator().manual_seed(5)).tolist()
    expected = torch.empty(parts * b, 8)
    for v in range(parts):
        batch = order[v * b:(v + 1) * b]
        with torch.no_grad():
            encoded = F.normalize(alone(images[[of_ranks[n] for n in batch]].float()))
        for n, key in zip(batch, encoded):
            expected[n] = key
        if v == 0:                                                        # rank 0's statistics are kept
            mean = alone[1].running_mean.clone()
    assert torch.allclose(keys, expected, atol=1e-5) and not keys.requires_grad
    assert key_labels.tolist() == [2 * i for i in of_ranks]
    assert torch.allclose(moco.encoder_k[1].running_mean, mean) and moco.encoder_k[1].num_batches_tracked == 1
    for j in range(parts):                                                # part j is images j, j + parts, ...
        assert torch.equal(moco.local_keys(key_labels, j), labels[j::parts])


# ---- the queue

@pytest.mark.parametrize("K", [1, 4, 7])
def test_the_queue_holds_the_last_keys(K):
    """Any number at a time, also more than K; from the pointer on the queue goes from the oldest key to the newest."""
    moco = MoCo(tiny, dim=2, K=K)
    keys, labels = moco.queue, [-1] * K
    for step, n in enumerate((3, 3, 3, 1, 11, 4, 7, 2, 30)):
        new, new_labels = F.normalize(torch.randn(n, 2)), torch.arange(n, dtype=torch.int32) + 100 * step
        moco.enqueue(new, new_labels)
        keys, labels = torch.cat([keys, new])[-K:], (labels + new_labels.tolist())[-K:]
        order = [(moco.ptr + i) % K for i in range(K)]
        assert torch.equal(moco.queue[order], keys) and moco.queue_labels[order].tolist() == labels


@pytest.mark.parametrize("K", [5, 12, 13])
def test_filled_queue_is_real_and_leaves_batchnorm_alone(K):
    moco = MoCo(tiny, dim=8, K=K)
    before = [x.clone() for x in moco.encoder_k.buffers()]
    images, taken = torch.randn(4, 3, 8, 8), []
    moco.fill_queue((taken.append(1) or images, torch.arange(4)) for _ in range(100))
    assert (moco.queue_labels >= 0).all() and len(taken) == -(-K // 4)
    assert all(map(torch.equal, before, moco.encoder_k.buffers()))
    assert torch.allclose(moco.queue, moco.keys(images, torch.arange(4))[0][moco.queue_labels], atol=1e-5)
    moco.fill_queue((images, torch.arange(4)) for _ in range(1))          # fewer than K: it ends with them
    assert moco.ptr == 4 * (len(taken) + 1) % K


def test_state_dict_carries_pointer_and_shuffle():
    a, b = MoCo(tiny, dim=2, K=7, seed=1), MoCo(tiny, dim=2, K=7, seed=2)
    a.enqueue(F.normalize(torch.randn(5, 2)), torch.arange(5))
    torch.randperm(3, generator=a.shuffle)
    b.load_state_dict(a.state_dict())
    assert b.ptr == 5 and torch.equal(a.queue, b.queue) and torch.equal(a.queue_labels, b.queue_labels)
    assert torch.equal(torch.randperm(9, generator=a.shuffle), torch.randperm(9, generator=b.shuffle))


# ---- encoders

@pytest.mark.parametrize("arch, published", [("resnet20", 0.27), ("resnet32", 0.46)])
def test_cifar_resnets_have_the_published_size(arch, published):
    """He et al. 2016, Table 6: 3x3 convolutions, two numbers per BatchNorm channel, the fc; no weights in shortcuts."""
    n = (int(arch[6:]) - 2) // 6
    widths = [3] + [16] * (1 + 2 * n) + [32] * 2 * n + [64] * 2 * n
    exact = sum(9 * i * o + 2 * o for i, o in zip(widths, widths[1:])) + 64 * 10 + 10
    net = resnet.ARCHS[arch]()
    assert sum(p.numel() for p in net.parameters()) == exact and round(exact / 1e6, 2) == published
    assert net.layer3(net.layer2(net.layer1(torch.randn(2, 16, 32, 32)))).shape == (2, 64, 8, 8)
