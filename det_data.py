"""
Data and scores for detectors: VOC, COCO, scenes of embedded digits, and average precision.

Each data set is a dictionary in COCO's format. Boxes are in pixels and begin at 0:

    {"images": [{"id", "width", "height", "file_name" or "pixels"}], "categories": [{"id", "name"}],
     "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, w, h], "area", "iscrowd", "difficult",
                      "segmentation"}]}

Scenes turns it into images and targets, and train_loader into batches.
"""
import contextlib
import itertools
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

import ddp
from data import decode
from sources import FIRST_SCENE, SIDE, digit_images, scene

try:
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:
    sys.exit("error: detection needs pycocotools for its masks and COCO's AP: pip install pycocotools")

VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
               "motorbike person pottedplant sheep sofa train tvmonitor").split()


@contextlib.contextmanager
def named(file):
    """Add the file's name to any error, such as a missing file, an XML file that ends early or a truncated image."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        kind = RuntimeError if get_worker_info() else SystemExit  # SystemExit in a worker would not end training
        raise kind(f"error: {file} cannot be used ({reason}); check it, and --data") from None


# ---- data sets as dictionaries

def digits_dictionary(split, n):
    """The first n scenes of a split. Their images have pixels instead of a file name."""
    digits, labels = digit_images(split)
    images, annotations = [], []
    for index in range(FIRST_SCENE[split], FIRST_SCENE[split] + n):
        grey, objects = scene(digits, labels, index)
        pixels = torch.from_numpy(grey).repeat(3, 1, 1)
        images.append({"id": index, "width": SIDE, "height": SIDE, "pixels": pixels})
        for label, mask in objects:
            rle = to_rle(mask)
            annotations.append({"image_id": index, "category_id": label + 1, "segmentation": rle,
                                "bbox": coco_mask.toBbox(rle).tolist()})
    categories = [{"id": label + 1, "name": str(label)} for label in range(10)]
    return complete({"images": images, "categories": categories, "annotations": annotations})


def coco_dictionary(root, split):
    file = Path(root, "annotations", f"instances_{split}.json")
    with named(file):
        dataset = json.loads(file.read_text(encoding="utf-8-sig"))
        for image in dataset["images"]:
            image["file_name"] = str(Path(root, split, image["file_name"]))
        return complete(dataset)


def voc_dictionary(root, splits):
    """The images of (year, list) pairs, for example ("2007", "test").

    VOC counts pixels from 1, and its boxes include the last pixel: x = xmin - 1, w = xmax - xmin + 1.
    """
    ids = {name: i for i, name in enumerate(VOC_CLASSES, 1)}
    images, annotations = [], []
    for year, split in splits:
        folder = Path(root, f"VOC{year}")
        file = folder / "ImageSets" / "Main" / f"{split}.txt"
        with named(file):
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        names = [line.strip() for line in lines if line.strip()]
        for image_id, name in enumerate(names, len(images) + 1):
            file = folder / "Annotations" / f"{name}.xml"
            with named(file):
                tree = ElementTree.parse(file)
                width, height = (int(tree.findtext(f"size/{side}")) for side in ("width", "height"))
                images.append({"id": image_id, "width": width, "height": height,
                               "file_name": str(folder / "JPEGImages" / f"{name}.jpg")})
                for node in tree.findall("object"):
                    x0, y0, x1, y1 = (float(node.findtext(f"bndbox/{side}"))
                                      for side in ("xmin", "ymin", "xmax", "ymax"))
                    box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
                    annotations.append({"image_id": image_id, "bbox": box,
                                        "category_id": ids[node.findtext("name").strip()],
                                        "difficult": int(node.findtext("difficult", "0"))})
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    return complete({"images": images, "categories": categories, "annotations": annotations})


def complete(dataset):
    """Fill in what annotations leave out, and add `inside`, the box clipped to its image as [x0, y0, x1, y1]. Number
    the annotations from 1, because 0 means "unmatched" to pycocotools."""
    images = {image["id"]: image for image in dataset["images"]}
    category_ids = {c["id"] for c in dataset["categories"]}
    for number, a in enumerate(dataset["annotations"], 1):
        if a["image_id"] not in images or a["category_id"] not in category_ids:
            raise ValueError(f"annotation {number} has image {a['image_id']} and category "
                             f"{a['category_id']}, one of which is not listed")
        image = images[a["image_id"]]
        x, y, w, h = a["bbox"]
        inside = [max(x, 0), max(y, 0), min(x + w, image["width"]), min(y + h, image["height"])]
        a |= {"iscrowd": 0, "difficult": 0, "area": w * h, **a, "id": number, "inside": inside}
    return dataset


def read_datasets(name, root, train_scenes=1000, test_scenes=300):
    """The training and test sets of digits, or of voc or coco in the folder root. Their key "masks" says whether the
    objects have masks. Exits if the test set could not be scored."""
    if name == "digits":
        train = digits_dictionary("train", train_scenes)
        test = digits_dictionary("test", test_scenes)
    elif name == "voc":
        train = voc_dictionary(root, [("2007", "trainval"), ("2012", "trainval")])
        test = voc_dictionary(root, [("2007", "test")])
    else:
        train = coco_dictionary(root, "train2017")
        test = coco_dictionary(root, "val2017")
    if train["categories"] != test["categories"]:
        sys.exit(f"error: {root}: training and test set have different categories; fix the label map")
    if all(a["iscrowd"] or a["difficult"] for a in test["annotations"]):
        sys.exit(f"error: {root}: the test set has no objects to find; they are all crowds or difficult")

    # either all objects have masks or none have; an empty list of polygons is no mask
    objects = train["annotations"] + test["annotations"]
    without = sum(not any(a.get("segmentation") or ()) for a in objects)
    if 0 < without < len(objects):
        sys.exit(f"error: {root}: {without} of {len(objects)} objects have no mask (segmentation); "
                 "give masks to all objects of the training and test sets, or to none")
    train["masks"] = test["masks"] = without == 0
    return train, test


# ---- masks, images, targets

def to_rle(mask):
    """bool (H, W) -> COCO's run-length encoding, in types that JSON can hold."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def to_mask(segmentation, H, W):
    """COCO's polygons or run-length encoding -> uint8 (H, W)."""
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, H, W))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, H, W)
    return torch.from_numpy(coco_mask.decode(segmentation))


