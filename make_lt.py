"""
Build long-tailed splits: the list files that everything else starts from. Without arguments: the embedded set, real
handwritten digits in clutter, in about 10 seconds.

    python make_lt.py                                                  # -> data/digits: PNGs, lists, the table below
    python make_lt.py --seed 1 --out data/digits1                      # another draw of images and of the class order
    python make_lt.py --dataset imagenet --data /path/to/imagenet      # the paper's splits, from the published lists
    python make_lt.py --dataset folder --data /path/to/imagenet --long-tail imagenet-lt    # without them: same counts
    python make_lt.py --dataset inat18 --data /path/to/inat2018        # lists from the official json files
    python make_lt.py --dataset places365 --data /path/to/places365    # full, val and test lists
    python make_lt.py --dataset cifar100 --imbalance 100               # CIFAR-100-LT; downloads to data/cifar100
    python make_lt.py --sizes imagenet-lt                              # only the table, of class sizes or of a list
    python make_lt.py --check --data data/digits                       # does every image open? is any in two splits?

Layouts: imagenet, places365 (its "easyformat") and folder have train/<class>/<image> and val/<class>/<image>; a class
is numbered by its place in the sorted names. Writes to --out (default: the data folder) train_full.txt, val.txt and
test.txt where they are not published; train_lt0 ... train_lt8.txt, the paper's D_LT0 ... D_LT8 (alpha = 0 ... 0.8;
train_lt.txt, or the published list, is alpha = 1); overlap_source/ ... independent_target/, the same lists for one half
of the classes (Table 4, Fig. 3); splits.json, the printed table; and class_sizes.png (Fig. 6).
"""
import argparse
import itertools
import json
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import torchvision
from tqdm import tqdm

import ddp
import digits
from data import DATASETS, OUTSIDE, class_counts, groups, opened, read_list
from ddp import InputError
from reading import printable, read_json

ALPHAS = {"lt0": 0.0, "lt2": 0.2, "lt4": 0.4, "lt6": 0.6, "lt8": 0.8, "lt": 1.0}
EMBEDDED = Path(__file__).parent / "embedded"

# what a data set needs, and where it comes from
SOURCES = {
    "imagenet": "ILSVRC 2012 (image-net.org) as train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, and ImageNet_LT_train.txt, "
                "ImageNet_LT_val.txt and ImageNet_LT_test.txt, which Liu et al. 2019 publish (liuziwei7.github.io/"
                "projects/LongTail.html); without those lists, `--dataset folder --long-tail imagenet-lt` makes some "
                "of the same class sizes",
    "places365": "Places365-Standard in the easy format (places2.csail.mit.edu: places365standard_easyformat.tar) as "
                 "train/<class>/*.jpg and val/<class>/*.jpg",
    "inat18": "iNaturalist 2018 (github.com/visipedia/inat_comp): train_val2018/ with the images, train2018.json and "
              "val2018.json",
    "cifar10": "cifar-10-python.tar.gz (www.cs.toronto.edu/~kriz/cifar.html), unpacked",
    "cifar100": "cifar-100-python.tar.gz (www.cs.toronto.edu/~kriz/cifar.html), unpacked",
    "folder": "train/<class>/<image>, and val/<class>/<image> or test/<class>/<image>",
}


# ---- class sizes: lists of int, one a class

def exponential_counts(num_classes, n_max, imbalance):
    """n_j = int(n_max * imbalance^(-j/(C-1))): CIFAR-LT's rule (Cui et al. 2019). Largest class first."""
    return [int(n_max * imbalance ** (-j / (num_classes - 1))) for j in range(num_classes)]


