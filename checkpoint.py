"""
What a run leaves for later: its checkpoint, to go on from, its settings, which stand in the first line of its log, and
its classifier; and how it is asked to stop in between.
"""
import contextlib
import json
import math
import os
import signal
import sys
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist

import data
import ddp
from ddp import InputError
from reading import printable, read
from resnet import ARCHS

FILES = ("ckpt.pt", "ckpt.prev.pt")  # the checkpoint, and the one before


def save(state, path, before=None):
    """All or nothing: a run killed while it writes, or a full disk (an InputError), leaves what was there intact. It is
    kept under the name `before`, if given."""
    path = Path(path)
    try:
        with open(f"{path}.tmp", "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())  # or a power failure could leave the new name with half of the bytes
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        Path(f"{path}.tmp").unlink(missing_ok=True)
        raise InputError(f"{path} could not be written ({str(error).splitlines()[0]}); the one before is intact: make "
                         "room, and give the same command again") from None
    if before and path.exists():
        os.replace(path, before)
    os.replace(f"{path}.tmp", path)


def save_checkpoint(state, out):
    """The newest of FILES; the newest so far becomes the one before."""
    save(state, out / FILES[0], before=out / FILES[1])


def remove(out, *names):
    """The checkpoints in `out`, and the files `names`, those that are there."""
    for name in (*FILES, *names):
        (out / name).unlink(missing_ok=True)


@contextlib.contextmanager
def fitting(out):
    """with fitting(out): what takes a checkpoint's entries. InputError where one is missing or does not fit."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{out} holds another model ({str(error).splitlines()[-1].strip()}); name another --out, or "
                         "--restart to throw it away") from None


def load(out, settings, free, override, device):
    """The checkpoint in `out` of a run with these settings, but for the names in `free`, which change no weight; None
    where there is none. One that is broken (each entry of the file has a checksum) is passed over for the one before,
    with a warning. Raises InputError where that is broken too, or is another run's, unless override."""
    files = [out / name for name in FILES if (out / name).exists()]
    if not files:
        return None
    for file in files:
        try:
            ckpt = read(file, "the checkpoint of a run", device)
            damaged = zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip()
            if damaged or not isinstance(ckpt.get("settings"), dict):
                raise InputError(f"{file}: not the checkpoint of a run, or damaged")
            break
        except (InputError, zipfile.BadZipFile) as error:
            ddp.print0(f"warning: {error}")
    else:
        raise InputError(f"{files[0]} does not load, nor one before it; --restart throws it away")
    differ = [f"{name}: {printable(ckpt['settings'].get(name))} there, {v} here" for name, v in settings.items()
              if name not in free and ckpt["settings"].get(name) != v]
    if differ and not override:
        raise InputError(f"{out} holds a run with other settings ({', '.join(differ)}); name another --out, --restart "
                         "to throw it away, or --override to go on with these")
    return ckpt


def need_tensorboard():
    """InputError where what --tensorboard writes with is missing: to be asked before any long work."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(f"--tensorboard needs the package tensorboard ({error}): pip install tensorboard") from None
    return SummaryWriter


def open_log(out, head_line, done=None, tensorboard=False):
    """log(line), which adds the dictionary `line` to out/log.jsonl: from head_line on, or, for a run that goes on after
    `done` steps, without the lines of later ones, which it will do again.

    tensorboard: also to one event file in out/tensorboard, every number at the line's step, that of a list as name/0,
    name/1, ... It is written anew from the lines that are kept, so that it holds what log.jsonl holds, each step once.
    """
    lines = [json.dumps(head_line) + "\n"]
    if done is not None and (out / "log.jsonl").exists():
        first, *lines = open(out / "log.jsonl")
        whole = [line for line in lines if line.endswith("}\n")]             # a kill may have cut the last
        lines = [first, *(line for line in whole if json.loads(line)["step"] <= done)]
    (out / "log.tmp").write_text("".join(lines))
    os.replace(out / "log.tmp", out / "log.jsonl")
    file = open(out / "log.jsonl", "a", buffering=1)
    if tensorboard or done is None:
        for events in (out / "tensorboard").glob("events.out.tfevents.*"):
            events.unlink()
    if not tensorboard:
        return lambda line: file.write(json.dumps(line) + "\n")

    writer = need_tensorboard()(out / "tensorboard")

    def add(line):
        for name, x in line.items():
            numbers = {f"{name}/{i}": v for i, v in enumerate(x)} if isinstance(x, list) else {name: x}
            for name, v in numbers.items():
                if "step" in line and name != "step":  # the choice that ends a classifier's log has no step
                    writer.add_scalar(name, v, line["step"])

    def log(line):
        file.write(json.dumps(line) + "\n")
        add(line)
        writer.flush()  # a run may be killed before its next line
    for line in lines[1:]:
        add(json.loads(line))
    return log


class Stop:
    """From here on a first SIGTERM, SIGINT or SIGUSR1 (Slurm's warning: sbatch --signal=USR1@120) is noted, so that the
    run can finish its step and save; a second one of the kind ends it at once."""

    def __init__(self):
        self.number, self.process = 0, os.getpid()
        self.before = {number: signal.signal(number, self.note)
                       for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def note(self, number, frame):
        if os.getpid() == self.process:
            self.number = number
            signal.signal(number, self.before[number])
        elif number == signal.SIGTERM:  # a data worker, which Ctrl-C reaches too: only its own process may end it
            os._exit(0)

    def asked(self):
        """The signal that any rank was sent, 0 if none. A collective: every rank asks after the same step."""
        if ddp.world() == 1:
            return self.number
        number = torch.tensor(self.number)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def leave(self, number, out):
        """Exit with 128 + the signal's number, as a shell reports it: a scheduler sees that the run is not over."""
        ddp.print0(f"{signal.Signals(number).name}: {out} is saved; the same command goes on from there")
        sys.exit(128 + number)


def settings_of(backbone):
    """The settings of the run of train_rep.py that wrote `backbone`, from the log.jsonl beside it; {} without one.
    Raises InputError for a log that is not train_rep.py's."""
    log = Path(backbone).with_name("log.jsonl")
    if not log.exists():
        return {}
    try:
        settings = json.loads(log.read_text(encoding="utf-8").splitlines()[0])["settings"]
        known = {"arch": ARCHS, "dataset": data.DATASETS, "data": None, "list": None, "list_sha256": None, "loss": None}
        if not all(isinstance(settings[name], str) and min(settings[name], default=" ") >= " " and
                   settings[name] in (values or [settings[name]])
                   for name, values in known.items()):
            raise ValueError
        return settings
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise InputError(f"{log}, line 1: expected the settings that train_rep.py writes; move a foreign file "
                         "away") from None


def read_head(path):
    """A head.pt of train_rep.py or train_linear.py: a linear classifier, weight (C, D) and bias (C,), and of what.
    Raises InputError where an entry is missing or is not what it should be."""
    head = read(path, expected := "a head.pt of train_linear.py, or of a CE run of train_rep.py")
    W, b = head.get("weight"), head.get("bias")
    sizes, counts = [head.get("pixels"), head.get("resize")], head.get("counts")
    text = ("backbone", "backbone_sha256", "arch", "dataset", "data", "list", "counts_of", "list_sha256", "name",
            "protocol")
    wrong = [name for name in text if not isinstance(head.get(name), str) or min(head[name], default=" ") < " "]
    wrong += ["chosen"] * (not isinstance(head.get("chosen", ""), str))
    if not (isinstance(W, torch.Tensor) and isinstance(b, torch.Tensor) and W.dtype == b.dtype == torch.float32 and
            W.ndim == 2 and len(W) and b.shape == W.shape[:1] and W.isfinite().all() and b.isfinite().all()):
        wrong.append("weight or bias")
    if not (isinstance(counts, list) and len(counts) and all(type(n) is int and 0 <= n < 2**40 for n in counts)):
        wrong.append("counts")
    if not all(type(n) is int and 0 < n <= 2048 for n in sizes):
        wrong.append("pixels or resize")
    if not all(isinstance(x, (tuple, list)) and len(x) == 3 and all(type(v) is float and math.isfinite(v) for v in x)
               for x in (head.get("mean"), head.get("std"))) or 0 in head["std"]:
        wrong.append("mean or std")
    if not wrong and (head["arch"] not in ARCHS or head["dataset"] not in data.DATASETS):
        wrong.append("arch or dataset")
    if wrong:
        raise InputError(f"{path}: not a head.pt ({wrong[0]} is missing or none); expected {expected}")
    return head
