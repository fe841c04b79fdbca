"""
Encoders by name, and reading an encoder from a file: ours, torchvision's, or another program's.

    encoder = ARCHS["resnet50"](num_classes=128)                  # (B, 3, H, W) -> (B, 128)
    encoder = with_head(ARCHS["resnet50"], 128, mlp=True)         # the same with MoCo v2's two-layer head
    encoder = load_backbone("moco_v2_800ep.pth.tar", "resnet50")  # (B, 3, H, W) -> features (B, 2048)

Add your own architecture to ARCHS: a class with __init__(self, num_classes=10). Its last layer must be an nn.Linear
called `fc`, and forward must return self.fc(features). No layer may be called `encoder`: --loss ce could not read it.
--loss bbn needs a last stage called layer3 or layer4.
"""
import argparse
import copy
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from ddp import print0


class BasicBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.pad = stride, c_out - c_in

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if self.pad:
            # option A of He et al.: a shortcut without parameters, which subsamples x and pads the new channels with
            # zeros. avg_pool2d equals x[:, :, ::stride, ::stride], but its gradient stays channels_last
            x = F.avg_pool2d(x, 1, self.stride)
            x = F.pad(x, (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2))
        return F.relu(y + x, inplace=True)


class CifarResNet(nn.Module):
    """The ResNet with 6n+2 layers for images of 32 px (He et al. 2016, sec. 4.2): (B, 3, H, W) -> (B, num_classes)."""

    def __init__(self, depth, width=16, num_classes=10, stem_stride=1):
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self.stage(width, width, n, stride=1)               # (B, width, S, S), S = 32 / stem_stride
        self.layer2 = self.stage(width, 2 * width, n, stride=2)           # (B, 2 width, S / 2, S / 2)
        self.layer3 = self.stage(2 * width, 4 * width, n, stride=2)       # (B, 4 width, S / 4, S / 4)
        self.fc = nn.Linear(4 * width, num_classes)
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(m.weight)

    @staticmethod
    def stage(c_in, c_out, n, stride):
        blocks = [BasicBlock(c_in, c_out, stride)]
        for _ in range(n - 1):
            blocks.append(BasicBlock(c_out, c_out, 1))
        return nn.Sequential(*blocks)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


# name -> constructor. It must work with num_classes=... and without arguments
ARCHS = {
    "resnet8": partial(CifarResNet, 8),
    "resnet8s": partial(CifarResNet, 8, stem_stride=2),                   # for the digits; takes a fifth of the time
    "resnet20": partial(CifarResNet, 20),
    "resnet32": partial(CifarResNet, 32),
}
for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"):
    ARCHS[name] = getattr(torchvision.models, name)


def with_head(encoder, num_classes, mlp=False):
    """Build an encoder with a head to (B, num_classes): one linear layer, or MoCo v2's two layers if mlp is set."""
    network = encoder(num_classes=num_classes)
    if mlp:
        D = network.fc.in_features
        network.fc = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, num_classes))
    return network


@torch.no_grad()
def check_fc(arch, pixels):
    """Exit unless forward ends in fc. If it skipped fc or changed its output, a classifier would train all the same."""
    encoder, x = ARCHS[arch]().eval(), torch.zeros(1, 3, pixels, pixels)
    output, fc = encoder(x), getattr(encoder, "fc", None)
    if isinstance(fc, nn.Linear):                                         # else fit() says so
        encoder.fc = nn.Identity()
        if not torch.equal(output, fc(encoder(x))):
            sys.exit(f"error: forward of {arch} must return self.fc(features)")


class Branches(nn.Module):
    """A residual block and its copy: BBN's two branches (Zhou et al. 2020, sec. 4.2). `use` selects the conventional
    branch (0) or the re-balanced one (1). With None both run, and their channels are concatenated."""

    def __init__(self, block):
        super().__init__()
        self.conventional, self.rebalanced, self.use = block, copy.deepcopy(block), None

    def forward(self, x):
        if self.use is None:
            return torch.cat([self.conventional(x), self.rebalanced(x)], dim=1)
        return self.rebalanced(x) if self.use else self.conventional(x)


def branch(encoder):
    """Double the last residual block of an encoder, so that its features become (B, 2 D). Returns the Branches."""
    stage = getattr(encoder, "layer4", None) or encoder.layer3
    stage[-1] = Branches(stage[-1])
    return stage[-1]


# ---- reading an encoder from a file

# where checkpoints keep the weights; DINO has two networks, and the teacher is the one that is evaluated
ENTRIES = ("state_dict", "state_dict_best", "teacher", "model", "model_state_dict", "feat_model")
PREFIXES = ("encoder_q.", "base_encoder.", "backbone.", "encoder.", "")   # prefixes of tensor names, in this order
HEADS = ("fc", "linear", "head", "classifier", "projector", "projection_head", "prototypes")

