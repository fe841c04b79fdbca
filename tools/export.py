"""
Export a backbone for other programs.

    python tools/export.py runs/digits-lt-kcl-seed0/backbone.pt --to safetensors backbone.safetensors
    python tools/export.py runs/imagenet-.../backbone.pt --to detectron2 backbone.pkl

torchvision and timm read backbone.pt as it is: load_state_dict(torch.load(path), strict=False) only misses the fc.
detectron2 takes the .pkl as MODEL.WEIGHTS; the settings that it also needs are printed. The source may be any
checkpoint that resnet.load_backbone can read.
"""
import argparse
import pickle
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import ddp
from checkpoint import settings_of
from resnet import ARCHS, load_backbone


def detectron2_name(name):
    """torchvision's name of a tensor -> detectron2's, for example layer1.0.bn2.weight -> res2.0.conv2.norm.weight.

    conv1 and bn1 become stem.conv1 and stem.conv1.norm. downsample.0 and .1 become shortcut and shortcut.norm.
    """
    name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
    name = re.sub(r"^(conv1|bn1)", r"stem.\1", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("backbone", help="a backbone.pt of train_rep.py, or another ResNet checkpoint")
    p.add_argument("out", help="the file to write")
    p.add_argument("--to", choices=("safetensors", "detectron2"), required=True)
    p.add_argument("--arch", choices=tuple(ARCHS), help="default: what the log next to the backbone says")
    args = p.parse_args()

    run = settings_of(args.backbone)
    arch = args.arch or run.get("arch")
    if arch is None:
        sys.exit(f"error: there is no log.jsonl of train_rep.py next to {args.backbone}; pass --arch")
    state = load_backbone(args.backbone, arch).state_dict()
    if any(".rebalanced." in name for name in state):
        sys.exit(f"error: {args.backbone} has BBN's two branches, which no other program can read")

    if args.to == "detectron2":
        if "layer4.0.conv1.weight" not in state:
            sys.exit(f"error: detectron2 has no {arch}, only ResNets for photographs; use --to safetensors")
        model = {detectron2_name(name): x.numpy() for name, x in state.items()}
        with open(args.out, "wb") as f:
            checkpoint = {"model": model, "__author__": "KCL", "matching_heuristics": True}
            pickle.dump(checkpoint, f)
    else:
        try:
            from safetensors.torch import save_file
        except ImportError:
            sys.exit("error: --to safetensors needs a package: `pip install safetensors`")
        save_file(state, args.out, {"format": "pt"})
    print(f"wrote {len(state)} tensors to {args.out}")
    if args.to == "detectron2":
        spec = data.DATASETS[run.get("dataset", "imagenet")]
        mean, std = ([round(255 * x, 3) for x in spec[name]] for name in ("mean", "std"))
        print("In detectron2 set MODEL.RESNETS.STRIDE_IN_1X1: False (the default, True, also loads, "
              f"but computes different features), MODEL.PIXEL_MEAN: {mean}, MODEL.PIXEL_STD: {std}, "
              "INPUT.FORMAT: RGB")


if __name__ == "__main__":
    ddp.run(main)
