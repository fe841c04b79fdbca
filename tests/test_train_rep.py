"""Stage 1 against literal loops in float64, one rank against four, a killed run against an undisturbed one; ranks that
fail, or find different files."""
import ctypes
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import two_ranks
from PIL import Image

import baselines
import checkpoint
import data
import ddp
import evaluate
import kcl
import make_lt
import train_linear
import train_rep
from resnet import ARCHS, load_backbone, with_head

T, M, LR, DECAY, BATCH, K, DIM, EPOCHS, SEED = 0.2, 0.9, 0.05, 0.02, 8, 20, 16, 2, 3
SETTINGS = (f"--temperature {T} --m {M} --lr {LR} --weight-decay {DECAY} --batch {BATCH} --queue {K} --dim {DIM} "
            f"--epochs {EPOCHS} --seed {SEED} --arch resnet8s --schedule step --log-every 1 --dataset digits").split()
COUNTS = [9, 5, 4, 3, 3, 2, 2, 1, 1, 1]  # 31 images, three steps an epoch; some classes have fewer than k keys


@pytest.fixture(scope="session")
def small(digits, tmp_path_factory):
    """The folder of the digits and a training list of COUNTS."""
    paths, labels = data.read_list(digits, "train_full.txt")
    lines = [f"{path} {c}\n" for c, n in enumerate(COUNTS)
             for path in [p for p, label in zip(paths, labels.tolist()) if label == c][:n]]
    list_file = tmp_path_factory.mktemp("small") / "small.txt"
    list_file.write_text("".join(lines))
    return ["--data", digits, "--list", list_file]


@pytest.fixture
def float64(monkeypatch):
    """The scripts in float64: what is equal on paper is equal to 1e-9 then, on every CPU."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(data, "channels", data.channels.__wrapped__)  # what is cached is in float32
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batches(small, sampler, aug_views, epoch):
    """The uint8 views and labels of an epoch; what data.py gives is tested in test_data.py."""
    dataset = data.ImageList(small[1], small[3], data.DATASETS["digits"], "affine", aug_views)
    draws = data.Draws(dataset.labels, sampler, BATCH, EPOCHS, SEED)
    draws.set_epoch(epoch)
    return data.train_loader(dataset, draws, 0, torch.device("cpu"))


def pixels(view):
    return (view.double() / 255 - 0.179) / 0.279


class Sgd:
    """v <- 0.9 v + (g + decay w), w <- w - lr v."""

    def __init__(self, network):
        self.weights = list(network.parameters())
        self.v = [torch.zeros_like(w) for w in self.weights]

    def step(self, loss, lr):
        for w, v, g in zip(self.weights, self.v, torch.autograd.grad(loss, self.weights)):
            v.mul_(0.9).add_(g + DECAY * w.detach())
            w.data -= lr * v


def eq4(q, k, queue, positives, forbidden, divisor):
    """The loss of the paper, query by query: positives, forbidden: lists of slots of each query."""
    total = 0
    for i in range(len(q)):
        own = math.e ** (q[i] @ k[i] / T)
        others = [math.e ** (q[i] @ key / T) for key in queue]
        Z = own + sum(e for slot, e in enumerate(others) if slot not in forbidden[i])
        terms = [-torch.log(own / Z)] + [-torch.log(others[slot] / Z) for slot in positives[i]]
        total = total + sum(terms) / divisor(len(terms))
    return total / len(q)


VARIANTS = {  # --loss and flags -> k of the paper
    "cl": 0, "fcl": K, "kcl --num-positives 2": 2, "kcl": 6, "kcl --num-positives 2 --fixed-divisor": 2,
    "kcl --num-positives 2 --drop-unused": 2, "kcl --num-positives 2 --first-k": 2, "kcl --mlp": 6,
    "kcl --no-fill --num-positives 3": 3, "kcl --init": 6}


@pytest.mark.parametrize("variant", VARIANTS)
def test_contrastive_steps(variant, small, script, tmp_path, float64):
    """Algorithm 1, written down once more: six steps of two epochs."""
    flags, k_max = variant.split(), VARIANTS[variant]
    if "--init" in flags:
        torch.manual_seed(99)
        start = {name: x for name, x in ARCHS["resnet8s"](num_classes=10).state_dict().items() if name[:3] != "fc."}
        checkpoint.save(start, tmp_path / "start.pt")
        flags.append(tmp_path / "start.pt")
    script(train_rep, "--loss", *flags, *SETTINGS, *small, "--out", tmp_path / "run", "--aug", "affine")
    found = torch.load(tmp_path / "run/ckpt.pt", weights_only=True, map_location="cpu")["model"]
    device = "cuda" if torch.cuda.is_available() else "cpu"  # each draws other positives

    torch.manual_seed(SEED)
    encoder_q, encoder_k = (with_head(ARCHS["resnet8s"], DIM, "--mlp" in flags) for _ in range(2))
    encoder_k.load_state_dict(encoder_q.state_dict())
    queue, queue_labels, ptr = F.normalize(torch.randn(K, DIM)), torch.full((K,), -1), 0
    if "--init" in flags:
        encoder_q.load_state_dict(start, strict=False)
        encoder_k.load_state_dict(start, strict=False)

    def enqueue(keys, labels):
        nonlocal ptr
        for key, label in zip(keys, labels):
            queue[ptr], queue_labels[ptr], ptr = key, label, (ptr + 1) % K

    if "--no-fill" not in flags:
        before = {name: x.clone() for name, x in encoder_k.state_dict().items()}
        for (_, view), labels, _ in list(batches(small, "instance", 2, -1))[:-(-K // BATCH)]:
            enqueue(F.normalize(encoder_k(pixels(view))).detach(), labels)
        encoder_k.load_state_dict(before)
    sgd, losses = Sgd(encoder_q), []
    for epoch in range(EPOCHS):
        for i, ((view_q, view_k), labels, _) in enumerate(batches(small, "instance", 2, epoch)):
            for w_k, w_q in zip(encoder_k.parameters(), encoder_q.parameters()):
                w_k.data = M * w_k.data + (1 - M) * w_q.data
            keys = F.normalize(encoder_k(pixels(view_k))).detach()
            q = F.normalize(encoder_q(pixels(view_q)))
            torch.manual_seed((SEED * 1_000_003 + epoch * 3 + i + 1) * 1_009)  # the stream of the step
            same = [[j for j in range(K) if queue_labels[j] == label] for label in labels]
            if "--first-k" in flags or k_max in (0, K):
                positives = [slots[:k_max] for slots in same]
            else:
                mask = torch.tensor([[bool(label == y) for y in queue_labels] for label in labels], device=device)
                positives = [row.nonzero()[:, 0].tolist() for row in kcl.choose_positives(mask, k_max)]
            assert all(len(p) == min(k_max, len(s)) for p, s in zip(positives, same))
            unused = [set(s) - set(p) if "--drop-unused" in flags else () for s, p in zip(same, positives)]
            divisor = (lambda n: k_max + 1) if "--fixed-divisor" in flags else (lambda n: n)
            loss = eq4(q, keys, queue, positives, unused, divisor)
            sgd.step(loss, LR)
            enqueue(keys, labels)
            losses.append((loss.item(), math.sqrt(DIM) * q.detach().numpy().std(0).mean()))

    for name, x in {**{f"encoder_q.{n}": x for n, x in encoder_q.state_dict().items()}, "queue": queue,
                    **{f"encoder_k.{n}": x for n, x in encoder_k.state_dict().items()}}.items():
        assert torch.allclose(found[name].double(), x.double(), atol=1e-9, rtol=1e-9), name
    assert found["queue_labels"].tolist() == queue_labels.tolist()
    logged = [json.loads(line) for line in open(tmp_path / "run/log.jsonl").readlines()[1:]]
    assert np.allclose([(line["loss"], line["feature_std"]) for line in logged], losses, rtol=1e-9)
    backbone = torch.load(tmp_path / "run/backbone.pt", weights_only=True)
    assert all(torch.equal(x, found[f"encoder_q.{name}"]) for name, x in backbone.items())
    assert {n.split(".")[0] for n in backbone} == {"conv1", "bn1", "layer1", "layer2", "layer3"}


def in_words(loss, network, logits, labels, epoch):
    """The classification losses, built with their papers' settings from functions that test_baselines.py checks."""
    n = torch.tensor(COUNTS)
    deferred = baselines.effective_number_weights(n, 0.9999).double() if epoch >= 0.8 * EPOCHS else None
    if loss == "bbn":
        alpha = 1 - (epoch / EPOCHS) ** 2
        return alpha * F.cross_entropy(logits, labels[:BATCH]) + (1 - alpha) * F.cross_entropy(logits, labels[BATCH:])
    return {
        "ce": lambda: F.cross_entropy(logits, labels),
        "ce --drw": lambda: F.cross_entropy(logits, labels, weight=deferred),
        "ldam": lambda: baselines.ldam_loss(logits, labels, baselines.ldam_margins(n)),
        "ldam --drw": lambda: baselines.ldam_loss(logits, labels, baselines.ldam_margins(n), weight=deferred),
        "focal": lambda: baselines.focal_loss(logits, labels, 2),
        "cb-focal": lambda: baselines.focal_loss(logits, labels, 0.5, baselines.effective_number_weights(n, 0.999)),
    }[loss]()


