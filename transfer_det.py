"""
Detection transfer: fine-tune a representation as the backbone of a detector (Tables 1, 5, 11 and 12 of the paper).

    python train_rep.py --loss kcl              # trains the backbone, about 3 minutes on 2 CPU cores
    python transfer_det.py                      # trains a detector on scenes of digits, about 2 minutes
    python transfer_det.py --pretrained none    # the same from random weights
    python transfer_det.py --table runs/*/det-digits-fpn-seed*/results.json    # compares runs; mean +- std over seeds

    torchrun --nproc_per_node=8 transfer_det.py --dataset voc --data VOCdevkit --pretrained backbone.pt    # Table 11
    torchrun --nproc_per_node=8 transfer_det.py --dataset coco --data coco --pretrained backbone.pt        # Table 12
    python transfer_det.py --dataset voc --data VOCdevkit --pretrained backbone.pt --accumulate 8          # one GPU

digits  Mask R-CNN on scenes of embedded digits. No digit of a test scene occurs in training scenes or in data/digits.
voc     Faster R-CNN on trainval 07+12, tested on test 07. --data holds VOC2007/ and VOC2012/.
coco    Mask R-CNN on train2017, tested on val2017, or Faster R-CNN if the objects have no masks. --data holds
        train2017/, val2017/ and annotations/instances_{train,val}2017.json.

The paper names neither the detector nor the schedule, so both are inferred. Its CE rows fit MoCo's R50-C4 experiments
(He et al., CVPR 2020), whose published settings are the defaults for voc and coco. --accumulate 8 computes the batch of
16 in 8 parts on one GPU, and BatchNorm sees the 2 images of each part. VOC and COCO were not run here. Going by
detectron2's times, they take about 4 and 29 hours on 8 V100, and COCO's 1x schedule (--iterations 90000) takes 15.

A run writes results.json, detections.json in COCO's format (tools/show_det.py draws it), detector.pt (a plain
state_dict), log.jsonl and ckpt.pt to --out. If it is killed, the same command resumes from the last checkpoint.
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
from det_data import Scenes, average_precision, print_table, read_datasets, to_device, to_rle, train_loader
from resnet import ARCHS, load_backbone

# Defaults of the flags. voc and coco follow MoCo's detection experiments (facebookresearch/moco, folder detection/).
PHOTOS = dict(arch="c4", encoder="resnet50", batch=16, workers=data.workers_per_rank())
DEFAULTS = {
    "voc": dict(PHOTOS, iterations=24_000, warmup=100),
    "coco": dict(PHOTOS, iterations=180_000, warmup=1000),
    "digits": dict(arch="fpn", encoder="resnet8s", batch=8, workers=0, iterations=250, warmup=20),
}
# Settings without a flag. base_lr is for a batch of 16. drops are fractions of the iterations after which the learning
# rate falls to a tenth. scales are the shorter sides of training images, and test images take the last one.
PHOTO = dict(base_lr=0.02, max_size=1333, mirror=True,
             mean=data.IMAGENET_MEAN, std=data.IMAGENET_STD)
SPECS = {
    "voc": dict(PHOTO, drops=(18 / 24, 22 / 24), scales=[*range(480, 801, 32)]),
    "coco": dict(PHOTO, drops=(12 / 18, 16 / 18), scales=[*range(640, 801, 32)]),
    "digits": dict(base_lr=0.1, max_size=128, mirror=False, drops=(0.8, 0.95), scales=[128],
                   mean=data.DATASETS["digits"]["mean"], std=data.DATASETS["digits"]["std"]),
}
# proposals: how many, as ((before NMS, after NMS) in training, the same in testing). rois: how many per image train the
# heads.
HEADS = {
    "c4": dict(proposals=((12000, 2000), (6000, 1000)), rois=512),
    "fpn": dict(proposals=((2000, 1000), (1000, 1000)), rois=512,
                channels=256, fc=1024, mask=(256,) * 4),
    "digits": dict(proposals=((200, 100), (100, 50)), rois=64, channels=32, fc=128, mask=(32,) * 2),
}


# ---- the detector, from torchvision's parts

class Stages(nn.Module):
    """The stem and the stages of an encoder: (B, 3, H, W) -> {stage: features} for the stages in `keep`."""

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
    """Modules that compute in bf16 if `amp` is set, but return fp32. torchvision decodes boxes in the features' type,
    and bf16 cannot tell 800 px from 801."""
    amp = False

    def forward(self, x):
        device = next(self.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.amp):
            x = super().forward(x)
        if isinstance(x, dict):
            return {name: features.float() for name, features in x.items()}
        return x.float()


class RPN(RegionProposalNetwork):
    """torchvision's, but the box loss is L1, as in the protocol, instead of smooth L1."""

    def compute_loss(self, objectness, deltas, labels, targets):
        positive, negative = (torch.where(torch.cat(chosen))[0]
                              for chosen in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        labels, targets = torch.cat(labels), torch.cat(targets)
        loss = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], labels[sampled])
        box_loss = F.l1_loss(deltas[positive], targets[positive], reduction="sum") / len(sampled)
        return loss, box_loss


