"""Stage 2: heads side by side against each alone and a literal loop, cached features, what val chooses, resuming."""
import json
import re
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

import augment
import baselines
import checkpoint
import data
import resnet
import train_linear

LRS, DECAYS = (0.1, 30.0), (0.0, 0.05)


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A folder with a random backbone, a joint head, and lists of 108 and 100 images of all classes."""
    root = tmp_path_factory.mktemp("run")
    for name, source, every in (("small.txt", "train_lt0.txt", 8), ("val.txt", "val.txt", 5)):
        lines = (digits / source).read_text().splitlines(keepends=True)
        (root / name).write_text("".join(lines[::every]))
    torch.manual_seed(0)
    encoder = resnet.ARCHS["resnet8s"]()
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    encoder(images(digits, (root / "small.txt").read_text().splitlines()))  # BatchNorm sees them: classes come apart
    torch.save({n: x for n, x in encoder.state_dict().items() if n[:3] != "fc."}, root / "backbone.pt")
    torch.save({"weight": encoder.fc.weight.detach().clone(), "bias": torch.arange(10) / 10}, root / "head.pt")
    return root


@pytest.fixture
def linear(script, digits, run, tmp_path, monkeypatch):
    """linear("--lr", 1, ...): stage 2 on that list into a new folder; returns head.pt, all heads, and the folder."""
    made, Heads = [], train_linear.Heads

    def spy(*args):
        made.append(Heads(*args))
        return made[-1]
    monkeypatch.setattr(train_linear, "Heads", spy)

    def train(*args):
        out = tmp_path / f"out{len(made)}"
        script(train_linear, *command(run, digits), "--out", out, *args)
        return torch.load(out / "head.pt", weights_only=True), made[-1].cpu(), out
    return train


def command(run, digits):
    return (run / "backbone.pt", "--arch", "resnet8s", "--dataset", "digits", "--data", digits, "--list", run / "small.txt",
            "--val", run / "val.txt", "--epochs", 2, "--batch", 50)


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def images(digits, lines):
    """Normalised images (n, 3, 32, 32) of a list's lines, from the files alone."""
    files = [digits / line.split()[0] for line in lines]
    x = torch.stack([torch.from_numpy(np.array(Image.open(file).convert("RGB"))) for file in files])
    return (x.permute(0, 3, 1, 2) / 255 - 0.179) / 0.279


def literal_features(run, digits, name):
    """(n, D) features and (n,) labels of a list."""
    lines = (run / name).read_text().splitlines()
    backbone = resnet.load_backbone(run / "backbone.pt", "resnet8s").eval()
    with torch.no_grad():
        return backbone(images(digits, lines)), torch.tensor([int(line.split()[1]) for line in lines])


# ---- training

@pytest.mark.parametrize("features, classifier", [("streamed", "linear"), ("cached", "lws")])
def test_each_pair_of_lr_and_weight_decay_trains_as_it_would_alone(linear, run, features, classifier):
    how = ("--features", features, "--classifier", classifier)
    chosen, together, out = linear("--lr", *LRS, "--weight-decay", *DECAYS, *how)
    log = logged(out)
    pairs = [(lr, weight_decay) for lr in LRS for weight_decay in DECAYS]
    assert list(zip(log[1]["lr"], log[1]["weight_decay"])) == pairs and len(log[1]["loss"]) == len(pairs)
    for head, (lr, weight_decay) in zip(together, pairs):
        written, (alone,), _ = linear("--lr", lr, "--weight-decay", weight_decay, *how)
        assert torch.equal(alone.weight, head.weight) and torch.equal(alone.bias, head.bias)
        assert torch.equal(written["weight"], alone.weight) and torch.equal(written["bias"], alone.bias)
        assert written["chosen"] == f"lr {lr:g}, weight decay {weight_decay:g} given" and written["val_top1"] is None
        if (lr, weight_decay) == (log[-1]["lr"], log[-1]["weight_decay"]):
            assert torch.equal(chosen["weight"], alone.weight)
            how_chosen = chosen["chosen"].partition(", a tie of")[0]      # after two epochs many are equal
            assert how_chosen == f"lr {lr:g}, weight decay {weight_decay:g} chosen on {run / 'val.txt'}"
    assert len({tuple(head.weight.flatten().tolist()) for head in together}) == len(pairs)


