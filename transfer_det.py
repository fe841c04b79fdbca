"""
Detection transfer: fine-tune a representation as the backbone of a detector. Tables 1, 5, 11 and 12 of the paper.

    python train_rep.py --loss kcl              # the backbone, about 3 minutes on 2 CPU cores
    python transfer_det.py                      # digit scenes, about 2 minutes
    python transfer_det.py --pretrained none    # the same from random weights
    python transfer_det.py --table runs/*/det-digits-fpn-seed*/results.json    # side by side, mean +- std over seeds

    torchrun --nproc_per_node=8 transfer_det.py --dataset voc --data VOCdevkit --pretrained backbone.pt    # Table 11
    torchrun --nproc_per_node=8 transfer_det.py --dataset coco --data coco --pretrained backbone.pt        # Table 12
    python transfer_det.py --dataset voc --data VOCdevkit --pretrained backbone.pt --accumulate 8          # one GPU

digits  Mask R-CNN on scenes of embedded digits. No digit of a test scene was seen in training or by the backbone.
voc     Faster R-CNN on trainval 07+12, tested on test 07. --data has VOC2007/ and VOC2012/.
coco    Mask R-CNN on train2017, tested on val2017. --data has annotations/, train2017/ and val2017/.

The paper names neither backbone nor schedule. Both are inferred: its CE rows fit MoCo's R50-C4 experiments (He et al.,
CVPR 2020), whose published settings are the defaults for voc and coco. On one GPU, --accumulate 8 computes the batch of
16 in parts; BatchNorm sees the 2 images of a part. VOC and COCO were not run here. By detectron2's times on 8 V100 they
take about 4 and 29 hours, COCO's 1x schedule (--iterations 90000) 15.

Writes to --out: results.json, detections.json in COCO's format (tools/show_det.py draws it), detector.pt (a plain
state_dict), log.jsonl and ckpt.pt. The same command continues a killed run from its last checkpoint.
"""
import argparse
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, RoIAlign, box_convert
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from tqdm import tqdm

import checkpoint
import data
import ddp
from det_data import Scenes, coco_ap, print_table, read_datasets, to_device, to_rle, train_loader, voc_ap
from resnet import ARCHS, load_backbone

# The protocol of MoCo's detection experiments (facebookresearch/moco, folder detection/), and the digits.
# base_lr: for 16 images a step. drops: lr x0.1 after these shares. scales: shorter sides, the last one in testing too.
PHOTOS = dict(arch="c4", encoder="resnet50", batch=16, base_lr=0.02, max_size=1333, mirror=True,
              mean=data.IMAGENET_MEAN, std=data.IMAGENET_STD, workers=min(8, os.cpu_count()))
DIGITS = dict(arch="fpn", encoder="resnet8s", batch=8, base_lr=0.1, max_size=128, mirror=False,
              mean=data.DATASETS["digits"]["mean"], std=data.DATASETS["digits"]["std"], workers=0)
SETTINGS = {
    "voc": dict(PHOTOS, masks=False, iterations=24_000, warmup=100, drops=(18 / 24, 22 / 24),
                scales=[*range(480, 801, 32)]),
    "coco": dict(PHOTOS, masks=True, iterations=180_000, warmup=1000, drops=(12 / 18, 16 / 18),
                 scales=[*range(640, 801, 32)]),
    "digits": dict(DIGITS, masks=True, iterations=250, warmup=20, drops=(0.8, 0.95), scales=[128]),
}
# proposals: (before NMS, after) in training, then in testing. rois: sampled of each image for the heads
HEADS = {
    "c4": dict(proposals=((12000, 2000), (6000, 1000)), rois=512),
    "fpn": dict(proposals=((2000, 1000), (1000, 1000)), rois=512, channels=256, fc=1024, mask=(256,) * 4),
    "digits": dict(proposals=((200, 100), (100, 50)), rois=64, channels=32, fc=128, mask=(32,) * 2),
}


# ---- the detector: torchvision's parts

