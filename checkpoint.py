"""
What a run leaves for later: its checkpoint, to go on from, and its settings, which stand in the first line of its log.
"""
import json
import os
from pathlib import Path

import torch

from ddp import InputError


def save(state, path):
    """All or nothing: a run killed while it writes leaves the file before intact."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load(out, settings, free, device):
    """out/ckpt.pt of a run with these settings, but for the names in `free`, which change no weight. Raises InputError
    where it does not load, or is another run's."""
    try:
        ckpt = torch.load(out / "ckpt.pt", map_location=device, weights_only=True)
    except Exception as error:  # half a dozen kinds
        raise InputError(f"{out / 'ckpt.pt'} does not load ({type(error).__name__}); --restart throws it "
                         "away") from None
    differ = [f"{name}: {ckpt['settings'].get(name)} there, {v} here" for name, v in settings.items()
              if name not in free and ckpt["settings"].get(name) != v]
    if differ:
        raise InputError(f"{out} holds a run with other settings ({differ[0]}); name another --out, or --restart to "
                         "throw it away")
    return ckpt


def settings_of(backbone):
    """The settings of the run of train_rep.py that wrote `backbone`, from the log.jsonl beside it; {} without one.
    Raises InputError for a log that is not train_rep.py's."""
    log = Path(backbone).with_name("log.jsonl")
    try:
        return json.loads(log.read_text().splitlines()[0])["settings"] if log.exists() else {}
    except (ValueError, LookupError):
        raise InputError(f"{log}, line 1: expected the settings that train_rep.py writes; move a foreign file "
                         "away") from None
