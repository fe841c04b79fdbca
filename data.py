"""
What training, probing and evaluating must agree on: list files, images, transforms, samplers.

A data set is a folder and list files, one `relative/path label` a line. An image is decoded once for all of its views
and stays uint8 (a quarter of the bytes) until it is normalised on the device; cache.py keeps it decoded. Which images
an epoch draws and how each is augmented depends on the seed, the epoch and the position in the epoch, and on nothing
else: not on the number of ranks or workers.
"""
import functools
import hashlib
import io
import math
import os
import re
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import v2 as T
from tqdm import tqdm

import ddp
from cache import Cache
from ddp import InputError
from reading import printable

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since torchvision 0.29; where it is gone PIL decodes, the same pixels
    decode_jpeg = None

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# name -> kind (whose hyper-parameters it takes), folder, pixels (after `resize` of the shorter side), normalisation,
# list files: `train` is what the representation learns from by default, `full` the balanced set of the representation
# evaluation (sec. 3.1), `val` chooses ("none": the set has none), `test` is reported. make_lt.py --dataset writes them.
LISTS = dict(train="train_lt.txt", full="train_full.txt", val="val.txt", test="test.txt")
PHOTOS = dict(kind="photos", root=None, pixels=224, resize=256, mean=IMAGENET_MEAN, std=IMAGENET_STD)
DATASETS = {
    "digits": dict(kind="digits", root="data/digits", pixels=32, resize=32, mean=(0.179,) * 3, std=(0.279,) * 3,
                   **LISTS),
    "imagenet": dict(PHOTOS, train="ImageNet_LT_train.txt", full="train_full.txt", val="ImageNet_LT_val.txt",
                     test="ImageNet_LT_test.txt"),
    # long-tailed by nature, no balanced training set; the official validation set is what everybody reports
    "inat18": dict(PHOTOS, mean=(0.466, 0.471, 0.380), std=(0.195, 0.194, 0.192), train="iNaturalist18_train.txt",
                   full="none", val="none", test="iNaturalist18_val.txt"),
    "places365": dict(PHOTOS, **LISTS),
    # CIFAR-LT takes every image of its largest class, so nothing is left to choose on
    "cifar10": dict(kind="cifar", root="data/cifar10", pixels=32, resize=32, mean=(0.4914, 0.4822, 0.4465),
                    std=(0.2023, 0.1994, 0.2010), **{**LISTS, "val": "none"}),
    "cifar100": dict(kind="cifar", root="data/cifar100", pixels=32, resize=32, mean=(0.5071, 0.4865, 0.4409),
                     std=(0.2673, 0.2564, 0.2762), **{**LISTS, "val": "none"}),
    "folder": dict(PHOTOS, **LISTS),  # any folder of class folders
}


def find_list(root, name):
    """The list file `name`, looked up as given, then below root; InputError for a missing folder or list."""
    root, file = Path(root), Path(name)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; --data names the folder that the list's paths start from")
    file = file if os.path.isfile(file) else root / name
    if not os.path.isfile(file):
        raise InputError(f"{name}: no such list file, neither here nor in {root}; expected lines of `path label`")
    return file


def beside(root, list_name, name):
    """The list `name` from the folder of list_name, where there is one: a class split has its own val and test."""
    sibling = (Path(list_name).parent / name).as_posix()
    return sibling if Path(sibling).is_file() or (Path(root) / sibling).is_file() else name


