"""Momentum, queue and encoders; what needs two ranks is in two_ranks.py, which test_scripts.py starts."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import resnet
from kcl import kcl_loss
from moco import MoCo


def tiny(num_classes):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.fc = nn.Linear(4, num_classes)
    return net


def queue_of(K, dim=2):
    return MoCo(tiny, dim=dim, K=K)


def test_queue_pointer_and_labels_across_the_wrap():
    moco, K = queue_of(7), 7
    expected = [-1] * K
    for step in range(9):  # 3 does not divide 7: every third batch wraps
        labels = torch.tensor([10 * step, 10 * step + 1, 10 * step + 2])
        k = F.normalize(torch.randn(3, 2))
        moco.enqueue(k, labels)
        slots = [(3 * step + i) % K for i in range(3)]
        for slot, label in zip(slots, labels.tolist()):
            expected[slot] = label
        assert moco.queue_labels.tolist() == expected
        assert torch.equal(moco.queue[slots], k)
        assert moco.ptr == 3 * (step + 1) % K


def test_a_batch_larger_than_the_queue_leaves_its_last_keys():
    moco = queue_of(4)
    moco.enqueue(F.normalize(torch.randn(1, 2)), torch.tensor([9]))  # the pointer is not at 0
    k = F.normalize(torch.randn(11, 2))
    moco.enqueue(k, torch.arange(11))
    oldest_first = [(moco.ptr + i) % 4 for i in range(4)]
    assert moco.queue_labels[oldest_first].tolist() == [7, 8, 9, 10]
    assert torch.equal(moco.queue[oldest_first], k[7:])


def test_random_queue_is_unit_rows_without_labels():
    moco = queue_of(50, dim=16)
    assert torch.allclose(moco.queue.norm(dim=1), torch.ones(50)) and (moco.queue_labels == -1).all()


def test_momentum_update_is_exact_to_fp32():
    moco = MoCo(tiny, dim=8, K=4, m=0.9)
    assert all(torch.equal(a, b) for a, b in zip(moco.encoder_q.parameters(), moco.encoder_k.parameters()))
    with torch.no_grad():
        for p in moco.encoder_q.parameters():
            p.add_(torch.randn_like(p))
    expected = [0.9 * k.double() + 0.1 * q.double()
                for k, q in zip(moco.encoder_k.parameters(), moco.encoder_q.parameters())]
    moco.update_key_encoder()
    for k, e in zip(moco.encoder_k.parameters(), expected):
        assert torch.allclose(k.double(), e, rtol=0, atol=1e-6)


def test_gradient_reaches_the_query_encoder_only():
    moco = MoCo(tiny, dim=8, K=16)
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    q, (k, y_k) = F.normalize(moco.encoder_q(x)), moco.keys(x, y)
    assert torch.equal(y_k, y)
    kcl_loss(q, k, moco.queue, y, moco.queue_labels).backward()
    assert all(p.grad is not None for p in moco.encoder_q.parameters())
    assert all(p.grad is None and not p.requires_grad for p in moco.encoder_k.parameters())
    moco.enqueue(k, y)  # after backward: an in-place write before it would have been an error, as here:
    loss = kcl_loss(F.normalize(moco.encoder_q(x)), moco.keys(x, y)[0], moco.queue, y, moco.queue_labels)
    moco.enqueue(k, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("K", [5, 12, 13])
def test_filled_queue_is_real_and_leaves_batchnorm_alone(K):
    moco = MoCo(tiny, dim=8, K=K)
    before = [x.clone() for x in moco.encoder_k.buffers()]
    images = torch.randn(4, 3, 8, 8)
    moco.fill_queue((images, torch.arange(4)) for _ in range(100))
    assert (moco.queue_labels >= 0).all()
    assert all(map(torch.equal, before, moco.encoder_k.buffers()))
    assert moco.encoder_k[1].num_batches_tracked == 0
    assert torch.allclose(moco.queue[0], moco.keys(images, torch.arange(4))[0][moco.queue_labels[0]], atol=1e-6)
    moco.fill_queue((images, torch.arange(4)) for _ in range(2))
    assert moco.ptr == (4 * -(-K // 4) + 4 * 2) % K


def test_state_dict_carries_pointer_and_shuffle():
    a, b = queue_of(7), queue_of(7)
    a.enqueue(F.normalize(torch.randn(5, 2)), torch.arange(5))
    torch.randperm(3, generator=a.shuffle)
    b.load_state_dict(a.state_dict())
    assert b.ptr == 5 and torch.equal(a.queue, b.queue)
    assert torch.equal(torch.randperm(9, generator=a.shuffle), torch.randperm(9, generator=b.shuffle))


def test_mlp_head_and_any_constructor():
    moco = MoCo(resnet.ARCHS["resnet18"], dim=16, K=4, mlp=True)
    assert [type(m).__name__ for m in moco.encoder_q.fc] == ["Linear", "ReLU", "Linear"]
    assert moco.keys(torch.randn(2, 3, 32, 32), torch.tensor([5, -1]))[0].shape == (2, 16)


@pytest.mark.parametrize("arch, published", [("resnet20", 0.27e6), ("resnet32", 0.46e6)])
def test_cifar_resnets_have_the_published_size(arch, published):
    """He et al. 2016, Table 6. Exactly: 3x3 convolutions, two numbers a BatchNorm channel, the fc; no shortcut weights."""
    n = (int(arch[6:]) - 2) // 6
    convs = [(3, 16)] + [(16, 16)] * 2 * n + [(16, 32)] + [(32, 32)] * (2 * n - 1) + [(32, 64)] + [(64, 64)] * (2 * n - 1)
    exact = sum(9 * i * o + 2 * o for i, o in convs) + 64 * 10 + 10
    size = sum(p.numel() for p in resnet.ARCHS[arch]().parameters())
    assert size == exact and round(size / 1e6, 2) == published / 1e6


def test_backbone_file(tmp_path):
    """A plain state_dict comes back; its fc and a missing BatchNorm step counter, as in old files, do not matter."""
    net = resnet.ARCHS["resnet18"]()
    state = {n: x for n, x in net.state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "b.pt")
    back = resnet.load_backbone(tmp_path / "b.pt", "resnet18").eval()
    net.fc = nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(back(x), net.eval()(x))


def test_cifar_resnet_shapes():
    net = resnet.ARCHS["resnet8"](num_classes=7)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert net.layer3(net.layer2(net.layer1(torch.randn(2, 16, 32, 32)))).shape == (2, 64, 8, 8)
