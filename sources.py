"""
Where images come from: the embedded digits, CIFAR, iNaturalist 2018, and folders of class folders.

make_lt.py turns them into long-tailed lists. A split is a list of C lists, the paths of each class relative to the data
folder.
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
PER_CLASS = {"train": 350, "val": 50, "test": 100}  # digits per class; no digit is in two splits
COMPOSITIONS = {"train": 1, "val": 4, "test": 4}    # images per digit; position, clutter and noise vary
HOLDOUT = 20                                        # validation images per class of a data set that has none
IMAGES = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".gif", ".webp", ".tif", ".tiff")
PUBLISHED = {"train_lt": "ImageNet_LT_train", "val": "ImageNet_LT_val", "test": "ImageNet_LT_test"}


def expect(path, what):
    """Exit if a file or folder is missing."""
    if not path.exists():
        sys.exit(f"error: {path} is missing: {what}; `python make_lt.py --help` shows the layouts")


# ---- the embedded digits

def clutter(digits, i, rng):
    """Digit i of `digits` (n, 22, 22) in clutter, uint8 (32, 32). Clean digits are too easy for a long tail to hurt.

    The digit lies at a random position. Five 7 x 7 fragments of other digits replace its pixels wherever they are
    brighter. Then Gaussian noise with a std of 0.15 is added.
    """
    canvas = np.zeros((32, 32), np.uint8)
    y, x = rng.randint(0, 32 - 22 + 1, 2)
    canvas[y:y + 22, x:x + 22] = digits[i]

    for _ in range(5):
        other = (i + rng.randint(1, len(digits))) % len(digits)  # never digit i itself
        y, x = rng.randint(4, 4 + 14 - 7 + 1, 2)                 # in the inner 14 px, where the ink is
        v, u = rng.randint(0, 32 - 7 + 1, 2)
        fragment = digits[other][y:y + 7, x:x + 7]
        canvas[v:v + 7, u:u + 7] = np.maximum(canvas[v:v + 7, u:u + 7], fragment)

    noisy = canvas / 255 + 0.15 * rng.standard_normal((32, 32))
    return (noisy.clip(0, 1) * 255).round().astype(np.uint8)


def split_digits(labels, rng):
    """Draw each split's digits. Returns {split: indices (10 * PER_CLASS[split],) into labels (n,), class by class}."""
    by_class = [rng.permutation(np.flatnonzero(labels == c)) for c in range(10)]
    splits, start = {}, 0
    for split, n in PER_CLASS.items():
        splits[split] = np.concatenate([digits[start:start + n] for digits in by_class])
        start += n
    return splits


