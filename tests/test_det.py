"""Detection: VOC's AP against the devkit's rule written out, the detectors, the data, and runs end to end."""
import json
import math
import shutil

import numpy as np
import pytest
import torch

import checkpoint
import det_data
import make_lt
import resnet
import transfer_det
from ddp import InputError
from det_data import Scenes, checked, mirror, to_mask, to_rle
from digits import PER_CLASS
from recipes import stand_ins
from transfer_det import coco_ap, voc_ap

TINY = dict(proposals=((60, 20), (60, 10)), rois=16, channels=8, fc=16, mask=(8,))


def tiny_detector(arch, masks=True, encoder="resnet8", seed=0, **more):
    torch.manual_seed(seed)
    return transfer_det.build_detector(resnet.ARCHS[encoder](), arch, 3, masks, TINY, [64], 64, (0.2,) * 3, (0.3,) * 3,
                                       **more)


def tiny_batch(masks=True, boxes=([[5.0, 6, 30, 40], [20, 20, 50, 60]], [[10.0, 10, 40, 50]])):
    g = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 64, 64, generator=g) for _ in boxes]
    targets = []
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
    # one of two objects: recall 0.5 at precision 1, so 0, 0.1 ... 0.5 are reached: 6 of 11 points; half the area
    half = found((0, 1, A, 0.9), (1, 1, FAR, 0.8))
    assert voc_ap(two, half)["AP50"] == pytest.approx(600 / 11)
    assert voc_ap(two, half, metric07=False)["AP50"] == pytest.approx(50)
    # IoU 10 x 6 / 100 = 0.6: counts at 0.50, 0.55 and 0.60, so AP = 3 / 10
    three = voc_ap(truth((0, 1, A)), found((0, 1, [0, 0, 10, 6], 0.9)))
    assert three == pytest.approx({"AP50": 100, "AP": 30, "AP75": 0})
    # boxes that touch the 0.5 exactly count (the devkit's >=); a "+1" would make 66 / 121 of it
    assert voc_ap(truth((0, 1, A)), found((0, 1, [0, 0, 10, 5], 0.9)))["AP50"] == 100


def test_voc_ap_duplicates_and_difficult():
    one = truth((0, 1, A), (0, 1, B, 1))
    # the second on one object is false, wherever it stands: precision 1 at recall 1, then 1 / 2
    assert voc_ap(one, found((0, 1, A, 0.9), (0, 1, A, 0.8)))["AP50"] == 100
    # a false one first: precision 1 / 2 at every recall
    assert voc_ap(one, found((0, 1, FAR, 0.9), (0, 1, A, 0.8)))["AP50"] == 50
    # on a difficult object: neither true nor false, any number of times; nor does it count as an object
    assert voc_ap(one, found((0, 1, B, 0.95), (0, 1, B, 0.94), (0, 1, A, 0.8)))["AP50"] == 100
    # ... but only there: with an IoU below the threshold it is false
    assert voc_ap(one, found((0, 1, [50, 50, 10, 4], 0.95), (0, 1, A, 0.8)))["AP50"] == 50
    # a detection belongs to the object that it overlaps most, also if that one is taken already
    near = truth((0, 1, A), (0, 1, [2, 0, 10, 10]))
    assert voc_ap(near, found((0, 1, A, 0.9), (0, 1, A, 0.8)))["AP50"] == pytest.approx(600 / 11)


def test_voc_ap_empty_classes_and_ties():
    # the class without objects has no recall: left out, whatever is detected of it; one with difficult ones only too
    data = truth((0, 1, A), (0, 3, B, 1), categories=(1, 2, 3))
    assert voc_ap(data, found((0, 1, A, 0.9), (0, 2, B, 0.9), (0, 3, FAR, 0.9)))["AP50"] == 100
    assert voc_ap(truth((0, 1, A), (0, 2, B), categories=(1, 2)), found((0, 1, A, 0.9)))["AP50"] == 50  # not found: 0
    assert voc_ap(truth(), found((0, 1, A, 0.9))) == {"AP50": None, "AP": None, "AP75": None}
    # equal scores stand in the order they came in
    true, false = (0, 1, A, 0.5), (1, 1, FAR, 0.5)
    assert voc_ap(truth((0, 1, A)), found(true, false))["AP50"] == 100
    assert voc_ap(truth((0, 1, A)), found(false, true))["AP50"] == 50
    with pytest.raises(InputError, match="label map"):
        voc_ap(truth((0, 1, A)), found((0, 7, A, 0.9)))


