"""
Draw what evaluate.py and make_lt.py have written. Each picture is 6.4 in. wide and legible on a phone.

    python tools/plots.py runs/digits-lt-*-seed0/head.pt runs/digits-lt-*-seed0/linear-lt/head.pt --out runs
    python tools/plots.py data/digits/splits.json

Heads that evaluate.py has scored give accuracy_by_class.png, balancedness.png with balancedness and accuracy side by
side (Figs 2 and 4), and features.png with the feature space of each backbone (Fig. 1). The first two average the runs
that differ only in their seed. splits.json gives class_sizes.png with the class sizes of each list (Fig. 6).
"""
import argparse
import itertools
import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import ddp
from evaluate import load_head, over_seeds
from resnet import load_backbone

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patheffects import withStroke
except ImportError:
    sys.exit("error: tools/plots.py draws with matplotlib: pip install matplotlib")

# colours that a colour-blind reader can tell apart (Okabe and Ito 2008)
OKABE_ITO = {"blue": "#0072B2", "orange": "#E69F00", "sky blue": "#56B4E9", "vermilion": "#D55E00",
             "green": "#009E73", "purple": "#CC79A7", "black": "#000000", "yellow": "#F0E442"}
# their yellow is hard to see on white, so grey replaces it
COLOURS = (*list(OKABE_ITO.values())[:-1], "#808080")
MARKERS, LINES = "osD^vPX*", ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def style():
    """Set one style for all machines. An opaque margin keeps a dark page away from the axes."""
    matplotlib.rcdefaults()
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 11,
                         "legend.fontsize": 10, "legend.frameon": False,
                         "figure.constrained_layout.use": True, "figure.dpi": 150,
                         "figure.facecolor": "white", "savefig.bbox": "tight",
                         "savefig.pad_inches": 0.15, "axes.prop_cycle": plt.cycler(color=COLOURS)})


def save(fig, file):
    fig.savefig(file)
    plt.close(fig)
    print(f"picture: {file}")


def label(run, protocol):
    return textwrap.fill(f"{run}: {re.sub(', [a-z]+ sampling.*', '', protocol)}", 64)


def largest_first(row):
    """Class sizes and class accuracies in percent from an eval.json, (C,) each."""
    order = np.argsort(row["counts"], kind="stable")[::-1]
    return np.array(row["counts"])[order], 100 * np.array(row["per_class"])[order]


def draw_accuracy(rows, file):
    """Accuracy of each class, largest first, with one line for the runs that differ only in their seed."""
    runs = over_seeds(rows)
    fig, ax = plt.subplots(figsize=(6.4, 4 + 0.3 * len(runs)))
    styles = zip(itertools.cycle(MARKERS), itertools.cycle(LINES))
    for (run, protocol, group), (marker, line) in zip(runs, styles):
        accuracy = np.mean([largest_first(row)[1] for row in group], axis=0)  # (C,)
        if len(accuracy) > 100:
            marker = None
        ax.plot(accuracy, marker=marker, linestyle=line, label=label(run, protocol))

    # if all runs have the same class sizes, these label the ticks
    sizes = np.sort(rows[0]["counts"])[::-1]
    ax.set_xlabel("classes by number of training images, largest first")
    if all(sorted(row["counts"]) == sorted(sizes) for row in rows):
        ticks = np.linspace(0, len(sizes) - 1, min(len(sizes), 10)).astype(int)
        ax.set_xticks(ticks, sizes[ticks])
        ax.set_xlabel(f"images of the class in {rows[0]['counts_of']}")
    ax.set(ylabel="accuracy of the class, %", ylim=(0, 101))
    ax.grid(alpha=0.3)
    fig.legend(loc="outside lower left")
    save(fig, file)


def draw_balancedness(rows, file):
    """Bars for balancedness and top-1 accuracy, with the standard deviation over seeds."""
    runs = over_seeds(rows)
    height = np.arange(len(runs))
    fig, axes = plt.subplots(1, 2, figsize=(6.4, 0.8 + 0.75 * len(runs)))
    for ax, column, scale in ((axes[0], "balancedness", 1), (axes[1], "top1", 100)):
        values = [scale * np.array([row[column] for row in group]) for _, _, group in runs]
        mean = [x.mean() for x in values]
        spread = [x.std(ddof=min(1, len(x) - 1)) for x in values]
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(runs))]
        bars = ax.barh(height, mean, 0.3, xerr=spread, color=colours)
        ax.bar_label(bars, fmt="%.3f" if scale == 1 else "%.1f", padding=3, fontsize=10)
        ax.set(xlim=(0, 1.3 * scale), xticks=np.linspace(0, scale, 5), ylim=(len(runs) - 0.7, -0.8), yticks=())
        ax.spines[["top", "right", "left"]].set_visible(False)
    axes[0].set_title(f"balancedness (sigma = {rows[0]['sigma']:g})")
    axes[1].set_title("top-1 accuracy, %")

    for y, (run, protocol, _) in zip(height, runs):  # a label above each pair of bars, across both panels
        text = axes[0].text(0, y - 0.2, label(run, protocol), fontsize=10, va="bottom")
        text.set_in_layout(False)
    axes[1].set_zorder(-1)
    save(fig, file)


def pca(x):
    """Project rows x (n, D) onto their first two principal components. Returns the points (n, 2) and the components'
    shares of the variance (2,)."""
    x = x - x.mean(0)
    variance, V = np.linalg.eigh(x.T @ x)                                 # ascending
    return x @ V[:, :-3:-1], variance[:-3:-1] / max(variance.sum(), 1e-30)


