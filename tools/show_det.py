"""
Draw what a detector finds: the ground truth next to the detections with a score of at least 0.5.

    python tools/show_det.py runs/none/det-digits-fpn-seed0 -n 4

Reads log.jsonl and detections.json of a finished run of transfer_det.py and writes show_<image>.png next to them.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from det_data import read_datasets, read_pixels, to_mask
from tools.plots import OKABE_ITO, plt

# the categories take these in turn
COLOURS = [OKABE_ITO[name] for name in ("orange", "sky blue", "green", "yellow", "blue", "vermilion")]


def draw(ax, title, image, things, names):
    """Draw the image with its boxes and masks. things: annotations or detections of the image. names: {category id:
    name}."""
    ax.imshow(read_pixels(image).permute(1, 2, 0))
    ax.set_title(title)
    ax.axis("off")
    for thing in things:
        category = thing["category_id"]
        colour = COLOURS[list(names).index(category) % len(COLOURS)]
        x, y, w, h = thing["bbox"]
        ax.add_patch(plt.Rectangle((x, y), w, h, fill=False, color=colour, linewidth=2))
        score = f" {thing['score']:.2f}" if "score" in thing else ""
        ax.text(x, y, names[category] + score, color="white", backgroundcolor=colour, fontsize=8,
                va="bottom")
        if thing.get("segmentation"):
            mask = to_mask(thing["segmentation"], image["height"], image["width"])
            ax.contour(mask, [0.5], colors=[colour], linewidths=1)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, help="the folder that transfer_det.py wrote")
    p.add_argument("-n", type=int, default=4, help="number of pictures; default: %(default)s")
    args = p.parse_args()

    with open(args.run / "log.jsonl") as log:
        settings = json.loads(log.readline())["settings"]
    _, test = read_datasets(settings["dataset"], settings["data"], train_scenes=1, test_scenes=args.n)
    detections = json.loads((args.run / "detections.json").read_text())
    detections = [d for d in detections if d["score"] >= 0.5]
    names = {c["id"]: c["name"] for c in test["categories"]}

    for image in test["images"][:args.n]:
        height = 5 * image["height"] / image["width"] + 0.4
        fig, axes = plt.subplots(1, 2, figsize=(10, height), layout="constrained")
        pair = (("ground truth", test["annotations"]), ("detections", detections))
        for ax, (title, things) in zip(axes, pair):
            draw(ax, title, image, [t for t in things if t["image_id"] == image["id"]], names)
        fig.savefig(args.run / f"show_{image['id']}.png", dpi=100)
        plt.close(fig)
    print(f"pictures: {args.run}/show_*.png")


if __name__ == "__main__":
    main()
