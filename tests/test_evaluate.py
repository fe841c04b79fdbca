"""Metrics against closed forms and literal loops; heads together against each alone; what the table must not hide."""
import csv
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import data
import evaluate
import resnet
import train_linear
import train_rep
from evaluate import balancedness, class_means, count_hits, group_accuracy, scores, tau_normalize
from tools import plots

# ---- metrics

@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("n, m, high, low", [(5, 5, 0.9, 0.1), (3, 7, 0.8, 0.75), (9, 1, 1.0, 0.0)])
def test_balancedness_of_two_groups(sigma, n, m, high, low):
    """p^2 + (1-p)^2 + 2 p (1-p) exp(-d^2 / sigma)."""
    p = n / (n + m)
    closed = p ** 2 + (1 - p) ** 2 + 2 * p * (1 - p) * math.exp(-(high - low) ** 2 / sigma)
    assert balancedness([high] * n + [low] * m, sigma) == pytest.approx(closed, rel=1e-12)


def test_balancedness_against_the_literal_sum_and_its_bounds():
    acc = np.random.RandomState(0).rand(30)
    literal = sum(math.exp(-abs(a - b) ** 2 / 0.1) for a in acc for b in acc) / 30 ** 2
    assert balancedness(acc) == pytest.approx(literal, rel=1e-12)
    assert balancedness([0.3] * 7) == 1 and balancedness([0.5]) == 1
    assert 1 / 2 < balancedness([0, 1], sigma=0.1) < 1 / 2 + 1e-4
    for wrong in ([50, 60], [-0.1], [float("nan")]):
        with pytest.raises(ValueError, match="expected class accuracies in .0, 1."):
            balancedness(wrong)


def test_groups_are_means_of_class_accuracies():
    acc, sizes = [0.9, 0.7, 0.6, 0.5, 0.1], [1280, 101, 100, 20, 19]
    assert group_accuracy(acc, sizes) == {"many": 0.8, "medium": 0.55, "few": 0.1}
    assert group_accuracy([0.5, 0.7], [50, 60]) == {"many": None, "medium": 0.6, "few": None}


def test_hits_and_scores_against_literal_loops():
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(300, 8, generator=g), torch.randint(8, (300,), generator=g)
    labels[:8] = torch.arange(8)
    n, top1, top5 = [0] * 8, [0] * 8, [0] * 8
    for row, y in zip(logits.tolist(), labels.tolist()):
        order = sorted(range(8), key=lambda c: -row[c])
        n[y] += 1
        top1[y] += order[0] == y
        top5[y] += y in order[:5]
    hits = count_hits(logits, labels)
    assert hits.tolist() == [n, top1, top5]
    s = scores(hits, [200] * 4 + [50] * 3 + [2], 0.1)
    acc = [a / b for a, b in zip(top1, n)]
    assert s["top1"] == sum(top1) / 300 and s["top5"] == sum(top5) / 300 and s["images"] == 300
    assert s["per_class"] == acc and s["many"] == pytest.approx(sum(acc[:4]) / 4) and s["few"] == acc[7]
    assert s["balancedness"] == balancedness(acc) and s["std"] == pytest.approx(np.std(acc))
    assert count_hits(torch.eye(3), torch.tensor([0, 1, 0])).tolist() == [[2, 1, 0], [1, 1, 0], [2, 1, 0]]  # top-5 of three


def test_tau_norm():
    w = torch.randn(6, 10) * torch.arange(1, 7)[:, None]
    assert torch.equal(tau_normalize(w, 0), w)
    assert torch.allclose(tau_normalize(w, 1).norm(dim=1), torch.ones(6))
    assert torch.allclose(tau_normalize(w, 0.5).norm(dim=1), w.norm(dim=1).sqrt())
    large = torch.tensor([[10.0, 0], [0, 1]])  # class 1 is right only where the norms are nearly equal
    assert evaluate.choose_tau(large, torch.tensor([[1.0, 0], [1, 2]]), torch.tensor([0, 1])) == 0.7


def test_nearest_class_mean_against_a_literal_loop():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=g), torch.arange(40) % 3
    means = []
    for c in range(3):
        mean = sum(v / v.norm() for v in x[y == c])
        means.append(mean / mean.norm())
    assert torch.allclose(class_means(x, y, 3), torch.stack(means), atol=1e-6)


