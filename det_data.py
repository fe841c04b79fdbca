"""
What a detector learns from: VOC, COCO and scenes of embedded digits, as dictionaries in COCO's format,

    {"images": [{"id", "width", "height", "file_name" or "pixels"}], "categories": [{"id", "name"}],
     "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, w, h], "area", "iscrowd", "difficult",
                      "segmentation"}]}

with boxes in pixels from 0. Scenes makes images and targets of them, train_loader the batches.
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
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import ddp
from sources import FIRST_SCENE, SIDE, digit_images, scene

VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
               "pottedplant sheep sofa train tvmonitor").split()
LAYOUTS = {
    "voc": "VOCdevkit with VOC2007/ and VOC2012/, each with JPEGImages/, Annotations/ and ImageSets/Main/",
    "coco": "annotations/instances_{train,val}2017.json, train2017/ and val2017/",
}


# ---- scenes of digits

def digits_dictionary(split, n):
    """n scenes of a split; images hold their pixels."""
    digits, labels = digit_images(split)
    images, annotations = [], []
    for index in range(FIRST_SCENE[split], FIRST_SCENE[split] + n):
        pixels, objects = scene(digits, labels, index)
        pixels = torch.from_numpy(pixels).repeat(3, 1, 1)                 # grey as RGB
        images.append({"id": index, "width": SIDE, "height": SIDE, "pixels": pixels})
        for c, mask in objects:
            ys, xs = (np.flatnonzero(mask.any(axis)).tolist() for axis in (1, 0))
            box = [xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0]]
            annotations.append({"image_id": index, "category_id": c + 1, "bbox": box, "area": int(mask.sum()),
                                "segmentation": to_rle(mask)})
    categories = [{"id": c + 1, "name": str(c)} for c in range(10)]
    return complete({"images": images, "categories": categories, "annotations": annotations}, "digits")


# ---- official layouts

def expect(path, name):
    if not path.exists():
        sys.exit(f"error: {path} is missing; --data expects {LAYOUTS[name]}")
    return path


def coco_dictionary(root, split):
    file, folder = root / "annotations" / f"instances_{split}.json", expect(root / split, "coco")
    dataset = json.loads(expect(file, "coco").read_text(encoding="utf-8"))
    for image in dataset["images"]:
        image["file_name"] = str(folder / image["file_name"])
    return complete(dataset, file)


def voc_dictionary(root, splits):
    """The images of (year, list) pairs, for example ("2007", "test").

    VOC counts pixels from 1 and includes the last: x = xmin - 1, w = xmax - xmin + 1.
    """
    ids = {name: i for i, name in enumerate(VOC_CLASSES, 1)}
    images, annotations = [], []
    for year, split in splits:
        folder = root / f"VOC{year}"
        names = expect(folder / "ImageSets" / "Main" / f"{split}.txt", "voc").read_text().split()
        for image_id, name in enumerate(names, len(images) + 1):
            tree = ElementTree.parse(folder / "Annotations" / f"{name}.xml")
            width, height = (int(tree.findtext(f"size/{side}")) for side in ("width", "height"))
            images.append({"id": image_id, "width": width, "height": height,
                           "file_name": str(expect(folder / "JPEGImages", "voc") / f"{name}.jpg")})
            for thing in tree.findall("object"):
                x0, y0, x1, y1 = (float(thing.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
                category = thing.findtext("name").strip()
                annotations.append({"image_id": image_id, "category_id": ids.get(category, category),
                                    "bbox": [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1],
                                    "difficult": int(thing.findtext("difficult", "0"))})
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    return complete({"images": images, "categories": categories, "annotations": annotations}, root)


def complete(dataset, source):
    """Number the annotations from 1, since 0 means `unmatched` to pycocotools, and fill in what they leave out."""
    known = {c["id"] for c in dataset["categories"]}
    for number, a in enumerate(dataset["annotations"], 1):
        if a["category_id"] not in known:
            sys.exit(f"error: {source}: image {a['image_id']} has an annotation of the unknown category "
                     f"{a['category_id']}; the label map is wrong")
        w, h = a["bbox"][2:]
        a |= {"iscrowd": 0, "difficult": 0, "area": w * h, **a, "id": number}
    return dataset


def read_datasets(name, root, split="test", train_scenes=1000, test_scenes=300):
    """(train, test) of `voc` or `coco` in root, or of `digits`, where `split` stands for test."""
    if name == "digits":
        return digits_dictionary("train", train_scenes), digits_dictionary(split, test_scenes)
    root = expect(Path(root), name)
    if name == "voc":
        train = voc_dictionary(root, [("2007", "trainval"), ("2012", "trainval")])
        test = voc_dictionary(root, [("2007", "test")])
    else:
        train, test = coco_dictionary(root, "train2017"), coco_dictionary(root, "val2017")
    if train["categories"] != test["categories"]:
        sys.exit(f"error: {root}: training and test set have other categories; the label map is wrong")
    return train, test


# ---- masks, images, targets

def coco_mask():
    try:
        import pycocotools.mask
    except ImportError:
        sys.exit("error: masks and COCO's AP need pycocotools: pip install pycocotools")
    return pycocotools.mask


def to_rle(mask):
    """bool (H, W) -> COCO's run lengths, in types that JSON has."""
    rle = coco_mask().encode(np.asfortranarray(mask, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def to_mask(segmentation, H, W):
    """COCO's polygons or run lengths -> uint8 (H, W)."""
    m = coco_mask()
    if isinstance(segmentation, list):
        segmentation = m.merge(m.frPyObjects(segmentation, H, W))
    elif isinstance(segmentation["counts"], list):
        segmentation = m.frPyObjects(segmentation, H, W)
    return torch.from_numpy(m.decode(segmentation))


def read_pixels(image):
    """An entry of "images" -> uint8 (3, H, W)."""
    if "pixels" in image:
        return image["pixels"]
    pixels = np.array(Image.open(image["file_name"]).convert("RGB"))
    size = pixels.shape[1], pixels.shape[0]
    if size != (image["width"], image["height"]):
        raise ValueError(f"{image['file_name']} is {size}, its annotation says {image['width']} x {image['height']}")
    return torch.from_numpy(pixels).permute(2, 0, 1)


class Scenes(Dataset):
    """scenes[index, mirrored] is an image, uint8 (3, H, W), and its target: boxes float (n, 4) as x0, y0, x1, y1,
    labels int64 (n,) from 1 (0 is the background) and, with masks, masks uint8 (n, H, W).

    Targets leave out crowds, and boxes of at most 1 px within the image. VOC's difficult objects stay.
    train: images without an object are left out.
    """

    def __init__(self, dataset, masks, train=False):
        self.masks = masks
        self.category_ids = sorted(c["id"] for c in dataset["categories"])  # COCO's ids have gaps, labels do not
        images = {image["id"]: image for image in dataset["images"]}
        self.objects = {image_id: [] for image_id in images}
        for a in dataset["annotations"]:
            (x, y, w, h), image = a["bbox"], images[a["image_id"]]
            x0, y0 = max(x, 0), max(y, 0)
            x1, y1 = min(x + w, image["width"]), min(y + h, image["height"])
            if not a["iscrowd"] and x1 - x0 > 1 and y1 - y0 > 1:
                self.objects[a["image_id"]].append(([x0, y0, x1, y1], a))
        self.images = [image for image in dataset["images"] if self.objects[image["id"]] or not train]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        index, mirrored = key
        image = self.images[index]
        pixels, objects = read_pixels(image), self.objects[image["id"]]
        labels = [self.category_ids.index(a["category_id"]) + 1 for _, a in objects]
        target = {"boxes": torch.tensor([box for box, _ in objects], dtype=torch.float32).reshape(-1, 4),
                  "labels": torch.tensor(labels, dtype=torch.int64)}
        if self.masks:
            H, W = pixels.shape[1:]
            masks = [to_mask(a["segmentation"], H, W) for _, a in objects]
            target["masks"] = torch.stack(masks) if masks else torch.zeros(0, H, W, dtype=torch.uint8)
        return mirror(pixels, target) if mirrored else (pixels, target)


def mirror(pixels, target):
    """Left to right: the image, its boxes and masks."""
    W = pixels.shape[-1]
    x0, y0, x1, y1 = target["boxes"].unbind(1)
    target = {**target, "boxes": torch.stack((W - x1, y0, W - x0, y1), 1)}
    if "masks" in target:
        target["masks"] = target["masks"].flip(-1)
    return pixels.flip(-1), target


# ---- batches

def batches(images, batch, seed, mirrored):
    """Endless global batches of (index, mirrored), in a new order each epoch. Wide and tall images stay apart, so
    that little is padded. What an epoch leaves waits for the next."""
    g = torch.Generator().manual_seed(seed)
    waiting = {True: [], False: []}
    while True:
        flips = torch.rand(len(images), generator=g) < 0.5
        for i in torch.randperm(len(images), generator=g).tolist():
            group = waiting[images[i]["width"] > images[i]["height"]]
            group.append((i, mirrored and bool(flips[i])))
            if len(group) == batch:
                yield group[:]
                group.clear()


def train_loader(scenes, batch, accumulate, seed, mirrored, workers, start=0):
    """This rank's items of the global batches from iteration `start` on, in `accumulate` lists a batch."""
    parts = ddp.world() * accumulate
    share = (items[ddp.rank() + ddp.world() * part::parts]
             for items in itertools.islice(batches(scenes.images, batch, seed, mirrored), start, None)
             for part in range(accumulate))
    return DataLoader(scenes, batch_sampler=share, collate_fn=list, num_workers=workers,
                      pin_memory=torch.cuda.is_available(), generator=torch.Generator())


def to_device(items, device):
    """[(pixels, target)] -> images float 0..1 and targets. The detector normalises."""
    images = [pixels.to(device, non_blocking=True).float().div_(255) for pixels, _ in items]
    targets = [{name: x.to(device, non_blocking=True) for name, x in target.items()} for _, target in items]
    return images, targets


# ---- average precision

def voc_matches(objects, detections):
    """The object of its image that each detection overlaps most: IoU (n,) and index into objects (n,)."""
    in_image = {}
    for j, a in enumerate(objects):
        in_image.setdefault(a["image_id"], []).append(j)

    overlap, best = np.zeros(len(detections)), np.zeros(len(detections), int)
    for i, d in enumerate(detections):
        if here := in_image.get(d["image_id"]):
            start, size = np.split(np.array([objects[j]["bbox"] for j in here], float), 2, axis=1)
            x, side = np.split(np.array(d["bbox"], float), 2)
            shared = (np.minimum(start + size, x + side) - np.maximum(start, x)).clip(0).prod(1)
            iou = shared / np.maximum(size.prod(1) + side.prod() - shared, 1e-9)
            overlap[i], best[i] = iou.max(), here[iou.argmax()]
    return overlap, best


def voc_average(overlap, best, difficult, threshold):
    """11-point average precision at an IoU, from matches by falling score. difficult: bool, of each object."""
    hit = overlap >= threshold
    ignored = hit & difficult[best]
    counted = np.flatnonzero(hit & ~ignored)
    _, first = np.unique(best[counted], return_index=True)
    true = np.zeros(len(overlap), bool)
    true[counted[first]] = True  # a second detection of an object is false
    true = true[~ignored]

    recall = true.cumsum() / (~difficult).sum()
    precision = true.cumsum() / np.arange(1, len(true) + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)  # the best at this recall or more
    return np.mean([envelope[np.searchsorted(recall, t / 10)] for t in range(11)])


def voc_ap(dataset, detections):
    """PASCAL VOC 2007's average precision in percent, the mean over classes: {"AP50", "AP", "AP75"}, at IoU 0.5, as the
    mean over the IoUs 0.50, 0.55 ... 0.95, and at 0.75.

    dataset: {"categories", "annotations": [{"image_id", "category_id", "bbox" [x, y, w, h], "difficult"}]}
    detections: [{"image_id", "category_id", "bbox" [x, y, w, h], "score"}]

    The devkit's rule (VOCevaldet.m): by falling score, a detection goes to the object of its class and image that it
    overlaps most. With IoU >= the threshold it is true, or false where an earlier detection has the object, or ignored
    where the object is difficult. Otherwise it is false. Difficult objects are not counted, and a class without other
    objects is left out. Boxes begin at 0, so no +1.
    """
    categories = [c["id"] for c in dataset["categories"]]
    if unknown := {d["category_id"] for d in detections}.difference(categories):
        sys.exit(f"error: detections of the unknown categories {unknown}; the label map is wrong")

    aps = []
    for category in categories:
        objects = [a for a in dataset["annotations"] if a["category_id"] == category]
        difficult = np.array([a.get("difficult", 0) for a in objects], bool)
        if difficult.all():
            continue
        found = sorted((d for d in detections if d["category_id"] == category), key=lambda d: -d["score"])
        matches = voc_matches(objects, found)
        aps.append([100 * voc_average(*matches, difficult, percent / 100) for percent in range(50, 100, 5)])
    at_iou = np.mean(aps, 0).tolist()
    return {"AP50": at_iou[0], "AP": float(np.mean(at_iou)), "AP75": at_iou[5]}


def coco_ap(dataset, detections, kind):
    """COCO's {"AP", "AP50", "AP75"} in percent, by pycocotools. kind: `bbox` or `segm`."""
    coco_mask()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    if not detections:  # pycocotools fails
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    detections = [dict(d) for d in detections]  # pycocotools writes into them
    if kind == "segm":
        for d in detections:
            del d["bbox"]  # pycocotools would take the area from it
    truth = COCO()
    truth.dataset = {**dataset, "annotations": [dict(a) for a in dataset["annotations"]]}
    with contextlib.redirect_stdout(None):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("AP", "AP50", "AP75"), (100 * evaluation.stats).tolist()))


def print_table(rows):
    """Markdown: a line a run, then the mean of what was run with several seeds. rows: as results.json has them."""
    columns = [(kind, name) for kind in ("box", "mask") for name in rows[0].get(kind, ())]
    width = max(len(row["run"]) for row in rows)

    def line(name, cells):
        print(f"| {name:<{width}} | " + " | ".join(f"{x:>13}" for x in cells) + " |")

    line("in percent", [f"{kind} {name}" for kind, name in columns])
    print("|---" * (len(columns) + 1) + "|")
    seeds = {}
    for row in rows:
        values = [row[kind][name] for kind, name in columns]
        line(row["run"], [f"{x:.1f}" for x in values])
        seeds.setdefault(re.sub(r"-seed\d+", "", row["run"]), []).append(values)
    for name, group in seeds.items():
        if len(group) > 1:
            cells = [f"{x:.1f} +- {std:.1f}" for x, std in zip(np.mean(group, 0), np.std(group, 0, ddof=1))]
            line(f"{name}, {len(group)} seeds", cells)
