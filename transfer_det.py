"""
Detection transfer: fine-tune a representation as the backbone of a detector, Tables 5, 11 and 12 of the paper.

    python transfer_det.py                                     # digit scenes, about 3 minutes on 2 CPU cores
    python transfer_det.py --pretrained none                   # the same from random weights
    torchrun --nproc_per_node=8 transfer_det.py --dataset voc --data /path/to/VOCdevkit --pretrained backbone.pt
    torchrun --nproc_per_node=8 transfer_det.py --dataset coco --data /path/to/coco --pretrained backbone.pt
    python transfer_det.py --table runs/*/det-digits-*/results.json    # runs side by side, mean +- std over seeds

VOC: Faster R-CNN on trainval 07+12, AP50, AP, AP75 on test 07. COCO: Mask R-CNN on train2017, box and mask AP, AP50,
AP75 on val2017. Both R50-C4 with MoCo's settings (He et al., CVPR 2020), which the paper's numbers fit; it names none.
Digits: scenes of 128 px, made of the embedded digits as they are needed, with exact masks. Writes to --out:
results.json, detections.json (COCO's results format), detector.pt (a plain state_dict), ckpt.pt (everything to resume:
the same command goes on where it stopped), log.jsonl and, with --show n, n pictures.
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, RoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from tqdm import tqdm

import checkpoint
import data
import ddp
from checkpoint import Stop, need_tensorboard, open_log, save, settings_of
from ddp import InputError
from det_data import Scenes, coco_mask, read_datasets, to_input, to_mask, to_rle, train_loader
from reading import read_json
from resnet import ARCHS, load_backbone

# The protocol of MoCo's detection experiments (facebookresearch/moco, detection/) and the same in small for the digits,
# by data set and schedule. `drops`: x0.1 after this share of the iterations, 18k and 22k of 24k, 120k and 160k of 180k.
WORKERS = min(8, os.cpu_count())
SCHEDULES = {
    ("voc", None): dict(iterations=24_000, drops=(18 / 24, 22 / 24), warmup=100),
    ("coco", "2x"): dict(iterations=180_000, drops=(12 / 18, 16 / 18), warmup=1000),
    ("coco", "1x"): dict(iterations=90_000, drops=(6 / 9, 8 / 9), warmup=1000),
    ("digits", None): dict(iterations=250, drops=(0.8, 0.95), warmup=20),
}
PHOTOS = dict(arch="c4", encoder="resnet50", batch=16, lr=0.02, max_size=1333, mean=data.IMAGENET_MEAN,
              std=data.IMAGENET_STD, mirror=True, workers=WORKERS, save_every=1000)
SETTINGS = {
    "voc": dict(PHOTOS, scales=range(480, 801, 32), masks=False),
    "coco": dict(PHOTOS, scales=range(640, 801, 32), masks=True),
    "digits": dict(arch="fpn", encoder="resnet8", batch=8, lr=0.1, scales=[128], max_size=128, masks=True,
                   mean=data.DATASETS["digits"]["mean"], std=data.DATASETS["digits"]["std"], mirror=False, workers=0,
                   save_every=50),  # a mirrored digit is none
}  # lr is for 16 images a step: it grows with --batch

# Widths of the heads. Proposals are (before NMS, after) in training, then in testing; rois: sampled for the heads
HEADS = {
    "c4": dict(proposals=((12000, 2000), (6000, 1000)), rois=512),
    "fpn": dict(proposals=((2000, 1000), (1000, 1000)), rois=512, channels=256, fc=1024, mask=(256,) * 4),
    "digits": dict(proposals=((200, 100), (100, 50)), rois=64, channels=32, fc=128, mask=(32,) * 2),
}


# ---- the detector: torchvision's parts

class Stages(nn.Module):
    """An encoder's stem and stages under its own names: (B, 3, H, W) -> {stage: features} of the stages `keep`."""

    def __init__(self, encoder, stages, keep):
        super().__init__()
        self.conv1, self.bn1, self.maxpool = encoder.conv1, encoder.bn1, getattr(encoder, "maxpool", nn.Identity())
        for name in stages:
            self.add_module(name, getattr(encoder, name))
        self.stages, self.keep = stages, keep

    def forward(self, x):
        x, out = self.maxpool(F.relu(self.bn1(self.conv1(x)))), {}
        for name in self.stages:
            x = out[name] = getattr(self, name)(x)
        return {name: out[name] for name in self.keep}