# ---- the table

def row(seed, top1, **more):
    run = f"digits-lt-kcl-seed{seed}"
    return {"run": run, "name": run, "seed": seed, "protocol": "lt: x", "chosen": f"lr {seed + 1}", "top1": top1, "top5": 1.0,
            "many": top1, "medium": None, "few": 0.1, "balancedness": 0.5, "std": 0.2, "sigma": 0.1, "list": "test.txt",
            "counts_of": "train_lt.txt", "images_per_class": [100, 100], "class_mean": top1, **more}


def test_table_prints_a_dash_for_an_empty_group_and_the_mean_over_seeds(capsys):
    evaluate.print_table([row(0, 0.6), row(1, 0.7)])
    lines = capsys.readouterr().out.splitlines()
    cells = [[c.strip() for c in line.split("|")] for line in lines]
    assert cells[0][1:10] == ["run", "top-1", "top-5", "many", "medium", "few", "beta", "std", "classifier"]
    assert cells[2][1:10] == ["digits-lt-kcl-seed0", "60.0", "100.0", "60.0", "-", "10.0", "0.500", "20.0", "lt: x, lr 1"]
    assert cells[4][1:6] == ["digits-lt-kcl, 2 seeds", "65.0 +- 7.1", "100.0 +- 0.0", "65.0 +- 7.1", "-"]
    assert "sigma = 0.1 (eq. 3)" in lines[-4] and "on test.txt" in lines[-4] and "images in train_lt.txt" in lines[-2]
    assert lines[-3] == "+- is the standard deviation over the seeds." and lines[-1].startswith("- means that no class")
    evaluate.print_table([row(0, 0.6), row(0, 0.7)])  # two classifiers of one run are no seeds
    assert "seeds" not in capsys.readouterr().out
    evaluate.print_table([row(0, 0.6), row(0, 0.7) | {"list": "val.txt"}])  # of two lists: each row says which
    out = capsys.readouterr().out
    assert "lr 1, on test.txt |" in out and "lr 1, on val.txt |" in out and "computed on test.txt, val.txt." in out


def test_table_for_a_paper(tmp_path):
    """The cells of the printed table, for pandas and for LaTeX."""
    for suffix in ".csv", ".tex":
        evaluate.print_table([row(0, 0.6), row(1, 0.7)], tmp_path / f"table{suffix}")
    with open(tmp_path / "table.csv", newline="") as f:
        table = list(csv.reader(f))
    assert table[0] == ["run", "top-1", "top-5", "many", "medium", "few", "beta", "std", "classifier"]
    assert table[3][:5] == ["digits-lt-kcl, 2 seeds", "65.0 +- 7.1", "100.0 +- 0.0", "65.0 +- 7.1", "-"] and len(table) == 4
    lines = (tmp_path / "table.tex").read_text().splitlines()
    assert lines[3].startswith(r"digits-lt-kcl, 2 seeds & 65.0 $\pm$ 7.1 & ") and all(line.endswith(r" \\") for line in lines)
    assert lines[0] == r"run & top-1 & top-5 & many & medium & few & beta & std \\"
    evaluate.print_table([row(0, 0.6, name="K & C_L")], tmp_path / "table.tex")
    assert (tmp_path / "table.tex").read_text().splitlines()[1].startswith(r"K \& C\_L & 60.0 &")


@pytest.mark.parametrize("runs, means", [  # (name, seed in head.pt) of each row -> names of the lines of means
    ([("x", 0), ("x", 1)], ["x, 2 seeds"]),                                 # runs/seed0/x and runs/seed1/x
    ([("x-seed0", 0), ("x-seed1", 1), ("y", 0)], ["x, 2 seeds"]),
    ([("x-seed0", 0), ("x-seed1", 0)], []),                                 # --out has another seed than --seed
    ([("x", 0), ("x", 0), ("x", 1)], []),                                   # two classifiers of seed 0
    ([("x", 0), ("y", 1)], []), ([("x", 0)], [])])
