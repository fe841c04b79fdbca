"""kcl_loss and fast_kcl_loss against a literal loop of eq. 4, closed forms and finite differences."""
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kcl
from kcl import kcl_loss
from kcl_fast import choose_slots, fast_kcl_loss

BOTH = pytest.mark.parametrize("loss", [kcl_loss, fast_kcl_loss])


def batch(B=5, K=37, d=8, classes=4, dtype=torch.float64):
    """q, k, queue, labels, queue_labels; some labels are -1."""
    g = torch.Generator().manual_seed(B * K + classes)
    q, k, queue = (F.normalize(torch.randn(n, d, generator=g, dtype=dtype)) for n in (B, B, K))
    labels, queue_labels = (torch.randint(-1, classes, (n,), generator=g) for n in (B, K))
    return q, k, queue, labels, queue_labels


def literal(q, k, queue, labels, queue_labels, positive, T=0.07, divisor=None, drop_unused=False):
    """Eq. 4, one number at a time in float64: the loss of each query."""
    losses = []
    for i in range(len(q)):
        own = math.exp(q[i].double() @ k[i].double() / T)
        denominator, terms = own, [own]
        for j in range(len(queue)):
            e = math.exp(q[i].double() @ queue[j].double() / T)
            same = labels[i] == queue_labels[j] and labels[i] >= 0
            if positive[i, j]:
                terms.append(e)
            if positive[i, j] or not (drop_unused and same):
                denominator += e
        losses.append(sum(-math.log(e / denominator) for e in terms) / (divisor or len(terms)))
    return torch.tensor(losses, dtype=torch.float64)


def choose_positives(labels, queue_labels, num_positives, first_k=False):
    same_class = torch.tensor([[bool(y == other >= 0) for other in queue_labels] for y in labels])
    return kcl.choose_positives(same_class.view(len(labels), len(queue_labels)), num_positives, first_k)


def drawn_by_slots(labels, queue_labels, num_positives):
    """choose_slots' draw as the mask (B, K) that choose_positives gives."""
    slots, taken = choose_slots(labels, queue_labels, num_positives)
    K = len(queue_labels)
    return torch.zeros(len(labels), K + 1, dtype=torch.bool).scatter(1, slots.where(taken, K), True)[:, :K]


# ---- the loss of eq. 4

@pytest.mark.parametrize("num_positives", [0, 1, 6, 100, None])
@pytest.mark.parametrize("K, classes", [(37, 4), (37, 30), (1, 1), (64, 1), (3, 50)])  # 30, 50: fewer than k, or none
@pytest.mark.parametrize("T, fixed_divisor, drop_unused, first_k", [
    (0.07, False, False, False), (1.0, True, False, False), (0.07, False, True, False), (0.07, True, True, True)])
def test_equals_the_literal_loop(num_positives, K, classes, T, fixed_divisor, drop_unused, first_k):
    fixed_divisor = fixed_divisor and num_positives is not None           # FCL has no fixed number
    x = batch(K=K, classes=classes)
    torch.manual_seed(1)
    positive = choose_positives(x[3], x[4], num_positives, first_k)
    expected = literal(*x, positive, T, fixed_divisor and 1 + num_positives, drop_unused)
    for reduction, value in (("none", expected), ("mean", expected.mean())):
        torch.manual_seed(1)
        loss = kcl_loss(*x, num_positives, T, fixed_divisor, drop_unused, first_k, reduction)
        assert loss.shape == value.shape and torch.allclose(loss, value, rtol=1e-12, atol=1e-12)


def test_k_0_is_infonce():
    q, k, queue, labels, queue_labels = batch()
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.07
    expected = F.cross_entropy(logits, torch.zeros(5, dtype=torch.long))
    assert kcl_loss(q, k, queue, labels, queue_labels, 0).item() == pytest.approx(expected.item(), rel=1e-12)


