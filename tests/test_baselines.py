"""The losses that KCL is compared with, against literal loops and closed forms; networks and criteria by name."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import baselines
import resnet

COUNTS = torch.tensor([350, 75, 27, 3])


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def flags(loss, **others):
    """train_rep.py's arguments, for ten epochs."""
    defaults = dict(dim=8, mlp=False, queue=6, m=0.9, seed=0, epochs=10, temperature=0.1, num_positives=6, drw=False)
    return SimpleNamespace(loss=loss, **defaults | others)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- what train_rep.py asks for

@pytest.mark.parametrize("loss", baselines.CLASSIFICATION)
def test_classifier_is_what_the_loss_has_trained(loss):
    """weight and bias on the backbone's features decide as the network does."""
    model = baselines.network(flags(loss), resnet.ARCHS["resnet8s"], COUNTS).eval()
    encoder, x = getattr(model, "encoder", model), torch.randn(6, 3, 32, 32)
    if "focal" in loss:
        assert torch.allclose(model.fc.bias.sigmoid(), torch.full((4,), 1 / 4))   # a sigmoid's prior is 1 / C
    nn.init.normal_(model.fc.weight)
    logits = model(x)
    assert logits.shape == (6, 4)
    weight, bias = baselines.weight_and_bias(model.fc)
    encoder.fc = nn.Identity()
    ours = encoder(x) @ weight.T + bias                                   # (6, C)
    if loss == "ldam":  # up to the norm of the features, which is the same for all classes
        ours = ours / encoder(x).norm(dim=1, keepdim=True)
    assert torch.allclose(ours, logits, atol=1e-4) and not weight.requires_grad


# ---- re-weighting

@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 1 - 1e-9])
def test_effective_number_weights(beta):
    literal = [(1 - beta) / (1 - beta ** n) for n in (350, 75, 27, 3)]
    found = baselines.effective_number_weights(COUNTS, beta).tolist()
    assert found == pytest.approx([w * 4 / sum(literal) for w in literal], rel=1e-6)
    limit = {0.0: torch.ones(4), 1 - 1e-9: 1 / COUNTS}                    # all alike, and inverse frequency
    if beta in limit:
        assert found == pytest.approx((limit[beta] / limit[beta].sum() * 4).tolist(), rel=1e-4)
    assert baselines.effective_number_weights([5, 0], beta).isfinite().all()  # a class without images counts as 1
    with pytest.raises(ValueError, match="beta"):
        baselines.effective_number_weights(COUNTS, 1.0)


@pytest.mark.parametrize("gamma, weighted", [(0.0, False), (2.0, False), (0.5, True)])
def test_focal_loss(gamma, weighted):
    z, y, w = torch.randn(5, 4) * 3, torch.tensor([0, 3, 1, 1, 2]), torch.tensor([0.5, 1.0, 2.0, 0.5])
    total = 0
    for i in range(5):
        for c in range(4):
            p = 1 / (1 + math.exp(-z[i, c]))
            p = p if c == y[i] else 1 - p
            total += -(w[y[i]].item() if weighted else 1) * (1 - p) ** gamma * math.log(p) / 5
    assert baselines.focal_loss(z, y, gamma, w if weighted else None).item() == pytest.approx(total, rel=1e-5)


def test_focal_loss_without_focus_is_the_binary_cross_entropy_and_never_overflows():
    z, y = torch.tensor([[300.0, -300.0], [-300.0, 300.0]], requires_grad=True), torch.tensor([1, 1])
    expected = F.binary_cross_entropy_with_logits(z, F.one_hot(y).float(), reduction="sum") / 2
    assert baselines.focal_loss(z, y, gamma=0).item() == pytest.approx(expected.item())
    baselines.focal_loss(z, y).backward()
    assert z.grad.isfinite().all()


# ---- LDAM

def test_ldam_margins_and_cosines():
    assert baselines.ldam_margins([1, 16, 81, 10_000]).tolist() == pytest.approx([0.5, 0.25, 0.5 / 3, 0.05])
    assert baselines.ldam_margins([16, 256], max_margin=0.8).tolist() == pytest.approx([0.8, 0.4])
    head, x = baselines.NormedLinear(7, 3), torch.randn(4, 7)
    nn.init.normal_(head.weight)
    literal = [[F.cosine_similarity(x[i], head.weight[c], dim=0).item() for c in range(3)] for i in range(4)]
    assert torch.allclose(head(x), torch.tensor(literal), atol=1e-6)


