"""
Stage 3: accuracy (all, many / medium / few) and balancedness of classifiers, side by side, on the test list.

    python evaluate.py runs/digits-lt-ce-seed0/head.pt runs/digits-lt-kcl-seed0/linear-lt/head.pt
    python evaluate.py runs/digits-lt-ce-seed0/head.pt --tau-norm --ncm    # two rows more: the head tau-normalised, and
                                                                           # nearest class means of its features
    torchrun --nproc_per_node=8 evaluate.py runs/imagenet-...-kcl-seed0-8ranks/linear-lt/head.pt

Balancedness (beta, eq. 3) says how equal the accuracies of the classes are on the test list. The paper measures it for
a feature space (Figs 2, 4) with a linear classifier trained on the balanced set: `train_linear.py --protocol rep`. For
any other head, beta describes features and classifier together.

Prints one table and writes eval.json beside each head: accuracies in [0, 1], null for an empty group. Runs that differ
in their seed alone get a line with mean +- standard deviation. tools/plots.py draws what is written.
"""
import argparse
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import data
import ddp
from resnet import load_backbone

TAUS = np.arange(0, 2.01, 0.1).round(1).tolist()  # 0 is the plain head without its bias, 1 gives all classes one norm


# ---- metrics

def balancedness(acc, sigma=0.1):
    """beta = 1/C^2 sum_{i,j} exp(-|a_i - a_j|^2 / sigma), eq. 3.

    acc (C,): accuracy of each class, in [0, 1]. 1/C < beta <= 1, and 1 only if all are equal. The paper calls sigma
    "a fixed scaling parameter" and does not give it: 0.1 is ours. Compare beta at one sigma only.
    """
    a = np.asarray(acc, dtype=np.float64)
    if not ((a >= 0) & (a <= 1)).all():
        raise ValueError(f"expected class accuracies in [0, 1], got {acc}")
    return float(np.exp(-(a[:, None] - a) ** 2 / sigma).mean())


def group_accuracy(acc, counts):
    """{many, medium, few}: mean accuracy of each group's classes, by training images counts (C,); None if empty."""
    acc, group = np.asarray(acc), np.array(data.groups(counts))
    return {name: float(acc[group == name].mean()) if name in group else None for name in ("many", "medium", "few")}


def hits(logits, labels):
    """Per class: images, top-1 hits, top-5 hits; (3, C) float64. logits (n, C), labels (n,)."""
    C = logits.shape[1]
    hit = logits.topk(min(5, C)).indices == labels[:, None]               # (n, 5)
    of_each = torch.stack([torch.ones_like(labels), hit[:, 0], hit.any(1)]).double()             # (3, n)
    counts = torch.zeros(3, C, dtype=torch.float64, device=labels.device).index_add_(1, labels, of_each)
    return counts.cpu()


def scores(counts, class_sizes, sigma):
    """What eval.json holds of the numbers (3, C) of hits()."""
    n, top1, top5 = counts.numpy()
    acc = top1 / n
    return {"top1": float(top1.sum() / n.sum()), "top5": float(top5.sum() / n.sum()),
            **group_accuracy(acc, class_sizes), "balancedness": balancedness(acc, sigma), "sigma": sigma,
            "std": float(acc.std()), "per_class": acc.tolist(), "images": int(n.sum())}


# ---- classifiers without training

def tau_normalize(weight, tau):
    """w_c / ||w_c||^tau for the rows of weight (C, D), to be used without a bias (Kang et al. 2020, sec. 4)."""
    return weight / weight.norm(dim=1, keepdim=True) ** tau


def choose_tau(weight, features, labels):
    """The tau of TAUS with the most top-1 hits on the validation features (n, D), the smallest of equals."""
    correct = [hits(features @ tau_normalize(weight, tau).T, labels)[1].sum().item() for tau in TAUS]
    return TAUS[int(np.argmax(correct))]


def class_means(features, labels, C):
    """Nearest class mean (Kang et al. 2020, sec. 4) as a linear head without a bias: the unit means (C, D) of each
    class' unit features (n, D). The largest logit is the largest cosine."""
    total = torch.zeros(C, features.shape[1], device=features.device)
    return F.normalize(total.index_add_(0, labels, F.normalize(features)))