def test_the_seed_is_that_of_the_run(runs, means, capsys):
    evaluate.print_table([row(0, 0.6 + i / 10) | {"run": run, "name": run, "seed": seed} for i, (run, seed) in enumerate(runs)])
    cells = [[c.strip() for c in line.split("|")[1:]] for line in capsys.readouterr().out.splitlines() if line[:3] in ("| x", "| y")]
    assert [line[0] for line in cells] == [run for run, _ in runs] + means
    assert all(line[1] == "65.0 +- 7.1" for line in cells[len(runs):])
    if runs == [("x", 0), ("x", 1)]:
        assert [line[-2] for line in cells] == ["lt: x, lr 1, seed 0", "lt: x, lr 1, seed 1", "lt: x"]


def test_table_of_an_uneven_test_list(capsys):
    evaluate.print_table([row(0, 0.6, class_mean=0.5, images_per_class=[1, 30]), row(1, 0.7, class_mean=0.7)])
    lines = capsys.readouterr().out.splitlines()
    cells = [[c.strip() for c in line.split("|")] for line in lines]
    assert (cells[0][2], cells[2][2]) == ("top-1", "60.0") and (cells[0][9], cells[2][9]) == ("mean", "50.0")
    assert cells[4][9] == "60.0 +- 14.1" and len({len(line) for line in cells[:5]}) == 1
    assert any(line.startswith("There are 1 to 100 test images per class. Top-1 and top-5 average over images, all other columns over classes.")
               for line in lines)


# ---- heads

@pytest.fixture(scope="module")
def heads(digits, tmp_path_factory):
    """The heads of two runs with random backbones. The first has a joint CE head and a linear one, whose name says that it
    is class-balanced. The second has a linear one. The lists have 100 images for test and val, and 108 for training."""
    root = tmp_path_factory.mktemp("heads")
    for name, source, every in (("test.txt", "test.txt", 10), ("val.txt", "val.txt", 5), ("lt.txt", "train_lt0.txt", 8)):
        (root / name).write_text("".join((digits / source).read_text().splitlines(keepends=True)[::every]))
    counts = data.read_list(digits, str(root / "lt.txt"))[1].bincount().tolist()
    paths = []
    for seed, folder, protocol in ((0, "", "joint CE, instance sampling"), (0, "linear-lt", "lt: linear"), (1, "linear-lt", "lt: linear")):
        torch.manual_seed(seed)
        encoder = resnet.ARCHS["resnet8s"]()
        path = root / f"kcl-seed{seed}" / folder / "head.pt"
        path.parent.mkdir(parents=True)
        torch.save({n: x for n, x in encoder.state_dict().items() if n[:3] != "fc."}, root / f"kcl-seed{seed}/backbone.pt")
        torch.save({"weight": torch.randn(10, 64), "bias": torch.randn(10), "backbone": "../backbone.pt" if folder else "backbone.pt",
                    "arch": "resnet8s", "dataset": "digits", "data": str(digits), "list": str(root / "lt.txt"), "counts": counts,
                    "counts_of": str(root / "lt.txt"), "list_sha256": checkpoint.sha256(root / "lt.txt"), "name": f"kcl-seed{seed}",
                    "seed": seed, "class_names": {c: str(c) for c in range(10)},
                    "protocol": protocol, "chosen": "", **{n: data.DATASETS["digits"][n] for n in ("mean", "std", "pixels", "resize")}},
                   path)
        paths.append(path)
    return paths


def written(paths):
    return {(path, file.name): json.loads(file.read_text()) for path in paths for file in path.parent.glob("eval*.json")}