def devkit(dataset, detections, category, threshold, metric07):
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
    if metric07:
        return sum(max((p for r, p in zip(rec, prec) if r >= t / 10), default=0) / 11 for t in range(11))
    mrec, mpre = [0, *rec, 1], [0, *prec, 0]
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    return sum((mrec[i] - mrec[i - 1]) * mpre[i] for i in range(1, len(mrec)) if mrec[i] != mrec[i - 1])


@pytest.mark.parametrize("metric07", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_voc_ap_is_the_devkits(seed, metric07):
    rng = np.random.RandomState(seed)
    boxes = [(rng.randint(6), rng.randint(1, 4), [*rng.randint(0, 30, 2).tolist(), *rng.randint(5, 20, 2).tolist()],
              int(rng.rand() < 0.2)) for _ in range(50)]
    dataset = truth(*boxes, images=7, categories=(1, 2, 3, 9))
    moved = [(i, c if rng.rand() < 0.9 else 9, [x + rng.randint(3), y + rng.randint(3), w, h + rng.randint(3)],
              rng.randint(12) / 12) for i, c, (x, y, w, h), _ in boxes + boxes[:25]]
    detections = found(*moved)
    expected = []
    for threshold in (t / 100 for t in range(50, 100, 5)):
        aps = [devkit(dataset, detections, c, threshold, metric07) for c in (1, 2, 3, 9)]
        expected.append(100 * np.mean([ap for ap in aps if ap is not None]))
    assert voc_ap(dataset, detections, metric07=metric07) == pytest.approx(
        {"AP50": expected[0], "AP": np.mean(expected), "AP75": expected[5]})
    assert 10 < expected[0] < 90


# ---- COCO's AP

def test_coco_ap():
    mask, half = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    mask[10:30, 10:30] = half[10:30, 10:20] = True
    dataset = checked({"images": [{"id": 7, "width": 64, "height": 64}], "categories": [{"id": 5, "name": "x"}],
                       "annotations": [{"image_id": 7, "category_id": 5, "bbox": [10, 10, 20, 20], "id": 0,
                                        "segmentation": to_rle(mask)}]}, "test")
    detection = {"image_id": 7, "category_id": 5, "score": 0.9, "bbox": [10, 10, 20, 20], "segmentation": to_rle(half)}
    assert coco_ap(dataset, [detection], "bbox") == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})
    assert coco_ap(dataset, [detection], "segm") == pytest.approx({"AP": 10, "AP50": 100, "AP75": 0})  # IoU 0.5 exactly
    assert coco_ap(dataset, [], "bbox") == {"AP": 0, "AP50": 0, "AP75": 0}
    assert coco_ap({**dataset, "annotations": []}, [detection], "bbox") == {"AP": None, "AP50": None, "AP75": None}
    crowd = checked({**dataset, "annotations": [dataset["annotations"][0], {
        "image_id": 7, "category_id": 5, "bbox": [40, 40, 20, 20], "iscrowd": 1, "segmentation": to_rle(~mask)}]}, "x")
    on_crowd = {**detection, "bbox": [45, 45, 5, 5], "score": 0.95}
    assert coco_ap(crowd, [on_crowd, detection], "bbox")["AP"] == pytest.approx(100)  # there, and ignored


# ---- the detectors

