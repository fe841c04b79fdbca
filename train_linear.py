"""
Stage 2: train a linear classifier on the frozen features of a backbone.

    python train_linear.py runs/digits-lt-kcl-seed0/backbone.pt                   # long-tailed recognition: Tables 2, 3
    python train_linear.py runs/digits-lt-kcl-seed0/backbone.pt --protocol rep    # representation evaluation: Figs 2-4
    torchrun --nproc_per_node=8 train_linear.py runs/imagenet-ImageNet_LT_train-kcl-seed0/backbone.pt
    python train_linear.py moco_v2_800ep.pth.tar --loss cl --arch resnet50 --dataset imagenet --data X

--protocol lt trains on the backbone's long-tailed list. Each draw takes a class at random and one of its images. For a
CE backbone this is cRT: a new linear head, drawn from N(0, 0.01) and trained with CE on the features of the backbone in
eval mode. The authors' code starts from the joint head instead (results/differences.md).
--protocol rep trains on the full, balanced list and uses every image once per epoch.
--classifier lws learns one scale per class for the head that was trained together with the backbone.
--classifier ldam trains a cosine classifier with LDAM-DRW instead of CE, as in the published KCL runs on CIFAR-LT.
--features cached encodes each image once, without augmentation, which is faster. The paper augments in every epoch.

Each pair of a --lr and a --weight-decay is one classifier. All of them train side by side on the same stream of
features, each as it would alone. The one with the best top-1 on the validation list is kept. The test list is not used.

This writes head.pt and log.jsonl to <folder of the backbone>/<classifier>-<protocol>[-cached]. Next: evaluate.py.
"""
import argparse
import itertools
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import augment
import baselines
import checkpoint
import data
import ddp
from baselines import CLASSIFICATION, LOSSES, NormedLinear, weight_and_bias
from resnet import ARCHS, load_backbone

LR_GRID = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]  # 0.1 is usual for CE features, 30 is MoCo's for contrastive ones

# Defaults by kind of data and by the backbone's loss, classification or contrastive. Flags override them. With a
# validation list, which chooses from LR_GRID, lr only breaks ties.
COMMON = dict(schedule="cosine", weight_decay=[0.0], workers=data.workers_per_rank())
PHOTOS = dict(COMMON, batch=256, aug="sup")
CIFAR = dict(COMMON, batch=128, aug="cifar", epochs=30)
DIGITS = dict(COMMON, batch=64, aug="affine", epochs=15, workers=0)
DEFAULTS = {
    ("photos", "classification"): dict(PHOTOS, lr=[0.1], epochs=10, weight_decay=[5e-4]),
    ("photos", "contrastive"): dict(PHOTOS, lr=[30.0], epochs=100, schedule="step"),
    ("cifar", "classification"): dict(CIFAR, lr=[0.1]),
    ("cifar", "contrastive"): dict(CIFAR, lr=[0.1]),                      # chosen on val: results/findings.md
    ("digits", "classification"): dict(DIGITS, lr=[0.1]),
    ("digits", "contrastive"): dict(DIGITS, lr=[1.0]),
}


