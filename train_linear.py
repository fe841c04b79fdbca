"""
Stage 2: train a linear classifier on the frozen features of a backbone.

    python train_linear.py runs/digits-lt-kcl-seed0/backbone.pt                   # long-tailed recognition: Tables 2, 3
    python train_linear.py runs/digits-lt-kcl-seed0/backbone.pt --protocol rep    # representation evaluation: Figs 2-4
    torchrun --nproc_per_node=8 train_linear.py runs/imagenet-ImageNet_LT_train-kcl-seed0-8ranks/backbone.pt
    python train_linear.py moco_v2_800ep.pth.tar --loss cl --arch resnet50 --dataset imagenet --data X

lt:  the long-tailed list of the backbone, with class-balanced sampling. On a CE backbone this is cRT.
rep: the full, balanced list, every image once an epoch.
--classifier lws learns one scale a class for the joint head beside the backbone, in place of a new classifier.
--features cached encodes each image once, not augmented: for curves and sweeps. The paper augments anew in each epoch.

Every pair of a --lr and a --weight-decay is a classifier. All train side by side on one stream of features, each as it
would alone, and the validation list chooses one. The test list is not touched.
Writes head.pt and log.jsonl to <folder of the backbone>/<classifier>-<protocol>[-cached]. Next: evaluate.py.
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
from baselines import CLASSIFICATION, LOSSES
from resnet import ARCHS, load_backbone

LR_GRID = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]  # 0.1 is usual for CE features, 30 is MoCo's for contrastive ones

# By kind of data set and of features: CE stands for all losses on logits. lr: with --val none; else LR_GRID.
DEFAULTS = {
    ("photos", "CE"): dict(epochs=10, schedule="cosine", weight_decay=[5e-4], batch=256, aug="sup", lr=[0.1]),
    ("photos", "contrastive"): dict(epochs=100, schedule="step", weight_decay=[0.0], batch=256, aug="sup", lr=[30.0]),
    ("cifar", "CE"): dict(epochs=30, schedule="cosine", weight_decay=[0.0], batch=128, aug="cifar", lr=[0.1]),
    ("cifar", "contrastive"): dict(epochs=30, schedule="cosine", weight_decay=[0.0], batch=128, aug="cifar", lr=[30.0]),
    ("digits", "CE"): dict(epochs=15, schedule="cosine", weight_decay=[0.0], batch=64, aug="affine", lr=[0.1]),
    ("digits", "contrastive"): dict(epochs=15, schedule="cosine", weight_decay=[0.0], batch=64, aug="affine", lr=[1.0]),
}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("backbone", help="backbone.pt of train_rep.py, or another ResNet's checkpoint")
    p.add_argument("--protocol", choices=("lt", "rep"), default="lt", help="which list, drawn how: see above; lt")
    p.add_argument("--features", choices=("streamed", "cached"), default="streamed", help="see above; streamed, the "
                   "paper's")
    p.add_argument("--classifier", choices=("linear", "lws"), default="linear", help="see above; linear")
    # from the log beside the backbone; to be said of a backbone from elsewhere
    p.add_argument("--arch", choices=tuple(ARCHS), metavar="ARCH", help="default: in the log beside the backbone")
    p.add_argument("--dataset", choices=tuple(data.DATASETS), help="default: likewise")
    p.add_argument("--data", help="the folder that the lists' paths start from; default: likewise")
    p.add_argument("--loss", choices=("kcl", "cl", "fcl", *LOSSES), metavar="LOSS",
                   help="of the backbone, default: likewise; decides --epochs, --schedule and --weight-decay")
    # data
    p.add_argument("--list", help="training list of the classifier; default: by --protocol")
    p.add_argument("--val", help="list that chooses among classifiers; default: the data set's; none: there is none")
    p.add_argument("--sampler", choices=("instance", "class", "sqrt", "progressive"), help="default: by --protocol")
    p.add_argument("--aug", choices=data.AUGMENTATIONS, help="sup, CIFAR cifar, digits affine")
    p.add_argument("--workers", type=int, help="data workers of each rank; digits 0")
    # optimisation
    p.add_argument("--lr", type=float, nargs="+", help=f"{LR_GRID}; --val none: 0.1, after contrastive losses "
                   "30, digits 1")
    p.add_argument("--epochs", type=int, help="10, after contrastive losses 100; CIFAR 30; digits 15")
    p.add_argument("--schedule", choices=("cosine", "step"), help="cosine; photos, contrastive: step, x0.1 at 60, "
                   "80 %%")
    p.add_argument("--weight-decay", type=float, nargs="+", help="5e-4, after contrastive losses 0; CIFAR, digits 0")
    p.add_argument("--batch", type=int, help="images a step over all ranks together: 256, CIFAR 128, digits 64")
    p.add_argument("--seed", type=int, default=0, help="of weights, draws and augmentations: 0")
    # the run
    p.add_argument("--out", type=Path, help="default: <classifier>-<protocol>[-cached] beside a backbone of ours, else "
                   "below runs/<its name>")
    p.add_argument("--tensorboard", action="store_true", help="the log also as scalars, in OUT/tensorboard")
    p.add_argument("--restart", action="store_true", help="throw away what --out holds; else it goes on from there")

    given = p.parse_args()  # parsed three times: the log beside the backbone, then its loss, decide defaults
    run = checkpoint.settings_of(given.backbone)
    p.set_defaults(**{name: run.get(name) for name in ("arch", "dataset", "data", "loss")})
    args = p.parse_args()
    missing = [f"--{name}" for name in ("arch", "dataset", "data") if getattr(args, name) is None]
    if missing:
        sys.exit(f"error: no log.jsonl of train_rep.py beside {args.backbone}; say {' and '.join(missing)}")
    spec = data.DATASETS[args.dataset]
    features = "CE" if args.loss in (None, *CLASSIFICATION) else "contrastive"
    workers = 0 if spec["kind"] == "digits" else min(8, os.cpu_count())
    p.set_defaults(**DEFAULTS[spec["kind"], features], workers=workers)
    args = p.parse_args()

    args.data = str(Path(args.data))  # without a last slash
    args.backbone_list = run.get("list") if args.data == run.get("data") else None
    if args.backbone_list:
        checkpoint.same_list(run)
    if args.protocol == "rep":
        args.list = args.list or data.beside(args.data, args.backbone_list or "", spec["full"])
    args.list = args.list or args.backbone_list or spec["train"]
    args.val = args.val or data.beside(args.data, args.list, spec["val"])
    args.sampler = args.sampler or ("instance" if args.protocol == "rep" else "class")
    if given.lr is None and args.val != "none":
        args.lr = LR_GRID
    folder = f"{args.classifier}-{args.protocol}"
    if args.features == "cached":
        args.aug, folder = None, f"{folder}-cached"
    home = Path(args.backbone).parent if run else Path("runs") / Path(args.backbone).stem
    args.out = args.out or home / folder

    why = f"the backbone's --loss is {args.loss}"
    if args.loss is None:
        why = "nothing is known of the backbone; after a contrastive loss say --loss cl"
    ddp.print0(f"{args.protocol} on {args.list}, {args.sampler} sampling; settings for {features} features ({why}): "
               f"{args.epochs} epochs, {args.schedule}, weight decay {args.weight_decay}")
    return args


class ScaledHead(nn.Module):
    """LWS (Kang et al. 2020, sec. 4): a fixed joint head, weight (C, D) and bias (C,), times one learned scale a class
    (C,) that starts at 1. The bias is scaled too, as in the authors' code."""

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
    """M classifiers on the same features, (B, D) -> [(B, C)] * M. One matmul for all would round otherwise than each
    alone, and a large learning rate blows that up."""

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


