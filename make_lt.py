"""
Build long-tailed splits. Without arguments: the embedded set, real handwritten digits in clutter, in about 10 seconds.

    python make_lt.py                                  # -> data/digits: PNGs, list files, the table below
    python make_lt.py --seed 1 --out data/digits1      # another draw of images and of the class order;
                                                       # train_rep.py --data data/digits1 trains on it

Prints a row (max, min, total, many / medium / few classes) for each training list: full (balanced, all images),
lt0 ... lt8 and lt, the paper's D_LT0 ... D_LT8 and D_LT (alpha = 0 ... 0.8 and 1).
"""
import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from data import groups

ALPHAS = {"lt0": 0.0, "lt2": 0.2, "lt4": 0.4, "lt6": 0.6, "lt8": 0.8, "lt": 1.0}
PER_CLASS = {"train": 350, "val": 50, "test": 100}  # 500 digits a class; no digit serves two splits, nor a part of one
EMBEDDED = Path(__file__).parent / "embedded" / "mnist_5k.npz"


def exponential_counts(num_classes, n_max, imbalance):
    """n_j = int(n_max * imbalance^(-j/(C-1))): CIFAR-LT's rule (Cui et al. 2019). Largest class first."""
    return [int(n_max * imbalance ** (-j / (num_classes - 1))) for j in range(num_classes)]


def alpha_counts(counts, alpha):
    """n_j = floor(N q_j^alpha / sum_k q_k^alpha + 1/2), q_j = counts_j / N: App. B of the paper.

    counts: class sizes of the base long-tailed set; alpha 1 gives them back, 0 makes all equal. Returns a list of int.
    """
    n = np.asarray(counts, dtype=np.float64)
    q = (n / n.sum()) ** alpha
    return np.floor(n.sum() * q / q.sum() + 0.5).astype(int).tolist()


def print_table(splits):
    """splits: {name: class counts}."""
    print(f"{'list':<6} {'max':>6} {'min':>6} {'total':>8}   many / medium / few classes")
    for name, counts in splits.items():
        group = groups(counts)
        print(f"{name:<6} {max(counts):>6} {min(counts):>6} {sum(counts):>8,}   " +
              " / ".join(str(group.count(g)) for g in ("many", "medium", "few")))


def clutter(digits, i, rng):
    """Cluttered digit i of `digits` (n, 28, 28) as uint8 (32, 32): 22 px at a random place, five 7 x 7 fragments of
    other digits, the brighter of the two where they meet, Gaussian noise of std 0.15.

    Clean digits are too easy for a long tail to hurt. Fragments come from the inner 14 px, where the ink is: an empty
    one distracts nobody.
    """
    def shrink(j):
        return np.asarray(Image.fromarray(digits[j]).resize((22, 22), Image.BILINEAR))

    canvas = np.zeros((32, 32), np.uint8)
    y, x = rng.randint(0, 32 - 22 + 1, 2)
    canvas[y:y + 22, x:x + 22] = shrink(i)
    for _ in range(5):
        other = (i + rng.randint(1, len(digits))) % len(digits)           # never i itself
        (y, x), (v, u) = rng.randint(4, 4 + 14 - 7 + 1, 2), rng.randint(0, 32 - 7 + 1, 2)
        canvas[v:v + 7, u:u + 7] = np.maximum(canvas[v:v + 7, u:u + 7], shrink(other)[y:y + 7, x:x + 7])
    noisy = canvas / 255 + 0.15 * rng.standard_normal((32, 32))
    return (noisy.clip(0, 1) * 255).round().astype(np.uint8)


def make_digits(out="data/digits", seed=0, imbalance=100):
    """Write the embedded set to the new folder `out`; returns {list name: class counts}.

    The largest class has all 350 training images; the order of the classes is shuffled by the seed. The images of a
    class are in one fixed order and every list takes a prefix of it, so two lists share as many images as they can.
    """
    embedded = np.load(EMBEDDED)
    images, labels = embedded["images"], embedded["labels"]
    rng = np.random.RandomState(seed)  # the legacy generator: its stream is frozen, the same everywhere for ever
    base = np.empty(10, int)
    base[rng.permutation(10)] = exponential_counts(10, PER_CLASS["train"], imbalance)
    splits = {"full": [PER_CLASS["train"]] * 10, **{name: alpha_counts(base, a) for name, a in ALPHAS.items()}}

    os.makedirs(Path(out).parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(out).parent) as tmp:  # renamed when complete: half a set is never seen
        root = Path(tmp) / "set"
        mine = {c: rng.permutation(np.flatnonzero(labels == c)) for c in range(10)}
        files = {}
        for split, n in PER_CLASS.items():
            digits = images[np.concatenate([mine[c][:n] for c in range(10)])]
            mine = {c: rest[n:] for c, rest in mine.items()}
            for i in range(len(digits)):
                c = i // n
                file = f"{split}/{c}/{i % n:03d}.png"
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(clutter(digits, i, rng)).save(root / file)
                files.setdefault((split, c), []).append(f"{file} {c}\n")
        lists = {f"train_{name}": [files["train", c][:n] for c, n in enumerate(counts)]
                 for name, counts in splits.items()}
        lists |= {split: [files[split, c] for c in range(10)] for split in ("val", "test")}
        for name, per_class in lists.items():
            (root / f"{name}.txt").write_text("".join(line for lines in per_class for line in lines), encoding="utf-8")
        try:
            root.rename(out)
        except OSError:
            if not Path(out).exists():  # else another process was faster, with the same result
                raise
    return splits


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="data/digits", help="new folder for images and lists")
    p.add_argument("--seed", type=int, default=0, help="of the images' composition and the order of the classes")
    p.add_argument("--imbalance", type=float, default=100, help="largest over smallest class of the base long tail")
    args = p.parse_args()
    if Path(args.out).exists():
        raise SystemExit(f"error: {args.out} exists already; delete it or name another folder with --out")
    if not 1 <= args.imbalance <= PER_CLASS["train"]:
        raise SystemExit(f"error: --imbalance {args.imbalance:g} must be between 1 and {PER_CLASS['train']}: the "
                         f"largest class has {PER_CLASS['train']} images, the smallest at least 1")
    splits = make_digits(args.out, args.seed, args.imbalance)
    print(f"cluttered digits, 10 classes, in {args.out}: " + ", ".join(f"{n} {s}" for s, n in PER_CLASS.items()) +
          " images a class")
    print_table(splits)


if __name__ == "__main__":
    main()
