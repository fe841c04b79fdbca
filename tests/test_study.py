"""The study: a cell end to end, the commands of all cells, the statistics, and texts that say what the lines say."""
import importlib.util
import json
import math
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import checkpoint
import data
import ddp
from recipes import findings, study

ROOT = Path(__file__).parent.parent
LINES = ROOT / "results/study.jsonl"


# ---- study.py

@pytest.mark.skipif(torch.cuda.is_available(), reason="forks")
def test_a_cell_end_to_end(copy, digits, monkeypatch):
    (copy / "data").mkdir(exist_ok=True)
    for seed in (10, 100):
        (copy / f"data/digits-seed{seed}").symlink_to(digits)
    spec = importlib.util.spec_from_file_location("study_of_the_copy", copy / "recipes/study.py")
    there = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, there)  # its processes look for it by this name
    spec.loader.exec_module(there)
    monkeypatch.chdir(copy)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["study.py", "--smoke", "--only", "kcl"])
    git = "git init -q && git -c user.name=me -c user.email=me commit -q --allow-empty -m first && git rev-parse --short HEAD"
    commit = subprocess.run(git, shell=True, check=True, capture_output=True, text=True).stdout.strip()
    there.main()

    text = (copy / "runs/smoke/study.jsonl").read_text()
    tuned, lt, rep = map(json.loads, text.splitlines())
    assert (tuned["cell"], tuned["seed"], tuned["list"]) == ("tune-kcl-0.03", 10, "val.txt")
    assert [(line["cell"], line["seed"], line["classifier"], line["list"]) for line in (lt, rep)] == [
        ("kcl", 100, "lt", "test.txt"), ("kcl", 100, "rep", "test.txt")]
    for line in (lt, rep):
        assert line["top1"] == pytest.approx(np.mean(line["per_class"])) and line["seconds"] > 0.1
        assert line["commands"][0].startswith("train_rep.py --loss kcl --lr 0.03 --dataset digits")
        assert line["commit"] == commit != ""

    there.main()  # nothing is left to do
    assert (copy / "runs/smoke/study.jsonl").read_text() == text