def cached_batches(features, labels, draws):
    """The batches of data.train_loader in an epoch, with features (b, D) in the place of images."""
    index = torch.tensor([i for i, _ in draws], device=features.device)
    for i in index.split(draws.per_rank):
        yield [features[i]], labels[i], i


def val_images(args, spec, C):
    """The validation images; neither the backbone nor the classifier may have seen them."""
    if args.val == "none":
        sys.exit("error: several classifiers need a --val that chooses; or give one --lr and one --weight-decay")
    for trained_on in {args.list, args.backbone_list or args.list}:
        data.refuse_overlap(args.data, trained_on, args.val)
    val = data.ImageList(args.data, args.val, spec)
    if val.labels.max() >= C:
        sys.exit(f"error: {args.val} has labels up to {val.labels.max()}, {args.list} only up to {C - 1}")
    return val


def learning_rate(base, schedule, t):
    """At t = epoch / epochs; cosine reaches 0 after the last epoch, step is MoCo's 60 and 80 of 100."""
    return base * (0.5 * (1 + math.cos(math.pi * t)) if schedule == "cosine" else 0.1 ** ((t >= 0.6) + (t >= 0.8)))


def hand_on(args, classifier, chosen, val_top1):
    """Write head.pt, which says that the run is finished."""
    counts_of = args.list  # its class sizes make many / medium / few
    if args.backbone_list and Path(args.backbone_list).parent == Path(args.list).parent:
        counts_of = args.backbone_list  # what the backbone has seen, if of the same classes
    counts = data.read_list(args.data, counts_of)[1].bincount(minlength=len(classifier.bias))
    how = f"{args.protocol}, cached features" if args.features == "cached" else args.protocol
    spec, backbone = data.DATASETS[args.dataset], Path(args.backbone).resolve()
    checkpoint.save({
        "weight": classifier.weight.detach().cpu().clone(), "bias": classifier.bias.detach().cpu().clone(),
        "backbone": os.path.relpath(args.backbone, args.out), "arch": args.arch, "dataset": args.dataset,
        "data": args.data, "list": args.list, "counts": counts.tolist(), "counts_of": counts_of,
        "list_sha256": checkpoint.sha256(data.find_list(args.data, counts_of)),
        "name": backbone.parent.name if backbone.name == "backbone.pt" else backbone.stem,
        "chosen": chosen, "val_top1": val_top1,
        "protocol": f"{how}: {args.classifier} on {args.list}, {args.sampler} sampling, {args.epochs} epochs",
        **{name: spec[name] for name in ("mean", "std", "pixels", "resize")}}, args.out / "head.pt")
    (args.out / "ckpt.pt").unlink(missing_ok=True)
    print(f"classifier in {args.out / 'head.pt'} ({chosen})")


