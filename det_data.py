"""
What a detector learns from: VOC, COCO and scenes of embedded digits, all as COCO-style dictionaries {"images",
"categories", "annotations"}, one data set class for them, and the order in which a run sees its images.

Nothing is downloaded; the official folder layouts are checked before a run starts. Masks need pycocotools.
"""
import itertools
import os
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import ddp
from data import OUTSIDE, inside
from ddp import InputError
from digits import EMBEDDED, split_digits
from reading import printable, read_json

# ---- scenes of digits

SCENE, DIGITS_A_SCENE = 128, 5  # pixels, at most
FIRST_SCENE = {"train": 0, "val": 1_000_000, "test": 2_000_000}  # no index, so no background, serves two splits


def digit_images(split):
    """(images (n, 28, 28) uint8, labels (n,)) of the embedded digits of a split: those that make_lt.py's default seed
    gives to it. So no digit of a test scene is in a training scene, nor in what a backbone learned from data/digits."""
    embedded = np.load(EMBEDDED)
    rng = np.random.RandomState(0)
    rng.permutation(10)  # the order of the classes, drawn first there
    ours = split_digits(embedded["labels"], rng)[split]
    return embedded["images"][ours], embedded["labels"][ours]


def scene(digits, labels, index):
    """Scene `index`: a smooth random background, noise, and 1 to 5 digits of 24 to 48 px that do not touch.

    Returns the image uint8 (3, 128, 128) and [(class, mask bool (128, 128))]; the same for the same index always.
    """
    rng = np.random.RandomState(index)
    smooth = Image.fromarray(rng.uniform(0, 0.5, (4, 4)).astype(np.float32)).resize((SCENE, SCENE), Image.BICUBIC)
    canvas, taken, objects = np.asarray(smooth).copy(), np.zeros((SCENE, SCENE), bool), []
    for _ in range(rng.randint(1, DIGITS_A_SCENE + 1)):
        i, size, brightness = rng.randint(len(digits)), rng.randint(24, 49), rng.uniform(0.6, 1)
        ink = np.asarray(Image.fromarray(digits[i]).resize((size, size), Image.BILINEAR)) / np.float32(255)
        for _ in range(20):  # tries; a digit that finds no place is left out
            y, x = rng.randint(0, SCENE - size + 1, 2)
            here = np.s_[y:y + size, x:x + size]
            if not (taken[here] & (ink > 0)).any():
                canvas[here] += ink * (brightness - canvas[here])
                mask = np.zeros_like(taken)
                mask[here] = ink > 0.25
                taken[here] |= ink > 0
                objects.append((int(labels[i]), mask))
                break
    canvas += 0.1 * rng.standard_normal(canvas.shape)
    pixels = torch.from_numpy((canvas.clip(0, 1) * 255).round().astype(np.uint8))
    return pixels.expand(3, -1, -1), objects


def digits_dictionary(split, n):
    """n scenes of a split as a COCO-style dictionary, and the function that makes an entry's image again."""
    digits, labels = digit_images(split)
    dataset = {"images": [], "annotations": [],
               "categories": [{"id": c + 1, "name": str(c)} for c in range(10)]}  # ids from 1, as COCO's
    for index in range(FIRST_SCENE[split], FIRST_SCENE[split] + n):
        dataset["images"].append({"id": index, "width": SCENE, "height": SCENE})
        for c, mask in scene(digits, labels, index)[1]:
            (y0, *_, y1), (x0, *_, x1) = (np.flatnonzero(mask.any(axis)).tolist() for axis in (1, 0))
            dataset["annotations"].append({"image_id": index, "category_id": c + 1, "area": int(mask.sum()),
                                           "bbox": [x0, y0, x1 + 1 - x0, y1 + 1 - y0], "segmentation": to_rle(mask)})
    return dataset, partial(load_scene, digits, labels)


def load_scene(digits, labels, image):
    return scene(digits, labels, image["id"])[0]


# ---- official layouts

def coco_dictionary(root, split):
    """annotations/instances_<split>.json, file names below root. Raises InputError where it is missing or foreign."""
    file = root / "annotations" / f"instances_{split}.json"
    expected = ("COCO's instances, a json object with images, annotations and categories; --data names the folder with "
                "annotations/, train2017/ and val2017/")
    dataset = read_json(file, expected)
    try:
        for image in dataset["images"]:
            image["file_name"] = f"{split}/{image['file_name']}"
    except (LookupError, TypeError):
        raise InputError(f"{file}: not COCO's instances, without a list of images; expected {expected}") from None
    return dataset


VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
               "pottedplant sheep sofa train tvmonitor").split()