def parse_args():
    """The flags, and the list that the backbone was trained on: None if unknown, or if it was in another --data."""
    table = "".join(f"  {kind}, {loss}: {row}\n" for (kind, loss), row in DEFAULTS.items())
    p = argparse.ArgumentParser(description=__doc__, epilog=f"defaults by data and loss:\n{table}",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("backbone", help="backbone.pt of train_rep.py, or another ResNet's checkpoint")
    p.add_argument("--protocol", choices=("lt", "rep"), default="lt", help="default %(default)s")
    p.add_argument("--features", choices=("streamed", "cached"), default="streamed",
                   help="default %(default)s")
    p.add_argument("--classifier", choices=("linear", "lws", "ldam"), default="linear",
                   help="default %(default)s")
    # the backbone: by default what the log.jsonl next to it says
    p.add_argument("--arch", choices=tuple(ARCHS), metavar="ARCH",
                   help="default: the backbone's; add your own to ARCHS in resnet.py")
    p.add_argument("--dataset", choices=tuple(data.DATASETS),
                   help="default: the backbone's. For your own images: folder, which becomes small or "
                        "small64 if they have at most 64 px. It sets size, mean and std of the images, "
                        "which must be those of the backbone's training: see DATASETS in data.py")
    p.add_argument("--data",
                   help="the folder that the lists' paths start from; default: the backbone's")
    p.add_argument("--loss", choices=("kcl", "cl", "fcl", *LOSSES), metavar="LOSS",
                   help="loss of the backbone; it selects the defaults listed below")
    # data
    p.add_argument("--list", help="training list; default: the backbone's for lt, balanced for rep")
    p.add_argument("--val", help="list that chooses a classifier, or none; default: the data set's")
    p.add_argument("--sampler", choices=("instance", "class", "sqrt", "progressive"),
                   help="default: class for lt, instance for rep")
    p.add_argument("--aug", choices=augment.AUGMENTATIONS, help="augmentation of streamed features")
    p.add_argument("--workers", type=int, help="data workers per rank")
    # optimisation
    p.add_argument("--lr", type=float, nargs="+", help=f"default {LR_GRID}; --val none: see below")
    p.add_argument("--epochs", type=int, help="epochs over the training list")
    p.add_argument("--schedule", choices=("cosine", "step"),
                   help="step: x0.1 at 60 and 80 %% of the epochs")
    p.add_argument("--weight-decay", type=float, nargs="+", help="see below")
    p.add_argument("--batch", type=int, help="images per step, over all ranks")
    p.add_argument("--seed", type=int, default=0, help="seed of weights and draws; default 0")
    # the run
    p.add_argument("--out", type=Path, help="default: see above, or runs/ for a foreign backbone")
    p.add_argument("--tensorboard", action="store_true", help="also log to OUT/tensorboard")
    p.add_argument("--restart", action="store_true",
                   help="delete this stage's files in --out and start over; by default the run resumes")
    args = p.parse_args()

    # the backbone's settings: without a flag, they come from the log of its run
    run = checkpoint.settings_of(args.backbone)
    for name in ("arch", "dataset", "data", "loss"):
        if getattr(args, name) is None:
            setattr(args, name, run.get(name))
    missing = [f"--{name}" for name in ("arch", "dataset", "data") if getattr(args, name) is None]
    if missing:
        sys.exit(f"error: no log.jsonl next to {args.backbone}; pass {' and '.join(missing)}")
    args.data = str(Path(args.data))  # without a trailing slash
    if args.dataset == "folder" and run.get("dataset") != "folder":       # else train_rep.py has looked at the images
        paths, _ = data.read_list(args.data, args.list or run.get("list") or data.LISTS["train"])
        args.dataset = data.small_dataset(args.data, paths) or "folder"

    # the lists; if the backbone saw only half of the classes, its list has siblings for that half
    spec = data.DATASETS[args.dataset]
    backbone_list = run.get("list") if args.data == run.get("data") else None
    if backbone_list:
        checkpoint.same_list(run)
    if args.protocol == "rep":
        args.list = args.list or data.sibling_list(args.data, backbone_list or "", spec["full"])
    args.list = args.list or backbone_list or spec["train"]
    args.val = args.val or data.sibling_list(args.data, args.list, spec["val"])
    args.sampler = args.sampler or {"lt": "class", "rep": "instance"}[args.protocol]

    # the hyper-parameters: without a flag, they come from the table
    if args.lr is None and args.val != "none":
        args.lr = LR_GRID
    kind, family = row_of_defaults(args)
    for name, value in DEFAULTS[kind, family].items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    folder = f"{args.classifier}-{args.protocol}"
    if args.features == "cached":
        args.aug = None
        folder += "-cached"
    parent = Path(args.backbone).parent if run else Path("runs", Path(args.backbone).stem)
    args.out = args.out or parent / folder

    loss = args.loss or "unknown: if it is contrastive, pass --loss cl"
    ddp.print0(f"{args.protocol} on {args.list}, {args.sampler} sampling, with the settings for a "
               f"{family} loss (the backbone's is {loss}): {args.epochs} epochs, "
               f"{args.schedule}, weight decay {args.weight_decay}; images of {spec['pixels']} px, "
               f"mean {spec['mean']}, std {spec['std']}")
    return args, backbone_list


def row_of_defaults(args):
    """The key into DEFAULTS: the kind of data and the kind of the backbone's loss."""
    family = "classification" if args.loss in (None, *CLASSIFICATION) else "contrastive"
    return data.DATASETS[args.dataset]["kind"], family


class ScaledHead(nn.Module):
    """LWS (Kang et al. 2020, sec. 4): the head that was trained with the backbone, weight (C, D) and bias (C,), stays
    fixed. One scale per class (C,) is learned and starts at 1. It scales the bias too, as in the authors' code."""

    def __init__(self, weight, bias):
        super().__init__()
        self.register_buffer("joint_weight", weight)
        self.register_buffer("joint_bias", bias)
        self.scale = nn.Parameter(torch.ones(len(bias)))

    @property
    def weight(self):
        return self.joint_weight * self.scale[:, None]

    @property
    def bias(self):
        return self.joint_bias * self.scale

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Heads(nn.ModuleList):
    """M classifiers on the same features, (B, D) -> [(B, C)] * M. One matmul for all would round differently from M
    separate ones, and a large learning rate amplifies that."""

    def forward(self, x):
        return [head(x) for head in self]


def linear_heads(M, D, C, cosine=False):
    """M linear classifiers that start with the same weights, normal with standard deviation 0.01 as in MoCo's linear
    protocol, and zero biases. cosine: LDAM's cosine classifiers instead, which also start alike."""
    if cosine:
        heads = Heads(NormedLinear(D, C) for _ in range(M))
        for head in heads:
            head.weight.data.copy_(heads[0].weight)
        return heads
    weight = torch.randn(C, D) * 0.01
    heads = Heads(nn.Linear(D, C) for _ in range(M))
    for head in heads:
        nn.init.zeros_(head.bias)
        head.weight.data.copy_(weight)
    return heads


def learning_rate(base, schedule, t):
    """The rate at t = epoch / epochs. cosine reaches 0 after the last epoch; step is MoCo's, x0.1 at 60 and 80 %."""
    if schedule == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * t))
    return base * 0.1 ** ((t >= 0.6) + (t >= 0.8))


