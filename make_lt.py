"""
Make the lists that everything else starts from: text files, one `relative/path label` a line.

    python make_lt.py                                # the embedded digits in clutter -> data/digits, 10 seconds
    python make_lt.py --seed 1 --out data/digits1    # other images, another order of the classes
    python make_lt.py --dataset imagenet --data X    # the paper's splits, from the published lists in X
    python make_lt.py --dataset folder --data X --long-tail imagenet-lt    # the same class sizes, other images
    python make_lt.py --dataset inat18 --data X
    python make_lt.py --dataset places365 --data X
    python make_lt.py --dataset cifar100 --imbalance 100                   # downloads to data/cifar100
    python make_lt.py --dataset folder --data X --long-tail exponential --imbalance 50    # your own images
    python make_lt.py --sizes imagenet-lt            # only the table, of class sizes or of a list

What X holds; a class is numbered by its place in the sorted folder names:
    imagenet   train/<wnid>/*.JPEG and val/<wnid>/*.JPEG (ILSVRC 2012, image-net.org), ImageNet_LT_{train,val,test}.txt
               (Liu et al. 2019, liuziwei7.github.io/projects/LongTail.html)
    inat18     train_val2018/, train2018.json, val2018.json (github.com/visipedia/inat_comp)
    places365  train/<class>/*.jpg, val/<class>/*.jpg (places365standard_easyformat.tar of places2.csail.mit.edu)
    cifar100   nothing, or the unpacked cifar-100-python.tar.gz (www.cs.toronto.edu/~kriz/cifar.html); cifar10 likewise
    folder     train/<class>/<image> or <class>/<image>. val/ or test/ like it is the test set; of both, val/ is the
               validation set; without both, --holdout images of each class become the test set.

What comes to --out, by default X, as far as it is not published:
    train_full.txt       the training images without those of val.txt
    train_lt.txt         the long tail; of folder and places365 without --long-tail the same as train_full.txt
    train_lt0 ... 8.txt  alpha = 0, 0.2, 0.4, 0.6, 0.8 (App. B of the paper); train_lt.txt is alpha = 1
    test.txt, val.txt    val.txt: --holdout training images a class where X has none; not for CIFAR and iNaturalist
    overlap_source/, overlap_target/, independent_source/, independent_target/
                         each list for one half of the classes, renumbered (Table 4, Fig. 3)
    splits.json          the printed table and all class sizes
Where X is read-only, name another --out, then train with `--dataset folder --data X --list OUT/train_lt.txt`.

A copy with a short side of 256 px decodes faster; its crops differ from those of whole images:
    cp -r X X256 && find X256 -name '*.JPEG' -print0 | xargs -0 -P 16 -n 1000 python -c '
    import sys, PIL.Image, PIL.ImageOps
    for file in sys.argv[1:]:
        PIL.ImageOps.cover(PIL.Image.open(file).convert("RGB"), (256, 256)).save(file, quality=95)'
"""
import argparse
import json
import math
import random
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

import sources
from data import DATASETS, groups

ALPHAS = {"lt0": 0.0, "lt2": 0.2, "lt4": 0.4, "lt6": 0.6, "lt8": 0.8, "lt": 1.0}


# ---- class sizes: lists of int, one a class

def exponential_counts(num_classes, n_max, imbalance):
    """n_j = int(n_max * imbalance^(-j/(C-1))): CIFAR-LT's rule (Cui et al. 2019). Largest class first."""
    return [int(n_max * imbalance ** (-j / (num_classes - 1))) for j in range(num_classes)]


def pareto_counts(num_classes, n_max, n_min, shape=6):
    """Quantiles x_j = ((j + 1/2) / C)^(-1/shape) of a Pareto distribution, scaled to n_max ... n_min. Largest first.

    ImageNet-LT was drawn from one of power 6 (Liu et al. 2019, sec. 5); how exactly is not published. This rule gives
    104,850 images for 1000 classes from 1280 to 5; the published list has 115,846.
    """
    x = ((np.arange(num_classes) + 0.5) / num_classes) ** (-1 / shape)
    share = (x - x[-1]) / (x[0] - x[-1])
    return np.floor(n_min + (n_max - n_min) * share + 0.5).astype(int).tolist()