@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("encoder", ["resnet8", "resnet18"])
@pytest.mark.parametrize("arch", ["c4", "fpn"])
def test_every_parameter_gets_a_gradient(arch, encoder, masks):
    detector = tiny_detector(arch, masks, encoder)
    losses = detector(*tiny_batch(masks))
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg",
                           *(["loss_mask"] if masks else [])}
    sum(losses.values()).backward()
    none = [name for name, p in detector.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    zero = [name for name, p in detector.named_parameters() if not p.grad.abs().any()]
    assert not none and not zero
    decayed, norms = (g["params"] for g in transfer_det.parameter_groups(detector, 1e-4))
    assert len(list(detector.parameters())) == len(decayed) + len(norms) and all(p.ndim == 1 for p in norms)


@pytest.mark.parametrize("arch", ["c4", "fpn"])
def test_empty_training_and_testing_images(arch):
    """No objects: a finite loss, no gradient missing; no detections: empty results, in the form of full ones."""
    detector = tiny_detector(arch)
    sum(detector(*tiny_batch(boxes=([], [[10.0, 10, 40, 50]]))).values()).backward()
    losses = detector(*tiny_batch(boxes=([], [])))
    assert all(torch.isfinite(x) for x in losses.values()) and losses["loss_box_reg"] == losses["loss_mask"] == 0
    detector.zero_grad()
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in detector.parameters())
    dataset, load = det_data.digits_dictionary("test", 2)
    dataset = {**dataset, "categories": [{"id": c} for c in (3, 5, 90)], "annotations": []}
    scenes = Scenes(checked(dataset, "x"), load, masks=True)
    detector.roi_heads.score_thresh = 1.0
    assert transfer_det.predict(detector, scenes, "cpu") == []
    detector.roi_heads.score_thresh = 0.0
    some = transfer_det.predict(detector, scenes, "cpu")
    assert {d["category_id"] for d in some} <= {3, 5, 90} and {d["image_id"] for d in some} == {2_000_000, 2_000_001}
    assert to_mask(some[0]["segmentation"], 128, 128).shape == (128, 128) and json.dumps(some)


def test_c4_runs_its_last_stage_once_a_step():
    detector, runs = tiny_detector("c4"), []
    detector.roi_heads.box_head[0].register_forward_hook(lambda m, args, out: runs.append(len(args[0])))
    detector(*tiny_batch())
    assert runs == [32]  # 16 RoIs of each of two images, boxes and masks together
    norm = detector.roi_heads.box_head[1]
    assert isinstance(norm, torch.nn.BatchNorm2d) and norm.num_batches_tracked == 1
    # the pool is detectron2's: aligned, adaptive sampling, 14 x 14 at the stride of the stage before
    pool = detector.roi_heads.box_roi_pool
    assert (pool.output_size, pool.spatial_scale, pool.sampling_ratio, pool.aligned) == (14, 1 / 2, 0, True)


def test_anchors_of_resnet50_are_the_papers():
    for arch, sizes in (("c4", [[32, 64, 128, 256, 512]]), ("fpn", [[32], [64], [128], [256], [512]])):
        detector = transfer_det.build_detector(resnet.ARCHS["resnet50"](), arch, 20, False, {
            **transfer_det.HEADS[arch], "channels": 8, "fc": 8}, range(480, 801, 32), 1333, (0,) * 3, (1,) * 3)
        assert [list(s) for s in detector.rpn.anchor_generator.sizes] == sizes
        assert detector.transform.min_size[-1] == 800  # the one of testing


def test_bf16_stays_inside_the_blocks():
    detector, images = tiny_detector("fpn", bf16=True), tiny_batch()
    seen = []
    detector.backbone[0].layer1.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    losses = detector(*images)
    sum(losses.values()).backward()
    features = detector.backbone(torch.rand(1, 3, 64, 64))
    exact = tiny_detector("fpn")(*images)
    assert torch.bfloat16 in seen and all(x.dtype == torch.float32 for x in [*features.values(), *losses.values()])
    assert all(abs(losses[name] - exact[name]) < 0.1 * exact[name] + 0.02 for name in ("loss_classifier", "loss_mask"))


def test_precise_bn():
    """Exactly as many batches as given, and their mean; momentum and mode as before."""
    detector = tiny_detector("c4")
    images = [[torch.rand(3, 64, 64) * (i + 1) for _ in range(2)] for i in range(3)]
    detector(*tiny_batch())  # what training left behind does not count
    norms = [m for m in detector.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    first = detector.backbone[0]
    seen = []
    first.bn1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    transfer_det.precise_bn(detector, [(im, tiny_batch()[1]) for im in images])
    assert [int(m.num_batches_tracked) for m in norms] == [3] * 8 and {m.momentum for m in norms} == {0.1}
    assert torch.allclose(first.bn1.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0), atol=1e-6)
    assert torch.allclose(first.bn1.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0), atol=1e-6)
    assert all(p.grad is None for p in detector.parameters())


# ---- data

