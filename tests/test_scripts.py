"""The scripts end to end: every command of the README, one process against two, resuming, bad input."""
import glob
import importlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import baselines
import checkpoint
import data
import evaluate
import kcl
import resnet
import train_linear
import train_rep
import transfer_det
from ddp import InputError
from recipes import stand_ins

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def shell(command, cwd):
    done = subprocess.run(command, shell=True, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_every_command_of_the_readme(copy, script, monkeypatch):
    """The lines with torchrun as they stand; those with python in this process, which imports torch only once."""
    monkeypatch.chdir(copy)
    blocks = re.findall(r"```bash\n(.*?)```", (copy / "README.md").read_text(), re.S)
    commands = [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()
                if re.match(r"python [a-z_]+\.py|torchrun", line)]
    assert len(commands) >= 12 and {c.split(".py")[0].split()[-1] for c in commands} == {
        "bench", "make_lt", "train_rep", "train_linear", "evaluate", "transfer_det", "export"}
    stand_ins.imagenet(copy / "imagenet")
    stand_ins.inat18(copy / "inat2018")
    stand_ins.places365(copy / "places365")
    stand_ins.cifar(copy / "data/cifar100")
    for command in commands:
        command = command.replace("--long-tail imagenet-lt", "--long-tail exponential --imbalance 2 --holdout 1")
        command = command.replace("/path/to/inat2018", "inat2018").replace("/path/to/places365", "places365")
        tiny = {"train_rep": " --epochs 1 --queue 40", "train_linear": " --epochs 1 --lr 0.1 1",
                "bench": " --quick",
                "transfer_det": " --iterations 2 --batch 2 --train-scenes 4 --test-scenes 2 --precise-bn 1"}.get(
            command.split(".py")[0].split()[-1], "")
        if "/path/to/imagenet" in command or "runs/imagenet" in command:
            command = command.replace("/path/to/imagenet", "imagenet").replace("=8", "=2")
            tiny += {"train_rep": " --arch resnet18 --batch 4 --workers 1", "train_linear": " --batch 4 --workers 1"}.get(
                command.split(".py")[0].split()[-1], "")
        program, *args = shlex.split(command + tiny)
        if program == "python":
            args = [file for arg in args for file in (sorted(glob.glob(arg)) if "*" in arg else [arg])]
            script(importlib.import_module(args[0].removesuffix(".py")), *args[1:])
        else:
            shell(command + tiny, copy)
    scored = json.loads((copy / "runs/digits-lt-kcl-seed0/linear-lt/eval.json").read_text())
    assert {"top1", "top5", "many", "medium", "few", "balancedness", "sigma", "std", "per_class", "protocol"} <= set(scored)
    assert scored["images"] == 1000 and scored["top1"] == pytest.approx(np.mean(scored["per_class"]))
    assert json.loads((copy / "runs/digits-lt-kcl-seed0/det-digits-fpn-seed0/results.json").read_text())["images"] == 2
    for picture in ("accuracy_by_class.png", "balancedness.png", "features.png"):
        with Image.open(copy / "runs" / picture) as image:
            assert image.size[0] > 500


def test_code_of_the_readme():
    """The ten lines are kcl.py's loss, to the last bit; the example to copy runs as it stands."""
    ten_lines, example, loop = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = {"torch": torch}
    exec(ten_lines, names)
    g = torch.Generator().manual_seed(0)
    q, k, queue = (torch.nn.functional.normalize(torch.randn(n, 16, generator=g)) for n in (8, 8, 60))
    labels, queue_labels = torch.randint(9, (8,), generator=g), torch.randint(9, (60,), generator=g)
    losses = []
    for loss in (names["kcl"], kcl.kcl_loss):
        torch.manual_seed(1)
        losses.append(loss(q, k, queue, labels, queue_labels))
    assert torch.equal(*losses) and losses[0] > 0

    names = {}
    exec(example, names)
    assert len(example.splitlines()) == 6 and names["x"].grad.norm() > 0

    seen = torch.arange(6)
    names |= {"encoder": resnet.ARCHS["resnet8"], "batches": [(*torch.randn(2, 3, 3, 32, 32), y) for y in (seen[:3], seen[3:])]}
    exec(loop, names)
    assert names["moco"].queue_labels[:7].tolist() == [*range(6), -1] and names["loss"].isfinite()


def test_file_map_of_the_readme():
    """Every file is there, with its lines to a tenth."""
    rows = re.findall(r"^\| \[[^]]*\]\(([^)]*)\)[^|]* \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert {file for file, _ in rows} >= {file.name for file in ROOT.glob("*.py")}
    for file, stated in rows:
        assert abs(len((ROOT / file).read_text().splitlines()) - int(stated)) <= max(2, int(stated) / 10), file


def test_the_main_job_in_one_line(copy):
    """recipes/digits.sh, one epoch a training; .venv stands in for the environment that it would make."""
    (copy / ".venv").symlink_to(sys.prefix)
    shutil.rmtree(copy / "data", ignore_errors=True)
    shutil.rmtree(copy / "runs", ignore_errors=True)
    out = shell("SMOKE=1 SEED=3 bash recipes/digits.sh", copy)
    rows = [line for line in out.splitlines() if line.startswith("| digits-lt-")]
    assert len(rows) == 6 and all("seed3" in row for row in rows)
    assert "bash recipes/digits.sh" in (copy / "README.md").read_text()


def test_two_ranks(ranks):
    assert "ok" in ranks(2, "two_ranks")


def test_two_processes_evaluate_as_one(script, ranks, digits, tmp_path, monkeypatch):
    """Stage 1 on two ranks; stages 2 and 3 on one and on two: the same classifier, the same evaluation."""
    monkeypatch.chdir(tmp_path)
    ranks(2, "train_rep", "--loss", "kcl", "--dataset", "digits", "--data", digits, "--epochs", 2, "--out", "run")
    script(train_linear, "run/backbone.pt", "--epochs", 2, "--lr", 0.03, 0.1, "--out", "one")
    ranks(2, "train_linear", "run/backbone.pt", "--epochs", 2, "--lr", 0.03, 0.1, "--out", "two")
    heads = [torch.load(tmp_path / out / "head.pt", weights_only=True) for out in ("one", "two")]
    assert torch.allclose(heads[0]["weight"], heads[1]["weight"], atol=1e-4)
    assert heads[0]["val_top1"] == heads[1]["val_top1"]
    losses = [[json.loads(line)["loss"] for line in open(f"{out}/log.jsonl").readlines()[1:-1]] for out in ("one", "two")]
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-4)  # of all ranks
    script(evaluate, "one/head.pt")
    results = [(tmp_path / "one/eval.json").read_text()]
    ranks(2, "evaluate", "one/head.pt")
    results.append((tmp_path / "one/eval.json").read_text())
    assert results[0] == results[1] and json.loads(results[0])["images"] == 1000


@pytest.mark.parametrize("loss", ["kcl", "ce"])
def test_ranks_and_micro_batches_are_one_thing(ranks, digits, tmp_path, monkeypatch, loss):
    """Four virtual GPUs as 1 rank x 4 parts, 2 x 2 and 4 x 1: the same losses, weights, gradients (in SGD's momentum), queue,
    BatchNorm statistics and place in the random streams, after 4 steps with the global batch of 16."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l.txt").write_text("".join((digits / "train_lt0.txt").read_text().splitlines(keepends=True)[::13]))
    saved, losses = [], []
    for world in (1, 2, 4):
        ranks(world, "train_rep", "--loss", loss, "--dataset", "digits", "--data", digits, "--list", "l.txt", "--batch", 16,
              "--queue", 50, "--epochs", 1, "--lr", 0.1, "--log-every", 1, "--virtual-gpus", 4, "--out", f"{world}")
        state = torch.load(f"{world}/ckpt.pt", weights_only=True)
        saved.append(state["model"] | {f"momentum {i}": x["momentum_buffer"] for i, x in state["optimizer"]["state"].items()})
        losses.append([json.loads(line)["loss"] for line in open(f"{world}/log.jsonl").readlines()[1:]])
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], abs=1e-5) and losses[2] == pytest.approx(losses[0], abs=1e-5)
    for name, x in saved[0].items():
        for other in saved[1:]:
            if name == "_extra_state":
                assert x["ptr"] == other[name]["ptr"] and torch.equal(x["shuffle"], other[name]["shuffle"])
            else:
                torch.testing.assert_close(x, other[name], atol=1e-5, rtol=1e-5, msg=name)
    assert any("running_mean" in name for name in saved[0])


def small_list(digits, folder):
    """Every eighth image of the balanced list of 860: 108 of all classes, in a file of its own."""
    (folder / "small.txt").write_text("".join((digits / "train_lt0.txt").read_text().splitlines(keepends=True)[::8]))
    return folder / "small.txt"


def tiny_rep(script, digits, out, *more):
    script(train_rep, "--dataset", "digits", "--data", digits, "--out", out, "--epochs", 2, "--queue", 100, *more)
    return torch.load(out / "backbone.pt", weights_only=True)


@pytest.mark.parametrize("loss", ["ce", "focal", "cb-focal", "ldam", "bbn", "cl", "kcl", "fcl", "supcon", "tsc"])
def test_run_folder(script, digits, tmp_path, loss, capsys):
    state = tiny_rep(script, digits, tmp_path / "run", "--loss", loss, "--log-every", 5)
    names = [n for n in resnet.ARCHS["resnet8"]().state_dict() if not n.startswith("fc.")]
    assert list(state) == names or loss == "bbn" and {n.replace("conventional.", "") for n in state if "rebalanced" not in n} == set(names)
    on_logits = loss in ("ce", "focal", "cb-focal", "ldam", "bbn")
    assert (tmp_path / "run/head.pt").exists() == on_logits
    first, *lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert first["command"].startswith("train_rep.py --dataset") and first["torch"] == torch.__version__
    assert first["settings"]["lr"] == (0.1 if loss == "cl" else 0.3) and first["settings"]["arch"] == "resnet8"
    assert "lr=0." in capsys.readouterr().out  # the effective settings are printed
    assert [line["step"] for line in lines] == [5, 10, 13, 18, 23, 26]  # 864 // 64 = 13 steps an epoch
    assert [line["lr"] for line in lines[::3]] == pytest.approx([first["settings"]["lr"] * x for x in (1, 0.5)])
    assert all(np.isfinite(line["loss"]) and line["images_per_s"] > 0 for line in lines)
    if on_logits:  # what head.pt holds is the classifier that was trained
        script(evaluate, tmp_path / "run/head.pt", "--pictures", tmp_path)
        head = torch.load(tmp_path / "run/head.pt", weights_only=True)
        assert head["weight"].shape == (10, 128 if loss == "bbn" else 64) and head["bias"].shape == (10,)
        assert json.loads((tmp_path / "run/eval.json").read_text())["protocol"] == f"joint {train_rep.SUPERVISED[loss]}, instance sampling"
        if loss == "ldam":
            assert torch.allclose(head["weight"].norm(dim=1), torch.ones(10)) and not head["bias"].any()
    elif loss != "supcon":
        assert lines[0]["queue_filled"] == 1 and lines[0]["positives_in_queue"] > 1


def test_defaults_are_the_papers(monkeypatch, tmp_path):
    """METHOD: Table 7 on ImageNet by loss, as the parser fills them in."""
    for loss, expected in (("ce", ("cosine", 0.1, 90, "sup")), ("cl", ("step", 0.03, 200, "moco")),
                           ("kcl", ("cosine", 0.1, 200, "sup")), ("fcl", ("cosine", 0.1, 200, "sup"))):
        monkeypatch.setattr(sys, "argv", ["train_rep.py", "--loss", loss, "--data", str(tmp_path)])
        a = train_rep.parse_args()
        assert (a.schedule, a.lr, a.epochs, a.aug) == expected
        assert (a.dataset, a.arch, a.batch, a.queue, a.m, a.weight_decay) == ("imagenet", "resnet50", 256, 65536, 0.999, 5e-4)
    # MoCo's: x0.1 at 120 and 160 of 200
    rates = [train_rep.learning_rate(0.03, "step", epoch / 200) for epoch in (0, 119, 120, 159, 160, 199)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])


def test_a_signal_to_one_of_two_ranks_and_on_with_one(script, ranks, digits, tmp_path, monkeypatch):
    """Both leave after the same step, with a checkpoint; one rank that plays both goes on to where it alone would have come."""
    args = ("--loss", "kcl", "--dataset", "digits", "--data", digits, "--list", small_list(digits, tmp_path), "--batch", 36,
            "--queue", 100, "--epochs", 2, "--log-every", 2, "--virtual-gpus", 2, "--out")
    script(train_rep, *args, tmp_path / "straight")
    step, steps = torch.optim.SGD.step, []

    def step_and_be_told(self, *_):
        steps.append(0)
        step(self)
        if os.environ.get("RANK") == "1" and len(steps) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as m, pytest.raises(AssertionError, match="SIGTERM: .*run is saved; the same command goes on"):
        m.setattr(torch.optim.SGD, "step", step_and_be_told)
        ranks(2, "train_rep", *args, tmp_path / "run")
    ckpt = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    assert (ckpt["epoch"], ckpt["step"], ckpt["settings"]["world"]) == (0, 2, 2)
    script(train_rep, *args, tmp_path / "run")
    straight, resumed = (torch.load(tmp_path / f"{out}/ckpt.pt", weights_only=True)["model"] for out in ("straight", "run"))
    for name, x in straight.items():
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, resumed[name], atol=1e-5, rtol=1e-5, msg=name)


def test_amp_and_compile_leave_float32_under_the_same_names(script, digits, tmp_path, monkeypatch):
    """bfloat16 and compiled encoders: a loss near the plain one, files as without."""
    compile = torch.nn.Module.compile
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: (compiled.append(self), compile(self, backend="eager")))
    first = {}
    for how in ("", "--amp", "--compile"):
        args = (how,) if how else ()
        state = tiny_rep(script, digits, tmp_path / f"run{how}", *args, "--list", small_list(digits, tmp_path), "--batch", 50)
        assert list(state) == [n for n in resnet.ARCHS["resnet8"]().state_dict() if not n.startswith("fc.")]
        assert all(x.dtype in (torch.float32, torch.int64) for x in state.values())
        first[how] = json.loads((tmp_path / f"run{how}/log.jsonl").read_text().splitlines()[1])["loss"]
        model = torch.load(tmp_path / f"run{how}/ckpt.pt", weights_only=True)["model"]
        assert model["queue"].dtype == torch.float32 and torch.allclose(model["queue"].norm(dim=1), torch.ones(100))
    assert len(compiled) == 2  # both encoders
    assert first["--compile"] == pytest.approx(first[""], abs=1e-4) and first["--amp"] == pytest.approx(first[""], abs=0.05)
    assert first["--amp"] != first[""]


def test_deferred_reweighting_changes_the_last_epochs_only(script, digits, tmp_path):
    """--drw: the same as without up to 80 % of the epochs, another loss after."""
    losses, few = [], ("--list", small_list(digits, tmp_path), "--batch", 50)
    for how in ((), ("--drw",)):
        tiny_rep(script, digits, tmp_path / f"run{len(how)}", "--loss", "ldam", *how, *few, "--epochs", 5, "--log-every", 1)
        losses.append([json.loads(line)["loss"] for line in (tmp_path / f"run{len(how)}/log.jsonl").read_text().splitlines()[1:]])
    assert losses[0][:8] == losses[1][:8] and losses[0][8] != losses[1][8]
    assert torch.load(tmp_path / "run1/head.pt", weights_only=True)["protocol"] == "joint LDAM-DRW, instance sampling"


def test_init_starts_from_a_backbone(script, digits, tmp_path):
    """SSP: with a learning rate of almost 0 the weights are those of the backbone that it starts from."""
    first = tiny_rep(script, digits, tmp_path / "cl", "--loss", "cl", "--epochs", 1)
    for loss in ("ce", "kcl"):
        ssp = tiny_rep(script, digits, tmp_path / loss, "--loss", loss, "--init", tmp_path / "cl/backbone.pt", "--lr", 1e-9, "--epochs", 1)
        assert all(torch.allclose(x, first[name], atol=1e-5) for name, x in ssp.items() if "running" not in name and "num_b" not in name)
    with pytest.raises(SystemExit, match="other settings .init: .*cl/backbone.pt there, None here"):
        tiny_rep(script, digits, tmp_path / "ce", "--loss", "ce", "--lr", 1e-9, "--epochs", 1)


def test_tsc_targets_only_after_the_warm_up(script, digits, tmp_path, monkeypatch):
    """Half the epochs are KCL's; then each class pulls to a target of its own, and a resumed run knows which."""
    calls = []

    def spy(*args, loss=baselines.tsc_loss):
        calls.append(args[5])
        return loss(*args)
    monkeypatch.setattr(baselines, "tsc_loss", spy)
    tiny_rep(script, digits, tmp_path / "run", "--loss", "tsc", "--epochs", 4)
    assert len(calls) == 2 * 13 and all(sorted(t.tolist()) == sorted(calls[0].tolist()) for t in calls)
    stored = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["model"]
    assert sorted(stored["targets.owned"].tolist()) == list(range(10))
    assert torch.equal(stored["targets.targets"][stored["targets.owned"]], calls[-1])


def test_keys_reach_the_queue_only_after_they_were_used(script, digits, tmp_path, monkeypatch):
    """At each step's loss the queue ends with the batch before and holds no key of this one."""
    steps, asked = [], []

    def spy(q, k, queue, labels, queue_labels, *rest):
        asked.append(rest[0])
        slots = {tuple(row) for row in queue.tolist()}
        steps.append((any(tuple(row) in slots for row in k.tolist()),
                      all(tuple(row) in slots for row in steps[-1][2].tolist()) if steps else True, k.clone()))
        return kcl.kcl_loss(q, k, queue, labels, queue_labels, *rest)
    monkeypatch.setattr(train_rep, "fast_kcl_loss", spy)
    tiny_rep(script, digits, tmp_path / "run", "--epochs", 1)
    assert len(steps) == 13 and not any(s[0] for s in steps) and all(s[1] for s in steps)
    for loss, num_positives in (("cl", 0), ("fcl", None), ("kcl", 6)):  # each loss asks for its k
        asked.clear()
        tiny_rep(script, digits, tmp_path / loss, "--epochs", 1, "--loss", loss)
        assert set(asked) == {num_positives}


@pytest.mark.parametrize("loss, sampler, workers", [
    ("kcl", "progressive", 1), ("tsc", "class", None), ("bbn", "instance", None), ("ce", "sqrt", 1), ("fcl", "class", None),
    ("cl", "instance", 0), ("supcon", "sqrt", None), ("ldam", "progressive", None), ("focal", "instance", None),
    ("cb-focal", "class", None)])
def test_resumed_run_equals_the_straight_one(script, digits, tmp_path, monkeypatch, loss, sampler, workers):
    """Asked to stop in the middle of an epoch, and again at the end of one: everything as if nobody had asked."""
    args = ("--loss", loss, "--sampler", sampler, "--epochs", 3, "--batch", 36, "--log-every", 2,  # 3 steps an epoch
            *(("--drw",) if loss == "ldam" else ()), *(() if workers is None else ("--workers", workers)),
            "--list", small_list(digits, tmp_path))
    tiny_rep(script, digits, tmp_path / "straight", *args)
    step, steps = torch.optim.SGD.step, []

    def step_and_be_told(self, *_):
        steps.append(0)
        step(self)
        if len(steps) in (4, 6):
            os.kill(os.getpid(), signal.SIGTERM if len(steps) == 4 else signal.SIGUSR1)
    with monkeypatch.context() as m:
        m.setattr(torch.optim.SGD, "step", step_and_be_told)
        for code, where in ((128 + signal.SIGTERM, (1, 1)), (128 + signal.SIGUSR1, (2, 0))):
            with pytest.raises(SystemExit) as stopped:
                tiny_rep(script, digits, tmp_path / "run", *args)
            ckpt = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
            assert stopped.value.code == code and (ckpt["epoch"], ckpt["step"]) == where
            assert not (tmp_path / "run/backbone.pt").exists()
            with open(tmp_path / "run/log.jsonl", "a") as log:  # what a killed run may have written after its checkpoint
                log.write(json.dumps({"epoch": 2, "step": 8, "loss": 0}) + '\n{"epoch": 2, "st')
        tiny_rep(script, digits, tmp_path / "run", *args)
    assert len(steps) == 9
    straight, resumed = ({name: torch.load(tmp_path / out / name, weights_only=True) for name in ("ckpt.pt", "backbone.pt")}
                         for out in ("straight", "run"))
    for name, x in straight["backbone.pt"].items():
        assert torch.equal(x, resumed["backbone.pt"][name])
    for name, x in straight["ckpt.pt"]["model"].items():  # weights, BatchNorm, queue and labels; pointer and shuffle
        if isinstance(x, dict):
            assert x["ptr"] == resumed["ckpt.pt"]["model"][name]["ptr"]
            x, resumed["ckpt.pt"]["model"][name] = x["shuffle"], resumed["ckpt.pt"]["model"][name]["shuffle"]
        assert torch.equal(x, resumed["ckpt.pt"]["model"][name])
    for i, x in straight["ckpt.pt"]["optimizer"]["state"].items():
        assert torch.equal(x["momentum_buffer"], resumed["ckpt.pt"]["optimizer"]["state"][i]["momentum_buffer"])
    logs = [[json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()[1:]] for out in ("straight", "run")]
    assert [line["step"] for line in logs[0]] == [2, 3, 5, 6, 8, 9]
    assert [(line["step"], line["loss"]) for line in logs[0]] == [(line["step"], line["loss"]) for line in logs[1]]


def test_a_broken_checkpoint_gives_way_to_the_one_before(script, digits, tmp_path, capsys):
    args = ("--loss", "ce", "--epochs", 3, "--batch", 36, "--save-every", 1, "--list", small_list(digits, tmp_path))
    straight, run = tiny_rep(script, digits, tmp_path / "run", *args), tmp_path / "run"
    (run / "backbone.pt").unlink()
    content = bytearray((run / "ckpt.pt").read_bytes())
    weight = torch.load(run / "ckpt.pt", weights_only=True)["model"]["layer3.0.conv2.weight"]
    content[content.index(weight.permute(0, 2, 3, 1).numpy().tobytes()[:64])] ^= 1  # one bit: torch.load does not notice
    (run / "ckpt.pt").write_bytes(content)
    resumed = tiny_rep(script, digits, run, *args)
    assert "warning: " + str(run / "ckpt.pt") in capsys.readouterr().out
    assert all(torch.equal(x, resumed[name]) for name, x in straight.items())
    for cut in (run / "ckpt.pt", run / "ckpt.prev.pt"):
        cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="does not load, nor one before it; --restart throws it away"):
        tiny_rep(script, digits, run, *args)