@pytest.mark.parametrize("loss", ["ce", "ce --drw", "focal", "cb-focal", "ldam", "ldam --drw", "bbn",
                                  *(f"ce --sampler {s}" for s in ("class", "sqrt", "progressive"))])
def test_steps_on_logits(loss, small, script, tmp_path, float64, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "EPOCHS", 6 if "drw" in loss else EPOCHS)  # the last fifth: one epoch
    settings = " ".join(SETTINGS).replace("--epochs 2", f"--epochs {EPOCHS}").split()
    loss, _, sampler = loss.partition(" --sampler ")
    flags = ["--sampler", sampler] * bool(sampler)
    script(train_rep, "--loss", *loss.split(), *flags, *settings, *small, "--out", tmp_path / "run")
    backbone = torch.load(tmp_path / "run/backbone.pt", weights_only=True)
    head = torch.load(tmp_path / "run/head.pt", weights_only=True)

    torch.manual_seed(SEED)
    if loss == "bbn":
        network = baselines.BBN(ARCHS["resnet8s"], 10)
    else:
        network = ARCHS["resnet8s"](num_classes=10)
    if loss.startswith("ldam"):
        network.fc = baselines.NormedLinear(64, 10)
    if "focal" in loss:
        nn.init.constant_(network.fc.bias, -math.log(9))
    network.train()
    sgd = Sgd(network)
    for epoch in range(EPOCHS):
        lr = LR * 0.1 ** ((epoch >= 0.6 * EPOCHS) + (epoch >= 0.8 * EPOCHS))
        for (view,), labels, _ in batches(small, "bilateral" if loss == "bbn" else sampler or "instance", 1, epoch):
            network.alpha = 1 - (epoch / EPOCHS) ** 2
            sgd.step(in_words(loss, network, network(pixels(view)), labels, epoch), lr)

    encoder = network.encoder if loss == "bbn" else network
    for name, x in encoder.state_dict().items():
        if not name.startswith("fc."):
            assert torch.allclose(backbone[name].double(), x.double(), atol=1e-9, rtol=1e-9), name
    weight = network.fc.weight.detach()
    bias = torch.zeros(10) if loss.startswith("ldam") else network.fc.bias.detach()
    assert torch.allclose(head["weight"], F.normalize(weight) if loss.startswith("ldam") else weight, rtol=1e-9)
    assert torch.allclose(head["bias"], bias, rtol=1e-9)
    assert head["counts"] == COUNTS and head["name"] == "run" and head["seed"] == SEED and head["backbone"] == "backbone.pt"
    assert head["backbone_sha256"] == checkpoint.sha256(tmp_path / "run/backbone.pt")
    name = baselines.LOSSES[loss.split()[0]] + "-DRW" * ("--drw" in loss)
    assert head["protocol"] == f"joint {name}, {'bilateral' if loss == 'bbn' else sampler or 'instance'} sampling"