# ---- heads and their features

def load_head(path, root=None, groups=None):
    """A head.pt, its path, and its backbone's. root, groups: another data folder, another list whose class sizes make
    many / medium / few."""
    path = Path(path)
    if path.is_dir():
        ddp.print0(f"{path} is a folder: taking the head.pt in it")
        path = path / "head.pt"
    head = checkpoint.read_head(path)
    if root is None:
        checkpoint.same_list(head)
    head |= {"path": path, "backbone": (path.parent / head["backbone"]).resolve(), "data": root or head["data"]}

    if groups:
        head["counts"] = data.read_list(head["data"], groups)[1].bincount().tolist()
        head["counts_of"] = groups
    if len(head["counts"]) != len(head["weight"]):
        sys.exit(f"error: {path} has {len(head['weight'])} classes, {head['counts_of']} {len(head['counts'])}; name "
                 "the training list of these classes with --groups")
    return head


def images_of(head, name):
    """The images of a list. Exits where its classes are not those of the head, each with an image."""
    dataset = data.ImageList(head["data"], name, head)
    n, C = dataset.labels.bincount(), len(head["weight"])
    if len(n) != C or not n.all():
        sys.exit(f"error: {name} must hold all {C} classes of {head['path']}, and no other; its labels go up to "
                 f"{len(n) - 1}, its smallest class, {n.argmin()}, has {n.min()} images")
    return dataset


def evaluate(heads, args, device):
    """The table's rows for heads of one backbone, which encodes each list once: 50,000 x 2048 x 4 B = 0.4 GB for the
    test list of ImageNet."""
    backbone = load_backbone(heads[0]["backbone"], heads[0]["arch"])
    backbone = backbone.to(device, memory_format=torch.channels_last).eval()
    encoded, rows = {}, []

    def encode(images):                                                   # (b, 3, H, W) uint8 -> (b, D)
        return backbone(data.normalize(images, heads[0]["mean"], heads[0]["std"], device))

    def features_of(dataset):                                             # (N, D), and labels (N,)
        if dataset.name not in encoded:
            D = heads[0]["weight"].shape[1]
            features = data.encode_all(encode, dataset, D, args.batch, args.workers, device)
            encoded[dataset.name] = features, dataset.labels.to(device)
        return encoded[dataset.name]

    for head in heads:
        W, bias = head["weight"].to(device), head["bias"].to(device)
        classifiers = [("eval.json", head["protocol"], head.get("chosen", ""), W, bias)]
        if "val" in head:
            tau = choose_tau(W, *features_of(head["val"]))
            classifiers.append(("eval_tau_norm.json", f"tau-norm of {head['protocol']}",
                                f"tau {tau:g} chosen on {head['val'].name}", tau_normalize(W, tau), 0))
        if args.ncm and head is heads[0]:
            means = class_means(*features_of(images_of(head, head["counts_of"])), len(W))
            classifiers.append(("eval_ncm.json", f"NCM on {head['counts_of']}", "", means, 0))

        features, labels = features_of(head["test"])
        for file, protocol, chosen, weight, bias in classifiers:
            counts = hits(features @ weight.T + bias, labels)
            rows.append({"run": head["name"], "protocol": protocol, "chosen": chosen,
                         **scores(counts, head["counts"], args.sigma), "list": head["test"].name,
                         "counts": head["counts"], "counts_of": head["counts_of"], "head": str(head["path"])})
            if ddp.rank() == 0:
                unfinished = head["path"].with_name(f"{file}.tmp")
                unfinished.write_text(json.dumps(rows[-1], indent=1) + "\n")
                os.replace(unfinished, head["path"].with_name(file))
    return rows


# ---- the table

def over_seeds(rows):
    """[(run without its seed, protocol, rows)]: rows that differ in the seed of their run alone, together."""
    same = {}
    for row in rows:
        same.setdefault((re.sub(r"-seed\d+", "", row["run"]), row["protocol"]), []).append(row)
    return [(run, protocol, group) for (run, protocol), group in same.items()]


