"""
Where images come from: the embedded digits, CIFAR, iNaturalist 2018, and folders of class folders.

make_lt.py cuts them to long tails. A split is a list of C lists: the paths of each class, below the data folder.
"""
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from tqdm import tqdm

from data import read_list

EMBEDDED = Path(__file__).parent / "embedded" / "mnist_5k.npz"
PER_CLASS = {"train": 350, "val": 50, "test": 100}  # digits; none serves two splits
COMPOSITIONS = {"train": 1, "val": 4, "test": 4}    # images of each digit: other places, clutter and noise
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp", ".tif", ".tiff")
PUBLISHED = {"train_lt": "ImageNet_LT_train", "val": "ImageNet_LT_val", "test": "ImageNet_LT_test"}


def expect(path, what):
    """Exit where a file or folder is missing."""
    if not path.exists():
        sys.exit(f"error: {path} is missing: {what}; `python make_lt.py --help` has the layouts")


# ---- the embedded digits

def clutter(digits, i, rng):
    """Digit i of `digits` (n, 22, 22) in clutter, uint8 (32, 32): clean digits are too easy for a long tail to hurt.

    The digit has a random place. Five 7 x 7 fragments of other digits cover it where they are brighter. Gaussian noise
    of std 0.15 is added.
    """
    canvas = np.zeros((32, 32), np.uint8)
    y, x = rng.randint(0, 32 - 22 + 1, 2)
    canvas[y:y + 22, x:x + 22] = digits[i]

    for _ in range(5):
        other = (i + rng.randint(1, len(digits))) % len(digits)  # never i itself
        y, x = rng.randint(4, 4 + 14 - 7 + 1, 2)                 # from the inner 14 px, where the ink is
        v, u = rng.randint(0, 32 - 7 + 1, 2)
        fragment = digits[other][y:y + 7, x:x + 7]
        canvas[v:v + 7, u:u + 7] = np.maximum(canvas[v:v + 7, u:u + 7], fragment)

    noisy = canvas / 255 + 0.15 * rng.standard_normal((32, 32))
    return (noisy.clip(0, 1) * 255).round().astype(np.uint8)


def split_digits(labels, rng):
    """{split: indices (10 * PER_CLASS[split],) of its digits, class by class}, drawn from labels (n,)."""
    of_class = [rng.permutation(np.flatnonzero(labels == c)) for c in range(10)]
    splits, start = {}, 0
    for split, n in PER_CLASS.items():
        splits[split] = np.concatenate([digits[start:start + n] for digits in of_class])
        start += n
    return splits