def test_scenes_share_no_digit_with_other_splits_or_the_backbones(tmp_path, monkeypatch):
    images = {split: {d.tobytes() for d in det_data.digit_images(split)[0]} for split in PER_CLASS}
    assert [len(x) for x in images.values()] == [3500, 500, 1000] and len(set.union(*images.values())) == 5000
    seen = {}

    def record(of, i, rng):  # data/digits as train_rep.py makes it: the same train, val and test
        if len(of) not in seen:
            seen[len(of)] = {d.tobytes() for d in of}
        return np.zeros((1, 1), np.uint8)
    monkeypatch.setattr("digits.clutter", record)
    make_lt.make_digits(tmp_path / "set")
    assert seen == {len(x): x for x in images.values()}


def test_scenes_are_exact_and_the_same_always():
    dataset, load = det_data.digits_dictionary("test", 5)
    again, _ = det_data.digits_dictionary("test", 5)
    assert dataset == again and len({load(i).numpy().tobytes() for i in dataset["images"]}) == 5
    scenes = Scenes(checked(dataset, "x"), load, masks=True)
    for i in range(5):
        pixels, target = scenes[i]
        assert pixels.shape == (3, 128, 128) and pixels.dtype == torch.uint8 and 1 <= len(target["labels"]) <= 5
        assert target["masks"].sum(0).max() == 1  # no two digits on one pixel
        for mask, (x0, y0, x1, y1) in zip(target["masks"], target["boxes"].int().tolist()):
            assert mask[y0:y1, x0:x1].sum() == mask.sum() > 20
            assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()
        ink = target["masks"].bool().any(0)
        assert pixels[0][ink].float().mean() > pixels[0][~ink].float().mean() + 50


def dictionary(*boxes, size=(100, 80), **more):
    """One image; boxes: (category, bbox[, extra keys])."""
    return {"images": [{"id": 42, "width": size[0], "height": size[1], "file_name": "a.jpg"}],
            "categories": [{"id": c, "name": str(c)} for c in (90, 3, 17)],
            "annotations": [{"image_id": 42, "category_id": c, "bbox": b, **(extra[0] if extra else {})}
                            for c, b, *extra in boxes]}


def blank(image):
    return torch.zeros(3, image["height"], image["width"], dtype=torch.uint8)


def test_crowd_degenerate_and_clipped_boxes():
    dataset = checked(dictionary((3, [10, 10, 20, 20], {"iscrowd": 1}), (17, [5, 5, 0, 9]), (17, [5, 5, 9, 1]),
                                 (3, [100, 3, 0, 0]), (90, [-5, 70, 20, 30]), (17, [1, 2, 3, 4], {"difficult": 1})), "")
    _, target = Scenes(dataset, blank, masks=False)[0]
    assert target["boxes"].tolist() == [[0, 70, 15, 80], [1, 2, 4, 6]] and target["labels"].tolist() == [3, 2]
    assert len(dataset["annotations"]) == 6 and [a["id"] for a in dataset["annotations"]] == list(range(1, 7))
    only_crowd = checked(dictionary((3, [10, 10, 20, 20], {"iscrowd": 1})), "x")
    _, target = Scenes(only_crowd, blank, masks=True)[0]
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 80, 100) and target["labels"].shape == (0,)
    with pytest.raises(InputError, match="no training image has an object"):
        Scenes(only_crowd, blank, masks=False, train=True)


def test_category_ids_with_gaps_come_back():
    scenes = Scenes(checked(dictionary((90, [1, 2, 30, 40]), (3, [5, 5, 9, 9])), "x"), blank, masks=False)
    _, target = scenes[0]
    assert target["labels"].tolist() == [3, 1] and [scenes.category_ids[y - 1] for y in target["labels"]] == [90, 3]

    class Oracle(torch.nn.Module):  # finds what is there
        def forward(self, images):
            assert images[0].dtype == torch.float32 and images[0].max() <= 1
            return [{**target, "scores": torch.tensor([0.9, 0.8])}]
    detections = transfer_det.predict(Oracle(), scenes, "cpu")
    assert detections == [{"image_id": 42, "category_id": 90, "bbox": [1, 2, 30, 40], "score": pytest.approx(0.9)},
                          {"image_id": 42, "category_id": 3, "bbox": [5, 5, 9, 9], "score": pytest.approx(0.8)}]


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


