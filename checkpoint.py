"""
What a run leaves behind: its checkpoint, its log, whose first line holds command and settings, and its classifier.
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision

import ddp

SAVE_EVERY = 60  # seconds between two checkpoints at least: one of a ResNet-50 has 0.3 GB
FREE = {"out", "workers", "log_every", "tensorboard", "compile", "restart", "split", "world"}  # these change no weight


def save(state, path):
    """torch.save, all or nothing: a run that is killed while it writes leaves the old file."""
    with open(f"{path}.tmp", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def header(args, **more):
    """What a reader needs to repeat the run: the first line of log.jsonl. more: further settings."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, check=True,
                             capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        git = None  # no git, or a copy without its history
    settings = {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items()}
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "settings": {**settings, "world": ddp.world(), **more},
            "torch": torch.__version__, "torchvision": torchvision.__version__, "python": sys.version.split()[0],
            "git": git, "time": time.strftime("%Y-%m-%d %H:%M:%S")}


def resume(out, settings, finished, restart=False):
    """The checkpoint that a run with these settings left in `out`, on the CPU; None for a run that begins.

    finished: the file that a run writes last. Exits where it is there, or where `out` holds a run with other settings.
    restart: throw away what is there.
    """
    log = out / "log.jsonl"
    if restart:
        if ddp.rank() == 0:
            for name in (finished, "ckpt.pt", "log.jsonl"):
                (out / name).unlink(missing_ok=True)
        return None
    if not log.exists():
        return None
    with open(log, encoding="utf-8") as f:
        there = json.loads(f.readline())["settings"]
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    differ = [f"{name}: other content" if name.endswith("_sha256") else f"{name}: {there.get(name)} there, {x} here"
              for name, x in settings.items() if name not in FREE and there.get(name) != x]
    if differ:
        if there.get("world") != settings["world"]:
            differ.append(f"ranks: {there.get('world')} there, {settings['world']} here")
        sys.exit(f"error: {out} holds a run with other settings ({', '.join(differ)}); say these, name another --out, "
                 "or --restart to throw it away")
    if (out / finished).exists():
        ddp.print0(f"{out} is finished already; --restart trains it again")
        sys.exit(0)
    if not (out / "ckpt.pt").exists():
        ddp.print0(f"{out} has no checkpoint yet: the run begins anew")
        return None
    return torch.load(out / "ckpt.pt", map_location="cpu", weights_only=True)


def open_log(out, header, step=None, tensorboard=False):
    """log(line), which adds a dictionary to out/log.jsonl, and with tensorboard its numbers to out/tensorboard.

    step: the run goes on after it; the lines up to there are kept, later ones will be written again.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    if step is not None:
        whole = [line for line in open(out / "log.jsonl", encoding="utf-8") if line.endswith("}\n")]
        header, *lines = map(json.loads, whole)  # a kill may have cut the last
        lines = [line for line in lines if line["step"] <= step]
    (out / "log.tmp").write_text("".join(json.dumps(line) + "\n" for line in [header, *lines]), encoding="utf-8")
    os.replace(out / "log.tmp", out / "log.jsonl")

    file = open(out / "log.jsonl", "a", buffering=1, encoding="utf-8")
    writer = tensorboard_writer(out, (step or 0) + 1) if tensorboard else None

    def log(line):
        print(json.dumps(line), file=file)
        for name, x in line.items() if writer else ():
            for i, number in enumerate(x if isinstance(x, list) else [x]):
                tag = f"{name}/{i}" if isinstance(x, list) else name
                writer.add_scalar(tag, number, line["step"])
    return log


def tensorboard_writer(out, first_step):
    """Events of first_step and later, of an earlier call, are hidden. Exits where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        sys.exit("error: --tensorboard needs the package tensorboard: pip install tensorboard")
    return SummaryWriter(out / "tensorboard", purge_step=first_step, flush_secs=10)


def settings_of(backbone):
    """The settings of the run that wrote `backbone`, from the log.jsonl beside it; {} for a backbone from elsewhere.
    Exits where there is no such file, or a head.pt is named in its place."""
    if Path(backbone).name == "head.pt":
        sys.exit(f"error: {backbone} is a classifier; name the backbone.pt that it was trained on")
    if not Path(backbone).is_file():
        sys.exit(f"error: {backbone} is no file; name a backbone.pt of train_rep.py, or another program's checkpoint")
    log = Path(backbone).with_name("log.jsonl")
    if not log.exists():
        return {}
    with open(log, encoding="utf-8") as f:
        return json.loads(f.readline())["settings"]


def read_head(path):
    """A head.pt of train_rep.py or train_linear.py: a linear classifier, weight (C, D) and bias (C,), and of what."""
    head = torch.load(path, map_location="cpu", weights_only=True) if Path(path).exists() else {}
    if "weight" not in head:
        sys.exit(f"error: {path} is missing or no head.pt; train_linear.py makes one of a backbone.pt, in linear-lt/")
    return head
