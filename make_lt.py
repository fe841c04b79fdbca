"""
Make the list files that everything else starts from. A list file has one line per image, `relative/path label`.

    python make_lt.py                                # write the embedded digits, in clutter, to data/digits (10 s)
    python make_lt.py --seed 1 --out data/digits1    # other images, and the classes in another order
    python make_lt.py --dataset imagenet --data X    # the paper's splits, from the published lists in X
    python make_lt.py --dataset inat18 --data X      # or --dataset places365
    python make_lt.py --dataset cifar100 --imbalance 100                                  # downloads to data/cifar100
    python make_lt.py --dataset folder --data X --long-tail exponential --imbalance 50    # your own images
    python make_lt.py --dataset folder --data X --long-tail imagenet-lt    # ImageNet-LT's class sizes, other images
    python make_lt.py --sizes imagenet-lt            # only print the table of App. B; a file of class sizes works too

What X must contain (the label of a class is its position in the sorted folder names):
    imagenet   train/<wnid>/*.JPEG and val/<wnid>/*.JPEG (ILSVRC 2012, image-net.org), ImageNet_LT_{train,val,test}.txt
               (Liu et al. 2019, liuziwei7.github.io/projects/LongTail.html)
    inat18     train_val2018/, train2018.json, val2018.json (github.com/visipedia/inat_comp)
    places365  train/<class>/*.jpg, val/<class>/*.jpg (places365standard_easyformat.tar from places2.csail.mit.edu)
    cifar100   nothing, or cifar-100-python.tar.gz (www.cs.toronto.edu/~kriz/cifar.html), or its images in any format
               as train/<class>/<image> and test/<class>/<image>; the same holds for cifar10
    folder     train/<class>/<image> or <class>/<image>. If there is one more folder with the same classes, val/ or
               test/, it is the test set. If there are both, val/ is the validation set. If there is neither, --holdout
               images per class become the test set. Images of at most 64 px get CIFAR's settings.
A class may have subfolders. Names that begin with a dot are skipped.

What is written to --out, which is X by default:
    train_full.txt       all training images except those in val.txt
    train_lt.txt         the long tail; for folder and places365 it equals train_full.txt unless --long-tail is passed
    train_lt0 ... 8.txt  alpha = 0, 0.2, 0.4, 0.6, 0.8 (App. B of the paper); train_lt.txt has alpha = 1
    test.txt, val.txt    if X has no validation set, val.txt gets --holdout training images per class; CIFAR has no val
    splits.json          the printed table and the sizes of all classes
    {overlap,independent}_{source,target}/    these lists for half of the classes, relabelled from 0 (Table 4, Fig. 3)
ImageNet-LT's published lists, ImageNet_LT_*.txt, serve as its train_lt, val and test and are not written again. inat18
only gets iNaturalist18_{train,val}.txt and splits.json.
If X is read-only, pass another --out and train with `--dataset folder --data X --list OUT/train_lt.txt`.
"""
import argparse
import json
import math
import random
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np

import sources
from data import DATASETS, find_list, groups, small_dataset

ALPHAS = {"lt0": 0.0, "lt2": 0.2, "lt4": 0.4, "lt6": 0.6, "lt8": 0.8, "lt": 1.0}


# ---- class sizes: lists of C ints

def exponential_counts(num_classes, n_max, imbalance):
    """CIFAR-LT's rule, largest class first: n_j = int(n_max * imbalance^(-j/(C-1))) (Cui et al. 2019)."""
    return [int(n_max * imbalance ** (-j / (num_classes - 1))) for j in range(num_classes)]


def alpha_counts(counts, alpha):
    """App. B of the paper: n_j = floor(N * q_j^alpha / sum_k q_k^alpha + 1/2) with q_j = counts_j / N.

    counts: the class sizes of the base long tail. alpha = 1 returns them, and alpha = 0 makes all classes equal.
    """
    n = np.asarray(counts, dtype=np.float64)
    q = (n / n.sum()) ** alpha
    return np.floor(n.sum() * q / q.sum() + 0.5).astype(int).tolist()


