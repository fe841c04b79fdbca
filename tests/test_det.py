"""Detection: VOC's AP against the devkit's rule written out, the detectors, the data, and runs end to end."""
import importlib
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import checkpoint
import data
import ddp
import det_data
import make_lt
import resnet
import transfer_det
from det_data import Scenes, coco_ap, complete, mirror, to_mask, to_rle, voc_ap
from recipes import stand_ins
from sources import PER_CLASS, digit_images

TINY = dict(proposals=((60, 20), (60, 10)), rois=16, channels=8, fc=16, mask=(8,))


def tiny_detector(arch, masks=True, encoder=None, classes=3, amp=False):
    torch.manual_seed(0)
    encoder = encoder or resnet.ARCHS["resnet8"]()
    spec = dict(masks=masks, scales=[64], max_size=64, mean=(0.2,) * 3, std=(0.3,) * 3)
    return transfer_det.build_detector(encoder, arch, classes, TINY, spec, amp)


def tiny_batch(masks=True, boxes=([[5.0, 6, 30, 40], [20, 20, 50, 60]], [[10.0, 10, 40, 50]])):
    g = torch.Generator().manual_seed(0)
    images, targets = [torch.rand(3, 64, 64, generator=g) for _ in boxes], []
    for b in boxes:
        b = torch.tensor(b).reshape(-1, 4)
        targets.append({"boxes": b, "labels": 1 + torch.arange(len(b))})
        if masks:
            targets[-1]["masks"] = torch.zeros(len(b), 64, 64, dtype=torch.uint8)
            for mask, (x0, y0, x1, y1) in zip(targets[-1]["masks"], b.int().tolist()):
                mask[y0:y1, x0:x1] = 1
    return images, targets


# ---- VOC's AP

def truth(*boxes, images=2, categories=(1,)):
    """boxes: (image, category, bbox[, difficult])."""
    return {"images": [{"id": i} for i in range(images)], "categories": [{"id": c} for c in categories],
            "annotations": [{"image_id": i, "category_id": c, "bbox": b, **({"difficult": d[0]} if d else {})}
                            for i, c, b, *d in boxes]}


def found(*boxes):
    """boxes: (image, category, bbox, score)."""
    return [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in boxes]


A, B, FAR = [0, 0, 10, 10], [50, 50, 10, 10], [90, 90, 5, 5]


def test_voc_ap_by_hand():
    two = truth((0, 1, A), (1, 1, B))
    assert voc_ap(two, found((0, 1, A, 0.9), (1, 1, B, 0.8))) == {"AP50": 100, "AP": 100, "AP75": 100}
    assert voc_ap(two, []) == {"AP50": 0, "AP": 0, "AP75": 0}
    # one of two objects: recall 0.5 at precision 1, so 0, 0.1 ... 0.5 are reached: 6 of 11 points
    assert voc_ap(two, found((0, 1, A, 0.9), (1, 1, FAR, 0.8)))["AP50"] == pytest.approx(600 / 11)
    # IoU 10 x 6 / 100 = 0.6: counts at 0.50, 0.55 and 0.60, so AP = 3 / 10
    three = voc_ap(truth((0, 1, A)), found((0, 1, [0, 0, 10, 6], 0.9)))
    assert three == pytest.approx({"AP50": 100, "AP": 30, "AP75": 0})
    # an IoU of exactly 0.5 counts (the devkit's >=); a "+1" would make 66 / 121 of it
    assert voc_ap(truth((0, 1, A)), found((0, 1, [0, 0, 10, 5], 0.9)))["AP50"] == 100


def test_voc_ap_duplicates_and_difficult():
    one = truth((0, 1, A), (0, 1, B, 1))
    # the second on one object is false: precision 1 at recall 1, then 1 / 2
    assert voc_ap(one, found((0, 1, A, 0.9), (0, 1, A, 0.8)))["AP50"] == 100
    # a false one first: precision 1 / 2 at every recall
    assert voc_ap(one, found((0, 1, FAR, 0.9), (0, 1, A, 0.8)))["AP50"] == 50
    # on a difficult object: neither true nor false, any number of times; it does not count as an object
    assert voc_ap(one, found((0, 1, B, 0.95), (0, 1, B, 0.94), (0, 1, A, 0.8)))["AP50"] == 100
    # ... but with an IoU below the threshold it is false
    assert voc_ap(one, found((0, 1, [50, 50, 10, 4], 0.95), (0, 1, A, 0.8)))["AP50"] == 50
    # a detection belongs to the object that it overlaps most, also if that one is taken already
    near = truth((0, 1, A), (0, 1, [2, 0, 10, 10]))
    assert voc_ap(near, found((0, 1, A, 0.9), (0, 1, A, 0.8)))["AP50"] == pytest.approx(600 / 11)


def test_voc_ap_empty_classes_and_ties():
    # a class without objects, or with difficult ones only, is left out, whatever is detected of it
    data = truth((0, 1, A), (0, 3, B, 1), categories=(1, 2, 3))
    assert voc_ap(data, found((0, 1, A, 0.9), (0, 2, B, 0.9), (0, 3, FAR, 0.9)))["AP50"] == 100
    assert voc_ap(truth((0, 1, A), (0, 2, B), categories=(1, 2)), found((0, 1, A, 0.9)))["AP50"] == 50
    # equal scores stand in the order they came in
    true, false = (0, 1, A, 0.5), (1, 1, FAR, 0.5)
    assert voc_ap(truth((0, 1, A)), found(true, false))["AP50"] == 100
    assert voc_ap(truth((0, 1, A)), found(false, true))["AP50"] == 50


