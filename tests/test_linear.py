"""Stage 2: heads side by side against each alone and a literal loop, cached features, what val chooses."""
import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import data
import ddp
import resnet
import train_linear

LRS, DECAYS = (0.1, 30.0), (0.0, 0.05)


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A folder with an untrained backbone, a joint head, and a list of 108 images of all classes."""
    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    encoder = resnet.ARCHS["resnet8"]()
    torch.save({n: x for n, x in encoder.state_dict().items() if n[:3] != "fc."}, root / "backbone.pt")
    text = dict.fromkeys(("backbone", "backbone_sha256", "data", "list", "counts_of", "list_sha256", "name", "protocol"), "-")
    torch.save({**text, "weight": encoder.fc.weight.detach().clone(), "bias": encoder.fc.bias.detach().clone(),
                "arch": "resnet8", "dataset": "digits", "counts": [86] * 10, "pixels": 32, "resize": 32,
                "mean": (0.179,) * 3, "std": (0.279,) * 3}, root / "head.pt")
    (root / "small.txt").write_text("".join((digits / "train_lt0.txt").read_text().splitlines(keepends=True)[::8]))
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
        script(train_linear, run / "backbone.pt", "--arch", "resnet8", "--dataset", "digits", "--data", digits, "--list",
               run / "small.txt", "--epochs", 2, "--batch", 50, "--out", out, *args)
        return torch.load(out / "head.pt", weights_only=True), made[-1], out
    return train


def literal_features(run, digits, lines):
    """(n, D) features and (n,) labels of a list's lines, from the files alone."""
    images = torch.stack([torch.from_numpy(np.array(Image.open(digits / line.split()[0]).convert("RGB"))) for line in lines])
    backbone = resnet.load_backbone(run / "backbone.pt", "resnet8").eval()
    with torch.no_grad():
        return (backbone((images.permute(0, 3, 1, 2) / 255 - 0.179) / 0.279),
                torch.tensor([int(line.split()[1]) for line in lines]))


@pytest.mark.parametrize("features, classifier", [("streamed", "linear"), ("cached", "linear"), ("cached", "lws")])
def test_each_pair_of_lr_and_weight_decay_trains_as_it_would_alone(linear, features, classifier):
    how = ("--features", features, "--classifier", classifier)
    chosen, together, out = linear("--lr", *LRS, "--weight-decay", *DECAYS, *how)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    pairs = [(lr, weight_decay) for lr in LRS for weight_decay in DECAYS]
    assert list(zip(log[1]["lr"], log[1]["weight_decay"])) == pairs and len(log[1]["loss"]) == len(pairs)
    for i, (lr, weight_decay) in enumerate(pairs):
        head, (alone,), _ = linear("--lr", lr, "--weight-decay", weight_decay, *how)
        assert head["chosen"] == f"lr {lr:g}, weight decay {weight_decay:g} given"
        assert torch.equal(alone.weight, together[i].weight) and torch.equal(alone.bias, together[i].bias)
        if (lr, weight_decay) == (log[-1]["lr"], log[-1]["weight_decay"]):
            assert torch.equal(chosen["weight"], alone.weight)
            assert chosen["chosen"] == f"lr {lr:g}, weight decay {weight_decay:g} chosen on val.txt"
    assert len({tuple(head.weight.flatten().tolist()) for head in together}) == len(pairs)


def test_cached_features_against_a_literal_loop(linear, run, digits):
    """Softmax regression with momentum by hand, in float64, on the features of the images as they are."""
    lr, weight_decay, lines = 0.3, 0.01, (run / "small.txt").read_text().splitlines()
    head, _, _ = linear("--features", "cached", "--lr", lr, "--weight-decay", weight_decay, "--seed", 5)
    x, y = literal_features(run, digits, lines)
    x, draws = x.double(), data.Draws(y, "class", 50, 2, seed=5)
    torch.manual_seed(5)
    W, b = (torch.randn(10, 64) * 0.01).double(), torch.zeros(10).double()
    vW, vb = torch.zeros_like(W), torch.zeros_like(b)
    for epoch in range(2):
        draws.set_epoch(epoch)
        index = [i for i, _ in draws]
        rate = lr * (1 + np.cos(np.pi * epoch / 2)) / 2
        for step in range(2):
            i = index[50 * step:50 * step + 50]
            error = ((x[i] @ W.T + b).softmax(1) - torch.eye(10)[y[i]]) / 50
            vW, vb = 0.9 * vW + error.T @ x[i] + weight_decay * W, 0.9 * vb + error.sum(0) + weight_decay * b
            W, b = W - rate * vW, b - rate * vb
    assert torch.allclose(head["weight"].double(), W, atol=1e-5) and torch.allclose(head["bias"].double(), b, atol=1e-5)
    assert head["protocol"] == f"lt, cached features: linear on {run / 'small.txt'}, class sampling, 2 epochs"


