"""What README.md shows: each command in small, torchrun with two processes too, its code, its file map."""
import glob
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from torchvision.io import write_png

import kcl
import moco
import resnet
from recipes import stand_ins

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
TINY = {
    "train_rep": "--epochs 1 --queue 30", "train_linear": "--epochs 1 --lr 0.1 1",
    "transfer_det": "--iterations 2 --batch 2 --train-scenes 4 --test-scenes 2 --precise-bn 1"}
TINY_PHOTOS = {"train_rep": "--arch resnet8s --batch 4 --workers 0", "train_linear": "--batch 4 --workers 0",
               "evaluate": "--workers 0"}


def shell(command, cwd):
    done = subprocess.run(command, shell=True, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def module(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def shown(program):
    """(name of the script, command in small) of each line of the README that begins with `program`."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
    for line in re.findall(rf"^{program} [^#\n]*", blocks, re.M):
        name = re.search(r"(\w+)\.py", line)[1]
        photos = TINY_PHOTOS.get(name, "") if "/path/to" in line or "imagenet" in line else ""
        yield name, f"{line.replace('/path/to/', '').replace('=8', '=2')} {TINY.get(name, '')} {photos}"


def test_every_python_line(copy, digits, script, monkeypatch):
    """In this process, which imports torch only once."""
    monkeypatch.chdir(copy)
    (copy / "data").mkdir(exist_ok=True)
    (copy / "data/digits").symlink_to(digits)
    names, commands = zip(*shown("python"))
    assert names == ("train_rep", "train_linear", "train_rep", "train_linear", "evaluate", "plots", "train_rep",
                     "transfer_det", "make_lt", "train_rep")
    for name, images in ("cat", 30), ("dog", 12), ("newt", 3):
        (copy / "photos" / name).mkdir(parents=True)
        for i in range(images):
            write_png(torch.randint(256, (3, 32, 32), dtype=torch.uint8), f"{copy}/photos/{name}/{i}.png")
    for command in commands:
        _, file, *args = shlex.split(command)
        args = [path for arg in args for path in (sorted(glob.glob(arg)) if "*" in arg else [arg])]
        script(module(copy / file), *args)
    scored = json.loads((copy / "runs/digits-lt-kcl-seed0/linear-lt/eval.json").read_text())
    assert scored["images"] % 1000 == 0 and 0 < scored["balancedness"] <= 1
    assert json.loads((copy / "runs/digits-lt-kcl-seed0/det-digits-fpn-seed0/results.json").read_text())["images"] == 2


def test_every_torchrun_line(copy, ranks, monkeypatch):
    """The first as it stands, with two processes; the others as two forks, which need not import torch again."""
    monkeypatch.chdir(copy)
    stand_ins.imagenet(copy / "imagenet")
    names, commands = zip(*shown("torchrun"))
    assert names == ("train_rep", "train_linear", "evaluate")
    shell(commands[0], copy)
    for name, command in zip(names[1:], commands[1:]):
        ranks(2, name, *shlex.split(command)[3:])
    assert 0 < json.loads((copy / "runs/imagenet-lt-kcl/linear-lt/eval.json").read_text())["balancedness"] <= 1


def test_code():
    """The twelve lines are kcl.py's loss, to the last bit; the example to copy runs as it stands."""
    twelve_lines, example = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {"torch": torch}
    exec(twelve_lines, names)
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
    assert names["x"].grad.norm() > 0


def test_loop_of_moco():
    """The loop in moco.py's first lines runs as it stands."""
    loop = textwrap.dedent("\n".join(line for line in moco.__doc__.splitlines() if line.startswith("    ")))
    loop = loop.replace("torchvision.models.resnet50", "encoder").replace("65536", "10")
    seen = torch.arange(6)
    views = [(*torch.randn(2, 3, 3, 32, 32), y) for y in (seen[:3], seen[3:])]
    names = {"encoder": resnet.ARCHS["resnet8s"], "batches": views, "MoCo": moco.MoCo, "torch": torch,
             "F": torch.nn.functional, "kcl_loss": kcl.kcl_loss}
    exec(loop, names)
    assert names["moco"].queue_labels[:7].tolist() == [*range(6), -1] and names["loss"].isfinite()


def test_two_commands():
    """The main job, and the tests, which CI runs by the line that stands here."""
    lines = "".join(re.findall(r"```bash\n(.*?)```", README, re.S)).splitlines()
    tests, = [line for line in lines if "-m pytest" in line]
    assert "bash recipes/digits.sh" in lines and tests.startswith("python3 -m venv .venv && ")
    for ci in ".ci/run", ".github/workflows/tests.yml":
        assert "grep -m 1 -- '-m pytest' README.md" in (ROOT / ci).read_text()


def test_style():
    """ruff has nothing to say."""
    subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], check=True)


def test_files():
    """Every file of the top level is in the map, and every link of the README leads somewhere."""
    links = re.findall(r"\]\(((?!http|#)[^)]+)\)", README)
    assert {file.name for file in ROOT.glob("*.py")} <= set(links)
    assert all((ROOT / link.partition("#")[0]).exists() for link in links)


def test_house():
    """No file imports what stands above it."""
    below = {"kcl": set(), "kcl_fast": {"kcl"}, "ddp": set(), "resnet": {"ddp"}, "moco": {"ddp"}, "augment": set(), "data": {"augment", "ddp"},
             "checkpoint": {"ddp"}, "baselines": {"kcl", "ddp", "resnet"}, "sources": {"ddp", "data"}}
    ours = {file.stem for file in ROOT.glob("*.py")}
    for name, allowed in below.items():
        imported = set(re.findall(r"^(?:import|from) (\w+)", (ROOT / f"{name}.py").read_text(), re.M)) & ours
        assert imported <= allowed, name
    for file in ROOT.glob("*.py"):                                        # what one reads in kcl.py is what trains
        assert not re.search(r"^ *(from|import) kcl_fast(?! import fast_kcl_loss as)", file.read_text(), re.M), file