def compose(root, rng):
    """Write root/<split>/<class>/<number>.png; returns {"train", "val", "test": split}."""
    embedded = np.load(EMBEDDED)
    chosen, splits = split_digits(embedded["labels"], rng), {}
    for name, n in PER_CLASS.items():
        digits = [Image.fromarray(digit) for digit in embedded["images"][chosen[name]]]
        digits = np.stack([digit.resize((22, 22), Image.BILINEAR) for digit in digits])
        copies = COMPOSITIONS[name]
        splits[name] = [[f"{name}/{c}/{i:03d}.png" for i in range(n * copies)] for c in range(10)]
        for i, path in enumerate(sum(splits[name], [])):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(clutter(digits, i // copies, rng)).save(root / path)
    return splits


# ---- CIFAR and iNaturalist

def unpack_cifar(root, dataset):
    """Write torchvision's CIFAR as root/{train,test}/<class>/<number>.png, once; downloads it where it is missing."""
    kind = CIFAR10 if dataset == "cifar10" else CIFAR100
    for part in ("train", "test"):
        if (root / part).is_dir():
            continue
        images = kind(root, train=part == "train", download=True)
        with tempfile.TemporaryDirectory(dir=root) as tmp:  # renamed when complete
            for i, (image, label) in enumerate(tqdm(images, desc=f"{dataset} {part}", leave=False)):
                file = Path(tmp, part, images.classes[label], f"{i:05d}.png")
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(file)
            Path(tmp, part).rename(root / part)


def inaturalist(root):
    """{list name: [(path, label)]} of the official json files, line for line the lists of Kang et al. 2020."""
    expect(root / "train_val2018", "the folder of the images")
    lists = {}
    for part in ("train", "val"):
        file = root / f"{part}2018.json"
        expect(file, "the official annotations")
        content = json.loads(file.read_text(encoding="utf-8"))
        label = {a["image_id"]: a["category_id"] for a in content["annotations"]}
        lists[f"iNaturalist18_{part}"] = [(image["file_name"], label[image["id"]]) for image in content["images"]]
    return lists


# ---- lists and class folders

def read_split(root, name, C=0):
    """A list file as a split of at least C classes."""
    paths, labels = read_list(root, name)
    split = [[] for _ in range(max(C, int(labels.max()) + 1))]
    for path, c in zip(paths, labels.tolist()):
        split[c].append(path)
    return split


def refuse_other_numbering(split, names):
    """Exit where a split numbers its class folders otherwise than in their sorted order, `names`."""
    for c, paths in enumerate(split):
        if paths and [Path(paths[0]).parent.name] != names[c:c + 1]:
            sys.exit(f"error: {paths[0]} has label {c}, but class {c} of the {len(names)} sorted class folders is "
                     f"{names[c] if c < len(names) else 'none'}; the list is of other data")


def scan(root, folder):
    """Class names and split of root/folder/<class>/<image>, both sorted. A folder without an image is no class."""
    names, split = [], []
    folders = sorted(entry.name for entry in os.scandir(root / folder) if entry.is_dir())
    for name in tqdm(folders, desc=f"{root / folder}", unit="class", leave=False):
        files = sorted(os.listdir(root / folder / name))
        paths = [Path(folder, name, file).as_posix() for file in files if file.lower().endswith(IMAGES)]
        if paths:
            names.append(name)
            split.append(paths)
        elif not name.endswith(("_source", "_target")):  # those hold lists
            print(f"no class: {root / folder / name} holds no image")
    if not names:
        sys.exit(f"error: {root / folder} holds no <class>/<image>; an image ends in {' '.join(IMAGES)}")
    return names, split


def hold_out(full, n, seed):
    """n images of each class, drawn by the seed. n None: 20, but no more than a fifth of the class."""
    rng, held = np.random.RandomState(seed), []
    for paths in full:
        wanted = max(1, min(20, len(paths) // 5)) if n is None else n
        if wanted >= len(paths):
            sys.exit(f"error: --holdout would take {wanted} of the {len(paths)} images of class "
                     f"{Path(paths[0]).parent.name} and leave none to train; say a smaller number, or drop the class")
        held.append([paths[i] for i in sorted(rng.permutation(len(paths))[:wanted])])
    return held


def class_folders(root, dataset, full_list, holdout, seed):
    """Class names and the splits full, val and test of the layouts that make_lt.py describes; full still holds val.

    full_list: a list in place of the folder train/, or None. holdout: images of each class for a missing val or test,
    see hold_out().
    """
    if full_list:
        full = read_split(root, full_list)
        names = [Path(paths[0]).parent.name for paths in full]
    elif dataset == "folder" and root.is_dir() and not (root / "train").is_dir():
        names, full = scan(root, "")
    else:
        expect(root / "train", "the folder of <class>/<image>")
        names, full = scan(root, "train")

    if dataset == "imagenet":
        for name in PUBLISHED.values():
            expect(root / f"{name}.txt", "a published list; --dataset folder --long-tail imagenet-lt needs none")
        val, test = (read_split(root, f"{PUBLISHED[part]}.txt", len(names)) for part in ("val", "test"))
        return names, full, val, test

    found = {}
    for part in ("val", "test"):
        if (root / part).is_dir():
            others, found[part] = scan(root, part)
            if others != names:
                sys.exit(f"error: {root / part} has other classes than the training images: "
                         f"{sorted(set(others) ^ set(names))[0]} is in one of them only")
    if not found and dataset == "folder":
        found["test"] = hold_out(full, holdout, seed)
        full = [sorted(set(paths).difference(out)) for paths, out in zip(full, found["test"])]
    elif not found:
        expect(root / "val", "the folder of <class>/<image> that becomes the test list")

    test = found["test"] if "test" in found else found.pop("val")
    val = found["val"] if "val" in found else hold_out(full, holdout, seed)
    return names, full, val, test


# ---- scenes of digits, for transfer_det.py

SIDE = 128  # pixels
FIRST_SCENE = {"train": 0, "val": 1_000_000, "test": 2_000_000}  # indices are seeds: no two splits share a background


def digit_images(split):
    """Images uint8 (n, 28, 28) and labels (n,) of the digits that make_lt.py gives to a split with its default seed. A
    backbone that was trained on data/digits has seen no digit of a test scene."""
    embedded = np.load(EMBEDDED)
    rng = np.random.RandomState(0)
    rng.permutation(10)  # make_lt.py draws the order of the classes first
    chosen = split_digits(embedded["labels"], rng)[split]
    return embedded["images"][chosen], embedded["labels"][chosen]


def scene(digits, labels, index):
    """1 to 5 digits of 24 to 48 px that do not touch, on a smooth background with noise. The seed is `index`.

    Returns pixels uint8 (SIDE, SIDE) and a list of (class, mask bool (SIDE, SIDE)).
    """
    rng = np.random.RandomState(index)
    coarse = Image.fromarray(rng.uniform(0, 0.5, (4, 4)).astype(np.float32))
    canvas = np.array(coarse.resize((SIDE, SIDE), Image.BICUBIC))
    occupied = np.zeros((SIDE, SIDE), bool)
    objects = []

    for _ in range(rng.randint(1, 6)):
        i = rng.randint(len(digits))
        size = rng.randint(24, 49)
        brightness = rng.uniform(0.6, 1)
        digit = Image.fromarray(digits[i]).resize((size, size), Image.BILINEAR)
        ink = np.array(digit) / np.float32(255)                           # (size, size), 0 to 1

        for _ in range(20):  # a digit that finds no free place in 20 tries is left out
            y, x = rng.randint(0, SIDE - size + 1, 2)
            place = np.s_[y:y + size, x:x + size]
            if (occupied[place] & (ink > 0)).any():
                continue
            canvas[place] += ink * (brightness - canvas[place])
            occupied[place] |= ink > 0
            mask = np.zeros((SIDE, SIDE), bool)
            mask[place] = ink > 0.25
            objects.append((int(labels[i]), mask))
            break

    canvas += 0.1 * rng.standard_normal(canvas.shape)
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8), objects
