"""
Hand a backbone on to other programs.

    python export.py runs/digits-lt-kcl-seed0/backbone.pt --to safetensors backbone.safetensors
    python export.py runs/imagenet-.../backbone.pt --to detectron2 backbone.pkl

torchvision and timm read backbone.pt as it is: load_state_dict(torch.load(path), strict=False) lacks the fc and nothing
else. safetensors: the same names. detectron2: its names for a ResNet, in the pickle that MoCo's converter makes, for
MODEL.WEIGHTS, with MODEL.PIXEL_MEAN and PIXEL_STD of RGB images and INPUT.FORMAT "RGB". Any checkpoint that
train_linear.py reads will do; its prefix and its head are left out.
"""
import argparse
import os
import pickle
import re

import ddp
from checkpoint import settings_of
from ddp import InputError
from resnet import ARCHS, load_backbone


def detectron2_name(name):
    """layer1.0.bn2.weight -> res2.0.conv2.norm.weight, conv1 and bn1 -> stem.conv1 and stem.conv1.norm, the shortcut's
    downsample.0 and .1 -> shortcut and shortcut.norm."""
    name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
    name = name if name.startswith("res") else f"stem.{name}"
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("backbone", help="backbone.pt of train_rep.py, or another checkpoint of a ResNet")
    p.add_argument("out", help="the file to write")
    p.add_argument("--to", choices=("safetensors", "detectron2"), required=True)
    p.add_argument("--arch", choices=tuple(ARCHS), help="default: as in the log beside the backbone")
    args = p.parse_args()
    arch = args.arch or settings_of(args.backbone).get("arch")
    if arch is None:
        raise InputError(f"no log.jsonl of train_rep.py beside {args.backbone}; say --arch")
    if args.to == "safetensors":
        try:
            from safetensors.torch import save_file
        except ImportError:
            raise InputError("--to safetensors needs it: `pip install safetensors`") from None
    state = load_backbone(args.backbone, arch).state_dict()
    if any(".rebalanced." in name for name in state):
        raise InputError(f"{args.backbone} has BBN's two branches, which no other program reads")
    if args.to == "detectron2" and "layer4.0.conv1.weight" not in state:
        raise InputError(f"detectron2 has no {arch}, whose stem and shortcuts are CIFAR's; --to safetensors keeps it")
    tmp = f"{args.out}.tmp"
    if args.to == "safetensors":
        save_file({name: x.contiguous() for name, x in state.items()}, tmp, {"format": "pt"})
    else:
        with open(tmp, "wb") as f:
            pickle.dump({"model": {detectron2_name(name): x.numpy() for name, x in state.items()},
                         "__author__": "KCL", "matching_heuristics": True}, f, protocol=4)
    os.replace(tmp, args.out)
    print(f"{len(state)} tensors in {args.out}")


if __name__ == "__main__":
    ddp.run(main)
