"""
What the lines of recipes/study.py say of the paper's findings: the tables between <!-- name --> and <!-- end --> in
results/findings.md and README.md, and the pictures in results/findings/.

    .venv/bin/python recipes/findings.py       # rewrites them from results/study.jsonl in seconds, nothing is trained

Differences are paired: both methods of a pair have the same images, order of the classes and seed, so what is averaged
is their difference on each seed, with a 95 % confidence interval of Student's t over the seeds. A claim is confirmed
where the interval lies above 0, not confirmed where it lies below, else unclear at this size.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluate import balancedness  # noqa: E402  it lies one folder up

ALPHAS = {"-lt0": 0.0, "-lt2": 0.2, "-lt4": 0.4, "-lt6": 0.6, "-lt8": 0.8, "": 1.0}
NAMES = {"ce": "CE", "cl": "CL", "kcl": "KCL", "fcl": "FCL"}
T975 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by seeds
# Okabe and Ito's colours, which a colour-blind reader can tell apart; a marker for each besides
STYLE = {"ce": ("#D55E00", "o"), "cl": ("#0072B2", "s"), "kcl": ("#009E73", "D"), "fcl": ("#CC79A7", "^"),
         "crt": ("#E69F00", "v")}


def interval(difference):
    """{seed: x} -> mean, half the width of its 95 % confidence interval, number of seeds."""
    x = np.array(list(difference.values()))
    return x.mean(), T975[len(x)] * x.std(ddof=1) / len(x) ** 0.5, len(x)


def verdict(difference):
    mean, half, _ = interval(difference)
    return "confirmed" if mean > half else "**not confirmed**: the opposite" if mean < -half else "unclear"


def combine(f, *parts):
    """f of {seed: x} and others, on the seeds that all have."""
    return {seed: f(*(part[seed] for part in parts)) for seed in parts[0] if all(seed in part for part in parts)}


def minus(a, b):
    return combine(lambda x, y: x - y, a, b)


def expected_beta(a, images, C, sigma=0.1):
    """E[beta] of C classes that all have accuracy a, each measured on so many images: not 1, because the measured
    accuracies scatter, a_i - a_j ~ N(0, 2 a (1 - a) / images), and E exp(-x^2 / sigma) =
    (1 + 2 var(x) / sigma)^-1/2."""
    return 1 / C + (1 - 1 / C) * (1 + 4 * a * (1 - a) / images / sigma) ** -0.5


class Study:
    """The lines by cell, classifier and seed."""

    def __init__(self, file):
        self.lines = {}
        for line in map(json.loads, file.read_text().splitlines()):
            self.lines.setdefault((line["cell"], line["classifier"]), {})[line["seed"]] = line

    def get(self, cell, classifier, column="top1"):
        """{seed: value}; accuracies and std in percent. few/many is a ratio; lists of class accuracies stay lists."""
        values = {}
        for seed, line in self.lines.get((cell, classifier), {}).items():
            if column == "few/many":
                if None not in (line["few"], line["many"]):
                    values[seed] = line["few"] / line["many"]
            elif column == "train_images":  # of the representation's list
                values[seed] = sum(line["counts"])
            else:
                values[seed] = line[column] if column in ("balancedness", "seconds", "per_class", "counts") else (
                    100 * line[column] if line[column] is not None else None)
        return dict(sorted(values.items()))

    def show(self, cell, classifier, column="top1"):
        """mean ± std over the seeds."""
        x = [v for v in self.get(cell, classifier, column).values() if v is not None]
        digits = {"balancedness": 3, "few/many": 2, "seconds": 0, "train_images": 0}.get(column, 1)
        if not x:
            return "-"
        return f"{np.mean(x):.{digits}f}" + (f" ± {np.std(x, ddof=1):.{digits}f}" if len(x) > 1 and digits else "")

    def row(self, name, cell, classifier, columns):
        n = len(self.get(cell, classifier))
        return f"| {name} | {n} | " + " | ".join(self.show(cell, classifier, c) for c in columns) + " |" if n else ""

    def both(self, cell):
        """Top-1 and few on the long tail, top-1 and beta on the balanced set: cells of a table."""
        return [self.show(cell, "lt"), self.show(cell, "lt", "few"), self.show(cell, "rep"),
                self.show(cell, "rep", "balancedness")]


def table(header, rows):
    return "\n".join([header, "|---" * (header.count("|") - 1) + "|", *filter(None, rows)]) + "\n"


def signed(difference, digits=1):
    if len(difference) < 2:
        return "-"
    mean, half, n = interval(difference)
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


# ---- the claims, each as a difference that is above 0 where the paper is right

def claims(s):
    """[(figure or table, claim, {seed: difference}, digits)]"""
    top1, beta = s.get, lambda cell, classifier="rep": s.get(cell, classifier, "balancedness")
    drop = {loss: minus(top1(f"{loss}-lt0", "rep"), top1(loss, "rep")) for loss in ("ce", "cl")}
    fall = {loss: minus(beta(f"{loss}-lt0"), beta(loss)) for loss in ("ce", "cl")}
    gap = {cell: minus(top1(cell, "source"), top1(cell, "target"))
           for cell in (f"{loss}-{half}" for loss in ("ce", "cl") for half in ("overlap", "independent"))}
    resampled = combine(lambda *x: sum(x) / 3, *(beta(f"ce-{how}") for how in ("class", "sqrt", "progressive")))

    def above_both(half, classifier):
        return combine(lambda kcl, ce, cl: kcl - max(ce, cl),
                       *(top1(f"{loss}-{half}", classifier) for loss in ("kcl", "ce", "cl")))

    return [
        ("Fig. 2", "CE loses accuracy from alpha 0 to 1", drop["ce"], 1),
        ("Fig. 2", "CL loses less than CE", minus(drop["ce"], drop["cl"]), 1),
        ("Fig. 2", "CE loses balancedness from alpha 0 to 1", fall["ce"], 3),
        ("Fig. 2", "CL loses less balancedness than CE", minus(fall["ce"], fall["cl"]), 3),
        ("Fig. 2", "at alpha 1 CL's space is more balanced than CE's", minus(beta("cl"), beta("ce")), 3),
        ("Fig. 2", "CE is the more accurate one at alpha 1", minus(top1("ce", "rep"), top1("cl", "rep")), 1),
        ("Fig. 3", "accuracy on new classes rises with balancedness on the old: correlation over alpha",
         correlations(s, "balancedness"), 2),
        ("Fig. 3", "accuracy on new classes falls from alpha 0 to 1",
         minus(top1("ce-overlap-lt0", "target"), top1("ce-overlap-lt", "target")), 1),
        ("Table 2", "KCL (80 epochs) above joint CE (40)", minus(top1("kcl", "lt"), top1("ce", "joint")), 1),
        ("Table 2", "KCL (80) above tau-norm (40)", minus(top1("kcl", "lt"), top1("ce", "tau")), 1),
        ("Table 2", "KCL (80) above cRT (40)", minus(top1("kcl", "lt"), top1("ce", "lt")), 1),
        ("Table 2", "KCL above FCL (80 each)", minus(top1("kcl", "lt"), top1("fcl", "lt")), 1),
        ("Table 2", "FCL (80) above cRT (40)", minus(top1("fcl", "lt"), top1("ce", "lt")), 1),
        ("Fig. 4", "KCL's space is more balanced than CE's", minus(beta("kcl"), beta("ce")), 3),
        ("Fig. 4", "KCL's space is more balanced than that of re-sampled CE", minus(beta("kcl"), resampled), 3),
        ("Fig. 4", "KCL's space is more balanced than FCL's", minus(beta("kcl"), beta("fcl")), 3),
        ("Fig. 4", "KCL more accurate than CL on the balanced set", minus(top1("kcl", "rep"), top1("cl", "rep")), 1),
        ("Table 4", "overlap: CE's gap is larger than CL's", minus(gap["ce-overlap"], gap["cl-overlap"]), 1),
        ("Table 4", "independent: CE's gap is larger than CL's",
         minus(gap["ce-independent"], gap["cl-independent"]), 1),
        ("Table 4", "overlap: CE above CL on the target",
         minus(top1("ce-overlap", "target"), top1("cl-overlap", "target")), 1),
        ("Table 4", "independent: CL above CE on the target",
         minus(top1("cl-independent", "target"), top1("ce-independent", "target")), 1),
        ("Table 4", "overlap: KCL above both on the target", above_both("overlap", "target"), 1),
        ("Table 4", "independent: KCL above both on the target", above_both("independent", "target"), 1),
        ("Table 4", "overlap: KCL above both on all classes", above_both("overlap", "full"), 1),
        ("Table 4", "independent: KCL above both on all classes", above_both("independent", "full"), 1),
        ("Table 4", "on all classes CE loses more from overlap to independent than CL",
         minus(minus(top1("ce-overlap", "full"), top1("ce-independent", "full")),
               minus(top1("cl-overlap", "full"), top1("cl-independent", "full"))), 1),
        ("Fig. 5", "k = 6 above k = 0", minus(top1("kcl", "lt"), top1("cl", "lt")), 1),
        ("Fig. 5", "k = 6 above k = 1", minus(top1("kcl", "lt"), top1("kcl-k1", "lt")), 1),
        ("Fig. 5", "k = 6 above k = 4", minus(top1("kcl", "lt"), top1("kcl-k4", "lt")), 1),
        ("Fig. 5", "k = 6 above k = 20", minus(top1("kcl", "lt"), top1("kcl-k20", "lt")), 1),
        ("Table 6", "KCL gains from twice the epochs", minus(top1("kcl", "lt"), top1("kcl-40", "lt")), 1),
        ("cost", "equal epochs, 40: KCL above cRT", minus(top1("kcl-40", "lt"), top1("ce", "lt")), 1),
        ("cost", "equal epochs, 80: KCL above joint CE", minus(top1("kcl", "lt"), top1("ce-80", "joint")), 1),
        ("cost", "equal epochs, 80: KCL above tau-norm", minus(top1("kcl", "lt"), top1("ce-80", "tau")), 1),
        ("cost", "equal epochs, 80: KCL above cRT", minus(top1("kcl", "lt"), top1("ce-80", "lt")), 1),
        ("cost", "equal epochs, 80: KCL's space is more balanced than CE's", minus(beta("kcl"), beta("ce-80")), 3),
        ("cost", "equal time, KCL 80 and CE 116 epochs: KCL above cRT",
         minus(top1("kcl", "lt"), top1("ce-116", "lt")), 1),
    ]


def source_and_target(s, column):
    """{seed: (2, 6)}: over the six alphas, a column on the source classes and top-1 on the target classes."""
    cells = [f"ce-overlap-lt{alpha}" for alpha in ("0", "2", "4", "6", "8", "")]
    return combine(lambda *x: np.reshape(x, (2, 6)), *(s.get(cell, "source", column) for cell in cells),
                   *(s.get(cell, "target") for cell in cells))


def correlations(s, column):
    """{seed: Pearson's r of source_and_target}"""
    return {seed: np.corrcoef(xy)[0, 1] for seed, xy in source_and_target(s, column).items()}


def claims_table(s):
    rows = [f"| {where} | {claim} | {len(d)} | {signed(d, digits)} | {verdict(d)} |"
            for where, claim, d, digits in claims(s) if len(d) > 1]
    return table("| paper | claim | n | difference | here |", rows)


# ---- the report

METHODS = [("CE, instance sampling (SL-i)", "ce", "joint"), ("CE, class-balanced sampling (SL-c)", "ce-class", "joint"),
           ("CE, square-root sampling (SL-s)", "ce-sqrt", "joint"),
           ("CE, progressive sampling (SL-p)", "ce-progressive", "joint"), ("CE, tau-norm", "ce", "tau"),
           ("CE, cRT", "ce", "lt"), ("CE, LWS", "ce", "lws"), ("CE, NCM", "ce", "ncm"), ("CL", "cl", "lt"),
           ("FCL", "fcl", "lt"), ("KCL", "kcl", "lt"),
           ("Focal", "focal", "joint"), ("CB-Focal", "cb-focal", "joint"), ("LDAM", "ldam", "joint"),
           ("LDAM-DRW", "ldam-drw", "joint"), ("BBN", "bbn", "joint"), ("SSP (CE from CL)", "ssp", "joint"),
           ("FCL in the batch (SupCon)", "supcon", "lt"), ("TSC", "tsc", "lt")]
GROUPS = ("top1", "many", "medium", "few", "balancedness", "std")
POSITIVES = [("0 (CL)", "cl"), ("1", "kcl-k1"), ("2", "kcl-k2"), ("4", "kcl-k4"), ("6", "kcl"), ("10", "kcl-k10"),
             ("20", "kcl-k20"), ("all (FCL)", "fcl")]


def main_table(s):
    """What recipes/digits.sh prints, over the seeds: CE and KCL with the scripts' defaults."""
    rows = (("CE, its own head (joint CE)", "ce-80", "joint"), ("CE, tau-norm", "ce-80", "tau"),
            ("CE, class-balanced classifier (cRT)", "ce-80", "lt"), ("**KCL, class-balanced classifier**", "kcl", "lt"),
            ("CE, classifier on the balanced set, cached features", "ce-80", "rep"),
            ("KCL, classifier on the balanced set, cached features", "kcl", "rep"))
    return table("| representation, classifier | n | all | many | medium | few | beta |",
                 [s.row(name, cell, classifier, GROUPS[:5]) for name, cell, classifier in rows])


def methods_table(s):
    """The long-tailed recognition of every method, Table 2 and more."""
    return table("| method | n | all | many | medium | few | beta | std of classes | CPU s |",
                 [s.row(name, cell, classifier, (*GROUPS, "seconds")) for name, cell, classifier in METHODS])


def balance_table(s):
    """Fig. 4, left: classifiers on the balanced set."""
    first = {}  # a representation has the name of the first method with it
    for name, cell, _ in METHODS:
        if s.get(cell, "rep"):
            first.setdefault(cell, name)
    return table("| representation | n | all | many | medium | few | beta | std of classes |",
                 [s.row(name, cell, "rep", GROUPS) for cell, name in first.items()])


def fig2(s):
    alphas = {suffix: alpha for suffix, alpha in ALPHAS.items() if s.get("ce" + suffix, "rep")}
    rows = [f"| {NAMES[loss]}, {name} | " + " | ".join(s.show(loss + suffix, "rep", column) for suffix in alphas) + " |"
            for loss in NAMES for column, name in (("top1", "top-1"), ("balancedness", "beta"))]
    return table("| | " + " | ".join(f"alpha {a:g}" for a in alphas.values()) + " |", rows)


def fig3(s):
    rows = []
    for suffix, alpha in ALPHAS.items():
        cell = f"ce-overlap{suffix or '-lt'}"
        rows.append(f"| {alpha:g} | {s.show(cell, 'source', 'train_images')} | {s.show(cell, 'source')} | "
                    f"{s.show(cell, 'source', 'balancedness')} | {s.show(cell, 'target')} |")
    r = {name: signed(correlations(s, column), 2) for name, column in (
        ("the balancedness on the source", "balancedness"), ("top-1 on the source", "top1"),
        ("the number of training images", "train_images"))}
    together = list(source_and_target(s, "balancedness").values()) or [np.zeros((2, 0))]
    text = table("| alpha | training images | top-1 on the source | beta on the source | top-1 on the target |", rows)
    return text + (
        "\nPearson's r with top-1 on the target over the six alphas, the mean over the seeds with its 95 % interval: " +
        "; ".join(f"{name} {x}" for name, x in r.items()) + f". Over all {6 * len(together)} runs together r is "
        f"{np.corrcoef(np.concatenate(together, axis=1))[0, 1]:+.2f} for the balancedness.\n")


def table4(s):
    rows = []
    for half in ("overlap", "independent"):
        for loss in ("ce", "cl", "kcl"):
            cell = f"{loss}-{half}"
            gap = list(minus(s.get(cell, "source"), s.get(cell, "target")).values())
            if len(gap) < 2:
                continue
            rows.append(f"| {half} | {NAMES[loss]} | {len(gap)} | {s.show(cell, 'source')} | "
                        f"{s.show(cell, 'target')} | {np.mean(gap):.1f} ± {np.std(gap, ddof=1):.1f} | "
                        f"{s.show(cell, 'full')} |")
    return table("| split | loss | n | source | target | gap | full |", rows)


def fig5(s):
    rows = [f"| {k} | {len(s.get(cell, 'lt'))} | {' | '.join(s.both(cell))} |" for k, cell in POSITIVES]
    return table("| k | n | top-1 | few | top-1 on the balanced set | beta on the balanced set |", rows)


def ablations(s):
    rows = []
    for name, cell in (("KCL as here", "kcl"), ("divide by k + 1 (`--fixed-divisor`)", "kcl-fixed-divisor"),
                       ("the k lowest slots (`--first-k`)", "kcl-first-k"),
                       ("unused positives leave the denominator (`--drop-unused`)", "kcl-drop-unused"),
                       ("queue not filled at the start (`--no-fill`)", "kcl-no-fill")):
        by_lt, by_rep = (signed(minus(s.get(cell, c), s.get("kcl", c))) if cell != "kcl" else "" for c in ("lt", "rep"))
        lt, few, rep, beta = s.both(cell)
        rows.append(f"| {name} | {len(s.get(cell, 'lt'))} | {lt} | {by_lt} | {few} | {rep} | {by_rep} | {beta} |")
    return table("| | n | top-1 | against KCL | few | top-1, balanced set | against KCL | beta, balanced set |", rows)


def cost(s):
    rows = [f"| {name} | {epochs} | {len(s.get(cell, 'lt'))} | {s.show(cell, 'lt', 'seconds')} | "
            f"{' | '.join(s.both(cell))} |"
            for name, cell, epochs in (("CE, cRT", "ce", 40), ("CE, cRT", "ce-80", 80), ("CE, cRT", "ce-116", 116),
                                       ("KCL", "kcl-40", 40), ("KCL", "kcl", 80))]
    return table("| | epochs | n | CPU s | top-1 | few | top-1, balanced set | beta, balanced set |", rows)


def sensitivity(s):
    """Finding 8: what beta is sensitive to, beside std and few / many."""
    sigmas = (0.01, 0.03, 0.1, 0.3, 1)
    rows = []
    for cell, name in NAMES.items():
        acc = s.get(cell, "rep", "per_class").values()
        by_sigma = [np.mean([balancedness(a, sigma) for a in acc]) for sigma in sigmas]
        rows.append(f"| {name} | " + " | ".join(f"{b:.3f}" for b in by_sigma) +
                    f" | {s.show(cell, 'rep', 'std')} | {s.show(cell, 'rep', 'few/many')} | {s.show(cell, 'rep')} |")
    text = table("| alpha 1, classifier on the balanced set | " + " | ".join(f"sigma {x:g}" for x in sigmas) +
                 " | std, % | few / many | top-1 |", rows)
    cells = [cell for cell, classifier in s.lines if classifier == "rep"]
    seeds = sorted(s.get("ce", "rep"))
    # every pair of representations on the same seed: do two measures agree on which is the more balanced one?
    measures = {c: {(cell, seed): v for cell in cells for seed, v in s.get(cell, "rep", c).items()}
                for c in ("balancedness", "std", "few/many", "top1")}
    measures["std"] = {key: -v for key, v in measures["std"].items()}
    measures["few/many"] = {key: -abs(np.log(max(v, 1e-6))) for key, v in measures["few/many"].items()}
    agree = {}
    for other in ("std", "few/many", "top1"):
        same = [np.sign(measures["balancedness"][a, seed] - measures["balancedness"][b, seed]) ==
                np.sign(measures[other][a, seed] - measures[other][b, seed])
                for seed in seeds for i, a in enumerate(cells) for b in cells[:i]
                if (a, seed) in measures[other] and (b, seed) in measures[other]]
        agree[other] = (100 * np.mean(same), len(same))
    r = np.corrcoef(*zip(*((measures["top1"][key], measures["balancedness"][key]) for key in measures["top1"])))[0, 1]
    text += (f"\nOver all {len(measures['top1'])} classifiers on the balanced set (cells and seeds) beta and top-1 "
             f"correlate with r = {r:+.2f}. Of two representations of one seed beta calls the one more balanced that "
             + ", ".join(f"{what} does in {agree[m][0]:.0f} %" for m, what in (
                 ("std", "std (the smaller)"), ("few/many", "few / many (the nearer to 1)"),
                 ("top1", "top-1 (the more accurate)"))) + f" of {agree['std'][1]:,} pairs.\n\n")
    text += ("The test set's size moves beta too. Ten classes that are all *equally* separable, each measured on 100 "
             "images, have an expected beta (sigma = 0.1) of " + ", ".join(
                 f"{expected_beta(a, 100, 10):.3f} at {100 * a:g} %" for a in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97)) +
             " accuracy: the same balance reads higher where the classifier is very good, or knows nothing.\n")
    return text