def test_heads_together_score_as_each_alone_and_encode_once(script, heads, monkeypatch, capsys):
    """The first backbone encodes test, val and training list once for its two heads; the second two of them."""
    encoded, encode_all = [], data.encode_all

    def spy(encode, dataset, *rest):
        encoded.append(Path(dataset.name).stem)
        return encode_all(encode, dataset, *rest)
    monkeypatch.setattr(data, "encode_all", spy)
    script(evaluate, *heads[::-1], "--tau-norm", "--ncm", "--workers", 0)
    assert sorted(encoded[:2]) == ["lt", "test"] and sorted(encoded[2:]) == ["lt", "test", "val"]  # seed 1, then seed 0
    table = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| kcl")]
    assert table == ["kcl-seed1"] * 2 + ["kcl-seed0"] * 4 + ["kcl, 2 seeds"] * 2  # as given
    together = written(heads)
    assert len(together) == 6
    for head in heads:
        script(evaluate, head, "--tau-norm", "--workers", 0)
    alone = written(heads)
    assert all(alone[key] == row for key, row in together.items())

    features, labels = extract_literally(heads[0])
    head = torch.load(heads[0], weights_only=True)
    tau = float(re.match("tau (.*) chosen on .*val.txt", together[heads[0], "eval_tau_norm.json"]["chosen"])[1])
    for file, logits in (("eval.json", features @ head["weight"].T + head["bias"]),
                         ("eval_tau_norm.json", features @ tau_normalize(head["weight"], tau).T)):  # without the bias
        assert together[heads[0], file]["top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item(), abs=0.011)


def test_the_bias_is_the_heads_alone_and_sigma_reaches_beta(script, heads, tmp_path, capsys):
    """With a bias of 99 for class 4 every image is assigned to class 4, except by tau-norm and NCM, which have no bias. The
    classes are compared one by one, because top-1 could hide a difference of one image."""
    shutil.copy(heads[0].with_name("backbone.pt"), tmp_path)
    head = torch.load(heads[0], weights_only=True)
    head["bias"] = 99.0 * (torch.arange(10) == 4)
    torch.save(head, tmp_path / "head.pt")
    script(evaluate, tmp_path, "--tau-norm", "--ncm", "--sigma", 0.7, "--list", heads[0].parent.parent / "test.txt",
           "--val", heads[0].parent.parent / "val.txt", "--workers", 0)
    assert "sigma = 0.7" in capsys.readouterr().out
    rows = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("eval*.json")}
    assert len(rows) == 3 and rows["eval.json"]["per_class"] == [0] * 4 + [1] + [0] * 5

    features, labels = extract_literally(heads[0])
    tau = float(rows["eval_tau_norm.json"]["chosen"].split()[1])
    hits = count_hits(features @ tau_normalize(head["weight"], tau).T, labels)
    assert np.allclose(rows["eval_tau_norm.json"]["per_class"], hits[1] / hits[0], atol=0.11)  # an image of ten may be a tie
    assert hits[1][4] < 9 and rows["eval_ncm.json"]["per_class"][4] < 0.9
    for row in rows.values():
        acc = np.array(row["per_class"])
        assert row["sigma"] == 0.7
        assert row["balancedness"] == pytest.approx(np.exp(-(acc[:, None] - acc) ** 2 / 0.7).mean(), rel=1e-12)


def extract_literally(path):
    head = torch.load(path, weights_only=True)
    dataset = data.ImageList(head["data"], str(Path(head["list"]).with_name("test.txt")), head)
    backbone = resnet.load_backbone(path.parent / head["backbone"], "resnet8s").eval()
    images = torch.stack([dataset[i][0][0] for i in range(len(dataset))])
    with torch.no_grad():
        return backbone((images / 255 - 0.179) / 0.279), dataset.labels


def test_two_ranks_score_as_one(script, ranks, heads):
    script(evaluate, *heads, "--tau-norm", "--ncm", "--workers", 0)
    one = written(heads)
    printed = ranks(2, "evaluate", *heads, "--tau-norm", "--ncm", "--workers", 0)
    two = written(heads)
    assert printed.count("All columns are in percent, except beta") == 1
    for key, row in one.items():
        assert row["images"] == two[key]["images"] == 400
        assert np.allclose(row["per_class"], two[key]["per_class"], atol=0.11)  # an image of ten may be a tie


def test_a_folder_is_its_head_and_tau_norm_needs_a_joint_head(script, heads, capsys):
    script(evaluate, heads[1].parent, "--tau-norm", "--workers", 0)
    printed = capsys.readouterr().out
    assert "no tau-norm: it needs a joint CE head" in printed
    assert "| kcl-seed0 |" in printed and "tau-norm of" not in printed