class Stages(nn.Module):
    """An encoder's stem and stages: (B, 3, H, W) -> {stage: features} of the stages `keep`."""

    def __init__(self, encoder, stages, keep):
        super().__init__()
        self.conv1, self.bn1 = encoder.conv1, encoder.bn1
        self.maxpool = getattr(encoder, "maxpool", nn.Identity())
        for name in stages:
            self.add_module(name, getattr(encoder, name))
        self.stages, self.keep = stages, keep

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        features = {}
        for name in self.stages:
            x = features[name] = getattr(self, name)(x)
        return {name: features[name] for name in self.keep}


class Block(nn.Sequential):
    """Modules that compute in bf16 if `bf16` is set and return fp32: torchvision decodes boxes in the type of the
    features, and bf16 cannot tell 800 px from 801."""
    bf16 = False

    def forward(self, x):
        with torch.autocast(next(self.parameters()).device.type, torch.bfloat16, enabled=self.bf16):
            x = super().forward(x)
        return {name: f.float() for name, f in x.items()} if isinstance(x, dict) else x.float()


class RPN(RegionProposalNetwork):
    """torchvision's with the protocol's L1 box loss instead of smooth L1."""

    def compute_loss(self, objectness, deltas, labels, targets):
        positive, negative = (torch.where(torch.cat(chosen))[0] for chosen in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        labels, targets = torch.cat(labels), torch.cat(targets)
        box_loss = F.l1_loss(deltas[positive], targets[positive], reduction="sum") / len(sampled)
        return F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], labels[sampled]), box_loss


class Heads(RoIHeads):
    """torchvision's with the L1 box loss. C4's mask_head is its box_head, the encoder's last stage, which runs once a
    training step for boxes and masks. A second run, on positives alone, would bias its BatchNorm."""

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
        x = self.box_head(self.box_roi_pool(features, proposals, image_shapes))   # C4 (R, D, 7, 7), FPN (R, D)
        logits, regression = self.box_predictor(x)                                # (R, C + 1), (R, 4 (C + 1))
        y = torch.cat(labels)
        positive = torch.where(y > 0)[0]
        errors = regression.view(len(y), -1, 4)[positive, y[positive]] - torch.cat(deltas)[positive]
        losses = {"loss_classifier": F.cross_entropy(logits, y), "loss_box_reg": errors.abs().sum() / len(y)}
        if not self.has_mask():
            return [], losses

        boxes = [b[label > 0] for b, label in zip(proposals, labels)]
        matched = [m[label > 0] for m, label in zip(matched, labels)]
        if self.mask_head is self.box_head:
            x = x[positive]
        else:
            x = self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))
        masks, classes = [t["masks"] for t in targets], [t["labels"] for t in targets]
        losses["loss_mask"] = maskrcnn_loss(self.mask_predictor(x), boxes, masks, classes, matched)
        return [], losses


class C4Pool(RoIAlign):
    def forward(self, features, boxes, image_shapes):
        return super().forward(*features.values(), boxes)


class C4Predictor(FastRCNNPredictor):
    def forward(self, x):
        return super().forward(x.mean((2, 3)))


def c4_parts(encoder, strides, widths, classes, masks):
    """The encoder's last stage is the box head, with one more BatchNorm; the stages before it are the backbone."""
    *trunk, last = strides
    backbone = Block(Stages(encoder, trunk, trunk[-1:]))
    backbone.out_channels = widths[trunk[-1]]
    anchors = [[8 * stride for stride in strides.values()] + [16 * strides[last]]]   # ResNet-50: 32 ... 512
    D = widths[last]
    parts = dict(box_roi_pool=C4Pool(14, 1 / strides[trunk[-1]], sampling_ratio=0, aligned=True),
                 box_head=Block(getattr(encoder, last), nn.BatchNorm2d(D)), box_predictor=C4Predictor(D, classes))
    if masks:
        parts["mask_predictor"] = Block(MaskRCNNPredictor(D, min(256, D), classes))
    return backbone, anchors, parts