@pytest.mark.parametrize("weight", [None, torch.tensor([0.2, 1.0, 1.8])])
def test_ldam_loss(weight):
    cosines, y, total, norm = torch.rand(6, 3) * 2 - 1, torch.tensor([0, 1, 2, 2, 1, 0]), 0, 0
    margins = baselines.ldam_margins([100, 20, 2])
    for i in range(6):
        z = [30 * (cosines[i, c].item() - (margins[c].item() if c == y[i] else 0)) for c in range(3)]
        w = 1 if weight is None else weight[y[i]].item()
        total += -w * (z[y[i]] - math.log(sum(map(math.exp, z))))
        norm += w
    assert baselines.ldam_loss(cosines, y, margins, weight=weight).item() == pytest.approx(total / norm, rel=1e-5)


# ---- BBN

def test_bbn_halves_its_batch_and_mixes_as_in_the_paper():
    """By hand: the shared part, then each branch on its own half of the images."""
    net = baselines.BBN(resnet.ARCHS["resnet8s"], 10)
    net.alpha, branches, e = 0.7, net.branches[0], net.encoder
    assert all(map(torch.equal, branches.conventional.parameters(), branches.rebalanced.parameters()))
    for p in branches.rebalanced.parameters():
        nn.init.normal_(p, std=0.1)

    def features(x, branch):
        return branch(e.layer2(e.layer1(F.relu(e.bn1(e.conv1(x)))))).mean((2, 3))
    x, r = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    f_c, f_r = features(x, branches.conventional), features(r, branches.rebalanced)
    mixed = net.fc(torch.cat([2 * 0.7 * f_c, 2 * 0.3 * f_r], dim=1))
    assert f_c.shape == (4, 64) and torch.allclose(net(torch.cat([x, r])), mixed, atol=1e-5)
    net.eval()
    both = torch.cat([features(x, branches.conventional), features(x, branches.rebalanced)], dim=1)
    assert torch.allclose(net(x), net.fc(both), atol=1e-5)                # evaluation is alpha = 1/2


# ---- KCL and FCL inside the batch

@pytest.mark.parametrize("num_positives", [None, 0, 1, 2, 3, 50])
def test_losses_inside_the_batch(num_positives, monkeypatch):
    """Eq. 4 of sec. 4, term by term: anchors, positives and denominators of 2N embeddings."""
    N, T = 7, 0.1
    y = torch.tensor([0, 1, 1, 2, 0, 0, -1])                              # class 2 has one image, the last is unknown
    z, labels, drawn = unit(2 * N, 6).double(), y.repeat(2), []
    choose = baselines.choose_positives
    monkeypatch.setattr(baselines, "choose_positives", lambda *args: drawn.append(choose(*args)) or drawn[-1])
    loss = baselines.supcon_loss(z, labels, T, num_positives)

    total = 0
    for i in range(2 * N):
        other_view = (i + N) % (2 * N)
        others = [j for j in range(2 * N) if j not in (i, other_view) and labels[j] == labels[i] >= 0]
        chosen = drawn[0][i].nonzero()[:, 0].tolist()
        assert set(chosen) <= set(others)
        assert len(chosen) == (len(others) if num_positives is None else min(num_positives, len(others)))
        denominator = sum(math.exp(z[i] @ z[j] / T) for j in range(2 * N) if j != i)
        positives = [other_view, *chosen]
        total -= sum(math.log(math.exp(z[i] @ z[p] / T) / denominator) for p in positives) / len(positives)
    assert loss.item() == pytest.approx(total / (2 * N), rel=1e-12)


def test_losses_inside_the_batch_compute_in_fp32():
    collapsed, labels = torch.ones(10, 1).bfloat16(), torch.tensor([0, 1, 1, 2, 0]).repeat(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert baselines.supcon_loss(collapsed, labels).item() == pytest.approx(math.log(9), rel=1e-6)
