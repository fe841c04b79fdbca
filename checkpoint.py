"""
What a run leaves for later: its checkpoint, to go on from, its settings, which stand in the first line of its log, and
its classifier.
"""
import json
import math
import os
from pathlib import Path

import torch

import data
from ddp import InputError
from reading import printable, read
from resnet import ARCHS


def save(state, path):
    """All or nothing: a run killed while it writes leaves the file before intact."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load(out, settings, free, device):
    """out/ckpt.pt of a run with these settings, but for the names in `free`, which change no weight. Raises InputError
    where it does not load, or is another run's."""
    ckpt = read(out / "ckpt.pt", expected := "the checkpoint of a run; --restart throws it away", device)
    if not isinstance(ckpt.get("settings"), dict):
        raise InputError(f"{out / 'ckpt.pt'}: holds no settings; expected {expected}")
    differ = [f"{name}: {printable(ckpt['settings'].get(name))} there, {v} here" for name, v in settings.items()
              if name not in free and ckpt["settings"].get(name) != v]
    if differ:
        raise InputError(f"{out} holds a run with other settings ({differ[0]}); name another --out, or --restart to "
                         "throw it away")
    return ckpt


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