def test_val_chooses_among_all_pairs_and_the_table_names_both(linear, run, digits, capsys):
    head, heads, out = linear("--features", "cached", "--lr", *LRS, "--weight-decay", *DECAYS)
    x, y = literal_features(run, digits, (digits / "val.txt").read_text().splitlines())
    with torch.no_grad():
        top1 = [(h(x).argmax(1) == y).float().mean().item() for h in heads]
    assert head["val_top1"] == pytest.approx(max(top1), abs=0.0021)  # an image of 500 may be a tie
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("val top-1")]
    assert [line.split(":")[0] for line in printed] == ["val top-1, weight decay 0", "val top-1, weight decay 0.05"]
    cells = [[float(cell.split(": ")[-1]) for cell in line.split(", ")[1:]] for line in printed]     # (wd, lr)
    assert np.array(cells).T.flatten() == pytest.approx([100 * t for t in top1], abs=0.26)
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    best = int(np.argmax(np.array(cells).T))  # the first of equals: the smaller lr, then the smaller weight decay
    assert (last["lr"], last["weight_decay"]) == (LRS[best // 2], DECAYS[best % 2])


def test_an_end_of_the_grid_is_said(linear, capsys):
    assert [train_linear.end_of_grid(lr, (30, 0.01, 1)) for lr in (0.01, 1, 30)] == [
        "lr 0.01 is the smallest of the grid: a smaller one may do better; try --lr 0.001 0.003 0.01 too", None,
        "lr 30 is the largest of the grid: a larger one may do better; try --lr 30 100 300 too"]
    assert train_linear.end_of_grid(0.1, [0.1]) is None
    linear("--features", "cached", "--lr", 1e-8, 1e-9)  # neither learns, so both are equal: the smaller
    assert "lr 1e-09 is the smallest of the grid" in capsys.readouterr().out


def test_two_ranks_keep_the_same_features_and_draw_disjoint_halves(digits, monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda x: x)  # leaves the parts to be looked at
    dataset = data.ImageList(digits, "val.txt", data.center(32, 32))

    def encode(view):  # (b, 2): of each image alone
        return torch.stack([view.float().mean((1, 2, 3)) + 1, view[:, 0, 10, 16:20].float().sum(1)], dim=1)
    parts, batches = [], []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(ddp, "rank", lambda r=rank: r)
        monkeypatch.setattr(ddp, "world", lambda w=world: w)
        loader = train_linear.Cached(encode, dataset, data.Draws(dataset.labels, "class", 100, seed=2), 0, "cpu")
        parts.append(loader.features)
        loader.features = parts[0]                                        # the sum, as below
        batches.append(list(loader))
        assert len(loader) == len(batches[-1]) == 5
    one, first, second = parts
    assert torch.equal(one, first + second) and not (first[:, 0] * second[:, 0]).any() and (one[:, 0] > 0).all()
    for whole, *halves in zip(*batches):
        assert torch.equal(whole[2], torch.stack([half[2] for half in halves], dim=1).flatten())  # rank by rank in turn
        for (x,), y, i in (whole, *halves):
            assert torch.equal(x, one[i]) and torch.equal(y, dataset.labels[i])


def test_protocols_write_to_folders_of_their_own(script, digits, run):
    written = {}
    for features in ("streamed", "cached"):
        for classifier in ("linear", "lws"):
            script(train_linear, run / "backbone.pt", "--arch", "resnet8", "--dataset", "digits", "--data", digits, "--list",
                   run / "small.txt", "--epochs", 1, "--lr", 1, "--features", features, "--classifier", classifier)
            out = run / f"{classifier}-lt{'-cached' if features == 'cached' else ''}"
            written[out] = torch.load(out / "head.pt", weights_only=True)
            settings = json.loads((out / "log.jsonl").read_text().splitlines()[0])["settings"]
            assert settings["features"] == features and settings["aug"] == (None if features == "cached" else "affine")
    assert [("cached features" in head["protocol"]) for head in written.values()] == [False, False, True, True]
    joint = torch.load(run / "head.pt", weights_only=True)
    scale = written[run / "lws-lt-cached"]["weight"] / joint["weight"]
    assert torch.allclose(scale, scale[:, :1].expand(10, 64), rtol=1e-4) and (scale[:, 0] - 1).abs().max() > 1e-3


@pytest.mark.parametrize("args, expected", [
    (("--features", "cached", "--aug", "affine"), "not augmented; leave out one of it and --aug affine"),
    (("--weight-decay", 0, -1), "--weight-decay 0 or more"),
    (("--val", "none", "--lr", 1, "--weight-decay", 0, 1e-4), "give one --lr and one --weight-decay")])
def test_bad_input_is_one_sentence(linear, args, expected):
    with pytest.raises(SystemExit) as error:
        linear(*args)
    text = str(error.value.code)
    assert text.startswith("error: ") and expected in text and "\n" not in text


@pytest.mark.parametrize("how", [(), ("--features", "cached", "--sampler", "progressive")])
def test_resumed_classifier_equals_the_straight_one(linear, tmp_path, monkeypatch, how):
    """Asked to stop after three of four steps; no checkpoint is left of a classifier that is there."""
    straight, _, out = linear("--lr", *LRS, *how)
    step, steps = torch.optim.SGD.step, []

    def step_and_be_told(self, *_):
        steps.append(0)
        step(self)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(torch.optim.SGD, "step", step_and_be_told)
    run = tmp_path / "stopped"
    with pytest.raises(SystemExit) as stopped:
        linear("--lr", *LRS, *how, "--out", run)
    ckpt = torch.load(run / "ckpt.pt", weights_only=True)
    assert stopped.value.code == 128 + signal.SIGTERM and (ckpt["epoch"], ckpt["step"]) == (1, 1)
    with pytest.raises(SystemExit, match="other settings .seed: 0 there, 1 here.; name another --out, --restart"):
        linear("--lr", *LRS, *how, "--out", run, "--seed", 1)
    with pytest.raises(FileNotFoundError):  # linear() looks for its own folder, where nothing is
        linear("--lr", *LRS, *how, "--out", run)
    resumed = torch.load(run / "head.pt", weights_only=True)
    assert len(steps) == 4 and torch.equal(resumed["weight"], straight["weight"]) and resumed["chosen"] == straight["chosen"]
    assert torch.equal(resumed["bias"], straight["bias"]) and resumed["val_top1"] == straight["val_top1"]
    losses = [[json.loads(line).get("loss") for line in (x / "log.jsonl").read_text().splitlines()] for x in (out, run)]
    assert losses[0] == losses[1] and not (run / "ckpt.pt").exists()