@pytest.mark.parametrize("loss, num_positives", [("supcon", None), ("kcl-batch", 6), ("kcl-batch --num-positives 1", 1)])
def test_steps_inside_the_batch(loss, num_positives, small, script, tmp_path, float64):
    script(train_rep, "--loss", *loss.split(), *SETTINGS, *small, "--out", tmp_path / "run")
    torch.manual_seed(SEED)
    network = with_head(ARCHS["resnet8s"], DIM)
    sgd = Sgd(network)
    for epoch in range(EPOCHS):
        for i, (views, labels, _) in enumerate(batches(small, "instance", 2, epoch)):
            z = F.normalize(network(pixels(torch.cat(views))))
            torch.manual_seed((SEED * 1_000_003 + epoch * 3 + i + 1) * 1_009)  # the stream of the step
            sgd.step(baselines.supcon_loss(z, labels.repeat(2), T, num_positives), LR)
    found = torch.load(tmp_path / "run/ckpt.pt", weights_only=True, map_location="cpu")["model"]
    assert all(torch.allclose(found[name].double(), x.double(), rtol=1e-9) for name, x in network.state_dict().items())


@pytest.mark.parametrize("loss", ["kcl", "ce"])
def test_ranks_and_parts_are_one_thing(loss, small, ranks, tmp_path, float64):
    """One global batch on 1 x 4, 2 x 2 and 4 x 1 ranks x parts: weights, momentum, queue and statistics to 1e-9."""
    found = []
    for world in (1, 2, 4):
        out = tmp_path / f"{world}"
        ranks(world, "train_rep", "--loss", loss, *SETTINGS, *small, "--virtual-gpus", 4, "--out", out)
        ckpt = torch.load(out / "ckpt.pt", weights_only=True)
        momentum = [x["momentum_buffer"] for x in ckpt["optimizer"]["state"].values()]
        found.append([x for x in (*ckpt["model"].values(), *momentum) if isinstance(x, torch.Tensor)])
        found[-1].append(torch.tensor([json.loads(line)["loss"] for line in open(out / "log.jsonl").readlines()[1:]]))
    for other in found[1:]:
        assert len(other) == len(found[0])
        assert all(torch.allclose(x.double(), y.double(), atol=1e-9, rtol=1e-9) for x, y in zip(found[0], other))


def without_times(log):
    lines = [json.loads(line) for line in open(log)][1:]
    return [{name: x for name, x in line.items() if name != "images_per_s"} for line in lines]


