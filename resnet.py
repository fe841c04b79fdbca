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
from ddp import InputError


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


def load_backbone(path, arch):
    """The encoder of `arch` without its fc, from a plain state_dict file as train_rep.py and torchvision write them.

    Maps (B, 3, H, W) to features (B, D). Weights of an fc in the file are left out; raises InputError where any other
    tensor is missing, too many, or of another shape: a half-loaded backbone must not go unnoticed.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {name: x for name, x in state.items() if not name.startswith("fc.")}
        if not all(isinstance(x, torch.Tensor) for x in state.values()):
            raise TypeError
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a backbone.pt, which train_rep.py writes") from None
    except Exception as error:  # torch.load raises half a dozen kinds on a file that is none of its own
        raise InputError(f"{path}: not a plain state_dict ({type(error).__name__}); expected a backbone.pt, which "
                         "train_rep.py writes, or a file of torchvision's") from None
    encoder = ARCHS[arch]()
    encoder.fc = nn.Identity()
    if any(".rebalanced." in name for name in state):  # of BBN: features (B, 2 D)
        branch(encoder)
    own = encoder.state_dict()
    for name in own:  # old files lack BatchNorm's step counter, which nothing here reads
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, own[name])
    missing = [name for name in own if name not in state or state[name].shape != own[name].shape]
    extra = [name for name in state if name not in own]
    if missing or extra:
        raise InputError(f"{path} does not fit --arch {arch}: {len(missing)} of its {len(own)} tensors missing or of "
                         f"another shape, {len(extra)} unknown (first: {(missing + extra)[0]}); name the architecture "
                         "that it was trained with")
    encoder.load_state_dict(state)
    return encoder