@torch.no_grad()
def feature_space(head, list_name, device, most=2000):
    """Project the unit features of about `most` images onto their first two principal components. PCA sees no labels.

    Returns points (m, 2), the components' shares of the variance (2,), labels (m,), and the classes shown, largest
    first, with equally many images each. Of more than ten classes the five largest and the five smallest are shown.
    """
    shown = np.argsort(head["counts"], kind="stable")[::-1]
    if len(shown) > 10:
        shown = np.concatenate([shown[:5], shown[-5:]])
    dataset = data.ImageList(head["data"], list_name, head)
    each = most // len(shown)
    index = torch.cat([(dataset.labels == int(c)).nonzero()[:each, 0] for c in shown])

    backbone = load_backbone(head["backbone"], head["arch"]).eval()
    backbone = backbone.to(device, memory_format=torch.channels_last)
    features = []
    for part in index.split(100):
        images = torch.stack([dataset[i][0][0] for i in part.tolist()])   # (b, 3, H, W)
        features.append(backbone(data.normalize(images, head["mean"], head["std"], device)))
    unit = torch.nn.functional.normalize(torch.cat(features)).double().cpu().numpy()
    return *pca(unit), dataset.labels[index].numpy(), shown


def feature_panel(ax, head, points, share, labels, shown):
    """Draw the points of each class, and at their mean the number of its training images."""
    group = data.groups(head["counts"])
    for i, c in enumerate(shown):
        xy, size = points[labels == c], f"{head['counts'][c]:,}"
        colour = plt.cm.plasma(0.08 * i)                                  # ten steps end at orange
        marker = {"many": "o", "medium": "s", "few": "^"}[group[c]]
        ax.scatter(*xy.T, s=16, alpha=0.5, linewidth=0, marker=marker, color=colour,
                   label=f"{size} {group[c]}")
        ax.text(*xy.mean(0), size, color=colour, ha="center", va="center", fontsize=10,
                weight="bold", zorder=3, path_effects=[withStroke(linewidth=3, foreground="white")])
    lim = 1.08 * max(abs(points).max(), 1e-6)
    ax.set(title=textwrap.fill(head["name"], 28), box_aspect=1,
           xlim=(-lim, lim), ylim=(-lim, lim), xticks=(), yticks=(),
           xlabel=f"PC 1: {100 * share[0]:.0f} % of variance",
           ylabel=f"PC 2: {100 * share[1]:.0f} %")


def draw_features(heads, lists, device, file):
    """Draw one panel per backbone, for the first seed if there are several. lists: the list that each head was
    evaluated on."""
    runs = {}
    for head, name in zip(heads, lists):
        runs.setdefault(re.sub(r"-seed\d+", "", head["name"]), (head, name))
    rows = -(-len(runs) // 2)
    fig, axes = plt.subplots(rows, 2, figsize=(6.4, 3.5 * rows + 1.1), squeeze=False)
    for ax in axes.flat[len(runs):]:
        ax.axis("off")
    for ax, (head, name) in zip(axes.flat, runs.values()):
        feature_panel(ax, head, *feature_space(head, name, device))

    title = f"classes by their images in {heads[0]['counts_of']}"
    if any(head["counts"] != heads[0]["counts"] for head in heads):
        title += " (first panel)"
    legend = fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center",
                        ncols=4, markerscale=1.5, title=title)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    save(fig, file)


def draw_sizes(lists, file):
    """Draw the images per class, largest class first. lists: {name: {"counts": class sizes}}."""
    fig, ax = plt.subplots(figsize=(6.4, 4.4))
    styles = zip(itertools.cycle(MARKERS), itertools.cycle(LINES))
    for i, ((name, row), (marker, line)) in enumerate(zip(lists.items(), styles)):
        n = sorted(row["counts"], reverse=True)
        colour = plt.cm.plasma(0.8 * i / len(lists))                      # ends at orange
        ax.plot(range(1, len(n) + 1), n, marker=marker, linestyle=line, label=name,
                markevery=max(1, len(n) // 10), color=colour)
    ax.set(xlabel="classes, largest first", ylabel="training images of the class", yscale="log")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.grid(alpha=0.3)
    fig.legend(loc="outside lower center", ncols=4)
    save(fig, file)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="+", type=Path, help="head.pt files that evaluate.py has scored, or one splits.json")
    p.add_argument("--out", type=Path, default=Path("runs"), help="folder for the pictures; default: runs")
    p.add_argument("--data", help="the folder that the paths in lists start from; default: the head's")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    style()
    if args.files[0].name == "splits.json":
        lists = json.loads(args.files[0].read_text())["lists"]
        return draw_sizes(lists, args.out / "class_sizes.png")

    heads, rows, lists = [load_head(file, args.data) for file in args.files], [], []
    for head in heads:
        scored = sorted(head["path"].parent.glob("eval*.json"))
        if not scored:
            sys.exit(f"error: no eval.json next to {head['path']}; run evaluate.py on it first, without --list")
        of_head = [{"seed": head["seed"], **json.loads(file.read_text())} for file in scored]
        rows += of_head
        lists.append(of_head[0]["list"])
    draw_accuracy(rows, args.out / "accuracy_by_class.png")
    draw_balancedness(rows, args.out / "balancedness.png")
    draw_features(heads, lists, ddp.init(), args.out / "features.png")


if __name__ == "__main__":
    ddp.run(main)