# some files hold more than tensors: arguments (timm, DINO, SupCon) and learning rates as numpy numbers (DINO, SwAV,
# SupCon)
numpy_scalar = np.float64(0).__reduce__()[0]
SAFE = [
    argparse.Namespace, np.dtype, *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64")),
    (numpy_scalar, "numpy.core.multiarray.scalar"), (numpy_scalar, "numpy._core.multiarray.scalar"),
]


def read_weights(path):
    """{name: tensor} from a .pt, .pth, .ckpt or .safetensors file. From a checkpoint the first of ENTRIES is taken."""
    if not Path(path).is_file():
        sys.exit(f"error: {path} is not a file")
    load = partial(torch.load, map_location="cpu", weights_only=True)
    if str(path).endswith(".safetensors"):
        try:
            from safetensors.torch import load_file as load
        except ImportError:
            sys.exit(f"error: {path} needs a package: pip install safetensors")
    try:
        with torch.serialization.safe_globals(SAFE):
            content = load(path)
        # an entry may itself contain one of ENTRIES
        while inner := [x for x in map(content.get, ENTRIES) if isinstance(x, dict)]:
            content = inner[0]
        return {str(name): x for name, x in content.items()}
    except Exception:  # each kind of damage raises a different one
        sys.exit(f"error: {path} is damaged or not a checkpoint, or it holds more than tensors; "
                 "save model.state_dict() and nothing else")


def load_backbone(path, arch):
    """Read the encoder of architecture `arch`, without its fc, from a file: (B, 3, H, W) -> features (B, D).

    The file may be ours or written by torchvision, timm, MoCo, DINO, Barlow Twins, VICReg, SwAV, SupCon, LDAM-DRW,
    classifier-balancing, solo-learn or lightly. Prints how many tensors were matched and which were left out.
    """
    weights = read_weights(path)
    encoder, left_out = fit(weights, arch, path)
    some = ", ".join(left_out[:4]) + ", ..." * (len(left_out) > 4)
    matched = len(weights) - len(left_out)
    print0(f"{path}: {matched} of {len(encoder.state_dict())} tensors matched; "
           f"{len(left_out)} left out: {some or 'none'}")
    return encoder


def fit(weights, arch, source):
    """The encoder without its fc from {name: tensor}, and the names that were left out, which belong to heads and other
    networks. Exits unless the rest are exactly the encoder's tensors, with the right shapes. source: where the weights
    come from, for error messages."""
    encoder = ARCHS[arch]()
    if not isinstance(getattr(encoder, "fc", None), nn.Linear):
        sys.exit(f"error: {arch} must end in an nn.Linear called fc; see ARCHS in resnet.py")
    encoder.fc = nn.Identity()
    if any(".rebalanced." in name for name in weights):                   # BBN's, with features (B, 2 D)
        branch(encoder)
    expected = encoder.state_dict()
    first = next(iter(expected))                                          # conv1.weight
    if first not in weights:  # DDP and torch.compile add a word to each name
        weights = {re.sub(r"\b(module|_orig_mod)\.", "", name): x for name, x in weights.items()}

    # find the prefix of the encoder's names; in an nn.Sequential its children have numbers instead of names
    starts = (first, "0." + first.partition(".")[2])
    prefix = next((p for p in PREFIXES if any(p + start in weights for start in starts)), None)
    if prefix is None:
        beginnings = sorted({name.split(".")[0] for name in weights})
        sys.exit(f"error: {source} has no {first}, with or without a prefix ({', '.join(PREFIXES[:-1])}); "
                 f"its names begin with {', '.join(beginnings)}")

    # collect the encoder's tensors under their own names and leave out heads and other networks. Old files lack
    # num_batches_tracked, so these begin with the encoder's own values
    children = {name.split(".")[0] for name in expected}
    numbered = {str(i): name for i, (name, _) in enumerate(encoder.named_children())}
    state = {name: x for name, x in expected.items() if name.endswith("num_batches_tracked")}
    left_out = []
    for name, x in weights.items():
        child, dot, rest = name.removeprefix(prefix).partition(".")
        if child not in children:
            child = numbered.get(child, child)
        wanted = child in children or child not in HEADS
        if wanted and name.startswith(prefix) and isinstance(x, torch.Tensor):
            state[child + dot + rest] = x
        else:
            left_out.append(name)

    # all tensors of the encoder must be there, and nothing else
    for name in expected | state:
        found, wanted = (tuple(x[name].shape) if name in x else "absent" for x in (state, expected))
        if found != wanted:
            sys.exit(f"error: {source} does not fit {arch}: {name} is {found} in the file and "
                     f"{wanted} in {arch}; pass the file's architecture, or add it to resnet.py")
    encoder.load_state_dict(state)
    return encoder, left_out