@BOTH
def test_without_any_positive_it_is_infonce(loss):
    q, k, queue, labels, _ = batch()
    nobody = torch.full((37,), -1)
    for y in (labels, torch.full((5,), -1)):  # -1, unknown, does not match the -1 of an empty slot
        for num_positives in (6, None):
            assert loss(q, k, queue, y, nobody, num_positives).item() == loss(q, k, queue, y, nobody, 0).item()
    assert loss(q, k, queue[:0], labels, nobody[:0]).item() == 0          # K = 0: the own view is all there is


# ---- which positives are drawn

@pytest.mark.parametrize("choose", [choose_positives, drawn_by_slots])
def test_draws_are_uniform_without_replacement(choose):
    torch.manual_seed(0)
    n, mine, queue_y = 10_000, [1, 2, 5, 6, 8, 9], torch.tensor([0, 1, 1, 0, 2, 1, 1, -1, 1, 1])
    mask = choose(torch.ones(n, dtype=torch.long), queue_y, 3)
    assert (mask.sum(1) == 3).all() and mask[:, mine].sum() == 3 * n
    count = torch.tensor([mask[:, s].all(1).sum() for s in itertools.combinations(mine, 3)])       # all 20 subsets
    assert ((count - n / 20) ** 2 / (n / 20)).sum() < 19 + 4 * math.sqrt(2 * 19)

    queue_y, p = torch.arange(120) % 3, 6 / 40                            # k = 6 of 40 slots: how often each is drawn
    share = choose(torch.ones(n, dtype=torch.long), queue_y, 6)[:, queue_y == 1].double().mean(0)
    chi2 = ((share - p) ** 2).sum() * n / (p * (1 - p)) * 39 / 40
    assert abs(chi2 - 39) < 4 * math.sqrt(2 * 39)

    few = choose(torch.tensor([0, 2, 3, -1]), torch.tensor([0, 0, 2, -1]), 6)                      # all there are
    assert few.int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [0] * 4, [0] * 4]


def test_first_k_takes_the_lowest_slots():
    *_, y, queue_y = batch(B=9, K=300)
    mask = choose_positives(y, queue_y, 6, first_k=True)
    for i in range(9):
        assert mask[i].nonzero().flatten().tolist() == [j for j in range(300) if queue_y[j] == y[i] >= 0][:6]


# ---- fast_kcl_loss is kcl_loss

@pytest.mark.parametrize("B, K, classes", [(5, 37, 3), (8, 3000, 10), (3, 1, 2), (1, 64, 1)])
@pytest.mark.parametrize("num_positives, fixed_divisor", [
    (0, False), (6, False), (6, True), (400, False), (None, False)])
def test_fast_loss_has_the_same_value_and_gradient(B, K, classes, num_positives, fixed_divisor, monkeypatch):
    *x, y, queue_y = batch(B, K, 16, classes, torch.float32)
    weight, x = torch.rand(B, dtype=torch.float64), [t.double() for t in x]
    torch.manual_seed(1)
    if num_positives in (0, 400, None):                                   # none or all: without chance
        positive = choose_positives(y, queue_y, num_positives)
    else:
        positive = drawn_by_slots(y, queue_y, num_positives)
    monkeypatch.setattr(kcl, "choose_positives", lambda *args: positive)

    q, options = x[0].requires_grad_(), dict(num_positives=num_positives, fixed_divisor=fixed_divisor, reduction="none")
    expected = kcl_loss(*x, y, queue_y, **options)
    gradient, = torch.autograd.grad((expected * weight).sum(), q)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        for chunk in (7, None):
            torch.manual_seed(1)
            loss = fast_kcl_loss(*(t.to(dtype) for t in x), y, queue_y, chunk=chunk, **options).double()
            found, = torch.autograd.grad((loss * weight).sum(), q)
            assert (loss - expected).norm() <= tolerance * expected.norm()
            assert (found - gradient).norm() <= tolerance * gradient.norm()


