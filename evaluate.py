"""
Stage 3: accuracy (all, many / medium / few) and balancedness of classifiers, side by side, on the test list.

    python evaluate.py runs/digits-lt-ce-seed0/head.pt runs/digits-lt-kcl-seed0/linear-lt/head.pt
    python evaluate.py runs/digits-lt-ce-seed0/head.pt --tau-norm --ncm    # two more rows: the tau-normalised head, and
                                                                           # nearest class means of its features
    torchrun --nproc_per_node=8 evaluate.py runs/imagenet-ImageNet_LT_train-kcl-seed0/linear-lt/head.pt

Balancedness (beta, eq. 3) says how equal the class accuracies are on the test list. The paper measures it for
a feature space (Figs 2, 4) with a linear classifier trained on the balanced set: `train_linear.py --protocol rep`. With
a head of the long-tailed list, beta describes features and classifier together.

It prints one table and writes eval.json next to each head, with accuracies in [0, 1] and null for an empty group. If
--list is not the test list, the file is called on_LIST_eval.json. Runs that differ only in their seed get an extra row
with mean +- standard deviation. In eval.json, per_class has the accuracy of each class, classes its name and counts its
training images. tools/plots.py draws these files. --table table.csv writes the table to a file, --table table.tex the
lines of a tabular.
"""
import argparse
import csv
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

TAUS = np.arange(0, 2.01, 0.1).round(1).tolist()  # 0 only drops the head's bias, 1 also gives all rows norm 1


# ---- metrics

def balancedness(acc, sigma=0.1):
    """beta = 1/C^2 sum_{i,j} exp(-|a_i - a_j|^2 / sigma), eq. 3.

    acc (C,): accuracy of each class, in [0, 1]. 1/C < beta <= 1, and beta is 1 only if all are equal. The paper calls
    sigma "a fixed scaling parameter" but gives no value. 0.1 is our choice. Compare beta only at the same sigma.
    """
    a = np.asarray(acc, dtype=np.float64)
    if not ((a >= 0) & (a <= 1)).all():
        raise ValueError(f"expected class accuracies in [0, 1], got {acc}")
    return float(np.exp(-(a[:, None] - a) ** 2 / sigma).mean())


def group_accuracy(acc, class_sizes):
    """{many, medium, few}: mean accuracy over the classes of a group, None if it has no class. class_sizes (C,):
    training images per class."""
    acc, group_of = np.asarray(acc), np.array(data.groups(class_sizes))
    means = dict.fromkeys(("many", "medium", "few"))
    for name in set(group_of):
        means[name] = float(acc[group_of == name].mean())
    return means


def count_hits(logits, labels):
    """Count images, top-1 hits and top-5 hits per class, (3, C) float64. logits (n, C), labels (n,)."""
    C = logits.shape[1]
    top5 = logits.topk(min(5, C)).indices == labels[:, None]              # (n, 5)
    per_image = torch.stack([torch.ones_like(labels), top5[:, 0], top5.any(1)])           # (3, n)
    hits = torch.zeros(3, C, dtype=torch.float64, device=labels.device)
    return hits.index_add_(1, labels, per_image.double()).cpu()


def scores(hits, class_sizes, sigma):
    """The scores in eval.json: top-1, many / medium / few, beta, and so on. hits (3, C) comes from count_hits."""
    n, top1, top5 = hits.numpy()
    acc = top1 / n
    return {"top1": float(top1.sum() / n.sum()), "top5": float(top5.sum() / n.sum()),
            "class_mean": float(acc.mean()), "images_per_class": [int(n.min()), int(n.max())],
            **group_accuracy(acc, class_sizes),
            "balancedness": balancedness(acc, sigma), "sigma": sigma,
            "std": float(acc.std()), "per_class": acc.tolist(), "images": int(n.sum())}


# ---- classifiers without training

def tau_normalize(weight, tau):
    """w_c / ||w_c||^tau for the rows of weight (C, D), to be used without a bias (Kang et al. 2020, sec. 4)."""
    return weight / weight.norm(dim=1, keepdim=True) ** tau