class Heads(RoIHeads):
    """torchvision's, with the L1 box loss. In C4 the mask_head is the box_head, which is the encoder's last stage. It
    runs once per training step for both boxes and masks, because a second run on only the positives would bias its
    BatchNorm."""

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
        x = self.box_roi_pool(features, proposals, image_shapes)          # (R, channels, side, side)
        x = self.box_head(x)                                              # C4 (R, D, 7, 7), FPN (R, D)
        logits, regression = self.box_predictor(x)                        # (R, C + 1), (R, 4 (C + 1))
        y, deltas = torch.cat(labels), torch.cat(deltas)                  # (R,), (R, 4)
        positive = torch.where(y > 0)[0]
        errors = regression.view(len(y), -1, 4)[positive, y[positive]] - deltas[positive]
        losses = {"loss_classifier": F.cross_entropy(logits, y),
                  "loss_box_reg": errors.abs().sum() / len(y)}
        if not self.has_mask():
            return [], losses

        # only the positives train the masks
        boxes = [b[label > 0] for b, label in zip(proposals, labels)]
        matched = [m[label > 0] for m, label in zip(matched, labels)]
        if self.mask_head is self.box_head:
            x = x[positive]
        else:
            x = self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))
        masks = [t["masks"] for t in targets]
        classes = [t["labels"] for t in targets]
        losses["loss_mask"] = maskrcnn_loss(self.mask_predictor(x), boxes, masks, classes, matched)
        return [], losses


class C4Pool(RoIAlign):
    def forward(self, features, boxes, image_shapes):
        return super().forward(*features.values(), boxes)


class C4Predictor(FastRCNNPredictor):
    def forward(self, x):
        return super().forward(x.mean((2, 3)))


def c4_parts(encoder, strides, widths, classes, masks):
    """The encoder's last stage becomes the box head, with one more BatchNorm. The stages before it are the backbone."""
    *trunk, last = strides
    backbone = Block(Stages(encoder, trunk, trunk[-1:]))
    backbone.out_channels = widths[trunk[-1]]
    anchors = [[8 * stride for stride in strides.values()] + [16 * strides[last]]]   # ResNet-50: 32 ... 512
    D = widths[last]
    parts = dict(box_roi_pool=C4Pool(14, 1 / strides[trunk[-1]], sampling_ratio=0, aligned=True),
                 box_head=Block(getattr(encoder, last), nn.BatchNorm2d(D)),
                 box_predictor=C4Predictor(D, classes))
    if masks:
        parts["mask_predictor"] = Block(MaskRCNNPredictor(D, min(256, D), classes))
    return backbone, anchors, parts