def sha256(file):
    """Of a list's or a backbone's bytes: the same name in a folder that was made anew is another file."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def read_list(root, name):
    """Paths (str, below root) and labels (int64 tensor) of the list file `name`: read_lines without its lines."""
    return read_lines(root, name)[1:]


def read_lines(root, name):
    """Line numbers (int), paths (str, below root) and labels (int64 tensor) of the list file `name`.

    Reads `train/n01440764/x.JPEG 0` and `/n01440764/x.JPEG 0` (below root/train), as both are published; a path may
    hold spaces. Raises InputError for a missing folder or list, and for a line that is not a path below root and a
    label >= 0.
    """
    file = find_list(root, name)
    numbers, paths, labels = [], [], []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{file}: not a text file in UTF-8; expected lines of `path label`") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal() or len(label) > 7:  # ten million classes: a typing error
            raise InputError(f"{file}, line {number}: expected `relative/path label` with a whole-number label, "
                             f"got `{printable(line.strip())}`")
        if OUTSIDE.search(path):
            raise InputError(f"{file}, line {number}: `{printable(path)}` is not a path below the data folder; "
                             "expected one with / and without `..`, drive letters and control characters")
        numbers.append(number)
        paths.append("train" + path.rstrip() if path.startswith("/") else path.rstrip())
        labels.append(int(label))
    if not paths:
        raise InputError(f"{file}: the list is empty; expected lines of `path label`")
    if max(labels) >= max(100_000, len(labels)):  # as many numbers are allocated, in a classifier times the features
        raise InputError(f"{file}: label {max(labels)} in a list of {len(labels)} images; labels count the classes "
                         "from 0")
    return numbers, paths, torch.tensor(labels)


def on_rank0(work):
    """work() on rank 0, its result, or its InputError, on every rank. The others wait for as long as it takes, where a
    barrier of the default group gives up after 10 or 30 minutes: less than it takes to open every image."""
    if ddp.world() == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    result = [None]
    if ddp.rank() == 0:
        try:
            result = [work()]
        except InputError as error:
            result = [error]
    dist.broadcast_object_list(result, group=group)
    dist.destroy_process_group(group)
    if isinstance(result[0], InputError):
        raise result[0]
    return result[0]


OUTSIDE = re.compile(r"(^|/)\.\.(/|$)|\\|^[A-Za-z]:|[\x00-\x1f\x7f\ud800-\udfff]")


def inside(root, path):
    """root / path, to be opened; InputError where a link leads out of root, which itself may be one."""
    file = os.path.join(root, path)
    real, top = os.path.realpath(file), os.path.realpath(root)  # 30 us
    if os.path.commonpath((real, top)) != top:
        raise InputError(f"{file} leaves the data folder by a link, to {real}; put a copy there, or name as --data the "
                         "folder that really holds the images")
    return Path(file)


def class_counts(labels, num_classes=None):
    """Images of each class, (C,); C = the largest label + 1 where it is not given."""
    return torch.bincount(labels, minlength=num_classes or 0)


def groups(counts):
    """The many / medium / few-shot group of each class: > 100, 20..100, < 20 training images (Liu et al. 2019)."""
    return ["many" if n > 100 else "medium" if n >= 20 else "few" for n in counts]


def refuse_overlap(root, train, val):
    """Raise InputError if an image of the list `val` is in the list `train`: what chooses must not have been seen."""
    trained_on = set(read_list(root, train)[0])
    both = [path for path in read_list(root, val)[0] if path in trained_on]
    if both:
        raise InputError(f"{len(both)} images of the validation list {val} are in the training list {train} too "
                         f"(first: {both[0]}); take them out of the training list, or name another --val")


def refuse_labels_outside(dataset, num_classes, of):
    """Raise InputError if a label of the ImageList is none of the num_classes classes that `of` has."""
    line = int(dataset.labels.argmax())
    if dataset.labels[line] >= num_classes:
        raise InputError(f"{dataset.name}: label {int(dataset.labels[line])} of {dataset.paths[line]} is outside the "
                         f"{num_classes} classes (0 to {num_classes - 1}) of {of}; use the list of the same classes")


def plain_jpeg(content):
    """Whether these bytes are a JPEG in grey or colour (not CMYK) of no more pixels than PIL takes for sane, 89
    million: so says its frame header, which PIL takes 20 to 60 us to find."""
    at = 2 if content.startswith(b"\xff\xd8") else len(content)
    while content[at:at + 1] == b"\xff" and at + 9 < len(content):
        marker, length = content[at + 1], int.from_bytes(content[at + 2:at + 4], "big")
        if marker in range(0xC0, 0xD0) and marker not in (0xC4, 0xC8, 0xCC):  # SOF; these are DHT, JPG and DAC
            H, W = (int.from_bytes(content[at + i:at + i + 2], "big") for i in (5, 7))
            return content[at + 9] in (1, 3) and H * W <= Image.MAX_IMAGE_PIXELS
        at += 2 + length
    return False


def decode(content):
    """The bytes of an image file -> uint8 (3, H, W), as PIL's convert("RGB") has it: alpha is dropped, an animation is
    its first frame, and the camera's orientation (EXIF) is not applied, as in everybody's ImageNet numbers. 16 bit grey
    is scaled to 8 (convert() would clip it to white).

    JPEG is decoded by torchvision.io, on libjpeg-turbo as PIL: the same pixels without PIL's copies. Both raise on a
    file that ends early, at any byte; neither sees damage in the middle that leaves the stream decodable.
    Raises one of many kinds of Exception where the bytes do not decode, or are a decompression bomb in PIL's eyes.
    """
    if decode_jpeg and plain_jpeg(content):
        try:
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
        except RuntimeError:
            pass  # PIL decodes it, or says what is wrong
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content))                       # reads the header only
    except UnidentifiedImageError:
        raise UnidentifiedImageError("no format that PIL knows" if content else "empty file") from None
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):  # older Pillow: I
        grey = (np.asarray(image).astype(np.int64) + 128) // 257          # 65535 / 257 = 255
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("its 32 bit pixels do not say which value is white; convert it to 8 or 16 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")                                     # or PIL warns
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


class ImageList(Dataset):
    """The images of a list file. An item's key is (index, seed) as Draws yields it, or a plain index where the
    transform is not random; an item is (views, label, index), views = [uint8 (3, H, W)] * num_views. With short_side an
    image whose shorter side is longer is scaled down to it first: other pixels than those of the whole image, and the
    same ones whether they come from the file or from the cache."""

    def __init__(self, root, name, transform, num_views=1, short_side=None):
        self.root, self.name, self.transform, self.num_views = Path(root), name, transform, num_views
        self.short_side, self.cache = short_side, None
        self.lines, self.paths, self.labels = read_lines(root, name)

    def __len__(self):
        return len(self.paths)

    def image(self, index):
        """Decoded from its file: uint8 (3, H, W). Raises InputError."""
        file = inside(self.root, self.paths[index])
        try:
            image = decode(file.read_bytes())
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error ... on broken files
            raise InputError(f"{file} (line {self.lines[index]} of {self.name}) is missing or does not decode as an "
                             f"image: {one_line(error)}") from None
        larger = self.short_side and min(image.shape[1:]) > self.short_side
        return T.functional.resize(image, [self.short_side]) if larger else image

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, 0)
        image = self.cache[index] if self.cache else self.image(index)
        state = torch.get_rng_state()  # with workers=0 this process' own stream must not notice; both: 4 us
        torch.default_generator.manual_seed(seed)
        views = [self.transform(image) for _ in range(self.num_views)]
        torch.set_rng_state(state)
        return views, self.labels[index], index

    def use_cache(self, folder, workers):
        """Read from the cache of this list in `folder`, which rank 0 builds first where it is not there."""
        cache = Cache(folder, self)
        on_rank0(lambda: cache.build(workers))
        self.cache = cache.open()

    def leave_out_broken(self, file, again, workers):
        """Drop the images that do not open. The text file `file` lists them, `path<tab>what is wrong` a line; with
        `again` it is read where it is there: the run that wrote it goes on. Returns their number.
        Raises InputError where a class is left without an image."""
        def find():
            if not (again and file.exists()):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("".join(f"{path}\t{wrong}\n" for path, _, wrong in opened(
                    self.root, dict.fromkeys(self.paths), workers) if wrong), encoding="utf-8")
            return file.read_text(encoding="utf-8").splitlines()

        found = on_rank0(find)
        ddp.print0(f"{len(found):,} files of {self.name} do not open and are left out, see {file}" +
                   "".join(f"\n  {line}" for line in found[:100]) + "\n  ..." * (len(found) > 100))
        broken = {line.rpartition("\t")[0] for line in found}
        keep = [i for i, path in enumerate(self.paths) if path not in broken]
        before, self.labels = class_counts(self.labels), self.labels[keep]
        self.paths, self.lines = [self.paths[i] for i in keep], [self.lines[i] for i in keep]
        lost = ((before > 0) & (class_counts(self.labels, len(before)) == 0)).nonzero()
        if len(lost):
            raise InputError(f"{self.name}: no image of class {int(lost[0])} opens (see {file}); is --data the right "
                             "folder?")
        return len(found)


def one_line(error):
    return " ".join(f"{error}".split()) or type(error).__name__


class Opened(Dataset):
    """Reads and decodes the paths below root: item i is (their sha256 or None, what is wrong or None)."""

    def __init__(self, root, paths):
        self.root, self.paths = root, paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            content = inside(self.root, self.paths[i]).read_bytes()
            decode(content)
            return hashlib.sha256(content).hexdigest(), None
        except Exception as error:  # as in ImageList.image, or InputError
            return None, f"{type(error).__name__}: {one_line(error)}"


def opened(root, paths, workers):
    """(path, sha256 of the file or None, what is wrong with it or None) of each, with a progress bar."""
    paths = list(paths)
    loader = DataLoader(Opened(root, paths), batch_size=None, num_workers=workers)
    for path, (digest, wrong) in zip(paths, tqdm(loader, desc="opening", unit="image")):
        yield path, digest, wrong


class RandomResizedCrop(T.RandomResizedCrop):
    """torchvision's, pixel for pixel, without the checks that cost as much as a tenth of the decoding. The crop is
    copied before it is scaled: on a view of a larger image the uint8 kernel takes its slow way, 1.6 times as long."""

    def forward(self, image):
        params = self.make_params([image])
        y, x, h, w = (params[name] for name in ("top", "left", "height", "width"))
        crop = image[None, :, y:y + h, x:x + w].contiguous(memory_format=torch.channels_last)
        return F.interpolate(crop, self.size, mode="bilinear", antialias=True)[0]


class RandomHorizontalFlip(T.RandomHorizontalFlip):
    """torchvision's, likewise."""

    def forward(self, image):
        return image.flip(-1) if torch.rand(1) < self.p else image