@pytest.mark.parametrize("world, loss", [(1, "kcl"), (2, "kcl"), (2, "kcl-batch"), (1, "bbn"), (1, "ce --sampler progressive")])
def test_a_stopped_run_goes_on_to_the_bit(world, loss, small, ranks, tmp_path, monkeypatch):
    """Stopped while it writes its second checkpoint; every tensor of the last one, and the log, are the same."""
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0)
    settings = ["--loss", *loss.split(), *SETTINGS, "--epochs", 5, *small]
    ranks(world, "train_rep", *settings, "--out", tmp_path / "straight")

    def stop(state, path, save=checkpoint.save):
        if path.name == "ckpt.pt" and state["epoch"] == 3:
            (path.parent / "log.jsonl").open("a").write('{"epoch": 3, "st')  # a line cut off
            raise KeyboardInterrupt
        save(state, path)

    with monkeypatch.context() as m, pytest.raises(AssertionError, match="KeyboardInterrupt"):
        m.setattr(checkpoint, "save", stop)
        ranks(world, "train_rep", *settings, "--out", tmp_path / "stopped")
    assert not (tmp_path / "stopped/backbone.pt").exists()
    said = ranks(world, "train_rep", *settings, "--out", tmp_path / "stopped")
    assert "resuming after epoch 2 of 5" in said

    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("straight", "stopped"))
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(x, b["model"][name]) for name, x in a["model"].items() if isinstance(x, torch.Tensor))
    assert a["model"].get("_extra_state", {}).get("ptr") == b["model"].get("_extra_state", {}).get("ptr")
    for i, state in a["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], b["optimizer"]["state"][i]["momentum_buffer"])
    assert without_times(tmp_path / "straight/log.jsonl") == without_times(tmp_path / "stopped/log.jsonl")


def test_finished_restart_and_other_settings(small, script, tmp_path, capsys):
    out = tmp_path / "run"
    settings = ["--loss", "ce", *SETTINGS, *small, "--out", out]
    script(train_rep, *settings)
    first = (out / "backbone.pt").stat().st_mtime_ns
    with pytest.raises(SystemExit) as ended:
        script(train_rep, *settings, "--log-every", 2)
    assert ended.value.code == 0 and (out / "backbone.pt").stat().st_mtime_ns == first
    assert "is finished already; --restart" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds a run with other settings .lr: 0.05 there, 0.1 here"):
        script(train_rep, *settings, "--lr", 0.1)
    for file in ("eval.json", "eval_tau_norm.json"):  # numbers of the old backbone
        (out / file).write_text("{}")
    script(train_rep, *settings, "--restart", "--lr", 0.1)
    assert (out / "backbone.pt").stat().st_mtime_ns > first and not list(out.glob("eval*.json"))
    assert json.loads(open(out / "log.jsonl").readline())["settings"]["lr"] == 0.1

    (out / "ckpt.pt").unlink()
    (out / "backbone.pt").unlink()
    capsys.readouterr()
    script(train_rep, *settings, "--lr", 0.1)
    assert "resuming" not in capsys.readouterr().out and (out / "backbone.pt").exists()

    # head.pt first, backbone.pt last: a run that ends between the two is not finished
    (out / "backbone.pt").unlink()
    (out / "head.pt").unlink()
    script(train_rep, *settings, "--lr", 0.1)
    assert (out / "head.pt").exists() and (out / "backbone.pt").exists()

    # a loss without a classifier leaves none behind, least of all another backbone's
    script(train_rep, *settings, "--restart", "--loss", "supcon")
    assert (out / "backbone.pt").exists() and not (out / "head.pt").exists()


# ---- which network starts from which file

def network_of(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train_rep.py", *map(str, (*SETTINGS, *flags))])
    return train_rep.network(train_rep.parse_args(), torch.tensor(COUNTS), 1)


@pytest.fixture
def start(tmp_path):
    """A file of weights that no constructor draws: {name: tensor}, and its path."""
    state = {name: x + 1 for name, x in ARCHS["resnet8s"]().state_dict().items() if name[:3] != "fc."}
    torch.save(state, tmp_path / "start.pt")
    return state, tmp_path / "start.pt"


def assert_starts_from(model, state, tensors):
    """Exactly `tensors` tensors of the model, all except those of heads and queue, equal the file's."""
    found = 0
    for name, x in model.state_dict().items():
        in_file = re.sub(r"^(encoder_q|encoder_k|encoder|backbone)\.|\b(conventional|rebalanced)\.", "", name)
        if in_file.split(".")[0] not in ("fc", "queue", "queue_labels", "_extra_state"):
            assert torch.equal(x, state[in_file]), name
            found += 1
    assert found == tensors


@pytest.mark.parametrize("loss", ["kcl", "kcl --mlp", "cl", "fcl", *baselines.LOSSES])
def test_init_reaches_every_network(loss, start, monkeypatch):
    """42 tensors, twice in a MoCo; a block of 12 twice in a BBN."""
    model = network_of(monkeypatch, "--loss", *loss.split(), "--init", start[1])
    assert_starts_from(model, start[0], 84 if hasattr(model, "encoder_q") else 54 if loss == "bbn" else 42)


class Nested(nn.Module):
    """A fork's network around an encoder."""

    def __init__(self, name, encoder):
        super().__init__()
        self.add_module(name, encoder)
        self.fc = encoder.fc


def test_the_network_of_a_fork_starts_from_the_file_or_ends_the_run(start, monkeypatch):
    def of_fork(build, *flags):
        monkeypatch.setattr(baselines, "network", lambda args, constructor, counts: build(constructor))
        return network_of(monkeypatch, "--loss", "ce", *flags)

    def other_stem(constructor):
        net = constructor(num_classes=10)
        net.conv1 = nn.Conv2d(3, 16, 3, 2, padding=1, bias=False)
        return net

    init = "--init", start[1]
    for name in ("encoder", "backbone"):
        assert_starts_from(of_fork(lambda constructor: Nested(name, constructor(num_classes=10)), *init), start[0], 42)
    for build in (lambda constructor: ARCHS["resnet8s"](), lambda constructor: Nested("encoder", ARCHS["resnet8s"]()), other_stem):
        of_fork(build)
        with pytest.raises(SystemExit, match="^error: conv1.weight of --loss ce differs from that of .*start.pt; .* must use the constructor it is given"):
            of_fork(build, *init)
    for flags in ((), init):  # stage 2 could not read it
        with pytest.raises(SystemExit, match="^error: the network of --loss ce has no conv1.weight, .*; its names begin with net"):
            of_fork(lambda constructor: Nested("net", constructor(num_classes=10)), *flags)


@pytest.mark.parametrize("loss", ["ce", "kcl", "supcon", "bbn"])
def test_nothing_starts_from_two_branches(loss, tmp_path, monkeypatch):
    torch.save(baselines.BBN(ARCHS["resnet8s"], 10).encoder.state_dict(), tmp_path / "bbn.pt")
    with pytest.raises(SystemExit, match="^error: layer3.0.conv.* differs from that of .*bbn.pt; --init cannot use the backbone of a BBN"):
        network_of(monkeypatch, "--loss", loss, "--init", tmp_path / "bbn.pt")


class Mine(nn.Module):
    """An architecture of your own, in other names than torchvision's; `last` should be fc."""

    def __init__(self, num_classes=10, last="fc"):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 4), nn.Conv2d(8, 8, 3, 4)
        self.add_module(last, nn.Linear(8, num_classes))

    def forward(self, x):
        *_, last = self.children()
        return last(self.head(self.stem(x).relu()).mean((2, 3)))


@pytest.mark.parametrize("loss", ["kcl", "ce"])
def test_an_architecture_of_your_own(loss, small, script, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHS, "mine", Mine)
    settings = ["--loss", loss, *SETTINGS, *small, "--arch", "mine"]
    script(train_rep, *settings, "--out", tmp_path / "run")
    state = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["model"]
    backbone = load_backbone(tmp_path / "run/backbone.pt", "mine")
    for name, x in backbone.state_dict().items():
        assert torch.equal(x, state["encoder_q." * (loss == "kcl") + name].cpu()), name
    assert len(backbone.state_dict()) == 4 and backbone(torch.ones(2, 3, 32, 32)).shape == (2, 8)

    monkeypatch.setitem(ARCHS, "mine", partial(Mine, last="out"))
    with pytest.raises(SystemExit, match="^error: mine must end in an nn.Linear called fc"):
        script(train_rep, *settings, "--out", tmp_path / "other")
    assert not (tmp_path / "other/log.jsonl").exists()
    for forward in (lambda self, x: self.head(self.stem(x).relu()).mean((2, 3)),                # skips fc
                    lambda self, x: F.normalize(Mine.forward(self, x))):                        # changes what fc returns
        monkeypatch.setitem(ARCHS, "mine", type("Other", (Mine,), {"forward": forward}))
        with pytest.raises(SystemExit, match=r"^error: forward of mine must return self.fc\(features\)"):
            script(train_rep, *settings, "--out", tmp_path / "other")


def test_amp_and_compile(small, script, tmp_path, monkeypatch):
    compiled, dtypes = [], set()
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))

    def forward(self, x, w, b):
        y = F.conv2d(x, w, b, self.stride, self.padding)
        dtypes.update({y.dtype} if self.training else ())  # check_fc's forward is none of training's
        return y
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", forward)
    script(train_rep, "--loss", "kcl", *SETTINGS, *small, "--out", tmp_path / "without")
    assert not compiled and dtypes == {torch.float32}
    dtypes.clear()
    script(train_rep, "--loss", "kcl", *SETTINGS, *small, "--amp", "--compile", "--out", tmp_path / "run")
    assert len(compiled) == 2 and dtypes == {torch.bfloat16}
    state = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["model"]
    assert {x.dtype for x in state.values() if isinstance(x, torch.Tensor) and x.is_floating_point()} == {torch.float32}
    assert not any("_orig_mod" in name for name in state)


