"""The losses that KCL is compared with, against literal loops and closed forms; BBN, TSC's targets."""
import math

import pytest
import torch
import torch.nn.functional as F

import baselines
import evaluate
import resnet
import train_linear


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


# ---- re-weighting

@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.9999])
def test_effective_number_weights(beta):
    counts = [350, 75, 27, 3, 1]
    literal = [(1 - beta) / (1 - beta ** n) for n in counts]
    literal = [w * len(counts) / sum(literal) for w in literal]
    assert baselines.effective_number_weights(counts, beta).tolist() == pytest.approx(literal, rel=1e-6)


def test_effective_number_weights_between_none_and_inverse_frequency():
    counts = torch.tensor([350, 75, 3])
    assert baselines.effective_number_weights(counts, 0).tolist() == [1, 1, 1]
    inverse = 1 / counts
    assert torch.allclose(baselines.effective_number_weights(counts, 1 - 1e-9), (inverse / inverse.sum() * 3), rtol=1e-4)
    assert baselines.effective_number_weights([5, 0], 0.9).isfinite().all()  # a class without images counts as 1
    with pytest.raises(ValueError, match="beta"):
        baselines.effective_number_weights(counts, 1.0)


@pytest.mark.parametrize("gamma, weighted", [(0.0, False), (2.0, False), (0.5, True)])
def test_focal_loss(gamma, weighted):
    torch.manual_seed(0)
    z, y, w = torch.randn(5, 4) * 3, torch.tensor([0, 3, 1, 1, 2]), torch.tensor([0.5, 1.0, 2.0, 0.5])
    total = 0
    for i in range(5):
        for c in range(4):
            p = 1 / (1 + math.exp(-z[i, c]))
            p = p if c == y[i] else 1 - p
            total += -(w[y[i]].item() if weighted else 1) * (1 - p) ** gamma * math.log(p) / 5
    assert baselines.focal_loss(z, y, gamma, w if weighted else None).item() == pytest.approx(total, rel=1e-5)


def test_focal_loss_without_focus_is_the_binary_cross_entropy_and_never_overflows():
    z, y = torch.tensor([[300.0, -300.0], [-300.0, 300.0]]).requires_grad_(), torch.tensor([1, 1])
    loss = baselines.focal_loss(z, y, gamma=0)
    assert loss.item() == pytest.approx(F.binary_cross_entropy_with_logits(z, F.one_hot(y).float(), reduction="sum").item() / 2)
    loss = baselines.focal_loss(z, y)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


# ---- LDAM

def test_ldam_margins_closed_form():
    assert baselines.ldam_margins([1, 16, 81, 10_000]).tolist() == pytest.approx([0.5, 0.25, 0.5 / 3, 0.05])
    assert baselines.ldam_margins([16, 256], max_margin=0.8).tolist() == pytest.approx([0.8, 0.4])


@pytest.mark.parametrize("weight", [None, torch.tensor([0.2, 1.0, 1.8])])
def test_ldam_loss(weight):
    torch.manual_seed(0)
    cosines, y, margins = torch.rand(6, 3) * 2 - 1, torch.tensor([0, 1, 2, 2, 1, 0]), baselines.ldam_margins([100, 20, 2])
    total = norm = 0
    for i in range(6):
        z = [30 * (cosines[i, c].item() - (margins[c].item() if c == y[i] else 0)) for c in range(3)]
        w = 1 if weight is None else weight[y[i]].item()
        total += -w * (z[y[i]] - math.log(sum(map(math.exp, z))))
        norm += w
    assert baselines.ldam_loss(cosines, y, margins, weight=weight).item() == pytest.approx(total / norm, rel=1e-5)


def test_normed_linear_is_the_cosine():
    head, x = baselines.NormedLinear(7, 3), torch.randn(4, 7)
    literal = [[F.cosine_similarity(x[i], head.weight[c], dim=0).item() for c in range(3)] for i in range(4)]
    assert torch.allclose(head(x), torch.tensor(literal), atol=1e-6)
    assert torch.equal(head(5 * x).argmax(1), (x @ F.normalize(head.weight).T).argmax(1))  # what head.pt holds decides alike


# ---- BBN

def test_bbn_mixes_as_in_the_paper():
    torch.manual_seed(0)
    net = baselines.BBN(resnet.ARCHS["resnet8"], 10).eval()
    branches = net.branches[0]
    assert all(torch.equal(a, b) for a, b in zip(branches.conventional.parameters(), branches.rebalanced.parameters()))
    with torch.no_grad():
        for p in branches.rebalanced.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x, r, alpha = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), 0.7
    trunk = resnet.ARCHS["resnet8"]()  # by hand: the shared part, then each branch on its own images
    shared = lambda x: net.encoder.layer2(net.encoder.layer1(F.relu(net.encoder.bn1(net.encoder.conv1(x)))))
    f_c, f_r = branches.conventional(shared(x)).mean((2, 3)), branches.rebalanced(shared(r)).mean((2, 3))
    assert f_c.shape == (4, 64) and type(trunk.layer3[-1]) is type(branches.conventional)
    mixed = net.fc(torch.cat([2 * alpha * f_c, 2 * (1 - alpha) * f_r], dim=1))
    assert torch.allclose(net(x, r, alpha), mixed, atol=1e-5)
    assert torch.allclose(net(x), net(x, x, 0.5), atol=1e-5)  # evaluation is alpha = 1/2