class Block(nn.Sequential):
    """Modules that compute in bf16 where `bf16` is set, and hand on fp32: torchvision makes anchors and decodes boxes
    in the type of the features, and bf16's 8 bits tell 800 px from 804 but not from 801."""
    bf16 = False

    def forward(self, x):
        device_type = next(self.parameters()).device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.bf16):
            x = super().forward(x)
        return {name: f.float() for name, f in x.items()} if isinstance(x, dict) else x.float()


class RPN(RegionProposalNetwork):
    """torchvision's, with the L1 box loss of the protocol in place of smooth L1."""

    def compute_loss(self, objectness, deltas, labels, targets):
        positive, negative = (torch.where(torch.cat(chosen))[0] for chosen in self.fg_bg_sampler(labels))
        sampled, labels, targets = torch.cat([positive, negative]), torch.cat(labels), torch.cat(targets)
        return (F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], labels[sampled]),
                F.l1_loss(deltas[positive], targets[positive], reduction="sum") / len(sampled))


class Heads(RoIHeads):
    """torchvision's, with the L1 box loss, and for C4 (no mask_head of its own) one run of box_head a training step
    for boxes and masks alike: a second, on the positives only, would cost as much and pollute its BatchNorm."""

    def forward(self, features, proposals, image_shapes, targets=None):
        if self.training:
            proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
        x = self.box_head(self.box_roi_pool(features, proposals, image_shapes))         # (R, D, 7, 7), FPN (R, D)
        logits, regression = self.box_predictor(x)                                      # (R, C + 1), (R, 4 (C + 1))
        if not self.training:
            boxes, scores, labels = self.postprocess_detections(logits, regression, proposals, image_shapes)
            results = [{"boxes": b, "scores": s, "labels": y} for b, s, y in zip(boxes, scores, labels)]
            if self.mask_predictor is not None:
                pool, head = self.mask_roi_pool or self.box_roi_pool, self.mask_head or self.box_head
                masks = self.mask_predictor(head(pool(features, boxes, image_shapes)))
                for result, mask in zip(results, maskrcnn_inference(masks, labels)):
                    result["masks"] = mask                                              # (n, 1, M, M)
            return results, {}
        y = torch.cat(labels)
        positive = torch.where(y > 0)[0]
        errors = regression.view(len(y), -1, 4)[positive, y[positive]] - torch.cat(deltas)[positive]
        losses = {"loss_classifier": F.cross_entropy(logits, y), "loss_box_reg": errors.abs().sum() / len(y)}
        if self.mask_predictor is not None:
            boxes = [b[label > 0] for b, label in zip(proposals, labels)]
            matched = [m[label > 0] for m, label in zip(matched, labels)]
            x = self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)) if self.mask_head else x[positive]
            losses["loss_mask"] = maskrcnn_loss(self.mask_predictor(x), boxes, [t["masks"] for t in targets],
                                                [t["labels"] for t in targets], matched)
        return [], losses


class C4Pool(RoIAlign):
    def forward(self, features, boxes, image_shapes):
        return super().forward(*features.values(), boxes)


class C4Predictor(FastRCNNPredictor):
    def forward(self, x):
        return super().forward(x.mean((2, 3)))


