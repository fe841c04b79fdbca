"""
The embedded set: real handwritten digits in clutter, composed from embedded/mnist_5k.npz. make_lt.py cuts it to a long
tail; for everybody without data or GPU.
"""
from pathlib import Path

import numpy as np
from PIL import Image

EMBEDDED = Path(__file__).parent / "embedded" / "mnist_5k.npz"
PER_CLASS = {"train": 350, "val": 50, "test": 100}  # 500 digits a class; no digit serves two splits, nor a part of one


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


def split_digits(labels, rng):
    """{split: indices (10 * PER_CLASS[split],) of its digits, class by class}, drawn from labels (n,)."""
    mine = {c: rng.permutation(np.flatnonzero(labels == c)) for c in range(10)}
    splits, start = {}, 0
    for split, n in PER_CLASS.items():
        splits[split] = np.concatenate([mine[c][start:start + n] for c in range(10)])
        start += n
    return splits


def compose(root, rng):
    """Write root/<split>/<class>/<number>.png; returns {split: [its paths below root, sorted] for each class}."""
    embedded = np.load(EMBEDDED)
    chosen, paths = split_digits(embedded["labels"], rng), {}
    for split, n in PER_CLASS.items():
        digits = embedded["images"][chosen[split]]
        paths[split] = [[f"{split}/{c}/{i:03d}.png" for i in range(n)] for c in range(10)]
        for i, file in enumerate(path for of_class in paths[split] for path in of_class):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(clutter(digits, i, rng)).save(root / file)
    return paths