def voc_dictionary(root, splits):
    """The XML files of the (year, list) pairs `splits`, for example ("2007", "test"), as one COCO-style dictionary.

    VOC counts pixels from 1 and includes the last: x = xmin - 1, w = xmax - xmin + 1. Raises InputError.
    """
    dataset = {"images": [], "annotations": [],
               "categories": [{"id": i, "name": name} for i, name in enumerate(VOC_CLASSES, 1)]}
    for year, split in splits:
        folder = root / f"VOC{year}"
        names = folder / "ImageSets" / "Main" / f"{split}.txt"
        if not names.is_file():
            raise InputError(f"{names}: no such file; --data names VOCdevkit, the folder with VOC2007/ and VOC2012/, "
                             "each with JPEGImages/, Annotations/ and ImageSets/Main/")
        try:
            in_split = names.read_text(encoding="utf-8").split()
        except ValueError:
            raise InputError(f"{names}: not a text file in UTF-8; expected a name a line") from None
        for name in in_split:
            if OUTSIDE.search(name) or "/" in name:
                raise InputError(f"{names}: `{printable(name)}` is not the name of an image; expected one a line")
            file = inside(root, f"VOC{year}/Annotations/{name}.xml")
            try:
                text = file.read_text(encoding="utf-8")
                if "<!" in text:  # entities, which can be nested until no memory holds them
                    raise ValueError("with a document type")
                tree = ElementTree.fromstring(text)
                image = {"id": len(dataset["images"]) + 1, "file_name": f"VOC{year}/JPEGImages/{name}.jpg",
                         **{side: int(tree.find("size").find(side).text) for side in ("width", "height")}}
                for thing in tree.findall("object"):
                    box = thing.find("bndbox")
                    x0, y0, x1, y1 = (float(box.find(side).text) for side in ("xmin", "ymin", "xmax", "ymax"))
                    if (category := thing.find("name").text.strip()) not in VOC_CLASSES:
                        raise InputError(f"{file}: `{category}` is none of VOC's 20 classes")
                    dataset["annotations"].append({
                        "image_id": image["id"], "category_id": VOC_CLASSES.index(category) + 1,
                        "bbox": [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1],
                        "difficult": int(thing.findtext("difficult", "0"))})
            except OSError:
                raise InputError(f"{file}: no such annotation file, but {names} lists it") from None
            except (ElementTree.ParseError, AttributeError, TypeError, ValueError, OverflowError) as error:
                raise InputError(f"{file}: not an annotation of VOC ({printable(error)})") from None
            dataset["images"].append(image)
    return dataset


def is_mask(segmentation, H, W):
    """Whether it is what COCO allows: nothing, polygons, or run lengths, that cover the image and no more, since
    pycocotools writes as many pixels as they say."""
    if not segmentation:
        return True
    if isinstance(segmentation, list):
        return all(isinstance(polygon, list) and len(polygon) >= 4 and len(polygon) % 2 == 0 and
                   all(isinstance(x, (int, float)) and abs(x) < 2**16 for x in polygon) for polygon in segmentation)
    counts = segmentation["counts"]
    if isinstance(counts, str):  # five bits a character, lowest first, 32: more follow; differences from the third
        runs, counts = counts.encode(), []
        x = shift = 0
        for c in runs:
            c -= 48
            x |= (c & 31) << shift
            shift += 5
            if not c & 32:
                x -= (c & 16) // 16 << shift
                counts.append(x + (counts[-2] if len(counts) > 2 else 0))
                x = shift = 0
            if not 0 <= c < 64 or shift > 30:
                return False
    return (segmentation["size"] == [H, W] and all(type(n) is int and n >= 0 for n in counts) and
            sum(counts) == H * W)