def test_every_command_parses(tmp_path, digits, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in ("digits", "digits-seed10", "digits-seed100"):
        Path("data", name).symlink_to(digits)
    rates = dict.fromkeys(study.METHODS, 0.1)
    cells = [(cell, 100, rates) for _, _, block in study.blocks() for cell in block]
    cells += [(cell, 10, {}) for method in study.METHODS for cell in study.trials(method)]

    def parse(command):
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        parsed = importlib.import_module(Path(sys.argv[0]).stem).parse_args()
        return parsed[0] if isinstance(parsed, tuple) else parsed         # train_linear.py's has the backbone's list too

    ddp.init()
    try:
        for cell, seed, of in cells:
            commands, _ = study.plan(cell, seed, of, "runs")
            for command in sum(commands.values(), []):
                args = parse(command)
                assert args.seed == seed
                if command.startswith("train_rep.py"):  # what stage 2 reads next to the backbone
                    settings = {"arch": args.arch, "dataset": args.dataset, "data": args.data, "list": args.list,
                                "loss": args.loss, "list_sha256": checkpoint.sha256(data.find_list(args.data, args.list))}
                    args.out.mkdir(parents=True, exist_ok=True)
                    (args.out / "log.jsonl").write_text(json.dumps({"settings": settings}))
                    (args.out / "backbone.pt").touch()
    finally:
        dist.destroy_process_group()
    names = [cell.name for cell, _, _ in cells]
    assert len(set(names)) == len(names)


def test_the_methods_take_as_many_trials_each():
    for method in study.METHODS:
        assert len(study.trials(method)) == 4
    assert not set(study.TUNE_SEEDS) & {*study.HEADLINE_SEEDS, *study.ENDS_SEEDS, *study.SEEDS}


def test_learning_rate_is_chosen_by_the_mean_over_seeds():
    on_val = zip(study.LRS, ((0.1, 0.2), (0.6, 0.1), (0.3, 0.4), (0.5, 0.0)))
    lines = [{"cell": f"tune-ce-{lr:g}", "top1": top1} for lr, two in on_val for top1 in two]
    assert study.chosen(lines, "ce") == 0.1  # 0.7 twice: the smaller rate


# ---- findings.py

def within(t, nu):
    """Student's t: the probability of [-t, t] with nu degrees of freedom, a finite sum (Abramowitz and Stegun 26.7.3, 4)."""
    angle = math.atan(t / math.sqrt(nu))
    term, total = math.cos(angle) if nu % 2 else 1.0, 0.0
    for i in range(nu % 2 + 2, nu + 1, 2):  # cos + 2/3 cos^3 + 2/3 4/5 cos^5 ..., or 1 + 1/2 cos^2 + 1/2 3/4 cos^4 ...
        total += term
        term *= (i - 1) / i * math.cos(angle) ** 2
    if nu % 2:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


@pytest.mark.parametrize("n", range(2, 21))
def test_interval_and_p_value_are_students(n):
    x = np.random.RandomState(n).randn(n) + 0.5
    error = np.sqrt(((x - x.mean()) ** 2).sum() / (n - 1) / n)
    mean, half = findings.interval(x)
    assert mean == pytest.approx(x.mean()) and within(half / error, n - 1) == pytest.approx(0.95, abs=1e-4)
    assert findings.p_value(x) == pytest.approx(1 - within(abs(x.mean()) / error, n - 1), abs=1e-6)


def test_holm_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, which may not fall below 0.06
    assert findings.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert findings.holm([0.6, 0.9]) == pytest.approx([1, 1])


@pytest.fixture
def lines(tmp_path):
    """Made-up lines of five seeds: a little noise around one number, except for four classifiers."""
    top1 = {"kcl/lt": (0.60, 0.61, 0.62, 0.63, 0.64), "ce/joint": (0.50, 0.51, 0.50, 0.51, 0.52),
            "ce/lt": (0.60, 0.62, 0.61, 0.64, 0.64), "kcl-k4/lt": (0.70, 0.72, 0.71, 0.74, 0.74)}
    noise, text = np.random.RandomState(0), ""
    for _, _, cells in study.blocks():
        for cell in cells:
            for classifier in cell.classifiers:
                for i in range(5):
                    line = {name: 0.5 + 0.01 * noise.rand() for name in ("top1", "many", "medium", "few", "balancedness")}
                    if f"{cell.name}/{classifier}" in top1:
                        line["top1"] = top1[f"{cell.name}/{classifier}"][i]
                    line |= {"cell": cell.name, "seed": 100 + i, "classifier": classifier, "seconds": 10 + i,
                             "machine": "another" if cell.name == "fcl" and i == 3 else "this one"}
                    line["box"] = line["mask"] = {"AP": 30 + i, "AP50": 60, "AP75": 20}
                    text += json.dumps(line) + "\n"
    (tmp_path / "study.jsonl").write_text(text)
    return findings.read(tmp_path / "study.jsonl")


def test_difference_is_of_each_seed_that_all_have(lines):
    assert findings.difference(lines, "top1", "kcl/lt - ce/joint") == pytest.approx([10, 10, 12, 12, 12])
    assert findings.difference(lines, "top1", "kcl/lt - ce/joint - ce/lt + kcl-k4/lt") == pytest.approx([20, 20, 22, 22, 22])
    del lines["ce/joint"][101]
    assert findings.difference(lines, "top1", "kcl/lt - ce/joint") == pytest.approx([10, 12, 12, 12])
    assert len(findings.difference(lines, "top1", "kcl/lt - unknown/lt")) == 0
    assert findings.difference(lines, "seconds", "kcl/lt") == pytest.approx([10, 11, 12, 13, 14])
    assert findings.difference(lines, "seconds", "fcl/lt") == pytest.approx([10, 11, 12, 14])  # 103: on another machine


def test_a_claim_is_in_the_list_of_its_verdict(lines):
    verdicts = {claim: verdict for _, claim, _, _, _, verdict in findings.judge(lines)}
    assert verdicts["KCL, 200 epochs, above joint CE, 90"] == "holds"
    assert verdicts["KCL, 200 epochs, above cRT, 90"] == "open"
    assert verdicts["k = 6 above k = 4"] == "contradicted"
    page = findings.page(lines)
    assert all(f"findings/{name}.png" in page for name in ("fig2", "fig3", "fig5"))
    assert "| alpha | n | CE |" in page and "\n| 0.4 | 5 | 5" in page
    del lines["cl-lt4/rep"][103]
    assert "\n| 0.4 | 4 to 5 | 5" in findings.page(lines)
    assert "fig2.png" not in findings.page(lines) and "fig3.png" in findings.page(lines)
    hold, contradicted, open_ = (page.index(f"### {name}") for name in ("Hold", "Contradicted", "Open"))
    assert hold < page.index("above joint CE, 90 | 5 | +11.2") < contradicted
    assert contradicted < page.index("k = 6 above k = 4 | 5 | -10") < open_ < page.index("above cRT, 90 | 5 |")


def test_the_last_line_of_a_seed_counts(tmp_path):
    """The one that it replaces is compared with it, by hand: top-1 -2, 0, 2, beta +0.01 three times."""
    def line(cell, seed, top1, beta, **more):
        return {"cell": cell, "classifier": "lt", "seed": seed, "top1": top1, "balancedness": beta, "machine": "EPYC", **more}

    old = [line(cell, seed, 0.5, 0.6, seconds=10) for cell in ("kcl", "ce-200", "ce") for seed in (100, 101, 102)]
    new = [line("kcl", 100 + i, top1, 0.61, commit="abc1234", machine="Xeon", seconds=7) for i, top1 in enumerate((0.48, 0.5, 0.52))]
    new += [line("ce-200", 100 + i, 0.55 + i / 500, 0.6, commit="abc1234") for i in range(2)]
    (tmp_path / "lines").write_text("".join(json.dumps(x) + "\n" for x in old))
    assert findings.commits_table(findings.read(tmp_path / "lines")) == "Not run yet.\n"
    (tmp_path / "lines").write_text("".join(json.dumps(x) + "\n" for x in old + new))
    lines = findings.read(tmp_path / "lines")
    assert findings.difference(lines, "top1", "kcl/lt") == pytest.approx([48, 50, 52])
    assert findings.difference(lines, "seconds", "kcl/lt") == pytest.approx([10, 10, 10])  # on the first machine
    header, _, kcl, ce_200, _, agree, mixed = findings.commits_table(lines).splitlines()
    assert header == "|  | n | top-1 before | now | difference | beta before | now | difference |"
    assert kcl == "| kcl/lt | 3 | 50.0 ± 0.0 | 50.0 ± 5.0 | +0.0 ± 5.0 | 0.600 ± 0.000 | 0.610 ± 0.000 | +0.010 ± 0.000 |"
    assert ce_200.startswith("| ce-200/lt | 2 | 50.0 ± 0.0 | 55.1 ± 1.3 | +5.1 ± 1.3 |")
    assert agree.startswith("The new lines are from commit abc1234.") and agree.endswith("contains 0 in 1 of 2 rows for top-1, and in 1 for beta.")
    assert "only some seeds are new in ce-200 (2 of 3 seeds)." in mixed.lower()


def test_a_rate_is_below_its_number(tmp_path):
    """Whatever the order of the lines."""
    tried = ((1, 0.4), (0.03, 0.1), (0.3, 0.3), (0.1, 0.2))
    text = "".join(json.dumps({"cell": f"tune-ce-{rate:g}", "seed": 10, "classifier": "lt", "top1": top1, "machine": ""}) + "\n"
                   for rate, top1 in tried)
    (tmp_path / "lines").write_text(text)
    table = findings.rates_table(findings.read(tmp_path / "lines"))
    assert table.splitlines()[0] == "|  | 0.03 | 0.1 | 0.3 | 1 |"
    assert table.splitlines()[2] == "| ce | 10.0 | 20.0 | 30.0 | **40.0** |"


def test_every_claim_names_cells_of_the_study(lines):
    for _, claim, column, expression in findings.HEADLINE + findings.CLAIMS:
        assert len(findings.difference(lines, column, expression)) == 5, claim
    for name, of in findings.ROWS.items():
        assert of in lines, name


@pytest.mark.skipif('"cell": "kcl", "seed": 100' not in LINES.read_text(), reason="the study has not been run")
def test_texts_are_those_of_the_committed_lines():
    lines, readme = findings.read(LINES), (ROOT / "README.md").read_text()
    assert (ROOT / "results/findings.md").read_text() == findings.page(lines)
    assert findings.with_numbers(readme, lines) == readme
    assert "<!-- against -->" in readme


@pytest.mark.skipif('"cell": "kcl", "seed": 100' not in LINES.read_text(), reason="the study has not been run")
def test_the_summary_is_what_the_verdicts_say():
    """findings.md and README.md say in words what KCL beats and what it does not."""
    verdicts = {claim: verdict for _, claim, *_, verdict in findings.judge(findings.read(LINES))}
    for claim, verdict in verdicts.items():
        if claim.startswith("KCL above joint CE") or claim.startswith("KCL above FCL"):
            assert verdict == "holds", claim
        if re.match(r"KCL above (cRT|tau-norm), |KCL's space.* more balanced than CE's", claim):
            assert verdict == "open", claim
    assert verdicts["KCL, 200 epochs, above joint CE, 90"] == "holds"
    n = Counter(verdicts.values())
    readme = (ROOT / "README.md").read_text()
    assert f"{sum(n.values())} claims against these runs: {n['holds']} hold, {n['contradicted']} are contradicted, {n['open']} are open" in readme