def read_pixels(image):
    """An entry of "images" -> uint8 (3, H, W). The camera's orientation (EXIF) is applied, as in detectron2."""
    if "pixels" in image:
        return image["pixels"]
    pixels = decode(Path(image["file_name"]).read_bytes(), upright=True)
    H, W = pixels.shape[1:]
    if (W, H) != (image["width"], image["height"]):
        listed = f"{image['width']} x {image['height']}"
        raise ValueError(f"it is {W} x {H}, but its annotation says {listed}")
    return pixels


class Scenes(Dataset):
    """Images and their targets. The key of an item is (index, mirrored).

    An item is an image, uint8 (3, H, W), and its target: boxes float (n, 4) as x0, y0, x1, y1, labels int64 (n,) that
    start at 1 because 0 is the background, and if `masks` is set, masks uint8 (n, H, W).

    Targets leave out crowds and boxes whose part inside the image is at most 1 px wide or high. They keep VOC's
    difficult objects. If `train` is set, images without an object are dropped, and a line says how many remain.
    """

    def __init__(self, dataset, masks, train=False):
        self.masks = masks
        self.category_ids = sorted(c["id"] for c in dataset["categories"])  # labels have no gaps, COCO's ids do
        self.objects = {image["id"]: [] for image in dataset["images"]}
        for a in dataset["annotations"]:
            x0, y0, x1, y1 = a["inside"]
            if not a["iscrowd"] and x1 - x0 > 1 and y1 - y0 > 1:
                self.objects[a["image_id"]].append(a)
        self.images = dataset["images"]
        if train:
            self.images = [image for image in self.images if self.objects[image["id"]]]
            n, m = sum(map(len, self.objects.values())), len(self.images)
            N, M = len(dataset["annotations"]), len(dataset["images"])
            detector = "Mask R-CNN" if masks else "Faster R-CNN"
            ddp.print0(f"training a {detector} on {n} of {N} objects and {m} of {M} images; "
                       "crowds, boxes of at most 1 px and images without an object are left out")
            if not self.images:
                sys.exit("error: no training image has a usable object")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        index, mirrored = key
        image = self.images[index]
        objects = self.objects[image["id"]]
        boxes = [a["inside"] for a in objects]
        labels = [self.category_ids.index(a["category_id"]) + 1 for a in objects]
        target = {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                  "labels": torch.tensor(labels, dtype=torch.int64)}
        with named(image.get("file_name")):
            pixels = read_pixels(image)
            H, W = pixels.shape[1:]
            if self.masks:
                masks = [to_mask(a["segmentation"], H, W) for a in objects]
                none = torch.zeros(0, H, W, dtype=torch.uint8)
                target["masks"] = torch.stack(masks) if masks else none
        return mirror(pixels, target) if mirrored else (pixels, target)