def test_without_tensorboard(small, script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit, match="error: --tensorboard needs a package: pip install tensorboard"):
        script(train_rep, "--loss", "ce", *SETTINGS, *small, "--tensorboard", "--out", tmp_path / "run")


def test_tensorboard_holds_the_log(small, script, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    script(train_rep, "--loss", "kcl", *SETTINGS, *small, "--tensorboard", "--out", tmp_path / "run")
    accumulator = events.EventAccumulator(str(tmp_path / "run/tensorboard"))
    accumulator.Reload()
    lines = [json.loads(line) for line in open(tmp_path / "run/log.jsonl")][1:]
    for name in ("loss", "lr", "feature_std"):
        scalars = [(e.step, e.value) for e in accumulator.Scalars(name)]
        assert np.allclose(scalars, [(line["step"], line[name]) for line in lines], rtol=1e-6)


def test_defaults(monkeypatch, tmp_path):
    """BalFeat's settings for photographs, and who is asked about the data set."""
    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["train_rep.py", *map(str, flags)])
        return train_rep.parse_args()

    photos = ("--data", tmp_path, "--list", "ImageNet_LT_train.txt")
    kcl_args, ce, cl = (parse("--loss", loss, *photos) for loss in ("kcl", "ce", "cl"))
    assert (kcl_args.dataset, kcl_args.arch, kcl_args.batch, kcl_args.queue) == ("imagenet", "resnet50", 256, 65536)
    assert (kcl_args.lr, kcl_args.schedule, kcl_args.epochs, kcl_args.aug) == (0.1, "cosine", 200, "sup")
    assert (kcl_args.m, kcl_args.temperature, kcl_args.dim, kcl_args.num_positives) == (0.999, 0.07, 128, 6)
    assert (ce.lr, ce.schedule, ce.epochs, ce.aug) == (0.1, "cosine", 90, "sup")
    assert (cl.lr, cl.schedule, cl.epochs, cl.aug) == (0.03, "step", 200, "moco")
    assert kcl_args.weight_decay == ce.weight_decay == cl.weight_decay == 5e-4
    assert parse("--loss", "bbn", *photos).sampler == "bilateral" and ce.sampler == "instance"
    assert str(ce.out) == f"runs/{tmp_path.name}-ImageNet_LT_train-ce-seed0"
    assert (kcl_args.workers, parse("--loss", "ce").workers) == (data.workers_per_rank(), 0)
    (tmp_path / "splits.json").write_text('{"dataset": "cifar100"}')
    assert parse("--data", tmp_path).arch == "resnet32"
    assert parse("--loss", "ce", "--lr", 3, *photos[:2]).lr == 3
    assert train_rep.learning_rate(2, "cosine", 0.5) == pytest.approx(1)
    assert [train_rep.learning_rate(1, "step", t) for t in (0.59, 0.6, 0.8)] == pytest.approx([1, 0.1, 0.01])


@pytest.mark.parametrize("flags, images, splits, dataset", [
    ("", "", "cifar100", "cifar100"), ("--dataset imagenet", "32", "small", "imagenet"), ("", "", "", "imagenet"),
    ("--list own.txt", "32", "", "small"), ("--list own.txt", "300", "", "imagenet"), ("--list ../here/own.txt", "60", "", "small64"),
    ("--dataset folder", "28", "folder", "small"), ("--dataset folder", "300", "folder", "folder"), ("", "48", "folder", "small64"),
    ("--dataset folder --list own.txt", "28", "", "small"), ("--dataset digits", "32", "folder", "digits")])
def test_which_data_set_it_is(tmp_path, monkeypatch, flags, images, splits, dataset):
    """By a flag, by splits.json, or by the size of the images; never by what lies in the working directory."""
    root, here = tmp_path / "X", tmp_path / "here"
    root.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "splits.json").write_text('{"dataset": "cifar10"}') if "here" not in flags else None
    (here / "train_lt.txt").write_text("stray.png 0\n")
    if splits:
        (root / "splits.json").write_text(json.dumps({"dataset": splits}))
    if images:
        Image.new("RGB", (int(images), 20)).save(root / "a.png")
        for name in (root / "train_lt.txt", root / "own.txt") if "here" not in flags else (here / "own.txt",):
            name.write_text("a.png 0\n")
    monkeypatch.setattr(sys, "argv", ["train_rep.py", "--data", str(root), *flags.split()])
    args = train_rep.parse_args()
    assert args.dataset == dataset
    if dataset.startswith("small"):
        assert (args.arch, args.aug, args.batch, args.queue, args.virtual_gpus) == ("resnet32", "cifar", 128, 4096, 1)