def draw(s, out):
    out.mkdir(parents=True, exist_ok=True)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 13, "figure.facecolor": "white", "savefig.dpi": 130, "lines.linewidth": 2,
                         "lines.markersize": 7, "axes.grid": True, "grid.alpha": 0.3})

    def points(ax, x, cells, classifier, column, label, style):
        found = [(a, list(s.get(cell, classifier, column).values())) for a, cell in zip(x, cells)]
        found = [(a, y) for a, y in found if y]
        if found:
            ax.errorbar([a for a, _ in found], [np.mean(y) for _, y in found],
                        [np.std(y, ddof=1) if len(y) > 1 else 0 for _, y in found],
                        color=style[0], marker=style[1], capsize=3, label=label)

    fig, axes = plt.subplots(1, 2, figsize=(8.4, 4.4), layout="constrained")
    for loss in [loss for loss in NAMES if s.get(f"{loss}-lt0", "rep")]:
        for ax, column in zip(axes, ("top1", "balancedness")):
            points(ax, ALPHAS.values(), [loss + suffix for suffix in ALPHAS], "rep", column, NAMES[loss], STYLE[loss])
    axes[0].set(xlabel="alpha (0 balanced, 1 long tail)", ylabel="top-1, %")
    axes[1].set(xlabel="alpha", ylabel="balancedness (sigma = 0.1)")
    axes[0].legend(ncols=2)
    fig.savefig(out / "fig2.png")

    fig, ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    xy = np.array(list(source_and_target(s, "balancedness").values())).reshape(-1, 2, 6)
    for i, alpha in enumerate(ALPHAS.values()):
        ax.scatter(xy[:, 0, i], xy[:, 1, i], s=60, color=plt.cm.viridis(alpha),
                   marker="osD^vP"[round(5 * alpha)], edgecolor="black", linewidth=0.5, label=f"alpha {alpha:g}")
    ax.set(xlabel="balancedness on the source classes", ylabel="top-1 on the target classes, %")
    fig.legend(loc="outside upper center", ncols=3, fontsize="small")
    fig.savefig(out / "fig3.png")

    fig, ax = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    for name, cell, classifier, style in (("joint CE", "ce", "joint", "ce"), ("CE, cRT", "ce", "lt", "crt"),
                                          ("CL", "cl", "lt", "cl"), ("FCL", "fcl", "lt", "fcl"),
                                          ("KCL", "kcl", "lt", "kcl")):
        acc, counts = s.get(cell, classifier, "per_class"), s.get(cell, classifier, "counts")
        y = np.mean([np.array(acc[seed])[np.argsort(counts[seed], kind="stable")[::-1]] for seed in acc], axis=0)
        ax.plot(100 * y, color=STYLE[style][0], marker=STYLE[style][1], label=name)
    sizes = sorted(next(iter(counts.values())), reverse=True)
    ax.set_xticks(range(len(sizes)), sizes)
    ax.set(xlabel="training images of the class", ylabel="accuracy of the class, %", ylim=(0, 100))
    ax.legend(ncols=2)
    fig.savefig(out / "fig4.png")

    fig, axes = plt.subplots(1, 2, figsize=(8.4, 4.4), layout="constrained")
    x = range(len(POSITIVES))
    for classifier, name, style in (("lt", "on the long tail", "kcl"), ("rep", "on the balanced set", "cl")):
        for ax, column in zip(axes, ("top1", "balancedness")):
            points(ax, x, [cell for _, cell in POSITIVES], classifier, column, name, STYLE[style])
    for ax, label in zip(axes, ("top-1, %", "balancedness (sigma = 0.1)")):
        ax.set_xticks(x, [k.replace(" ", "\n") for k, _ in POSITIVES])
        ax.set(xlabel="k, positives from the queue", ylabel=label)
    axes[0].legend(title="classifier trained", fontsize="small")
    fig.savefig(out / "fig5.png")

    fig, ax = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    for loss, name in NAMES.items():
        xy = [(100 * line["top1"], line["balancedness"]) for (cell, classifier), lines in s.lines.items()
              if classifier == "rep" and cell.split("-")[0] == loss for line in lines.values()]
        color, marker = STYLE[loss]
        ax.scatter(*np.array(xy).reshape(-1, 2).T, color=color, marker=marker, s=30, alpha=0.6, label=name)
    a = np.linspace(0.1, 1, 91)
    ax.plot(100 * a, [expected_beta(x, 100, 10) for x in a], color="black", linestyle="--", label="all classes equal")
    ax.set(xlabel="top-1, classifier on the balanced set, %", ylabel="balancedness (sigma = 0.1)")
    ax.legend(fontsize="small")
    fig.savefig(out / "beta.png")
    plt.close("all")


TABLES = {"main": main_table, "claims": claims_table, "balance": balance_table, "methods": methods_table,
          "fig2": fig2, "fig3": fig3, "table4": table4, "fig5": fig5, "ablations": ablations, "cost": cost,
          "sensitivity": sensitivity}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lines", type=Path, default=ROOT / "results/study.jsonl")
    p.add_argument("--files", type=Path, nargs="*", default=[ROOT / "results/findings.md", ROOT / "README.md"])
    p.add_argument("--pictures", type=Path, default=ROOT / "results/findings")
    args = p.parse_args()
    for file in (args.lines, *args.files):
        if not file.is_file():
            raise SystemExit(f"error: {file}: no such file; expected the lines of recipes/study.py, and texts with a "
                             "place for tables")
    s = Study(args.lines)
    for file in args.files:
        file.write_text(re.sub(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", lambda m: m[1] + TABLES[m[2]](s) + m[3],
                               file.read_text(), flags=re.S))
    draw(s, args.pictures)


if __name__ == "__main__":
    main()