def devkit(dataset, detections, category, threshold):
    """VOCevaldet.m line by line, without its +1 (boxes are 0-based x, y, w, h); None for a class without objects."""
    gt = [dict(a, det=False) for a in dataset["annotations"] if a["category_id"] == category]
    npos = sum(1 for a in gt if not a.get("difficult", 0))
    if not npos:
        return None
    ds = sorted((d for d in detections if d["category_id"] == category), key=lambda d: -d["score"])
    tp, fp = [0] * len(ds), [0] * len(ds)
    for n, d in enumerate(ds):
        ovmax, jmax = -math.inf, None
        for a in gt:
            if a["image_id"] == d["image_id"]:
                (x, y, w, h), (u, v, s, t) = a["bbox"], d["bbox"]
                iw, ih = min(x + w, u + s) - max(x, u), min(y + h, v + t) - max(y, v)
                if iw > 0 and ih > 0:
                    ov = iw * ih / (w * h + s * t - iw * ih)
                    if ov > ovmax:
                        ovmax, jmax = ov, a
        if ovmax >= threshold:
            if not jmax.get("difficult", 0):
                if not jmax["det"]:
                    tp[n], jmax["det"] = 1, True
                else:
                    fp[n] = 1
        else:
            fp[n] = 1
    rec, prec, TP, FP = [], [], 0, 0
    for t, f in zip(tp, fp):
        TP, FP = TP + t, FP + f
        rec.append(TP / npos)
        prec.append(TP / (TP + FP) if TP + FP else 0)
    return sum(max((p for r, p in zip(rec, prec) if r >= t / 10), default=0) / 11 for t in range(11))


@pytest.mark.parametrize("seed", range(4))
def test_voc_ap_is_the_devkits(seed):
    rng = np.random.RandomState(seed)
    boxes = [(rng.randint(6), rng.randint(1, 4), [*rng.randint(0, 30, 2).tolist(), *rng.randint(5, 20, 2).tolist()],
              int(rng.rand() < 0.2)) for _ in range(50)]
    dataset = truth(*boxes, images=7, categories=(1, 2, 3, 9))
    detections = found(*((i, c if rng.rand() < 0.9 else 9, [x + rng.randint(3), y + rng.randint(3), w, h + rng.randint(3)],
                          rng.randint(12) / 12) for i, c, (x, y, w, h), _ in boxes + boxes[:25]))
    expected = []
    for threshold in (t / 100 for t in range(50, 100, 5)):
        aps = [devkit(dataset, detections, c, threshold) for c in (1, 2, 3, 9)]
        expected.append(100 * np.mean([ap for ap in aps if ap is not None]))
    assert voc_ap(dataset, detections) == pytest.approx(
        {"AP50": expected[0], "AP": np.mean(expected), "AP75": expected[5]})
    assert 10 < expected[0] < 90


# ---- COCO's AP

def test_coco_ap():
    mask, half = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    mask[10:30, 10:30] = half[10:30, 10:20] = True
    thing = {"image_id": 7, "category_id": 5, "bbox": [10, 10, 20, 20], "id": 0, "segmentation": to_rle(mask)}
    crowd = {**thing, "bbox": [40, 40, 20, 20], "iscrowd": 1, "segmentation": to_rle(~mask)}
    dataset = complete({"images": [{"id": 7, "width": 64, "height": 64}], "categories": [{"id": 5, "name": "x"}],
                        "annotations": [thing, crowd]})
    detection = {"image_id": 7, "category_id": 5, "score": 0.9, "bbox": [10, 10, 20, 20], "segmentation": to_rle(half)}
    on_crowd = {**detection, "bbox": [45, 45, 5, 5], "score": 0.95}  # ignored
    assert coco_ap(dataset, [on_crowd, detection], "bbox") == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})
    assert coco_ap(dataset, [detection], "segm") == pytest.approx({"AP": 10, "AP50": 100, "AP75": 0})  # IoU 0.5 exactly
    assert coco_ap(dataset, [], "bbox") == {"AP": 0, "AP50": 0, "AP75": 0}


# ---- the detectors

