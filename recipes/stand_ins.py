"""
Tiny data sets of random pixels in the layouts of the real ones, for SMOKE=1 and the tests:

    python recipes/stand_ins.py runs/smoke    # imagenet, inat2018, places365, data/cifar10 and 100, VOCdevkit, coco

It writes about 600 images of at most 96 px in a second. Results on them mean nothing.
"""
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def image(file, rng, side=64):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.randint(0, 256, (side, side + side // 2, 3), np.uint8)).save(file)


def imagenet(root):
    """Four classes with the published lists. train/ has 11 images per class: 8, 4, 3 and 2 of them form the long tail,
    and 2 per class are for validation. val/ has 2 per class, which are the test list."""
    rng, lists = np.random.RandomState(0), {"train": [], "val": [], "test": []}
    held_out = {9: "val", 10: "val", 11: "test", 12: "test"}
    sizes = {"n01440764": 8, "n01443537": 4, "n02110341": 3, "n04127249": 2}
    for label, (wnid, n) in enumerate(sizes.items()):
        for i in range(13):
            folder = "train" if i < 11 else "val"
            file = f"{folder}/{wnid}/{wnid}_{i}.JPEG"
            image(root / file, rng, 48 + i)
            name = "train" if i < n else held_out.get(i)
            if name:
                lists[name].append(f"{file} {label}\n")
    for name, lines in lists.items():
        (root / f"ImageNet_LT_{name}.txt").write_text("".join(lines))


def inat18(root):
    """Three classes with 6, 4 and 3 training images, and 2 per class in val2018.json."""
    rng = np.random.RandomState(0)
    for part, sizes in (("train", (6, 4, 3)), ("val", (2, 2, 2))):
        labels = [c for c, n in enumerate(sizes) for _ in range(n)]
        files = [f"train_val2018/Aves/{c}/{part}{i}.jpg" for i, c in enumerate(labels)]
        for file in files:
            image(root / file, rng)
        (root / f"{part}2018.json").write_text(json.dumps({
            "images": [{"id": i, "file_name": file} for i, file in enumerate(files)],
            "annotations": [{"image_id": i, "category_id": c} for i, c in enumerate(labels)]}))


def class_folders(root, parts, classes, side, kind):
    """Write random images of each class. parts: {folder: images per class}."""
    rng = np.random.RandomState(0)
    for part, n in parts.items():
        for name in classes:
            for i in range(n):
                image(root / part / name / f"{i:05d}.{kind}", rng, side)


def places365(root):
    # make_lt.py holds out at most a fifth of each class, here 4 of 24
    class_folders(root, {"train": 24, "val": 2}, ("airfield", "alley", "bakery"), 64, "jpg")


def cifar(root):
    """The layout that make_lt.py unpacks, with the 100 images per class that an imbalance of 100 needs."""
    class_folders(root, {"train": 100, "test": 2}, ("apple", "bear"), 32, "png")


XML = """<annotation><size><width>{W}</width><height>{H}</height><depth>3</depth></size>{objects}</annotation>"""
OBJECT = """<object><name>{name}</name>{difficult}<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>
<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>
</object>"""


def voc(root):
    """Two images per list in VOCdevkit's layout."""
    for year, split in (("2007", "trainval"), ("2012", "trainval"), ("2007", "test")):
        folder, names = root / f"VOC{year}", [f"{split}_{i}" for i in range(2)]
        for sub in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            pixels = np.full((48, 64, 3), 40 * i, np.uint8)
            Image.fromarray(pixels).save(folder / f"JPEGImages/{name}.jpg")
            objects = OBJECT.format(name="dog", difficult="<difficult>0</difficult>", box=(1, 1, 20, 30))
            difficult = f"<difficult>{i}</difficult>" if i else ""
            objects += OBJECT.format(name="person", difficult=difficult, box=(31.5, 11, 64, 48))
            annotation = XML.format(W=64, H=48, objects=objects)
            (folder / f"Annotations/{name}.xml").write_text(annotation)


def coco(root):
    """Two images per split in COCO's layout. The ids have gaps, and there are one crowd and one box of width 0."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(2):
            name = f"{500 + i}.jpg"
            Image.fromarray(np.full((48, 64, 3), 90 * i, np.uint8)).save(root / split / name)
            images.append({"id": 500 + i, "file_name": name, "width": 64, "height": 48})
            for c in (3, 90):
                annotations.append({"id": 10 * i + c, "image_id": 500 + i, "category_id": c,
                                    "bbox": [5, 5, 30, 20], "area": 600, "iscrowd": 0,
                                    "segmentation": [[5, 5, 35, 5, 35, 25, 5, 25]]})
        annotations.append({"id": 99, "image_id": 500, "category_id": 3,
                            "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 1,
                            "segmentation": {"size": [48, 64], "counts": [0, 9, 3063]}})
        annotations.append({"id": 98, "image_id": 501, "category_id": 90,
                            "bbox": [10, 10, 0, 5], "area": 0, "iscrowd": 0,
                            "segmentation": [[10, 10, 10, 15, 10, 12]]})
        categories = [{"id": c, "name": f"thing {c}"} for c in (3, 90)]
        content = {"images": images, "categories": categories, "annotations": annotations}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))


def main():
    root = Path(sys.argv[1])
    imagenet(root / "imagenet")
    inat18(root / "inat2018")
    places365(root / "places365")
    cifar(root / "data/cifar10")
    cifar(root / "data/cifar100")
    voc(root / "VOCdevkit")
    coco(root / "coco")


if __name__ == "__main__":
    main()