@pytest.mark.parametrize("arch, D", [("resnet8", 64), ("resnet18", 512), ("resnet50", 2048)])
def test_branch_doubles_the_last_block_only(arch, D):
    encoder = resnet.ARCHS[arch]()
    own = sum(p.numel() for p in encoder.parameters()) - sum(p.numel() for p in encoder.fc.parameters())
    stage = getattr(encoder, "layer4", None) or encoder.layer3
    block = sum(p.numel() for p in stage[-1].parameters())
    encoder.fc = torch.nn.Identity()
    baselines.branch(encoder)
    assert sum(p.numel() for p in encoder.parameters()) == own + block
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, 2 * D)


def test_bbn_alpha_and_loss():
    assert [baselines.bbn_alpha(t, 200) for t in (0, 100, 199)] == pytest.approx([1, 0.75, 1 - 0.995 ** 2])
    z, y, r = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 2, 1, 0, 2])
    literal = sum(-(0.7 * z[i].log_softmax(0)[y[i]] + 0.3 * z[i].log_softmax(0)[r[i]]).item() for i in range(5)) / 5
    assert baselines.bbn_loss(z, y, r, 0.7).item() == pytest.approx(literal, rel=1e-5)


# ---- contrastive relatives

def test_supcon_loss():
    torch.manual_seed(0)
    z, y = unit(10, 6), torch.tensor([0, 1, 1, 2, 0, 0, 1, 1, 2, 3])  # class 3 has no second embedding: left out
    total, anchors = 0, 0
    for i in range(10):
        positives = [j for j in range(10) if j != i and y[j] == y[i]]
        if not positives:
            continue
        denominator = sum(math.exp(z[i] @ z[a] / 0.1) for a in range(10) if a != i)
        total += -sum(math.log(math.exp(z[i] @ z[p] / 0.1) / denominator) for p in positives) / len(positives)
        anchors += 1
    assert anchors == 9
    assert baselines.supcon_loss(z, y, 0.1).item() == pytest.approx(total / anchors, rel=1e-5)
    with pytest.raises(ValueError, match="both views"):
        baselines.supcon_loss(z[:2], torch.tensor([0, 1]))


def test_supcon_loss_is_fp32_under_autocast_and_has_finite_gradients():
    z = unit(8, 6).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = baselines.supcon_loss(z, torch.arange(4).repeat(2))
    loss.backward()
    assert loss.dtype == torch.float32 and z.grad.isfinite().all()


@pytest.mark.parametrize("C", [2, 10, 65])
def test_uniform_targets_are_the_simplex_where_one_fits(C):
    t = baselines.uniform_targets(C, 64)
    cosines = (t @ t.T)[~torch.eye(C, dtype=torch.bool)]
    assert torch.allclose(cosines, torch.full_like(cosines, -1 / (C - 1)), atol=1e-4)
    assert torch.equal(t, baselines.uniform_targets(C, 64))  # the same for every run


def test_more_targets_than_dimensions_repel_each_other_better_than_chance():
    t, chance = baselines.uniform_targets(20, 5, steps=300), unit(20, 5)
    nearest = [(x @ x.T).fill_diagonal_(-1).max() for x in (t, chance)]
    assert nearest[0] < 0.6 < nearest[1]


def test_targets_follow_the_class_means_and_are_assigned_one_to_one():
    torch.manual_seed(0)
    targets = baselines.Targets(4, 8)
    means = [row.clone() for row in targets.means]
    q, y = unit(6, 8), torch.tensor([2, 0, 2, 2, 0, 3])
    targets.follow(q, y)
    for c in range(4):
        mine = [q[i] for i in range(6) if y[i] == c]
        expected = F.normalize(0.9 * means[c] + 0.1 * F.normalize(sum(mine), dim=0), dim=0) if mine else means[c]
        assert torch.allclose(targets.means[c], expected, atol=1e-6)
    permutation = torch.tensor([2, 0, 3, 1])
    targets.means.copy_(F.normalize(targets.targets[permutation] + 0.1 * torch.randn(4, 8)))
    targets.assign()
    assert torch.equal(targets.owned, permutation)
    assert torch.equal(targets.of_classes(), targets.targets[permutation])
    targets.means.copy_(targets.targets[:1].repeat(4, 1))  # all classes want one target: each still gets its own
    targets.assign()
    assert sorted(targets.owned.tolist()) == [0, 1, 2, 3]


def test_tsc_loss():
    torch.manual_seed(0)
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
    q.requires_grad_()  # k = 0: only the own view and the target
    baselines.tsc_loss(q, k, queue, y, queue_y, targets, 0).backward()
    assert q.grad.isfinite().all()


# ---- classifiers

def test_weight_scaling_learns_one_factor_a_class():
    torch.manual_seed(0)
    W, b, x = torch.randn(3, 5), torch.randn(3), torch.randn(4, 5)
    head = train_linear.ScaledHead(W, b)
    assert torch.allclose(head(x), x @ W.T + b) and [p.shape for p in head.parameters()] == [(3,)]
    with torch.no_grad():
        head.scale.copy_(torch.tensor([2.0, 1.0, 0.5]))
    literal = torch.tensor([[s * (x[i] @ W[c] + b[c]).item() for c, s in enumerate((2.0, 1.0, 0.5))] for i in range(4)])
    assert torch.allclose(head(x), literal, atol=1e-5) and torch.allclose(x @ head.weight.T + head.bias, literal, atol=1e-5)


def test_nearest_class_mean(monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda x: x)  # one process
    torch.manual_seed(0)
    x, y = torch.randn(30, 5), torch.arange(30) % 3
    means = evaluate.class_means(x, y, 3)
    probe = torch.randn(8, 5)
    for p, chosen in zip(probe, (probe @ means.T).argmax(1)):
        mean = [sum(x[i] / x[i].norm() for i in range(30) if y[i] == c) for c in range(3)]
        assert chosen == max(range(3), key=lambda c: F.cosine_similarity(p, mean[c], dim=0).item())
