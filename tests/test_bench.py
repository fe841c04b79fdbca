"""The benchmark: that its yardsticks are right, and that every row comes out."""
import json
import math

import pytest
import torch
import torch.nn.functional as F

import bench
from kcl import kcl_loss

CPU = torch.device("cpu")


def test_quick_run_prints_every_row_and_writes_the_same(script, capsys, tmp_path):
    threads = torch.get_num_threads()
    script(bench, "--quick", "--json", tmp_path / "bench.json")
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    written = json.loads((tmp_path / "bench.json").read_text())
    printed = [line for line in out.splitlines() if line.startswith("| S") or line.startswith("| parts")]
    assert printed == [bench.line(r) for r in written["rows"]]
    assert list(dict.fromkeys(r["id"] for r in written["rows"])) == list(bench.ROWS)
    for r in written["rows"]:
        assert r["needs"] or math.isfinite(r["value"]) and r["n"] and r["figures"], r
        assert bench.line(r).count("|") == 9
        low, high = r["quartiles"] or (r["value"], r["value"])
        assert r["needs"] or 0 <= low <= r["value"] <= high
    assert written["quick"] and written["torch"] == torch.__version__ and "mean nothing" in out
    assert next(r for r in written["rows"] if r["id"] == "S8")["figures"].startswith("0 waits, 0 tensors")
    # 7 of 8 of 4 images come from elsewhere, in the mean over 5 shuffles; and 7 ranks' 4 keys of 16 floats and a label
    counted = float(next(r for r in written["rows"] if r["id"] == "S10")["figures"].split()[0]) * 1e6
    assert counted == pytest.approx(7 / 8 * 4 * 3 * 32**2 + 7 * 4 * (16 * 4 + 8), rel=0.15)


def test_bad_input_is_one_sentence(script):
    for args, sentence in ((("--json", "nowhere/x.json"), "no folder nowhere"), (("--threads", 0), "--threads")):
        with pytest.raises(SystemExit, match=sentence):
            script(bench, *args)


@pytest.mark.parametrize("k", [0, 3])
def test_authors_loss_is_kcl_where_no_draw_is_left(k):
    """No class has more than 3 keys in the queue, so that all of them are taken."""
    g = torch.Generator().manual_seed(0)
    q, key, queue = (F.normalize(torch.randn(n, 8, generator=g, dtype=torch.float64)) for n in (5, 5, 40))
    labels, queue_labels = torch.tensor([0, 3, 7, 12, 39]), torch.arange(40) // 3
    queue_labels[::7] = -1
    theirs = bench.authors_loss(q, key, queue.T, labels, queue_labels, k)
    assert theirs.item() == pytest.approx(kcl_loss(q, key, queue, labels, queue_labels, k).item(), rel=1e-6)
    mask = bench.authors_mask(labels, queue_labels, k)
    loss, gradient = bench.exact(q, key, queue, mask > 0)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    q.requires_grad_()
    assert torch.allclose(gradient, torch.autograd.grad(kcl_loss(q, key, queue, labels, queue_labels, k), q)[0])


def test_authors_choice_is_k_slots_of_the_class():
    labels, queue_labels = torch.arange(4), torch.randint(4, (100,), generator=torch.Generator().manual_seed(0))
    mask = bench.authors_mask(labels, queue_labels, 6)
    assert (mask.sum(1) == 6).all() and (mask.nonzero()[:, 0] == queue_labels[mask.nonzero()[:, 1]]).all()
    assert torch.equal(mask, bench.authors_mask(labels, queue_labels, 6))  # the same each time


def test_peak_memory_of_a_known_allocation():
    def f():
        a = torch.empty(2**20)                                            # 4 MiB
        b = torch.empty(2**21)                                            # 8 MiB beside it
        del a, b
        torch.empty(2**19)                                                # 2 MiB when they are gone
    assert bench.peak_memory(f, CPU) == 12 * 2**20
    kept = []
    assert bench.peak_memory(lambda: kept.append(torch.empty(2**18)), CPU) == 2**20


def test_watch_finds_what_is_planted():
    x, N, K = torch.randn(10, 4), 10, 50

    def seen(f):
        with bench.Watch(N * K) as watch:
            f()
        return +watch.waits, +watch.large, +watch.copies

    assert seen(lambda: (x @ torch.randn(4, 49)).sum()) == ({}, {}, {})
    assert seen(lambda: x.sum().item()) == ({"_local_scalar_dense": 1}, {}, {})
    assert seen(lambda: x[x[:, 0] > 0]) == ({"index": 1}, {}, {})
    assert seen(lambda: x.nonzero()) == ({"nonzero": 1}, {}, {})
    assert seen(lambda: x @ torch.zeros(4, 50)) == ({}, {"mm": 1}, {})
    assert seen(lambda: x.expand(50, 10, 4)[:, :, 0].T) == ({}, {}, {})      # views make nothing
    w = torch.randn(4, 50, requires_grad=True)
    assert seen(lambda: (x @ w).sum().backward()) == ({}, {"mm": 1}, {})  # and what expands in backward neither
    plan = torch.Generator().manual_seed(0)
    assert seen(lambda: x[torch.randperm(10, generator=plan)[:3]]) == ({}, {}, {"index": 1})


def test_rounds_are_in_turn_and_ratios_of_pairs():
    calls = []
    times = bench.in_turn(3, CPU, lambda: calls.append("a"), lambda: calls.append("b"))
    assert "".join(calls) == "ab" * 5 and [len(t) for t in times] == [3, 3]
    r = bench.ratio("x", [2.0, 3.0, 8.0], [1.0, 3.0, 2.0], 2.0)
    assert (r["value"], r["quartiles"], r["n"], r["met"]) == (2.0, [1.5, 3.0], 3, True)
    assert bench.ratio("x", [1.0], [1.0], 2.5, ">=")["met"] is False