def checked(dataset, name, root=None, masks=False):
    """The dictionary with every annotation's id (from 1: pycocotools takes 0 for `unmatched`), area, iscrowd and
    difficult filled in. Raises InputError for what would fail, or count for nothing, hours later.
    root: the folder of its files; without one no file is looked for. masks: every annotation needs one."""
    def where(a):
        return (f"{name}: an annotation (image {printable(a['image_id'])}, category "
                f"{printable(a['category_id'])}, bbox {a['bbox']})")

    def number(x):
        return isinstance(x, (int, float)) and abs(x) < 1e9  # neither nan

    annotations = []
    try:
        sizes = {image["id"]: (image["width"], image["height"]) for image in dataset["images"]}
        categories = {c["id"] for c in dataset["categories"]}
        names = [image["file_name"] for image in dataset["images"]] if root is not None else []
        for path in names:
            if OUTSIDE.search(path) or path.startswith("/"):
                raise InputError(f"{name}: `{printable(path)}` is not a path below {root}")
        files = [Path(path) for path in names]
        if not all(type(side) is int and 0 < side < 2**15 for size in sizes.values() for side in size):
            raise InputError(f"{name}: an image whose width and height are not 1 to {2**15 - 1} pixels")
        if not all(type(c) is int for c in categories):
            raise InputError(f"{name}: a category whose id is not a whole number")
        if not sizes or len(sizes) < len(dataset["images"]) or len(categories) < len(dataset["categories"]):
            raise InputError(f"{name}: no image at all, or an id that two images or two categories share")
        for a in dataset["annotations"]:
            x, y, w, h = a["bbox"]
            if not all(map(number, (x, y, w, h, a.get("area", 0)))) or a.get("iscrowd", 0) not in (0, 1):
                raise InputError(f"{name}: an annotation without four numbers as its bbox, or with another iscrowd "
                                 "than 0 and 1")
            if a["image_id"] not in sizes:
                raise InputError(f"{where(a)} of an image that is not in the list of images")
            if a["category_id"] not in categories:
                raise InputError(f"{where(a)} of a category that is not in the list of categories: a wrong label map")
            W, H = sizes[a["image_id"]]
            if w > 0 and h > 0 and (min(x + w, W) <= max(x, 0) or min(y + h, H) <= max(y, 0)):
                raise InputError(f"{where(a)} outside its image of {W} x {H}; expected [x, y, width, height] in pixels")
            if masks and not a.get("segmentation"):
                raise InputError(f"{where(a)} without a segmentation")
            if not is_mask(a.get("segmentation"), H, W):
                raise InputError(f"{where(a)} whose segmentation is neither polygons nor the run lengths of {H} x {W}")
            annotations.append({"iscrowd": 0, "difficult": 0, "area": w * h, **a, "id": len(annotations) + 1})
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{name}: not a COCO-style dictionary ({type(error).__name__}: {error})") from None
    folders = {root / file.parent for file in files}
    there = {folder / entry.name for folder in folders if os.path.isdir(folder) for entry in os.scandir(folder)}
    missing = [file for file in files if root / file not in there]  # one listing a folder, not 118,287 questions
    if missing:
        raise InputError(f"{len(missing)} of {len(files)} images of {name} have no file (first: {root / missing[0]})")
    return {**dataset, "annotations": annotations}


def read_datasets(name, root, masks, split="test", train_scenes=1000, test_scenes=300):
    """(train, test): checked dictionaries, and (load) the function that makes an entry of their "images" to pixels.

    name: `voc` or `coco` in root, or `digits`, of which `split` says what stands for test.
    """
    if masks:
        coco_mask()
    if name == "digits":
        train, load_train = digits_dictionary("train", train_scenes)
        test, load_test = digits_dictionary(split, test_scenes)
        return (checked(train, "the training scenes"), load_train), (checked(test, f"the {split} scenes"), load_test)
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; --data names the data set in its official layout")
    if name == "voc":
        train = voc_dictionary(root, [("2007", "trainval"), ("2012", "trainval")])
        test = voc_dictionary(root, [("2007", "test")])
    else:
        train, test = coco_dictionary(root, "train2017"), coco_dictionary(root, "val2017")
    train, test = checked(train, "the training set", root, masks), checked(test, "the test set", root, masks)
    if {c["id"]: c.get("name") for c in train["categories"]} != {c["id"]: c.get("name") for c in test["categories"]}:
        raise InputError(f"{root}: training and test set have other categories; the label map is wrong")
    return (train, partial(load_file, root)), (test, partial(load_file, root))


def load_file(root, image):
    file = inside(root, image["file_name"])
    try:
        pixels = torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy()).permute(2, 0, 1)
    except Exception as error:  # PIL raises half a dozen kinds on broken files
        raise InputError(f"{file} does not decode as an image: {error}") from None
    if pixels.shape[1:] != (image["height"], image["width"]):
        raise InputError(f"{file} is {pixels.shape[2]} x {pixels.shape[1]}, its annotation says {image['width']} x "
                         f"{image['height']}")
    return pixels


# ---- masks, targets, order

def coco_mask():
    """pycocotools.mask; imported where it is needed, because VOC and the other scripts do without."""
    try:
        import pycocotools.mask
    except ImportError:
        raise InputError("COCO's masks and AP need pycocotools: `pip install pycocotools`") from None
    return pycocotools.mask