def alpha_counts(counts, alpha):
    """n_j = floor(N q_j^alpha / sum_k q_k^alpha + 1/2), q_j = counts_j / N: App. B of the paper.

    counts: class sizes of the base long tail. Alpha 1 gives them back, alpha 0 makes all equal.
    """
    n = np.asarray(counts, dtype=np.float64)
    q = (n / n.sum()) ** alpha
    return np.floor(n.sum() * q / q.sum() + 0.5).astype(int).tolist()


def family_counts(base, lt0="formula"):
    """{name: class sizes} of the alpha family. lt0 "authors" is N // C, 115 on ImageNet-LT; the formula gives 116."""
    counts = {name: alpha_counts(base, alpha) for name, alpha in ALPHAS.items()}
    if lt0 == "authors":
        counts["lt0"] = [sum(base) // len(base)] * len(base)
    return counts


def given_to(classes, sizes):
    """Class sizes (C,) by class: the first of sizes goes to the first of classes, an order of all C."""
    by_class = np.zeros_like(sizes)
    by_class[classes] = sizes
    return by_class.tolist()


def read_counts(name):
    """Class sizes from a file of numbers, None from any other. imagenet-lt: the published class sizes."""
    file = sources.EMBEDDED.with_name("imagenet_lt_counts.txt") if name == "imagenet-lt" else Path(name)
    words = file.read_text(encoding="utf-8").split() if file.is_file() else [""]
    return [int(word) for word in words] if all(map(str.isdecimal, words)) else None


# ---- which images: a split is a list of C lists of paths

def order(full, base, seed):
    """The images of each class in one order: the base long tail, shuffled, then the rest of the full list, shuffled.

    Every list takes a prefix of it, so two lists share as many images as their sizes allow. base: a split of empty
    lists where only class sizes are given.
    """
    rng = np.random.RandomState(seed)
    ordered = []
    for paths, tail in zip(full, base):
        first, rest = sorted(tail), sorted(set(paths).difference(tail))
        ordered.append([first[i] for i in rng.permutation(len(first))] + [rest[i] for i in rng.permutation(len(rest))])
    return ordered


def take(ordered, counts, name):
    """The first counts[c] images of each class, sorted."""
    for c, (paths, n) in enumerate(zip(ordered, counts)):
        if not 1 <= n <= len(paths):
            folder = Path(paths[0]).parent.name
            sys.exit(f"error: {name} wants {n} images of class {c} ({folder}), which has {len(paths)} to train; "
                     f"take a smaller {'--n-max or --holdout' if n else '--imbalance or --holdout'}")
    return [sorted(paths[:n]) for paths, n in zip(ordered, counts)]


def class_split(C, how):
    """Source and target classes of Table 4, both sorted; the source has the smaller half.

    overlap: the authors' shuffle, on ImageNet their list. independent: the first half, on ImageNet 398 animals and
    102 artefacts.
    """
    classes = list(range(C))
    if how == "overlap":
        random.Random(2020).shuffle(classes)
    return sorted(classes[:C // 2]), sorted(classes[C // 2:])


# ---- files and table

def write(file, text, overwrite=False):
    """Write a list, but not over one of other content: runs may have been trained on it."""
    if file.exists() and file.read_text(encoding="utf-8") == text:
        return
    if file.exists() and not overwrite:
        sys.exit(f"error: {file} exists with other content; --overwrite replaces it, --out names another folder")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def write_lists(out, splits, overwrite=False, published=()):
    """{name: split} to <name>.txt, but not the published ones, and the halves of all to <half>/<name>.txt."""
    def text(split):
        return "".join(f"{path} {c}\n" for c, paths in enumerate(split) for path in paths)

    for name, split in splits.items():
        if name not in published:
            write(out / f"{name}.txt", text(split), overwrite)
        for how in ("overlap", "independent"):
            for side, classes in zip(("source", "target"), class_split(len(split), how)):
                half = [split[c] for c in classes]
                write(out / f"{how}_{side}" / f"{name}.txt", text(half), overwrite)


def table(counts):
    """Print a line for each list of {name: class sizes}; returns {name: its line}."""
    print("list                classes    max    min      total imbalance   many / medium / few classes")
    lines = {}
    for name, n in counts.items():
        group = groups(n)
        line = {"classes": len(n), "max": max(n), "min": min(n), "total": sum(n)}
        line |= {g: group.count(g) for g in ("many", "medium", "few")}
        line |= {"imbalance": max(n) / max(1, min(n)), "counts": n}
        print("{:<19} {classes:>7} {max:>6} {min:>6} {total:>10,} {imbalance:>9.1f}   {many} / {medium} / {few}"
              .format(name, **line))
        lines[name] = line
    return lines


def write_table(out, dataset, counts):
    """splits.json; train_rep.py reads there which data set this is."""
    text = json.dumps({"dataset": dataset, "lists": table(counts)}) + "\n"
    write(out / "splits.json", text, overwrite=True)


def make_digits(out="data/digits", seed=0, imbalance=100):
    """Write the embedded set, images and lists, to the new folder `out`."""
    rng = np.random.RandomState(seed)  # the legacy generator: the same numbers everywhere, for ever
    per_class = sources.PER_CLASS["train"]
    base = given_to(rng.permutation(10), exponential_counts(10, per_class, imbalance))  # drawn, as for ImageNet-LT
    counts = {"full": [per_class] * 10, **family_counts(base)}

    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(out).parent) as tmp:  # renamed when complete
        root = Path(tmp) / "set"
        splits = sources.compose(root, rng)
        train = splits.pop("train")
        splits |= {f"train_{name}": take(train, n, f"train_{name}") for name, n in counts.items()}
        write_lists(root, splits)
        write_table(root, "digits", counts)
        if not Path(out).exists():  # another process may have been faster
            root.rename(out)
    print(f"composed {out}: {sources.PER_CLASS} digits of each class, {sources.COMPOSITIONS} images of each digit")


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", choices=tuple(DATASETS), default="digits", help="digits: the embedded ones")
    p.add_argument("--data", type=Path, help="folder of the images; CIFAR: data/<dataset>")
    p.add_argument("--out", type=Path, help="folder of the lists, by default --data; digits: of the images too")
    p.add_argument("--seed", type=int, default=0, help="of images, held-out images, order of the classes: 0")
    p.add_argument("--overwrite", action="store_true", help="replace lists of other content")
    p.add_argument("--full", help="list of all training images, in place of the folder train/")
    p.add_argument("--holdout", type=int, help="training images a class for val.txt; default 20, but no more than a "
                   "fifth of the class; CIFAR 0")
    # the base long tail and its family
    p.add_argument("--long-tail", help="exponential (CIFAR's), pareto, imagenet-lt, a list, or a file of class "
                   "sizes, numbers in the order of the classes")
    p.add_argument("--imbalance", type=float, default=100, help="exponential: largest over smallest class: 100")
    p.add_argument("--n-max", type=int, help="images of the largest class; default: as many as fit")
    p.add_argument("--n-min", type=int, default=5, help="pareto: images of the smallest class")
    p.add_argument("--lt0", choices=("formula", "authors"), default="formula", help="formula: 116 on ImageNet-LT; 115")
    p.add_argument("--sizes", help="only print the table of a file of class sizes, of imagenet-lt, or of a list")
    args = p.parse_args()

    spec = DATASETS[args.dataset]
    if args.data and args.dataset == "digits" and not args.sizes:
        sys.exit("error: the digits are embedded and take no --data; name a --dataset, or the digits' folder as --out")
    if not args.data and not spec["root"]:
        sys.exit(f"error: --dataset {args.dataset} needs --data, the folder of its images; --help has its layout")
    if args.long_tail and args.dataset in ("digits", "imagenet", "inat18"):
        sys.exit(f"error: --dataset {args.dataset} has its own long tail; --dataset folder takes --long-tail")

    args.data = args.data or Path(spec["root"])
    args.out = args.out or args.data
    if args.dataset == "imagenet":
        args.long_tail = spec["train"]
    if spec["kind"] == "cifar":
        args.long_tail = args.long_tail or "exponential"
        args.holdout = args.holdout or 0
    return args


def long_tail(args, full):
    """Class sizes (C,) of the base long tail, by a rule or of a list, and that list's images of each class. full: all
    training images of each class. A rule's largest size goes to the class with most images; of equal classes the first
    comes first (CIFAR's way), with pareto a random one (ImageNet-LT's)."""
    C = len(full)
    there = np.array([len(paths) for paths in full])
    if args.long_tail in ("exponential", "pareto"):
        if args.long_tail == "exponential":
            rule, classes, least = partial(exponential_counts, C, imbalance=args.imbalance), np.arange(C), 1
        else:
            classes = np.random.RandomState(args.seed).permutation(C)
            rule, least = partial(pareto_counts, C, n_min=args.n_min), args.n_min
        classes = classes[np.argsort(-there[classes], kind="stable")]     # the largest first
        fit = (n for n in range(max(there), least, -1) if (rule(n_max=n) <= there[classes]).all())
        n_max = args.n_max or next(fit, least)
        print(f"largest class of the long tail: {n_max} images (--n-max; by default as many as fit)")
        return given_to(classes, rule(n_max=n_max)), [[]] * C

    tail, base = [], [[]] * C
    if args.long_tail:
        tail = read_counts(args.long_tail)
        if not tail:
            base = sources.read_split(args.data, args.long_tail, C)
            tail = [len(paths) for paths in base]
        if len(tail) != C:
            sys.exit(f"error: --long-tail {args.long_tail} has {len(tail)} classes, the training images have {C}")
    return tail, base


def main():
    args = parse_args()
    root, out = args.data, args.out

    # without class folders
    if args.sizes:
        base = read_counts(args.sizes) or [len(paths) for paths in sources.read_split(root, args.sizes)]
        table(family_counts(base, args.lt0))
        return
    if args.dataset == "digits":
        if out.exists():
            sys.exit(f"error: {out} exists already; delete it, or name another folder with --out")
        make_digits(out, args.seed, args.imbalance)
        return
    if args.dataset == "inat18":
        counts = {}
        for name, lines in sources.inaturalist(root).items():
            write(out / f"{name}.txt", "".join(f"{path} {c}\n" for path, c in lines), args.overwrite)
            counts[name] = np.bincount([c for _, c in lines]).tolist()
        write_table(out, args.dataset, counts)
        return

    # all images: for training, for choosing, for the report
    if DATASETS[args.dataset]["kind"] == "cifar":
        sources.unpack_cifar(root, args.dataset)
    names, full, val, test = sources.class_folders(root, args.dataset, args.full, args.holdout, args.seed)
    held_out = [set(a + b) for a, b in zip(val, test)]
    full = [set(paths) - held for paths, held in zip(full, held_out)]

    tail, base = long_tail(args, full)
    sources.refuse_other_numbering(val, names)
    sources.refuse_other_numbering(base, names)
    for paths, held in zip(base, held_out):
        if both := held.intersection(paths):
            sys.exit(f"error: the long tail holds {min(both)} of the validation or test list; take it out of one")

    # one order of the images, and the lists that take its beginning
    ordered = order(full, base, args.seed)
    counts = {"full": [len(paths) for paths in ordered]}
    counts |= family_counts(tail, args.lt0) if tail else {"lt": counts["full"]}
    too_large = [name for name, n in counts.items() if name != "lt" and (np.array(n) > counts["full"]).any()]
    if too_large:
        print(f"left out: {', '.join(f'train_{name}.txt' for name in too_large)}; a class has too few images for them")
    counts = {name: n for name, n in counts.items() if name not in too_large}
    splits = {f"train_{name}": take(ordered, n, f"train_{name}") for name, n in counts.items()}
    splits["test"] = test
    if any(val):
        splits["val"] = val

    published = sources.PUBLISHED if args.dataset == "imagenet" else {}
    splits = {published.get(name, name): split for name, split in splits.items()}
    write_lists(out, splits, args.overwrite, published.values())
    sizes = {name: [len(paths) for paths in split] for name, split in splits.items()}
    write_table(out, args.dataset, sizes)
    if args.dataset == "folder":  # train_rep.py's defaults, 256 and 65536, are for a hundred thousand images
        power = 2 ** int(math.log2(sum(sizes["train_lt"])))
        print(f"next: python train_rep.py --dataset folder --data {root} --list {out / 'train_lt.txt'} "
              f"--batch {min(256, max(1, power // 4))} --queue {min(65536, power)}; "
              "then train_linear.py with its backbone.pt and the same --batch, and evaluate.py with its head.pt")


if __name__ == "__main__":
    main()