def fpn_parts(encoder, strides, widths, classes, masks, heads):
    """The backbone is a feature pyramid with BatchNorm on the stages of stride > 1."""
    keep = [name for name in strides if strides[name] > 1]
    channels, fc, mask = heads["channels"], heads["fc"], heads["mask"]
    stage_widths = [widths[name] for name in keep]
    pyramid = FeaturePyramidNetwork(stage_widths, channels, LastLevelMaxPool(), nn.BatchNorm2d)
    backbone = Block(Stages(encoder, list(strides), keep), pyramid)
    backbone.out_channels = channels
    anchors = [[8 * strides[name]] for name in keep] + [[16 * strides[keep[-1]]]]    # ResNet-50: 32 ... 512

    box_head = TwoMLPHead(channels * 7 * 7, fc)
    for layer in box_head.children():
        nn.init.kaiming_uniform_(layer.weight, a=1)  # as in detectron2; nn.Linear's default has a third of the variance
        nn.init.zeros_(layer.bias)
    parts = dict(box_roi_pool=MultiScaleRoIAlign(keep, 7, sampling_ratio=2),
                 box_head=Block(box_head),
                 box_predictor=FastRCNNPredictor(fc, classes))
    if masks:
        parts |= dict(mask_roi_pool=MultiScaleRoIAlign(keep, 14, sampling_ratio=2),
                      mask_head=Block(MaskRCNNHeads(channels, mask, 1)),
                      mask_predictor=Block(MaskRCNNPredictor(mask[-1], mask[-1], classes)))
    return backbone, anchors, parts


def build_detector(encoder, arch, num_classes, heads, spec, amp=False):
    """Faster R-CNN, or Mask R-CNN if spec["masks"], around an encoder from resnet.py.

    num_classes does not count the background. heads: an entry of HEADS. spec: an entry of SPECS plus "masks".
    """
    # measure the strides and widths of the stages
    stages = [name for name in ("layer1", "layer2", "layer3", "layer4") if hasattr(encoder, name)]
    with torch.no_grad():
        probe = Stages(encoder.eval(), stages, stages)(torch.zeros(1, 3, 64, 64))
    strides = {name: 64 // x.shape[3] for name, x in probe.items()}
    widths = {name: x.shape[1] for name, x in probe.items()}
    masks, classes = spec["masks"], num_classes + 1
    if arch == "c4":
        backbone, sizes, parts = c4_parts(encoder, strides, widths, classes, masks)
    else:
        backbone, sizes, parts = fpn_parts(encoder, strides, widths, classes, masks, heads)

    # initialise the last layers as detectron2 does
    last = {parts["box_predictor"].cls_score: 0.01, parts["box_predictor"].bbox_pred: 0.001}
    if masks:
        last[parts["mask_predictor"][0].mask_fcn_logits] = 0.001
    for layer, deviation in last.items():
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)

    # proposals
    anchors = AnchorGenerator(sizes, [(0.5, 1.0, 2.0)] * len(sizes))
    rpn_head = RPNHead(backbone.out_channels, anchors.num_anchors_per_location()[0])
    (before, after), (before_test, after_test) = heads["proposals"]
    rpn = RPN(anchors, rpn_head, fg_iou_thresh=0.7, bg_iou_thresh=0.3, batch_size_per_image=256,
              positive_fraction=0.5, nms_thresh=0.7,
              pre_nms_top_n={"training": before, "testing": before_test},
              post_nms_top_n={"training": after, "testing": after_test})

    # boxes, classes and masks
    roi_heads = Heads(**parts, fg_iou_thresh=0.5, bg_iou_thresh=0.5, positive_fraction=0.25,
                      batch_size_per_image=heads["rois"], bbox_reg_weights=None,
                      score_thresh=0.05, nms_thresh=0.5, detections_per_img=100)
    if arch == "c4" and masks:  # not as submodules, or the state_dict would hold the box head twice
        roi_heads.__dict__["mask_roi_pool"] = roi_heads.box_roi_pool
        roi_heads.__dict__["mask_head"] = roi_heads.box_head

    resize = GeneralizedRCNNTransform(spec["scales"], spec["max_size"], spec["mean"], spec["std"])
    detector = GeneralizedRCNN(backbone, rpn, roi_heads, resize)
    for module in detector.modules():
        if isinstance(module, Block):
            module.amp = amp
    return detector.train()


# ---- training and prediction