def cell(rows, column):
    """A number of the table: of one row, or mean +- standard deviation of several."""
    x = [row[column] for row in rows]
    if None in x:
        return "-"
    scale, digits = (1, 3) if column == "balancedness" else (100, 1)
    text = f"{scale * np.mean(x):.{digits}f}"
    return text if len(x) == 1 else f"{text} +- {scale * np.std(x, ddof=1):.{digits}f}"


def print_table(rows, names=None):
    """Markdown: a line a row, then a line a run of several seeds. names: of the rows, in place of their runs."""
    columns = ("top1", "top5", "many", "medium", "few", "balancedness", "std")
    names = names or [row["run"] for row in rows]
    tests, counts_of = (sorted({row[name] for row in rows}) for name in ("list", "counts_of"))
    lines = []
    for name, row in zip(names, rows):
        said = (row["protocol"], row["chosen"], f"on {row['list']}" * (len(tests) > 1))
        lines.append((name, ", ".join(filter(None, said)), [row]))
    for run, protocol, group in over_seeds(rows):
        seeds = len({row["run"] for row in group})
        if seeds > 1:
            lines.append((f"{run}, {seeds} seeds", protocol, group))

    width = max(len(name) for name, _, _ in lines)
    print(f"| {'run':<{width}} |   top-1 |   top-5 |    many |  medium |     few |    beta |     std | classifier |")
    print("|---" * 9 + "|")
    for name, classifier, group in lines:
        print(f"| {name:<{width}} | " + " | ".join(f"{cell(group, c):>7}" for c in columns) + f" | {classifier} |")

    print(f"In percent, but for beta: balancedness (eq. 3, sigma = {rows[0]['sigma']:g}). Beta and std are of the "
          f"class accuracies on {', '.join(tests)}.")
    print(f"many / medium / few: mean over the classes with > 100 / 20 to 100 / < 20 images in "
          f"{', '.join(counts_of)}.")


def main():
    device = ddp.init()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("heads", nargs="+", help="head.pt of train_linear.py, or of train_rep.py for a loss on logits")
    p.add_argument("--data", help="the folder that the lists' paths start from; default: where the head was trained")
    p.add_argument("--list", help="list to evaluate on; default: the test list, for a half of the classes its own")
    p.add_argument("--groups", help="training list whose class sizes make many / medium / few; default: the backbone's")
    p.add_argument("--sigma", type=float, default=0.1, help="of the balancedness: 0.1; the paper does not give it")
    p.add_argument("--tau-norm", action="store_true", help="also the joint CE heads tau-normalised; tau: by --val")
    p.add_argument("--ncm", action="store_true", help="also nearest class mean on each backbone, by its training list")
    p.add_argument("--val", help="list that chooses tau; default: the data set's validation list")
    p.add_argument("--names", nargs="+", help="of the table's rows, in their order; default: their runs")
    p.add_argument("--batch", type=int, default=256, help="images at a time: 256")
    p.add_argument("--workers", type=int, default=2, help="data workers of each rank: 2")
    args = p.parse_intermixed_args()  # flags may stand between the heads

    heads = [load_head(path, args.data, args.groups) for path in args.heads]
    of_backbone = {}
    for head in heads:  # checks all lists before the first long work
        spec = data.DATASETS[head["dataset"]]
        head["test"] = images_of(head, args.list or data.beside(head["data"], head["list"], spec["test"]))
        if args.tau_norm and head["protocol"].startswith("joint CE"):  # trained together with its backbone
            head["val"] = images_of(head, args.val or data.beside(head["data"], head["list"], spec["val"]))
            data.refuse_overlap(head["data"], head["list"], head["val"].name)
        of_backbone.setdefault((head["backbone"], head["dataset"], head["data"]), []).append(head)
    if args.tau_norm and not any("val" in head for head in heads):
        ddp.print0("--tau-norm is for joint CE heads, the head.pt of train_rep.py --loss ce: there is none")

    rows = []
    for group in of_backbone.values():
        rows += evaluate(group, args, device)
    given = [str(head["path"]) for head in heads]
    if ddp.rank() == 0:
        print_table(sorted(rows, key=lambda row: given.index(row["head"])), args.names)


if __name__ == "__main__":
    ddp.run(main)
