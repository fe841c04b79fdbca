"""
Stage 2: train a linear classifier on the frozen features of a backbone.

    python train_linear.py runs/digits-lt-kcl-seed0/backbone.pt                   # long-tailed recognition: Tables 2, 3
    python train_linear.py runs/digits-lt-kcl-seed0/backbone.pt --protocol rep    # representation evaluation, Figs 2-4
    torchrun --nproc_per_node=8 train_linear.py runs/imagenet-ImageNet_LT_train-kcl-seed0-8ranks/backbone.pt

lt:  the long-tailed list that the backbone was trained on, with class-balanced sampling; on a CE backbone this is cRT.
rep: the full, balanced training list, every image once an epoch.
--classifier lws learns one scale a class for the joint head beside the backbone, in place of a new classifier: Kang et
al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, sec. 4.3.
Every pair of a --lr (by default those of LR_GRID) and a --weight-decay is a classifier; all are trained side by side on
one stream of features, each as it would be alone, and the validation list chooses; the test list is not touched.
--features cached encodes every image once, not augmented, and trains on the features that it keeps: for curves and
sweeps. It is not the paper's protocol, which augments anew in each epoch: its results say "cached features" everywhere.
Writes head.pt and log.jsonl to <folder of the backbone>/<classifier>-<protocol>[-cached]; what comes next: evaluate.py.
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

import checkpoint
import data
import ddp
from baselines import CONTRASTIVE
from checkpoint import Stop, need_tensorboard, open_log, read_head, save, settings_of
from ddp import InputError
from resnet import ARCHS, load_backbone

LR_GRID = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)  # 0.1 is usual for CE features, 30 is MoCo's for contrastive ones

# The paper's second stage (sec. 3.1) by kind of data set and backbone (trained on logits, or contrastive); the digits'
# is one for both, so that none is favoured. lr where the data set has no validation list that could choose.
SETTINGS = {
    "photos": {"logits": dict(epochs=10, schedule="cosine", weight_decay=5e-4, batch=256, aug="sup", lr=0.1,
                              workers=min(8, os.cpu_count())),
               "contrastive": dict(epochs=100, schedule="step", weight_decay=0.0, batch=256, aug="sup", lr=30.0,
                                   workers=min(8, os.cpu_count()))},
    "cifar": {kind: dict(epochs=30, schedule="cosine", weight_decay=0.0, batch=128, aug="cifar", lr=lr,
                         workers=min(8, os.cpu_count())) for kind, lr in (("logits", 0.1), ("contrastive", 30.0))},
    "digits": {kind: dict(epochs=15, schedule="cosine", weight_decay=0.0, batch=64, aug="affine", lr=lr, workers=0)
               for kind, lr in (("logits", 0.1), ("contrastive", 1.0))},
}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("backbone", help="backbone.pt of train_rep.py, or another ResNet's checkpoint")
    p.add_argument("--protocol", choices=("lt", "rep"), default="lt", help="which list and sampler: see above")
    p.add_argument("--features", choices=("streamed", "cached"), default="streamed",
                   help="cached is another protocol than the paper's: see above")
    p.add_argument("--classifier", choices=("linear", "lws"), default="linear", help="see above")
    # what the log beside the backbone knows; needed for a backbone from elsewhere
    p.add_argument("--arch", choices=tuple(ARCHS))
    p.add_argument("--dataset", choices=tuple(data.DATASETS))
    p.add_argument("--data", help="the folder that the lists' paths start from")
    # data
    p.add_argument("--list", help="training list of the classifier; default by --protocol")
    p.add_argument("--val", help="validation list, which chooses learning rate and weight decay")
    p.add_argument("--sampler", choices=("instance", "class", "sqrt", "progressive"), help="default by --protocol")
    p.add_argument("--aug", choices=tuple(data.AUGMENTATIONS), help="sup, CIFAR cifar, digits affine")
    p.add_argument("--workers", type=int, help="data workers of each rank; digits and CIFAR by default need none")
    # optimisation
    p.add_argument("--lr", type=float, nargs="+", help=f"one, or several for --val to choose from; default {LR_GRID}; "
                   "without a --val 0.1, contrastive 30")
    p.add_argument("--epochs", type=int, help="100, for losses on logits and unknown backbones 10; CIFAR 30; digits 15")
    p.add_argument("--schedule", choices=("cosine", "step"), help="per epoch; step = x0.1 at 60 %% and 80 %%")
    p.add_argument("--weight-decay", type=float, nargs="+", help="one, or several for --val to choose from; default 0, "
                   "photographs after losses on logits, or unknown ones, 5e-4")
    p.add_argument("--batch", type=int, help="images a step over all ranks together: 256, CIFAR 128, digits 64")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--tensorboard", action="store_true", help="the log also as scalars, in OUT/tensorboard")
    p.add_argument("--restart", action="store_true", help="throw away what an interrupted run left in --out; else it "
                   "goes on from there")
    p.add_argument("--override", action="store_true", help="go on with other settings than it began with")
    p.add_argument("--out", help="default: <folder of the backbone>/<classifier>-<protocol>[-cached]")
    args = p.parse_args()

    if args.tensorboard:
        need_tensorboard()
    if not Path(args.backbone).is_file():
        raise InputError(f"{args.backbone}: no such file; expected a backbone.pt, which train_rep.py writes")
    run = settings_of(args.backbone)
    for name in ("arch", "dataset", "data"):
        if getattr(args, name) is None:
            setattr(args, name, run.get(name))
    if None in (args.arch, args.dataset, args.data):
        raise InputError(f"no log.jsonl of train_rep.py beside {args.backbone}; say --arch, --dataset and --data")
    spec = data.DATASETS[args.dataset]
    # what the backbone saw: its class sizes make many / medium / few, if the classifier's images are of the same set
    args.data = str(Path(args.data))
    args.rep_list = run.get("list") if args.data == run.get("data") else None
    if args.rep_list and data.sha256(data.find_list(args.data, args.rep_list)) != run["list_sha256"]:
        raise InputError(f"{args.rep_list} in {args.data} is not the list that {args.backbone} was trained on, but "
                         "another of that name; train the backbone again")
    full = data.beside(args.data, args.rep_list or "", spec["full"])
    args.list = args.list or (full if args.protocol == "rep" else args.rep_list or spec["train"])
    args.val = args.val or data.beside(args.data, args.list, spec["val"])
    args.sampler = args.sampler or ("instance" if args.protocol == "rep" else "class")
    if args.list == "none":
        raise InputError(f"--dataset {args.dataset} has no balanced training list for --protocol rep; name one with "
                         "--list")
    if args.lr is None and args.val != "none":
        args.lr = list(LR_GRID)
    settings = SETTINGS[spec["kind"]]["contrastive" if run.get("loss") in CONTRASTIVE else "logits"]
    cached = args.features == "cached"
    if cached and args.aug:
        raise InputError("--features cached encodes every image once, not augmented; leave out one of it and --aug "
                         f"{args.aug}")
    args.in_memory = (not cached and args.workers is None and spec["kind"] != "photos" and
                      (args.aug or settings["aug"]) in data.BATCHED)
    for name, value in settings.items():
        if getattr(args, name) is None:
            setattr(args, name, [value] if name in ("lr", "weight_decay") else value)
    args.aug = None if cached else args.aug
    if min(*args.lr, args.epochs, args.batch) <= 0 or min(args.workers, *args.weight_decay) < 0:
        raise InputError("--lr, --epochs and --batch must be above 0, --workers and --weight-decay 0 or more")
    if len(args.lr) * len(args.weight_decay) > 1 and args.val == "none":
        raise InputError("without a validation list nothing can choose among several learning rates or weight decays; "
                         "give one --lr and one --weight-decay")
    args.out = Path(args.out or Path(args.backbone).parent /
                    f"{args.classifier}-{args.protocol}{'-cached' if cached else ''}")
    if args.classifier == "lws" and not Path(args.backbone).with_name("head.pt").is_file():
        raise InputError(f"--classifier lws scales the joint head beside {args.backbone}, but there is no head.pt; "
                         "expected a run of train_rep.py --loss ce")
    return args


class ScaledHead(nn.Module):
    """LWS: a fixed joint head, weight (C, D) and bias (C,), times one learned scale a class (C,) that starts at 1. The
    bias is scaled too, as in the authors' code."""

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
    """M classifiers on the same features: (B, D) -> [(B, C)] * M. Each trains as it would alone, to the bit, since its
    matmuls are those of one classifier: one for all M would round otherwise, which a large learning rate blows up."""

    def forward(self, x):
        return [head(x) for head in self]


