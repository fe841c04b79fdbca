"""The study of the paper's findings: a cell end to end, the statistics, and that what is committed is complete."""
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from recipes import findings, study

ROOT = Path(__file__).parent.parent


def test_a_cell_end_to_end(copy, digits):
    """One epoch, one trial of each learning rate; a second call has nothing left to do."""
    (copy / "data").mkdir(exist_ok=True)
    for seed in (2, 100):
        (copy / f"data/digits-seed{seed}").symlink_to(digits)
    (copy / "runs/smoke").mkdir(parents=True)
    (copy / "runs/smoke/study.jsonl").write_text("".join(  # three of the four trials: it would be the same again
        json.dumps({"finding": "tune", "cell": f"tune-{loss}-lr{study.LRS[0]}", "seed": study.TUNE_SEEDS[0], "val_top1": 0.5}) + "\n"
        for loss in ("ce", "cl", "fcl")))
    command = [sys.executable, "recipes/study.py", "--smoke", "--seeds", "2", "--only", "kcl-independent"]
    out = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    text = (copy / "runs/smoke/study.jsonl").read_text()
    *_, tuned, source, target, full = map(json.loads, text.splitlines())
    assert tuned["cell"] == "tune-kcl-lr0.03" and 0 < tuned["val_top1"] < 1 and "top1" not in tuned  # test is not touched
    for line, name, images in ((source, "source", 500), (target, "target", 500), (full, "full", 1000)):
        assert (line["cell"], line["seed"], line["classifier"], line["images"]) == ("kcl-independent", 2, name, images)
        assert line["commands"][0].startswith("train_rep.py --loss kcl") and line["seconds"] > 0.5
        assert "independent_source/train_full.txt" in line["commands"][0]
        assert line["top1"] == pytest.approx(np.mean(line["per_class"]))
    assert "independent_target/train_full.txt" in target["commands"][1] and target["list"] == "independent_target/test.txt"
    assert subprocess.run(command, cwd=copy, capture_output=True).returncode == 0
    assert (copy / "runs/smoke/study.jsonl").read_text() == text


def test_interval_and_verdict_are_students():
    for n in (2, 5, 10):
        x = np.random.RandomState(n).randn(n)
        mean, half, seeds = findings.interval(dict(enumerate(x)))
        low, high = stats.t.interval(0.95, n - 1, x.mean(), stats.sem(x))
        assert (mean - half, mean + half, seeds) == (pytest.approx(low, abs=2e-3), pytest.approx(high, abs=2e-3), n)
    assert findings.verdict({0: 1.0, 1: 1.1, 2: 0.9}) == "confirmed"
    assert "opposite" in findings.verdict({0: -1.0, 1: -1.1, 2: -0.9})
    assert findings.verdict({0: 1.0, 1: -1.1, 2: 0.9}) == "unclear"


@pytest.mark.parametrize("a, images, C", [(0.5, 100, 10), (0.9, 100, 10), (0.7, 30, 4)])
def test_expected_beta_is_that_of_equally_good_classes(a, images, C):
    import evaluate
    measured = np.random.RandomState(0).binomial(images, a, (4000, C)) / images
    assert np.mean([evaluate.balancedness(acc) for acc in measured]) == pytest.approx(findings.expected_beta(a, images, C), abs=4e-3)


def test_learning_rate_is_chosen_by_the_mean_over_seeds():
    lines = [{"cell": f"tune-{loss}-lr{lr}", "val_top1": v} for loss in ("ce", "cl", "kcl", "fcl")
             for lr, two in zip(study.LRS, ((0.1, 0.2), (0.6, 0.1), (0.3, 0.4), (0.5, 0.0))) for v in two]
    assert study.chosen(lines) == dict.fromkeys(("ce", "cl", "kcl", "fcl"), 0.1)  # 0.7 twice: the smaller rate


def test_committed_lines_are_complete():
    """Every cell on five seeds, under its learning rate, each line with commands that name its cell and seed; but for
    the others, which results/findings.md says are not measured."""
    lines = [json.loads(line) for line in (ROOT / "results/study.jsonl").read_text().splitlines()]
    cells = study.cells(study.chosen(lines))
    there = {(line["cell"], line["seed"], line["classifier"]): line for line in lines}
    assert len(there) == len(lines)
    for finding, name, flags, classifiers in cells:
        for seed in range(5 if finding != "others" else 0):
            for classifier in classifiers:
                line = there[name, seed, classifier]
                assert line["commands"][0].startswith("train_rep.py " + flags.format(runs="runs/study", seed=seed))
                assert f"runs/study/{name}-seed{seed}" in shlex.split(line["commands"][-1])[1]
    assert sum(line["finding"] == "tune" for line in lines) == 4 * len(study.LRS) * len(study.TUNE_SEEDS)


def test_tables_in_the_texts_are_those_of_the_lines(tmp_path):
    """recipes/findings.py on the committed lines changes nothing in results/findings.md and README.md."""
    files = [ROOT / "results/findings.md", ROOT / "README.md"]
    for file in files:
        (tmp_path / file.name).write_text(file.read_text())
    subprocess.run([sys.executable, "recipes/findings.py", "--pictures", tmp_path / "pictures", "--files",
                    *(tmp_path / file.name for file in files)], cwd=ROOT, check=True)
    for file in files:
        assert (tmp_path / file.name).read_text() == file.read_text()
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 5