def to_rle(mask):
    """bool (H, W) -> COCO's run lengths, with a str that JSON can hold."""
    rle = coco_mask().encode(np.asfortranarray(mask, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def to_mask(segmentation, H, W):
    """Polygons, run lengths as a list or run lengths as a string -> uint8 (H, W)."""
    m = coco_mask()
    if isinstance(segmentation, list):
        segmentation = m.merge(m.frPyObjects(segmentation, H, W))
    elif isinstance(segmentation["counts"], list):
        segmentation = m.frPyObjects(segmentation, H, W)
    return torch.from_numpy(m.decode(segmentation))


class Scenes(Dataset):
    """The images and targets of a checked dictionary.

    An item's key is (index, mirrored) or an index; an item is (image uint8 (3, H, W), target), target = boxes float
    (n, 4) as x0, y0, x1, y1, labels (n,) int64 from 1 (0 is the background) and, with masks, masks uint8 (n, H, W).
    Targets leave out crowds and what is <= 1 px wide or high when clipped to the image; VOC's difficult objects stay.
    train: without the images that have no object then. load: from an entry of "images" to its pixels.
    """

    def __init__(self, dataset, load, masks, train=False):
        self.load, self.masks = load, masks
        self.category_ids = sorted(c["id"] for c in dataset["categories"])  # label 1 is the lowest id, gaps closed
        self.label_of = {category_id: label for label, category_id in enumerate(self.category_ids, 1)}
        sizes = {image["id"]: (image["width"], image["height"]) for image in dataset["images"]}
        self.objects = {image["id"]: [] for image in dataset["images"]}
        for a in dataset["annotations"]:
            x, y, w, h = a["bbox"]
            W, H = sizes[a["image_id"]]
            box = [max(x, 0), max(y, 0), min(x + w, W), min(y + h, H)]
            if not a["iscrowd"] and box[2] - box[0] > 1 and box[3] - box[1] > 1:
                self.objects[a["image_id"]].append((box, self.label_of[a["category_id"]], a.get("segmentation")))
        self.images = [image for image in dataset["images"] if self.objects[image["id"]] or not train]
        if not self.images:
            raise InputError("no training image has an object more than 1 px wide and high")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        index, mirrored = key if isinstance(key, tuple) else (key, False)
        image = self.images[index]
        objects, pixels = self.objects[image["id"]], self.load(image)
        target = {"boxes": torch.tensor([box for box, _, _ in objects], dtype=torch.float32).reshape(-1, 4),
                  "labels": torch.tensor([label for _, label, _ in objects], dtype=torch.int64)}
        if self.masks:
            masks = [to_mask(segmentation, *pixels.shape[1:]) for _, _, segmentation in objects]
            target["masks"] = torch.stack(masks) if masks else torch.zeros(0, *pixels.shape[1:], dtype=torch.uint8)
        return mirror(pixels, target) if mirrored else (pixels, target)


def mirror(pixels, target):
    """Left to right: the image, its boxes and masks."""
    x0, y0, x1, y1 = target["boxes"].unbind(1)
    W = pixels.shape[-1]
    target = {**target, "boxes": torch.stack((W - x1, y0, W - x0, y1), 1)}
    return pixels.flip(-1), {name: x.flip(-1) if name == "masks" else x for name, x in target.items()}


def batches(images, batch, seed, mirrored):
    """Global batches of (index, mirrored) for ever, a function of the seed alone: images in a new random order each
    epoch, wide and tall ones in different batches, so that little is padded. What is left of an epoch goes on."""
    g, waiting = torch.Generator().manual_seed(seed), {True: [], False: []}
    while True:
        flips = torch.rand(len(images), generator=g) < 0.5
        for i in torch.randperm(len(images), generator=g).tolist():
            group = waiting[images[i]["width"] > images[i]["height"]]
            group.append((i, mirrored and bool(flips[i])))
            if len(group) == batch:
                yield group[:]
                group.clear()


def train_loader(dataset, batch, accumulate, seed, mirrored, workers, start=0):
    """This rank's share of the global batches from iteration `start`, `accumulate` lists of items for each."""
    parts = ddp.world() * accumulate
    share = (part[ddp.rank() + ddp.world() * a::parts]
             for part in itertools.islice(batches(dataset.images, batch, seed, mirrored), start, None)
             for a in range(accumulate))
    return DataLoader(dataset, batch_sampler=share, collate_fn=list, num_workers=workers,
                      pin_memory=torch.cuda.is_available(), generator=torch.Generator())


def to_input(pixels, device):
    """uint8 0..255 -> float 0..1 on the device; the detector normalises. Nothing else divides by 255."""
    return pixels.to(device, non_blocking=True).float().div_(255)