def linear_heads(M, D, C):
    """M linear classifiers with one start for all: weights ~ N(0, 0.01), as MoCo's linear protocol, biases 0."""
    weight = torch.randn(C, D) * 0.01
    heads = Heads(nn.Linear(D, C) for _ in range(M))
    for head in heads:
        nn.init.zeros_(head.bias)
        head.weight.data.copy_(weight)
    return heads


class Cached:
    """The batches of data.train_loader with features (b, D) in the place of images, each image encoded once.

    Each rank encodes its share and holds all rows, so that it can draw any: what is drawn does not depend on the number
    of ranks. 115,846 x 2048 x 4 B = 0.95 GB a rank for ImageNet-LT with a ResNet-50, 11 times that for all of ImageNet.
    """

    @torch.no_grad()
    def __init__(self, encode, dataset, draws, workers, device):
        """encode: uint8 (b, 3, H, W) -> (b, D); dataset: an ImageList with the center transform."""
        self.draws, self.labels, self.batch = draws, dataset.labels.to(device), draws.batch // ddp.world()
        self.features, images = None, data.eval_loader(dataset, self.batch, workers)
        for (view,), _, index in tqdm(images, desc=f"features of {dataset.name}", disable=ddp.rank() > 0, leave=False):
            x = encode(view)
            if self.features is None:
                self.features = x.new_zeros(len(dataset), x.shape[1])
            self.features[index.to(device)] = x
        torch.distributed.all_reduce(self.features)                       # a row is one rank's, and 0 on the others

    def __len__(self):
        return len(self.draws) // self.batch

    def __iter__(self):
        index = torch.tensor([i for i, _ in self.draws], device=self.labels.device)
        for i in index.split(self.batch):
            yield [self.features[i]], self.labels[i], i