def norm_layers(detector):
    return [m for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def parameter_groups(detector, weight_decay):
    """Parameter groups for SGD: BatchNorm's weights and biases get no weight decay."""
    norms = {p: None for m in norm_layers(detector) for p in m.parameters()}
    others = [p for p in detector.parameters() if p not in norms]
    return [{"params": others, "weight_decay": weight_decay},
            {"params": list(norms), "weight_decay": 0.0}]


def learning_rate(base, iteration, iterations, drops, warmup):
    """The rate rises linearly from base / 1000 to base in `warmup` iterations, and falls to a tenth after each fraction
    of the iterations in drops."""
    warm = min(1, 0.001 + 0.999 * iteration / warmup) if warmup else 1
    return base * warm * 0.1 ** sum(iteration >= round(drop * iterations) for drop in drops)


@torch.no_grad()
def precise_bn(detector, batches):
    """Set BatchNorm's running statistics to their mean over batches of (images, targets) and over the ranks.

    During training the running average lags behind the weights (Wu and Johnson, "Rethinking Batch in BatchNorm", 2021).
    """
    for m in norm_layers(detector):
        m.reset_running_stats()
        m.momentum = None  # torch then takes the plain average over batches
    detector.train()
    for images, targets in batches:
        detector(images, targets)
    if ddp.world() > 1:
        for m in norm_layers(detector):
            for statistic in (m.running_mean, m.running_var):
                dist.all_reduce(statistic)
                statistic /= ddp.world()


def progress(iterable, name, **options):
    return tqdm(iterable, name, disable=ddp.rank() > 0 or None, mininterval=1, **options)


@torch.no_grad()
def predict(detector, scenes, device, workers=0):
    """The detections on all scenes, in their order and on every rank. They are in COCO's format:
    [{"image_id", "category_id", "bbox": [x, y, w, h], "score", and with masks "segmentation"}].

    Each image is its own batch, so neither the number of ranks nor padding changes a detection.
    """
    detector.eval()
    indices = range(ddp.rank(), len(scenes), ddp.world())
    loader = DataLoader(scenes, batch_size=None, sampler=[(i, False) for i in indices],
                        num_workers=workers, pin_memory=torch.cuda.is_available())
    found = []
    for item, index in zip(progress(loader, "predicting", leave=False), indices):
        images, _ = to_device([item], device)
        result = {name: x.cpu() for name, x in detector(images)[0].items()}
        boxes = box_convert(result["boxes"], "xyxy", "xywh").tolist()
        categories = [scenes.category_ids[label - 1] for label in result["labels"].tolist()]
        image_id = scenes.images[index]["id"]
        detections = [{"image_id": image_id, "category_id": category, "bbox": box, "score": score}
                      for category, box, score in zip(categories, boxes, result["scores"].tolist())]
        for detection, mask in zip(detections, result.get("masks", ())):
            detection["segmentation"] = to_rle(mask[0] > 0.5)
        found.append((index, detections))

    in_order = sorted(itertools.chain(*ddp.of_all_ranks(found)))
    return [d for _, detections in in_order for d in detections]


# ---- the run

def parse_args():
    def default(name):
        """A flag's defaults as -h shows them, such as `voc 24000, coco 180000, digits 250`."""
        return ", ".join(f"{dataset} {values[name]}" for dataset, values in DEFAULTS.items())

    rates = ", ".join(f"{dataset} {spec['base_lr']}" for dataset, spec in SPECS.items())
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # data
    p.add_argument("--dataset", choices=tuple(SPECS), default="digits", help="default: %(default)s")
    p.add_argument("--data", help="the folder of voc or coco, in its official layout")
    p.add_argument("--train-scenes", type=int, default=1000,
                   help="number of training scenes of digits; default: %(default)s")
    p.add_argument("--test-scenes", type=int, default=300,
                   help="number of test scenes of digits; default: %(default)s")
    p.add_argument("--workers", type=int, help=f"data workers per rank; default: {default('workers')}")
    # model
    p.add_argument("--pretrained", help="a backbone.pt, or none for random weights; default for digits: the one "
                   "that train_rep.py --loss kcl writes")
    p.add_argument("--encoder", choices=tuple(ARCHS), metavar="ARCH",
                   help=f"default: what the log of --pretrained says, else {default('encoder')}")
    p.add_argument("--arch", choices=("c4", "fpn"), help=f"default: {default('arch')}")
    p.add_argument("--amp", action="store_true", help="run backbone and heads in bfloat16")
    # optimisation
    p.add_argument("--iterations", type=int, help=f"default: {default('iterations')}")
    p.add_argument("--batch", type=int, help=f"images per step over all ranks; default: {default('batch')}")
    p.add_argument("--accumulate", type=int, default=1, help="compute each batch in this many parts")
    p.add_argument("--lr", type=float, help=f"default: batch / 16 times {rates}")
    p.add_argument("--warmup", type=int, help=f"iterations of linear warm-up; default: {default('warmup')}")
    p.add_argument("--weight-decay", type=float, default=1e-4,
                   help="default: %(default)s; BatchNorm always has 0")
    p.add_argument("--precise-bn", type=int, default=200, help="iterations over which BatchNorm's final "
                   "statistics are averaged; default: %(default)s; 0 keeps the running statistics")
    p.add_argument("--seed", type=int, default=0, help="for weights, order and draws; default: %(default)s")
    # the run
    p.add_argument("--out", type=Path,
                   help="default: a folder next to a backbone.pt of ours, else one in runs/<name of the file>")
    p.add_argument("--log-every", type=int, default=20, help="iterations per log line; default: %(default)s")
    p.add_argument("--tensorboard", action="store_true", help="also log to OUT/tensorboard")
    p.add_argument("--restart", action="store_true", help="delete what --out holds and start over")
    p.add_argument("--table", nargs="+", help="only print a table of these results.json files")
    args = p.parse_args()
    if args.table:
        return args

    # find the backbone; train_rep.py's log says which encoder it is
    if args.dataset != "digits" and not (args.data and args.pretrained):
        sys.exit(f"error: --dataset {args.dataset} needs --data and --pretrained; "
                 "pass a backbone.pt or none as --pretrained")
    if args.pretrained is None:
        args.pretrained = f"runs/digits-lt-kcl-seed{args.seed}/backbone.pt"
    run = {} if args.pretrained == "none" else checkpoint.settings_of(args.pretrained)
    args.encoder = args.encoder or run.get("arch")

    # what was not passed is None and takes the data set's default
    for name, value in DEFAULTS[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lr is None:
        args.lr = SPECS[args.dataset]["base_lr"] * args.batch / 16
    if args.batch % (ddp.world() * args.accumulate):
        sys.exit(f"error: --batch {args.batch} must be divisible by ranks x --accumulate, "
                 f"{ddp.world()} x {args.accumulate}")
    if args.out is None:
        folder = Path(args.pretrained).parent if run else Path("runs") / Path(args.pretrained).stem
        ranks = f"-{ddp.world()}ranks" if ddp.world() > 1 else ""
        args.out = folder / f"det-{args.dataset}-{args.arch}-seed{args.seed}{ranks}"
    return args


def save_results(args, header, detector, test, detections):
    """Write the detector, its detections and then their average precision. That last file marks the run as finished."""
    state = {name: x.cpu() for name, x in detector.state_dict().items()}
    checkpoint.save(state, args.out / "detector.pt")
    (args.out / "detections.json").write_text(json.dumps(detections))
    row = {"run": f"{args.out.parent.name}/{args.out.name}",
           **average_precision(args.dataset, test, detections),
           "images": len(test["images"]), "detections": len(detections), **header}
    (args.out / "results.tmp").write_text(json.dumps(row, indent=1) + "\n")
    os.replace(args.out / "results.tmp", args.out / "results.json")
    print_table([row])
    print(f"results in {args.out / 'results.json'}")


def main():
    device = ddp.init()
    args = parse_args()
    if args.table:
        print_table([json.loads(Path(file).read_text()) for file in args.table])
        return
    spec = SPECS[args.dataset]
    from_scratch = args.pretrained == "none"

    # resume() exits if --out holds a finished run, or one with other settings
    sha256 = None if from_scratch else checkpoint.sha256(args.pretrained)
    header = checkpoint.header(args, **spec, pretrained_sha256=sha256)
    ckpt = checkpoint.resume(args.out, header["settings"], "results.json", args.restart)

    # data; the test scenes need no masks, because the score takes them from `test`
    train, test = read_datasets(args.dataset, args.data, args.train_scenes, args.test_scenes)
    spec = {**spec, "masks": train["masks"]}
    train_scenes = Scenes(train, spec["masks"], train=True)
    test_scenes = Scenes(test, masks=False)
    # read all test images once, so that a broken one is found before training and not after it
    for i in progress(range(ddp.rank(), len(test_scenes), ddp.world()), "test images", leave=False):
        test_scenes[i, False]

    def batches(seed, start=0):
        loader = train_loader(train_scenes, args.batch, args.accumulate, seed, spec["mirror"],
                              args.workers, start)
        return (to_device(items, device) for items in loader)

    # model, with the same initial weights on all ranks
    torch.manual_seed(args.seed)
    if from_scratch:
        encoder = ARCHS[args.encoder]()
    else:
        encoder = load_backbone(args.pretrained, args.encoder)
    heads = HEADS["digits" if args.dataset == "digits" else args.arch]
    num_classes = len(train_scenes.category_ids)
    detector = build_detector(encoder, args.arch, num_classes, heads, spec, args.amp)
    if device.type == "cuda" and ddp.world() > 1:  # SyncBatchNorm has no CPU version
        detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
    detector = detector.to(device)
    groups = parameter_groups(detector, args.weight_decay)
    optimizer = torch.optim.SGD(groups, args.lr, momentum=0.9)

    # resume, or start over
    first = 0
    if ckpt:
        first = ckpt["iteration"]
        detector.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
        ddp.print0(f"{args.out} resumes after iteration {first} of {args.iterations}")
    net = ddp.wrap(detector)
    if ddp.rank() == 0:
        log = checkpoint.open_log(args.out, header, first or None, args.tensorboard)

    # train
    stream = batches(args.seed, first)
    totals, n = {}, 0                                                     # sums of n iterations' losses
    since = saved = time.time()
    bar = progress(range(first, args.iterations), "training")
    for iteration in bar:
        # seed each iteration and rank, so that a resumed run draws the same numbers as an undisturbed one
        torch.manual_seed((args.seed * 1_000_003 + iteration) * 1_009 + ddp.rank())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, iteration, args.iterations, spec["drops"],
                                        args.warmup)

        # gradients add up over the parts of the batch, and only the last part averages them over ranks
        optimizer.zero_grad()
        for part in range(args.accumulate):
            net.require_backward_grad_sync = part == args.accumulate - 1
            losses = net(*next(stream))
            (sum(losses.values()) / args.accumulate).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach() / args.accumulate
        optimizer.step()

        # log; only here are the losses read from the device
        n += 1
        step = iteration + 1
        if step % args.log_every and step < args.iterations:
            continue
        for total in totals.values():
            dist.all_reduce(total)
        line = {"step": step, "loss": sum(totals.values()).item() / ddp.world() / n,
                **{name: total.item() / ddp.world() / n for name, total in totals.items()},
                "lr": optimizer.param_groups[0]["lr"],
                "images_per_s": n * args.batch / (time.time() - since)}
        totals, n, since = {}, 0, time.time()
        if not math.isfinite(line["loss"]):
            sys.exit(f"error: the loss is {line['loss']} at iteration {step}; "
                     f"try a smaller --lr than {args.lr:.3g}")
        bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)
        if ddp.rank() == 0:
            log(line)
            if bar.disable:  # without a terminal, for example under Slurm, nothing else prints the loss
                print(f"iteration {step} of {args.iterations}: loss {line['loss']:.3f}", flush=True)
            if step == args.iterations or time.time() - saved > checkpoint.SAVE_EVERY:
                saved = time.time()
                checkpoint.save({"iteration": step, "model": detector.state_dict(),
                                 "optimizer": optimizer.state_dict()}, args.out / "ckpt.pt")

    # evaluate, with the same draws whether or not training was resumed
    torch.manual_seed(args.seed * 1_009 + ddp.rank())
    stream = itertools.islice(batches(args.seed + 1), args.precise_bn * args.accumulate)
    if args.precise_bn:
        precise_bn(detector, progress(stream, "precise BN", leave=False))
    detections = predict(detector, test_scenes, device, args.workers)
    if ddp.rank() == 0:
        save_results(args, header, detector, test, detections)


if __name__ == "__main__":
    ddp.run(main)