def choose(heads, pairs, features, labels, args):
    """The index of the classifier with the best top-1 on the validation features (N, D), that top-1, and the reason in
    words. If several tie, the learning rate in DEFAULTS wins, then the smallest one, then the smallest weight decay."""
    hits = [(head(features).argmax(1) == labels).sum() for head in heads]
    top1 = [(n / len(labels)).item() for n in hits]
    cells = [f"{100 * x:.1f} (lr {lr:g}, weight decay {decay:g})"
             for x, (lr, decay) in zip(top1, pairs)]
    ddp.print0(f"top-1 on {args.val}: {', '.join(cells)}")

    usual = DEFAULTS[row_of_defaults(args)]
    tied = [m for m, x in enumerate(top1) if x == max(top1)]
    best = min(tied, key=lambda m: (pairs[m][0] not in usual["lr"], pairs[m]))
    if len(tied) > 1:
        return best, top1[best], f"chosen on {args.val}, a tie of {len(tied)}"
    if len(args.lr) > 1 and pairs[best][0] in (min(args.lr), max(args.lr)):
        ddp.print0(f"lr {pairs[best][0]:g} is at the end of the grid; one beyond it may do better")
    return best, top1[best], f"chosen on {args.val}"


def save_results(args, header, counts_of, classifier, chosen, val_top1):
    """Write head.pt, which marks the run as finished."""
    weight, bias = weight_and_bias(classifier)
    counts = data.read_list(args.data, counts_of)[1].bincount(minlength=len(bias))
    protocol = args.protocol + ", cached features" * (args.features == "cached")
    spec, backbone = data.DATASETS[args.dataset], Path(args.backbone).resolve()
    checkpoint.save({
        "weight": weight, "bias": bias,
        "backbone": os.path.relpath(args.backbone, args.out),
        "backbone_sha256": header["settings"]["backbone_sha256"],
        "arch": args.arch, "dataset": args.dataset, "data": args.data, "list": args.list,
        "counts": counts.tolist(), "counts_of": counts_of,
        "list_sha256": checkpoint.sha256(data.find_list(args.data, counts_of)),
        "class_names": data.class_names(args.data, args.list),
        "name": backbone.parent.name if backbone.name == "backbone.pt" else backbone.stem,
        "seed": checkpoint.settings_of(args.backbone).get("seed", args.seed),
        "chosen": chosen, "val_top1": val_top1,
        "protocol": f"{protocol}: {args.classifier} on {args.list}, {args.sampler} sampling, "
                    f"{args.epochs} epochs",
        **{name: spec[name] for name in ("mean", "std", "pixels", "resize")}},
        args.out / "head.pt")
    (args.out / "ckpt.pt").unlink(missing_ok=True)
    print(f"wrote {args.out / 'head.pt'} ({chosen})")