def choose_tau(weight, features, labels):
    """The tau of TAUS with the most top-1 hits on the validation features (n, D). If several tie, the smallest."""
    hits = []
    for tau in TAUS:
        logits = features @ tau_normalize(weight, tau).T
        hits.append(count_hits(logits, labels)[1].sum().item())
    return TAUS[int(np.argmax(hits))]


def class_means(features, labels, C):
    """Nearest class mean (Kang et al. 2020, sec. 4) as a linear head without a bias. A row of its weight (C, D) is the
    mean of the class's unit features, scaled to norm 1. The largest logit then belongs to the largest cosine."""
    total = torch.zeros(C, features.shape[1], device=features.device)
    return F.normalize(total.index_add_(0, labels, F.normalize(features)))


# ---- heads and their features

def load_head(path, root=None, groups=None):
    """Read a head.pt and add its own path and that of its backbone. root replaces its data folder. groups is a list
    whose class sizes define many / medium / few instead of the recorded ones."""
    path = Path(path)
    if path.is_dir():
        path = path / "head.pt"
    head = checkpoint.read_head(path)
    head = {"class_names": {}, "seed": head["name"], **head}  # older files lack these two
    head["path"] = path
    head["backbone"] = (path.parent / head["backbone"]).resolve()
    head["data"] = root or head["data"]
    checkpoint.same_list(head)

    head["trained_on"] = head["counts_of"]  # --ncm takes its class means from this list
    if groups:
        head["counts"] = data.read_list(head["data"], groups)[1].bincount().tolist()
        head["counts_of"] = groups
    if len(head["counts"]) != len(head["weight"]):
        sys.exit(f"error: {path} has {len(head['weight'])} classes, {head['counts_of']} has "
                 f"{len(head['counts'])}; pass the training list of these classes with --groups")
    if groups:
        data.refuse_other_classes(head["class_names"], head["data"], groups)
    return head


def images_of(head, name):
    """The images of a list. Exits unless the list has images of every class of the head and of no other class."""
    dataset = data.ImageList(head["data"], name, head)
    n, C = dataset.labels.bincount(), len(head["weight"])
    if len(n) != C or not n.all():
        sys.exit(f"error: {name} must hold all {C} classes of {head['path']}, and no other; its "
                 f"labels go up to {len(n) - 1}, and class {n.argmin()} has {n.min()} images")
    data.refuse_other_classes(head["class_names"], head["data"], name)
    return dataset


def evaluate(heads, args, device):
    """The table's rows for the heads of one backbone. It encodes each list once and keeps the features, for the test
    list of ImageNet 50,000 x 2048 x 4 B = 0.4 GB."""
    first = heads[0]
    backbone = load_backbone(first["backbone"], first["arch"])
    backbone = backbone.to(device, memory_format=torch.channels_last).eval()
    workers = args.workers
    if workers is None:
        workers = 0 if first["dataset"] == "digits" else data.workers_per_rank()
    encoded, rows = {}, []

    def encode(images):                                                   # (b, 3, H, W) uint8 -> (b, D)
        return backbone(data.normalize(images, first["mean"], first["std"], device))

    def features_of(dataset):                                             # (N, D), and labels (N,)
        if dataset.name not in encoded:
            D = first["weight"].shape[1]
            features = data.encode_all(encode, dataset, D, args.batch, workers, device)
            encoded[dataset.name] = features, dataset.labels.to(device)
        return encoded[dataset.name]

    for head in heads:
        # the classifiers to score: the head itself, and those that need no training
        weight = head["weight"].to(device)                                # (C, D)
        classifiers = [("eval.json", head["protocol"], head["chosen"],
                        weight, head["bias"].to(device))]
        if "val" in head:
            tau = choose_tau(weight, *features_of(head["val"]))
            chosen = f"tau {tau:g} chosen on {head['val'].name}"
            if set(head["val"].paths) & set(head["test"].paths):
                chosen += ", whose images are scored here"
            classifiers.append(("eval_tau_norm.json", f"tau-norm of {head['protocol']}", chosen,
                                tau_normalize(weight, tau), 0))
        if args.ncm and head is first:
            means = class_means(*features_of(images_of(head, head["trained_on"])), len(weight))
            classifiers.append(("eval_ncm.json", f"NCM on {head['trained_on']}", "", means, 0))

        features, labels = features_of(head["test"])
        for file, protocol, chosen, weight, bias in classifiers:
            hits = count_hits(features @ weight.T + bias, labels)
            rows.append({"run": head["name"], "seed": head["seed"], "protocol": protocol,
                         "chosen": chosen, **scores(hits, head["counts"], args.sigma),
                         "list": head["test"].name, "classes": head["classes"],
                         "counts": head["counts"], "counts_of": head["counts_of"],
                         "head": str(head["path"])})
            if ddp.rank() == 0:
                file = head["path"].with_name(head["prefix"] + file)
                file.with_suffix(".tmp").write_text(json.dumps(rows[-1], indent=1) + "\n")
                os.replace(file.with_suffix(".tmp"), file)
    return rows


