"""
Stage 1: train a representation with KCL, or with what it is compared with: CE, CL (MoCo), FCL, and baselines.py.

    python train_rep.py --loss kcl                                  # embedded digits, CPU or one GPU, 3 minutes
    torchrun --nproc_per_node=2 train_rep.py --loss kcl             # two processes; BatchNorm sees half of a batch
    torchrun --nproc_per_node=8 train_rep.py --loss kcl --data /path/to/imagenet --list ImageNet_LT_train.txt

Writes to --out: log.jsonl (first line: command, settings, versions; then a line every --log-every steps); ckpt.pt at
the end of an epoch, once a minute at most, from which the same command goes on; for losses on logits head.pt, the
classifier that was trained along; last backbone.pt, a plain state_dict in torchvision's names without the fc.
Next: train_linear.py.
"""
import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import baselines
import checkpoint
import data
import ddp
from kcl import fast_kcl_loss
from moco import MoCo, keep_statistics
from resnet import ARCHS, load_backbone

KCL_FAMILY = ("kcl", "cl", "fcl")  # k positives from the queue, none, all

# The hyper-parameters by kind of data set: for photographs those of BalFeat, the authors' code (batch 256 = 8 GPUs x
# 32; BatchNorm sees 32), for CIFAR-LT those of Cao et al. 2019 with a cosine, scaled down for the digits. A flag wins.
WORKERS = min(8, os.cpu_count())
DEFAULTS = {
    "photos": dict(arch="resnet50", epochs=200, batch=256, lr=0.1, schedule="cosine", weight_decay=5e-4, aug="sup",
                   queue=65536, m=0.999, sampler="instance", workers=WORKERS),
    "cifar": dict(arch="resnet32", epochs=200, batch=128, lr=0.1, schedule="cosine", weight_decay=2e-4, aug="cifar",
                  queue=4096, m=0.99, sampler="instance", workers=WORKERS),
    "digits": dict(arch="resnet8s", epochs=200, batch=64, lr=0.1, schedule="cosine", weight_decay=5e-4, aug="affine",
                   queue=512, m=0.99, sampler="instance", workers=0),
}
BY_LOSS = {  # what a loss changes
    ("photos", "logits"): dict(epochs=90),
    ("photos", "cl"): dict(lr=0.03, schedule="step", aug="moco"),
    ("cifar", "cl"): dict(lr=0.03, aug="moco"),
    ("digits", "logits"): dict(epochs=90, lr=0.3),  # CE's, KCL's, CL's, FCL's: chosen on val, results/findings.md
    ("digits", "kcl"): dict(lr=0.3),
    ("digits", "cl"): dict(lr=0.03),
}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # method
    p.add_argument("--loss", choices=(*KCL_FAMILY, *baselines.LOSSES), default="kcl", help="default: kcl")
    p.add_argument("--num-positives", type=int, default=6, help="k of KCL and TSC: 6, best in the paper's Fig. 5")
    p.add_argument("--temperature", type=float, default=0.07, help="T of the contrastive softmax: 0.07, MoCo's")
    p.add_argument("--fixed-divisor", action="store_true", help="KCL: divide by k + 1 also where fewer are found")
    p.add_argument("--drop-unused", action="store_true", help="KCL: keys of the class not drawn leave the denominator")
    p.add_argument("--first-k", action="store_true", help="KCL: the k lowest slots of the class, not random ones")
    p.add_argument("--queue", type=int, help="K, keys in the queue: 65536; CIFAR 4096, digits 512")
    p.add_argument("--m", type=float, help="momentum of the key encoder: 0.999; CIFAR, digits 0.99 (fewer steps)")
    p.add_argument("--dim", type=int, default=128, help="d, numbers in an embedding: 128, MoCo's")
    p.add_argument("--mlp", action="store_true", help="MoCo v2's two-layer head in place of the linear one")
    p.add_argument("--no-fill", action="store_true", help="start from a random queue without labels, as MoCo")
    p.add_argument("--drw", action="store_true", help="CE, LDAM: re-weight classes in the last 20 %% of the epochs")
    p.add_argument("--init", help="backbone.pt to start from: with --loss ce on a CL backbone this is SSP")
    # data
    p.add_argument("--dataset", choices=tuple(data.DATASETS), help="default: what splits.json in --data says, else "
                   "imagenet; without --data digits")
    p.add_argument("--data", help="the folder that the list's paths start from")
    p.add_argument("--list", help="training list, `path label` a line, as given or in --data; default: the long tail")
    p.add_argument("--sampler", choices=("instance", "class", "sqrt", "progressive", "bilateral"),
                   help="which images are drawn (data.py, Draws): instance, every image once; bbn bilateral")
    p.add_argument("--aug", choices=data.AUGMENTATIONS, help="sup, but cl: moco; CIFAR: cifar; digits: affine")
    p.add_argument("--workers", type=int, help="data workers of each rank: 8 or the cores")
    # optimisation
    p.add_argument("--arch", choices=tuple(ARCHS), metavar="ARCH", help="resnet50, CIFAR resnet32, digits resnet8s; "
                   "all: resnet.py")
    p.add_argument("--epochs", type=int, help="200; losses on logits 90, with CIFAR 200")
    p.add_argument("--batch", type=int, help="images a step over all ranks together: 256, CIFAR 128, digits 64")
    p.add_argument("--lr", type=float, help="for the whole --batch: 0.1, cl 0.03; digits: kcl and on logits 0.3")
    p.add_argument("--schedule", choices=("cosine", "step"), help="cosine; photos, cl: step, x0.1 at 60, 80 %% (MoCo)")
    p.add_argument("--weight-decay", type=float, help="5e-4 (authors: 1e-4 on full ImageNet), CIFAR 2e-4")
    p.add_argument("--seed", type=int, default=0, help="of weights, draws and augmentations: 0")
    # speed and memory
    p.add_argument("--virtual-gpus", type=int, metavar="V", help="do what V ranks would: each rank takes its batch in "
                   "V / ranks parts, and BatchNorm sees one part; 8 on one GPU is BalFeat's 8 x 32")
    p.add_argument("--amp", action="store_true", help="encoders in bfloat16, weights, keys and loss in float32")
    p.add_argument("--compile", action="store_true", help="torch.compile the encoders: 1.5 times as fast on an H100")
    # the run
    p.add_argument("--out", type=Path, help="default: runs/<folder of --data>-<list>-<loss>[-<variants>]-seed<n>")
    p.add_argument("--log-every", type=int, default=10, help="steps between log lines: 10; only then is the loss read")
    p.add_argument("--tensorboard", action="store_true", help="the log also as scalars, in OUT/tensorboard")
    p.add_argument("--restart", action="store_true", help="throw away what --out holds; else it goes on from there")

    args, _ = p.parse_known_args()  # parsed twice: data set and loss decide defaults
    args.dataset = args.dataset or dataset_of(args)
    spec = data.DATASETS[args.dataset]
    p.set_defaults(dataset=args.dataset, data=spec["root"], list=spec["train"], virtual_gpus=ddp.world(),
                   **DEFAULTS[spec["kind"]])
    loss = "logits" if args.loss in baselines.LOGITS else args.loss
    p.set_defaults(**BY_LOSS.get((spec["kind"], loss), {}), **baselines.DEFAULTS.get(args.loss, {}))
    args = p.parse_args()

    if args.data is None:
        sys.exit(f"error: --dataset {args.dataset} needs --data, the folder that the list's paths start from")
    args.data = str(Path(args.data))  # without a last slash
    takes = {"num_positives": ("kcl", "tsc"), "fixed_divisor": ("kcl",), "drop_unused": ("kcl",), "first_k": ("kcl",),
             "drw": ("ce", "ldam")}
    for name, losses in takes.items():
        if args.loss not in losses and getattr(args, name) != p.get_default(name):
            sys.exit(f"error: --{name.replace('_', '-')} goes with --loss {' and '.join(losses)}, not {args.loss}")
    if args.virtual_gpus % ddp.world() or args.batch % args.virtual_gpus:
        sys.exit(f"error: --virtual-gpus {args.virtual_gpus} must be a multiple of the {ddp.world()} ranks and divide "
                 f"--batch {args.batch}")
    if args.virtual_gpus > ddp.world() and args.loss in baselines.WHOLE_BATCH:
        sys.exit(f"error: --virtual-gpus takes a batch in parts, but --loss {args.loss} needs it whole")
    args.out = args.out or default_out(args)
    return args