def main():
    device = ddp.init()
    args, backbone_list = parse_args()
    spec = data.DATASETS[args.dataset]
    cached = args.features == "cached"

    # data
    dataset = data.ImageList(args.data, args.list, spec, args.aug)
    draws = data.Draws(dataset.labels, args.sampler, args.batch, args.epochs, args.seed)
    counts, steps = draws.counts, len(dataset) // args.batch
    if args.protocol == "rep" and counts.max() > 2 * counts.min():  # ImageNet has 732 to 1,300
        ddp.print0(f"{args.list} is not balanced, so beta does not describe the features alone")

    # many / medium / few count the images of the backbone's list, unless it has other classes
    counts_of = args.list
    if backbone_list and Path(backbone_list).parent == Path(args.list).parent:
        counts_of = backbone_list
    class_names = data.class_names(args.data, args.list)
    data.refuse_other_classes(class_names, args.data, counts_of)

    # one classifier per pair; if there are several, choose one on images that were never trained on
    pairs = list(itertools.product(args.lr, args.weight_decay))           # M of them
    ddp.print0(f"training {len(pairs)} classifier(s) side by side, on {device.type}")
    val = None
    if len(pairs) > 1:
        if args.val == "none":
            sys.exit("error: several classifiers need a --val list that chooses one; or pass one --lr "
                     "and one --weight-decay")
        for trained_on in {args.list, backbone_list or args.list}:
            data.refuse_overlap(args.data, trained_on, args.val)
        data.refuse_other_classes(class_names, args.data, args.val)
        val = data.ImageList(args.data, args.val, spec)
        if val.labels.max() >= len(counts):
            sys.exit(f"error: {args.val} has labels up to {val.labels.max()}, "
                     f"{args.list} only up to {len(counts) - 1}")

    # resume, if --out holds a checkpoint
    header = checkpoint.header(args, backbone_list=backbone_list,
                               list_sha256=checkpoint.sha256(data.find_list(args.data, args.list)),
                               backbone_sha256=checkpoint.sha256(args.backbone))
    ckpt = checkpoint.resume(args.out, header["settings"], "head.pt", args.restart)
    begin = ckpt["epoch"] if ckpt else 0

    # the frozen backbone: eval() stops BatchNorm's statistics, which requires_grad_(False) would not do
    backbone = load_backbone(args.backbone, args.arch).to(device, memory_format=torch.channels_last)
    backbone.eval().requires_grad_(False)
    before = {name: x.clone() for name, x in backbone.state_dict().items()}

    def encode(images):                                                   # (b, 3, H, W) uint8 -> (b, D)
        return backbone(data.normalize(images, spec["mean"], spec["std"], device))

    D = encode(torch.zeros(1, 3, spec["pixels"], spec["pixels"])).shape[1]

    def features_of(images):                                              # a list -> (N, D)
        return data.encode_all(encode, images, D, args.batch, args.workers, device)

    # the classifiers: each has its own parameter group, since SGD takes one lr and one weight decay per group
    torch.manual_seed(args.seed)
    if args.classifier == "lws":
        joint = checkpoint.read_head(Path(args.backbone).with_name("head.pt"))
        if len(joint["weight"]) != len(counts):
            sys.exit(f"error: the joint head has {len(joint['weight'])} classes, {args.list} has {len(counts)}")
        heads = Heads(ScaledHead(joint["weight"], joint["bias"]) for _ in pairs)
    else:
        heads = linear_heads(len(pairs), D, len(counts), cosine=args.classifier == "ldam")
    net = ddp.wrap(heads.to(device))
    groups = [{"params": head.parameters(), "weight_decay": decay}
              for head, (_, decay) in zip(heads, pairs)]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
    if ckpt:
        heads.load_state_dict(ckpt["heads"])
        optimizer.load_state_dict(ckpt["optimizer"])
        ddp.print0(f"{args.out}: resuming after epoch {begin} of {args.epochs}")

    # encode the features, either all at once or batch by batch below
    if cached:
        cache, cache_labels = features_of(dataset), dataset.labels.to(device)
    else:
        loader = data.train_loader(dataset, draws, args.workers, device)

    # train
    if ddp.rank() == 0:
        log = checkpoint.open_log(args.out, header, begin * steps or None, args.tensorboard)
    bar = tqdm(range(begin, args.epochs), desc=str(args.out), unit="epoch",
               disable=ddp.rank() > 0 or None)                            # None hides it outside a terminal
    ldam_drw = argparse.Namespace(loss="ldam", drw=True, epochs=args.epochs)
    saved = time.time()
    for epoch in bar:
        draws.set_epoch(epoch)
        for group, (lr, _) in zip(optimizer.param_groups, pairs):
            group["lr"] = learning_rate(lr, args.schedule, epoch / args.epochs)
        total, since = torch.zeros(len(pairs), device=device), time.time()
        criterion = F.cross_entropy
        if args.classifier == "ldam":
            criterion = baselines.criterion(ldam_drw, heads, counts, epoch)

        if cached:
            index = draws.of_this_rank(0)[:, 0].to(device)
            batches = ((cache[i], cache_labels[i]) for i in index.split(draws.per_rank))
        else:
            batches = ((encode(view), labels) for (view,), labels, _ in loader)
        for features, labels in batches:                                  # (b, D), (b,)
            labels = labels.to(device, non_blocking=True)
            losses = torch.stack([criterion(z, labels) for z in net(features)])           # (M,)
            optimizer.zero_grad()
            losses.sum().backward()  # each head gets the gradient of its own loss only
            optimizer.step()
            total += losses.detach()

        torch.distributed.all_reduce(total)
        if ddp.rank() == 0:
            line = {"epoch": epoch, "step": (epoch + 1) * steps,
                    "lr": [group["lr"] for group in optimizer.param_groups],
                    "weight_decay": [group["weight_decay"] for group in optimizer.param_groups],
                    "loss": (total / steps / ddp.world()).tolist(),
                    "images_per_s": steps * args.batch / (time.time() - since)}
            log(line)
            if bar.disable:  # nohup, Slurm
                losses = " ".join(f"{loss:.3f}" for loss in line["loss"])
                print(f"epoch {epoch + 1} of {args.epochs}: loss {losses}", flush=True)
            if time.time() - saved >= checkpoint.SAVE_EVERY:
                checkpoint.save({"epoch": epoch + 1, "heads": heads.state_dict(),
                                 "optimizer": optimizer.state_dict()}, args.out / "ckpt.pt")
                saved = time.time()

    after = backbone.state_dict()
    changed = [name for name, x in before.items() if not torch.equal(x, after[name])]
    assert not changed, f"the frozen backbone changed: {changed}"

    # choose among the classifiers
    best, val_top1, reason = 0, None, "given"
    if val:
        best, val_top1, reason = choose(heads, pairs, features_of(val), val.labels.to(device), args)
    lr, decay = pairs[best]
    if not heads[best].weight.isfinite().all():
        sys.exit(f"error: the classifier is not finite with lr {lr:g}; try a smaller --lr")
    if ddp.rank() == 0:
        chosen = f"lr {lr:g}, weight decay {decay:g} {reason}"
        save_results(args, header, counts_of, heads[best], chosen, val_top1)
        log({"step": args.epochs * steps, "lr": lr, "weight_decay": decay, "val_top1": val_top1})


if __name__ == "__main__":
    ddp.run(main)