@pytest.mark.parametrize("arch, name, masks", [("c4", "resnet8", True), ("fpn", "resnet8", False), ("fpn", "resnet18", True)])
def test_every_parameter_gets_a_gradient(arch, name, masks):
    encoder = resnet.ARCHS[name]()
    detector = tiny_detector(arch, masks, encoder)
    sum(detector(*tiny_batch(masks)).values()).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in detector.parameters())
    parameters = set(detector.parameters())
    assert parameters >= {p for name, p in encoder.named_parameters() if not name.startswith("fc.")}

    decayed, norms = transfer_det.parameter_groups(detector, 1e-4)
    layers = [m for m in detector.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert set(norms["params"]) == {p for m in layers for p in m.parameters()} and norms["weight_decay"] == 0
    assert set(decayed["params"]) == parameters - set(norms["params"]) and decayed["weight_decay"] == 1e-4


@pytest.mark.parametrize("arch", ["c4", "fpn"])
def test_images_without_objects_or_detections(arch):
    detector = tiny_detector(arch)
    losses = detector(*tiny_batch(boxes=([], [])))
    assert all(x.isfinite() for x in losses.values()) and losses["loss_box_reg"] == losses["loss_mask"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())

    scenes = Scenes(det_data.digits_dictionary("test", 1), masks=False)
    detector.roi_heads.score_thresh = 1.0
    assert transfer_det.predict(detector, scenes, "cpu") == []


def test_c4_runs_its_last_stage_once_a_step():
    detector, runs = tiny_detector("c4"), []
    detector.roi_heads.box_head[0].register_forward_hook(lambda m, args, out: runs.append(len(args[0])))
    detector(*tiny_batch())
    assert runs == [32]  # 16 RoIs of each of two images, boxes and masks together
    assert detector.roi_heads.box_head[1].num_batches_tracked == 1
    assert not any("mask_head" in name for name in detector.state_dict())
    # the pool is detectron2's: aligned, adaptive sampling, 14 x 14 at the stride of the stage before
    pool = detector.roi_heads.box_roi_pool
    assert (pool.output_size, pool.spatial_scale, pool.sampling_ratio, pool.aligned) == (14, 1 / 2, 0, True)


def test_anchors_of_resnet50_are_the_papers():
    for arch, sizes in (("c4", [[32, 64, 128, 256, 512]]), ("fpn", [[32], [64], [128], [256], [512]])):
        heads = {**transfer_det.HEADS[arch], "channels": 8, "fc": 8}
        encoder, spec = resnet.ARCHS["resnet50"](), {**transfer_det.SPECS["voc"], "masks": False}
        detector = transfer_det.build_detector(encoder, arch, 20, heads, spec)
        assert [list(s) for s in detector.rpn.anchor_generator.sizes] == sizes


def test_amp_computes_in_bf16_and_returns_fp32():
    detector, seen = tiny_detector("fpn", amp=True), []
    detector.backbone[0].layer1.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    detector.roi_heads.box_head.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    losses, exact = detector(*tiny_batch()), tiny_detector("fpn")(*tiny_batch())
    assert seen == [torch.bfloat16, torch.float32]
    assert all(x.dtype == torch.float32 for x in detector.backbone(torch.rand(1, 3, 64, 64)).values())
    assert losses["loss_classifier"].item() == pytest.approx(exact["loss_classifier"].item(), rel=0.1)


def test_precise_bn_is_the_mean():
    detector = tiny_detector("c4")
    detector(*tiny_batch())  # what training left behind does not count
    bn, seen = detector.backbone[0].bn1, []
    bn.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    batches = [([torch.rand(3, 64, 64) * (i + 1) for _ in range(2)], tiny_batch()[1]) for i in range(3)]
    transfer_det.precise_bn(detector, batches)
    assert all(m.num_batches_tracked == 3 for m in transfer_det.norm_layers(detector))
    assert torch.allclose(bn.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0), atol=1e-6)
    assert torch.allclose(bn.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0), atol=1e-6)


def test_learning_rate():
    rates = [transfer_det.learning_rate(0.02, i, 24_000, (18 / 24, 22 / 24), 100)
             for i in (0, 50, 100, 17_999, 18_000, 22_000)]
    assert rates == pytest.approx([0.02e-3, 0.02 * 0.5005, 0.02, 0.02, 0.002, 0.0002])


# ---- data

def test_scenes_share_no_digit_with_other_splits_or_the_backbones(tmp_path, monkeypatch):
    images = {split: {d.tobytes() for d in digit_images(split)[0]} for split in PER_CLASS}
    train = digit_images("train")[0]
    assert [len(x) for x in images.values()] == [3500, 500, 1000] and len(set.union(*images.values())) == 5000

    def record(digits, i, rng):  # the first of a split that make_lt.py composes data/digits of
        small = [np.asarray(Image.fromarray(d).resize((22, 22), Image.BILINEAR)) for d in train]
        assert {d.tobytes() for d in digits} == {d.tobytes() for d in small}
        raise StopIteration
    monkeypatch.setattr("sources.clutter", record)
    with pytest.raises(StopIteration):
        make_lt.make_digits(tmp_path / "set")


def test_scenes_are_exact_and_the_same_always():
    scenes = Scenes(det_data.digits_dictionary("test", 5), masks=True)
    again = Scenes(det_data.digits_dictionary("test", 5), masks=True)
    for i in range(5):
        pixels, target = scenes[i, False]
        assert torch.equal(pixels, again[i, False][0]) and pixels.is_contiguous()  # else it cannot be pinned
        assert pixels.shape == (3, 128, 128) and pixels.dtype == torch.uint8 and 1 <= len(target["labels"]) <= 5
        assert target["masks"].sum(0).max() == 1  # no two digits on one pixel
        for mask, (x0, y0, x1, y1) in zip(target["masks"], target["boxes"].int().tolist()):
            assert mask[y0:y1, x0:x1].sum() == mask.sum() > 20
            assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()
        ink = target["masks"].bool().any(0)
        assert pixels[0][ink].float().mean() > pixels[0][~ink].float().mean() + 50


def dictionary(*boxes):
    """One image of 100 x 80; boxes: (category, bbox[, extra keys]). The ids of the categories have gaps."""
    image = {"id": 42, "width": 100, "height": 80, "pixels": torch.zeros(3, 80, 100, dtype=torch.uint8)}
    annotations = [{"image_id": 42, "category_id": c, "bbox": b, **dict(*extra)} for c, b, *extra in boxes]
    return complete({"images": [image], "categories": [{"id": c, "name": str(c)} for c in (90, 3, 17)],
                     "annotations": annotations})


