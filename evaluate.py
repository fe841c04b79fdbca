"""
Stage 3: accuracy (all, many / medium / few) and balancedness of one or several classifiers, side by side.

    python evaluate.py runs/digits-lt-ce-seed0/head.pt runs/digits-lt-kcl-seed0/linear-lt/head.pt
    python evaluate.py runs/digits-lt-ce-seed0/head.pt --tau-norm --ncm    # two rows more: the CE head tau-normalised,
                                                                           # and nearest class means of its features
    torchrun --nproc_per_node=8 evaluate.py runs/imagenet-...-kcl-seed0-8ranks/linear-lt/head.pt

Prints one table in percent, writes eval.json beside each head (accuracies as fractions in [0, 1]; null = empty group),
and to --pictures accuracy_by_class.png, balancedness.png and features.png, each backbone's feature space (Fig. 1). Runs
that differ only in their seed get a mean +- std row.
"""
import argparse
import itertools
import json
import os
import re
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import ddp
from checkpoint import read_head
from ddp import InputError
from resnet import load_backbone

TAUS = np.arange(0, 2.01, 0.1).round(1).tolist()  # 0 is the plain head without its bias, 1 gives all classes one norm


def balancedness(acc, sigma=0.1):
    """beta = 1/C^2 sum_{i,j} exp(-|a_i - a_j|^2 / sigma), eq. 3: the uniformity of the class accuracies.

    acc (C,): accuracy of each class, in [0, 1]. 1/C < beta <= 1, and 1 only if all are equal. The paper calls sigma
    "a fixed scaling parameter" and does not give it: 0.1 is ours; compare beta at one sigma only.
    Raises ValueError for an empty acc, one outside [0, 1] (percent, nan), or sigma <= 0.
    """
    a = np.asarray(acc, dtype=np.float64)
    if a.ndim != 1 or not len(a) or not ((a >= 0) & (a <= 1)).all() or sigma <= 0:
        raise ValueError(f"expected class accuracies (C,) in [0, 1] and sigma > 0, got {acc} and sigma = {sigma}")
    return float(np.exp(-(a[:, None] - a) ** 2 / sigma).mean())


def group_accuracy(acc, counts):
    """{many, medium, few}: the mean accuracy of each group's classes, by training images counts (C,); None if empty."""
    of = np.array(data.groups(counts))
    return {g: float(np.asarray(acc)[of == g].mean()) if (of == g).any() else None for g in ("many", "medium", "few")}


def tau_normalize(weight, tau):
    """w_c / ||w_c||^tau for the rows of weight (C, D): tau-norm of Kang et al. 2020, to be used without a bias."""
    return weight / weight.norm(dim=1, keepdim=True) ** tau


def class_means(features, labels, C):
    """Nearest class mean as a linear head: the unit means (C, D) of each class' unit features (n, D) over all ranks, to
    be used without a bias. The largest logit is the largest cosine, since an image's own norm is the same for all
    classes. Kang et al. 2020, sec. 4 (their NCM)."""
    unit = torch.nn.functional.normalize(features)
    total = torch.zeros(C, features.shape[1], device=features.device).index_add_(0, labels, unit)
    dist.all_reduce(total)
    return torch.nn.functional.normalize(total)


def pca(x):
    """Rows x (n, D) on their first two principal components, (n, 2), and each one's share of the variance, (2,)."""
    x = x - x.mean(0)
    variance, V = np.linalg.eigh(x.T @ x)                                 # ascending
    return x @ V[:, :-3:-1], variance[:-3:-1] / max(variance.sum(), 1e-30)