@pytest.mark.parametrize("flags, sentence", [
    (("--table", "table.txt"), "--table table.txt must end in .csv or .tex"),
    (("--table", "nowhere/table.csv"), "--table nowhere/table.csv must end in .csv or .tex and lie in a folder that exists"),
    (("--list", "overlap_source/test.txt"), "overlap_source/test.txt must hold all 10 classes of"),
    (("--groups", "overlap_source/train_lt.txt"), "has 10 classes, overlap_source/train_lt.txt has 5; pass the training list"),
    (("--tau-norm", "--val", "train_lt0.txt"), "are also in the training list"),
    (("--names", "A", "B"), "--names has 2 name(s), but the table has 1 row(s); "),
    (("--tau-norm", "--names", "A"), "--names has 1 name(s), but the table has 2 row(s); --tau-norm adds one per joint CE head"),
    (("--tau-norm", "--ncm", "--names", "A", "B"), "--names has 2 name(s), but the table has 3 row(s); "),
    (("--tau-norm", "--ncm", "--names", "A", "B", "C", "D"), "--names has 4 name(s), but the table has 3 row(s); ")])
def test_bad_input_is_one_sentence(script, heads, flags, sentence, monkeypatch):
    monkeypatch.setattr(evaluate, "load_backbone", None)  # before the long work
    with pytest.raises(SystemExit) as error:
        script(evaluate, heads[0], *flags, "--workers", 0)
    assert str(error.value).startswith("error: ") and sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [("--list",), ("--groups",), ("--tau-norm", "--val")])
def test_a_list_that_numbers_the_classes_otherwise(script, heads, tmp_path, flags):
    """Also if the training list is gone."""
    head, root = torch.load(heads[0], weights_only=True), heads[0].parent.parent
    for name in ("test", "val", "lt"):
        lines = [line.split() for line in (root / f"{name}.txt").read_text().splitlines()]
        (tmp_path / f"{name}.txt").write_text("".join(f"{path} {(int(c) + 1) % 10}\n" for path, c in lines))
    head |= {"list": str(tmp_path / "gone.txt"), "counts_of": str(tmp_path / "gone.txt")}
    shutil.copy(heads[0].with_name("backbone.pt"), tmp_path)
    torch.save(head, tmp_path / "head.pt")
    name = {"--list": "test.txt", "--groups": "lt.txt", "--val": "val.txt"}[flags[-1]]
    test = () if "--list" in flags else ("--list", root / "test.txt")
    with pytest.raises(SystemExit, match=rf"error: label \d is class \d in \S*{name}, but \d in the training list; number"):
        script(evaluate, tmp_path / "head.pt", *test, *flags, tmp_path / name, "--workers", 0)
    assert not list(tmp_path.glob("eval*.json"))


def test_another_list_of_the_same_name_is_noticed(heads, tmp_path):
    head = torch.load(heads[0], weights_only=True)
    torch.save({**head, "list_sha256": "0"}, tmp_path / "head.pt")
    with pytest.raises(SystemExit, match="has changed since the training"):
        evaluate.load_head(tmp_path / "head.pt")


def test_a_classifier_belongs_to_one_backbone(script, digits, heads, tmp_path):
    """Stage 1, stage 2, stage 1 again: every reader of the old classifiers refuses them."""
    lt = heads[0].parent.parent / "lt.txt"
    stage1 = ("--loss", "ce", "--arch", "resnet8s", "--epochs", 1, "--batch", 50, "--data", digits, "--list", lt, "--out", tmp_path)
    stage2 = (tmp_path / "backbone.pt", "--features", "cached", "--epochs", 1, "--batch", 50)
    script(train_rep, *stage1)
    script(train_linear, *stage2)
    linear = tmp_path / "linear-lt-cached/head.pt"
    for file in (tmp_path / "head.pt", linear):
        assert torch.load(file, weights_only=True)["backbone_sha256"] == checkpoint.sha256(tmp_path / "backbone.pt")
    script(evaluate, tmp_path, linear)
    joint = (tmp_path / "head.pt").read_bytes()

    script(train_rep, *stage1, "--restart", "--lr", 0.01)
    script(evaluate, tmp_path)                                            # the new head
    (tmp_path / "head.pt").write_bytes(joint)
    start, end = f"error: {tmp_path / 'backbone.pt'} has changed since ", "head.pt was trained on it; train this classifier again, with --restart"
    for module, flags in ((evaluate, [linear]), (evaluate, [tmp_path]), (evaluate, [tmp_path, "--data", digits]), (plots, [linear]),
                          (train_linear, [*stage2, "--classifier", "lws"])):
        with pytest.raises(SystemExit) as error:
            script(module, *flags)
        assert str(error.value).startswith(start) and str(error.value).endswith(end)
    script(train_linear, *stage2, "--restart")
    assert not (linear.parent / "eval.json").exists()                     # of the old classifier
    script(evaluate, linear)