def test_crowd_degenerate_and_clipped_boxes():
    dataset = dictionary((3, [10, 10, 20, 20], {"iscrowd": 1}), (17, [5, 5, 0, 9]), (17, [5, 5, 9, 1]),
                         (3, [100, 3, 0, 0]), (90, [-5, 70, 20, 30]), (17, [1, 2, 3, 4], {"difficult": 1}))
    _, target = Scenes(dataset, masks=False)[0, False]
    assert target["boxes"].tolist() == [[0, 70, 15, 80], [1, 2, 4, 6]] and target["labels"].tolist() == [3, 2]
    assert [a["id"] for a in dataset["annotations"]] == list(range(1, 7))
    crowd = dictionary((3, [10, 10, 20, 20], {"iscrowd": 1}))
    _, target = Scenes(crowd, masks=True)[0, False]
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 80, 100) and target["labels"].shape == (0,)
    with pytest.raises(SystemExit, match="no training image has a usable object"):
        Scenes(crowd, masks=True, train=True)
    with pytest.raises(ValueError, match="annotation 1 has image 42 and category 4, one of which is not listed"):
        dictionary((4, [1, 2, 3, 4]))


def test_category_ids_with_gaps_come_back():
    scenes = Scenes(dictionary((90, [1, 2, 30, 40]), (3, [5, 5, 9, 9])), masks=False)
    target = scenes[0, False][1]

    class Oracle(torch.nn.Module):  # finds what is there
        def forward(self, images):
            return [{**target, "scores": torch.tensor([0.5, 0.25])}]
    assert transfer_det.predict(Oracle(), scenes, "cpu") == [
        {"image_id": 42, "category_id": 90, "bbox": [1, 2, 30, 40], "score": 0.5},
        {"image_id": 42, "category_id": 3, "bbox": [5, 5, 9, 9], "score": 0.25}]


def test_mirror():
    images, (target, _) = tiny_batch()
    once = mirror(images[0], target)
    twice = mirror(*once)
    assert torch.equal(twice[0], images[0]) and all(torch.equal(twice[1][name], target[name]) for name in target)
    assert once[1]["boxes"][0].tolist() == [64 - 30, 6, 64 - 5, 40] and once[1]["masks"][0, 6, 64 - 30] == 1
    assert once[1]["masks"][0, 6, 64 - 31] == 0 and torch.equal(once[0][:, :, 0], images[0][:, :, 63])


def test_polygons_and_run_lengths():
    polygon = to_mask([[10, 10, 30, 10, 30, 20, 10, 20]], 40, 50)
    assert polygon.shape == (40, 50) and polygon[10:20, 10:30].all() and polygon.sum() == 200
    counts = to_mask({"size": [3, 2], "counts": [1, 2, 3]}, 3, 2)  # column by column: one 0, two 1, three 0
    assert counts.tolist() == [[0, 0], [1, 0], [1, 0]]
    assert torch.equal(to_mask(to_rle(polygon.bool().numpy()), 40, 50), polygon)


def take(iterable, n):
    return [x for x, _ in zip(iterable, range(n))]


def test_every_image_once_an_epoch_and_the_ranks_share_it(monkeypatch):
    images = [{"width": 10 + i % 3, "height": 11} for i in range(10)]  # every third is wide
    seen = take(det_data.batches(images, 2, 1, mirrored=True), 25)
    assert all(len({images[i]["width"] > 11 for i, _ in batch}) == 1 for batch in seen)  # wide apart from tall
    counts = np.bincount([i for batch in seen for i, _ in batch], minlength=10)
    assert counts.sum() == 50 and counts.min() >= 4 and counts.max() <= 6  # five epochs, a batch or two pending
    assert 10 < sum(flip for batch in seen for _, flip in batch) < 40
    assert not any(flip for batch in take(det_data.batches(images, 2, 1, mirrored=False), 9) for _, flip in batch)

    scenes = type("Scenes", (), {"images": images, "__getitem__": lambda self, key: key[0]})()
    together = take(det_data.train_loader(scenes, 4, 1, 1, False, 0), 6)
    monkeypatch.setattr("ddp.world", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr("ddp.rank", lambda: rank)
        shares.append(take(det_data.train_loader(scenes, 4, 2, 1, False, 0, start=2), 8))  # two parts of one item
    for step, whole in enumerate(together[2:]):
        assert sorted(i for share in shares for part in share[2 * step:2 * step + 2] for i in part) == sorted(whole)


def test_voc_xml_becomes_a_dictionary(tmp_path):
    stand_ins.voc(tmp_path)
    train, test = det_data.read_datasets("voc", tmp_path)
    assert len(train["images"]) == 4 and len(test["images"]) == 2
    assert [c["name"] for c in test["categories"]][:2] == ["aeroplane", "bicycle"] and len(test["categories"]) == 20
    second = [a for a in test["annotations"] if a["image_id"] == test["images"][1]["id"]]
    # 1-based, last pixel included -> 0-based x, y, width, height
    assert [(a["category_id"], a["bbox"], a["difficult"]) for a in second] == [
        (12, [0, 0, 20, 30], 0), (15, [30.5, 10, 33.5, 38], 1)]
    assert det_data.read_pixels(train["images"][3]).shape == (3, 48, 64)


def test_voc_names_with_blanks_and_a_byte_order_mark(tmp_path):
    stand_ins.voc(tmp_path)
    for file in tmp_path.glob("VOC2007/*/test_1.*"):
        file.rename(file.with_stem("my photo"))
    (tmp_path / "VOC2007/ImageSets/Main/test.txt").write_bytes("\ufefftest_0 \r\n\r\n my photo\r\n".encode())
    _, test = det_data.read_datasets("voc", tmp_path)
    assert [Path(image["file_name"]).name for image in test["images"]] == ["test_0.jpg", "my photo.jpg"]
    assert len(test["annotations"]) == 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation(tmp_path, orientation, kind):
    """The orientation is applied, as in detectron2."""
    stored = Image.fromarray(np.random.RandomState(0).randint(0, 256, (6, 8, 3), np.uint8)).resize((64, 48))
    exif = Image.Exif()
    exif[0x112] = orientation
    stored.save(tmp_path / "x.jpg", kind, exif=exif, quality=95)
    image = ImageOps.exif_transpose(Image.open(tmp_path / "x.jpg"))
    entry = {"file_name": str(tmp_path / "x.jpg"), "width": image.width, "height": image.height}
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).int()
    assert (det_data.read_pixels(entry).int() - expected).abs().max() <= 1
    with pytest.raises(ValueError, match="its annotation says 64 x 47"):
        det_data.read_pixels({**entry, "width": 64, "height": 47})