class LargestResult(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns, and the operations that would wait for a GPU."""
    WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "bincount"}

    def __init__(self):
        super().__init__()
        self.most, self.waits = 0, []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out, name = f(*args, **kwargs or {}), f.overloadpacket.__name__
        by_mask = name.startswith("index") and any(getattr(x, "dtype", None) == torch.bool for x in tree_leaves(args[1:]))
        self.waits += [name] * (name in self.WAITS or by_mask)
        for x in out if isinstance(out, (list, tuple)) else [out]:
            self.most = max(self.most, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("settings", [{"num_positives": 0}, {}, {"num_positives": None}, {"fixed_divisor": True}])
def test_fast_loss_makes_no_table_of_all_keys_and_does_not_wait(settings):
    x, most = batch(B=64, K=4096, d=8, dtype=torch.float32), []
    for loss in (kcl_loss, partial(fast_kcl_loss, chunk=512), fast_kcl_loss):
        with LargestResult() as watch:
            loss(x[0].requires_grad_(), *x[1:], **settings).backward()
        most.append(watch.most)
        assert not watch.waits or loss is kcl_loss
    assert most[0] >= 64 * 4096 and most[1] <= max(64 * 512, 4096 * 8) and most[2] <= 64 * 1024

    with LargestResult() as planted:
        x[0][x[0][:, 0] > 0].sum().item()
    assert planted.waits == ["index", "_local_scalar_dense"]


# ---- what both take

@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_and_autocast_compute_in_fp32(loss, dtype):
    x = [t.to(dtype) if t.is_floating_point() else t for t in batch(B=6, K=50)]
    expected = literal(*x, choose_positives(x[3], x[4], None)).mean().item()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*x, num_positives=None)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(expected, rel=1e-6)


@BOTH
@pytest.mark.parametrize("num_positives", [0, 3, None])
def test_gradient_of_queries_and_temperature_against_finite_differences(loss, num_positives):
    q, *rest = batch(B=3, K=11)

    def of(q, T):
        torch.manual_seed(3)  # the same draw each time
        return loss(q, *rest, num_positives, T)
    T = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of, (q.requires_grad_(), T))
    assert torch.autograd.gradcheck(partial(of, T=0.2), q)


@BOTH
def test_only_the_query_gets_a_gradient(loss):
    q, k, queue, *labels = (x.requires_grad_() if x.is_floating_point() else x for x in batch())
    loss(q, k, queue, *labels).backward()
    assert q.grad.abs().sum() > 0 and k.grad is None and queue.grad is None


def test_torch_compile_func_and_vmap():
    q, *rest = batch(classes=30)                                          # no class has more than 6 keys: no chance
    compiled = torch.compile(fast_kcl_loss, fullgraph=True, backend="eager")
    for num_positives in (6, None):
        for chunk in (None, 5):                                           # the last chunk is a shorter one
            assert torch.allclose(compiled(q, *rest, num_positives, chunk=chunk), kcl_loss(q, *rest, num_positives), rtol=1e-12)

    expected, = torch.autograd.grad(kcl_loss(q.requires_grad_(), *rest, None), q)
    for loss in (kcl_loss, fast_kcl_loss):
        gradient = torch.func.grad(lambda q: loss(q, *rest, None))(q.detach())
        assert torch.allclose(gradient, expected, rtol=1e-12)

    of_three, some = torch.vmap(kcl_loss, randomness="different"), [batch(classes=c) for c in (30, 40, 50)]
    losses = of_three(*map(torch.stack, zip(*some)))
    assert torch.allclose(losses, torch.stack([kcl_loss(*x) for x in some]), rtol=1e-12)
    thrice = of_three(*(x.expand(3, *x.shape) for x in batch(K=60, classes=2)))
    assert len(set(thrice.tolist())) == 3                                 # each its own draw


@BOTH
def test_shapes_that_would_broadcast_raise(loss):
    q, k, queue, y, queue_y = batch()
    for bad in ((q, k[:1], queue, y, queue_y), (q, k, queue[:, :1], y, queue_y), (q, k, queue, y[:1], queue_y),
                (q, k, queue, y, queue_y[:1]), (q, k, queue.T, y, queue_y), (q[None], k, queue, y, queue_y)):
        with pytest.raises(ValueError, match=r"expected q \(B, d\)"):
            loss(*bad)