def mirror(pixels, target):
    """Flip the image, its boxes and its masks horizontally."""
    W = pixels.shape[-1]
    x0, y0, x1, y1 = target["boxes"].unbind(1)
    target = {**target, "boxes": torch.stack((W - x1, y0, W - x0, y1), 1)}
    if "masks" in target:
        target["masks"] = target["masks"].flip(-1)
    return pixels.flip(-1), target


# ---- batches

def batches(images, batch, seed, mirrored):
    """Endless global batches of (index, mirrored), in a new order each epoch. Wide and tall images never share a batch,
    so little padding is needed. Images that are left over at the end of an epoch wait for the next one."""
    g = torch.Generator().manual_seed(seed)
    waiting = {"wide": [], "tall": []}
    while True:
        flips = torch.rand(len(images), generator=g) < 0.5
        for i in torch.randperm(len(images), generator=g).tolist():
            shape = "wide" if images[i]["width"] > images[i]["height"] else "tall"
            waiting[shape].append((i, mirrored and bool(flips[i])))
            if len(waiting[shape]) == batch:
                yield waiting[shape]
                waiting[shape] = []


def train_loader(scenes, batch, accumulate, seed, mirrored, workers, start=0):
    """This rank's share of the global batches, beginning with iteration `start`. Each batch comes as `accumulate` lists
    of items."""
    def lists_of_rank():
        parts = ddp.world() * accumulate
        for items in itertools.islice(batches(scenes.images, batch, seed, mirrored), start, None):
            for part in range(accumulate):
                yield items[ddp.rank() + ddp.world() * part::parts]

    return DataLoader(scenes, batch_sampler=lists_of_rank(), collate_fn=list, num_workers=workers,
                      pin_memory=torch.cuda.is_available(), generator=torch.Generator())


def to_device(items, device):
    """A list of (pixels, target) -> images as floats in 0..1, and targets. The detector normalises the images."""
    images = [pixels.to(device, non_blocking=True).float().div_(255) for pixels, _ in items]
    targets = [{name: x.to(device, non_blocking=True) for name, x in target.items()}
               for _, target in items]
    return images, targets


# ---- average precision

def voc_matches(objects, detections):
    """The object in the same image that each detection overlaps most: its IoU (n,) and its index into objects (n,)."""
    in_image = {}
    for j, a in enumerate(objects):
        in_image.setdefault(a["image_id"], []).append(j)

    overlap = np.zeros(len(detections))
    best = np.zeros(len(detections), int)
    for i, d in enumerate(detections):
        candidates = in_image.get(d["image_id"])
        if not candidates:
            continue
        boxes = np.array([objects[j]["bbox"] for j in candidates], float)                # (m, 4)
        box = np.array(d["bbox"], float)
        starts, ends = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        shared = np.minimum(ends, box[:2] + box[2:]) - np.maximum(starts, box[:2])       # (m, 2)
        intersection = shared.clip(0).prod(1)
        union = boxes[:, 2:].prod(1) + box[2:].prod() - intersection
        iou = intersection / np.maximum(union, 1e-9)
        overlap[i] = iou.max()
        best[i] = candidates[iou.argmax()]
    return overlap, best


def voc_average(overlap, best, difficult, threshold):
    """11-point average precision at an IoU threshold. overlap, best: what voc_matches returns for detections in order
    of falling score. difficult: bool, one per object."""
    hit = overlap >= threshold
    ignored = hit & difficult[best]
    counted = np.flatnonzero(hit & ~ignored)
    _, first = np.unique(best[counted], return_index=True)
    true = np.zeros(len(overlap), bool)
    true[counted[first]] = True  # only the first detection of an object is true
    true = true[~ignored]

    recall = true.cumsum() / (~difficult).sum()
    precision = true.cumsum() / np.arange(1, len(true) + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)  # the best at this recall or more
    return np.mean([envelope[np.searchsorted(recall, t / 10)] for t in range(11)])