def test_other_settings_are_refused_and_can_be_overridden(script, digits, tmp_path):
    args = ("--loss", "kcl", "--epochs", 1, "--batch", 36, "--list", small_list(digits, tmp_path), "--out")
    tiny_rep(script, digits, *args[-1:0], tmp_path / "run", *args[:-1])
    with pytest.raises(SystemExit, match="other settings .temperature: 0.07 there, 0.2 here, lr: 0.3 there, 0.2 here.; name "
                                         "another --out, --restart to throw it away, or --override"):
        tiny_rep(script, digits, tmp_path / "run", *args[:-1], "--lr", 0.2, "--temperature", 0.2)
    tiny_rep(script, digits, tmp_path / "run", *args[:-1], "--lr", 0.2, "--epochs", 2, "--override")
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines[1:]] == pytest.approx([0.3, 0.1])  # 0.2 at the cosine's half
    with pytest.raises(SystemExit, match="holds another model .size mismatch for encoder_k"):
        tiny_rep(script, digits, tmp_path / "run", *args[:-1], "--epochs", 3, "--dim", 32, "--override")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """A limit on the size of files is as good as a full disk to whoever writes."""
    checkpoint.save({"x": torch.zeros(10)}, tmp_path / "ckpt.pt")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        with pytest.raises(InputError, match="ckpt.pt could not be written .*; the one before is intact"):
            checkpoint.save({"x": torch.zeros(100_000)}, tmp_path / "ckpt.pt", before=tmp_path / "ckpt.prev.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["x"].shape == (10,) and len(list(tmp_path.iterdir())) == 1


def test_each_head_trains_as_it_would_alone(script, digits, tmp_path):
    tiny_rep(script, digits, tmp_path / "run")
    grid = [0.1, 1.0, 10.0]
    script(train_linear, tmp_path / "run/backbone.pt", "--epochs", 2, "--lr", *grid, "--out", tmp_path / "all")
    chosen = torch.load(tmp_path / "all/head.pt", weights_only=True)
    last = json.loads((tmp_path / "all/log.jsonl").read_text().splitlines()[-1])
    for lr in grid:
        script(train_linear, tmp_path / "run/backbone.pt", "--epochs", 2, "--lr", lr, "--out", tmp_path / f"lr{lr}")
        alone = torch.load(tmp_path / f"lr{lr}/head.pt", weights_only=True)
        script(evaluate, tmp_path / f"lr{lr}/head.pt", "--list", "val.txt", "--pictures", tmp_path)
        on_val = json.loads((tmp_path / f"lr{lr}/eval.json").read_text())["top1"]
        assert on_val <= last["val_top1"] + 1e-6  # what was chosen is the best of the grid on val
        if lr == last["lr"]:
            assert torch.allclose(alone["weight"], chosen["weight"], atol=1e-5)
            assert on_val == pytest.approx(chosen["val_top1"])
    assert chosen["chosen"] == f"lr {last['lr']:g}, weight decay 0 chosen on val.txt" and "class sampling" in chosen["protocol"]
    assert {"mean", "std", "pixels", "resize"} <= set(chosen)


def test_a_moved_backbone_is_noticed(script, digits, tmp_path, monkeypatch):
    tiny_rep(script, digits, tmp_path / "run")
    load = train_linear.load_backbone

    def leaky(*args):  # a backbone whose BatchNorm goes on counting
        encoder = load(*args)
        encoder.eval = lambda: encoder
        return encoder
    monkeypatch.setattr(train_linear, "load_backbone", leaky)
    with pytest.raises(RuntimeError, match="frozen backbone changed: bn1"):
        script(train_linear, tmp_path / "run/backbone.pt", "--epochs", 1, "--lr", 1)


def test_a_head_of_another_backbone_is_refused(script, digits, tmp_path):
    tiny_rep(script, digits, tmp_path / "run")
    script(train_linear, tmp_path / "run/backbone.pt", "--epochs", 1, "--lr", 1)
    with pytest.raises(SystemExit, match="--tau-norm needs a joint CE head"):
        script(evaluate, tmp_path / "run/linear-lt/head.pt", "--tau-norm")
    tiny_rep(script, digits, tmp_path / "run", "--seed", 1, "--restart")
    with pytest.raises(SystemExit, match="was trained on another .*backbone.pt than is there now"):
        script(evaluate, tmp_path / "run/linear-lt/head.pt")


def test_a_data_folder_made_anew_is_noticed(script, digits, tmp_path):
    """The same names, other lists: no stage goes on with what was trained on the old ones."""
    root = tmp_path / "digits"
    shutil.copytree(digits, root)
    tiny_rep(script, root, tmp_path / "run", "--loss", "ce")
    tiny_rep(script, root, tmp_path / "run", "--loss", "ce")  # finished already: nothing to do
    script(evaluate, tmp_path / "run/head.pt", "--pictures", tmp_path)
    lines = (root / "train_lt.txt").read_text().splitlines(keepends=True)
    (root / "train_lt.txt").write_text("".join(lines[1:]))
    with pytest.raises(SystemExit, match="other settings .list_sha256"):
        tiny_rep(script, root, tmp_path / "run", "--loss", "ce")
    with pytest.raises(SystemExit, match="is not the list that .*backbone.pt was trained on"):
        script(train_linear, tmp_path / "run/backbone.pt")
    with pytest.raises(SystemExit, match="is not the list that .*head.pt was made with"):
        script(evaluate, tmp_path / "run/head.pt")


def test_class_sizes_come_from_the_backbones_list_of_the_same_set(script, digits, tmp_path):
    tiny_rep(script, digits, tmp_path / "run")
    shutil.copytree(digits, tmp_path / "other")
    for root, counts_of in ((digits, "train_lt.txt"), (tmp_path / "other", "train_full.txt")):
        script(train_linear, tmp_path / "run/backbone.pt", "--protocol", "rep", "--data", root, "--epochs", 1, "--lr", 1)
        assert torch.load(tmp_path / "run/linear-rep/head.pt", weights_only=True)["counts_of"] == counts_of


def test_tau_norm_is_chosen_on_val(script, digits, tmp_path, capsys):
    tiny_rep(script, digits, tmp_path / "run", "--loss", "ce", "--epochs", 3)
    script(evaluate, tmp_path / "run/head.pt", "--tau-norm", "--pictures", tmp_path)
    plain, tau = (json.loads((tmp_path / "run" / f).read_text()) for f in ("eval.json", "eval_tau_norm.json"))
    assert tau["protocol"].startswith("tau-norm of joint CE") and tau["chosen"].endswith("chosen on val.txt")
    assert tau["few"] is not None and tau["images"] == plain["images"] == 1000
    chosen = float(tau["chosen"].split()[1])  # by hand: the best tau on val, from the files alone
    head = torch.load(tmp_path / "run/head.pt", weights_only=True)
    backbone = resnet.load_backbone(tmp_path / "run/backbone.pt", "resnet8").eval()
    images = torch.stack([torch.from_numpy(np.asarray(Image.open(digits / line.split()[0]).convert("RGB")).copy())
                          for line in (digits / "val.txt").read_text().splitlines()]).permute(0, 3, 1, 2)
    y = torch.arange(10).repeat_interleave(50)
    with torch.no_grad():
        f = backbone((images / 255 - torch.tensor(head["mean"]).view(3, 1, 1)) / torch.tensor(head["std"]).view(3, 1, 1))
    def accuracy(t):
        return ((f @ (head["weight"] / head["weight"].norm(dim=1, keepdim=True) ** t).T).argmax(1) == y).float().mean()
    assert accuracy(chosen) >= max(accuracy(t / 10) for t in range(21)) - 0.003


# ---- bad input: one clear sentence and a non-zero exit, before any long work

def sentence(error):
    text = str(error.value.code)
    assert text.startswith("error: ") and "\n" not in text
    return text


def edited(digits, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_missing_folder_list_and_head(script, digits, tmp_path):
    for args, expected in (((train_rep, "--dataset", "digits", "--data", "nowhere", "--list", "l.txt"), "nowhere"),
                           ((train_rep, "--data", tmp_path / "none"), "none: no such folder"),
                           ((train_rep, "--dataset", "imagenet"), "needs --data"),
                           ((train_rep, "--epochs", 0), "--epochs 0 must be above 0"),
                           ((train_rep, "--loss", "cl", "--num-positives", 3), "goes with --loss kcl"),
                           ((train_rep, "--loss", "fcl", "--fixed-divisor"), "go with --loss kcl"),
                           ((train_rep, "--loss", "cl", "--drop-unused"), "go with --loss kcl"),
                           ((train_rep, "--workers", -1), "--workers and --weight-decay"),
                           ((train_rep, "--dataset", "digits", "--data", digits, "--list", "l.txt"), "l.txt: no such list"),
                           ((train_linear, tmp_path / "backbone.pt"), "backbone.pt: no such file"),
                           ((train_linear, tmp_path), "no such file; expected a backbone.pt"),
                           ((train_linear, digits / "val.txt"), "say --arch"),
                           ((train_linear, tmp_path / "backbone.pt", "--arch", "resnet8", "--dataset", "digits", "--data",
                             digits), "backbone.pt: no such file"),
                           ((evaluate, tmp_path / "head.pt"), "head.pt: no such file; expected a head.pt"),
                           ((evaluate, tmp_path), "expected a head.pt of train_linear.py")):
        with pytest.raises(SystemExit) as error:
            script(*args)
        assert expected in sentence(error)


@pytest.mark.parametrize("workers", [0, 1])
def test_image_that_does_not_decode(script, digits, tmp_path, workers):
    (tmp_path / "train").mkdir()
    for i in range(8):
        shutil.copy(digits / f"train/0/00{i}.png", tmp_path / f"train/{i}.png")
    (tmp_path / "train/5.png").write_bytes((tmp_path / "train/5.png").read_bytes()[:200])
    edited(digits, tmp_path, "l.txt", "".join(f"train/{i}.png 0\n" for i in range(8)))
    with pytest.raises(SystemExit) as error:
        script(train_rep, "--dataset", "digits", "--data", tmp_path, "--list", "l.txt", "--val", "none", "--batch", 4,
               "--workers", workers, "--out", tmp_path / "run")
    assert "train/5.png (line 6 of l.txt) is missing or does not decode" in sentence(error)


def test_val_image_in_the_training_list(script, digits, tmp_path):
    mixed = edited(digits, tmp_path, "mixed.txt", (digits / "train_lt.txt").read_text() + "val/3/001.png 3\n")
    with pytest.raises(SystemExit) as error:
        script(train_rep, "--dataset", "digits", "--data", digits, "--list", mixed, "--out", tmp_path / "run")
    assert "1 images of the validation list val.txt" in sentence(error) and "val/3/001.png" in sentence(error)
    tiny_rep(script, digits, tmp_path / "run", "--loss", "ce")
    with pytest.raises(SystemExit) as error:
        script(train_linear, tmp_path / "run/backbone.pt", "--list", mixed)
    assert "val/3/001.png" in sentence(error)


def test_empty_class_wrong_labels_and_other_architecture(script, digits, tmp_path):
    tiny_rep(script, digits, tmp_path / "run", "--loss", "ce")
    head, backbone = tmp_path / "run/head.pt", tmp_path / "run/backbone.pt"
    full = (digits / "train_full.txt").read_text()
    without_4 = edited(digits, tmp_path, "without_4.txt", re.sub(r".* 4\n", "", full))
    only_0_to_8 = edited(digits, tmp_path, "only_0_to_8.txt", re.sub(r".* 9\n", "", full))
    test_11 = edited(digits, tmp_path, "test_11.txt", (digits / "test.txt").read_text() + "test/0/000.png 10\n")
    test_without_4 = edited(digits, tmp_path, "test_without_4.txt", re.sub(r".* 4\n", "", (digits / "test.txt").read_text()))
    foreign = tmp_path / "foreign.pt"
    torch.save([1, 2], foreign)
    for args, expected in (
            ((train_linear, backbone, "--list", without_4), "class 4 has no image in the training list"),
            ((train_linear, backbone, "--list", only_0_to_8), "val.txt: label 9 of val/9/000.png is outside the 9 classes"),
            ((evaluate, head, "--list", test_11), "label 10 of test/0/000.png is outside the 10 classes (0 to 9)"),
            ((evaluate, head, "--list", test_without_4), "class 4 has no image"),
            ((evaluate, head, "--groups", test_11), "name the training list of its classes"),
            ((evaluate, head, "--sigma", 0), "--sigma"),
            ((evaluate, head, "--tau-norm", "--val", "train_full.txt"), "in the training list train_lt.txt too"),
            ((train_linear, backbone, "--epochs", 0), "--epochs and --batch must be above 0"),
            ((train_linear, backbone, "--epochs", 1, "--lr", 1e38), "try a smaller --lr"),
            ((train_linear, backbone, "--arch", "resnet20"), "does not fit --arch resnet20: 60 of its 114 tensors missing"),
            ((train_linear, backbone, "--arch", "resnet50"), "does not fit --arch resnet50"),
            ((evaluate, foreign), "foreign.pt: holds a list; expected a head.pt"), ((evaluate, backbone), "not a head.pt"),
            ((train_linear, head, "--arch", "resnet8"), "head.pt: not a plain state_dict"),
            ((train_linear, backbone, "--val", "none", "--lr", 1, 2), "give one --lr"),
            ((train_linear, foreign, "--arch", "resnet8", "--dataset", "digits", "--data", digits), "foreign.pt: holds a list; expected a backbone.pt"),
            ((train_rep, "--dataset", "digits", "--data", digits, "--batch", 5000), "fewer than one batch")):
        with pytest.raises(SystemExit) as error:
            script(*args)
        assert expected in sentence(error)


def test_a_gradient_that_is_not_finite(script, digits, tmp_path, monkeypatch, capsys):
    """The run stops before the step is made, and names it; or leaves it out, queue and BatchNorm too."""
    args = ("--epochs", 1, "--batch", 36, "--list", small_list(digits, tmp_path))
    loss, calls = train_rep.fast_kcl_loss, []

    def broken_once(q, *rest):
        calls.append(0)
        return loss(q, *rest) * (float("nan") if len(calls) == 2 else 1)
    monkeypatch.setattr(train_rep, "fast_kcl_loss", broken_once)
    with pytest.raises(SystemExit) as error:
        tiny_rep(script, digits, tmp_path / "run", *args)
    named = re.search(r"step 2: the gradient is not finite with learning rate 0.3 on (train/\S+) and others", sentence(error))
    images = (tmp_path / "run/nonfinite-rank0.txt").read_text().splitlines()
    assert images[0] == named[1] and len(images) == len(set(images)) == 36 and not (tmp_path / "run/ckpt.pt").exists()

    calls.clear()
    tiny_rep(script, digits, tmp_path / "skip", *args, "--skip-nonfinite", 1)
    assert "left out, 1 of 1" in capsys.readouterr().out and len(calls) == 3
    ckpt = torch.load(tmp_path / "skip/ckpt.pt", weights_only=True)
    assert ckpt["left_out"] == 1 and all(x.isfinite().all() for x in ckpt["model"].values() if isinstance(x, torch.Tensor))
    assert ckpt["model"]["_extra_state"]["ptr"] == (36 * 3 + 36 * 2) % 100  # the queue was filled with 3 batches
    assert ckpt["model"]["encoder_q.bn1.num_batches_tracked"] == 2


def test_a_collapse_is_named(script, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_rep.F, "normalize", lambda x, normalize=train_rep.F.normalize: normalize(0 * x + 1))
    tiny_rep(script, digits, tmp_path / "run", "--epochs", 1, "--batch", 36, "--list", small_list(digits, tmp_path))
    assert capsys.readouterr().out.count("the representation has collapsed") == 1


def test_a_rank_that_hangs_is_named(ranks, monkeypatch):
    """Rank 1 never comes to the gather: rank 0 says where it waited."""
    monkeypatch.setenv("KCL_TIMEOUT", "2")
    with pytest.raises(AssertionError, match=r"error: rank 0 of 2 waited for another rank in hang.py, line \d+ "
                                             r".`ddp.gather.*. longer than KCL_TIMEOUT seconds"):
        ranks(2, "hang")


def test_the_shell_sees_one_sentence_and_a_failure(tmp_path):
    for command, expected in ((f"{sys.executable} {ROOT}/train_rep.py --data nowhere", "nowhere: no such folder"),
                              (f"{sys.executable} {ROOT}/make_lt.py --imbalance 1000", "between 1 and 350")):
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=ENV, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert expected in done.stderr


def test_tensorboard_holds_the_log(script, digits, tmp_path, monkeypatch):
    """Stopped in the middle, and begun without it: each number of each line once, also those from before; then stage 2,
    with a list a line."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    def scalars(out):
        (file,) = (out / "tensorboard").iterdir()
        events = [e for e in EventFileLoader(str(file)).Load() if e.summary.value]
        return [(e.step, v.tag, v.tensor.float_val[0]) for e in events for v in e.summary.value]

    def logged(out):
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[1:]]
        return [(line["step"], tag, float(np.float32(v))) for line in lines if "step" in line for name, x in line.items()
                for tag, v in ([(f"{name}/{i}", v) for i, v in enumerate(x)] if isinstance(x, list) else [(name, x)])
                if name != "step"]

    args = ("--loss", "kcl", "--epochs", 3, "--batch", 36, "--log-every", 2, "--save-every", 1, "--list", small_list(digits, tmp_path))
    run, step, steps = tmp_path / "run", torch.optim.SGD.step, []

    def step_and_be_told(self, *_):
        steps.append(0)
        step(self)
        if len(steps) in (4, 6):
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as m:
        m.setattr(torch.optim.SGD, "step", step_and_be_told)
        for flag in ((), ("--tensorboard",)):
            with pytest.raises(SystemExit):
                tiny_rep(script, digits, run, *args, *flag)
            with open(run / "log.jsonl", "a") as log:  # a killed run's, after its checkpoint
                log.write(json.dumps({"epoch": 2, "step": 8, "loss": 0}) + "\n")
        tiny_rep(script, digits, run, *args, "--tensorboard")
    assert scalars(run) == logged(run)
    assert {s for s, *_ in scalars(run)} == {2, 3, 5, 6, 8, 9}
    assert {"epoch", "loss", "lr", "feature_std", "queue_share/0", "queue_share/2"} <= {tag for _, tag, _ in scalars(run)}
    script(train_linear, run / "backbone.pt", "--epochs", 2, "--lr", 0.1, 1, "--tensorboard")
    assert scalars(run / "linear-lt") == logged(run / "linear-lt")
    assert {"loss/0", "loss/1", "lr/1"} <= {tag for _, tag, _ in scalars(run / "linear-lt")}
    tiny_rep(script, digits, run, *args, "--restart")
    assert not list((run / "tensorboard").iterdir())


def test_without_tensorboard(script, digits, tmp_path, monkeypatch):
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(data, "ImageList", None)  # nothing has begun
    for module, *args in ((train_rep, "--dataset", "digits", "--data", digits), (train_linear, "x.pt"),
                          (transfer_det, "--dataset", "digits")):
        with pytest.raises(SystemExit, match="--tensorboard .*: pip install tensorboard"):
            script(module, *args, "--out", tmp_path / "run", "--tensorboard")
    assert not (tmp_path / "run").exists()
