"""
Stage 1: train a representation with CE, CL (MoCo), KCL or FCL.

    python train_rep.py --loss kcl                                  # embedded digits, CPU or one GPU, about 2 minutes
    torchrun --nproc_per_node=2 train_rep.py --loss kcl             # the same on two processes
    torchrun --nproc_per_node=8 train_rep.py --loss kcl --data /path/to/imagenet --list ImageNet_LT_train.txt

Writes to --out: backbone.pt (a plain state_dict in torchvision's names, no fc), for CE also head.pt, which evaluate.py
reads, ckpt.pt (everything to resume: the same command goes on where it stopped) and log.jsonl (first line: command,
settings, versions; then a line every --log-every steps). What comes next: train_linear.py.
"""
import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

import data
import ddp
import make_lt
from ddp import InputError
from kcl import kcl_loss
from moco import MoCo
from resnet import ARCHS

# The hyper-parameters by data set and loss: the paper's Table 7 for ImageNet (batch 256 = 8 GPUs x 32, BatchNorm sees
# 32 images), and the same scaled down for the digits. A flag on the command line wins.
SETTINGS = {
    "imagenet": dict(arch="resnet50", batch=256, queue=65536, m=0.999, weight_decay=5e-4, save_every=1,
                     workers=min(8, os.cpu_count())),
    "digits": dict(arch="resnet8", batch=64, queue=512, m=0.99, weight_decay=5e-4, workers=0, save_every=5),
}
BY_LOSS = {
    "imagenet": {"ce": dict(lr=0.1, schedule="cosine", epochs=90, aug="sup"),
                 "cl": dict(lr=0.03, schedule="step", epochs=200, aug="moco"),
                 "kcl": dict(lr=0.1, schedule="cosine", epochs=200, aug="sup")},
    "digits": {"ce": dict(lr=0.1, schedule="cosine", epochs=120, aug="affine"),
               "cl": dict(lr=0.03, schedule="cosine", epochs=120, aug="affine"),
               "kcl": dict(lr=0.1, schedule="cosine", epochs=120, aug="affine")},
}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # method
    p.add_argument("--loss", choices=("ce", "cl", "kcl", "fcl"), default="kcl")
    p.add_argument("--num-positives", type=int, help="k of KCL; default 6, the paper's choice on ImageNet-LT's val")
    p.add_argument("--temperature", type=float, default=0.07, help="T of the contrastive softmax")
    p.add_argument("--fixed-divisor", action="store_true", help="KCL: divide by k + 1 also where fewer are found")
    p.add_argument("--drop-unused", action="store_true", help="KCL: keys of the class not drawn leave the denominator")
    p.add_argument("--queue", type=int, help="K, keys in the queue: 65536, digits 512")
    p.add_argument("--m", type=float, help="momentum of the key encoder: 0.999, digits 0.99 (13 steps an epoch)")
    p.add_argument("--dim", type=int, default=128, help="d, size of the embedding")
    p.add_argument("--mlp", action="store_true", help="MoCo v2's two-layer head in place of the linear one")
    p.add_argument("--no-fill", action="store_true", help="start from a random queue without labels, as MoCo")
    # data
    p.add_argument("--dataset", choices=tuple(data.DATASETS),
                   help="default: imagenet where --data is given, unless it is a folder of digits")
    p.add_argument("--data", help="the folder that the list's paths start from")
    p.add_argument("--list", help="training list, `path label` a line; looked up as given, then in --data")
    p.add_argument("--val", help="validation list: no image of it may be in --list; `none` if there is none")
    p.add_argument("--sampler", choices=("instance", "class", "sqrt", "progressive"), default="instance")
    p.add_argument("--aug", choices=tuple(data.AUGMENTATIONS), help="by loss: sup, cl moco; digits affine")
    p.add_argument("--workers", type=int, help="data workers of each rank")
    # optimisation
    p.add_argument("--arch", choices=tuple(ARCHS), help="resnet50, digits resnet8")
    p.add_argument("--epochs", type=int, help="by loss: ce 90, others 200; digits 120")
    p.add_argument("--batch", type=int, help="images a step over all ranks together: 256, digits 64")
    p.add_argument("--lr", type=float, help="for the whole --batch, not rescaled: 0.1, cl 0.03")
    p.add_argument("--schedule", choices=("cosine", "step"), help="per epoch; step = x0.1 at 60 %% and 80 %%")
    p.add_argument("--weight-decay", type=float, help="5e-4 (ImageNet-LT); the paper takes 1e-4 on full ImageNet")
    p.add_argument("--seed", type=int, default=0)
    # the run
    p.add_argument("--out", help="default: runs/<folder of --data>-<list>-<loss>-seed<n>[-<n>ranks]")
    p.add_argument("--log-every", type=int, default=10, help="steps between log lines; only then is the loss read")
    p.add_argument("--save-every", type=int, help="epochs between checkpoints: 1, digits 5")
    p.add_argument("--restart", action="store_true", help="throw away what --out holds")
    args = p.parse_args()

    digits = args.data is None or (Path(args.data) / data.DATASETS["digits"]["train"]).exists()  # as make_lt.py writes
    args.dataset = args.dataset or ("digits" if digits else "imagenet")
    spec = data.DATASETS[args.dataset]
    args.data = args.data or spec["root"]
    if args.data is None:
        raise InputError(f"--dataset {args.dataset} needs --data, the folder that the list's paths start from")
    args.data = str(Path(args.data))  # without a last slash
    args.list, args.val = args.list or spec["train"], args.val or spec["val"]
    if args.loss == "kcl" and args.num_positives is None:
        args.num_positives = 6
    by_loss = BY_LOSS[args.dataset]
    for name, value in {**SETTINGS[args.dataset], **by_loss.get(args.loss, by_loss["kcl"])}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("temperature", "queue", "dim", "epochs", "batch", "lr", "log_every", "save_every"):
        if getattr(args, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} must be above 0")
    if args.num_positives is not None and (args.loss != "kcl" or args.num_positives < 0):
        raise InputError("--num-positives, 0 or more, goes with --loss kcl; cl takes none, fcl all")
    if (args.fixed_divisor or args.drop_unused) and args.loss != "kcl":
        raise InputError("--fixed-divisor and --drop-unused go with --loss kcl")
    if args.workers < 0 or args.weight_decay < 0:
        raise InputError("--workers and --weight-decay must be 0 or more")
    sampler = "" if args.sampler == "instance" else f"-{args.sampler}"
    list_name = Path(args.list).stem.removeprefix("train_")
    ranks = "" if ddp.world() == 1 else f"-{ddp.world()}ranks"  # BatchNorm sees other batches: another run
    args.out = Path(args.out or f"runs/{Path(args.data).name}-{list_name}-{args.loss}{sampler}-seed{args.seed}{ranks}")
    return args