# ---- the table

def over_seeds(rows):
    """Group rows that differ only in the seed of their run: [(run without its seed, protocol, rows)]."""
    together = {}
    for row in rows:
        key = re.sub(r"-seed\d+", "", row["run"]), row["protocol"]
        together.setdefault(key, []).append(row)
    groups = []
    for (run, protocol), group in together.items():
        if len({row["seed"] for row in group}) == len(group):
            groups.append((run, protocol, group))
        else:  # several classifiers of one seed
            groups += [(row["run"], protocol, [row]) for row in group]
    return groups


def cell(rows, column):
    """A cell of the table: the value of one row, or mean +- standard deviation of several."""
    values = [row[column] for row in rows]
    if None in values:
        return "-"
    scale, digits = (1, 3) if column == "balancedness" else (100, 1)  # the others are in percent
    text = f"{scale * np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" +- {scale * np.std(values, ddof=1):.{digits}f}"
    return text


def write_table(table, file):
    """Write rows of cells (str) as CSV, or for LaTeX: the lines of a tabular, without the long last column."""
    with open(file, "w", newline="") as f:
        if file.suffix == ".csv":
            csv.writer(f).writerows(table)
            return
        for cells in table:
            cells = [re.sub(r"([%&_#])", r"\\\1", text).replace("+-", r"$\pm$") for text in cells[:-1]]
            f.write(" & ".join(cells) + " \\\\\n")


def print_table(rows, file=None):
    """Print a Markdown table, with a line per row, then a line per run that has several seeds. Write it to file too."""
    columns = {"top-1": "top1", "top-5": "top5", "many": "many", "medium": "medium", "few": "few",
               "beta": "balancedness", "std": "std"}
    fewest, most = np.transpose([row["images_per_class"] for row in rows])
    uneven = (fewest < most).any()
    if uneven:
        columns["mean"] = "class_mean"
    tests = sorted({row["list"] for row in rows})
    lines = []                                                            # (name, classifier, rows to average)
    for row in rows:
        notes = [row["protocol"], row["chosen"]]
        if len(tests) > 1:
            notes.append(f"on {row['list']}")
        if len({other["seed"] for other in rows if other["run"] == row["run"]}) > 1:
            notes.append(f"seed {row['seed']}")
        lines.append((row["name"], ", ".join(filter(None, notes)), [row]))
    means = [(f"{run}, {len(group)} seeds", protocol, group)
             for run, protocol, group in over_seeds(rows) if len(group) > 1]

    table = [["run", *columns, "classifier"]]
    for name, classifier, group in lines + means:
        table.append([name, *(cell(group, column) for column in columns.values()), classifier])
    if file:
        write_table(table, file)
    width = max(len(name) for name, *_ in table)
    for i, (name, *cells, classifier) in enumerate(table):
        print(f"| {name:<{width}} | {' | '.join(f'{x:>7}' for x in cells)} | {classifier} |")
        if i == 0:
            print("|---" * len(table[0]) + "|")

    class_lists = sorted({row["counts_of"] for row in rows})
    print("All columns are in percent, except beta, the balancedness: the mean of exp(-(a_i - a_j)^2 / sigma) over "
          f"all pairs of class accuracies, with sigma = {rows[0]['sigma']:g} (eq. 3). std is their standard deviation. "
          f"Both are computed on {', '.join(tests)}.")
    if uneven:
        print(f"There are {fewest.min()} to {most.max()} test images per class. Top-1 and top-5 average over "
              "images, all other columns over classes. Beta and std are noisy if a class has few images.")
    if means:
        print("+- is the standard deviation over the seeds.")
    print("many / medium / few: mean over the classes with > 100 / 20 to 100 / < 20 images in "
          f"{', '.join(class_lists)}.")
    if any(row[group] is None for row in rows for group in ("many", "medium", "few")):
        print("- means that no class has so many; --groups LIST takes the class sizes of another list.")


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("heads", nargs="+", help="head.pt files of train_linear.py or train_rep.py")
    p.add_argument("--data",
                   help="the folder that the lists' paths start from; default: as in training")
    p.add_argument("--list", help="list to evaluate on; default: the test list of these classes")
    p.add_argument("--groups", help="list that sets many / medium / few; default: the backbone's")
    p.add_argument("--sigma", type=float, default=0.1, help="sigma of beta; our default is 0.1")
    p.add_argument("--tau-norm", action="store_true", help="also tau-normalise joint CE heads")
    p.add_argument("--ncm", action="store_true", help="also score nearest class means")
    p.add_argument("--val", help="list that chooses tau; default: the data set's validation list")
    p.add_argument("--names", nargs="+", help="names of the rows, in order; default: the run names")
    p.add_argument("--table", type=Path, help="also write the table to this .csv file, or its rows to a .tex file")
    p.add_argument("--batch", type=int, default=256, help="images per rank at a time; default 256")
    p.add_argument("--workers", type=int,
                   help="per rank; default: its share of the cores, 0 for digits")
    return p.parse_intermixed_args()  # allows flags between the heads