def test_photographs_are_read_by_as_many_workers_as_there_are_cores(script, heads, tmp_path, monkeypatch):
    used = []

    def spy(encode, dataset, D, batch, workers, device):
        used.append(workers)
        return torch.zeros(len(dataset), D, device=device)
    monkeypatch.setattr(data, "encode_all", spy)
    monkeypatch.setattr(data, "workers_per_rank", lambda: 3)
    head = torch.load(heads[0], weights_only=True)
    shutil.copy(heads[0].with_name("backbone.pt"), tmp_path)
    torch.save(head, tmp_path / "digits.pt")
    torch.save({**head, "dataset": "folder"}, tmp_path / "photos.pt")
    test = heads[0].parent.parent / "test.txt"
    for flags in (("digits.pt",), ("photos.pt",), ("photos.pt", "--workers", 1)):
        script(evaluate, tmp_path / flags[0], "--list", test, *flags[1:])
    assert used == [0, 3, 1]


def test_a_default_test_list_must_not_have_been_trained_on(script, heads, digits, tmp_path):
    """Another list is the user's choice. With --data too, a training list that was rebuilt is refused."""
    lists = heads[0].parent.parent
    lines = (lists / "lt.txt").read_text() + (lists / "test.txt").read_text().splitlines(keepends=True)[7]
    head = torch.load(heads[0], weights_only=True)
    shutil.copy(heads[0].with_name("backbone.pt"), tmp_path)
    for name in ("test.txt", "val.txt"):
        shutil.copy(lists / name, tmp_path)
    (tmp_path / "lt.txt").write_text(lines)
    head |= {name: str(tmp_path / "lt.txt") for name in ("list", "counts_of")}
    head["list_sha256"] = checkpoint.sha256(tmp_path / "lt.txt")
    torch.save(head, tmp_path / "head.pt")
    with pytest.raises(SystemExit, match="error: 1 images of the test list .*test.txt are also in the training list"):
        script(evaluate, tmp_path / "head.pt")
    script(evaluate, tmp_path / "head.pt", "--list", tmp_path / "test.txt")

    (tmp_path / "lt.txt").write_text((lists / "lt.txt").read_text())
    for flags in ((), ("--data", digits)):
        with pytest.raises(SystemExit, match="error: .*lt.txt has changed since the training"):
            script(evaluate, tmp_path / "head.pt", *flags)