def dataset_of(args):
    """The data set by splits.json, which make_lt.py writes beside the lists."""
    if args.data is None:
        return "digits"
    for folder in (args.data, Path(args.list or "").parent):
        if (Path(folder) / "splits.json").exists():
            return json.loads((Path(folder) / "splits.json").read_text())["dataset"]
    return "imagenet"


def default_out(args):
    """runs/digits-lt-kcl-seed0; say --out for runs that differ in other flags than these."""
    how = args.loss + "-drw" * args.drw + "-init" * bool(args.init)
    how += "" if args.sampler in ("instance", "bilateral") else f"-{args.sampler}"
    name = Path(args.list).with_suffix("").as_posix().strip("/").replace("/", "-").replace("train_", "")
    ranks = "" if args.virtual_gpus == 1 else f"-{args.virtual_gpus}ranks"  # other batches for BatchNorm: another run
    return Path(f"runs/{Path(args.data).name}-{name}-{how}-seed{args.seed}{ranks}")


def learning_rate(base, schedule, t):
    """At t = epoch / epochs; cosine reaches 0 after the last epoch, step is MoCo's 120 and 160 of 200."""
    return base * (0.5 * (1 + math.cos(math.pi * t)) if schedule == "cosine" else 0.1 ** ((t >= 0.6) + (t >= 0.8)))