def family_counts(base, lt0="formula"):
    """{name: class sizes} of the alpha family. With lt0="authors" each class of lt0 has N // C images: 115 on
    ImageNet-LT, where the formula gives 116."""
    counts = {name: alpha_counts(base, alpha) for name, alpha in ALPHAS.items()}
    if lt0 == "authors":
        counts["lt0"] = [sum(base) // len(base)] * len(base)
    return counts


def sizes_by_class(classes, sizes):
    """Reorder sizes (C,) by label. Class classes[0] has sizes[0] images, and so on."""
    by_class = np.zeros_like(sizes)
    by_class[classes] = sizes
    return by_class.tolist()


def largest_that_fits(available, imbalance, alphas):
    """The largest n_max for which every class has at least 1 and at most `available` images, for all these alphas.
    Returns 1 if there is none. available: (C,), largest class first. alpha = 1 is the exponential long tail itself."""
    for n_max in range(available[0], 1, -1):
        base = exponential_counts(len(available), n_max, imbalance)
        family = np.array([alpha_counts(base, alpha) for alpha in alphas])
        if min(base) > 0 and family.min() > 0 and (family <= available).all():
            return n_max
    return 1


def read_sizes(root, name):
    """Class sizes from a file of numbers, None from any other file. imagenet-lt means the published list's sizes."""
    file = find_list(root or "", name)
    if name == "imagenet-lt":
        file = sources.EMBEDDED.with_name("imagenet_lt_counts.txt")
    words = file.read_text(encoding="utf-8-sig", errors="replace").split() if file.is_file() else []
    if not words or not all(word.isdecimal() for word in words):
        return None
    return [int(word) for word in words]


# ---- which images: a split is a list of C lists of paths

def order_images(full, base, seed):
    """Put the images of each class in one order: first those of the base long tail, shuffled, then the rest, shuffled.

    Every list takes the beginning of this order, so two lists share as many images as their sizes allow. If only the
    sizes of the long tail are known, the classes of `base` are empty.
    """
    rng = np.random.RandomState(seed)
    ordered = []
    for paths, tail in zip(full, base):
        first = sorted(tail)
        rest = sorted(set(paths).difference(tail))
        shuffled = [first[i] for i in rng.permutation(len(first))]
        shuffled += [rest[i] for i in rng.permutation(len(rest))]
        ordered.append(shuffled)
    return ordered


def prefixes(ordered, sizes, names, name):
    """The split that has the first sizes[c] images of each class c, sorted by path."""
    split = []
    for c, (paths, n) in enumerate(zip(ordered, sizes)):
        if not paths:
            sys.exit(f"error: no training image of class {c} ({names[c]}) is left; pass a smaller --holdout")
        if not 1 <= n <= len(paths):
            sys.exit(f"error: {name} needs {n} images of class {c} ({names[c]}), which has {len(paths)} for "
                     f"training; pass a smaller {'--n-max' if n else '--imbalance'} or --holdout")
        split.append(sorted(paths[:n]))
    return split


def class_split(C, rule):
    """Source and target classes of Table 4, both sorted. The source has C // 2 classes.

    overlap: a random half, by the authors' shuffle, which gives their list on ImageNet.
    independent: the first half, which on ImageNet has 398 animals and 102 artefacts.
    """
    classes = list(range(C))
    if rule == "overlap":
        random.Random(2020).shuffle(classes)
    return sorted(classes[:C // 2]), sorted(classes[C // 2:])


# ---- files and table

def write(files, overwrite=False):
    """Write {file: text}, each file completely or not at all. If any of them exists with other content, write nothing
    and exit, because runs may have been trained on it."""
    changed = {}
    for file, text in files.items():
        content = text.encode("utf-8", "surrogateescape")  # file names keep their bytes
        if file.exists() and file.read_bytes() == content:
            continue
        if file.exists() and not overwrite:
            sys.exit(f"error: {file} exists with different content; pass --overwrite or another --out")
        changed[file] = content

    for file, content in changed.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.tmp")
        temporary.write_bytes(content)
        temporary.replace(file)


def write_lists(out, splits, overwrite=False):
    """Write {name: split} to <name>.txt, and each half of the classes to <half>/<name>.txt. ImageNet-LT's published
    lists are there already, so only their halves are written."""
    files = {}
    for name, split in splits.items():
        folders = {"": range(len(split))}
        for rule in ("overlap", "independent"):
            source, target = class_split(len(split), rule)
            folders |= {f"{rule}_source": source, f"{rule}_target": target}
        if name in sources.PUBLISHED.values():
            del folders[""]

        for folder, classes in folders.items():
            lines = []
            for label, c in enumerate(classes):
                lines += [f"{path} {label}\n" for path in split[c]]
            files[out / folder / f"{name}.txt"] = "".join(lines)
    write(files, overwrite)


def print_table(counts):
    """Print one line per list of {name: class sizes}. Returns {name: the numbers of the line and the class sizes}."""
    print("list                classes    max    min      total imbalance   "
          "many / medium / few classes")
    lines = {}
    for name, n in counts.items():
        group = groups(n)
        line = {"classes": len(n), "max": max(n), "min": min(n), "total": sum(n)}
        line |= {g: group.count(g) for g in ("many", "medium", "few")}
        line |= {"imbalance": max(n) / max(1, min(n)), "counts": n}
        print("{:<19} {classes:>7} {max:>6} {min:>6} {total:>10,} {imbalance:>9.1f}   "
              "{many} / {medium} / {few}".format(name, **line))
        lines[name] = line
    return lines


def write_table(out, dataset, counts):
    """Print the table and write it to splits.json, from which train_rep.py learns which data set this is."""
    text = json.dumps({"dataset": dataset, "lists": print_table(counts)}) + "\n"
    write({out / "splits.json": text}, overwrite=True)


def make_digits(out="data/digits", seed=0, imbalance=100):
    """Write the images and lists of the embedded digits to the new folder `out`."""
    rng = np.random.RandomState(seed)  # numpy's legacy generator gives the same numbers everywhere
    per_class = sources.PER_CLASS["train"]
    classes = rng.permutation(10)      # which classes are large is random, as in ImageNet-LT
    base = sizes_by_class(classes, exponential_counts(10, per_class, imbalance))
    counts = {"full": [per_class] * 10, **family_counts(base)}

    # fill a temporary folder and rename it when it is complete, so that `out` never holds half a data set
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(out).parent) as tmp:
        root = Path(tmp) / "set"
        splits = sources.compose(root, rng)
        train = splits.pop("train")
        for name, sizes in counts.items():
            splits[f"train_{name}"] = prefixes(train, sizes, range(10), f"train_{name}")
        write_lists(root, splits)
        write_table(root, "digits", counts)
        if not Path(out).exists():  # another process may have been faster
            root.rename(out)
    print(f"composed {out}: {sources.PER_CLASS} digits per class, {sources.COMPOSITIONS} images each")


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    layouts = [name for name in DATASETS if not name.startswith("small")]  # make_lt.py finds these by itself
    p.add_argument("--dataset", choices=layouts, default="digits",
                   help="see the layouts above; default: %(default)s, which are embedded")
    p.add_argument("--data", type=Path, help="the image folder X; default for CIFAR: data/<dataset>")
    p.add_argument("--out", type=Path, help="folder for the lists; default: --data")
    p.add_argument("--seed", type=int, default=0, help="seed of all random draws; default: %(default)s")
    p.add_argument("--overwrite", action="store_true", help="replace lists whose content differs")
    p.add_argument("--holdout", type=int, help="training images per class that go to val.txt, and to test.txt if "
                   f"X has none; default: {sources.HOLDOUT}, but at most a fifth of the class, and none for CIFAR. "
                   "A number that you pass is not capped")
    # the base long tail and its family
    p.add_argument("--long-tail", help="exponential (CIFAR-LT's rule), imagenet-lt (its class sizes), "
                   "a list file, or a file with one class size per label, in the order of the labels")
    p.add_argument("--imbalance", type=float, default=100, help="for the digits and the exponential rule: "
                   "size of the largest class divided by that of the smallest; default: %(default)s")
    p.add_argument("--n-max", type=int, help="for the exponential rule: size of the largest class; "
                   "default: the largest that fits")
    p.add_argument("--lt0", choices=("formula", "authors"), default="formula",
                   help="ImageNet-LT's train_lt0.txt has 116 images per class according to App. B's formula, "
                   "but 115 in the authors' table; default: %(default)s")
    p.add_argument("--sizes", help="only print the table for imagenet-lt, or for a file of class sizes")
    args = p.parse_args()
    if args.sizes:
        return args

    spec = DATASETS[args.dataset]
    if args.dataset == "digits" and args.data:
        sys.exit("error: the digits are embedded and take no --data; "
                 "pass the --dataset of your images, or the folder for the digits as --out")
    if args.data is None and spec["root"] is None:
        sys.exit(f"error: --dataset {args.dataset} needs --data, the folder of its images; "
                 "--help shows its layout")
    if args.dataset in ("digits", "imagenet", "inat18") and args.long_tail:
        sys.exit(f"error: --dataset {args.dataset} has its own long tail; "
                 "--dataset folder takes --long-tail")

    # None means that the flag was not passed
    args.data = args.data or Path(spec["root"])
    args.out = args.out or args.data
    if args.dataset == "imagenet":
        args.long_tail = spec["train"]
    if spec["kind"] == "cifar":  # CIFAR-LT keeps all images of its largest class, so none is held out
        args.long_tail = args.long_tail or "exponential"
        args.holdout = args.holdout or 0
    return args


def long_tail(args, full):
    """The class sizes (C,) of the base long tail, or None without --long-tail. Also its images, which are empty unless
    --long-tail is a list.

    full: all training images of each class. The exponential rule gives the largest size to the class with the most
    images. Classes with equally many images keep their order, as in CIFAR-LT.
    """
    C = len(full)
    no_images = [[]] * C
    if not args.long_tail:
        return None, no_images

    if args.long_tail == "exponential":
        available = np.array([len(paths) for paths in full])      # (C,)
        classes = np.argsort(-available, kind="stable")           # largest first
        n_max = args.n_max or largest_that_fits(available[classes], args.imbalance, [1.0])
        whole_family = largest_that_fits(available[classes], args.imbalance, ALPHAS.values())
        sizes = exponential_counts(C, n_max, args.imbalance)
        family = f"with --n-max {whole_family} the whole alpha family fits"
        if whole_family == 1:
            family = "no --n-max lets the whole alpha family fit"
        print(f"the largest class of the long tail has {n_max} images and the smallest {sizes[-1]}, "
              f"an imbalance of {n_max / max(1, sizes[-1]):.1f}; {family}")
        return sizes_by_class(classes, sizes), no_images

    sizes = read_sizes(args.data, args.long_tail)
    if sizes is None:
        images = sources.read_split(args.data, args.long_tail, full)
        return [len(paths) for paths in images], images
    if len(sizes) != C:
        sys.exit(f"error: --long-tail {args.long_tail} has {len(sizes)} classes, "
                 f"but the training images have {C}")
    return sizes, no_images


def main():
    sys.stdout.reconfigure(errors="backslashreplace")  # not every folder name can be printed
    args = parse_args()
    if args.sizes:
        sizes = read_sizes(args.data, args.sizes)
        if not sizes:
            sys.exit(f"error: --sizes {args.sizes} is not a file of class sizes")
        print_table(family_counts(sizes, args.lt0))
        return
    root, out = args.data, args.out

    # two data sets need no class folders: the embedded digits, and iNaturalist, which has its own lists
    if args.dataset == "digits":
        if out.exists():
            sys.exit(f"error: {out} already exists; delete it, or pass another folder as --out")
        make_digits(out, args.seed, args.imbalance)
        return
    if args.dataset == "inat18":
        files, counts = {}, {}
        for name, images in sources.inaturalist(root).items():
            files[out / f"{name}.txt"] = "".join(f"{path} {c}\n" for path, c in images)
            counts[name] = np.bincount([c for _, c in images]).tolist()
        write(files, args.overwrite)
        write_table(out, args.dataset, counts)
        return

    # find all images, then choose the base long tail from those that may be trained on
    if DATASETS[args.dataset]["kind"] == "cifar":
        sources.unpack_cifar(root, args.dataset)
    names, full, val, test = sources.class_folders(root, args.dataset, args.holdout, args.seed)
    tail, tail_images = long_tail(args, full)

    # put the images in one order and compute the class sizes of every training list, which takes the order's beginning
    ordered = order_images(full, tail_images, args.seed)
    available = [len(paths) for paths in ordered]
    family = family_counts(tail, args.lt0) if tail else {"lt": available}

    # near alpha = 0 a list may need more images of a small class than exist and is left out; train_lt must not be
    splits = {}
    for name, sizes in {"full": available, **family}.items():
        c = int(np.argmax(np.array(sizes) - available))
        if name != "lt" and sizes[c] > available[c]:
            print(f"left out: train_{name}.txt, because class {names[c]} has {available[c]} images "
                  f"and would need {sizes[c]}")
            continue
        splits[f"train_{name}"] = prefixes(ordered, sizes, names, f"train_{name}")
    splits |= {"test": test, "val": val}
    splits = {name: split for name, split in splits.items() if any(split)}  # --holdout 0: no val

    if args.dataset == "imagenet":
        splits = {sources.PUBLISHED.get(name, name): split for name, split in splits.items()}
    write_lists(out, splits, args.overwrite)
    sizes = {name: [len(paths) for paths in split] for name, split in splits.items()}
    dataset = args.dataset
    if dataset == "folder":
        dataset = small_dataset(root, sum(splits["train_full"], [])) or dataset
    write_table(out, dataset, sizes)

    # print the next command; train_rep.py's defaults are meant for a hundred thousand photographs, or for CIFAR
    if args.dataset == "folder":
        usual_batch, usual_queue = (256, 65536) if dataset == "folder" else (128, 4096)
        queue = min(usual_queue, 2 ** int(math.log2(sum(sizes["train_lt"]))))
        batch = min(usual_batch, max(1, queue // 4))
        command = f"python train_rep.py --data {shlex.quote(str(root))}"
        if out != root:
            command += f" --dataset {dataset} --list {shlex.quote(str(out / 'train_lt.txt'))}"
        if batch < usual_batch:
            command += f" --batch {batch}"
        if queue < usual_queue:
            command += f" --queue {queue}"
        print(f"next: {command}; then run train_linear.py on its backbone.pt with the same --batch, "
              "and evaluate.py on that run's head.pt")


if __name__ == "__main__":
    main()
