"""
What a run leaves behind: its checkpoint, its classifier, and its log, whose first line has the command and settings.

If a run is killed, type the same command. It resumes after the last epoch that was saved, and draws the same random
numbers as an uninterrupted run. Rank 0 saves ckpt.pt at the end of an epoch if the last save is SAVE_EVERY seconds old,
so you lose the epoch in progress and perhaps short ones before it. Other settings than before are refused, except those
in MAY_DIFFER. --restart deletes the run and starts over.
"""
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision

import ddp

SAVE_EVERY = 60  # seconds, at least, between two checkpoints; a ResNet-50's takes 0.3 GB

# These settings change no weight, so a run may resume with other values.
MAY_DIFFER = {"out", "workers", "log_every", "tensorboard", "compile", "restart", "world"}


def save(state, path):
    """torch.save, all or nothing: if the run is killed while writing, the old file remains."""
    with open(f"{path}.tmp", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def sha256(file):
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def same_list(trained):
    """Exit if a training list has changed since the training: the data folder was rebuilt under the same name, and
    training images may silently have become test images. trained: the settings of a run, or a head.pt."""
    name = trained.get("counts_of", trained["list"])
    files = [file for file in (Path(trained["data"]) / name, Path(name)) if file.is_file()]
    if files and sha256(files[0]) != trained["list_sha256"]:
        sys.exit(f"error: {files[0]} has changed since the training; train again, "
                 "or pass the --data folder of the training")


def header(args, **more):
    """The first line of log.jsonl: what you need to repeat the run. more: settings that are not flags."""
    git = subprocess.run("git describe --always --dirty", shell=True, cwd=Path(__file__).parent,
                         capture_output=True, text=True).stdout.strip()  # "" without git or its history
    settings = {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items()}
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "settings": {**settings, "world": ddp.world(), **more},
            "torch": torch.__version__, "torchvision": torchvision.__version__,
            "python": sys.version.split()[0], "git": git or None,
            "time": time.strftime("%Y-%m-%d %H:%M:%S")}


def resume(out, settings, finished, restart=False):
    """The checkpoint that a run with these settings left in `out`, on the CPU. None if the run starts from scratch.

    finished: the file that a run writes last. Exits if it exists, or if `out` holds a run with other settings.
    restart: delete what `out` holds.
    """
    if finished != "backbone.pt" and (out / "backbone.pt").exists():
        sys.exit(f"error: {out} holds a backbone, whose log would be lost; pass another --out")

    # ranks on several machines must agree: one that resumes would wait forever for one that starts over
    log, ckpt = out / "log.jsonl", out / "ckpt.pt"
    first_line = log.read_text().splitlines()[0] if log.exists() else None
    found = None if restart else (first_line, ckpt.exists(), (out / finished).exists())
    hashes = [x for name, x in settings.items() if name.endswith("_sha256")]
    everyone = ddp.of_all_ranks((found, hashes))
    if any(other != everyone[0] for other in everyone):
        sys.exit(f"error: the ranks find different files in {out}, or different lists; "
                 "every machine must see the same")

    if restart and ddp.rank() == 0:
        for name in (finished, "ckpt.pt", "head.pt", "log.jsonl", "*eval*.json"):
            for file in out.glob(name):
                file.unlink()
    if restart or first_line is None:
        return None

    recorded = json.loads(first_line)["settings"]
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    differences = []
    for name, x in settings.items():
        if name not in MAY_DIFFER and (x or None) != (recorded.get(name) or None):  # older runs lack newer flags
            differences.append(f"{name}: {recorded.get(name)} there, {x} here")
    if differences:
        sys.exit(f"error: {out} holds a run with other settings ({', '.join(differences)}); "
                 "use its settings, pass another --out, or pass --restart to delete that run")

    if (out / finished).exists():
        ddp.print0(f"{out} is finished already; --restart trains it again")
        sys.exit(0)
    return torch.load(ckpt, map_location="cpu", weights_only=True) if ckpt.exists() else None


def open_log(out, header, step=None, tensorboard=False):
    """Returns log(line), which appends a dictionary to out/log.jsonl and, with tensorboard, its numbers to
    out/tensorboard.

    step: the run resumes after this step. Lines up to it are kept; later ones will be written again.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, lines = out / "log.jsonl", []
    if step is not None:
        complete, _, _ = path.read_text().rpartition("\n")  # a kill may have cut the last line
        header, *lines = map(json.loads, complete.splitlines())
        lines = [line for line in lines if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in [header, *lines])
    (out / "log.tmp").write_text(text)
    os.replace(out / "log.tmp", path)

    file = open(path, "a", buffering=1)
    if tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            sys.exit("error: --tensorboard needs a package: pip install tensorboard")
        # purge_step hides what a killed run wrote after its checkpoint
        writer = SummaryWriter(out / "tensorboard", purge_step=(step or 0) + 1, flush_secs=10)

    def log(line):
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            sys.exit(f"error: another process has taken over {out}; give each run its own --out")
        print(json.dumps(line), file=file)
        for name, x in line.items() if tensorboard else ():
            numbers = {f"{name}/{i}": n for i, n in enumerate(x)} if isinstance(x, list) else {name: x}
            for tag, number in numbers.items():
                if number is not None:  # val_top1 is None without a validation list
                    writer.add_scalar(tag, number, line["step"])
    return log


def settings_of(backbone):
    """The settings of the run that wrote `backbone`, from the log.jsonl next to it; {} if there is no log."""
    if Path(backbone).name == "head.pt":
        sys.exit(f"error: {backbone} is a classifier; pass the backbone.pt that it was trained on")
    if not Path(backbone).is_file():
        sys.exit(f"error: no file {backbone}; pass a backbone.pt of train_rep.py, or another ResNet's checkpoint")
    log = Path(backbone).with_name("log.jsonl")
    return json.loads(log.read_text().splitlines()[0])["settings"] if log.exists() else {}


def read_head(path):
    """Read a head.pt of train_rep.py or train_linear.py: weight (C, D) and bias (C,) of a linear classifier, and what
    it was trained on."""
    head = torch.load(path, map_location="cpu", weights_only=True) if Path(path).exists() else {}
    if "weight" not in head:
        sys.exit(f"error: {path} is missing or not a head.pt; train_linear.py writes one to linear-lt/")
    if "backbone_sha256" in head:  # older files have none
        backbone = (Path(path).parent / head["backbone"]).resolve()
        if backbone.is_file() and sha256(backbone) != head["backbone_sha256"]:
            sys.exit(f"error: {backbone} has changed since {path} was trained on it; "
                     "train this classifier again, with --restart")
    return head