def network(args, counts, parts):
    """The model to train, whose weights and random queue are the same on all ranks, and its encoders: of MoCo two."""
    torch.manual_seed(args.seed)
    encoder = ARCHS[args.arch]
    if args.loss in KCL_FAMILY:
        model = MoCo(encoder, args.dim, args.queue, args.m, args.mlp, args.seed, parts)
    else:
        model = baselines.network(args, encoder, counts)
    encoders = [model.encoder_q, model.encoder_k] if isinstance(model, MoCo) else [model]
    start = load_backbone(args.init, args.arch).state_dict() if args.init else {}
    for e in encoders:
        e.load_state_dict(start, strict=False)                            # all but the fc
        if args.compile:
            e.compile()
    return model, encoders


def keys_to_fill(loader, draws, args, device):
    """(images, labels) to fill the queue with: epochs below 0, more than one if K is larger than the data set."""
    bar = tqdm(total=args.queue, desc="filling the queue", unit="key", disable=ddp.rank() > 0 or None, leave=False)
    for epoch in itertools.count(-1, -1):
        draws.set_epoch(epoch)
        for (_, view), labels, _ in loader:
            yield view.to(device), labels.to(device)
            bar.update(args.batch)


def hand_on(args, header, model, counts):
    """backbone.pt, which says that the run is finished, and before it head.pt of losses that train a classifier."""
    if args.loss in baselines.LOGITS:
        weight, bias = baselines.classifier(model)
        how = baselines.LOSSES[args.loss] + "-DRW" * args.drw + " from another backbone" * bool(args.init)
        checkpoint.save({
            "weight": weight.cpu(), "bias": bias.cpu(), "backbone": "backbone.pt", "arch": args.arch,
            "dataset": args.dataset, "data": args.data, "list": args.list, "counts": counts.tolist(),
            "counts_of": args.list, "list_sha256": header["settings"]["list_sha256"], "name": args.out.name,
            "protocol": f"joint {how}, {args.sampler} sampling", "chosen": "",
            **{name: data.DATASETS[args.dataset][name] for name in ("mean", "std", "pixels", "resize")}},
            args.out / "head.pt")
    encoder = model.encoder_q if isinstance(model, MoCo) else getattr(model, "encoder", model)
    state = {name: x.cpu().contiguous() for name, x in encoder.state_dict().items() if not name.startswith("fc.")}
    checkpoint.save(state, args.out / "backbone.pt")
    print(f"backbone in {args.out / 'backbone.pt'}")