# ---- runs

@pytest.fixture
def small(monkeypatch):
    """The protocols with images and heads for a test."""
    for name, spec in transfer_det.SPECS.items():
        monkeypatch.setitem(transfer_det.SPECS, name, {**spec, "scales": [48, 64], "max_size": 64})
        monkeypatch.setitem(transfer_det.DEFAULTS, name, {**transfer_det.DEFAULTS[name], "workers": 0})
        monkeypatch.setitem(transfer_det.HEADS, {"voc": "c4", "coco": "fpn"}.get(name, name), TINY)


def backbone(tmp_path):
    torch.manual_seed(0)
    torch.save(resnet.ARCHS["resnet8"]().state_dict(), tmp_path / "backbone.pt")
    return tmp_path / "backbone.pt"


TINY_RUN = ("--iterations", 5, "--batch", 2, "--precise-bn", 2, "--train-scenes", 4, "--test-scenes", 3, "--log-every", 2)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("dataset, arch", [("voc", "c4"), ("coco", "c4"), ("coco", "fpn"), ("digits", "fpn")])
def test_runs_end_to_end(script, small, tmp_path, capsys, monkeypatch, dataset, arch):
    made, scenes = [], transfer_det.Scenes
    monkeypatch.setattr(transfer_det, "Scenes", lambda *args, **more: made.append(more) or scenes(*args, **more))
    monkeypatch.setitem(transfer_det.HEADS, "fpn" if dataset == "digits" else "digits", None)  # these heads are others'
    {"voc": stand_ins.voc, "coco": stand_ins.coco}.get(dataset, Path.mkdir)(tmp_path / "data")
    out = tmp_path / "out"
    script(transfer_det, "--dataset", dataset, "--arch", arch, "--pretrained", backbone(tmp_path), "--out", out,
           "--data", tmp_path / "data", "--encoder", "resnet8", *TINY_RUN)
    columns = {kind: ["AP", "AP50", "AP75"] for kind in ("box", "mask")}  # Table 12
    if dataset == "voc":
        columns = {"box": ["AP50", "AP", "AP75"]}                         # Table 11
    result = json.loads((out / "results.json").read_text())
    assert {kind: list(result[kind]) for kind in ("box", "mask") if kind in result} == columns
    assert len(json.loads((out / "detections.json").read_text())) == result["detections"]
    detector = torch.load(out / "detector.pt", weights_only=True)
    assert all(x == 2 for name, x in detector.items() if name.endswith("tracked"))  # the two precise iterations
    first, *lines = log_of(out)
    assert made == [{"train": True}, {"masks": False}]                    # images without an object are tested on alone
    assert first["settings"]["pretrained_sha256"] == checkpoint.sha256(tmp_path / "backbone.pt")
    assert first["command"].startswith("transfer_det.py --dataset") and first["settings"]["batch"] == 2
    assert [line["step"] for line in lines] == [2, 4, 5] and all(np.isfinite(line["loss"]) for line in lines)

    script(transfer_det, "--table", out / "results.json", out / "results.json")
    printed = capsys.readouterr().out
    assert " | ".join(f"{kind} {c}".rjust(13) for kind in columns for c in columns[kind]) in printed
    assert "/out, 2 seeds" in printed and "iteration 5 of 5: loss " in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="RoIAlign's gradient adds up in any order")