@pytest.mark.parametrize("schedule, rates", [("cosine", (1, 0.75, 0.25)), ("step", (1, 1, 0.1))])
def test_six_steps_of_two_heads_against_a_literal_loop(linear, run, digits, schedule, rates):
    """Softmax regression with momentum by hand, in float64: v = 0.9 v + g + weight decay * w; w = w - lr v."""
    how = ("--features", "cached", "--schedule", schedule, "--epochs", 3, "--batch", 50, "--seed", 5)
    _, heads, out = linear("--lr", *LRS, "--weight-decay", 0.01, *how)
    assert np.allclose([line["lr"] for line in logged(out)[1:4]], np.outer(rates, LRS))
    x, y = literal_features(run, digits, "small.txt")
    x, draws, one_hot = x.double(), data.Draws(y, "class", 50, 3, seed=5), torch.eye(10).double()
    torch.manual_seed(5)
    start = (torch.randn(10, 64) * 0.01).double()
    for m, (head, lr) in enumerate(zip(heads, LRS)):
        W, b, vW, vb = start, torch.zeros(10).double(), 0, 0
        for epoch, rate in enumerate(rates):
            draws.set_epoch(epoch)
            losses = []
            for i in torch.tensor(list(draws))[:, 0].split(50):
                log_p = (x[i] @ W.T + b).log_softmax(1)
                losses.append(-log_p[range(50), y[i]].mean().item())
                error = (log_p.exp() - one_hot[y[i]]) / 50
                vW, vb = 0.9 * vW + error.T @ x[i] + 0.01 * W, 0.9 * vb + error.sum(0) + 0.01 * b
                W, b = W - lr * rate * vW, b - lr * rate * vb
            assert logged(out)[1 + epoch]["loss"][m] == pytest.approx(np.mean(losses), rel=1e-4) and len(losses) == 2
        assert torch.allclose(head.weight.double(), W, rtol=1e-4, atol=1e-5)
        assert torch.allclose(head.bias.double(), b, rtol=1e-4, atol=1e-5)


def test_ldam_trains_a_cosine_classifier_with_deferred_weights(linear, run, digits):
    """LDAM-DRW of baselines.py on cached features, step by step; head.pt decides as the cosines do."""
    how = ("--features", "cached", "--schedule", "step", "--epochs", 5, "--batch", 50, "--seed", 5)
    saved, (head,), out = linear("--classifier", "ldam", "--lr", 0.3, *how)
    x, y = literal_features(run, digits, "small.txt")
    draws, counts = data.Draws(y, "class", 50, 5, seed=5), y.bincount()
    torch.manual_seed(5)
    twin, v = baselines.NormedLinear(64, 10), 0
    for epoch, rate in enumerate((1, 1, 1, 0.1, 0.01)):
        draws.set_epoch(epoch)
        weight = baselines.effective_number_weights(counts, 0.9999) if epoch == 4 else None
        for i in torch.tensor(list(draws))[:, 0].split(50):
            loss = baselines.ldam_loss(twin(x[i]), y[i], baselines.ldam_margins(counts), weight=weight)
            g, = torch.autograd.grad(loss, twin.weight)
            v = 0.9 * v + g
            twin.weight.data -= 0.3 * rate * v
    assert torch.allclose(head.weight, twin.weight, atol=1e-5)
    assert torch.allclose(saved["weight"].norm(dim=1), torch.ones(10)) and not saved["bias"].any()
    assert torch.equal((x @ saved["weight"].T).argmax(1), head(x).argmax(1))


