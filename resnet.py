"""
Encoders by name: torchvision's ResNets for photographs, the CIFAR-style ones for 32 px images; and the file that holds
one. A file of its own because train_rep.py builds by these names what train_linear.py and evaluate.py read back.
"""
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from baselines import branch
from ddp import InputError, print0
from reading import printable, read


class BasicBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.pad = stride, c_out - c_in

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.pad:  # option A of He et al.: a shortcut without parameters, subsampled, zeros for the new channels
            x = F.avg_pool2d(x, 1, self.stride)  # x[:, :, ::stride, ::stride], whose gradient stays channels_last
            x = F.pad(x, (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """The 6n+2 layer ResNet for 32 px images, He et al. 2016 sec. 4.2; depth 32, width 16 is CIFAR-LT's standard.

    (B, 3, H, W) -> (B, num_classes). Replace `fc` by nn.Identity() for the (B, 4 * width) features.
    """

    def __init__(self, depth, width=16, num_classes=10):
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self.stage(width, width, n, stride=1)               # (B, width, 32, 32)
        self.layer2 = self.stage(width, 2 * width, n, stride=2)           # (B, 2 width, 16, 16)
        self.layer3 = self.stage(2 * width, 4 * width, n, stride=2)       # (B, 4 width, 8, 8)
        self.fc = nn.Linear(4 * width, num_classes)
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(m.weight)

    @staticmethod
    def stage(c_in, c_out, n, stride):
        return nn.Sequential(BasicBlock(c_in, c_out, stride), *(BasicBlock(c_out, c_out, 1) for _ in range(n - 1)))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


# name -> constructor that takes num_classes, like torchvision's; add yours here
ARCHS = {"resnet8": partial(CifarResNet, 8), "resnet20": partial(CifarResNet, 20), "resnet32": partial(CifarResNet, 32),
         **{name: getattr(torchvision.models, name) for name in (
             "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d")}}


# Where others keep an encoder: the entry of the file that holds its tensors, if it is not the file itself, and what
# stands before their names. The first that fits is taken: of MoCo the query encoder, of DINO the teacher, as their own
# protocols do.
ENTRIES = ("state_dict", "teacher", "model")
PREFIXES = (
    "module.encoder_q.", "encoder_q.",    # MoCo v1 and v2, the paper's authors
    "module.backbone.", "backbone.",      # Barlow Twins, VICReg, DINO; solo-learn, lightly
    "module.encoder.", "encoder.",        # SupCon; solo-learn before 1.0
    "module.", "")                        # the authors' supervised runs, SwAV; torchvision, timm, ours
HEADS = ("fc.", "head.", "classifier.", "projector.", "projection_head.", "prototypes.")  # below the prefix: left out
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}  # in an nn.Sequential


def encoder_in(content):
    """From what a file holds: the dictionary with the tensors of an encoder, {torchvision's name: its name in there}
    without those of a head, and the prefix that is the difference. Raises StopIteration where there is no encoder."""
    state = next((content[entry] for entry in ENTRIES if isinstance(content.get(entry), dict)), content)
    prefix = next(p for p in PREFIXES if f"{p}conv1.weight" in state or f"{p}0.weight" in state)
    found = {str(name).removeprefix(prefix): name for name in state if str(name).startswith(prefix)}
    if "conv1.weight" not in found:
        found = {CHILDREN.get(name[0], "?") + name[1:]: theirs for name, theirs in found.items()}
    return state, {name: theirs for name, theirs in found.items() if not name.startswith(HEADS)}, prefix


def load_backbone(path, arch):
    """The encoder of `arch` without its fc, from a file of train_rep.py, torchvision, timm, MoCo, DINO, Barlow Twins,
    VICReg, solo-learn or lightly (.pt, .pth, .ckpt, or .safetensors). Prints what was matched and what was left out.

    Maps (B, 3, H, W) to features (B, D). Raises InputError where any tensor but those of a head is missing, too many,
    of another shape, or not finite: a half-loaded backbone must not go unnoticed.
    """
    if arch not in ARCHS:
        raise InputError(f"{arch}: no such architecture; expected one of {', '.join(ARCHS)}")
    expected = ("a backbone.pt, which train_rep.py writes, or another ResNet's checkpoint (README, From and to other "
                "programs)")
    content = read(path, expected)
    try:
        state, names, prefix = encoder_in(content)
    except StopIteration:
        raise InputError(f"{path}: not a plain state_dict, nor one below a known prefix; expected {expected}") from None
    encoder = ARCHS[arch]()
    encoder.fc = nn.Identity()
    if any(".rebalanced." in name for name in names):  # of BBN: features (B, 2 D)
        branch(encoder)
    own = encoder.state_dict()

    def fits(name):
        x = state.get(names.get(name))
        return (isinstance(x, torch.Tensor) and x.shape == own[name].shape and
                x.is_floating_point() == own[name].is_floating_point())

    # old files lack BatchNorm's step counters, which nothing here reads
    missing = [name for name in own if not fits(name) and (name in names or not name.endswith("num_batches_tracked"))]
    extra = [name for name in names if name not in own]
    if missing or extra:
        raise InputError(f"{path} does not fit --arch {arch}: {len(missing)} of its {len(own)} tensors missing or of "
                         f"another shape, {len(extra)} unknown (first: {printable((missing + extra)[0])}); name the "
                         "architecture that it was trained with")
    if broken := [name for name in names if not state[names[name]].float().isfinite().all()]:
        raise InputError(f"{path}: {printable(names[broken[0]])} holds numbers that are not finite; expected "
                         "a trained backbone")
    encoder.load_state_dict({**own, **{name: state[names[name]] for name in names}})
    taken = set(names.values())
    left_out = [name for name in state if name not in taken]
    print0(f"{path}: {len(names)} of {len(own)} tensors matched" + f" after removing `{prefix}`" * bool(prefix) +
           f"; left out: {', '.join(map(printable, left_out[:4]))}{', ...' * (len(left_out) > 4)} ({len(left_out)})" *
           bool(left_out))
    return encoder