def learning_rate(base, schedule, t):
    """At t = epoch / epochs; cosine reaches 0 after the last epoch, step is MoCo's 60 and 80 of 100."""
    return base * (0.5 * (1 + math.cos(math.pi * t)) if schedule == "cosine" else 0.1 ** ((t >= 0.6) + (t >= 0.8)))


def end_of_grid(lr, grid):
    """A sentence where the chosen lr is the smallest or the largest of several, so that the best may lie outside."""
    if min(grid) < lr == max(grid):
        return (f"lr {lr:g} is the largest of the grid: a larger one may do better; try --lr {lr:g} {lr / 0.3:.3g} "
                f"{lr / 0.1:.3g} too")
    if min(grid) == lr < max(grid):
        return (f"lr {lr:g} is the smallest of the grid: a smaller one may do better; try --lr {lr * 0.1:.3g} "
                f"{lr * 0.3:.3g} {lr:g} too")


def main():
    device = ddp.init()
    args = parse_args()
    spec = data.DATASETS[args.dataset]

    # data
    center = data.center(spec["pixels"], spec["resize"])
    cached = args.features == "cached"
    dataset = data.ImageList(args.data, args.list, center if cached or args.in_memory else
                             data.augmentation(args.aug, spec["pixels"]))
    draws = data.Draws(dataset.labels, args.sampler, args.batch, args.epochs, args.seed)
    counts = data.class_counts(dataset.labels)
    C, counts_of = len(counts), args.list
    if args.classifier == "lws":
        joint = read_head(Path(args.backbone).with_name("head.pt"))
        if len(joint["weight"]) != C:
            raise InputError(f"the head.pt beside {args.backbone} has {len(joint['weight'])} classes, {args.list} {C}")
    if args.rep_list and args.rep_list != args.list:
        rep_counts = data.class_counts(data.read_list(args.data, args.rep_list)[1])
        # else the classifier is for other classes than the backbone's: all of them, or the other half of a class split
        if len(rep_counts) == C and Path(args.rep_list).parent == Path(args.list).parent:
            counts, counts_of = rep_counts, args.rep_list
    pairs = list(itertools.product(args.lr, args.weight_decay))           # one classifier each
    val = None
    if len(pairs) > 1:
        data.refuse_overlap(args.data, args.list, args.val)
        val = data.ImageList(args.data, args.val, center)
        data.refuse_labels_outside(val, C, "the training list")

    # model
    backbone = load_backbone(args.backbone, args.arch).to(device, memory_format=torch.channels_last)
    backbone.eval().requires_grad_(False)
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    image = torch.zeros(1, 3, spec["pixels"], spec["pixels"], device=device)
    torch.manual_seed(args.seed)
    D = backbone(image).shape[1]
    if args.classifier == "lws":
        if joint["weight"].shape[1] != D:
            raise InputError(f"the head.pt beside {args.backbone} is for {joint['weight'].shape[1]} features, not {D}")
        heads = Heads(ScaledHead(joint["weight"], joint["bias"]) for _ in pairs).to(device)
    else:
        heads = linear_heads(len(pairs), D, C).to(device)
    net = ddp.wrap(heads)
    optimizer = torch.optim.SGD([{"params": head.parameters(), "weight_decay": weight_decay}
                                 for head, (_, weight_decay) in zip(heads, pairs)], momentum=0.9, lr=0.0, fused=True)

    def encode(view):
        return backbone(data.normalize(view, spec["mean"], spec["std"], device))

    # resume, or begin
    first_epoch, first_step, total = 0, 0, torch.zeros(len(heads), device=device)
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    settings |= {"list_sha256": data.sha256(data.find_list(args.data, args.list)),
                 "backbone_sha256": data.sha256(args.backbone)}
    ddp.print0("settings: " + ", ".join(f"{name}={v}" for name, v in settings.items()))
    free = {"out", "workers", "restart", "override", "tensorboard"}
    if not args.restart and (ckpt := checkpoint.load(args.out, settings, free, args.override, device)):
        with checkpoint.fitting(args.out):
            heads.load_state_dict(ckpt["heads"])
            optimizer.load_state_dict(ckpt["optimizer"])
            first_epoch, first_step, total = ckpt["epoch"], ckpt["step"], ckpt["total"].to(device)
        ddp.print0(f"{args.out}: going on after epoch {first_epoch} of {args.epochs}, step {first_step}")
    loader = (Cached(encode, dataset, draws, args.workers, device) if cached else
              data.InMemory(dataset, draws, args.aug, 1, device) if args.in_memory else
              data.train_loader(dataset, draws, args.workers))
    steps = len(loader)
    done = first_epoch * steps + first_step
    if ddp.rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        if not done:
            checkpoint.remove(args.out, "head.pt", "eval.json")  # of an earlier classifier
        log = open_log(args.out, {"command": " ".join(["train_linear.py", *sys.argv[1:]]), "settings": settings,
                                  "world": ddp.world(), "torch": torch.__version__}, done or None, args.tensorboard)

    def save_checkpoint(epoch, step):
        """After so many whole epochs and steps of the next one."""
        if ddp.rank() == 0:
            checkpoint.save_checkpoint({
                "epoch": epoch, "step": step, "total": total, "heads": heads.state_dict(),
                "optimizer": optimizer.state_dict(), "settings": settings}, args.out)

    # train
    stop = Stop()
    for epoch in tqdm(range(first_epoch, args.epochs), desc=str(args.out), unit="epoch", disable=ddp.rank() > 0,
                      mininterval=1):
        draws.set_epoch(epoch, first_step)
        since, since_step = time.time(), first_step
        for group, (lr, _) in zip(optimizer.param_groups, pairs):
            group["lr"] = learning_rate(lr, args.schedule, epoch / args.epochs)
        for step, ((view,), labels, _) in enumerate(loader, first_step + 1):
            with torch.no_grad():
                features = view if cached else encode(view)               # (b, D)
            labels = labels.to(device)
            losses = torch.stack([F.cross_entropy(logits, labels) for logits in net(features)])  # (M,)
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            total += losses.detach()
            if (step % 10 == 0 or ddp.world() == 1) and step < steps and (number := stop.asked()):
                save_checkpoint(epoch, step)
                stop.leave(number, args.out)
        torch.distributed.all_reduce(total)
        if ddp.rank() == 0:
            log({"epoch": epoch, "step": (epoch + 1) * steps, "lr": [g["lr"] for g in optimizer.param_groups],
                 "weight_decay": [g["weight_decay"] for g in optimizer.param_groups],
                 "loss": (total / steps / ddp.world()).tolist(),
                 "images_per_s": (steps - since_step) * args.batch / (time.time() - since)})
        first_step, total = 0, torch.zeros_like(total)
        save_checkpoint(epoch + 1, 0)
        if number := stop.asked():
            stop.leave(number, args.out)

    # choose on val
    best, val_top1 = 0, None
    if val is not None:
        correct = torch.zeros(len(heads), device=device)
        with torch.no_grad():
            for (view,), labels, _ in data.eval_loader(val, args.batch, args.workers):
                features = encode(view)
                correct += torch.stack([(logits.argmax(1) == labels.to(device)).sum() for logits in heads(features)])
        torch.distributed.all_reduce(correct)
        top1 = (correct / len(val)).tolist()
        best = max(range(len(heads)), key=lambda i: (top1[i], -pairs[i][0], -pairs[i][1]))
        val_top1 = top1[best]
        for i, weight_decay in enumerate(args.weight_decay):
            ddp.print0(f"val top-1, weight decay {weight_decay:g}: " + ", ".join(
                f"lr {lr:g}: {100 * a:.1f}" for lr, a in zip(args.lr, top1[i::len(args.weight_decay)])))
    moved = [name for name, x in backbone.state_dict().items() if not torch.equal(x, before[name])]
    if moved:
        raise RuntimeError(f"the frozen backbone changed: {moved[0]} and {len(moved) - 1} more tensors")

    lr, weight_decay = pairs[best]
    if not all(x.isfinite().all() for x in heads[best].parameters()):
        raise InputError(f"the loss is not finite with learning rate {lr:g}; try a smaller --lr")
    if sentence := end_of_grid(lr, args.lr):
        ddp.print0(sentence)

    if ddp.rank() == 0:
        chosen_by = f"chosen on {args.val}" if val is not None else "given"
        head = {"weight": heads[best].weight.detach().cpu().clone(), "bias": heads[best].bias.detach().cpu().clone(),
                "backbone": os.path.relpath(args.backbone, args.out),
                "backbone_sha256": data.sha256(args.backbone),
                "arch": args.arch, "dataset": args.dataset, "data": args.data,
                "list": args.list, "counts": counts.tolist(), "counts_of": counts_of,
                "list_sha256": data.sha256(data.find_list(args.data, counts_of)),
                "name": Path(args.backbone).resolve().parent.name,
                "protocol": f"{args.protocol}{', cached features' if cached else ''}: {args.classifier} on "
                            f"{args.list}, {args.sampler} sampling, {args.epochs} epochs",
                "chosen": f"lr {lr:g}, weight decay {weight_decay:g} {chosen_by}", "val_top1": val_top1,
                **{name: spec[name] for name in ("mean", "std", "pixels", "resize")}}
        save(head, args.out / "head.pt")
        checkpoint.remove(args.out)  # the classifier is there; the same command trains it anew
        log({"lr": lr, "weight_decay": weight_decay, "val_top1": val_top1})
        print(f"classifier in {args.out / 'head.pt'} ({head['protocol']}, {head['chosen']})")


if __name__ == "__main__":
    ddp.run(main)