def build_detector(encoder, arch, num_classes, masks, heads, scales, max_size, mean, std, bf16=False):
    """Faster R-CNN, with masks Mask R-CNN, around an encoder of resnet.py; every tensor of it but fc is used.

    arch: `c4`, the encoder's last stage is the head, with one more BatchNorm after it; `fpn`, BatchNorm in the pyramid.
    heads: an entry of HEADS. num_classes without the background.
    """
    stages = [f"layer{i}" for i in range(1, 5) if hasattr(encoder, f"layer{i}")]
    with torch.no_grad():  # what the stages give, whatever the encoder
        probe = Stages(encoder.eval(), stages, stages)(torch.zeros(1, 3, 64, 64))
    strides = {name: 64 // x.shape[3] for name, x in probe.items()}
    widths = {name: x.shape[1] for name, x in probe.items()}

    if arch == "c4":
        *trunk, last = stages
        keep = trunk[-1:]
        backbone = Block(Stages(encoder, trunk, keep))
        backbone.out_channels = widths[keep[0]]
        box_pool = C4Pool(14, 1 / strides[keep[0]], sampling_ratio=0, aligned=True)
        box_head = Block(getattr(encoder, last), nn.BatchNorm2d(widths[last]))
        box_predictor = C4Predictor(widths[last], num_classes + 1)
        mask_pool, mask_head, mask_width = None, None, widths[last]                      # the box head's, see Heads
        anchors = [[8 * s for s in strides.values()] + [16 * strides[last]]]             # R50: 32 ... 512 at stride 16
    else:
        keep, channels = [name for name in stages if strides[name] > 1], heads["channels"]
        pyramid = FeaturePyramidNetwork([widths[name] for name in keep], channels, LastLevelMaxPool(), nn.BatchNorm2d)
        backbone = Block(Stages(encoder, stages, keep), pyramid)
        backbone.out_channels = channels
        box_pool, mask_pool = (MultiScaleRoIAlign(keep, size, sampling_ratio=2) for size in (7, 14))
        box_head = Block(TwoMLPHead(channels * 7 * 7, heads["fc"]))
        for fc in box_head[0].children():
            nn.init.kaiming_uniform_(fc.weight, a=1)  # detectron2's; nn.Linear's own is three times smaller in variance
            nn.init.zeros_(fc.bias)
        box_predictor = FastRCNNPredictor(heads["fc"], num_classes + 1)
        mask_head, mask_width = Block(MaskRCNNHeads(channels, heads["mask"], 1)) if masks else None, heads["mask"][-1]
        anchors = [[8 * strides[name]] for name in keep] + [[16 * strides[keep[-1]]]]    # R50: 32 ... 512, one a level
    anchors = AnchorGenerator(anchors, [(0.5, 1.0, 2.0)] * len(anchors))
    mask_predictor = Block(MaskRCNNPredictor(mask_width, min(256, mask_width), num_classes + 1)) if masks else None

    # detectron2's start of the predictors, on which the warm-up is tuned
    small = [(box_predictor.cls_score, 0.01), (box_predictor.bbox_pred, 0.001)]
    for layer, std_dev in small + ([(mask_predictor[0].mask_fcn_logits, 0.001)] if masks else []):
        nn.init.normal_(layer.weight, std=std_dev)
        nn.init.zeros_(layer.bias)
    before, after = ({"training": a, "testing": b} for a, b in zip(*heads["proposals"]))
    rpn = RPN(anchors, RPNHead(backbone.out_channels, anchors.num_anchors_per_location()[0]), fg_iou_thresh=0.7,
              bg_iou_thresh=0.3, batch_size_per_image=256, positive_fraction=0.5, pre_nms_top_n=before,
              post_nms_top_n=after, nms_thresh=0.7)
    roi_heads = Heads(box_pool, box_head, box_predictor, fg_iou_thresh=0.5, bg_iou_thresh=0.5,
                      batch_size_per_image=heads["rois"], positive_fraction=0.25, bbox_reg_weights=None,
                      score_thresh=0.05, nms_thresh=0.5, detections_per_img=100, mask_roi_pool=mask_pool,
                      mask_head=mask_head, mask_predictor=mask_predictor)
    detector = GeneralizedRCNN(backbone, rpn, roi_heads, GeneralizedRCNNTransform(list(scales), max_size, mean, std))
    for module in detector.modules():
        if isinstance(module, Block):
            module.bf16 = bf16
    return detector.train()


def precise_bn(detector, batches):
    """Replace BatchNorm's running statistics by their exact mean over `batches`, (images, targets) pairs, of which
    num_batches_tracked then holds the number. The running average of training lags behind the weights; Wu and Johnson,
    "Rethinking Batch in BatchNorm", 2021. Over several ranks: the mean of theirs."""
    norms = [m for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # torch's cumulative average
    detector.train()
    with torch.no_grad():
        for images, targets in batches:
            detector(images, targets)
    for m, momentum in zip(norms, momenta):
        m.momentum = momentum
        if ddp.world() > 1:
            for statistic in (m.running_mean, m.running_var):
                dist.all_reduce(statistic)
                statistic /= ddp.world()


@torch.no_grad()
def predict(detector, dataset, device, workers=0):
    """Detections [{"image_id", "category_id", "bbox" xywh, "score", "segmentation" (RLE, where there are masks)}] on
    all images of the Scenes, in their order, on every rank: each image once, alone in its batch, so that neither the
    number of ranks nor the padding beside a larger image can change a detection."""
    detector.eval()
    loader = DataLoader(dataset, batch_size=None, sampler=range(ddp.rank(), len(dataset), ddp.world()),
                        num_workers=workers, pin_memory=torch.cuda.is_available())
    mine = []
    for (pixels, _), index in zip(tqdm(loader, desc="predicting", unit="image", disable=ddp.rank() > 0, leave=False),
                                  loader.sampler):
        result = {name: x.cpu() for name, x in detector([to_input(pixels, device)])[0].items()}
        boxes = result["boxes"]
        found = [{"image_id": dataset.images[index]["id"], "category_id": dataset.category_ids[label - 1], "bbox": box,
                  "score": score} for label, box, score in zip(result["labels"].tolist(), torch.cat(
                      [boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist(), result["scores"].tolist())]
        for detection, mask in zip(found, result.get("masks", ())):
            detection["segmentation"] = to_rle(mask[0] > 0.5)
        mine.append((index, found))
    together = [mine] * ddp.world()
    if ddp.world() > 1:
        dist.all_gather_object(together, mine)
    return [detection for _, found in sorted(itertools.chain(*together), key=lambda x: x[0]) for detection in found]


# ---- evaluation

def voc_ap(dataset, detections, metric07=True):
    """PASCAL VOC's average precision at IoU 0.5 and 0.75, and its mean over the IoUs 0.50, 0.55 ... 0.95.

    dataset: {"images", "categories", "annotations" [{"image_id", "category_id", "bbox" [x, y, w, h], "difficult"}]}
    detections: [{"image_id", "category_id", "bbox" [x, y, w, h], "score"}], boxes counted from 0: no "+1" anywhere
    metric07: the 11-point average of VOC 2007, else the area under the precision envelope of VOC 2010

    The devkit's rule (VOCevaldet.m): by falling score, stable for ties, a detection goes to the object of its class and
    image that it overlaps most. IoU >= the threshold: true positive, or false where an earlier one has the object;
    nothing at all where the object is difficult, which recall does not count either. Otherwise false positive.
    Returns {"AP50", "AP", "AP75"} in percent, the mean over the classes. A class without an object that counts has no
    recall and is left out (the devkit would give it 0; VOC 2007's test set has none); None if that leaves no class.
    Raises InputError for a detection of an unknown image or category.
    """
    images, categories = {image["id"] for image in dataset["images"]}, [c["id"] for c in dataset["categories"]]
    truth, found = {}, {c: [] for c in categories}
    for a in dataset["annotations"]:
        truth.setdefault((a["category_id"], a["image_id"]), []).append((a["bbox"], bool(a.get("difficult", 0))))
    for d in detections:
        if d["image_id"] not in images or d["category_id"] not in found:
            raise InputError(f"a detection of image {d['image_id']}, category {d['category_id']}: the data set lacks "
                             "one of them; the label map is wrong")
        found[d["category_id"]].append(d)
    ious = [i / 100 for i in range(50, 100, 5)]
    aps = []                                                                          # of each class: 10 IoUs
    for c in categories:
        objects = sum(a["category_id"] == c and not a.get("difficult", 0) for a in dataset["annotations"])
        if not objects:
            continue
        order = np.argsort([-d["score"] for d in found[c]], kind="stable")
        overlap, best, ignored, first = np.zeros(len(order)), np.full(len(order), -1), np.zeros(len(order), bool), {}
        for rank, d in enumerate(found[c][i] for i in order):
            if here := truth.get((c, d["image_id"])):
                box = np.array([b for b, _ in here], float)
                corner = np.minimum(box[:, :2] + box[:, 2:], np.add(d["bbox"][:2], d["bbox"][2:]))
                shared = (corner - np.maximum(box[:, :2], d["bbox"][:2])).clip(0).prod(1)
                union = box[:, 2:].prod(1) + np.prod(d["bbox"][2:]) - shared
                iou = shared / np.maximum(union, 1e-9)                                # 0, not nan, for boxes of no size
                j = int(iou.argmax())
                overlap[rank], ignored[rank] = iou[j], here[j][1]
                best[rank] = first.setdefault((d["image_id"], j), len(first))         # objects by number
        at_iou = []
        for threshold in ious:
            hit = overlap >= threshold
            true = np.zeros(len(order), bool)
            taken = np.flatnonzero(hit & ~ignored)
            true[taken[np.unique(best[taken], return_index=True)[1]]] = True          # the first that has the object
            true = true[~(hit & ignored)]
            recall, precision = true.cumsum() / objects, true.cumsum() / np.arange(1, len(true) + 1)
            envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)     # the best at this recall or more
            if metric07:  # t / 10 and k / n round alike, 0.1 * t does not
                ap = np.mean([envelope[np.searchsorted(recall, t / 10)] for t in range(11)])
            else:
                ap = (np.diff(recall, prepend=0) * envelope[:-1]).sum()
            at_iou.append(100 * ap)
        aps.append(at_iou)
    mean = np.mean(aps, 0).tolist() if aps else None
    return {"AP50": mean and mean[0], "AP": mean and float(np.mean(mean)), "AP75": mean and mean[5]}


def coco_ap(dataset, detections, kind):
    """COCO's {"AP", "AP50", "AP75"} in percent by pycocotools; kind: `bbox` or `segm`. None without any object."""
    coco_mask()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    if not detections:
        return dict.fromkeys(("AP", "AP50", "AP75"), 0.0 if dataset["annotations"] else None)
    if kind == "segm":  # with a bbox in it pycocotools takes the area from that
        detections = [{name: x for name, x in d.items() if name != "bbox"} for d in detections]
    with contextlib.redirect_stdout(None):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(dataset))  # pycocotools writes into it
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([dict(d) for d in detections]), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: 100 * x if x >= 0 else None for name, x in zip(("AP", "AP50", "AP75"), evaluation.stats.tolist())}


def scores(name, dataset, detections):
    """What results.json holds: {"box": ..., "mask": ...}, each in the order of the paper's columns."""
    if name == "voc":
        return {"box": voc_ap(dataset, detections)}                                   # Table 11: AP50, AP, AP75
    return {"box": coco_ap(dataset, detections, "bbox"), "mask": coco_ap(dataset, detections, "segm")}    # Table 12


def load_results(path):
    row = read_json(path, expected := "a results.json of transfer_det.py")
    kinds = [kind for kind in ("box", "mask") if isinstance(row, dict) and kind in row]
    if not kinds or not isinstance(row.get("run"), str) or not all(
            isinstance(row[kind], dict) and set(row[kind]) == {"AP", "AP50", "AP75"} and
            all(x is None or isinstance(x, (int, float)) and 0 <= x <= 100 for x in row[kind].values())
            for kind in kinds):
        raise InputError(f"{path}: not the results of a run; expected {expected}")
    return {"run": row["run"], **{kind: row[kind] for kind in kinds}}


def print_table(rows):
    """Markdown: a line a run, then a line for what was run with several seeds. rows: as results.json holds."""
    def cells(x):
        return [x[kind][column] for kind in ("box", "mask") if kind in x for column in x[kind]]

    def line(name, values):
        print(f"| {name:<{width}} | " + " | ".join(f"{v:>13}" for v in values) + " |")

    width = max(len(row["run"]) for row in rows) + 2
    line("run", [f"{kind} {column}" for kind in ("box", "mask") if kind in rows[0] for column in rows[0][kind]])
    print("|---" * (len(cells(rows[0])) + 1) + "|")
    same = {}
    for row in rows:
        line(row["run"], ["-" if x is None else f"{x:.1f}" for x in cells(row)])
        same.setdefault(re.sub(r"-seed\d+", "", row["run"]), []).append(cells(row))
    for name, group in same.items():
        if len(group) > 1:
            line(f"{name}, {len(group)} seeds", ["-" if None in x else f"{np.mean(x):.1f} +- {np.std(x, ddof=1):.1f}"
                                                 for x in zip(*group)])


def show(scenes, dataset, detections, n, out):
    """A picture for each of the first n images: ground truth beside the detections with a score of 0.5 or more."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: matplotlib is missing, `pip install matplotlib`")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from evaluate import OKABE_ITO
    names = {c["id"]: c["name"] for c in dataset["categories"]}
    colours = OKABE_ITO[:6]  # the last two, black and grey, are lost on dark images and under white letters
    for image in scenes.images[:n]:
        pixels = scenes.load(image).permute(1, 2, 0).numpy()
        fig, axes = plt.subplots(1, 2, figsize=(10, 5 * image["height"] / image["width"] + 0.4), layout="constrained")
        for ax, title, things in ((axes[0], "ground truth", dataset["annotations"]),
                                  (axes[1], "detections, score >= 0.5", [d for d in detections if d["score"] >= 0.5])):
            ax.imshow(pixels)
            ax.set(title=title)
            ax.axis("off")
            for thing in (t for t in things if t["image_id"] == image["id"]):
                colour = colours[scenes.label_of[thing["category_id"]] % len(colours)]
                x, y, w, h = thing["bbox"]
                ax.add_patch(plt.Rectangle((x, y), w, h, fill=False, color=colour, linewidth=2))
                score = f" {thing['score']:.2f}" if "score" in thing else ""
                ax.text(x, y, names[thing["category_id"]] + score, color="white", backgroundcolor=colour, fontsize=8,
                        va="bottom")
                if thing.get("segmentation"):
                    mask = to_mask(thing["segmentation"], image["height"], image["width"]).numpy()
                    ax.contour(mask, [0.5], colors=[colour], linewidths=1)
        fig.savefig(out / f"show_{image['id']}.png", dpi=100)
        plt.close(fig)
    print(f"pictures: {out}/show_*.png")


# ---- the run

def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # data
    p.add_argument("--dataset", choices=tuple(SETTINGS), default="digits")
    p.add_argument("--data", help="folder in the official layout: VOCdevkit with VOC2007/ and VOC2012/; coco with "
                                  "annotations/, train2017/ and val2017/")
    p.add_argument("--train-scenes", type=int, default=1000, help="digits: images of the training set")
    p.add_argument("--test-scenes", type=int, default=300, help="digits: images that are evaluated")
    p.add_argument("--split", choices=("test", "val"), default="test", help="digits: evaluate on; val to choose by")
    p.add_argument("--workers", type=int, help="data workers of each rank")
    # model
    p.add_argument("--pretrained", help="a backbone.pt of train_rep.py or any state_dict in torchvision's names, or "
                                        "`none`; digits: runs/digits-lt-kcl-seed<--seed>/backbone.pt")
    p.add_argument("--encoder", choices=tuple(ARCHS), help="default: as in the log beside --pretrained; else resnet50, "
                                                           "digits resnet8")
    p.add_argument("--arch", choices=("c4", "fpn"), help="c4: the paper's numbers; digits fpn")
    p.add_argument("--bf16", action="store_true", help="backbone and heads in bfloat16")
    # optimisation
    p.add_argument("--schedule", choices=("1x", "2x"), help="coco: 90k or 180k iterations; the paper's is 2x")
    p.add_argument("--iterations", type=int, help="voc 24000, coco 180000, digits 250; the drops keep their share")
    p.add_argument("--batch", type=int, help="images a step over all ranks together: 16, digits 8")
    p.add_argument("--accumulate", type=int, default=1, help="parts of a step's batch: 8 on one GPU sees 2 at a time; "
                                                             "BatchNorm sees a part")
    p.add_argument("--lr", type=float, help="for the whole --batch; default 0.02 batch / 16, digits 0.1 batch / 16")
    p.add_argument("--warmup", type=int, help="iterations of linear warm-up: voc 100, coco 1000, digits 20")
    p.add_argument("--weight-decay", type=float, default=1e-4, help="not on BatchNorm's weights")
    p.add_argument("--precise-bn", type=int, default=200, help="iterations that BatchNorm's statistics come from")
    p.add_argument("--seed", type=int, default=0)
    # the run
    p.add_argument("--out", help="default: <folder of --pretrained, or runs/random>/det-<dataset>-<arch>-seed<n>"
                                 "[-<n>ranks]")
    p.add_argument("--log-every", type=int, default=20, help="iterations between log lines")
    p.add_argument("--tensorboard", action="store_true", help="the log also as scalars, in OUT/tensorboard")
    p.add_argument("--save-every", type=int, help="iterations between checkpoints: 1000, digits 50")
    p.add_argument("--show", type=int, default=0, help="pictures of so many images; also of a finished run")
    p.add_argument("--restart", action="store_true", help="throw away what --out holds; else it goes on from there")
    p.add_argument("--override", action="store_true", help="go on with other settings than the run in --out began with")
    p.add_argument("--table", nargs="+", help="only print the table of these results.json")
    args = p.parse_args()
    if args.table:
        return args
    if args.tensorboard:
        need_tensorboard()

    digits = args.dataset == "digits"
    if not digits and not args.data:
        raise InputError(f"--dataset {args.dataset} needs --data, the folder of its official layout")
    if not args.pretrained and not digits:
        raise InputError("--pretrained names the backbone; `--pretrained none` starts from random weights")
    run = {}
    if args.pretrained != "none":
        given = args.pretrained
        args.pretrained = given or f"runs/digits-lt-kcl-seed{args.seed}/backbone.pt"
        if not Path(args.pretrained).is_file():
            raise InputError(f"{args.pretrained}: no such file; " + ("expected a backbone.pt" if given else
                             f"run `python train_rep.py --loss kcl --seed {args.seed}` first, about 3 minutes") +
                             ", or say --pretrained none")
        run = settings_of(args.pretrained)
    args.schedule = args.schedule or ("2x" if args.dataset == "coco" else None)
    if (args.dataset, args.schedule) not in SCHEDULES:
        raise InputError(f"--schedule {args.schedule} is COCO's; say --iterations on {args.dataset}")
    spec = {**SETTINGS[args.dataset], **SCHEDULES[args.dataset, args.schedule]}
    args.encoder = args.encoder or run.get("arch")
    args.lr = args.lr if args.lr is not None else spec["lr"] * (args.batch or spec["batch"]) / 16
    for name in ("workers", "encoder", "arch", "iterations", "batch", "warmup", "save_every"):
        if getattr(args, name) is None:
            setattr(args, name, spec[name])
    for name in ("train_scenes", "test_scenes", "iterations", "batch", "accumulate", "lr", "precise_bn", "log_every",
                 "save_every"):
        if getattr(args, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} must be above 0")
    if min(args.workers, args.warmup, args.weight_decay, args.show) < 0:
        raise InputError("--workers, --warmup, --weight-decay and --show must be 0 or more")
    if args.batch % (ddp.world() * args.accumulate):
        raise InputError(f"--batch {args.batch} must divide by the number of ranks times --accumulate, "
                         f"{ddp.world()} x {args.accumulate}")
    args.drops = list(spec["drops"])
    if digits and run.get("data", "data/digits") != "data/digits":
        ddp.print0(f"note: the backbone learned from {run['data']}; only data/digits as train_rep.py makes it is known "
                   "to share no digit with the test scenes")
    folder = Path("runs/random") if args.pretrained == "none" else Path(args.pretrained).parent
    ranks = "" if ddp.world() == 1 else f"-{ddp.world()}ranks"
    args.out = Path(args.out or folder / f"det-{args.dataset}-{args.arch}-seed{args.seed}{ranks}")
    return args


def learning_rate(base, iteration, iterations, drops, warmup):
    """Linear from base / 1000 in `warmup` iterations, then base, x0.1 after each share of the iterations in drops."""
    warm = min(1, 0.001 + 0.999 * iteration / warmup) if warmup else 1
    return base * warm * 0.1 ** sum(iteration >= round(drop * iterations) for drop in drops)


def parameter_groups(detector, weight_decay):
    """BatchNorm's weights and biases without weight decay, all others with it."""
    norms = [p for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()]
    rest = [p for p in detector.parameters() if all(p is not q for q in norms)]
    return [{"params": rest, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]


def main():
    device = ddp.init()
    args = parse_args()
    if args.table:
        print_table([load_results(file) for file in args.table])
        return
    spec = SETTINGS[args.dataset]

    # data
    (train, load_train), (test, load_test) = read_datasets(args.dataset, args.data, spec["masks"], args.split,
                                                           args.train_scenes, args.test_scenes)
    train_set = Scenes(train, load_train, spec["masks"], train=True)
    test_set = Scenes(test, load_test, masks=False)

    # model
    torch.manual_seed(args.seed)  # the same on all ranks
    try:
        encoder = ARCHS[args.encoder]() if args.pretrained == "none" else load_backbone(args.pretrained, args.encoder)
    except InputError as error:  # --arch is the detector's here
        raise InputError(str(error).replace("--arch", "--encoder")) from None
    heads = HEADS["digits" if args.dataset == "digits" else args.arch]
    detector = build_detector(encoder, args.arch, len(train_set.category_ids), spec["masks"], heads, spec["scales"],
                              spec["max_size"], spec["mean"], spec["std"], args.bf16)
    if args.pretrained != "none":
        of_encoder = [x for name, x in encoder.state_dict(keep_vars=True).items() if not name.startswith("fc.")]
        held = {id(x) for x in detector.state_dict(keep_vars=True).values()}
        matched = sum(id(x) in held for x in of_encoder)
        if matched < len(of_encoder):
            raise RuntimeError(f"the detector holds only {matched} of the backbone's {len(of_encoder)} tensors")
        ddp.print0(f"backbone: {matched} of {len(of_encoder)} tensors matched ({args.pretrained})")
    if device.type == "cuda" and ddp.world() > 1:  # it does not exist on the CPU
        detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
    detector = detector.to(device)
    net = ddp.wrap(detector)
    optimizer = torch.optim.SGD(parameter_groups(detector, args.weight_decay), args.lr, momentum=0.9)

    def to_device(items):
        return ([to_input(pixels, device) for pixels, _ in items],
                [{name: x.to(device, non_blocking=True) for name, x in target.items()} for _, target in items])

    # resume, or begin
    of_split = "" if args.split == "test" else f"_{args.split}"
    results = args.out / f"results{of_split}.json"
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    settings |= {"world": ddp.world()}
    if args.pretrained != "none":
        settings["pretrained_sha256"] = data.sha256(args.pretrained)
    head_line = {"command": " ".join(["transfer_det.py", *sys.argv[1:]]), "settings": settings,
                 "torch": torch.__version__, "torchvision": torchvision.__version__,
                 "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    ddp.print0("settings: " + ", ".join(f"{name}={v}" for name, v in settings.items()))
    first = 0
    free = {"out", "split", "workers", "log_every", "save_every", "show", "restart", "override", "table", "tensorboard"}
    if not args.restart and (ckpt := checkpoint.load(args.out, settings, free, args.override, device)):
        with checkpoint.fitting(args.out):
            detector.load_state_dict(ckpt["model"])
            optimizer.load_state_dict(ckpt["optimizer"])
            first = ckpt["iteration"]
        if first == args.iterations and results.exists() and not args.show:
            ddp.print0(f"{args.out} is finished already; --restart trains it again")
            return
        ddp.print0(f"{args.out}: going on after iteration {first} of {args.iterations}")
    if ddp.rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        if not first:
            checkpoint.remove(args.out, "detector.pt", *(f"{kind}{split}.json" for split in ("", "_val")
                                                         for kind in ("detections", "results")))
        log = open_log(args.out, head_line, first or None, args.tensorboard)

    # train
    loader = train_loader(train_set, args.batch, args.accumulate, args.seed, spec["mirror"], args.workers, first)
    parts = iter(loader)
    bar = tqdm(total=args.iterations, initial=first, desc=str(args.out), unit="step", disable=ddp.rank() > 0,
               mininterval=1)
    totals, n, since, stop = {}, 0, time.time(), Stop()
    net.train()
    for iteration in range(first, args.iterations):
        # each iteration seeds itself, another stream a rank: a resumed run draws what an undisturbed one does
        torch.manual_seed((args.seed * 1_000_003 + iteration) * 1_009 + ddp.rank())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, iteration, args.iterations, args.drops, args.warmup)
        optimizer.zero_grad()
        for part in range(args.accumulate):
            images, targets = to_device(next(parts))
            with contextlib.nullcontext() if part + 1 == args.accumulate else net.no_sync():
                losses = net(images, targets)
                (sum(losses.values()) / args.accumulate).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach() / args.accumulate
        optimizer.step()

        n += 1
        done = iteration + 1
        if done % args.log_every == 0 or done == args.iterations:
            line = {"step": done, "loss": sum(totals.values()).item() / n,
                    **{name: x.item() / n for name, x in totals.items()}, "lr": optimizer.param_groups[0]["lr"],
                    "images_per_s": n * args.batch / (time.time() - since)}
            if not math.isfinite(line["loss"]):
                raise InputError(f"the loss is {line['loss']} at iteration {done} with learning rate {line['lr']:.3g}; "
                                 f"{args.out} keeps its last checkpoint; try a smaller --lr")
            if ddp.rank() == 0:
                log(line)
                bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)
            totals, n, since = {}, 0, time.time()
        log_now = done % args.log_every == 0 or done == args.iterations
        number = stop.asked() if log_now or ddp.world() == 1 else 0
        if ddp.rank() == 0 and (number or done % args.save_every == 0 or done == args.iterations):
            checkpoint.save_checkpoint({
                "iteration": done, "model": detector.state_dict(), "optimizer": optimizer.state_dict(),
                "settings": settings}, args.out)
        if number:
            stop.leave(number, args.out)
        bar.update()
    bar.close()
    del parts  # and its workers

    # evaluate
    torch.manual_seed(args.seed * 1_009 + ddp.rank())
    loader = train_loader(train_set, args.batch, args.accumulate, args.seed + 1, spec["mirror"], args.workers)
    n = args.precise_bn * args.accumulate
    precise_bn(detector, map(to_device, tqdm(itertools.islice(loader, n), desc="precise BN", total=n, unit="step",
                                             disable=ddp.rank() > 0, leave=False)))
    detections = predict(detector, test_set, device, args.workers)
    if ddp.rank() == 0:
        row = {"run": f"{args.out.parent.name}/{args.out.name}", **scores(args.dataset, test, detections),
               "images": len(test_set), "detections": len(detections), **head_line}
        save({name: x.cpu() for name, x in detector.state_dict().items()}, args.out / "detector.pt")
        (args.out / f"detections{of_split}.json").write_text(json.dumps(detections))
        results.write_text(json.dumps(row, indent=1) + "\n")
        print_table([row])
        if args.show:
            show(test_set, test, detections, args.show, args.out)
        print(f"results in {results}")


if __name__ == "__main__":
    ddp.run(main)
