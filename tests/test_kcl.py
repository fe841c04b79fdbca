"""kcl_loss against a literal loop, closed forms and finite differences."""
import math

import pytest
import torch
import torch.nn.functional as F

import kcl
from kcl import choose_positives, fast_kcl_loss, kcl_loss


def batch(B=5, K=37, d=8, classes=4, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q, k, queue = (F.normalize(torch.randn(n, d, generator=g, dtype=dtype)) for n in (B, B, K))
    labels, queue_labels = (torch.randint(classes, (n,), generator=g) for n in (B, K))
    queue_labels[::5] = -1
    return q, k, queue, labels, queue_labels


def literal(q, k, queue, labels, queue_labels, positive, T, divisor=None, drop_unused=False):
    """Eq. 4, one number at a time in float64."""
    q, k, queue = q.double(), k.double(), queue.double()
    total = 0.0
    for i in range(len(q)):
        logit = [sum(float(a) * float(b) for a, b in zip(q[i], k[i])) / T]
        is_positive, in_denominator = [True], [True]
        for j in range(len(queue)):
            logit.append(sum(float(a) * float(b) for a, b in zip(q[i], queue[j])) / T)
            is_positive.append(bool(positive[i, j]))
            same = int(labels[i]) == int(queue_labels[j]) and int(labels[i]) >= 0
            in_denominator.append(not (drop_unused and same and not is_positive[-1]))
        denominator = sum(math.exp(l) for l, inside in zip(logit, in_denominator) if inside)
        terms = [-(l - math.log(denominator)) for l, positive_j in zip(logit, is_positive) if positive_j]
        total += sum(terms) / (divisor or len(terms))
    return total / len(q)


@pytest.mark.parametrize("num_positives", [0, 1, 3, 6, 100, None])
@pytest.mark.parametrize("T", [0.07, 1.0])
@pytest.mark.parametrize("K, classes", [(37, 4), (37, 30), (1, 1), (64, 1), (3, 50)])  # 30, 50 classes: short rows, none
def test_equals_the_literal_loop(num_positives, T, K, classes):
    x = batch(K=K, classes=classes)
    torch.manual_seed(1)
    positive = choose_positives(x[3], x[4], num_positives)
    torch.manual_seed(1)
    assert kcl_loss(*x, num_positives, T).item() == pytest.approx(literal(*x, positive, T), rel=1e-12)


@pytest.mark.parametrize("num_positives", [0, 1, 3, 6])
def test_options_equal_the_literal_loop(num_positives):
    x = batch(classes=7)
    for options in ({"fixed_divisor": True}, {"drop_unused": True}, {"fixed_divisor": True, "drop_unused": True}):
        torch.manual_seed(2)
        positive = choose_positives(x[3], x[4], num_positives)
        torch.manual_seed(2)
        expected = literal(*x, positive, 0.07, options.get("fixed_divisor") and num_positives + 1,
                           "drop_unused" in options)
        assert kcl_loss(*x, num_positives, **options).item() == pytest.approx(expected, rel=1e-12)


def test_k_0_is_infonce_and_cross_entropy_agrees():
    q, k, queue, labels, queue_labels = batch()
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.07
    expected = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
    assert kcl_loss(q, k, queue, labels, queue_labels, 0).item() == pytest.approx(expected.item(), rel=1e-12)


def test_finite_without_any_positive():
    q, k, queue, labels, _ = batch()
    nobody = torch.full((len(queue),), -1)
    for num_positives in (6, None):
        for drop_unused in (False, True):
            loss = kcl_loss(q, k, queue, labels, nobody, num_positives, drop_unused=drop_unused)
            assert loss.item() == kcl_loss(q, k, queue, labels, nobody, 0).item()
    unlabelled = torch.full_like(labels, -1)  # -1 = unknown must not match the -1 of an empty slot
    assert kcl_loss(q, k, queue, unlabelled, nobody).item() == kcl_loss(q, k, queue, labels, nobody, 0).item()
    assert kcl_loss(q, k, queue[:0], labels, nobody[:0]).item() == 0  # K = 0: the own view is all there is


def test_low_precision_and_autocast_compute_in_fp32():
    x = batch(B=6, K=50)
    for dtype in (torch.bfloat16, torch.float16):
        low = [t.to(dtype) if t.is_floating_point() else t for t in x]
        expected = literal(*low, choose_positives(x[3], x[4], None), 0.07)
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = kcl_loss(*low, num_positives=None)
            assert loss.dtype == torch.float32
            assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_mean_over_draws_is_the_closed_form():
    """E[loss] = logsumexp - (own + k * mean of the positives' logits) / (k + 1)."""
    q, k, queue, _, queue_labels = batch(B=1, K=60, classes=3)
    labels, num, draws, T = torch.tensor([1]), 6, 40_000, 0.5
    losses = torch.stack([kcl_loss(*(t.expand(draws, -1) for t in (q, k)), queue, labels.expand(draws), queue_labels,
                                   num, T) for _ in range(5)])
    logits, own = (q @ queue.T)[0] / T, (q * k).sum() / T
    closed = torch.cat([own[None], logits]).logsumexp(0) - (own + num * logits[queue_labels == 1].mean()) / (num + 1)
    assert (queue_labels == 1).sum() > num
    assert losses.mean().item() == pytest.approx(closed.item(), abs=2e-3)  # sd of a draw 0.3 / sqrt(200,000) = 7e-4


def test_each_positive_is_drawn_equally_often():
    torch.manual_seed(0)
    queue_labels = torch.tensor([2, 0, 2, 2, -1, 2, 1, 2, 2, 2, 2, 0])
    draws, k = 30_000, 3
    mask = choose_positives(torch.full((draws,), 2), queue_labels, k)
    assert (mask.sum(1) == k).all()  # without replacement
    assert not mask[:, queue_labels != 2].any()
    n = int((queue_labels == 2).sum())
    p, share = k / n, mask[:, queue_labels == 2].double().mean(0)
    assert (share - p).abs().max() < 5 * math.sqrt(p * (1 - p) / draws)
    first_two = (mask[:, 0] & mask[:, 2]).double().mean().item()  # pairs too: k (k-1) / (n (n-1))
    assert first_two == pytest.approx(k * (k - 1) / (n * (n - 1)), abs=0.01)


def test_takes_all_where_there_are_fewer():
    queue_labels = torch.tensor([0, 0, 1, -1])
    mask = choose_positives(torch.tensor([0, 1, 2, -1]), queue_labels, 6)
    assert mask.tolist() == [[True, True, False, False], [False, False, True, False], [False] * 4, [False] * 4]


def test_gradient_against_finite_differences():
    for num_positives in (0, 3, None):
        for drop_unused in (False, True):
            q, *rest = batch(B=3, K=11)

            def loss(q):
                torch.manual_seed(3)  # the same draw each time
                return kcl_loss(q, *rest, num_positives, 0.2, drop_unused=drop_unused)
            assert torch.autograd.gradcheck(loss, q.requires_grad_())


def test_only_the_query_gets_a_gradient():
    q, k, queue, labels, queue_labels = batch()
    for t in (q, k, queue):
        t.requires_grad_()
    kcl_loss(q, k, queue, labels, queue_labels).backward()
    assert q.grad.abs().sum() > 0 and k.grad is None and queue.grad is None


def test_bad_arguments_are_one_sentence():
    q, k, queue, labels, queue_labels = batch()
    for bad in ((q, k[:-1], queue, labels, queue_labels), (q, k, queue[:, :-1], labels, queue_labels),
                (q, k, queue, labels[:-1], queue_labels), (q, k, queue, labels, queue_labels[:-1]),
                (q, k, queue.T, labels, queue_labels), (q[None], k, queue, labels, queue_labels)):
        with pytest.raises(ValueError, match=r"expected q \(B, d\)"):
            kcl_loss(*bad)
    with pytest.raises(ValueError, match="num_positives"):
        kcl_loss(q, k, queue, labels, queue_labels, -1)
    with pytest.raises(ValueError, match="integer labels"):
        fast_kcl_loss(q, k, queue, labels.float(), queue_labels)
    with pytest.raises(ValueError, match="temperature > 0"):
        kcl_loss(q, k, queue, labels, queue_labels, temperature=0)
    with pytest.raises(ValueError, match="fixed_divisor"):
        kcl_loss(q, k, queue, labels, queue_labels, None, fixed_divisor=True)


# ---- the fast form

@pytest.mark.parametrize("B, K, C", [(5, 37, 3), (8, 3000, 10), (3, 1, 2), (1, 64, 1)])
@pytest.mark.parametrize("num_positives", [0, None, "all by number"])
@pytest.mark.parametrize("fixed_divisor, drop_unused", [(False, False), (True, False), (False, True), (True, True)])
def test_fast_loss_is_the_plain_one(B, K, C, num_positives, fixed_divisor, drop_unused):
    """Value and gradient, for choices without chance, whatever the chunk; labels of -1 among queries and keys."""
    if num_positives is None and fixed_divisor:
        return
    k_all = K + 3 if num_positives == "all by number" else num_positives
    g = torch.Generator().manual_seed(B * K)
    q, k, queue = (F.normalize(torch.randn(n, 16, generator=g, dtype=torch.float64), dim=1) for n in (B, B, K))
    y, queue_y = torch.randint(-1, C, (B,), generator=g), torch.randint(-1, C, (K,), generator=g)
    q.requires_grad_()
    plain = kcl_loss(q, k, queue, y, queue_y, k_all, 0.07, fixed_divisor, drop_unused)
    expected = torch.autograd.grad(plain, q)[0]
    for chunk in (7, 1024):
        fast = fast_kcl_loss(q, k, queue, y, queue_y, k_all, 0.07, fixed_divisor, drop_unused, chunk=chunk)
        assert torch.allclose(fast, plain, atol=1e-10) and torch.allclose(torch.autograd.grad(fast, q)[0], expected, atol=1e-10)


@pytest.mark.parametrize("drop_unused", [False, True])
def test_fast_loss_with_drawn_positives(monkeypatch, drop_unused):
    """Both with the same draw: the plain loss is handed the slots that the fast one chose."""
    torch.manual_seed(0)
    q, k, queue = (F.normalize(torch.randn(n, 8), dim=1) for n in (6, 6, 200))
    y, queue_y = torch.tensor([0, 1, 2, 0, 3, -1]), torch.randint(0, 3, (200,))
    slots, taken = kcl.choose_slots(y, queue_y, 4)
    mask = torch.zeros(6, 200, dtype=torch.bool)
    for i in range(6):
        for j in range(4):
            if taken[i, j]:
                mask[i, slots[i, j]] = True
    choose = kcl.choose_positives
    monkeypatch.setattr(kcl, "choose_slots", lambda *args: (slots, taken))
    monkeypatch.setattr(kcl, "choose_positives", lambda y, queue_y, k, *_: choose(y, queue_y, k) if k is None else mask)
    q.requires_grad_()
    losses = [f(q, k, queue, y, queue_y, 4, 0.07, False, drop_unused) for f in (kcl_loss, fast_kcl_loss)]
    grads = [torch.autograd.grad(loss, q)[0] for loss in losses]
    assert torch.allclose(*losses, rtol=1e-6) and torch.allclose(*grads, atol=1e-6)


def test_fast_choice_is_uniform_without_replacement_and_of_the_class():
    torch.manual_seed(0)
    queue_y = torch.tensor([0, 1, 1, 0, 2, 1, 1, -1, 1, 1])              # class 1: slots 1 2 5 6 8 9, class 0: 0 3
    y, n = torch.tensor([1, 0, 3, -1]), 20_000
    count, pairs = torch.zeros(10), {}
    for _ in range(n):
        slots, taken = kcl.choose_slots(y, queue_y, 3)
        mine = slots[0].tolist()
        assert taken.tolist() == [[True] * 3, [True, True, False], [False] * 3, [False] * 3]
        assert len(set(mine)) == 3 and set(slots[1, :2].tolist()) == {0, 3}
        count[mine] += 1
        pairs[tuple(sorted(mine))] = pairs.get(tuple(sorted(mine)), 0) + 1
    assert torch.allclose(count[[1, 2, 5, 6, 8, 9]] / n, torch.full((6,), 0.5), atol=0.02) and count.sum() == 3 * n
    assert len(pairs) == 20 and all(abs(c / n - 1 / 20) < 0.008 for c in pairs.values())  # every subset of 3 of 6


def test_first_k_takes_the_lowest_slots():
    """Literally, in both forms of the loss, which then are one without chance."""
    q, k, queue, y, queue_y = batch(B=9, K=300, classes=4)
    expected = torch.zeros(9, 300, dtype=torch.bool)
    for i in range(9):
        expected[i, [j for j in range(300) if queue_y[j] == y[i]][:6]] = True
    assert torch.equal(choose_positives(y, queue_y, 6, first_k=True), expected)
    for drop_unused in (False, True):
        literally = literal(q, k, queue, y, queue_y, expected, 0.07, drop_unused=drop_unused)
        for loss in (kcl_loss, fast_kcl_loss):
            value = loss(q, k, queue, y, queue_y, drop_unused=drop_unused, first_k=True)
            assert value.item() == pytest.approx(literally, rel=1e-9)


def test_fast_loss_in_fp32_stands_by_float64():
    """S4: loss and gradient within 1e-6 of the plain loss in float64, also where q and key agree to the last bit."""
    torch.manual_seed(0)
    q, queue = (F.normalize(torch.randn(n, 128), dim=1) for n in (32, 4096))
    y, queue_y = torch.randint(0, 50, (32,)), torch.randint(0, 50, (4096,))
    q.requires_grad_()
    loss = fast_kcl_loss(q, q.detach(), queue, y, queue_y, None)
    grad = torch.autograd.grad(loss, q)[0]
    exact = kcl_loss(q.double(), q.detach().double(), queue.double(), y, queue_y, None)
    expected = torch.autograd.grad(exact, q)[0]
    assert abs(loss.item() / exact.item() - 1) < 1e-6 and (grad - expected).norm() / expected.norm() < 1e-6


def test_fast_loss_edges():
    q, k = (F.normalize(torch.randn(3, 4), dim=1) for _ in range(2))
    y, none = torch.tensor([0, 1, 2]), (torch.empty(0, 4), torch.empty(0, dtype=torch.long))
    assert fast_kcl_loss(q, k, none[0], y, none[1]).item() == 0            # nothing but the own view
    queue, queue_y = F.normalize(torch.randn(9, 4), dim=1), torch.tensor([5] * 9)
    assert fast_kcl_loss(q, k, queue, y, queue_y).item() == pytest.approx(kcl_loss(q, k, queue, y, queue_y).item(), rel=1e-5)
    assert fast_kcl_loss(q, k, queue, y, queue_y, temperature=0.001).isfinite()
    q.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fast_kcl_loss(q.bfloat16(), k.bfloat16(), queue.bfloat16(), y, queue_y)
    assert loss.dtype == torch.float32
    with pytest.raises(RuntimeError, match="no second derivative; use kcl_loss"):
        torch.autograd.grad(fast_kcl_loss(q, k, queue, y, queue_y), q, create_graph=True)
    with pytest.raises(ValueError, match="expected q"):
        fast_kcl_loss(q, k[:2], queue, y, queue_y)