def test_cached_features_train_as_streamed_ones_that_are_not_augmented(linear, monkeypatch):
    cached, _, _ = linear("--features", "cached", "--lr", 1)
    monkeypatch.setitem(augment.BATCHED, "affine", (lambda images, u: images, 4))
    streamed, _, _ = linear("--lr", 1)
    assert torch.allclose(cached["weight"], streamed["weight"], atol=1e-5)
    assert cached["protocol"] == streamed["protocol"].replace("lt:", "lt, cached features:")


def test_protocol_rep_says_where_its_list_is_not_balanced(linear, run, capsys):
    lines = (run / "small.txt").read_text().splitlines(keepends=True)
    few = [line for line in lines if line.endswith(" 3\n")][3:]
    (run / "uneven.txt").write_text("".join(line for line in lines if line not in few))
    for name, said in (("small.txt", False), ("uneven.txt", True)):
        linear("--protocol", "rep", "--features", "cached", "--lr", 1, "--list", run / name)
        assert (f"{name} is not balanced" in capsys.readouterr().out) == said


def test_lws_scales_the_rows_of_the_joint_head(linear, run):
    joint = torch.load(run / "head.pt", weights_only=True)
    head, (module,), _ = linear("--classifier", "lws", "--lr", 1)
    scale = module.scale.detach()
    assert (scale - 1).abs().max() > 1e-3
    assert torch.equal(head["weight"], joint["weight"] * scale[:, None])
    assert torch.equal(head["bias"], joint["bias"] * scale)


def test_two_ranks_train_as_one(linear, ranks, run, digits, tmp_path):
    how = ("--features", "cached", "--lr", 0.1, 1)
    one, _, out = linear(*how)
    ranks(2, "train_linear", *command(run, digits), *how, "--out", tmp_path / "two")
    two = torch.load(tmp_path / "two/head.pt", weights_only=True)
    assert torch.allclose(one["weight"], two["weight"], atol=1e-5) and two["chosen"] == one["chosen"]
    for a, b in zip(logged(out)[1:-1], logged(tmp_path / "two")[1:-1]):
        assert np.allclose(a["loss"], b["loss"], atol=1e-5)


def test_a_backbone_that_changes_is_noticed(linear, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "eval", lambda self: self)       # BatchNorm keeps counting
    with pytest.raises(AssertionError, match="the frozen backbone changed: .'bn1.running_mean"):
        linear("--lr", 1)


# ---- choosing