def main():
    device = ddp.init()
    args = parse_args()
    spec = data.DATASETS[args.dataset]

    # data
    if args.data == data.DATASETS["digits"]["root"]:
        if ddp.rank() == 0 and not Path(args.data).exists():
            subprocess.run([sys.executable, Path(__file__).with_name("make_lt.py")], check=True)
        dist.barrier()
    views = 2 if args.loss in KCL_FAMILY else baselines.VIEWS.get(args.loss, 1)
    dataset = data.ImageList(args.data, args.list, spec, args.aug, views)
    draws = data.Draws(dataset.labels, args.sampler, args.batch, args.epochs, args.seed)
    counts = dataset.labels.bincount()                                    # (C,)
    val = data.beside(args.data, args.list, spec["val"])                  # it chooses later, so it is not learned from
    if Path(val).exists() or (Path(args.data) / val).exists():
        data.refuse_overlap(args.data, args.list, val)

    # resume, or begin
    header = checkpoint.header(args, list_sha256=data.sha256(data.find_list(args.data, args.list)))
    ddp.print0("settings: " + ", ".join(f"{name}={x}" for name, x in header["settings"].items()))
    ckpt = checkpoint.resume(args.out, header["settings"], "backbone.pt", args.restart)
    loader = data.train_loader(dataset, draws, args.workers, device)
    steps, begin = len(loader), ckpt["epoch"] if ckpt else 0

    # model
    parts = args.virtual_gpus // ddp.world()
    model, encoders = network(args, counts, parts)
    model.to(device, memory_format=torch.channels_last)
    queued = isinstance(model, MoCo)
    net = ddp.wrap(encoders[0])                                           # the encoder that gets gradients
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=args.amp)
    to_input = partial(data.normalize, mean=spec["mean"], std=spec["std"], device=device)
    if ckpt:
        model.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
        ddp.print0(f"{args.out}: going on after epoch {begin} of {args.epochs}")
    elif queued and not args.no_fill:
        if args.queue > 10 * len(dataset):
            sys.exit(f"error: --queue {args.queue} would hold each of the {len(dataset)} images many times; say "
                     f"--queue {2 ** int(math.log2(len(dataset)))} or so")
        with amp:
            model.fill_queue(keys_to_fill(loader, draws, args, device), to_input)

    # train
    if ddp.rank() == 0:
        log = checkpoint.open_log(args.out, header, begin * steps if ckpt else None, args.tensorboard)
    bar = tqdm(total=steps * args.epochs, initial=steps * begin, desc=args.out.name, unit="step", mininterval=1,
               disable=ddp.rank() > 0 or None)                            # None: no bar in a file
    saved = time.time()
    for epoch in range(begin, args.epochs):
        draws.set_epoch(epoch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, args.schedule, epoch / args.epochs)
        if args.loss in KCL_FAMILY:
            num_positives = {"kcl": args.num_positives, "cl": 0, "fcl": None}[args.loss]
            criterion = partial(fast_kcl_loss, num_positives=num_positives, temperature=args.temperature,
                                fixed_divisor=args.fixed_divisor, drop_unused=args.drop_unused, first_k=args.first_k)
        else:
            criterion = baselines.criterion(args, model, counts, epoch)

        total, since, since_step = torch.zeros((), device=device), time.time(), epoch * steps
        for step, (views, labels, _) in enumerate(loader, epoch * steps + 1):
            views = [view.to(device, non_blocking=True) for view in views]                # (B / ranks, 3, H, W) uint8
            labels = labels.to(device, non_blocking=True)                                 # (B / ranks,)
            if queued:
                model.update_key_encoder()
                with amp:
                    keys, key_labels = model.keys(views[1], labels, to_input)             # (B, d), (B,) of all ranks
            images = views[0] if queued else torch.cat(views)

            optimizer.zero_grad()
            for j in range(parts):
                # a random stream for each step and virtual rank: a resumed run draws what an undisturbed one does
                torch.manual_seed((args.seed * 1_000_003 + step) * 1_009 + ddp.rank() + ddp.world() * j)
                keep_statistics(net, j > 0)                                               # the first part moves them
                net.require_backward_grad_sync = j == parts - 1
                x, y = to_input(images[j::parts]), labels[j::parts]                       # (b, 3, H, W), (b,)
                with amp:
                    z = net(x).float()                                                    # (b, d), or logits (b, C)
                if queued:
                    q, k = F.normalize(z), model.own(keys, j)                             # (b, d) each
                    loss = criterion(q, k, model.queue, y, model.queue_labels)
                else:
                    loss = criterion(z, y)
                (loss / parts).backward()
                total += loss.detach() / parts
            optimizer.step()
            if queued:
                model.enqueue(keys, key_labels)                                           # moco.py says why only now
            bar.update()

            if step % args.log_every == 0 or step == (epoch + 1) * steps:
                dist.all_reduce(total)
                n = step - since_step
                line = {"epoch": epoch, "step": step, "loss": total.item() / ddp.world() / n,
                        "lr": optimizer.param_groups[0]["lr"],
                        "images_per_s": n * args.batch / (time.time() - since)}
                if queued:  # 1: the queries fill the sphere; 0: all are one vector, the representation has collapsed
                    line["feature_std"] = (q.detach().std(0, correction=0).mean() * args.dim**0.5).item()
                if not math.isfinite(line["loss"]):
                    sys.exit(f"error: the loss is {line['loss']} at step {step}; {args.out} keeps its last checkpoint; "
                             "try a smaller --lr")
                if ddp.rank() == 0:
                    log(line)
                    bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)
                total, since, since_step = torch.zeros_like(total), time.time(), step

        if ddp.rank() == 0 and (time.time() - saved >= checkpoint.SAVE_EVERY or epoch + 1 == args.epochs):
            checkpoint.save({"epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()},
                            args.out / "ckpt.pt")
            saved = time.time()
    bar.close()
    if ddp.rank() == 0:
        hand_on(args, header, model, counts)


if __name__ == "__main__":
    ddp.run(main)