def fpn_parts(encoder, strides, widths, classes, masks, heads):
    """A pyramid with BatchNorm, on the stages of stride > 1."""
    keep, channels, mask = [name for name in strides if strides[name] > 1], heads["channels"], heads["mask"]
    pyramid = FeaturePyramidNetwork([widths[name] for name in keep], channels, LastLevelMaxPool(), nn.BatchNorm2d)
    backbone = Block(Stages(encoder, list(strides), keep), pyramid)
    backbone.out_channels = channels
    anchors = [[8 * strides[name]] for name in keep] + [[16 * strides[keep[-1]]]]    # ResNet-50: 32 ... 512

    box_head = TwoMLPHead(channels * 7 * 7, heads["fc"])
    for fc in box_head.children():
        nn.init.kaiming_uniform_(fc.weight, a=1)  # detectron2's; nn.Linear's has a third of the variance
        nn.init.zeros_(fc.bias)
    parts = dict(box_roi_pool=MultiScaleRoIAlign(keep, 7, sampling_ratio=2), box_head=Block(box_head),
                 box_predictor=FastRCNNPredictor(heads["fc"], classes))
    if masks:
        parts |= dict(mask_roi_pool=MultiScaleRoIAlign(keep, 14, sampling_ratio=2),
                      mask_head=Block(MaskRCNNHeads(channels, mask, 1)),
                      mask_predictor=Block(MaskRCNNPredictor(mask[-1], mask[-1], classes)))
    return backbone, anchors, parts


def build_detector(encoder, arch, num_classes, masks, heads, scales, max_size, mean, std, bf16=False):
    """Faster R-CNN, with masks Mask R-CNN, around an encoder of resnet.py.

    num_classes without the background. heads: an entry of HEADS.
    """
    stages = [name for name in ("layer1", "layer2", "layer3", "layer4") if hasattr(encoder, name)]
    with torch.no_grad():
        probe = Stages(encoder.eval(), stages, stages)(torch.zeros(1, 3, 64, 64))
    strides = {name: 64 // x.shape[3] for name, x in probe.items()}
    widths = {name: x.shape[1] for name, x in probe.items()}
    if arch == "c4":
        backbone, sizes, parts = c4_parts(encoder, strides, widths, num_classes + 1, masks)
    else:
        backbone, sizes, parts = fpn_parts(encoder, strides, widths, num_classes + 1, masks, heads)

    # detectron2's initialisation of the last layers
    last = {parts["box_predictor"].cls_score: 0.01, parts["box_predictor"].bbox_pred: 0.001}
    if masks:
        last[parts["mask_predictor"][0].mask_fcn_logits] = 0.001
    for layer, deviation in last.items():
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)

    anchors = AnchorGenerator(sizes, [(0.5, 1.0, 2.0)] * len(sizes))
    before, after = ({"training": a, "testing": b} for a, b in zip(*heads["proposals"]))
    rpn = RPN(anchors, RPNHead(backbone.out_channels, anchors.num_anchors_per_location()[0]), fg_iou_thresh=0.7,
              bg_iou_thresh=0.3, batch_size_per_image=256, positive_fraction=0.5, pre_nms_top_n=before,
              post_nms_top_n=after, nms_thresh=0.7)
    roi_heads = Heads(**parts, fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=heads["rois"],
                      positive_fraction=0.25, bbox_reg_weights=None, score_thresh=0.05, nms_thresh=0.5,
                      detections_per_img=100)
    if arch == "c4" and masks:  # plain attributes, not submodules: the state_dict holds the box head once
        roi_heads.__dict__.update(mask_roi_pool=roi_heads.box_roi_pool, mask_head=roi_heads.box_head)
    detector = GeneralizedRCNN(backbone, rpn, roi_heads, GeneralizedRCNNTransform(scales, max_size, mean, std))
    for module in detector.modules():
        if isinstance(module, Block):
            module.bf16 = bf16
    return detector.train()


# ---- training and prediction