def test_val_chooses_among_all_pairs(linear, run, digits, capsys):
    head, heads, out = linear("--features", "cached", "--epochs", 30, "--lr", 0.01, 1, 30, "--weight-decay", *DECAYS)
    x, y = literal_features(run, digits, "val.txt")
    with torch.no_grad():
        top1 = [(h(x).argmax(1) == y).float().mean().item() for h in heads]
    assert len(set(top1)) > 3
    best = int(np.argmax(top1))
    last = logged(out)[-1]
    assert head["val_top1"] == last["val_top1"] == pytest.approx(max(top1))
    assert (last["lr"], last["weight_decay"]) == ((0.01, 1, 30)[best // 2], DECAYS[best % 2])
    assert torch.equal(head["weight"], heads[best].weight)
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("top-1 on "))
    assert f"{100 * head['val_top1']:.1f} (lr {last['lr']:g}, weight decay {last['weight_decay']:g})" in printed


def test_an_end_of_the_grid_is_said_but_not_of_a_tie(linear, capsys, monkeypatch):
    linear("--features", "cached", "--epochs", 30, "--lr", 1e-9, 1)
    assert "lr 1 is at the end of the grid; one beyond it may do better" in capsys.readouterr().out
    linear("--features", "cached", "--lr", 1e-8, 1e-9)  # neither learns
    assert "end of the grid" not in capsys.readouterr().out


@pytest.mark.parametrize("dataset, loss, lrs, decays, right, expected", [
    ("folder", "kcl", train_linear.LR_GRID, [0.0], range(8), (30, 0)),       # all eight are equal: the protocol's own rate
    ("folder", "ce", train_linear.LR_GRID, [0.0, 5e-4], range(16), (0.1, 0)),
    ("digits", "cl", train_linear.LR_GRID, [0.0], range(8), (1, 0)),
    ("folder", "kcl", train_linear.LR_GRID, [0.0], (2, 5, 6), (0.1, 0)),     # it is not among the best: the smallest
    ("folder", "kcl", train_linear.LR_GRID, [0.0], (3,), (0.3, 0)),          # no tie
    ("folder", "ce", [1, 0.1], [1e-4, 0.0], (0, 1), (1, 0))])
def test_a_tie_on_val(dataset, loss, lrs, decays, right, expected, capsys):
    """The classifiers in `right` predict class 1, which is right, and the others predict class 0."""
    pairs = [(lr, decay) for lr in lrs for decay in decays]
    heads = [lambda x, m=m: torch.eye(2)[[int(m in right)] * len(x)] for m in range(len(pairs))]
    args = Namespace(dataset=dataset, loss=loss, lr=lrs, val="val.txt")
    best, top1, reason = train_linear.choose(heads, pairs, torch.zeros(15, 3), torch.ones(15).long(), args)
    assert pairs[best] == expected and top1 == 1
    assert reason == "chosen on val.txt" + (f", a tie of {len(right)}" if len(right) > 1 else "")


def test_a_classifier_that_was_given_reaches_tensorboard(linear):
    """No list has chosen it, so its log ends with val_top1: null."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    head, _, out = linear("--val", "none", "--lr", 0.1, "--tensorboard")
    assert head["val_top1"] is None and logged(out)[-1]["val_top1"] is None
    events = accumulator(str(out / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("lr/0")] == pytest.approx([0.1, 0.05])
    assert [e.value for e in events.Scalars("lr")] == pytest.approx([0.1]) and "val_top1" not in events.Tags()["scalars"]


def test_the_classifier_is_saved_before_the_last_line_is_logged(linear, tmp_path, monkeypatch):
    def full(*args):
        def log(line):
            assert "val_top1" not in line, "the disk is full"
        return log

    monkeypatch.setattr(checkpoint, "open_log", full)
    (tmp_path / "out0").mkdir()
    with pytest.raises(AssertionError, match="the disk is full"):
        linear("--lr", 0.1)
    assert torch.load(tmp_path / "out0/head.pt", weights_only=True)["chosen"] == "lr 0.1, weight decay 0 given"


def test_head_knows_the_seed_of_its_backbone(script, digits, run, tmp_path, capsys):
    """A foreign backbone has none, so the classifier's counts."""
    (tmp_path / "backbone.pt").symlink_to(run / "backbone.pt")
    (tmp_path / "log.jsonl").write_text('{"settings": {"seed": 7}}\n')
    for backbone, seed in ((tmp_path, 7), (run, 3)):
        script(train_linear, backbone / "backbone.pt", *command(run, digits)[1:], "--lr", 1, "--seed", 3, "--out", tmp_path / str(seed))
        assert torch.load(tmp_path / f"{seed}/head.pt", weights_only=True)["seed"] == seed
    assert f"training 1 classifier(s) side by side, on {'cuda' if torch.cuda.is_available() else 'cpu'}" in capsys.readouterr().out


@pytest.fixture
def parsed(monkeypatch, tmp_path, capsys):
    """parsed({"loss": "kcl"}, "--protocol", "rep"): the arguments and what is printed, for a run with these settings."""
    def parse(settings, *flags):
        (tmp_path / "log.jsonl").unlink(missing_ok=True)
        if settings:
            (tmp_path / "log.jsonl").write_text(json.dumps({"settings": settings}) + "\n")
        (tmp_path / "backbone.pt").touch()
        monkeypatch.setattr(sys, "argv", ["train_linear.py", str(tmp_path / "backbone.pt"), *flags])
        return train_linear.parse_args()[0], capsys.readouterr().out
    return parse


def test_defaults_are_those_of_the_data_set_and_the_loss(parsed, tmp_path):
    lt = dict(arch="resnet50", dataset="imagenet", data="X", list="ImageNet_LT_train.txt", list_sha256="")
    args, printed = parsed({**lt, "loss": "kcl"})
    assert (args.epochs, args.schedule, args.weight_decay, args.batch, args.aug) == (100, "step", [0.0], 256, "sup")
    assert (args.list, args.sampler, args.val) == ("ImageNet_LT_train.txt", "class", "ImageNet_LT_val.txt")
    assert args.lr == train_linear.LR_GRID and args.out == tmp_path / "linear-lt"
    assert printed == ("lt on ImageNet_LT_train.txt, class sampling, with the settings for a contrastive loss (the backbone's "
                       "is kcl): 100 epochs, step, weight decay [0.0]; images of 224 px, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)\n")
    args, printed = parsed({**lt, "loss": "ce"}, "--protocol", "rep", "--features", "cached", "--lr", "1")
    assert (args.epochs, args.schedule, args.weight_decay, args.lr) == (10, "cosine", [5e-4], [1.0])
    assert (args.list, args.sampler, args.aug) == ("train_full.txt", "instance", None)
    assert args.out == tmp_path / "linear-rep-cached" and "for a classification loss (the backbone's is ce): 10 epochs" in printed
    foreign = ("--arch", "resnet50", "--dataset", "imagenet", "--data", "X")
    args, printed = parsed({}, *foreign)
    assert args.epochs == 10 and "(the backbone's is unknown: if it is contrastive, pass --loss cl)" in printed
    assert parsed({}, *foreign, "--loss", "cl")[0].epochs == 100
    cifar, _ = parsed({**lt, "dataset": "cifar10", "loss": "fcl"})
    assert (cifar.epochs, cifar.batch, cifar.lr, cifar.val) == (30, 128, [0.1], "none")  # nothing that could choose


def test_a_folder_of_small_images_is_small(parsed, tmp_path):
    """As in train_rep.py, so that a foreign backbone is not fed 32 px scaled up to 224."""
    for side, dataset in ((32, "small"), (64, "small64"), (65, "folder")):
        Image.new("RGB", (side, 20)).save(tmp_path / "0.png")
        (tmp_path / "train_lt.txt").write_text("0.png 0\n")
        args, printed = parsed({}, "--arch", "resnet8", "--dataset", "folder", "--data", str(tmp_path), "--list", "train_lt.txt")
        assert args.dataset == dataset and f"images of {data.DATASETS[dataset]['pixels']} px" in printed


@pytest.mark.parametrize("val", ["val.txt", "none"])
@pytest.mark.parametrize("kind, loss", train_linear.DEFAULTS)
def test_each_default_is_its_tables_and_a_flag_wins(parsed, kind, loss, val):
    """Whether the log says what the backbone is, or flags do."""
    row = train_linear.DEFAULTS[kind, loss]
    assert set(row) == {"epochs", "batch", "lr", "schedule", "weight_decay", "aug", "workers"}
    settings = dict(arch="resnet8", dataset={"photos": "inat18", "cifar": "cifar100", "digits": "digits"}[kind], data="X",
                    loss={"classification": "ldam", "contrastive": "fcl"}[loss])
    flags = [word for name, x in settings.items() for word in (f"--{name}", x)]
    foreign = parsed({}, *flags, "--val", val)[0]
    other = {"arch": "resnet50", "dataset": "places365", "data": "Y", "loss": "cl"}
    for args in (parsed(settings, "--val", val)[0], foreign, parsed(other, *flags, "--val", val)[0]):
        lr = row["lr"] if val == "none" else train_linear.LR_GRID
        assert {name: getattr(args, name) for name in (*settings, *row)} == {**settings, **row, "lr": lr}
    hand = {"epochs": 7, "batch": 9, "lr": [0.2], "schedule": {"cosine": "step", "step": "cosine"}[row["schedule"]],
            "weight_decay": [0.3], "aug": "moco", "workers": 3}
    flags = [str(word) for name, x in hand.items() for word in (f"--{name.replace('_', '-')}", x[0] if isinstance(x, list) else x)]
    args, _ = parsed(settings, "--val", val, *flags)
    assert {name: getattr(args, name) for name in row} == hand


def test_the_table_of_defaults():
    """The numbers themselves, since the test above takes them from the table."""
    names = ("epochs", "batch", "lr", "schedule", "weight_decay", "aug")
    assert {key: tuple(row[name] for name in names) for key, row in train_linear.DEFAULTS.items()} == {
        ("photos", "classification"): (10, 256, [0.1], "cosine", [5e-4], "sup"),
        ("photos", "contrastive"): (100, 256, [30.0], "step", [0.0], "sup"),
        ("cifar", "classification"): (30, 128, [0.1], "cosine", [0.0], "cifar"),
        ("cifar", "contrastive"): (30, 128, [0.1], "cosine", [0.0], "cifar"),
        ("digits", "classification"): (15, 64, [0.1], "cosine", [0.0], "affine"),
        ("digits", "contrastive"): (15, 64, [1.0], "cosine", [0.0], "affine")}
    assert [row["workers"] for row in train_linear.DEFAULTS.values()] == [data.workers_per_rank()] * 4 + [0] * 2


@pytest.mark.parametrize("terminal", [False, True])
def test_the_losses_are_printed_where_there_is_no_bar(linear, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    _, _, out = linear("--features", "cached", "--lr", 0.1, 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    losses = [line["loss"] for line in logged(out)[1:3]]
    expected = [f"epoch {i} of 2: loss {a:.3f} {b:.3f}" for i, (a, b) in enumerate(losses, 1)]
    assert lines == ([] if terminal else expected)


@pytest.mark.parametrize("flags, counts_of", [
    (("--protocol", "rep"), "train_lt.txt"), (("--list", "train_lt4.txt"), "train_lt.txt"),
    (("--list", "overlap_source/train_lt.txt"), "overlap_source/train_lt.txt")])
def test_groups_are_made_by_what_the_backbone_has_seen(script, digits, run, tmp_path, monkeypatch, flags, counts_of):
    """Except for a half of the classes, which the backbone's list numbers in another way."""
    monkeypatch.setattr(data, "encode_all", lambda encode, dataset, D, batch, workers, device:
                        torch.zeros(len(dataset), D, device=device))
    (tmp_path / "backbone.pt").symlink_to(run / "backbone.pt")
    settings = dict(arch="resnet8s", dataset="digits", data=str(digits), list="train_lt.txt", loss="kcl",
                    list_sha256=checkpoint.sha256(digits / "train_lt.txt"))
    (tmp_path / "log.jsonl").write_text(json.dumps({"settings": settings}) + "\n")
    script(train_linear, tmp_path / "backbone.pt", *flags, "--features", "cached", "--epochs", 1, "--lr", 1, "--out",
           tmp_path / "out")
    head = torch.load(tmp_path / "out/head.pt", weights_only=True)
    labels = [int(line.split()[1]) for line in (digits / counts_of).read_text().splitlines()]
    assert head["counts"] == np.bincount(labels).tolist() and head["counts_of"] == counts_of
    assert logged(tmp_path / "out")[0]["settings"]["backbone_list"] == "train_lt.txt"
    assert head["list_sha256"] == checkpoint.sha256(digits / counts_of) and head["backbone"] == "../backbone.pt"


# ---- refusing

@pytest.mark.parametrize("args, sentence", [
    (("--val", "none", "--weight-decay", 0, 1e-4), "several classifiers need a --val list that chooses one"),
    (("--val", "train_lt0.txt"), "are also in the training list"),
    (("--list", "overlap_source/train_lt.txt", "--val", "val.txt"), "label 2 is class 2 in val.txt, but 4 in the training list"),
    (("--lr", 1e38), "the classifier is not finite with lr 1e+38; try a smaller --lr")])
def test_bad_input_is_one_sentence(linear, args, sentence):
    with pytest.raises(SystemExit) as error:
        linear(*args)
    text = str(error.value)
    assert text.startswith("error: ") and sentence in text and "\n" not in text


@pytest.mark.parametrize("which", ["val", "list"])
def test_a_list_that_numbers_the_classes_otherwise(script, digits, run, tmp_path, which):
    """A list that chooses must agree with the training list, and one that trains with the backbone's. Otherwise no score
    and no group would be right."""
    for name in ("backbone.pt", "small.txt", "val.txt"):
        shutil.copy(run / name, tmp_path)
    settings = dict(arch="resnet8s", dataset="digits", data=str(digits), list=str(tmp_path / "small.txt"), loss="kcl",
                    list_sha256=checkpoint.sha256(tmp_path / "small.txt"))
    (tmp_path / "log.jsonl").write_text(json.dumps({"settings": settings}) + "\n")
    lines = [line.split() for line in (tmp_path / {"val": "val.txt", "list": "small.txt"}[which]).read_text().splitlines()]
    (tmp_path / "shift.txt").write_text("".join(f"./{path} {(int(c) + 1) % 10}\n" for path, c in lines))
    flags = ("--val", "none", "--lr", 1) if which == "list" else ()
    with pytest.raises(SystemExit) as error:
        script(train_linear, tmp_path / "backbone.pt", f"--{which}", tmp_path / "shift.txt", *flags, "--epochs", 1)
    assert re.fullmatch(r"error: label \d is class \d in \S+, but \d in the training list; number .*", str(error.value))
    assert not (tmp_path / "linear-lt").exists()


def test_a_head_is_no_backbone(script, run, digits):
    with pytest.raises(SystemExit, match="head.pt is a classifier; pass the backbone.pt that it was trained on"):
        script(train_linear, run / "head.pt", *command(run, digits)[1:])


def test_a_checkpoint_from_elsewhere_gives_the_classifier_its_name(script, run, digits, tmp_path):
    for file, name in ("moco.pth", "moco"), ("backbone.pt", tmp_path.name):
        shutil.copy(run / "backbone.pt", tmp_path / file)
        script(train_linear, tmp_path / file, *command(run, digits)[1:], "--lr", 1, "--out", tmp_path / f"of_{file}")
        assert torch.load(tmp_path / f"of_{file}/head.pt", weights_only=True)["name"] == name


def test_a_list_that_has_changed_since_the_training_is_noticed(tmp_path):
    (tmp_path / "l.txt").write_text("b 0\na 0\n")
    run = {"data": str(tmp_path), "list": "l.txt", "list_sha256": checkpoint.sha256(tmp_path / "l.txt")}
    checkpoint.same_list(run)
    checkpoint.same_list({**run, "data": "/nowhere"})  # a head.pt serves without its list
    (tmp_path / "l.txt").write_text("a 0\n")
    for changed in (run, {**run, "list": "val.txt", "counts_of": "l.txt"}):
        with pytest.raises(SystemExit, match="/l.txt has changed since the training"):
            checkpoint.same_list(changed)


def test_the_list_of_the_backbone_is_the_one_it_was_trained_on(script, digits, run, tmp_path):
    (tmp_path / "backbone.pt").symlink_to(run / "backbone.pt")
    with pytest.raises(SystemExit, match="no log.jsonl next to .*; pass --arch and --dataset and --data"):
        script(train_linear, tmp_path / "backbone.pt")
    seen = (digits / "train_lt.txt").read_text() + (digits / "val.txt").read_text()
    for text, sentence in (("", "train_lt.txt has changed since the training"), (seen, "are also in the training list")):
        (tmp_path / "lt.txt").write_text(seen)
        settings = dict(arch="resnet8s", dataset="digits", data=str(digits), loss="ce",
                        list=str(tmp_path / "lt.txt") if text else "train_lt.txt",
                        list_sha256=checkpoint.sha256(tmp_path / "lt.txt"))
        (tmp_path / "log.jsonl").write_text(json.dumps({"settings": settings}) + "\n")
        with pytest.raises(SystemExit, match=sentence):  # the second: of the backbone; the classifier's has none of val
            script(train_linear, tmp_path / "backbone.pt", "--list", run / "small.txt")


# ---- resuming

@pytest.mark.parametrize("world, how", [(1, ()), (1, ("--features", "cached", "--sampler", "progressive")), (2, ())])
def test_resumed_classifier_equals_the_undisturbed_one(script, ranks, run, digits, tmp_path, monkeypatch, capsys, world, how):
    """Killed after the second of three epochs."""
    args = (*command(run, digits), "--epochs", 3, "--lr", *LRS, *how, "--out")

    def train(out):
        return ranks(2, "train_linear", *args, out) if world == 2 else script(train_linear, *args, out)

    train(tmp_path / "straight")
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0)
    learning_rate = train_linear.learning_rate
    with monkeypatch.context() as m, pytest.raises((SystemExit, AssertionError), match="killed"):
        m.setattr(train_linear, "learning_rate", lambda *a: learning_rate(*a) if a[2] < 0.6 else sys.exit("killed"))
        train(tmp_path / "killed")
    assert torch.load(tmp_path / "killed/ckpt.pt", weights_only=True)["epoch"] == 2
    assert len(logged(tmp_path / "killed")) == 3 and not (tmp_path / "killed/head.pt").exists()
    printed = train(tmp_path / "killed") or capsys.readouterr().out
    assert "resuming after epoch 2 of 3" in printed

    heads = [torch.load(tmp_path / out / "head.pt", weights_only=True) for out in ("straight", "killed")]
    assert torch.equal(heads[0]["weight"], heads[1]["weight"]) and torch.equal(heads[0]["bias"], heads[1]["bias"])
    assert heads[0]["chosen"] == heads[1]["chosen"] and heads[0]["val_top1"] == heads[1]["val_top1"]
    logs = [[{**line, "images_per_s": 0} for line in logged(tmp_path / out)[1:]] for out in ("straight", "killed")]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    assert not (tmp_path / "killed/ckpt.pt").exists()


def test_a_finished_classifier_is_kept_and_other_settings_are_refused(linear, script, run, digits, tmp_path, capsys):
    _, _, out = linear("--features", "cached", "--lr", 1)
    before = (out / "head.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        linear("--features", "cached", "--lr", 1, "--out", out)
    assert stop.value.code == 0 and "is finished already; --restart trains it again" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds a run with other settings .lr: .1.0. there, .2.0. here.; use its settings, pass another --out"):
        linear("--features", "cached", "--lr", 2, "--out", out)
    with pytest.raises(SystemExit, match="other settings .backbone: "):  # of the same folder
        (tmp_path / "other.pt").symlink_to(run / "backbone.pt")
        script(train_linear, tmp_path / "other.pt", *command(run, digits)[1:], "--features", "cached", "--lr", 1, "--out", out)
    assert (out / "head.pt").read_bytes() == before


@pytest.mark.parametrize("changed, setting", [("backbone.pt", "backbone_sha256"), ("small.txt", "list_sha256")])
def test_backbone_and_list_are_known_by_what_they_hold(script, run, digits, tmp_path, changed, setting):
    for name in ("backbone.pt", "small.txt", "val.txt"):
        shutil.copy(run / name, tmp_path)
    args = (*command(tmp_path, digits), "--features", "cached", "--lr", 1, "--out", tmp_path / "out")
    script(train_linear, *args)
    if changed == "backbone.pt":
        torch.manual_seed(1)
        torch.save(resnet.ARCHS["resnet8s"]().state_dict(), tmp_path / changed)
    else:
        (tmp_path / changed).write_text("".join((tmp_path / changed).read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(SystemExit, match=f"other settings .{setting}: "):
        script(train_linear, *args)