def main():
    device = ddp.init()
    args = parse_args()
    if args.table and (args.table.suffix not in (".csv", ".tex") or not args.table.parent.is_dir()):
        sys.exit(f"error: --table {args.table} must end in .csv or .tex and lie in a folder that exists")

    # read all heads and lists first, so that no error comes after the long work has begun
    heads = [load_head(path, args.data, args.groups) for path in args.heads]
    of_backbone = {}
    for head in heads:
        spec = data.DATASETS[head["dataset"]]
        default = data.sibling_list(head["data"], head["list"], spec["test"])
        head["test"] = images_of(head, args.list or default)
        if args.list is None:  # with --list you may score the training list itself
            for trained_on in {head["list"], head["trained_on"]}:
                if data.find_list(head["data"], trained_on).is_file():
                    data.refuse_overlap(head["data"], trained_on, default, "test")
        head["classes"] = [head["class_names"].get(c, str(c)) for c in range(len(head["weight"]))]
        head["prefix"] = "" if head["test"].name == default else f"on_{Path(args.list).stem}_"
        val = args.val or data.sibling_list(head["data"], head["list"], spec["val"])
        can_choose = args.val or data.find_list(head["data"], val).is_file()
        if args.tau_norm and can_choose and head["protocol"].startswith("joint CE"):
            head["val"] = images_of(head, val)
            data.refuse_overlap(head["data"], head["list"], val)
        key = head["backbone"], head["dataset"], head["data"]
        of_backbone.setdefault(key, []).append(head)
    if args.tau_norm and not any("val" in head for head in heads):
        ddp.print0("no tau-norm: it needs a joint CE head, which train_rep.py --loss ce writes, "
                   "and a list that chooses tau (--val)")
    num_rows = len(heads) + sum("val" in head for head in heads) + args.ncm * len(of_backbone)
    if args.names and len(args.names) != num_rows:
        sys.exit(f"error: --names has {len(args.names)} name(s), but the table has {num_rows} row(s); "
                 "--tau-norm adds one per joint CE head, --ncm one per backbone")

    # evaluate backbone by backbone, then sort the rows in the order of the command line
    rows = []
    for group in of_backbone.values():
        rows += evaluate(group, args, device)
    order = [str(head["path"]) for head in heads]
    rows.sort(key=lambda row: order.index(row["head"]))
    for i, row in enumerate(rows):
        row["name"] = args.names[i] if args.names else row["run"]
    if ddp.rank() == 0:
        print_table(rows, args.table)


if __name__ == "__main__":
    ddp.run(main)