def pareto_counts(num_classes, n_max, n_min, shape=6):
    """Quantiles x_j = ((j + 1/2) / C)^(-1/shape) of a Pareto distribution, scaled to reach from n_max to n_min. Largest
    class first.

    ImageNet-LT was drawn from a Pareto distribution of power 6 (Liu et al. 2019, sec. 5); how exactly is not published.
    This rule gives 104,850 images for its 1000 classes from 1280 to 5, the published list has 115,846.
    """
    x = ((np.arange(num_classes) + 0.5) / num_classes) ** (-1 / shape)
    share = (x - x[-1]) / (x[0] - x[-1])
    return np.floor(n_min + (n_max - n_min) * share + 0.5).astype(int).tolist()


def alpha_counts(counts, alpha):
    """n_j = floor(N q_j^alpha / sum_k q_k^alpha + 1/2), q_j = counts_j / N: App. B of the paper.

    counts: class sizes of the base long-tailed set; alpha 1 gives them back, 0 makes all equal. Returns a list of int.
    """
    n = np.asarray(counts, dtype=np.float64)
    q = (n / n.sum()) ** alpha
    return np.floor(n.sum() * q / q.sum() + 0.5).astype(int).tolist()


def family_counts(base, lt0="formula"):
    """{lt0: counts, ... lt8: counts} of the alpha family of a base long tail. lt0 "authors" is the published list's
    N // C (115 on ImageNet-LT), "formula" the equation's rounding (116)."""
    counts = {name: alpha_counts(base, alpha) for name, alpha in ALPHAS.items() if alpha < 1}
    if lt0 == "authors":
        counts["lt0"] = [sum(base) // len(base)] * len(base)
    return counts


def read_counts(name):
    """A count file, one whole number a line and class; `imagenet-lt`: the published ones, shipped with the project.
    None where the file holds anything else, or nothing but zeros."""
    file = EMBEDDED / "imagenet_lt_counts.txt" if name == "imagenet-lt" else Path(name)
    words = file.read_text(encoding="utf-8", errors="replace").split() if file.is_file() else [""]
    counts = [int(word) for word in words if word.isdecimal() and len(word) < 10]
    return counts if len(counts) == len(words) and any(counts) else None


# ---- images: a split is a list of C lists of paths

def scan(root, folder):
    """Class names and the split of root/folder/<class>/<image>, both sorted."""
    names = sorted(entry.name for entry in os.scandir(root / folder) if entry.is_dir())
    kinds = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp")
    split = [sorted(f"{folder}/{name}/{file.name}" for file in os.scandir(root / folder / name)
                    if file.name.lower().endswith(kinds))
             for name in tqdm(names, desc=folder, unit="class", leave=False)]
    for name, paths in zip(names, split):
        if not paths:
            raise InputError(f"{root / folder / name} holds no image; every class folder needs one, or take it away")
    return names, split


def read_split(root, name, C=0):
    """A list file as a split, of C classes at least."""
    paths, labels = read_list(root, name)
    split = [[] for _ in range(max(C, int(labels.max()) + 1))]
    for path, c in zip(paths, labels.tolist()):
        split[c].append(path)
    return split


def refuse_other_numbering(split, names):
    """Raise InputError where a split numbers its class folders otherwise than their sorted order `names` does."""
    for c, paths in enumerate(split):
        if paths and [Path(paths[0]).parent.name] != names[c:c + 1]:
            raise InputError(f"{paths[0]} has label {c}, but class {c} of the {len(names)} sorted class folders is "
                             f"{names[c] if c < len(names) else 'none'}; the list is of other data")


def order(base, full, held_out, seed):
    """The images of each class in the order in which all lists take them: those of the base long tail, shuffled, then
    the rest of the full list, shuffled, and none that is held out.

    Every list of the family is a prefix of it. So any two share as many images as their sizes allow, along the authors'
    chain LT -> LT8 -> ... -> LT0 (drawn from the one before, else topped up) and between all others too.
    """
    rng = np.random.RandomState(seed)
    ordered = []
    for c in range(len(full)):
        first = sorted(base[c]) if base else []
        if not held_out[c].isdisjoint(first):
            raise InputError(f"the long tail holds the validation image {min(held_out[c].intersection(first))}; take "
                             "it out of one of the two lists")
        taken = held_out[c].union(first)
        rest = [path for path in sorted(full[c]) if path not in taken]
        ordered.append([first[i] for i in rng.permutation(len(first))] + [rest[i] for i in rng.permutation(len(rest))])
    return ordered


def take(ordered, counts, name):
    """The first counts[c] images of each class; InputError where a class has fewer."""
    for c, (paths, n) in enumerate(zip(ordered, counts)):
        if n > len(paths):
            raise InputError(f"{name} wants {n} images of class {c}, but there are {len(paths)} without the validation "
                             "images; take a smaller --n-max, or a list with more of them as --full")
    return [paths[:n] for paths, n in zip(ordered, counts)]


def class_split(C, how):
    """Source and target classes of Table 4, both sorted: one half each (the source has the smaller where C is odd).

    overlap: at random, with the authors' shuffle, so that on ImageNet this is their list; independent: the first half
    in order, on ImageNet 398 animals and 102 artefacts against artefacts and the rest.
    """
    classes = list(range(C))
    if how == "overlap":
        random.Random(2020).shuffle(classes)
    return sorted(classes[:C // 2]), sorted(classes[C // 2:])


# ---- files

def write(file, text, overwrite=False):
    """All or nothing, and never over a list of other content, which runs may have been trained on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and not overwrite:
        if file.read_bytes() != text.encode():
            raise InputError(f"{file} exists with other content; --overwrite replaces it, --out names another folder")
        return
    tmp = file.with_name(f"{file.name}.tmp{os.getpid()}")
    tmp.write_bytes(text.encode())
    os.replace(tmp, file)


def list_text(split):
    """`path label` lines by class, in the order of the split."""
    return "".join(f"{path} {c}\n" for c, paths in enumerate(split) for path in paths)


def write_splits(out, splits, overwrite=False, keep=()):
    """Write the lists {name: split}, but not those to keep, and the halves of all (class_split) as <half>/<name>.txt,
    their labels renumbered from 0."""
    for name, split in splits.items():
        if name not in keep:
            write(out / f"{name}.txt", list_text(split), overwrite)
        for how in ("overlap", "independent"):
            for side, classes in zip(("source", "target"), class_split(len(split), how)):
                write(out / f"{how}_{side}" / f"{name}.txt", list_text([split[c] for c in classes]), overwrite)


def rows_of(counts):
    """{list name: class sizes} -> {list name: what the table says of it}."""
    rows = {}
    for name, n in counts.items():
        group = groups(n)
        rows[name] = {"classes": len(n), "max": max(n), "min": min(n), "total": sum(n),
                      **{g: group.count(g) for g in ("many", "medium", "few")}, "imbalance": max(n) / max(1, min(n))}
    return rows


def write_table(out, dataset, counts):
    """splits.json: which data set this is, which train_rep.py reads, and the row and class sizes of each list."""
    lists = {name: {**row, "counts": counts[name]} for name, row in rows_of(counts).items()}
    write(out / "splits.json", json.dumps({"dataset": dataset, "lists": lists}) + "\n", overwrite=True)


def print_table(counts):
    """A line for each list of counts, {list name: class sizes}."""
    rows = rows_of(counts)
    width = max(map(len, counts))
    print(f"{'list':<{width}} {'classes':>7} {'max':>6} {'min':>6} {'total':>10} {'imbalance':>9}   "
          "many / medium / few classes")
    for name, row in rows.items():
        print(f"{name:<{width}} {row['classes']:>7} {row['max']:>6} {row['min']:>6} {row['total']:>10,} "
              f"{row['imbalance']:>9.1f}   {row['many']} / {row['medium']} / {row['few']}")


def draw_sizes(out, counts):
    """class_sizes.png: images of each class, largest first, a line for each list (Fig. 6)."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is missing, `pip install matplotlib`")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    matplotlib.rcdefaults()  # not the reader's own style, which may be light on dark
    # 6.4 in. wide with 11 pt is legible on a telephone; an opaque margin, so that a dark page does not reach the axes
    plt.rcParams.update({"font.size": 11, "legend.frameon": False, "figure.facecolor": "white", "figure.dpi": 150,
                         "savefig.bbox": "tight", "savefig.pad_inches": 0.15})
    fig, ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for i, ((name, n), marker, style) in enumerate(zip(counts.items(), itertools.cycle("osD^vPX*"),
                                                       itertools.cycle(("-", "--", "-.", ":")))):
        ax.plot(range(1, len(n) + 1), sorted(n, reverse=True), marker=marker, linestyle=style, label=name,
                markevery=max(1, len(n) // 10), color=plt.cm.plasma(0.8 * i / len(counts)))  # up to an orange
    ax.set(xlabel="classes, largest first", ylabel="training images of the class", yscale="log")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.grid(alpha=0.3)
    fig.legend(loc="outside lower center", ncols=4, fontsize=10)
    fig.savefig(out / "class_sizes.png")
    plt.close(fig)


# ---- the embedded digits

def make_digits(out="data/digits", seed=0, imbalance=100):
    """Write the embedded set and its lists to the new folder `out`; returns {list name: class sizes}.

    The largest class has all 350 training images; the order of the classes is shuffled by the seed. The images of a
    class are in one fixed order and every list takes a prefix of it, so two lists share as many images as they can.
    """
    rng = np.random.RandomState(seed)  # the legacy generator: its stream is frozen, the same everywhere for ever
    base = [0] * 10
    for c, n in zip(rng.permutation(10), exponential_counts(10, digits.PER_CLASS["train"], imbalance)):
        base[c] = n
    counts = {"full": [digits.PER_CLASS["train"]] * 10, **family_counts(base), "lt": base}
    os.makedirs(Path(out).parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(out).parent) as tmp:  # renamed when complete: half a set is never seen
        root = Path(tmp) / "set"
        images = digits.compose(root, rng)
        write_splits(root, {**{f"train_{name}": take(images["train"], n, name) for name, n in counts.items()},
                            "val": images["val"], "test": images["test"]})
        write_table(root, "digits", counts)
        try:
            root.rename(out)
        except OSError:
            if not Path(out).exists():  # else another process was faster, with the same result
                raise
    return counts


# ---- other data sets

def make_cifar(root, dataset):
    """Write torchvision's CIFAR as PNGs to root/{train,test}/<class>/, once; its pickles are checked against their
    checksums."""
    if (root / "train").exists() and (root / "test").exists():
        return
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[dataset]
    try:
        parts = {"train": kind(root, train=True, download=True), "test": kind(root, train=False, download=True)}
    except Exception as error:  # URLError, HTTPError, RuntimeError of a wrong checksum, OSError ...
        raise InputError(f"{dataset} is not in {root} and did not download ({error}); put there "
                         f"{SOURCES[dataset]}") from None
    for split, images in parts.items():
        if (root / split).exists():
            continue
        with tempfile.TemporaryDirectory(dir=root) as tmp:  # renamed when complete
            for i, (image, label) in enumerate(tqdm(images, desc=f"{dataset} {split}", unit="image", leave=False)):
                file = Path(tmp) / split / images.classes[label] / f"{i:05d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(file)
            (Path(tmp) / split).rename(root / split)


def make_inat(root, out, overwrite):
    """The lists of iNaturalist 2018 from its json files, line for line those of Kang et al. 2020; returns {list name:
    class sizes}."""
    sizes = {}
    for part in ("train", "val"):
        file = root / f"{part}2018.json"
        if not file.is_file() or not (root / "train_val2018").is_dir():
            raise InputError(f"{file} or {root / 'train_val2018'} is missing; expected {SOURCES['inat18']}")
        content = read_json(file, "the annotations of iNaturalist 2018")
        try:
            label = {a["image_id"]: a["category_id"] for a in content["annotations"]}
            pairs = [(image["file_name"], label[image["id"]]) for image in content["images"]]
            wrong = [path for path, c in pairs if OUTSIDE.search(path) or type(c) is not int or not 0 <= c < 100_000]
        except (LookupError, TypeError) as error:
            raise InputError(f"{file}: not the annotations of iNaturalist 2018 ({type(error).__name__})") from None
        if wrong or not pairs:
            raise InputError(f"{file}: {f'`{printable(wrong[0])}` is no' if wrong else 'no'} path below the data "
                             "folder with a whole number as its category")
        lines = [f"{path} {c}\n" for path, c in pairs]
        name = f"iNaturalist18_{part}"
        write(out / f"{name}.txt", "".join(lines), overwrite)
        sizes[name] = class_counts(read_list(out, f"{name}.txt")[1]).tolist()
    return sizes


def scanned_lists(root, names, full, holdout, seed):
    """val and test of class folders: test from test/ or, without it, val/; val from val/ where there are both, else
    `holdout` images of each training class, drawn by the seed (none: val is None)."""
    folders = [folder for folder in ("val", "test") if (root / folder).is_dir()]
    if not folders:
        raise InputError(f"{root / 'test'} and {root / 'val'} are missing; expected {SOURCES['folder']}")
    splits = []
    for folder in folders:
        others, split = scan(root, folder)
        if others != names:
            raise InputError(f"{root / folder} and {root / 'train'} hold other classes: "
                             f"{sorted(set(others) ^ set(names))[0]} is in one of them only")
        splits.append(split)
    if len(splits) == 2:
        return splits
    rng = np.random.RandomState(seed)
    for name, paths in zip(names, full):
        if len(paths) <= holdout:
            raise InputError(f"class {name} has {len(paths)} training images; --holdout {holdout} would leave none")
    val = [[paths[i] for i in sorted(rng.permutation(len(paths))[:holdout])] for paths in full]
    return val if holdout else None, splits[0]


def long_tail(args, root, C, n_max):
    """The base long tail by --long-tail: its class sizes, and where it is a list file its split, else None."""
    if args.long_tail == "exponential":
        counts = exponential_counts(C, n_max, args.imbalance)
    elif args.long_tail == "pareto":
        counts = [0] * C
        largest_first = pareto_counts(C, n_max, args.n_min)
        for c, n in zip(np.random.RandomState(args.seed).permutation(C), largest_first):
            counts[c] = n  # which class is how large is drawn, as in ImageNet-LT
    elif counts := read_counts(args.long_tail):
        print(f"class sizes of {args.long_tail}, another draw of images: accuracies will be near, not equal, to those "
              "on the list that the sizes are of")
    else:
        base = read_split(root, args.long_tail, C)
        return [len(paths) for paths in base], base
    if len(counts) != C:
        raise InputError(f"--long-tail {args.long_tail} holds {len(counts)} class sizes for {C} classes")
    if min(counts) < 1:
        raise InputError(f"the smallest class would have no image (the largest {n_max}); take a smaller --imbalance")
    return counts, None


def make_folder(args, spec, root, out):
    """All lists of a folder of class folders: imagenet, places365, CIFAR, any other; returns {list name: class sizes}
    of those to train on."""
    if args.full:
        full = read_split(root, args.full)
        names = [Path(paths[0]).parent.name if paths else "" for paths in full]
    elif (root / "train").is_dir():
        names, full = scan(root, "train")
    else:
        raise InputError(f"{root / 'train'} is missing; expected {SOURCES[args.dataset]}")
    if len(names) < 2:
        raise InputError(f"{args.full or root / 'train'} has {len(names)} class folders; two at least make a data set")
    published = args.dataset == "imagenet"  # long tail, val and test
    if published:
        for name in (spec["train"], spec["val"], spec["test"]):
            if not (root / name).is_file():
                raise InputError(f"{root / name} is missing; expected {SOURCES['imagenet']}")
        val, test = read_split(root, spec["val"], len(names)), read_split(root, spec["test"], len(names))
    else:
        val, test = scanned_lists(root, names, full, args.holdout, args.seed)

    splits, sizes, base = {"val": val, "test": test} if val else {"test": test}, {}, None
    held_out = [set(paths) for paths in val] if val else [set()] * len(names)
    if args.long_tail:
        n_max = args.n_max or min(len(set(paths) - forbidden) for paths, forbidden in zip(full, held_out))
        sizes["lt"], base = long_tail(args, root, len(names), n_max)
    for split in (val, base, None if published else test):  # some copies of ImageNet's val/ have no class folders
        refuse_other_numbering(split or [], names)
    ordered = order(base, full, held_out, args.seed)
    splits["train_full"] = [sorted(paths) for paths in ordered]
    if sizes:
        sizes = {**family_counts(sizes["lt"], args.lt0), **sizes}
    for name, n in sizes.items():
        splits[f"train_{name}"] = [sorted(paths) for paths in take(ordered, n, f"train_{name}")]
    keep = {}
    if published:  # they stay as they are, under their own names
        keep = {"train_lt": Path(spec["train"]).stem, "val": Path(spec["val"]).stem, "test": Path(spec["test"]).stem}
        splits = {keep.get(name, name): split for name, split in splits.items()}
    write_splits(out, splits, args.overwrite, keep.values())
    return {name: [len(paths) for paths in split] for name, split in splits.items() if "train" in name}


# ---- the check

def check(root, names, workers):
    """Print what is wrong with the lists `names` below root: files that are missing or do not decode, images that are
    twice in a list, or in the training and in the val or test lists (by name, and by content). Returns their number."""
    part = {name: next((part for part in ("val", "test") if part in Path(name).stem), "train") for name in names}
    used, found = {}, []                                                  # path -> parts that use it
    for name in names:
        paths, labels = read_list(root, name)
        n = class_counts(labels)
        print(f"{name}: {len(paths):,} images, {len(n)} classes of {int(n.min())} to {int(n.max())}")
        found += [f"{name}: class {c} has no image" for c in (n == 0).nonzero()[:, 0].tolist()]
        if len(set(paths)) < len(paths):
            seen = set()
            found += [f"{name}: {path} is there twice" for path in paths if path in seen or seen.add(path)]
        for path in paths:
            used.setdefault(path, set()).add(part[name])
    paths, by_content = list(used), {}
    for path, digest, wrong in opened(root, paths, workers):
        if wrong:
            found.append(f"{path}: {wrong}")
        else:
            by_content.setdefault(digest, []).append(path)
        if len(used[path]) > 1:
            found.append(f"{path}: in the lists of {' and '.join(sorted(used[path]))}")
    for same in by_content.values():
        parts = {p for path in same for p in used[path]}
        if len(same) > 1 and len(parts) > 1:
            found.append(f"the same image under {len(same)} names, in the lists of {' and '.join(sorted(parts))}: "
                         f"{', '.join(same[:3])}")
    print("\n".join(found[:100]) + f"\n... and {len(found) - 100:,} more" * (len(found) > 100) + "\n" * bool(found) +
          f"{len(paths):,} images of {len(names)} lists: {len(found):,} faults")
    return len(found)


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", choices=tuple(DATASETS), default="digits")
    p.add_argument("--data", type=Path, help="folder of the images; CIFAR: data/<dataset>, where it downloads to")
    p.add_argument("--out", type=Path, help="folder for the lists, by default --data; digits: a new one for all")
    p.add_argument("--seed", type=int, default=0, help="of every choice: images, held-out images, order of the classes")
    p.add_argument("--overwrite", action="store_true", help="replace lists of other content")
    # the base long tail and its family
    p.add_argument("--long-tail", help="alpha = 1: exponential, pareto, imagenet-lt (the published class sizes), a "
                   "file with a class size a line, or a list; default: CIFAR exponential, imagenet the published list")
    p.add_argument("--imbalance", type=float, default=100, help="exponential: largest over smallest class")
    p.add_argument("--n-max", type=int, help="images of the largest class; by default those of the smallest there is")
    p.add_argument("--n-min", type=int, default=5, help="pareto: images of the smallest class")
    p.add_argument("--lt0", choices=("formula", "authors"), default="formula", help="alpha 0 by App. B's rounding (116 "
                   "a class on ImageNet-LT), or N // C as the published list (115)")
    p.add_argument("--full", help="list of all training images, in place of reading the folder train/")
    p.add_argument("--holdout", type=int, help="training images of each class that become val.txt where the set has "
                   "none: 20, CIFAR 0")
    # without images to be drawn
    p.add_argument("--sizes", help="only print the alpha family of a file of class sizes, of imagenet-lt, or of a list")
    p.add_argument("--check", action="store_true", help="only open every image of the lists in --data, and report")
    p.add_argument("--lists", nargs="+", help="of --check; default: all lists in --data")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="of --check")
    args = p.parse_args()
    spec = DATASETS[args.dataset]
    cifar = spec["kind"] == "cifar"
    composed = args.dataset == "digits" and not args.check and not args.sizes
    if composed and args.data:
        raise InputError("the embedded digits come from the project itself; --out names their new folder, --dataset "
                         "other data")
    if not composed and not args.sizes:
        args.data = args.data or spec["root"]
        if args.data is None:
            raise InputError(f"--data names the folder; expected there {SOURCES[args.dataset]}")
    if args.holdout is None:
        args.holdout = 0 if cifar else 20
    if args.long_tail and args.dataset in ("imagenet", "inat18", "digits"):
        raise InputError(f"--dataset {args.dataset} has its own long tail; --long-tail goes with folder, places365 and "
                         "CIFAR")
    if args.long_tail is None:
        args.long_tail = "exponential" if cifar else spec["train"] if args.dataset == "imagenet" else None
    if args.imbalance < 1 or min(args.holdout, args.workers) < 0 or args.n_min < 1 or (args.n_max or 1) < 1:
        raise InputError("--imbalance, --n-max and --n-min must be at least 1, --holdout and --workers at least 0")
    return args


def main():
    args = parse_args()
    if args.sizes:
        base = read_counts(args.sizes) or [len(paths) for paths in read_split(args.data or ".", args.sizes)]
        print_table({**family_counts(base, args.lt0), "lt": base})
    elif args.check:
        names = args.lists or sorted(file.name for file in Path(args.data).glob("*.txt"))
        if not names:
            raise InputError(f"{args.data} holds no list; name them with --lists")
        if faults := check(args.data, names, args.workers):
            raise InputError(f"{faults:,} faults in {args.data}")
    elif args.dataset == "digits":
        out = args.out or Path(DATASETS["digits"]["root"])
        if out.exists():
            raise InputError(f"{out} exists already; delete it or name another folder with --out")
        if args.imbalance > digits.PER_CLASS["train"]:
            raise InputError(f"--imbalance {args.imbalance:g} must be between 1 and {digits.PER_CLASS['train']}: the "
                             f"largest class has {digits.PER_CLASS['train']} images, the smallest at least 1")
        counts = make_digits(out, args.seed, args.imbalance)
        print(f"cluttered digits, 10 classes, in {out}: " + ", ".join(f"{n} {s}" for s, n in digits.PER_CLASS.items()) +
              " images a class")
    else:
        root = Path(args.data)
        out = args.out or root
        if DATASETS[args.dataset]["kind"] == "cifar":
            make_cifar(root, args.dataset)
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; expected there {SOURCES[args.dataset]}")
        if args.dataset == "inat18":
            counts = make_inat(root, out, args.overwrite)
        else:
            counts = make_folder(args, DATASETS[args.dataset], root, out)
    if not args.check and not args.sizes:
        write_table(out, args.dataset, counts)
        print_table(counts)
        draw_sizes(out, counts)


if __name__ == "__main__":
    ddp.run(main)