def voc_ap(dataset, detections):
    """PASCAL VOC 2007's average precision in percent, as the mean over the classes. Returns {"AP50", "AP", "AP75"}: at
    IoU 0.5, as the mean over the IoUs 0.50, 0.55 ... 0.95, and at 0.75.

    dataset: {"categories", "annotations": [{"image_id", "category_id", "bbox": [x, y, w, h], "difficult"}]}
    detections: [{"image_id", "category_id", "bbox": [x, y, w, h], "score"}]

    The devkit's rule (VOCevaldet.m): take the detections by falling score and match each to the object of its class and
    image that it overlaps most. If the IoU is below the threshold, the detection is false. Otherwise it is ignored if
    the object is difficult, false if an earlier detection has found the object already, and true if not. Difficult
    objects do not count, and a class that has only such objects is left out. Boxes begin at 0, so widths need no +1.
    """
    aps = []
    for category in [c["id"] for c in dataset["categories"]]:
        objects = [a for a in dataset["annotations"] if a["category_id"] == category]
        difficult = np.array([a.get("difficult", 0) for a in objects], bool)
        if difficult.all():
            continue
        found = [d for d in detections if d["category_id"] == category]
        found.sort(key=lambda d: -d["score"])
        overlap, best = voc_matches(objects, found)
        aps.append([100 * voc_average(overlap, best, difficult, percent / 100)
                    for percent in range(50, 100, 5)])
    at_iou = np.mean(aps, 0).tolist()                                     # (10,)
    return {"AP50": at_iou[0], "AP": float(np.mean(at_iou)), "AP75": at_iou[5]}


def coco_ap(dataset, detections, kind):
    """COCO's {"AP", "AP50", "AP75"} in percent, from pycocotools. kind: `bbox` or `segm`."""
    if not detections:  # pycocotools would fail
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}

    # copies, because pycocotools writes into them
    detections = [dict(d) for d in detections]
    annotations = [dict(a) for a in dataset["annotations"]]
    if kind == "segm":
        for d in detections:
            del d["bbox"]  # pycocotools would take the area from it
    truth = COCO()
    truth.dataset = {**dataset, "annotations": annotations}
    with contextlib.redirect_stdout(None):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("AP", "AP50", "AP75"), (100 * evaluation.stats).tolist()))


def average_precision(name, dataset, detections):
    """The average precision of boxes and, if objects have them, of masks, in the order of the paper's tables."""
    if name == "voc":
        return {"box": voc_ap(dataset, detections)}                       # Table 11: AP50, AP, AP75
    scores = {"box": coco_ap(dataset, detections, "bbox")}                # Table 12: AP, AP50, AP75
    if dataset["masks"]:
        scores["mask"] = coco_ap(dataset, detections, "segm")
    return scores


def print_table(rows):
    """Print a Markdown table with one line per run, and the mean of the runs that differ only in the seed.

    rows: the contents of results.json files.
    """
    columns = dict.fromkeys((kind, name) for row in rows for kind in ("box", "mask")
                            for name in row.get(kind, ()))
    width = max(len(row["run"]) for row in rows)

    def line(name, cells):
        print(f"| {name:<{width}} | " + " | ".join(f"{cell:>13}" for cell in cells) + " |")

    line("in percent", [f"{kind} {name}" for kind, name in columns])
    print("|---" * (len(columns) + 1) + "|")
    seeds = {}
    for row in rows:
        values = [row.get(kind, {}).get(name, np.nan) for kind, name in columns]
        line(row["run"], [f"{x:.1f}" for x in values])
        run = re.sub(r"-seed\d+", "", row["run"])
        seeds.setdefault(run, []).append(values)
    for run, group in seeds.items():
        if len(group) > 1:
            means, deviations = np.mean(group, 0), np.std(group, 0, ddof=1)
            cells = [f"{mean:.1f} +- {std:.1f}" for mean, std in zip(means, deviations)]
            line(f"{run}, {len(group)} seeds", cells)