def norm_layers(detector):
    return [m for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def parameter_groups(detector, weight_decay):
    """BatchNorm's weights and biases without weight decay, all others with it."""
    norms = {p: None for m in norm_layers(detector) for p in m.parameters()}
    others = [p for p in detector.parameters() if p not in norms]
    return [{"params": others, "weight_decay": weight_decay}, {"params": list(norms), "weight_decay": 0.0}]


def learning_rate(base, iteration, iterations, drops, warmup):
    """Linear from base / 1000 in `warmup` iterations, then base, x0.1 after each share of the iterations in drops."""
    warm = min(1, 0.001 + 0.999 * iteration / warmup) if warmup else 1
    return base * warm * 0.1 ** sum(iteration >= round(drop * iterations) for drop in drops)


@torch.no_grad()
def precise_bn(detector, batches):
    """BatchNorm's running statistics become their mean over `batches` of (images, targets), and over the ranks.

    The running average of training lags behind the weights: Wu and Johnson, "Rethinking Batch in BatchNorm", 2021.
    """
    for m in norm_layers(detector):
        m.reset_running_stats()
        m.momentum = None  # torch's cumulative average
    detector.train()
    for images, targets in batches:
        detector(images, targets)
    if ddp.world() > 1:
        for m in norm_layers(detector):
            for statistic in (m.running_mean, m.running_var):
                dist.all_reduce(statistic)
                statistic /= ddp.world()


def progress(things, name, **more):
    return tqdm(things, name, disable=ddp.rank() > 0 or None, mininterval=1, **more)


@torch.no_grad()
def predict(detector, scenes, device, workers=0):
    """Detections on all Scenes, in their order, on every rank, in COCO's format:
    [{"image_id", "category_id", "bbox" [x, y, w, h], "score", "segmentation" with masks}].

    An image is alone in its batch, so neither ranks nor padding change a detection.
    """
    detector.eval()
    cuda = torch.cuda.is_available()
    mine = [(i, False) for i in range(ddp.rank(), len(scenes), ddp.world())]
    loader = DataLoader(scenes, batch_size=None, sampler=mine, num_workers=workers, pin_memory=cuda)
    found = []
    for item, (index, _) in zip(progress(loader, "predicting", leave=False), mine):
        images, _ = to_device([item], device)
        result = {name: x.cpu() for name, x in detector(images)[0].items()}
        labels, scores = result["labels"].tolist(), result["scores"].tolist()
        boxes = box_convert(result["boxes"], "xyxy", "xywh").tolist()
        detections = [{"image_id": scenes.images[index]["id"], "category_id": scenes.category_ids[label - 1],
                       "bbox": box, "score": score} for label, box, score in zip(labels, boxes, scores)]
        for d, mask in zip(detections, result.get("masks", ())):
            d["segmentation"] = to_rle(mask[0] > 0.5)
        found.append((index, detections))

    everywhere = [found] * ddp.world()
    if ddp.world() > 1:
        dist.all_gather_object(everywhere, found)
    return [d for _, detections in sorted(itertools.chain(*everywhere)) for d in detections]


# ---- the run

def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # data
    p.add_argument("--dataset", choices=tuple(SETTINGS), default="digits", help="digits: scenes of the embedded ones")
    p.add_argument("--data", help="voc, coco: the folder in its official layout")
    p.add_argument("--train-scenes", type=int, default=1000, help="digits: training images, 1000")
    p.add_argument("--test-scenes", type=int, default=300, help="digits: evaluated images, 300")
    p.add_argument("--split", choices=("test", "val"), default="test", help="digits: val chooses settings")
    p.add_argument("--workers", type=int, help="data workers of each rank: 8 or the cores, digits 0")
    # model
    p.add_argument("--pretrained", help="a backbone.pt, or none; digits: runs/digits-lt-kcl-seed<n>/backbone.pt")
    p.add_argument("--encoder", choices=tuple(ARCHS), help="as in --pretrained's log, else resnet50, digits resnet8s")
    p.add_argument("--arch", choices=("c4", "fpn"), help="c4 has the paper's numbers; digits fpn")
    p.add_argument("--bf16", action="store_true", help="backbone and heads in bfloat16")
    # optimisation
    p.add_argument("--iterations", type=int, help="voc 24000, coco 180000, digits 250; the drops keep their share")
    p.add_argument("--batch", type=int, help="images a step over all ranks: 16, digits 8")
    p.add_argument("--accumulate", type=int, default=1, help="parts of a step's batch, to save memory: 1")
    p.add_argument("--lr", type=float, help="0.02 batch / 16, digits 0.1 batch / 16")
    p.add_argument("--warmup", type=int, help="iterations of linear warm-up: voc 100, coco 1000, digits 20")
    p.add_argument("--weight-decay", type=float, default=1e-4, help="1e-4, but 0 on BatchNorm's weights")
    p.add_argument("--precise-bn", type=int, default=200, help="iterations that BatchNorm's statistics are of: 200")
    p.add_argument("--seed", type=int, default=0, help="of weights, scenes' order and draws: 0")
    # the run
    p.add_argument("--out", type=Path, help="default: det-<dataset>-<arch>-seed<n> beside a backbone of ours, "
                   "else below runs/<its name>")
    p.add_argument("--log-every", type=int, default=20, help="iterations between log lines: 20")
    p.add_argument("--tensorboard", action="store_true", help="the log also in OUT/tensorboard")
    p.add_argument("--restart", action="store_true", help="throw away what --out holds")
    p.add_argument("--table", nargs="+", help="only print the table of these results.json")
    known, _ = p.parse_known_args()
    p.set_defaults(**SETTINGS[known.dataset])
    args = p.parse_args()
    if args.table:
        return args

    if args.dataset != "digits" and not (args.data and args.pretrained):
        sys.exit(f"error: --dataset {args.dataset} needs --data and --pretrained, a backbone.pt or none")
    if not args.pretrained:
        args.pretrained = f"runs/digits-lt-kcl-seed{args.seed}/backbone.pt"
        if not Path(args.pretrained).exists():
            sys.exit(f"error: {args.pretrained} is missing; run `python train_rep.py --loss kcl --seed {args.seed}` "
                     "first, or say --pretrained none")
    if args.batch % (ddp.world() * args.accumulate):
        sys.exit(f"error: --batch {args.batch} must divide by ranks x --accumulate, {ddp.world()} x {args.accumulate}")

    if args.lr is None:
        args.lr = args.base_lr * args.batch / 16
    run = {} if args.pretrained == "none" else checkpoint.settings_of(args.pretrained)
    args.encoder = known.encoder or run.get("arch", args.encoder)
    folder = Path(args.pretrained).parent if run else Path("runs") / Path(args.pretrained).stem
    ranks = f"-{ddp.world()}ranks" if ddp.world() > 1 else ""
    args.out = args.out or folder / f"det-{args.dataset}-{args.arch}-seed{args.seed}{ranks}"
    return args


def main():
    device = ddp.init()
    args = parse_args()
    if args.table:
        print_table([json.loads(Path(file).read_text()) for file in args.table])
        return
    random = args.pretrained == "none"
    header = checkpoint.header(args, pretrained_sha256=None if random else data.sha256(args.pretrained))
    results = "results.json" if args.split == "test" else "results_val.json"
    ckpt = checkpoint.resume(args.out, header["settings"], results, args.restart)

    # data
    train, test = read_datasets(args.dataset, args.data, args.split, args.train_scenes, args.test_scenes)
    train_scenes, test_scenes = Scenes(train, args.masks, train=True), Scenes(test, masks=False)

    def batches(seed, start=0):
        loader = train_loader(train_scenes, args.batch, args.accumulate, seed, args.mirror, args.workers, start)
        return (to_device(items, device) for items in loader)

    # model
    torch.manual_seed(args.seed)  # the same on all ranks
    encoder = ARCHS[args.encoder]() if random else load_backbone(args.pretrained, args.encoder)
    heads = HEADS["digits" if args.dataset == "digits" else args.arch]
    detector = build_detector(encoder, args.arch, len(train_scenes.category_ids), args.masks, heads, args.scales,
                              args.max_size, args.mean, args.std, args.bf16)
    if device.type == "cuda" and ddp.world() > 1:  # SyncBatchNorm has no CPU version
        detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
    detector = detector.to(device)
    optimizer = torch.optim.SGD(parameter_groups(detector, args.weight_decay), args.lr, momentum=0.9)

    # resume, or begin
    first = 0
    if ckpt:
        first = ckpt["iteration"]
        detector.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
        ddp.print0(f"{args.out}: going on after iteration {first} of {args.iterations}")
    net = ddp.wrap(detector)
    if ddp.rank() == 0:
        if not ckpt:  # what --restart throws away
            (args.out / "results.json").unlink(missing_ok=True)
            (args.out / "results_val.json").unlink(missing_ok=True)
        log = checkpoint.open_log(args.out, header, first or None, args.tensorboard)

    # train
    stream = batches(args.seed, first)
    totals, n, since, saved = {}, 0, time.time(), time.time()
    bar = progress(range(first, args.iterations), "training")
    for iteration in bar:
        torch.manual_seed((args.seed * 1_000_003 + iteration) * 1_009 + ddp.rank())  # a resumed run draws the same
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, iteration, args.iterations, args.drops, args.warmup)
        optimizer.zero_grad()
        for part in range(args.accumulate):
            net.require_backward_grad_sync = part == args.accumulate - 1
            losses = net(*next(stream))
            (sum(losses.values()) / args.accumulate).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach() / args.accumulate
        optimizer.step()

        n += 1
        step = iteration + 1
        if step % args.log_every and step < args.iterations:
            continue
        line = {"step": step, "loss": sum(totals.values()).item() / n,
                **{name: x.item() / n for name, x in totals.items()}, "lr": optimizer.param_groups[0]["lr"],
                "images_per_s": n * args.batch / (time.time() - since)}
        totals, n, since = {}, 0, time.time()
        if not math.isfinite(line["loss"]):
            sys.exit(f"error: the loss is {line['loss']} at iteration {step}; try a smaller --lr than {args.lr:.3g}")
        bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)
        if ddp.rank() == 0:
            log(line)
            if step == args.iterations or time.time() - saved > checkpoint.SAVE_EVERY:
                saved = time.time()
                checkpoint.save({"iteration": step, "model": detector.state_dict(),
                                 "optimizer": optimizer.state_dict()}, args.out / "ckpt.pt")

    # evaluate
    torch.manual_seed(args.seed * 1_009 + ddp.rank())
    stream = itertools.islice(batches(args.seed + 1), args.precise_bn * args.accumulate)
    precise_bn(detector, progress(stream, "precise BN", leave=False))
    detections = predict(detector, test_scenes, device, args.workers)
    if ddp.rank() > 0:
        return
    row = {"run": f"{args.out.parent.name}/{args.out.name}"}
    if args.dataset == "voc":
        row["box"] = voc_ap(test, detections)                                     # Table 11: AP50, AP, AP75
    else:
        row["box"] = coco_ap(test, detections, "bbox")                            # Table 12: AP, AP50, AP75
        row["mask"] = coco_ap(test, detections, "segm")
    row |= {"images": len(test_scenes), "detections": len(detections), **header}
    checkpoint.save({name: x.cpu() for name, x in detector.state_dict().items()}, args.out / "detector.pt")
    (args.out / results.replace("results", "detections")).write_text(json.dumps(detections))
    (args.out / "results.tmp").write_text(json.dumps(row, indent=1) + "\n")
    os.replace(args.out / "results.tmp", args.out / results)  # the last file: it says that the run is finished
    print_table([row])
    print(f"results in {args.out / results}")


if __name__ == "__main__":
    ddp.run(main)