def test_every_image_once_an_epoch_and_the_ranks_share_it(monkeypatch):
    images = [{"width": 10 + i % 3, "height": 11} for i in range(10)]  # every third is wide
    epochs = det_data.batches(images, 2, seed=1, mirrored=True)
    seen = [next(epochs) for _ in range(25)]
    assert all(len({images[i]["width"] > 11 for i, _ in batch}) == 1 for batch in seen)  # wide apart from tall
    counts = np.bincount([i for batch in seen for i, _ in batch], minlength=10)
    assert counts.sum() == 50 and counts.min() >= 4 and counts.max() <= 6  # five epochs, a batch or two pending
    assert 10 < sum(flip for batch in seen for _, flip in batch) < 40
    assert not any(flip for batch in take(det_data.batches(images, 2, 1, False), 9) for _, flip in batch)
    dataset = type("D", (), {"images": images, "__getitem__": lambda self, key: key[0]})()
    together = take(det_data.train_loader(dataset, 4, 1, 1, False, 0), 6)
    monkeypatch.setattr("ddp.world", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr("ddp.rank", lambda: rank)
        shares.append(take(det_data.train_loader(dataset, 4, 2, 1, False, 0, start=2), 8))  # two parts of one item
    for step, whole in enumerate(together[2:]):
        assert sorted(i for share in shares for part in share[2 * step:2 * step + 2] for i in part) == sorted(whole)


def take(iterable, n):
    return [x for x, _ in zip(iterable, range(n))]


# ---- official layouts

def test_voc_xml_becomes_a_dictionary(tmp_path):
    stand_ins.voc(tmp_path)
    (train, load), (test, _) = det_data.read_datasets("voc", tmp_path, masks=False)
    assert len(train["images"]) == 4 and len(test["images"]) == 2 and len(test["categories"]) == 20
    assert [c["name"] for c in test["categories"]][:2] == ["aeroplane", "bicycle"]
    first = [a for a in test["annotations"] if a["image_id"] == test["images"][1]["id"]]
    # 1-based, last pixel included -> 0-based x, y, width, height
    assert [(a["category_id"], a["bbox"], a["difficult"]) for a in first] == [
        (12, [0, 0, 20, 30], 0), (15, [30.5, 10, 33.5, 38], 1)]
    assert test["annotations"][1]["difficult"] == 0 and load(train["images"][3]).shape == (3, 48, 64)


@pytest.fixture
def small(monkeypatch):
    """The protocols with nets and images for a test: nothing else of them changes."""
    for name in ("voc", "coco", "digits"):
        spec = transfer_det.SETTINGS[name]
        monkeypatch.setitem(transfer_det.SETTINGS, name, {**spec, "scales": [48, 64], "max_size": 64, "workers": 0})
    for name in ("c4", "fpn", "digits"):
        monkeypatch.setitem(transfer_det.HEADS, name, TINY)


def backbone(tmp_path, arch="resnet8"):
    torch.manual_seed(0)
    state = resnet.ARCHS[arch]().state_dict()
    torch.save({name: x for name, x in state.items() if not name.startswith("fc.")}, tmp_path / "backbone.pt")
    return tmp_path / "backbone.pt"


def tiny_run(script, *args):
    script(transfer_det, "--iterations", 3, "--batch", 2, "--precise-bn", 2, "--train-scenes", 4, "--test-scenes", 3,
           *args)


@pytest.mark.parametrize("dataset, arch", [("voc", "c4"), ("coco", "c4"), ("coco", "fpn"), ("digits", "fpn")])
def test_runs_end_to_end(script, small, tmp_path, capsys, dataset, arch):
    {"voc": stand_ins.voc, "coco": stand_ins.coco}.get(dataset, lambda root: None)(tmp_path / "data")
    more = () if dataset == "digits" else ("--data", tmp_path / "data", "--encoder", "resnet8")
    out = tmp_path / "out"
    tiny_run(script, "--dataset", dataset, "--arch", arch, "--pretrained", backbone(tmp_path), "--out", out,
             "--show", 2, "--log-every", 2, *more)
    printed = capsys.readouterr().out
    n = sum(not name.startswith("fc.") for name in resnet.ARCHS["resnet8"]().state_dict())
    assert f"backbone: {n} of {n} tensors matched" in printed and len(list(out.glob("show_*.png"))) == 2
    result = json.loads((out / "results.json").read_text())
    columns = {kind: ["AP", "AP50", "AP75"] for kind in ("box", "mask")}  # Table 12
    if dataset == "voc":
        columns = {"box": ["AP50", "AP", "AP75"]}                         # Table 11
    assert {kind: list(result[kind]) for kind in ("box", "mask") if kind in result} == columns
    assert " | ".join(f"{kind} {c}".rjust(13) for kind in columns for c in columns[kind]) in printed
    first, *lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert first["command"].startswith("transfer_det.py --iterations 3") and first["settings"]["batch"] == 2
    assert [line["step"] for line in lines] == [2, 3] and all(np.isfinite(line["loss"]) for line in lines)
    tracked = [x for name, x in torch.load(out / "detector.pt", weights_only=True).items() if name.endswith("tracked")]
    assert tracked and all(x == 2 for x in tracked)  # the two precise iterations
    assert len(json.loads((out / "detections.json").read_text())) == result["detections"]
    script(transfer_det, "--table", out / "results.json", out / "results.json")
    assert "/out, 2 seeds" in capsys.readouterr().out.replace("|", "")


def test_resumed_run_equals_the_straight_one(script, small, tmp_path, monkeypatch, capsys):
    args = ("--pretrained", "none", "--save-every", 2, "--accumulate", 2)
    tiny_run(script, *args, "--out", tmp_path / "straight")
    save = checkpoint.save_checkpoint

    def save_and_die(*args, **more):
        save(*args, **more)
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(SystemExit, match="interrupted"):
        m.setattr(checkpoint, "save_checkpoint", save_and_die)
        tiny_run(script, *args, "--out", tmp_path / "run")
    assert torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["iteration"] == 2
    tiny_run(script, *args, "--out", tmp_path / "run")
    straight, resumed = (torch.load(tmp_path / out / "detector.pt", weights_only=True) for out in ("straight", "run"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    capsys.readouterr()
    tiny_run(script, *args, "--out", tmp_path / "run")
    assert "is finished already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings .lr: .* name another --out"):
        tiny_run(script, *args, "--out", tmp_path / "run", "--lr", 0.3)


def test_the_protocol(monkeypatch, tmp_path):
    """MoCo's settings, as the parser fills them in; the learning rate is linear in the batch."""
    file = str(backbone(tmp_path, "resnet18"))
    for more, expected in ((["voc"], (24_000, 100, 0.02, [18_000, 22_000])),
                           (["coco"], (180_000, 1000, 0.02, [120_000, 160_000])),
                           (["coco", "--schedule", "1x"], (90_000, 1000, 0.02, [60_000, 80_000])),
                           (["voc", "--batch", "8"], (24_000, 100, 0.01, [18_000, 22_000]))):
        monkeypatch.setattr("sys.argv", ["transfer_det.py", "--pretrained", file, "--data", "x", "--dataset", *more])
        a = transfer_det.parse_args()
        assert (a.iterations, a.warmup, a.lr, [round(d * a.iterations) for d in a.drops]) == expected
        assert (a.arch, a.encoder, a.precise_bn, a.weight_decay) == ("c4", "resnet50", 200, 1e-4)
    assert list(transfer_det.SETTINGS["voc"]["scales"])[::10] == [480, 800]
    assert list(transfer_det.SETTINGS["coco"]["scales"]) == [640, 672, 704, 736, 768, 800]
    rates = [transfer_det.learning_rate(0.02, i, 24_000, (18 / 24, 22 / 24), 100)
             for i in (0, 50, 100, 17_999, 18_000, 22_000)]
    assert rates == pytest.approx([0.02e-3, 0.02 * 0.5005, 0.02, 0.02, 0.002, 0.0002])


# ---- bad input: one sentence, before any long work

def test_missing_parts_of_the_layouts(script, small, tmp_path):
    voc, coco = tmp_path / "voc", tmp_path / "coco"
    stand_ins.voc(voc)
    stand_ins.coco(coco)

    def sentence(dataset):
        with pytest.raises(InputError) as error:
            det_data.read_datasets(dataset, voc if dataset == "voc" else coco, masks=dataset == "coco")
        assert "\n" not in str(error.value)
        return str(error.value)

    annotations = coco / "annotations/instances_train2017.json"
    good = json.loads(annotations.read_text())
    for change, expected in (
            (lambda d: d["annotations"][0].update(category_id=4), "category 4, bbox [5, 5, 30, 20]) of a category"),
            (lambda d: d["annotations"][0].update(image_id=4), "of an image that is not in the list"),
            (lambda d: d["annotations"][0].update(bbox=[70, 5, 30, 20]), "outside its image of 64 x 48"),
            (lambda d: d["annotations"][0].pop("bbox"), "not a COCO-style dictionary (KeyError: 'bbox')"),
            (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), "not a COCO-style dictionary (ValueError"),
            (lambda d: d["annotations"][0].pop("segmentation"), "without a segmentation"),
            (lambda d: d["images"][0].update(file_name="gone.jpg"), "1 of 2 images of the training set have no file"),
            (lambda d: d["images"].append(d["images"][0]), "an id that two images or two categories share"),
            (lambda d: d["categories"][0].update(name="other"), "other categories; the label map is wrong"),
            (lambda d: d.pop("categories"), "(KeyError: 'categories')"),
            (lambda d: d.pop("images"), "not COCO's instances")):
        bad = json.loads(json.dumps(good))
        change(bad)
        annotations.write_text(json.dumps(bad))
        assert expected in sentence("coco")
    annotations.unlink()
    assert "instances_train2017.json: no such file" in sentence("coco")
    with pytest.raises(SystemExit) as error:  # and as the shell sees it
        tiny_run(script, "--dataset", "coco", "--data", coco, "--pretrained", "none", "--out", tmp_path / "out")
    assert str(error.value.code).startswith("error: ") and "no such file" in str(error.value.code)

    xml = voc / "VOC2012/Annotations/trainval_1.xml"
    text = xml.read_text()
    for bad, expected in ((text.replace("dog", "wolf"), "`wolf` is none of VOC's 20 classes"),
                          (text[:60], "not an annotation of VOC"),
                          (text.replace("<xmin>1<", "<xmin>one<", 1), "not an annotation of VOC")):
        xml.write_text(bad)
        assert expected in sentence("voc")
    xml.write_text(text.replace(">64</w", ">63</w"))
    (train, load), _ = det_data.read_datasets("voc", voc, masks=False)
    with pytest.raises(InputError, match="is 64 x 48, its annotation says 63 x 48"):
        load(train["images"][3])
    xml.unlink()
    assert "trainval_1.xml: no such annotation file" in sentence("voc")
    xml.write_text(text)
    (voc / "VOC2007/JPEGImages/test_0.jpg").unlink()
    assert "1 of 2 images of the test set have no file" in sentence("voc")
    shutil.rmtree(voc / "VOC2012")
    assert "VOC2012/ImageSets/Main/trainval.txt: no such file; --data names VOCdevkit" in sentence("voc")
    with pytest.raises(InputError, match="gone: no such folder"):
        det_data.read_datasets("voc", tmp_path / "gone", masks=False)


def test_flags_that_do_not_fit(script, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = backbone(tmp_path)
    for args, expected in (((), "run `python train_rep.py --loss kcl --seed 0` first"),
                           (("--pretrained", "gone.pt"), "gone.pt: no such file"),
                           (("--dataset", "voc", "--pretrained", file), "--dataset voc needs --data"),
                           (("--dataset", "voc", "--data", "x"), "`--pretrained none` starts from random weights"),
                           (("--pretrained", "none", "--schedule", "1x"), "--schedule 1x is COCO's"),
                           (("--pretrained", "none", "--batch", 3, "--accumulate", 2), "--batch 3 must divide"),
                           (("--pretrained", "none", "--batch", 0), "--batch 0 must be above 0"),
                           (("--pretrained", "none", "--show", -1), "--show must be 0 or more")):
        monkeypatch.setattr("sys.argv", ["transfer_det.py", *map(str, args)])
        with pytest.raises(InputError) as error:
            transfer_det.parse_args()
        assert expected in str(error.value) and "\n" not in str(error.value)
    short = torch.load(file, weights_only=True)
    del short["layer3.0.bn2.bias"]
    torch.save(short, tmp_path / "short.pt")
    for args, expected in ((("--pretrained", "short.pt"), "short.pt does not fit --encoder resnet8: 1 of its"),
                           (("--table", "short.pt"), "short.pt: not json (UnicodeDecodeError); expected a results.json of transfer_det.py"),
                           (("--pretrained", "none", "--lr", 1e30), "try a smaller --lr")):
        with pytest.raises(SystemExit) as error:
            tiny_run(script, "--out", tmp_path / "out", *args)
        assert expected in str(error.value.code)


def test_without_pycocotools(script, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.mask", None)
    with pytest.raises(SystemExit, match="pip install pycocotools"):
        tiny_run(script, "--pretrained", "none", "--out", tmp_path / "out")
