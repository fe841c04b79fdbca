"""
The data code that all three stages share: list files, images and samplers.

A data set is a folder plus list files with one `relative/path label` per line. An image is decoded once for all of its
views. It stays uint8, a quarter of float32's bytes, until it is normalised on the device. The images that an epoch
draws, and how each is augmented, depend only on the seed, the epoch and the position in the epoch, not on the number
of ranks or data workers.
"""
import contextlib
import functools
import hashlib
import io
import math
import os
import posixpath
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import v2 as T
from tqdm import tqdm

import augment
import ddp

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision 0.29 deprecates it; PIL decodes the same pixels but takes twice as long
    decode_jpeg = None

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# kind: the key into each script's table of defaults. root: the default folder. resize, pixels: for evaluation an image
# is resized to a shorter side of `resize`, and a centre square of `pixels` is cropped. The lists: `train` trains the
# representation, `full` is the balanced training set, `val` selects models ("none" if there is none), and `test` gives
# the numbers that are reported.
LISTS = dict(train="train_lt.txt", full="train_full.txt", val="val.txt", test="test.txt")
PHOTOS = dict(kind="photos", root=None, pixels=224, resize=256, mean=IMAGENET_MEAN, std=IMAGENET_STD, **LISTS)
SMALL = dict(pixels=32, resize=32, **LISTS)
CIFAR = SMALL | dict(kind="cifar", val="none")  # no val: the largest class of CIFAR-LT trains on all its images
DATASETS = {
    "digits": SMALL | dict(kind="digits", root="data/digits", mean=(0.179,) * 3, std=(0.279,) * 3),
    "imagenet": PHOTOS | dict(
        train="ImageNet_LT_train.txt", val="ImageNet_LT_val.txt", test="ImageNet_LT_test.txt"),
    # iNaturalist has no balanced training set, and results are usually reported on its official validation set
    "inat18": PHOTOS | dict(
        mean=(0.466, 0.471, 0.380), std=(0.195, 0.194, 0.192),
        train="iNaturalist18_train.txt", full="none", val="none", test="iNaturalist18_val.txt"),
    "places365": PHOTOS,
    "cifar10": CIFAR | dict(
        root="data/cifar10", mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
    "cifar100": CIFAR | dict(
        root="data/cifar100", mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
    "folder": PHOTOS,  # any folder of class folders; small and small64 are for images of at most 32 and 64 px
    "small": CIFAR | dict(root=None, val="val.txt", mean=IMAGENET_MEAN, std=IMAGENET_STD),
    "small64": CIFAR | dict(
        root=None, val="val.txt", pixels=64, resize=64, mean=IMAGENET_MEAN, std=IMAGENET_STD),
}


def workers_per_rank():
    """Data workers per rank: the cores that this process may use, divided by this machine's ranks, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


# ---- list files

def find_list(root, name):
    """The path of the list file `name`: root/name if that file exists, otherwise the name as given."""
    file = Path(root) / name
    return file if file.is_file() else Path(name)


def read_list(root, name):
    """Paths (str, relative to root) and labels (N,) int64 of a list file. The published lists have lines like
    `train/n01440764/x.JPEG 0` or `/n01440764/x.JPEG 0`; the latter means root/train. All spellings of a path
    become the same one, so that lists can be compared."""
    file = find_list(root, name)
    if not file.is_file():
        sys.exit(f"error: {name}: no such list file, in {root} or in the working directory; "
                 "pass yours with --list and --val. make_lt.py writes lists, for class folders with "
                 f"--dataset folder --data {root}")
    # utf-8-sig drops Windows' byte order mark; surrogateescape keeps file names in any other encoding
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    paths, labels = [], []
    for number, line in enumerate(text.split("\n"), 1):
        path, _, label = line.strip().rpartition(" ")
        if not label:  # a blank line
            continue
        if not path or not label.isdecimal():
            sys.exit(f"error: {file}, line {number}: expected `relative/path label`, got `{line}`")
        path = "train" + path if path.startswith("/") else path
        path = posixpath.normpath(path.rstrip().replace("\\", "/"))
        if path.startswith("../"):  # it may lead back into root
            path = Path(os.path.relpath(Path(root, path), root)).as_posix()
        paths.append(path)
        labels.append(int(label))
    if not paths:
        sys.exit(f"error: {file} is empty; make_lt.py writes lists")
    return paths, torch.tensor(labels)


def sibling_list(root, list_name, name):
    """The list `name` in the folder of list_name, if it exists there: each half of the classes has its own lists.
    Otherwise the list in root, and never a stray one in the working directory."""
    if list_name and (find_list(root, list_name).parent / name).is_file():
        return (Path(list_name).parent / name).as_posix()
    if Path(name).is_file() and not (Path(root) / name).is_file():
        return (Path(root) / name).as_posix()  # this file is missing, and the error will name it
    return name


def refuse_overlap(root, train, unseen, purpose="validation"):
    """Exit if an image of the list `unseen`, which selects models or is tested on, is also in the list `train`."""
    shared = set(read_list(root, train)[0]) & set(read_list(root, unseen)[0])
    if shared:
        sys.exit(f"error: {len(shared)} images of the {purpose} list {unseen} are also in the training list "
                 f"{train} (first: {min(shared)}); remove them from one of the two")


def class_names(root, name):
    """{label: class folder} of a list. The class folders are the first folder level whose names match the labels one to
    one, as in train/<class>/x.jpg. Returns {} if no level does."""
    paths, labels = read_list(root, name)
    folders = [path.split("/")[:-1] for path in paths]
    for level in range(min(map(len, folders))):
        pairs = {(c, above[level]) for c, above in zip(labels.tolist(), folders)}
        if len(pairs) == len(dict(pairs)) == len({folder for _, folder in pairs}):
            return dict(sorted(pairs))
    return {}


def refuse_other_classes(trained, root, name):
    """Exit if a list numbers the classes differently from the training list, whose class_names are `trained`."""
    names = class_names(root, name)
    if set(names.values()).isdisjoint(trained.values()):  # no class folders, or other names for them
        return
    for c in names.keys() & trained.keys():
        if names[c] != trained[c]:
            sys.exit(f"error: label {c} is class {names[c]} in {name}, but {trained[c]} in the "
                     "training list; number the classes in the same way in both")


def small_dataset(root, paths):
    """The key into DATASETS for images of at most 32 or 64 px, None for larger ones. The median longer side of about a
    hundred images decides."""
    sides = []  # a broken image is skipped here; training stops at it and names it
    for path in paths[::max(1, len(paths) // 100)]:
        with contextlib.suppress(Exception), Image.open(Path(root, path)) as image:
            sides.append(max(image.size))
    for name in ("small", "small64"):
        pixels = DATASETS[name]["pixels"]
        if sides and np.median(sides) <= pixels:
            ddp.print0(f"small images: the data set is {name}, with {pixels} px and CIFAR's settings")
            return name


def groups(counts):
    """The group of each class by its training images: many > 100, medium 20 to 100, few < 20 (Liu et al. 2019)."""
    names = []
    for n in counts:
        if n > 100:
            names.append("many")
        elif n >= 20:
            names.append("medium")
        else:
            names.append("few")
    return names


# ---- images

def decode(content, upright=False):
    """Decode the bytes of an image file to uint8 (3, H, W), the pixels of PIL's convert("RGB"). Alpha is dropped. The
    camera's orientation (EXIF) is applied only if `upright`, because the usual ImageNet numbers ignore it."""
    if decode_jpeg and content.startswith(b"\xff\xd8"):
        buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):  # PIL also reads a file without its end marker
            return decode_jpeg(buffer, ImageReadMode.RGB, apply_exif_orientation=upright)
    image = Image.open(io.BytesIO(content))
    if image.mode.startswith(("I", "F")):
        raise ValueError("it has more than 8 bits per channel and would turn white; convert it to 8 bits")
    if upright:
        image = ImageOps.exif_transpose(image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


class ImageList(Dataset):
    """The images of a list file.

    spec: an entry of DATASETS or the content of a head.pt; its `pixels` and `resize` are used
    aug:  the name of an augmentation, or None for the center crop of evaluation

    dataset[index, seed] is (views, label, index), where views is a list of num_views tensors uint8 (3, pixels, pixels).
    The center crop needs no seed: dataset[index].
    """

    def __init__(self, root, name, spec, aug=None, num_views=1):
        self.root, self.name, self.aug, self.num_views = Path(root), name, aug, num_views
        self.paths, self.labels = read_list(root, name)
        if not self.root.joinpath(self.paths[0]).is_file():
            sys.exit(f"error: {self.root / self.paths[0]}, the first image of {name}, is missing; --data must be "
                     "the folder that the paths start from")
        if aug is None or aug in augment.BATCHED:  # InMemory augments whole batches later
            self.transform = center(spec["pixels"], spec["resize"])
        else:
            self.transform = augment.augmentation(aug, spec["pixels"])

    def __len__(self):
        return len(self.paths)

    def image(self, index):
        """Decode an image to uint8 (3, H, W). Any failure becomes a RuntimeError that names the file."""
        file = self.root / self.paths[index]
        try:
            return decode(file.read_bytes())
        except Exception as error:  # PIL raises half a dozen kinds
            raise RuntimeError(f"{file} of {self.name} is missing or does not decode: {error}") from None

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, 0)
        image = self.image(index)
        state = torch.get_rng_state()  # without workers this is the training loop's own random stream
        torch.default_generator.manual_seed(seed)
        views = [self.transform(image) for _ in range(self.num_views)]
        torch.set_rng_state(state)
        return views, self.labels[index], index


def center(pixels, resize):
    """The transform for evaluation: uint8 (3, H, W) -> uint8 (3, pixels, pixels)."""
    return T.Compose([T.Resize(resize), T.CenterCrop(pixels)])


@functools.cache
def channels(values, device):
    """(3,) numbers -> (1, 3, 1, 1) on the device, copied there once."""
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def normalize(images, mean, std, device):
    """uint8 (B, 3, H, W) in 0..255 -> normalised float32 on the device, channels last."""
    images = images.to(device, non_blocking=True).float().div_(255)
    images.sub_(channels(tuple(mean), device)).div_(channels(tuple(std), device))
    return images.contiguous(memory_format=torch.channels_last)


# ---- which images, in which order

class Draws(Sampler):
    """Which images an epoch draws: N // batch global batches of indices. Each index comes with the random numbers for
    its augmentation.

    p_c is the probability of class c (Kang et al. 2020, sec. 3), with t = epoch / epochs:
        instance     n_c / N, every image once
        class        1 / C
        sqrt         sqrt(n_c) / sum sqrt(n)
        progressive  (1 - t) n_c / N + t / C
        reversed     (1 / n_c) / sum 1 / n
        bilateral    a batch of `instance`, then one of `reversed`: BBN's two streams (Zhou et al. 2020, sec. 4.2)
    All but `instance` draw with replacement, uniformly within the class. Every rank computes the same epoch and keeps
    every world-th draw. A short last batch is dropped, so that BatchNorm and the ranks only see full batches.
    """

    def __init__(self, labels, kind, batch, epochs=1, seed=0):
        self.labels, self.kind, self.batch = labels, kind, batch
        self.epochs, self.seed = epochs, seed
        self.counts, self.epoch = labels.bincount(), 0
        if len(labels) < batch:
            sys.exit(f"error: the training list has {len(labels)} images, fewer than --batch {batch}; "
                     f"use --batch {2 ** int(math.log2(len(labels)))} or smaller")
        if batch % ddp.world():
            sys.exit(f"error: --batch {batch} must be divisible by the number of ranks, {ddp.world()}")
        if not self.counts.all():
            empty = int(self.counts.argmin())
            why = " (do the labels begin at 1?)" if empty == 0 else ""
            sys.exit(f"error: class {empty} has no image in the training list{why}; number the classes "
                     "from 0 without gaps, and pass that list as --list")

    def set_epoch(self, epoch):
        self.epoch = epoch

    def class_probabilities(self, kind):
        """p_c of this epoch, (C,) float64."""
        n, t = self.counts.double(), max(self.epoch, 0) / self.epochs     # epochs below 0 fill the queue
        instance, balanced = n / n.sum(), torch.full_like(n, 1 / len(n))
        return {
            "class": balanced,
            "sqrt": n.sqrt() / n.sqrt().sum(),
            "reversed": 1 / n / (1 / n).sum(),
            "progressive": (1 - t) * instance + t * balanced,
        }[kind]

    def stream(self, kind, numbers):
        """The epoch's draws of all ranks, (N, 1 + numbers) int64: each row has an index and random 32-bit numbers."""
        seed = self.seed + (kind == "reversed")  # the two streams of `bilateral` share no random number
        g = torch.Generator().manual_seed(seed * 1_000_003 + self.epoch)
        N = len(self.labels)
        if kind == "instance":
            index = torch.randperm(N, generator=g)
        else:  # draw a class, then one of its images; if images are sorted by class, class c begins at start[c]
            c = torch.multinomial(self.class_probabilities(kind), N, replacement=True, generator=g)
            start = self.counts.cumsum(0) - self.counts
            within = (torch.rand(N, generator=g, dtype=torch.float64) * self.counts[c]).long()
            index = self.labels.argsort(stable=True)[start[c] + within]
        noise = torch.randint(2**32, (N, numbers), generator=g)
        return torch.cat([index[:, None], noise], dim=1)

    @property
    def per_rank(self):
        """Images that this rank encodes per step."""
        return self.batch // ddp.world() * (2 if self.kind == "bilateral" else 1)

    def __len__(self):
        return len(self.labels) // self.batch * self.per_rank

    def of_this_rank(self, numbers):
        """This rank's part of the epoch, (len(self), 1 + numbers) int64, step after step."""
        kinds = ("instance", "reversed") if self.kind == "bilateral" else (self.kind,)
        steps = len(self.labels) // self.batch
        streams = []
        for kind in kinds:
            draws = self.stream(kind, numbers)[:steps * self.batch]
            streams.append(draws.view(steps, self.batch, 1 + numbers)[:, ddp.rank()::ddp.world()])
        return torch.cat(streams, dim=1).flatten(0, 1)

    def __iter__(self):
        """(index, augmentation seed) pairs, for ImageList."""
        return map(tuple, self.of_this_rank(numbers=1).tolist())


# ---- batches

class InMemory:
    """train_loader's batches for a data set that is kept in the device's memory as uint8 and augmented there."""

    def __init__(self, dataset, draws, device):
        self.draws, self.num_views, self.device = draws, dataset.num_views, device
        self.augment, self.numbers = augment.BATCHED[dataset.aug]
        images = [dataset.transform(dataset.image(i)) for i in range(len(dataset))]
        self.images = torch.stack(images).to(device)                      # (N, 3, H, W) uint8
        self.labels = dataset.labels.to(device)

    def __len__(self):
        return len(self.draws) // self.draws.per_rank

    def __iter__(self):
        n, b = self.numbers * self.num_views, self.draws.per_rank
        epoch = self.draws.of_this_rank(n).to(self.device)
        index = epoch[:, 0]
        uniform = (epoch[:, 1:] >> 8) / 2**24  # 24 bits: with 32, float32 could round a number up to 1.0
        for i, u in zip(index.split(b), uniform.split(b)):
            images = self.images[i]
            with torch.autocast(self.device.type, enabled=False):  # bf16 coordinates would move pixels
                views = [self.augment(images, v) for v in u.split(self.numbers, dim=1)]
            yield views, self.labels[i], i


def collate(samples):
    """default_collate, but it keeps the views channels last, as the decoder returns them and convolutions want them."""
    flat = []
    for views, label, i in samples:
        flat.append((*(view.permute(1, 2, 0) for view in views), label, i))
    *views, labels, index = default_collate(flat)
    return [view.permute(0, 3, 1, 2) for view in views], labels, index


def train_loader(dataset, draws, workers, device):
    """This rank's batches: ([uint8 (b, 3, H, W)] * num_views, labels (b,), indices (b,))."""
    if dataset.aug in augment.BATCHED:
        return InMemory(dataset, draws, device)
    # with its own generator the loader draws nothing from the run's random stream
    return DataLoader(dataset, draws.per_rank, sampler=draws, num_workers=workers, collate_fn=collate,
                      pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0,
                      generator=torch.Generator())


def eval_loader(dataset, batch, workers):
    """Every image exactly once over all ranks, without padding: rank r gets images r, r + world, ..."""
    share = range(ddp.rank(), len(dataset), ddp.world())
    return DataLoader(dataset, batch, sampler=share, num_workers=workers, collate_fn=collate,
                      pin_memory=torch.cuda.is_available())


@torch.no_grad()
def encode_all(encode, dataset, D, batch, workers, device):
    """Features (N, D) of all images of a list. Each rank encodes its share, but holds all rows: for ImageNet-LT with a
    ResNet-50 they take 115,846 x 2048 x 4 B = 0.95 GB."""
    digest = hashlib.sha256("\n".join(dataset.paths).encode("utf-8", "surrogateescape")).digest()
    if any(other != digest for other in ddp.of_all_ranks(digest)):
        sys.exit(f"error: {dataset.name} differs on another rank; every machine needs the same list")
    features = torch.zeros(len(dataset), D, device=device)
    bar = tqdm(eval_loader(dataset, batch, workers), f"features of {dataset.name}", leave=False,
               disable=ddp.rank() > 0 or None)
    for (view,), _, index in bar:
        features[index.to(device, non_blocking=True)] = encode(view)
    dist.all_reduce(features)  # the sum is right because every other rank has 0 in these rows
    return features