def test_resumed_run_equals_the_straight_one(script, small, tmp_path, monkeypatch, capsys):
    args = (*TINY_RUN, "--pretrained", "none", "--accumulate", 2)
    script(transfer_det, *args, "--out", tmp_path / "straight")
    learning_rate = transfer_det.learning_rate

    def killed(base, iteration, *args):
        if iteration == 3:
            raise KeyboardInterrupt
        return learning_rate(base, iteration, *args)
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(transfer_det, "learning_rate", killed)
        script(transfer_det, *args, "--out", tmp_path / "run")
    ckpt = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    assert ckpt["iteration"] == 2  # of a log line
    assert [group["momentum"] for group in ckpt["optimizer"]["param_groups"]] == [0.9, 0.9]
    script(transfer_det, *args, "--out", tmp_path / "run")

    straight, resumed = (torch.load(tmp_path / out / "detector.pt", weights_only=True) for out in ("straight", "run"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    logs = [[{**line, "images_per_s": None} for line in log_of(tmp_path / out)[1:]] for out in ("straight", "run")]
    assert logs[0] == logs[1]
    with pytest.raises(SystemExit) as end:
        script(transfer_det, *args, "--out", tmp_path / "run")
    assert end.value.code == 0 and "is finished already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings .lr: "):
        script(transfer_det, *args, "--out", tmp_path / "run", "--lr", 0.3)
    before = json.loads((tmp_path / "run/results.json").read_text())
    (tmp_path / "run/results.json").unlink()
    script(transfer_det, *args, "--out", tmp_path / "run")  # evaluates only
    again = json.loads((tmp_path / "run/results.json").read_text())
    assert again["box"] == before["box"] and len(log_of(tmp_path / "run")) == 4


def test_two_ranks_find_what_one_finds(ranks, small, tmp_path, monkeypatch):
    ranks(2, "transfer_det", *TINY_RUN, "--pretrained", "none", "--out", tmp_path / "out")
    together = json.loads((tmp_path / "out/detections.json").read_text())
    detector = tiny_detector("fpn", classes=10, encoder=resnet.ARCHS["resnet8s"]())
    spec = transfer_det.SPECS["digits"]
    detector.transform.image_mean, detector.transform.image_std = spec["mean"], spec["std"]
    detector.load_state_dict(torch.load(tmp_path / "out/detector.pt", weights_only=True))
    alone = transfer_det.predict(detector, Scenes(det_data.digits_dictionary("test", 3), masks=False), "cpu")
    assert len(alone) == len(together) and len({d["image_id"] for d in together}) == 3
    for a, b in zip(alone, together):
        assert a["image_id"] == b["image_id"] and a["score"] == pytest.approx(b["score"], abs=1e-4)


def test_the_protocol(monkeypatch, tmp_path):
    """MoCo's settings, as the parser fills them in; the learning rate is linear in the batch."""
    for dataset, more, expected in (("voc", [], (24_000, 100, 0.02, [18_000, 22_000], 480)),
                                    ("coco", [], (180_000, 1000, 0.02, [120_000, 160_000], 640)),
                                    ("coco", ["--iterations", "90000"], (90_000, 1000, 0.02, [60_000, 80_000], 640)),
                                    ("voc", ["--batch", "8"], (24_000, 100, 0.01, [18_000, 22_000], 480))):
        argv = ["transfer_det.py", "--pretrained", "none", "--data", "x", "--dataset", dataset, *more]
        monkeypatch.setattr("sys.argv", argv)
        a, spec = transfer_det.parse_args(), transfer_det.SPECS[dataset]
        drops = [round(drop * a.iterations) for drop in spec["drops"]]
        assert (a.iterations, a.warmup, a.lr, drops, spec["scales"][0]) == expected
        assert (a.arch, a.encoder, a.precise_bn, a.weight_decay, spec["scales"][-1]) == ("c4", "resnet50", 200, 1e-4, 800)
        assert a.workers == data.workers_per_rank() and not set(spec) & set(vars(a))
    file = backbone(tmp_path)
    (tmp_path / "log.jsonl").write_text(json.dumps({"settings": {"arch": "resnet8"}}) + "\n")
    monkeypatch.setattr("sys.argv", ["transfer_det.py", "--pretrained", str(file), "--data", "x", "--dataset", "voc"])
    assert transfer_det.parse_args().encoder == "resnet8"


# ---- bad input: one sentence

def in_xml(old, new, name="*"):
    """Write `new` instead of `old` into VOC's annotations. If `old` ends in `.*`, `new` also replaces all that follows."""
    def change(root):
        for file in root.glob(f"VOC*/Annotations/{name}.xml"):
            text = file.read_text()
            file.write_text(text[:text.index(old[:-2])] + new if old.endswith(".*") else text.replace(old, new))
            assert file.read_text() != text
    return change


def in_json(change, splits="*"):
    """Apply change(dictionary) to COCO's annotations."""
    def changed(root):
        for file in root.glob(f"annotations/instances_{splits}.json"):
            content = json.loads(file.read_text())
            change(content)
            file.write_text(json.dumps(content))
    return changed


def each(splits="*", **entries):
    """Give these entries to every annotation of COCO. None deletes an entry."""
    def change(content):
        for a in content["annotations"]:
            a |= entries
            for name in [name for name, x in entries.items() if x is None]:
                del a[name]
    return in_json(change, splits)


def rewrite(name, content):
    def change(root):
        old = (root / name).read_bytes()
        (root / name).write_bytes(content(old) if callable(content) else content)
    return change


def deep(old):
    """An image of 16 bits per pixel."""
    Image.fromarray(np.full((48, 64), 999, np.uint16)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


PHOTO, TEST_XML, VAL = "VOC2007/JPEGImages/test_1.jpg", "VOC2007/Annotations/test_1.xml", "annotations/instances_val2017.json"
NO_IMAGE, NO_TEST_OBJECT = "no training image has a usable object", "the test set has no objects to find; "


@pytest.mark.parametrize("dataset, change, sentence", [
    # an endless loop
    ("coco", each("train2017", iscrowd=1), NO_IMAGE),
    ("coco", each("train2017", bbox=[70, 5, 9, 9]), NO_IMAGE),
    ("coco", in_json(lambda c: c["annotations"].clear(), "train2017"), NO_IMAGE),
    ("voc", in_xml(">64<", ">0<"), NO_IMAGE),
    # AP -100, or none
    ("coco", in_json(lambda c: c["annotations"].clear(), "val2017"), NO_TEST_OBJECT),
    ("coco", each("val2017", iscrowd=1), NO_TEST_OBJECT),
    ("voc", in_xml("<bndbox>", "<difficult>1</difficult><bndbox>", "test_0"), None),
    ("voc", in_xml("<name>", "<difficult>1</difficult><name>", "test_*"), NO_TEST_OBJECT),
    ("voc", rewrite("VOC2007/ImageSets/Main/test.txt", b" \n\n"), NO_TEST_OBJECT),
    # masks
    ("coco", each("val2017", segmentation=[]), "coco: 6 of 12 objects have no mask"),
    ("coco", each("val2017", segmentation=None), "6 of 12 objects"),
    ("coco", each("train2017", segmentation=[[]]), "6 of 12 objects"),
    ("coco", in_json(lambda c: c["annotations"][0].pop("segmentation"), "val2017"), "1 of 12 objects"),
    # missing, or of other classes
    ("coco", lambda root: root.rename(root.parent / "x"), "instances_train2017.json cannot be used (FileNotFoundError: "),
    ("voc", lambda root: (root / "VOC2007/ImageSets/Main/test.txt").unlink(), "test.txt cannot be used (FileNotFoundError"),
    ("coco", in_json(lambda c: c["categories"][0].update(name="other"), "train2017"), "have different categories; fix the label map"),
    ("voc", in_xml("dog", "wolf", "trainval_1"), "trainval_1.xml cannot be used (KeyError: 'wolf')"),
    # pixels of the test set
    ("voc", rewrite(PHOTO, deep), "test_1.jpg cannot be used (ValueError: it has more than 8 bits"),
    ("voc", rewrite(PHOTO, lambda old: old[:-20]), "test_1.jpg cannot be used (OSError: image file is truncated"),
    ("voc", rewrite(PHOTO, b"version https://git-lfs"), "test_1.jpg cannot be used (UnidentifiedImageError: "),
    ("voc", lambda root: (root / PHOTO).unlink(), "test_1.jpg cannot be used (FileNotFoundError: "),
    ("voc", in_xml(">64<", ">0<", "test_1"), "test_1.jpg cannot be used (ValueError: it is 64 x 48, but its annotation"),
    ("coco", lambda root: (root / "val2017/501.jpg").unlink(), "501.jpg cannot be used (FileNotFoundError: "),
    # annotations
    ("voc", in_xml("</size>.*", "", "test_1"), "test_1.xml cannot be used (ParseError: "),
    ("voc", in_xml("<size><width>64</width><height>48</height><depth>3</depth></size>", "", "test_1"), "test_1.xml"),
    ("voc", in_xml("<difficult>0</difficult>", "<difficult/>", "trainval_1"), "trainval_1.xml cannot be used (ValueError: "),
    ("voc", in_xml(">31.5<", ">left<", "test_0"), "test_0.xml cannot be used (ValueError: "),
    ("voc", in_xml("<name>person</name>", "", "test_0"), "test_0.xml cannot be used ("),
    ("voc", lambda root: (root / TEST_XML).unlink(), "test_1.xml cannot be used (FileNotFoundError: "),
    ("voc", rewrite("VOC2007/ImageSets/Main/test.txt", "test_0".encode("utf-16")), "test.txt cannot be used (Unicode"),
    ("coco", rewrite(VAL, lambda old: old[:-9]), "instances_val2017.json cannot be used (JSONDecodeError: "),
    ("coco", rewrite(VAL, b"[]"), "instances_val2017.json cannot be used (TypeError: "),
    ("coco", in_json(lambda c: c.pop("annotations")), "instances_train2017.json cannot be used (KeyError: 'annotations')"),
    ("coco", in_json(lambda c: c["images"].pop()), "train2017.json cannot be used (ValueError: annotation 3 has image 501 "),
    ("coco", in_json(lambda c: c["images"][0].pop("width")), "train2017.json cannot be used (KeyError: 'width')"),
    ("coco", each(bbox=[1, 2, 3]), "train2017.json cannot be used (ValueError: not enough values"),
    ("coco", rewrite(VAL, lambda old: "\ufeff".encode() + old), None)])
def test_what_is_wrong_with_the_data_is_said_before_the_training(script, small, tmp_path, monkeypatch, dataset, change, sentence):
    def build_detector(*args):
        raise StopIteration  # the data are right
    monkeypatch.setattr(transfer_det, "build_detector", build_detector)
    getattr(stand_ins, dataset)(tmp_path / dataset)
    change(tmp_path / dataset)
    with pytest.raises(SystemExit if sentence else StopIteration) as error:
        script(transfer_det, "--dataset", dataset, "--data", tmp_path / dataset, "--pretrained", "none",
               "--encoder", "resnet8", "--out", tmp_path / "out")
    assert not sentence or str(error.value).startswith("error: ") and sentence in str(error.value)


def test_what_is_left_out_is_printed(tmp_path, capsys):
    stand_ins.coco(tmp_path / "coco")
    train, _ = det_data.read_datasets("coco", tmp_path / "coco")
    Scenes(train, masks=True, train=True)
    assert capsys.readouterr().out == (
        "training a Mask R-CNN on 4 of 6 objects and 2 of 2 images; crowds, boxes of at most 1 px and images without an "
        "object are left out\n")
    stand_ins.voc(tmp_path / "voc")
    in_xml(">64</width>", ">0</width>", "trainval_0")(tmp_path / "voc")
    in_xml("<xmin>31.5", "<xmin>131.5", "trainval_1")(tmp_path / "voc")  # xmin > xmax
    scenes = Scenes(det_data.read_datasets("voc", tmp_path / "voc")[0], masks=False, train=True)
    assert "training a Faster R-CNN on 2 of 8 objects and 2 of 4 images; " in capsys.readouterr().out and len(scenes) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_image_that_cannot_be_read_is_named(tmp_path, workers):
    stand_ins.coco(tmp_path)
    rewrite("train2017/500.jpg", deep)(tmp_path)
    rewrite("train2017/501.jpg", deep)(tmp_path)
    train, _ = det_data.read_datasets("coco", tmp_path)
    scenes = Scenes(train, masks=True, train=True)
    with pytest.raises(RuntimeError if workers else SystemExit, match="50[01].jpg cannot be used .ValueError: it has more"):
        next(iter(det_data.train_loader(scenes, 1, 1, 0, False, workers)))


def test_boxes_without_masks_train_a_faster_rcnn(script, small, tmp_path, capsys):
    stand_ins.coco(tmp_path / "coco")
    each(segmentation=None)(tmp_path / "coco")
    args = ("--dataset", "coco", "--data", tmp_path / "coco", "--pretrained", "none", "--encoder", "resnet8", *TINY_RUN)
    script(transfer_det, *args, "--arch", "fpn", "--out", tmp_path / "out")
    result = json.loads((tmp_path / "out/results.json").read_text())
    assert list(result["box"]) == ["AP", "AP50", "AP75"] and "mask" not in result
    assert not any("mask" in name for name in torch.load(tmp_path / "out/detector.pt", weights_only=True))
    printed = capsys.readouterr().out
    assert "training a Faster R-CNN on 4 of 6 objects" in printed

    both = {**result, "run": "other/run", "mask": {"AP": 12.5, "AP50": 20, "AP75": 10}}
    det_data.print_table([result, both])  # no column of either is lost
    assert "mask AP50" in (table := capsys.readouterr().out) and "12.5" in table and table.count("nan") == 3


def test_without_precise_bn_the_running_statistics_stay(script, small, tmp_path):
    """Statistics that were reset and never computed would be 0 and 1."""
    script(transfer_det, *TINY_RUN, "--precise-bn", 0, "--pretrained", "none", "--out", tmp_path / "out")
    detector = torch.load(tmp_path / "out/detector.pt", weights_only=True)
    assert all(x == 5 for name, x in detector.items() if name.endswith("tracked"))  # the five of training


def test_a_fault_in_scoring_loses_nothing(script, small, tmp_path, monkeypatch):
    def fault(*args):
        raise IndexError
    args = (*TINY_RUN, "--pretrained", "none", "--out", tmp_path / "out")
    with monkeypatch.context() as m, pytest.raises(IndexError):
        m.setattr(transfer_det, "average_precision", fault)
        script(transfer_det, *args)
    detections = (tmp_path / "out/detections.json").read_text()
    assert torch.load(tmp_path / "out/detector.pt", weights_only=True) and not (tmp_path / "out/results.json").exists()
    script(transfer_det, *args)
    assert json.loads((tmp_path / "out/results.json").read_text())["detections"] == len(json.loads(detections))


def test_a_loss_that_is_nan_on_one_rank_ends_both(ranks, small, tmp_path, monkeypatch):
    compute_loss = transfer_det.RPN.compute_loss

    def nan_on_rank_1(self, *args):
        loss, box_loss = compute_loss(self, *args)
        return loss * (math.nan if ddp.rank() else 1), box_loss
    monkeypatch.setattr(transfer_det.RPN, "compute_loss", nan_on_rank_1)
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0)
    with pytest.raises(AssertionError) as printed:
        ranks(2, "transfer_det", *TINY_RUN, "--log-every", 1, "--pretrained", "none", "--out", tmp_path / "out")
    assert str(printed.value).count("error: the loss is nan at iteration 1; ") == 2
    assert not (tmp_path / "out/ckpt.pt").exists() and len(log_of(tmp_path / "out")) == 1


def test_flags_that_do_not_fit(script, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, expected in (((), "no file runs/digits-lt-kcl-seed0/backbone.pt; pass a backbone.pt of train_rep.py"),
                           (("--dataset", "voc", "--pretrained", "none"), "--dataset voc needs --data and --pretrained"),
                           (("--pretrained", "none", "--batch", 3, "--accumulate", 2), "--batch 3 must be divisible by ranks x --accumulate"),
                           (("--pretrained", "none", *TINY_RUN, "--lr", 1e30), "try a smaller --lr than 1e+30")):
        with pytest.raises(SystemExit) as error:
            script(transfer_det, *args)
        assert expected in str(error.value) and str(error.value).startswith("error: ")


def test_without_pycocotools(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(SystemExit, match="^error: .*pip install pycocotools"):
        importlib.reload(det_data)