PLANES = T.Lambda(torch.Tensor.contiguous)  # colours are computed a quarter faster on planes than on pixels

AUGMENTATIONS = {  # name -> steps for uint8 (3, H, W)
    "cifar": lambda pixels: [T.Resize(pixels), T.CenterCrop(pixels), T.RandomCrop(pixels, padding=4),
                             RandomHorizontalFlip()],
    "sup": lambda pixels: [RandomResizedCrop(pixels), RandomHorizontalFlip()],  # scale 0.08-1
    "lt": lambda pixels: [RandomResizedCrop(pixels), RandomHorizontalFlip(), PLANES, T.ColorJitter(0.4, 0.4, 0.4, 0)],
    "moco": lambda pixels: [RandomResizedCrop(pixels, (0.2, 1)), PLANES, T.RandomGrayscale(0.2),
                            T.ColorJitter(0.4, 0.4, 0.4, 0.4), RandomHorizontalFlip()],
    "mocov2": lambda pixels: [RandomResizedCrop(pixels, (0.2, 1)),
                              T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), T.RandomGrayscale(0.2),
                              # a kernel of about a tenth of the image, as SimCLR
                              T.RandomApply([T.GaussianBlur(pixels // 20 * 2 + 1, (0.1, 2.0))], 0.5),
                              RandomHorizontalFlip()],
    # digits: a flip or a small crop changes the class (2 and 5, 6 and 0); a mild affine map does not
    "affine": lambda pixels: [T.Resize(pixels), T.CenterCrop(pixels),
                              # black outside, as without fill; fill=0 would darken the edge twice
                              T.RandomAffine(15, (0.1, 0.1), (0.85, 1.15), interpolation=T.InterpolationMode.BILINEAR,
                                             fill=None)],
}


def augmentation(name, pixels):
    """A random uint8 (3, H, W) -> uint8 (3, pixels, pixels) transform by name."""
    return nn.Sequential(*AUGMENTATIONS[name](pixels))


def uniforms(seed, n):
    """(B,) int64 seeds -> (B, n) float64 in [0, 1): the numbers of a seed depend on nothing else, neither on the batch
    that it is in nor on the device. SplitMix64 (Steele et al. 2014) at seed * 2^20 + column, its upper 53 bits."""
    def mix(z, shift, factor):
        return (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor        # >> keeps the sign: mask it off

    z = seed[:, None] * 2**20 + torch.arange(1, n + 1, device=seed.device)
    z = mix(mix(z * -0x61C8864680B583EB, 30, -0x40A7B892E31B1A47), 27, -0x6B2FB644ECCEEE15)
    return ((z ^ (z >> 31 & (1 << 33) - 1)) >> 11 & (1 << 53) - 1).double() / 2**53


def warp(images, theta):
    """Sample uint8 (B, 3, H, W) at the affine map theta (B, 2, 3) of output to input, in [-1, 1] coordinates, bilinear,
    black outside; uint8 again."""
    grid = F.affine_grid(theta.float(), images.shape, align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round_().to(torch.uint8)


def batched_affine(images, u):
    """RandomAffine(15, (0.1, 0.1), (0.85, 1.15)) of a batch; u (B, 4) uniform."""
    angle, scale = (2 * u[:, 0] - 1) * math.radians(15), 0.85 + 0.3 * u[:, 3]
    H, W = images.shape[-2:]
    dx, dy = ((0.1 * side * (2 * u[:, i] - 1)).round() * 2 / side for i, side in ((1, W), (2, H)))  # whole pixels
    cos, sin = angle.cos() / scale, angle.sin() / scale                   # the inverse map: rotate back, scale back
    back = torch.stack([cos, sin, -sin, cos], dim=1).view(-1, 2, 2)
    shift = -(back @ torch.stack([dx, dy], dim=1)[:, :, None])
    return warp(images, torch.cat([back, shift], dim=2))


def batched_crop_flip(images, u, padding=4):
    """RandomCrop(H, padding) and RandomHorizontalFlip of a batch; u (B, 3) uniform."""
    B, _, H, W = images.shape
    padded = F.pad(images, (padding,) * 4)
    y, x = ((u[:, i] * (2 * padding + 1)).long()[:, None] for i in (0, 1))
    rows, columns = y + torch.arange(H, device=u.device), x + torch.arange(W, device=u.device)
    columns = torch.where(u[:, 2:3] < 0.5, columns, columns.flip(1))
    image = torch.arange(B, device=u.device)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


BATCHED = {"affine": (batched_affine, 4), "cifar": (batched_crop_flip, 3)}  # name -> function, uniforms that it takes


class InMemory:
    """The batches of train_loader, from a set that lies in the device's memory as uint8, augmented there, a batch at a
    time. For the digits and CIFAR, whose images are too small to be worth a data worker."""

    def __init__(self, dataset, draws, aug, num_views, device):
        """dataset: an ImageList with the center transform."""
        self.draws, self.num_views, (self.augment, self.n) = draws, num_views, BATCHED[aug]
        self.images = torch.stack([dataset[i][0][0] for i in range(len(dataset))]).to(device)  # (N, 3, H, W) uint8
        self.labels, self.batch = dataset.labels.to(device), draws.batch // ddp.world()

    def __len__(self):
        return len(self.draws) // self.batch

    def __iter__(self):
        index, seed = torch.tensor(list(self.draws), device=self.images.device).T                # all of the epoch's
        for i, s in zip(index.split(self.batch), seed.split(self.batch)):
            u = uniforms(s, self.n * self.num_views).split(self.n, dim=1)
            images = self.images[i]
            yield [self.augment(images, v) for v in u], self.labels[i], i


def center(pixels, resize):
    """The fixed uint8 (3, H, W) -> uint8 (3, pixels, pixels) transform of evaluation."""
    return T.Identity() if resize == pixels else T.Compose([T.Resize(resize), T.CenterCrop(pixels)])


@functools.cache
def channels(values, device):
    """(3,) numbers -> (1, 3, 1, 1) on the device, which then need not be copied there each step."""
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def normalize(images, mean, std, device):
    """uint8 (B, 3, H, W) in 0..255 -> normalised float32 on the device, channels last."""
    images = images.to(device, non_blocking=True).float().div_(255)
    mean, std = channels(tuple(mean), device), channels(tuple(std), device)
    return images.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


class Draws(Sampler):
    """Which images an epoch draws: this rank's (index, augmentation seed) pairs, N // batch global batches of them.

    p_c, the chance of class c (Kang et al. 2020, sec. 3), t = epoch / epochs:
        instance     n_c / N, every image once
        class        1 / C
        sqrt         sqrt(n_c) / sum sqrt(n)
        progressive  (1 - t) n_c / N + t / C
        reversed     (1 / n_c) / sum 1 / n: BBN's second branch (Zhou et al. 2020, sec. 4.2)
    All but `instance` draw with replacement, uniformly inside the class. Every rank computes the same epoch and takes
    each world-th draw, so no two ranks share one and one rank's global batch is that of eight. The last, short batch
    is left out: BatchNorm and the ranks see equal ones only.
    """

    def __init__(self, labels, kind, batch, epochs=1, seed=0):
        self.labels, self.kind, self.batch, self.epochs, self.seed = labels, kind, batch, epochs, seed
        self.set_epoch(0)
        self.counts = class_counts(labels)
        if len(labels) < batch:
            raise InputError(f"the training list has {len(labels)} images, fewer than one batch; "
                             f"give --batch {len(labels)} or less")
        if batch % ddp.world():
            raise InputError(f"--batch {batch} is the batch of all ranks together and must divide by their number, "
                             f"{ddp.world()}")
        if kind != "instance" and (self.counts == 0).any():
            empty = int((self.counts == 0).nonzero()[0])
            raise InputError(f"class {empty} has no image in the training list, but {kind} sampling draws from all "
                             f"{len(self.counts)} classes; use --sampler instance or renumber the labels")

    def set_epoch(self, epoch, step=0):
        """The epoch that the next pass draws, from its step-th batch on."""
        self.epoch, self.first = epoch, step * self.batch

    def class_probabilities(self):
        """p_c of this epoch, (C,) float64."""
        n, t = self.counts.double(), max(self.epoch, 0) / self.epochs  # before 0 the queue is filled
        instance, balanced = n / n.sum(), torch.full_like(n, 1 / len(n))
        return {"instance": instance, "class": balanced, "sqrt": n.sqrt() / n.sqrt().sum(),
                "progressive": (1 - t) * instance + t * balanced, "reversed": 1 / n / (1 / n).sum()}[self.kind]

    def __len__(self):
        return len(self.labels) // self.batch * (self.batch // ddp.world())

    def __iter__(self):
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        N = len(self.labels)
        if self.kind == "instance":
            index = torch.randperm(N, generator=g)
        else:  # a class, then one of its images: sorted by class, class c begins at start[c]
            c = torch.multinomial(self.class_probabilities(), N, replacement=True, generator=g)
            start = self.counts.cumsum(0) - self.counts
            within = (torch.rand(N, generator=g, dtype=torch.float64) * self.counts[c]).long()
            index = self.labels.argsort(stable=True)[start[c] + within]
        seed = torch.randint(2**32, (N,), generator=g)  # torch seeds its CPU generator with 32 bits
        mine = slice(self.first + ddp.rank(), N // self.batch * self.batch, ddp.world())
        return zip(index[mine].tolist(), seed[mine].tolist())


def collate(samples):
    """default_collate with the views channels last, as they come from the decoder and as convolutions take them."""
    *views, labels, index = default_collate([(*(view.permute(1, 2, 0) for view in views), label, i)
                                             for views, label, i in samples])
    return [view.permute(0, 3, 1, 2) for view in views], labels, index


def train_loader(dataset, draws, workers):
    """Batches of this rank's share: ([uint8 (b, 3, H, W)] * views, labels (b,), indices (b,))."""
    return DataLoader(dataset, draws.batch // ddp.world(), sampler=draws, num_workers=workers, collate_fn=collate,
                      pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0,
                      generator=torch.Generator())  # its own, so that the loader takes nothing from the run's stream


def eval_loader(dataset, batch, workers):
    """Every image exactly once over all ranks, nothing padded: rank r holds images r, r + world, ..."""
    return DataLoader(dataset, batch, sampler=range(ddp.rank(), len(dataset), ddp.world()), num_workers=workers,
                      collate_fn=collate, pin_memory=torch.cuda.is_available())