def test_a_folder_of_small_images_keeps_its_size_in_every_stage(script, tmp_path, capsys):
    """Images of several sizes and kinds, one folder deeper too, from make_lt.py's lists to the table."""
    rng, root = np.random.RandomState(0), tmp_path / "X"
    for c, n in enumerate((16, 9)):
        (root / f"c{c}/deeper").mkdir(parents=True)
        for i in range(n):
            image = Image.fromarray(rng.randint(0, 256, (32 - i, 24 + c, 3), np.uint8)).convert("L" if i % 3 else "RGB")
            image.save(root / f"c{c}" / ("deeper" if i % 2 else ".") / f"{i}.{('png', 'gif', 'jpg')[i % 3]}")
    script(make_lt, "--dataset", "folder", "--data", root)
    flags = "--loss ce --arch resnet8 --epochs 1 --batch 4".split()
    script(train_rep, *flags, "--data", root, "--out", tmp_path / "run")
    script(train_linear, tmp_path / "run/backbone.pt", "--epochs", 1, "--batch", 4)
    capsys.readouterr()
    script(evaluate, tmp_path / "run/head.pt", tmp_path / "run/linear-lt/head.pt", "--workers", 0)
    assert "| run | " in capsys.readouterr().out
    for file in ("head.pt", "linear-lt/head.pt"):
        head = torch.load(tmp_path / "run" / file, weights_only=True)
        assert (head["dataset"], head["pixels"], head["resize"]) == ("small", 32, 32)
        assert head["class_names"] == {0: "c0", 1: "c1"}
        row = json.loads((tmp_path / "run" / file.replace("head.pt", "eval.json")).read_text())
        assert row["images"] == len((root / "test.txt").read_text().splitlines())


@pytest.mark.parametrize("first, sentence", [(1, "class 0 has no image in the training list (do the labels begin at 1?); number the classes"),
                                             (0, "class 3 has no image in the training list; number the classes from 0")])
def test_a_list_with_an_empty_class_ends_stage_1_at_once(small, script, tmp_path, first, sentence):
    """Stage 2 could not use the backbone of such a list."""
    labels = {c: c + first if first else c + (c >= 3) for c in range(10)}
    lines = [line.rsplit(" ", 1) for line in small[3].read_text().splitlines()]
    (tmp_path / "l.txt").write_text("".join(f"{path} {labels[int(c)]}\n" for path, c in lines))
    for loss in ("kcl", "ce"):
        with pytest.raises(SystemExit) as error:
            script(train_rep, *SETTINGS, *small[:2], "--list", tmp_path / "l.txt", "--loss", loss, "--out", tmp_path / "run")
        assert f"error: {sentence}" in str(error.value) and not (tmp_path / "run").exists()