def main():
    device = ddp.init()
    args = parse_args()
    spec = data.DATASETS[args.dataset]
    cached = args.features == "cached"

    # data
    dataset = data.ImageList(args.data, args.list, spec, args.aug)
    draws = data.Draws(dataset.labels, args.sampler, args.batch, args.epochs, args.seed)
    C, steps = len(draws.counts), len(dataset) // args.batch
    if args.protocol == "rep" and draws.counts.max() > 2 * draws.counts.min():  # ImageNet: 732 to 1,300
        ddp.print0(f"{args.list} is not balanced ({draws.counts.min()} to {draws.counts.max()} images a class), so "
                   "beta is not that of the features alone")
    pairs = list(itertools.product(args.lr, args.weight_decay))           # one classifier each
    val = val_images(args, spec, C) if len(pairs) > 1 else None
    header = checkpoint.header(args, list_sha256=checkpoint.sha256(data.find_list(args.data, args.list)),
                               backbone_sha256=checkpoint.sha256(args.backbone))
    ckpt = checkpoint.resume(args.out, header["settings"], "head.pt", args.restart)

    # model
    backbone = load_backbone(args.backbone, args.arch).to(device, memory_format=torch.channels_last)
    backbone.eval().requires_grad_(False)
    before = {name: x.clone() for name, x in backbone.state_dict().items()}

    def encode(images):                                                   # (b, 3, H, W) uint8 -> (b, D)
        return backbone(data.normalize(images, spec["mean"], spec["std"], device))

    D = encode(torch.zeros(1, 3, spec["pixels"], spec["pixels"])).shape[1]

    def features_of(images):                                              # a list -> (N, D)
        return data.encode_all(encode, images, D, args.batch, args.workers, device)

    torch.manual_seed(args.seed)
    if args.classifier == "lws":
        joint = checkpoint.read_head(Path(args.backbone).with_name("head.pt"))
        heads = Heads(ScaledHead(joint["weight"], joint["bias"]) for _ in pairs)
    else:
        heads = linear_heads(len(pairs), D, C)
    net = ddp.wrap(heads.to(device))
    parameters = [{"params": head.parameters(), "weight_decay": decay} for head, (_, decay) in zip(heads, pairs)]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, fused=True)
    begin = ckpt["epoch"] if ckpt else 0
    if ckpt:
        heads.load_state_dict(ckpt["heads"])
        optimizer.load_state_dict(ckpt["optimizer"])
        ddp.print0(f"{args.out}: resuming after epoch {begin} of {args.epochs}")

    # train
    if cached:
        cache, cache_labels = features_of(dataset), dataset.labels.to(device)
    else:
        loader = data.train_loader(dataset, draws, args.workers, device)
    if ddp.rank() == 0:
        log = checkpoint.open_log(args.out, header, begin * steps if ckpt else None, args.tensorboard)
    saved = time.time()
    for epoch in tqdm(range(begin, args.epochs), desc=str(args.out), unit="epoch", disable=ddp.rank() > 0 or None):
        draws.set_epoch(epoch)
        for group, (lr, _) in zip(optimizer.param_groups, pairs):
            group["lr"] = learning_rate(lr, args.schedule, epoch / args.epochs)
        since, total = time.time(), torch.zeros(len(pairs), device=device)

        for (view,), labels, _ in cached_batches(cache, cache_labels, draws) if cached else loader:
            labels = labels.to(device, non_blocking=True)                 # (b,)
            features = view if cached else encode(view)                   # (b, D)
            losses = torch.stack([F.cross_entropy(logits, labels) for logits in net(features)])  # (M,)
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            total += losses.detach()

        torch.distributed.all_reduce(total)
        if ddp.rank() == 0:
            log({"epoch": epoch, "step": (epoch + 1) * steps, "lr": [g["lr"] for g in optimizer.param_groups],
                 "weight_decay": [g["weight_decay"] for g in optimizer.param_groups],
                 "loss": (total / steps / ddp.world()).tolist(),
                 "images_per_s": steps * args.batch / (time.time() - since)})
            if time.time() - saved >= checkpoint.SAVE_EVERY:
                checkpoint.save({"epoch": epoch + 1, "heads": heads.state_dict(),
                                 "optimizer": optimizer.state_dict()}, args.out / "ckpt.pt")
                saved = time.time()

    changed = [name for name, x in backbone.state_dict().items() if not torch.equal(x, before[name])]
    assert not changed, f"the frozen backbone changed: {changed}"

    # choose
    best, top1, by = 0, [None], "given"
    if val:
        features, labels = features_of(val), val.labels.to(device)
        top1 = [((head(features).argmax(1) == labels).sum() / len(val)).item() for head in heads]
        best = max(range(len(pairs)), key=lambda i: (top1[i], -pairs[i][0], -pairs[i][1]))
        by = f"chosen on {args.val}"
        cells = [f"{100 * a:.1f} (lr {lr:g}, weight decay {decay:g})" for a, (lr, decay) in zip(top1, pairs)]
        ddp.print0(f"top-1 on {args.val}: {', '.join(cells)}")
        best_lrs = {lr for a, (lr, _) in zip(top1, pairs) if a == max(top1)}                     # several: a tie
        if len(args.lr) > 1 and best_lrs in ({min(args.lr)}, {max(args.lr)}):
            ddp.print0(f"lr {pairs[best][0]:g} is an end of the grid; one beyond it may do better")
    lr, decay = pairs[best]
    if not heads[best].weight.isfinite().all():
        sys.exit(f"error: the classifier is not finite with learning rate {lr:g}; try a smaller --lr")
    if ddp.rank() == 0:
        log({"step": args.epochs * steps, "lr": lr, "weight_decay": decay, "val_top1": top1[best]})
        hand_on(args, heads[best], f"lr {lr:g}, weight decay {decay:g} {by}", top1[best])


if __name__ == "__main__":
    ddp.run(main)