def feature_space(features, labels, class_sizes, most=2000):
    """What features.png shows of the features (n, D) and labels (n,) of all ranks: the points (m, 2), unit features on
    principal components, which know no labels; each component's share (2,) of the variance; the points' labels (m,);
    the classes shown, largest first: of more than ten the five largest and the five smallest.
    m is about most at most, no class has more than its part of them."""
    shown = np.argsort(class_sizes, kind="stable")[::-1]
    shown = shown if len(shown) <= 10 else np.concatenate([shown[:5], shown[-5:]])
    each = -(-most // (len(shown) * ddp.world()))
    mine = torch.cat([(labels == int(c)).nonzero()[:each, 0] for c in shown])
    unit = torch.nn.functional.normalize(features[mine]).double()
    parts = [None] * ddp.world()
    dist.all_gather_object(parts, (unit.cpu().numpy(), labels[mine].cpu().numpy()))
    x, y = map(np.concatenate, zip(*parts))
    return *pca(x), y, shown


@torch.no_grad()
def extract(backbone, dataset, head, device, batch, workers):
    """Features (n, D) and labels (n,) of this rank's share of the images, each image on exactly one rank."""
    features, labels = [], []
    loader = data.eval_loader(dataset, batch, workers)
    name = f"features of {head['name']} on {dataset.name}"
    for (view,), y, _ in tqdm(loader, desc=name, disable=ddp.rank() > 0, leave=False):
        features.append(backbone(data.normalize(view, head["mean"], head["std"], device)))
        labels.append(y.to(device))
    empty = torch.empty(0, head["weight"].shape[1], device=device), torch.empty(0, dtype=torch.long, device=device)
    return torch.cat([*features, empty[0]]), torch.cat([*labels, empty[1]])


def hits(logits, labels):
    """Per class, over all ranks: images, top-1 hits, top-5 hits; (3, C) float64. logits (n, C), labels (n,)."""
    top5 = logits.topk(min(5, logits.shape[1])).indices                   # (n, 5)
    hit = top5 == labels[:, None]
    counts = torch.zeros(3, logits.shape[1], dtype=torch.float64, device=labels.device)
    for row, value in zip(counts, (torch.ones_like(labels), hit[:, 0], hit.any(1))):
        row.index_add_(0, labels, value.double())
    dist.all_reduce(counts)
    return counts.cpu()


def scores(counts, class_sizes, sigma):
    """What eval.json holds, from the (3, C) of hits()."""
    n, top1, top5 = counts.numpy()
    acc = top1 / n
    return {"top1": float(top1.sum() / n.sum()), "top5": float(top5.sum() / n.sum()),
            **group_accuracy(acc, class_sizes), "balancedness": balancedness(acc, sigma), "sigma": sigma,
            "std": float(acc.std()), "per_class": acc.tolist(), "images": int(n.sum())}


def load_head(path, root, groups_list):
    """A head.pt of train_rep.py or train_linear.py; root and the list of its class sizes replaced where given."""
    head = read_head(path)
    C = len(head["weight"])
    trained_on = Path(head["data"]) / head["counts_of"]
    if root is None and os.path.isfile(trained_on) and data.sha256(trained_on) != head["list_sha256"]:
        raise InputError(f"{head['counts_of']} in {head['data']} is not the list that {path} was made with, but "
                         "another of that name; train again")
    head["data"] = root or head["data"]
    if groups_list:
        head["counts"] = data.class_counts(data.read_list(head["data"], groups_list)[1], C).tolist()
        head["counts_of"] = groups_list
    if len(head["counts"]) != C:
        raise InputError(f"{head['counts_of']} has {len(head['counts'])} classes, the classifier {path} {C}; "
                         "name the training list of its classes with --groups")
    backbone = Path(os.path.normpath(Path(path).parent / head["backbone"]))
    if os.path.isfile(backbone) and data.sha256(backbone) != head["backbone_sha256"]:
        raise InputError(f"{path} was trained on another {backbone} than is there now; run train_linear.py again")
    return head


def joint(head):
    """Trained together with its backbone: what tau-norm is for."""
    return head["protocol"].startswith("joint CE")


def percent(x):
    return "-" if x is None else f"{100 * x:.1f}"


# colours that a colour-blind reader can tell apart (Okabe and Ito 2008); a grey for their yellow, which white swallows
OKABE_ITO = ("#0072B2", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#000000", "#808080")

COLUMNS = ("top1", "top5", "many", "medium", "few", "balancedness", "std")


def over_seeds(rows):
    """[(run, protocol, rows)]: rows of scores() that differ only in the seed of their run, together."""
    same = {}
    for row in rows:
        same.setdefault((re.sub(r"-seed\d+", "", row["run"]), row["protocol"]), []).append(row)
    return [(run, protocol, group) for (run, protocol), group in same.items()]


def print_table(rows):
    """Markdown, so that it can be pasted: a line a row, then a line for what was run with several seeds."""
    def line(run, cells, classifier):
        print(f"| {run:<{width}} | " + " | ".join(f"{c:>11}" for c in cells) + f" | {classifier} |")

    width = max(len(row["run"]) for row in rows)
    header = ("top-1", "top-5", "many", "medium", "few", f"beta (s={rows[0]['sigma']:g})", "std")
    line("run", header, "classifier")
    print("|---" * (len(header) + 2) + "|")
    for row in rows:
        line(row["run"], [f"{row[c]:.3f}" if c == "balancedness" else percent(row[c]) for c in COLUMNS],
             ", ".join(filter(None, (row["protocol"], row["chosen"]))))
    for run, protocol, group in over_seeds(rows):
        if len(group) > 1:
            cells = []
            for c in COLUMNS:
                x = [row[c] for row in group]
                scale, digits = (1, 3) if c == "balancedness" else (100, 1)
                cells.append("-" if None in x else
                             f"{scale * np.mean(x):.{digits}f} +- {scale * np.std(x, ddof=1):.{digits}f}")
            line(f"{run}, {len(group)} seeds", cells, protocol)
    print(f"in percent but for beta; sigma = {rows[0]['sigma']:g}; std of the class accuracies; many / medium / few by "
          f"the class sizes of {', '.join(sorted({row['counts_of'] for row in rows}))}; +- std over seeds")


def draw(rows, spaces, out):
    """Three pictures: accuracy of each class against its size, balancedness beside accuracy (Figs 2 and 4; runs that
    differ only in their seed are one mean, in the second picture with its standard deviation), and feature spaces."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: matplotlib is missing, `pip install matplotlib`")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    matplotlib.rcdefaults()  # not the reader's own style, which may be light on dark
    # 6.4 in. wide with 11 pt is legible on a telephone; an opaque margin, so that a dark page does not reach the axes
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 11, "legend.frameon": False, "figure.facecolor": "white",
                         "figure.dpi": 150, "savefig.bbox": "tight", "savefig.pad_inches": 0.15,
                         "axes.prop_cycle": plt.cycler(color=OKABE_ITO)})
    out.mkdir(parents=True, exist_ok=True)
    runs, protocols, groups = zip(*over_seeds(rows))
    names = [f"{run}: {re.sub(', [a-z]+ sampling.*', '', protocol)}" for run, protocol in zip(runs, protocols)]
    wrapped = [textwrap.fill(name, 64) for name in names]
    lines = sum(name.count("\n") + 1 for name in wrapped)

    fig, ax = plt.subplots(figsize=(6.4, 4 + 0.23 * lines), layout="constrained")
    styles = zip(itertools.cycle("osD^vPX*"), itertools.cycle(("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))))
    for name, group, (marker, style) in zip(wrapped, groups, styles):
        order = [np.argsort(row["counts"], kind="stable")[::-1] for row in group]                  # largest class first
        acc = 100 * np.stack([np.array(row["per_class"])[o] for row, o in zip(group, order)])      # (seeds, C)
        ax.plot(acc.mean(0), marker=marker if acc.shape[1] <= 100 else None, linestyle=style, label=name)
    sizes = np.sort(rows[0]["counts"])[::-1]
    if all(sorted(row["counts"]) == sorted(sizes) for row in rows):
        ticks = np.linspace(0, len(sizes) - 1, min(len(sizes), 10)).astype(int)
        ax.set_xticks(ticks, sizes[ticks])
        ax.set_xlabel(f"images of the class in {rows[0]['counts_of']}")
    else:
        ax.set_xlabel("classes by size in the run's own training list, largest first")
    ax.set(ylabel="accuracy of the class, %", ylim=(0, 101))
    ax.grid(alpha=0.3)
    fig.legend(loc="outside lower left", fontsize=10)
    fig.savefig(out / "accuracy_by_class.png")
    plt.close(fig)

    fig, axes = plt.subplots(1, 2, figsize=(6.4, 0.7 + 0.35 * len(groups) + 0.21 * lines), layout="constrained")
    heights = np.array([0.35 + 0.21 * (name.count("\n") + 1) for name in wrapped])  # in., bar and name
    bottom = heights.cumsum()
    for ax, column, scale, title in ((axes[0], "balancedness", 1, f"balancedness (sigma = {rows[0]['sigma']:g})"),
                                     (axes[1], "top1", 100, "top-1 accuracy, %")):
        value = [scale * np.mean([row[column] for row in group]) for group in groups]
        spread = [scale * np.std([row[column] for row in group], ddof=min(1, len(group) - 1)) for group in groups]
        bars = ax.barh(bottom - 0.16, value, 0.22, xerr=spread, color=[f"C{i}" for i in range(len(groups))])
        ax.bar_label(bars, fmt="%.3f" if scale == 1 else "%.1f", padding=3, fontsize=10)
        ax.set(title=title, xlim=(0, 1.35 * max(value)), ylim=(bottom[-1] + 0.05, 0), yticks=())
        ax.spines[["top", "right", "left"]].set_visible(False)
    for name, y in zip(wrapped, bottom):
        axes[0].text(0, y - 0.29, name, fontsize=10, va="bottom").set_in_layout(False)  # it goes on over the second
    axes[1].set_zorder(-1)
    fig.savefig(out / "balancedness.png")
    plt.close(fig)

    draw_features(plt, spaces, out / "features.png")
    print(f"pictures: {out / 'accuracy_by_class.png'}, {out / 'balancedness.png'}, {out / 'features.png'}")


def draw_features(plt, spaces, file):
    """A panel for each {name, counts, counts_of, points, share, labels, shown} of spaces, each on its own scale; the
    class sizes stand at the means of the classes' points."""
    from matplotlib import patheffects
    halo = [patheffects.withStroke(linewidth=3, foreground="white")]
    rows, odd = -(-len(spaces) // 2), len(spaces) % 2
    fig, axes = plt.subplots(rows, 2, figsize=(6.4, 3.5 * rows + 1.1 * (not odd)), layout="constrained", squeeze=False)
    for ax, s in zip(axes.flat, spaces):
        group = data.groups(s["counts"])
        for i, c in enumerate(s["shown"]):
            xy, size, color = s["points"][s["labels"] == c], f"{s['counts'][c]:,}", plt.cm.plasma(0.08 * i)  # to orange
            ax.scatter(*xy.T, s=16, alpha=0.5, linewidth=0, marker={"many": "o", "medium": "s", "few": "^"}[group[c]],
                       color=color, label=f"{size} {group[c]}")
            ax.text(*xy.mean(0), size, color=color, ha="center", va="center", fontsize=10, weight="bold",
                    path_effects=halo, zorder=3)
        lim = 1.08 * max(abs(s["points"]).max(), 1e-6)
        ax.set(title=textwrap.fill(s["name"], 28), xlim=(-lim, lim), ylim=(-lim, lim), xticks=(), yticks=(),
               xlabel=f"PC 1: {100 * s['share'][0]:.0f} % of variance", ylabel=f"PC 2: {100 * s['share'][1]:.0f} %",
               box_aspect=1)
    title = f"classes by their images in {spaces[0]['counts_of']}"
    title += " (first panel)" * any(sorted(s["counts"]) != sorted(spaces[0]["counts"]) for s in spaces)
    place = dict(loc="center") if odd else dict(loc="outside lower center", ncols=4)
    legend = (axes[-1, 1] if odd else fig).legend(
        *axes[0, 0].get_legend_handles_labels(), **place, fontsize=10, markerscale=1.5, alignment="left",
        title=textwrap.fill(title, 26 if odd else 60))
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    if odd:
        axes[-1, 1].axis("off")
    fig.savefig(file)
    plt.close(fig)


def main():
    device = ddp.init()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("heads", nargs="+", help="head.pt files of train_linear.py, or of a CE run of train_rep.py")
    p.add_argument("--data", help="the folder that the lists' paths start from; default: where the head was trained")
    p.add_argument("--list", help="list to evaluate on; default: the data set's test list, a class split's own")
    p.add_argument("--groups", help="training list whose class sizes make many / medium / few; default: in the head")
    p.add_argument("--sigma", type=float, default=0.1, help="of the balancedness; the paper does not give its value")
    p.add_argument("--tau-norm", action="store_true", help="also the joint CE heads tau-normalised; tau: by --val")
    p.add_argument("--ncm", action="store_true", help="also nearest class mean on each backbone, by its training list")
    p.add_argument("--val", help="validation list for --tau-norm")
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--pictures", type=Path, default=Path("runs"), help="their folder; `none`: no pictures")
    args = p.parse_intermixed_args()  # flags may stand between the heads
    if min(args.sigma, args.batch) <= 0 or args.workers < 0:
        raise InputError("--sigma and --batch must be above 0, --workers 0 or more")

    heads = [load_head(path, args.data, args.groups) for path in args.heads]  # all of them, before the first long work
    if args.tau_norm and not any(map(joint, heads)):
        raise InputError("--tau-norm needs a joint CE head, the head.pt of a CE run, among the heads")
    tests = []
    for head, path in zip(heads, args.heads):
        spec = data.DATASETS[head["dataset"]]
        lists = [args.list or data.beside(head["data"], head["list"], spec["test"])]
        if args.tau_norm and joint(head):
            lists.append(args.val or data.beside(head["data"], head["list"], spec["val"]))
            data.refuse_overlap(head["data"], head["counts_of"], lists[1])
        images = [data.ImageList(head["data"], name, data.center(head["pixels"], head["resize"])) for name in lists]
        C = len(head["weight"])
        for dataset in images:
            data.refuse_labels_outside(dataset, C, f"the classifier {path}")
            if (empty := (data.class_counts(dataset.labels, C) == 0).nonzero()).numel():
                raise InputError(f"{dataset.name}: class {int(empty[0])} has no image, so it has no accuracy; the list "
                                 f"must hold all {C} classes of {path}")
        tests.append(images)

    def encoded(dataset, head, path):
        """extract() of a head's backbone, or what an earlier head with the same backbone and list left behind."""
        key = (head["backbone_sha256"], dataset.name, head["arch"], dataset.root, head["weight"].shape[1],
               *(str(head[k]) for k in ("mean", "std", "pixels", "resize")))
        if key not in extracted:
            backbone = load_backbone(Path(path).parent / head["backbone"], head["arch"])
            backbone = backbone.to(device, memory_format=torch.channels_last).eval()
            D, of = backbone(torch.zeros(1, 3, *[head["pixels"]] * 2, device=device)).shape[1], head["weight"].shape[1]
            if D != of:
                raise InputError(f"{path} is for {of} features, its backbone has {D}; run train_linear.py again")
            extracted[key] = extract(backbone, dataset, head, device, args.batch, args.workers)
        return extracted[key]

    rows, spaces, with_ncm, extracted = [], {}, set(), {}
    for i, (head, path, images) in enumerate(zip(heads, args.heads, tests)):
        W, b = head["weight"].to(device), head["bias"].to(device)
        features, labels = encoded(images[0], head, path)
        results = [("eval.json", head["protocol"], head.get("chosen", ""), features @ W.T + b)]
        if args.tau_norm and joint(head):
            val_features, val_labels = encoded(images[1], head, path)
            on_val = [hits(val_features @ tau_normalize(W, tau).T, val_labels)[1].sum().item() for tau in TAUS]
            tau = TAUS[int(np.argmax(on_val))]
            results.append(("eval_tau_norm.json", f"tau-norm of {head['protocol']}",
                            f"tau {tau:g} chosen on {images[1].name}", features @ tau_normalize(W, tau).T))
        if args.ncm and head["backbone_sha256"] not in with_ncm:  # once a backbone, however many heads it has
            with_ncm.add(head["backbone_sha256"])
            train = data.ImageList(head["data"], head["counts_of"], data.center(head["pixels"], head["resize"]))
            means = class_means(*encoded(train, head, path), len(W))
            results.append(("eval_ncm.json", f"NCM on {head['counts_of']}", "", features @ means.T))
        run = re.sub(r"-seed\d+", "", head["name"])  # of several seeds the first is enough of a picture
        if str(args.pictures) != "none" and run not in spaces:
            points, share, y, shown = feature_space(features, labels, head["counts"])
            spaces[run] = dict(
                name=head["name"], counts=head["counts"], counts_of=head["counts_of"], points=points, share=share,
                labels=y, shown=shown)
        for file, protocol, chosen, logits in results:
            row = {"run": head["name"], "protocol": protocol, "chosen": chosen,
                   **scores(hits(logits, labels), head["counts"], args.sigma), "list": images[0].name,
                   "counts": head["counts"], "counts_of": head["counts_of"], "head": path}
            rows.append(row)
            if ddp.rank() == 0:
                Path(path).with_name(file).write_text(json.dumps(row, indent=1) + "\n")
        # of 50,000 test images 50,000 x 2048 x 4 B = 0.4 GB a backbone: keep what a later head will ask for
        waiting = {(later["backbone_sha256"], test[0].name) for later, test in zip(heads[i + 1:], tests[i + 1:])}
        extracted = {key: kept for key, kept in extracted.items() if key[:2] in waiting}
    if ddp.rank() == 0:
        print_table(rows)
        if str(args.pictures) != "none":
            draw(rows, list(spaces.values()), args.pictures)


if __name__ == "__main__":
    ddp.run(main)