def test_help_shows_the_table_of_defaults(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_rep.py", "-h"])
    with pytest.raises(SystemExit):
        train_rep.parse_args()
    shown = " ".join(capsys.readouterr().out.split())
    assert "65536" in shown
    for table in train_rep.DEFAULTS.values():
        assert str(table) in shown


@pytest.mark.parametrize("world, flags, virtual_gpus, suffix", [
    *((world, "", 8, "") for world in (1, 2, 4, 8)), (16, "", 16, "-16ranks"), (1, "--loss ce", 8, ""),
    (2, "--batch 128", 4, ""), (1, "--batch 80", 1, ""), (1, "--batch 100", 1, ""), (1, "--batch 16", 1, ""),
    (1, "--virtual-gpus 1", 1, "-1ranks"), (2, "--loss supcon", 2, "-2ranks"), (1, "--loss kcl-batch", 1, ""),
    (1, "--loss bbn", 1, ""), (1, "--dataset cifar10", 1, ""), (2, "--dataset digits", 2, "-2ranks")])
def test_photographs_train_as_on_eight_gpus_with_32_images_each(world, flags, virtual_gpus, suffix, monkeypatch):
    monkeypatch.setattr(train_rep.ddp, "world", lambda: world)
    monkeypatch.setattr(sys, "argv", ["train_rep.py", "--data", "x", "--dataset", "imagenet", *flags.split()])
    args = train_rep.parse_args()
    assert args.virtual_gpus == virtual_gpus
    assert str(args.out).endswith(f"-seed0{suffix}")


def test_the_settings_line_and_the_loss_reach_a_log_file(small, ranks, script, tmp_path, capsys):
    """Where there is no terminal tqdm is silent. On two ranks, one speaks."""
    script(train_rep, "--loss", "kcl", *SETTINGS, *small, "--virtual-gpus", 2, "--log-every", 3, "--out", tmp_path / "one")
    one = capsys.readouterr().out
    assert "virtual_gpus=2" in one and "BatchNorm sees 4 images" in one
    assert f"; on {'cuda' if torch.cuda.is_available() else 'cpu'}" in one
    for line in [json.loads(line) for line in open(tmp_path / "one/log.jsonl")][1:]:
        assert f"step {line['step']} of 6: loss {line['loss']:.3f}" in one
    two = ranks(2, "train_rep", "--loss", "kcl", *SETTINGS, *small, "--log-every", 3, "--out", tmp_path / "two")
    assert two.count("step 6 of 6: loss") == 1


def test_warmup(small, script, tmp_path):
    script(train_rep, "--loss", "ce", *SETTINGS, *small, "--schedule", "cosine", "--epochs", 4, "--warmup", 2, "--out", tmp_path / "run")
    rates = [json.loads(line)["lr"] for line in open(tmp_path / "run/log.jsonl").readlines()[1:]][::3]
    cosine = [LR * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert rates == pytest.approx([0.01, 0.01 + (cosine[1] - 0.01) / 2, *cosine[2:]])


def test_a_loss_of_your_own(small, script, tmp_path, monkeypatch):
    """The example in baselines.py's first lines, and a loss on queries, keys and queue, which may read KCL's flags."""
    text = baselines.__doc__
    name, = re.findall(r'"la": "(.*?)"', text)
    branch = textwrap.dedent(text[text.index("    if args.loss"):text.index("What `criterion`")])
    code = "def la(args, counts, device):\n" + textwrap.indent(branch, "    ")
    names, criterion = {"F": F}, baselines.criterion
    exec(code, names)

    def with_both(args, model, counts, epoch):
        if args.loss == "squares":
            return lambda q, k, queue, y, queue_y: args.num_positives * (q - k).square().sum(1).mean()
        return names["la"](args, counts, next(model.parameters()).device) or criterion(args, model, counts, epoch)

    monkeypatch.setattr(baselines, "LOSSES", {**baselines.LOSSES, "la": name, "squares": "Squares"})
    monkeypatch.setattr(baselines, "CLASSIFICATION", (*baselines.CLASSIFICATION, "la"))
    monkeypatch.setattr(baselines, "QUEUE", ("squares",))
    monkeypatch.setattr(baselines, "criterion", with_both)
    losses = {}
    for flags in ("la", "ce", "squares --num-positives 3 --virtual-gpus 2", "squares --virtual-gpus 2"):
        out = tmp_path / flags.replace(" ", "")
        script(train_rep, "--loss", *flags.split(), *SETTINGS, *small, "--out", out)
        losses[flags] = json.loads(open(out / "log.jsonl").readlines()[1])["loss"]
    head = torch.load(tmp_path / "la/head.pt", weights_only=True)
    assert head["protocol"] == "joint Logit adjustment, instance sampling" and losses["la"] != losses["ce"]
    with_3, with_6 = list(losses.values())[2:]
    assert with_6 == pytest.approx(2 * with_3, rel=1e-6)


MISTAKES = [
    ("--loss fcl --num-positives 3", "--num-positives has no effect with --loss fcl"),
    ("--loss supcon --num-positives 3", "--num-positives has no effect with --loss supcon"),
    ("--loss kcl-batch --drop-unused", "--drop-unused has no effect with --loss kcl-batch"),
    ("--loss ce --first-k", "--first-k has no effect with --loss ce"),
    ("--loss ldam --mlp", "--mlp has no effect with --loss ldam"),
    ("--loss focal --drw", "--drw has no effect with --loss focal"),
    *((f"--loss bbn --sampler {s}", "--sampler has no effect with --loss bbn") for s in ("instance", "class")),
    ("--loss ce --virtual-gpus 3", "--virtual-gpus 3 must be a multiple of the 1 ranks and divide --batch 8"),
    ("--loss supcon --virtual-gpus 2", "--loss supcon needs it whole"),
    ("--dataset imagenet", "--dataset imagenet needs --data"),
    ("--loss ce --list nowhere.txt --data {digits}", "nowhere.txt: no such list file"),
    ("--loss ce --list val.txt --data {digits}", "images of the validation list val.txt are also in the training list"),
    ("--loss ce --batch 400", "the training list has 31 images, fewer than --batch 400"),
]


@pytest.mark.parametrize("flags, sentence", MISTAKES)
def test_mistakes_end_in_one_sentence(flags, sentence, small, digits, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = [] if "--data" in flags or "imagenet" in flags else small
    with pytest.raises(SystemExit) as error:
        script(train_rep, *SETTINGS, *there, *flags.format(digits=digits).split())
    assert sentence in str(error.value) and str(error.value).startswith("error: ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("loss", ["ce", "kcl", "supcon", "ldam"])
def test_bilateral_batches_are_for_bbn_alone(loss, script, capsys):
    with pytest.raises(SystemExit):
        script(train_rep, "--loss", loss, "--sampler", "bilateral")
    assert "argument --sampler: invalid choice: 'bilateral'" in capsys.readouterr().err


def test_a_queue_of_many_times_the_list(small, script, tmp_path):
    """Filling it would take hours; a random one is not filled, and SupCon has none."""
    with pytest.raises(SystemExit, match="error: --queue 400 would hold each of the 31 images many times; use --queue 16"):
        script(train_rep, *SETTINGS, *small, "--queue", 400, "--out", tmp_path / "kcl")
    for flags in (("--loss", "kcl", "--no-fill"), ("--loss", "supcon")):
        script(train_rep, *flags, *SETTINGS, *small, "--queue", 400, "--out", tmp_path / flags[1])


def test_val_image_beside_a_list_elsewhere(small, script, tmp_path):
    """The lists need not lie in the data folder."""
    lines = small[3].read_text()
    (tmp_path / "train_lt.txt").write_text(lines)
    (tmp_path / "val.txt").write_text(lines.splitlines()[0] + "\n")
    with pytest.raises(SystemExit, match="error: 1 images of the validation list .*val.txt are also in the training list"):
        script(train_rep, *SETTINGS, *small[:2], "--list", tmp_path / "train_lt.txt", "--out", tmp_path / "run")


def test_a_stray_val_list_is_not_the_data_sets(small, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "val.txt").write_text(small[3].read_text())
    script(train_rep, *SETTINGS, *small, "--loss", "ce", "--epochs", 1, "--out", tmp_path / "run")


def test_a_loss_that_is_not_finite_ends_the_run(small, script, tmp_path):
    with pytest.raises(SystemExit, match="error: the loss is nan at step .; .*try a smaller --lr"):
        script(train_rep, "--loss", "ce", *SETTINGS, *small, "--lr", 1e30, "--out", tmp_path)
    assert not (tmp_path / "backbone.pt").exists()


def test_digits_are_composed_where_they_are_missing(script, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train_rep.subprocess.run

    def make_lt(command, **how):
        return shutil.copytree(digits, "data/digits") if "make_lt.py" in str(command[1]) else run(command, **how)

    monkeypatch.setattr(train_rep.subprocess, "run", make_lt)
    script(train_rep, "--loss", "ce", "--epochs", 1, "--batch", 300)
    assert (tmp_path / "runs/digits-lt-ce-seed0/backbone.pt").exists()


# ---- ranks that fail, and machines that differ

@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("end, printed", [
    (ValueError("the disk is full"), "ValueError: the disk is full"), (SystemExit("error: one sentence"), "error: one sentence"),
    (SystemExit(3), ""), (KeyboardInterrupt(), "KeyboardInterrupt")])
def test_a_rank_that_fails_says_so_and_ends_while_the_other_waits(ranks, monkeypatch, end, printed, blocked):
    """Even where leaving the group never ends, as NCCL's does while another rank waits."""
    def main():
        ddp.init()
        if ddp.rank() == 1:
            raise end
        dist.all_reduce(torch.zeros(1))

    monkeypatch.setattr(two_ranks, "main", main)
    if blocked:
        monkeypatch.setattr(dist, "destroy_process_group", lambda: time.sleep(600))
    with pytest.raises(AssertionError) as error:
        ranks(2, "two_ranks", seconds=15)
    assert printed in str(error.value) and "ranks hung" not in str(error.value)


@pytest.mark.parametrize("code", [0, None])
def test_ranks_that_have_nothing_to_do_leave_together(ranks, monkeypatch, code):
    monkeypatch.setattr(two_ranks, "main", lambda: (ddp.init(), sys.exit(code)))
    assert ranks(2, "two_ranks") == ""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: TEST_GPU=0,1")
@pytest.mark.parametrize("flag, printed", [("", "ok"), ("fail", "rank 1 has lost its data")])
def test_two_ranks_under_nccl(flag, printed):
    root = Path(__file__).parent.parent
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "tests/two_ranks.py", flag],
                          cwd=root, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, timeout=60)
    assert bool(done.returncode) == bool(flag) and printed in done.stdout + done.stderr and time.monotonic() - began < 45


@pytest.mark.parametrize("gpus, ranks_here", [(4, 8), (1, 2)])
def test_more_processes_than_gpus(monkeypatch, gpus, ranks_here):
    """They would train on the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_here))
    with pytest.raises(SystemExit, match=f"error: {ranks_here} processes for {gpus} GPUs; use --nproc_per_node={gpus}, or "):
        ddp.init()


@pytest.mark.skipif(torch.cuda.is_available(), reason="acts as a machine without a GPU")
@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_systems_without_glibc(monkeypatch, platform):
    """ctypes.CDLL(None) is a TypeError on Windows."""
    def cdll(name):
        raise TypeError

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", cdll)
    devices = []
    ddp.run(lambda: devices.append(ddp.init()))
    assert devices == [torch.device("cpu")]


LOG = json.dumps({"settings": {"lr": 1, "list_sha256": "a"}, "time": "9:00"}) + "\n"
MACHINES = [  # what lies in --out on two machines, the hash of their training list, --restart, and what is right
    (({"log.jsonl": LOG, "ckpt.pt": ""}, {}), "aa", False, "error: the ranks find different files in run, or different lists; every machine must see the same"),
    (({}, {"log.jsonl": LOG, "ckpt.pt": ""}), "aa", False, "every machine must see the same"),
    (({"log.jsonl": LOG}, {"log.jsonl": LOG.replace("9:00", "8:00")}), "aa", False, "every machine must see the same"),
    (({"log.jsonl": LOG, "end": ""}, {"log.jsonl": LOG, "ckpt.pt": ""}), "aa", False, "every machine must see the same"),
    (({"log.jsonl": LOG}, {"log.jsonl": LOG}), "ab", False, "every machine must see the same"),
    (({"log.jsonl": LOG, "ckpt.pt": ""}, {}), "aa", True, "anew"), (({}, {}), "aa", False, "anew"),
    (({"log.jsonl": LOG, "end": ""},) * 2, "aa", False, "is finished already; --restart trains it again"),
    (({"log.jsonl": LOG.replace("1", "2")},) * 2, "aa", False, "error: .* holds a run with other settings .lr: 2 there, 1 here"),
]


@pytest.mark.parametrize("files, lists, restart, printed", MACHINES)
def test_machines_that_find_different_files_do_not_wait_for_each_other(ranks, tmp_path, monkeypatch, files, lists, restart, printed):
    for machine, contents in enumerate(files):
        (tmp_path / f"{machine}/run").mkdir(parents=True)
        for name, text in contents.items():
            (tmp_path / f"{machine}/run" / name).write_text(text)

    def main():
        ddp.init()
        os.chdir(tmp_path / str(ddp.rank()))
        settings = {"lr": 1, "list_sha256": lists[ddp.rank()]}
        if checkpoint.resume(Path("run"), settings, "end", restart) is None:
            print("anew", flush=True)

    monkeypatch.setattr(two_ranks, "main", main)
    if "error" in printed or "every" in printed:
        with pytest.raises(AssertionError, match=printed):
            ranks(2, "two_ranks", seconds=15)
    else:
        assert re.search(printed, ranks(2, "two_ranks", seconds=15))
    assert not restart or os.listdir(tmp_path / "0/run") == []


def test_machines_that_encode_different_lists(ranks, monkeypatch, small):
    """Of the same length, so that no collective would notice."""
    def main():
        ddp.init()
        images = data.ImageList(small[1], small[3], data.DATASETS["digits"])
        images.paths = images.paths[::1 - 2 * ddp.rank()]
        data.encode_all(lambda x: x.float().mean((2, 3)), images, 3, 10, 0, torch.device("cpu"))

    monkeypatch.setattr(two_ranks, "main", main)
    with pytest.raises(AssertionError, match="error: .*small.txt differs on another rank; every machine needs the same list"):
        ranks(2, "two_ranks", seconds=15)


@pytest.mark.parametrize("restart", [False, True])
def test_two_runs_into_one_folder(small, script, tmp_path, monkeypatch, restart):
    """A second one takes over the log, or has just deleted it. The first one ends, and leaves all to the second."""
    out, save = tmp_path / "run", checkpoint.save
    settings = ["--loss", "ce", *SETTINGS, "--epochs", 3, *small]
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0)

    def save_then_take_over(state, path):
        save(state, path)
        header = json.loads(open(out / "log.jsonl").readline())
        checkpoint.resume(out, header["settings"], "backbone.pt", restart)
        if not restart:
            checkpoint.open_log(out, header, 3)

    with monkeypatch.context() as m, pytest.raises(SystemExit, match="error: another process has taken over .*run; give each run its own"):
        m.setattr(checkpoint, "save", save_then_take_over)
        script(train_rep, *settings, "--out", out)
    assert not (out / "backbone.pt").exists() and restart != (out / "ckpt.pt").exists()
    script(train_rep, *settings, "--out", out)
    script(train_rep, *settings, "--out", tmp_path / "straight")
    assert without_times(out / "log.jsonl") == without_times(tmp_path / "straight/log.jsonl")
    for x, y in zip(*(torch.load(folder / "backbone.pt").values() for folder in (out, tmp_path / "straight"))):
        assert torch.equal(x, y)