def learning_rate(base, schedule, t):
    """At t = epoch / epochs; cosine reaches 0 after the last epoch, step is MoCo's 120 and 160 of 200."""
    return base * (0.5 * (1 + math.cos(math.pi * t)) if schedule == "cosine" else 0.1 ** ((t >= 0.6) + (t >= 0.8)))


def header(args):
    """What a later reader needs to repeat the run: the first line of log.jsonl."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, check=True,
                             capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        git = None  # no git, or a copy without its history
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    settings |= {"world": ddp.world(), "list_sha256": data.sha256(data.find_list(args.data, args.list))}
    return {"command": " ".join(["train_rep.py", *sys.argv[1:]]), "settings": settings,
            "torch": torch.__version__, "torchvision": torchvision.__version__, "python": sys.version.split()[0],
            "git": git, "time": time.strftime("%Y-%m-%d %H:%M:%S")}


def save(state, path):
    """All or nothing: a run killed while it writes leaves the file before intact."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def main():
    device = ddp.init()
    args = parse_args()
    spec = data.DATASETS[args.dataset]

    # data
    if args.data == data.DATASETS["digits"]["root"]:
        if ddp.rank() == 0 and not Path(args.data).exists():
            print(f"composing the embedded digits in {args.data}")
            make_lt.make_digits(args.data)
        torch.distributed.barrier()
    dataset = data.ImageList(args.data, args.list, data.augmentation(args.aug, spec["pixels"]),
                             num_views=1 if args.loss == "ce" else 2)
    if args.val != "none":
        data.refuse_overlap(args.data, args.list, args.val)
    draws = data.Draws(dataset.labels, args.sampler, args.batch, args.epochs, args.seed)
    loader = data.train_loader(dataset, draws, args.workers)
    counts = data.class_counts(dataset.labels)

    # model
    torch.manual_seed(args.seed)  # the same on all ranks: the same weights and the same random queue
    encoder = ARCHS[args.arch]
    if args.loss == "ce":
        model = encoder(num_classes=len(counts))
    else:
        model = MoCo(encoder, args.dim, args.queue, args.m, args.mlp, args.seed)
    model = model.to(device, memory_format=torch.channels_last)
    backbone = model if args.loss == "ce" else model.encoder_q
    net = ddp.wrap(backbone)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    num_positives = {"cl": 0, "kcl": args.num_positives, "fcl": None}.get(args.loss)

    def to_input(view):
        return data.normalize(view, spec["mean"], spec["std"], device)

    # resume, or begin
    first_epoch, head_line = 0, header(args)
    ddp.print0("settings: " + ", ".join(f"{name}={v}" for name, v in head_line["settings"].items()))
    if (args.out / "ckpt.pt").exists() and not args.restart:
        try:
            ckpt = torch.load(args.out / "ckpt.pt", map_location=device, weights_only=True)
        except Exception as error:  # half a dozen kinds
            raise InputError(f"{args.out / 'ckpt.pt'} does not load ({type(error).__name__}); --restart throws it "
                             "away") from None
        free = {"out", "val", "workers", "log_every", "save_every", "restart"}  # may differ without changing the run
        differ = [f"{name}: {ckpt['settings'].get(name)} there, {v} here" for name, v in head_line["settings"].items()
                  if name not in free and ckpt["settings"].get(name) != v]
        if differ:
            raise InputError(f"{args.out} holds a run with other settings ({differ[0]}); name another --out, or "
                             "--restart to throw it away")
        model.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
        first_epoch = ckpt["epoch"]
        if first_epoch == args.epochs and (args.out / "backbone.pt").exists():
            ddp.print0(f"{args.out} is finished already; --restart trains it again")
            return
        ddp.print0(f"{args.out}: going on after epoch {first_epoch} of {args.epochs}")
    elif args.loss != "ce" and not args.no_fill:
        def batches():
            for epoch in range(-1, -args.queue - 1, -1):  # epochs before the first; more than one if K > the data set
                draws.set_epoch(epoch)
                for (_, view), labels, _ in loader:
                    yield to_input(view), labels.to(device)
                    bar.update(args.batch)
        with tqdm(total=args.queue, desc="filling the queue", unit="key", disable=ddp.rank() > 0, leave=False) as bar:
            model.fill_queue(batches())
    if ddp.rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        if not first_epoch:
            for name in ("ckpt.pt", "backbone.pt", "head.pt"):
                (args.out / name).unlink(missing_ok=True)
        log = open(args.out / "log.jsonl", "a" if first_epoch else "w", buffering=1)
        if not first_epoch:
            log.write(json.dumps(head_line) + "\n")

    # train
    steps = len(loader)
    bar = tqdm(total=steps * args.epochs, initial=steps * first_epoch, desc=args.out.name, unit="step",
               disable=ddp.rank() > 0, mininterval=1)
    net.train()
    for epoch in range(first_epoch, args.epochs):
        draws.set_epoch(epoch)
        # each epoch seeds itself, another stream a rank: a resumed run draws what an undisturbed one does
        torch.manual_seed((args.seed * 1_000_003 + epoch) * 1_009 + ddp.rank())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, args.schedule, epoch / args.epochs)
        total, since = torch.zeros((), device=device), time.time()
        for step, (views, labels, _) in enumerate(loader, 1):
            labels = labels.to(device, non_blocking=True)
            if args.loss == "ce":
                loss = F.cross_entropy(net(to_input(views[0])), labels)
            else:
                model.update_key_encoder()
                q = F.normalize(net(to_input(views[0])))                  # (b, d)
                k = model.keys(to_input(views[1]))                        # (b, d)
                loss = kcl_loss(q, k, model.queue, labels, model.queue_labels, num_positives, args.temperature,
                                args.fixed_divisor, args.drop_unused)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            total += loss.detach()
            if step % args.log_every == 0 or step == steps:
                n = (step - 1) % args.log_every + 1
                line = {"epoch": epoch, "step": epoch * steps + step, "loss": total.item() / n,
                        "lr": optimizer.param_groups[0]["lr"], "images_per_s": n * args.batch / (time.time() - since)}
                if not math.isfinite(line["loss"]):
                    raise InputError(f"the loss is {line['loss']} at step {line['step']} with learning rate "
                                     f"{line['lr']:.3g}; {args.out} keeps its last checkpoint; try a smaller --lr")
                if args.loss != "ce":
                    real = model.queue_labels[model.queue_labels >= 0]
                    line |= {"queue_filled": len(real) / args.queue, "queue_classes": len(real.unique()),
                             "positives_in_queue": (labels[:, None] == real).sum(1).float().mean().item()}
                if ddp.rank() == 0:
                    log.write(json.dumps(line) + "\n")
                    bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)
                total, since = torch.zeros_like(total), time.time()
            if args.loss != "ce":
                model.enqueue(k, labels)
            bar.update()
        if ddp.rank() == 0 and ((epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs):
            save({"epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                  "settings": head_line["settings"]}, args.out / "ckpt.pt")
    bar.close()

    # hand on
    if ddp.rank() == 0:
        state = {name: x.cpu().contiguous() for name, x in backbone.state_dict().items()}
        save({name: x for name, x in state.items() if not name.startswith("fc.")}, args.out / "backbone.pt")
        if args.loss == "ce":
            save({"weight": state["fc.weight"], "bias": state["fc.bias"], "backbone": "backbone.pt",
                  "backbone_sha256": data.sha256(args.out / "backbone.pt"), "arch": args.arch,
                  "dataset": args.dataset, "data": args.data, "name": args.out.name,
                  "counts": counts.tolist(), "counts_of": args.list,
                  "list_sha256": head_line["settings"]["list_sha256"],
                  "protocol": f"joint CE, {args.sampler} sampling",
                  **{name: spec[name] for name in ("mean", "std", "pixels", "resize")}}, args.out / "head.pt")
        print(f"backbone in {args.out / 'backbone.pt'}")


if __name__ == "__main__":
    ddp.run(main)