def compose(root, rng):
    """Write the images as root/<split>/<class>/<number>.png. Returns {"train", "val", "test": split}."""
    embedded = np.load(EMBEDDED)
    chosen = split_digits(embedded["labels"], rng)
    splits = {}
    for name, per_class in PER_CLASS.items():
        digits = [Image.fromarray(digit) for digit in embedded["images"][chosen[name]]]
        digits = np.stack([digit.resize((22, 22), Image.BILINEAR) for digit in digits])

        # digits and paths are both class by class, so image number i shows digit i // copies
        copies = COMPOSITIONS[name]
        numbers = range(per_class * copies)
        splits[name] = [[f"{name}/{c}/{number:03d}.png" for number in numbers] for c in range(10)]
        for i, path in enumerate(sum(splits[name], [])):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(clutter(digits, i // copies, rng)).save(root / path)
    return splits


# ---- CIFAR and iNaturalist

def unpack_cifar(root, dataset):
    """Write torchvision's CIFAR as root/{train,test}/<class>/<number>.png, after downloading it if necessary. Folders
    that exist already must have CIFAR's class sizes."""
    kind, C = (CIFAR10, 10) if dataset == "cifar10" else (CIFAR100, 100)
    for part, total in (("train", 50_000), ("test", 10_000)):
        if (root / part).is_dir():
            if [len(paths) for paths in scan(root, part)[1]] != [total // C] * C:
                sys.exit(f"error: {root / part} does not have the {C} classes of {total // C} images that {dataset} "
                         "has; pass another --data, or --dataset folder")
            continue
        try:
            images = kind(root, train=part == "train", download=True)
        except (OSError, RuntimeError) as error:
            sys.exit(f"error: {dataset} could not be downloaded ({error}); put {kind.filename} from www.cs."
                     f"toronto.edu/~kriz/cifar.html, or class folders of its images, into {root}")
        with tempfile.TemporaryDirectory(dir=root) as tmp:  # renamed when it is complete
            for i, (image, label) in enumerate(tqdm(images, desc=f"{dataset} {part}", leave=False)):
                file = Path(tmp, part, images.classes[label], f"{i:05d}.png")
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(file)
            Path(tmp, part).rename(root / part)


def inaturalist(root):
    """{list name: [(path, label)]} from the official json files, in the same order as the lists of Kang et al. 2020."""
    expect(root / "train_val2018", "the folder of the images")
    lists = {}
    for part in ("train", "val"):
        file = root / f"{part}2018.json"
        expect(file, "the official annotations")
        content = json.loads(file.read_text(encoding="utf-8"))
        label_of = {a["image_id"]: a["category_id"] for a in content["annotations"]}
        lines = [(image["file_name"], label_of[image["id"]]) for image in content["images"]]
        lists[f"iNaturalist18_{part}"] = lines
    return lists


# ---- lists and class folders

def read_split(root, name, there):
    """Read a list file as a split. `there` is the split of all images that the list may name. An image that is listed
    twice counts once."""
    class_of = {path: c for c, paths in enumerate(there) for path in paths}
    split, strangers = [[] for _ in there], []
    paths, labels = read_list(root, name)
    for path, c in dict.fromkeys(zip(paths, labels.tolist())):
        if class_of.get(path) == c:
            split[c].append(path)
        else:
            strangers.append(f"{path} {c}")
    if strangers:
        sys.exit(f"error: {name} names {len(strangers)} images that do not exist, are held out or "
                 f"have a different label (first: {strangers[0]}); a label is the position of its class "
                 "folder in sorted order")
    return split


def without(split, *others):
    """The images of each class that are in none of the other splits, sorted."""
    return [sorted(set(paths).difference(*out)) for paths, *out in zip(split, *others)]


def scan(root, folder):
    """Class names and split of the folders root/folder/<class>/, sorted. A folder without images is not a class."""
    expect(root / folder, "the folder of <class>/<image>")
    split, left_out = {}, []
    walk = os.walk(root / folder, followlinks=True)
    for parent, folders, files in tqdm(walk, f"{root / folder}", unit="folder", leave=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(parent).relative_to(root / folder).parts            # (class, subfolder, ...)
        if not folder and inside[:1] in (("val",), ("test",)):
            continue
        for name in files:
            path = "/".join((folder, *inside, name)).lstrip("/")
            if name.startswith("."):
                continue
            if inside and name.lower().endswith(IMAGES):
                split.setdefault(inside[0], []).append(path)
            elif not name.endswith((".txt", ".json")):  # lists
                left_out.append(path)

    if left_out:
        print(f"ignored {len(left_out)} files in {root / folder} that are in no class folder or do not have "
              f"the ending of an image (first: {min(left_out)})")
    if len(split) < 2:
        sys.exit(f"error: {root / folder} contains fewer than two <class>/ folders of images; "
                 f"an image's name must end in {' '.join(IMAGES)}")
    names = sorted(split)
    return names, [sorted(split[name]) for name in names]


def hold_out(full, n, seed, part):
    """The split of n random images per class. n=None means HOLDOUT, but at most a fifth of the class."""
    if n is None:
        print(f"{HOLDOUT} images per class, but at most a fifth and at least one, are held out for {part}.txt; "
              "--holdout 0 keeps them")
    rng = np.random.RandomState(seed)
    held = []
    for paths in full:
        wanted = n
        if n is None:
            wanted = max(1, min(HOLDOUT, len(paths) // 5))
        drawn = rng.permutation(len(paths))[:wanted]
        held.append([paths[i] for i in sorted(drawn)])
    return held


def class_folders(root, dataset, holdout, seed):
    """Class names and the splits full, val and test, for the layouts in make_lt.py's docstring. Images of val and test
    are not in full, so nobody trains on them. holdout: images per class for val; None means hold_out()'s default."""
    folder = "train"
    if dataset == "folder" and not (root / "train").is_dir():
        folder = ""
    names, full = scan(root, folder)

    # ImageNet-LT has published lists
    if dataset == "imagenet":
        for name in PUBLISHED.values():
            expect(root / f"{name}.txt",
                   "a published list; --dataset folder --long-tail imagenet-lt works without it")
        there = [a + b for a, b in zip(full, scan(root, "val")[1])]
        val = read_split(root, f"{PUBLISHED['val']}.txt", there)
        test = read_split(root, f"{PUBLISHED['test']}.txt", there)
        return names, without(full, val, test), val, test

    # the other data sets have folders; classes that differ from train/'s would shift the labels
    found = {}
    for part in ("val", "test"):
        if (root / part).is_dir():
            part_names, found[part] = scan(root, part)
            if part_names != names:
                different = min(set(part_names) ^ set(names))
                sys.exit(f"error: {root / part} has different classes from the training images: "
                         f"{different} is in only one of them")

    # if there is one folder, it is the test set; if there is none, the test images come from the training images
    if not found and dataset != "folder":
        expect(root / "val", "the folder of <class>/<image> that becomes the test list")
    if not found:
        found["test"] = hold_out(full, holdout, seed, "test")
        full = without(full, found["test"])
    test = found["test"] if "test" in found else found.pop("val")
    val = found["val"] if "val" in found else hold_out(full, holdout, seed, "val")
    return names, without(full, val), val, test


# ---- scenes of digits, for transfer_det.py

SIDE = 128  # pixels
FIRST_SCENE = {"train": 0, "test": 2_000_000}  # indices are seeds, so the splits share no background


def digit_images(split):
    """Images uint8 (n, 28, 28) and labels (n,) of the digits that make_lt.py's default seed puts into a split. So a
    backbone that was trained on data/digits has never seen a digit of a test scene."""
    embedded = np.load(EMBEDDED)
    rng = np.random.RandomState(0)
    rng.permutation(10)  # make_lt.py draws the order of the classes first
    chosen = split_digits(embedded["labels"], rng)[split]
    return embedded["images"][chosen], embedded["labels"][chosen]


def scene(digits, labels, index):
    """1 to 5 digits of 24 to 48 px that do not overlap, on a smooth background with noise. The seed is `index`.

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
