"""The losses that KCL is compared with, against literal loops and closed forms; networks and criteria by name."""
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import baselines
import resnet
from baselines import uniform_targets
from kcl import kcl_loss

COUNTS = torch.tensor([350, 75, 27, 3])


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def flags(loss, **others):
    """train_rep.py's arguments, for ten epochs."""
    defaults = dict(dim=8, mlp=False, queue=6, m=0.9, seed=0, epochs=10, temperature=0.1, num_positives=6, drw=False)
    return SimpleNamespace(loss=loss, **defaults | others)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(baselines, "uniform_targets", partial(uniform_targets, steps=20))  # spread out is enough


# ---- what train_rep.py asks for

@pytest.mark.parametrize("loss", baselines.LOGITS)
def test_classifier_is_what_the_loss_has_trained(loss):
    """weight and bias on the backbone's features decide as the network does."""
    model = baselines.network(flags(loss), resnet.ARCHS["resnet8s"], COUNTS).eval()
    encoder, x = getattr(model, "encoder", model), torch.randn(6, 3, 32, 32)
    if "focal" in loss:
        assert torch.allclose(model.fc.bias.sigmoid(), torch.full((4,), 1 / 4))   # a sigmoid's prior is 1 / C
    nn.init.normal_(model.fc.weight)
    logits = model(x)
    assert logits.shape == (6, 4)
    weight, bias = baselines.classifier(model)
    encoder.fc = nn.Identity()
    ours = encoder(x) @ weight.T + bias                                   # (6, C)
    if loss == "ldam":  # up to the norm of the features, which is the same for all classes
        ours = ours / encoder(x).norm(dim=1, keepdim=True)
    assert torch.allclose(ours, logits, atol=1e-4) and not weight.requires_grad


def test_tsc_warms_up_with_kcl_in_the_first_half():
    model, args = baselines.network(flags("tsc"), resnet.ARCHS["resnet8s"], COUNTS), flags("tsc")
    q, k, queue, y, queue_y = unit(5, 8), unit(5, 8), unit(6, 8), torch.tensor([0, 1, 2, 3, 1]), torch.arange(6) - 1
    targets, step = model.targets, (q, k, queue, y, queue_y)
    targets.means.copy_(targets.targets[[2, 0, 3, 1]])                    # class 0 is nearest to target 2, ...
    before = targets.means.clone()
    warm = baselines.criterion(args, model, COUNTS, 4)(*step)
    assert warm.item() == pytest.approx(kcl_loss(*step, 6, 0.1).item(), rel=1e-5)
    assert targets.owned.tolist() == [0, 1, 2, 3] and not torch.equal(targets.means, before)  # they follow already
    pulled = baselines.criterion(args, model, COUNTS, 5)(*step)
    assert targets.owned.tolist() == [2, 0, 3, 1]
    expected = baselines.tsc_loss(*step, targets.targets[[2, 0, 3, 1]], 6, 0.1)
    assert pulled.item() == pytest.approx(expected.item(), rel=1e-6)


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


# ---- contrastive relatives

def test_supcon_loss():
    z, y = unit(10, 6), torch.tensor([0, 1, 1, 2, 0, 0, 1, 1, 2, 3])      # class 3 has no second embedding: left out
    total = 0
    for i in range(9):
        positives = [j for j in range(10) if j != i and y[j] == y[i]]
        denominator = sum(math.exp(z[i] @ z[a] / 0.1) for a in range(10) if a != i)
        total -= sum(math.log(math.exp(z[i] @ z[p] / 0.1) / denominator) for p in positives) / len(positives)
    assert baselines.supcon_loss(z, y, 0.1).item() == pytest.approx(total / 9, rel=1e-5)
    collapsed = torch.ones(10, 1).bfloat16()                              # log(N - 1), in fp32 also under autocast
    with torch.autocast("cpu", torch.bfloat16):
        assert baselines.supcon_loss(collapsed, y).item() == pytest.approx(math.log(9), rel=1e-6)
    assert baselines.supcon_loss(z[:2], torch.tensor([0, 1])).isnan()


def test_tsc_loss():
    q, k, queue, targets = unit(3, 6), unit(3, 6), unit(5, 6), unit(4, 6)
    y, queue_y, T, lam = torch.tensor([0, 1, 3]), torch.tensor([0, 0, 1, -1, 0]), 0.2, 0.3
    literal = 0
    for i in range(3):
        keys = [k[i], *queue]
        denominator = sum(math.exp(q[i] @ x / T) for x in [*keys, *targets])
        log_p = [math.log(math.exp(q[i] @ x / T) / denominator) for x in keys]
        positives = [0] + [1 + j for j in range(5) if queue_y[j] == y[i]]
        literal -= sum(log_p[j] for j in positives) / len(positives) / 3
        literal -= lam * math.log(math.exp(q[i] @ targets[y[i]] / T) / denominator) / 3
    assert baselines.tsc_loss(q, k, queue, y, queue_y, targets, None, T, lam).item() == pytest.approx(literal, rel=1e-5)
    one = [torch.ones(n, 1) for n in (3, 3, 5)]                           # all alike: 1.2 log(1 + K + C)
    collapsed = baselines.tsc_loss(*one, y, queue_y, torch.ones(4, 1), 0)
    assert collapsed.item() == pytest.approx(1.2 * math.log(1 + 5 + 4), rel=1e-5)


@pytest.mark.parametrize("C", [2, 10, 65])
def test_uniform_targets_are_the_simplex_where_one_fits(C):
    t = uniform_targets(C, 64)
    cosines = (t @ t.T)[~torch.eye(C, dtype=torch.bool)]
    assert torch.allclose(cosines, torch.full_like(cosines, -1 / (C - 1)), atol=1e-4)


def test_targets_follow_the_class_means_and_are_assigned_one_to_one():
    targets = baselines.Targets(4, 8)
    means = targets.means.clone()
    q, y = unit(6, 8), torch.tensor([2, 0, 2, 2, 0, 3])
    targets.follow(q, y)
    for c in range(4):
        mine = [q[i] for i in range(6) if y[i] == c]
        moved = F.normalize(0.9 * means[c] + 0.1 * F.normalize(sum(mine), dim=0), dim=0) if mine else means[c]
        assert torch.allclose(targets.means[c], moved, atol=1e-6)
    targets.means.copy_(F.normalize(targets.targets[[2, 0, 3, 1]] + 0.1 * torch.randn(4, 8)))
    targets.assign()
    assert targets.owned.tolist() == [2, 0, 3, 1] and torch.equal(targets.of_classes(), targets.targets[[2, 0, 3, 1]])
    targets.means.copy_(targets.targets[:1].repeat(4, 1))                 # all want one target: each gets its own
    targets.assign()
    assert sorted(targets.owned.tolist()) == [0, 1, 2, 3]