def table(printed):
    """[[cell, ...] of each row]."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")][1:]


def test_every_row_has_its_name_and_the_classes_theirs(script, heads, capsys):
    script(evaluate, heads[1], heads[0], "--tau-norm", "--ncm", "--names", "cRT", "NCM", "CE, joint", "tau", "--workers", 0)
    lines = table(capsys.readouterr().out)
    assert [line[0] for line in lines] == ["cRT", "NCM", "CE, joint", "tau"]
    files = [(heads[1], "eval.json"), (heads[1], "eval_ncm.json"), (heads[0], "eval.json"), (heads[0], "eval_tau_norm.json")]
    for line, (head, file) in zip(lines, files, strict=True):
        saved = json.loads(head.with_name(file).read_text())
        assert saved["classes"] == [str(c) for c in range(10)] and saved["head"] == str(head)
        assert line[1] == f"{100 * saved['top1']:.1f}" and line[-1].startswith(saved["protocol"])


@pytest.mark.parametrize("name", ["val.txt", "sub/eval.txt"])
def test_another_list_leaves_the_numbers_of_the_test_list(script, heads, name):
    script(evaluate, heads[0], "--tau-norm", "--workers", 0)
    before = written(heads[:1])
    assert {file for _, file in before} >= {"eval.json", "eval_tau_norm.json"}
    root = heads[0].parent.parent
    other = root / name
    other.parent.mkdir(exist_ok=True)
    other.write_text((root / "val.txt").read_text())
    script(evaluate, heads[0], "--tau-norm", "--list", other, "--workers", 0)
    assert written(heads[:1]) == before
    found = {file.name: json.loads(file.read_text()) for file in heads[0].parent.glob("on_*.json")}
    assert {f"on_{other.stem}_eval.json", f"on_{other.stem}_eval_tau_norm.json"} <= set(found)
    assert found[f"on_{other.stem}_eval.json"]["list"] == str(other)
    script(evaluate, heads[0], "--list", root / "test.txt", "--workers", 0)  # the default, by name
    assert json.loads(heads[0].with_name("eval.json").read_text())["list"] == str(root / "test.txt")


def test_groups_change_the_groups_alone(script, heads):
    """They do not change the class means of --ncm."""
    script(evaluate, heads[0], "--ncm", "--workers", 0)
    before = written(heads[:1])
    script(evaluate, heads[0], "--ncm", "--groups", "train_lt.txt", "--workers", 0)
    after = written(heads[:1])
    for key in ((heads[0], "eval.json"), (heads[0], "eval_ncm.json")):
        moved = {name for name, x in after[key].items() if x != before[key][name]}
        assert {"counts", "counts_of"} <= moved <= {"counts", "counts_of", "many", "medium", "few"}
        assert after[key]["many"] is not None and before[key]["many"] is None and after[key]["counts_of"] == "train_lt.txt"
    assert after[key]["protocol"] == f"NCM on {heads[0].parent.parent / 'lt.txt'}"


@pytest.mark.parametrize("val", ["none", "nowhere.txt"])
def test_without_a_validation_list_there_is_no_tau_but_all_other_rows(script, heads, monkeypatch, capsys, val):
    monkeypatch.setitem(data.DATASETS, "digits", {**data.DATASETS["digits"], "val": val})
    script(evaluate, *heads[:2], "--tau-norm", "--ncm", "--names", "A", "B", "C", "--workers", 0)
    printed = capsys.readouterr().out
    assert "no tau-norm: " in printed and "a list that chooses tau (--val)" in printed
    assert [line[0] for line in table(printed)] == ["A", "B", "C"]


@pytest.mark.parametrize("val, said", [("test.txt", True), ("copy.txt", True), ("val.txt", False)])
def test_tau_that_the_test_list_has_chosen(script, heads, capsys, val, said):
    root = heads[0].parent.parent
    shutil.copy(root / "test.txt", root / "copy.txt")
    script(evaluate, heads[0], "--tau-norm", "--val", root / val, "--workers", 0)
    joint, tau = table(capsys.readouterr().out)
    assert ("whose images are scored here" in tau[-1]) == said and f"chosen on {root / val}" in tau[-1]
    assert "scored" not in joint[-1]


def test_an_uneven_test_list_is_scored_by_images_and_by_classes(script, heads, tmp_path, capsys):
    root = heads[0].parent.parent
    lines = (root / "test.txt").read_text().splitlines(keepends=True)
    kept = [line for c in range(10) for line in [x for x in lines if x.endswith(f" {c}\n")][:1 + 4 * c]]
    (root / "uneven.txt").write_text("".join(kept))
    script(evaluate, heads[0], "--list", root / "uneven.txt", "--workers", 0)
    (cells,), saved = table(capsys.readouterr().out), json.loads(heads[0].with_name("on_uneven_eval.json").read_text())
    n = np.array([1 + 4 * c for c in range(10)])
    assert saved["images_per_class"] == [1, 37] and saved["images"] == n.sum()
    assert saved["class_mean"] == pytest.approx(np.mean(saved["per_class"]))
    assert saved["top1"] == pytest.approx((n * saved["per_class"]).sum() / n.sum())
    top1, mean = cells[1], cells[8]
    assert [top1, mean] == [f"{100 * saved['top1']:.1f}", f"{100 * saved['class_mean']:.1f}"] and top1 != mean
