"""
What the lines of recipes/study.py say of the paper's findings.

    python recipes/findings.py    # writes results/findings.md, its pictures, and the table of README.md; trains nothing

A claim is a difference that is above 0 where the paper is right. All of a seed's cells see the same images, so the
difference is taken seed by seed, and its 95 % interval is Student's t over the seeds. A claim holds where the interval
lies above 0, is contradicted where it lies below, and is open otherwise. The claims were named before the runs. Those
of HEADLINE are many looks at one question: there Holm's p < 0.05 takes the place of the interval.
"""
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
        2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)    # quantiles of Student's t, n = 2 to 20

# ---- the claims: where in the paper, what it says, the column, and the difference of cell/classifier

HEADLINE = [
    # the paper's epochs: KCL 200, CE 90
    ("Table 2", "KCL, 200 epochs, above joint CE, 90", "top1", "kcl/lt - ce/joint"),
    ("Table 2", "KCL, 200 epochs, above tau-norm, 90", "top1", "kcl/lt - ce/tau"),
    ("Table 2", "KCL, 200 epochs, above cRT, 90", "top1", "kcl/lt - ce/lt"),
    ("Table 2", "KCL above FCL, 200 epochs each", "top1", "kcl/lt - fcl/lt"),
    ("Table 3", "KCL, 200 epochs, above LDAM-DRW, 90", "top1", "kcl/lt - ldam-drw/joint"),
    ("Fig. 4", "KCL's space, 200 epochs, more balanced than CE's, 90", "balancedness", "kcl/rep - ce/rep"),
    ("Fig. 4", "KCL's space, 200 epochs, better on few-shot classes than CE's, 90", "few", "kcl/rep - ce/rep"),
    # equal epochs
    ("ours", "KCL above joint CE, 200 epochs each", "top1", "kcl/lt - ce-200/joint"),
    ("ours", "KCL above tau-norm, 200 epochs each", "top1", "kcl/lt - ce-200/tau"),
    ("ours", "KCL above cRT, 200 epochs each", "top1", "kcl/lt - ce-200/lt"),
    ("ours", "KCL's space more balanced than CE's, 200 epochs each", "balancedness", "kcl/rep - ce-200/rep"),
    ("ours", "KCL's space better on few-shot classes than CE's, 200 epochs each", "few", "kcl/rep - ce-200/rep"),
    # equal CPU time
    ("ours", "KCL above joint CE, equal time", "top1", "kcl/lt - ce-280/joint"),
    ("ours", "KCL above tau-norm, equal time", "top1", "kcl/lt - ce-280/tau"),
    ("ours", "KCL above cRT, equal time", "top1", "kcl/lt - ce-280/lt"),
    ("ours", "KCL's space more balanced than CE's, equal time", "balancedness", "kcl/rep - ce-280/rep"),
    ("ours", "KCL's space better on few-shot classes than CE's, equal time", "few", "kcl/rep - ce-280/rep"),
]

CLAIMS = [
    ("Fig. 2", "CE loses accuracy from alpha 0 to 1", "top1", "ce-lt0/rep - ce/rep"),
    ("Fig. 2", "CL loses less accuracy than CE", "top1", "ce-lt0/rep - ce/rep - cl-lt0/rep + cl/rep"),
    ("Fig. 2", "KCL loses less accuracy than CE", "top1", "ce-lt0/rep - ce/rep - kcl-lt0/rep + kcl/rep"),
    ("Fig. 2", "CE loses balancedness from alpha 0 to 1", "balancedness", "ce-lt0/rep - ce/rep"),
    ("Fig. 2", "CL loses less balancedness than CE", "balancedness", "ce-lt0/rep - ce/rep - cl-lt0/rep + cl/rep"),
    ("Fig. 2", "KCL loses less balancedness than CE", "balancedness", "ce-lt0/rep - ce/rep - kcl-lt0/rep + kcl/rep"),
    ("Fig. 2", "CL's space is more balanced than CE's at alpha 1", "balancedness", "cl/rep - ce/rep"),
    ("Fig. 2", "CE is more accurate than CL at alpha 1", "top1", "ce/rep - cl/rep"),
    ("Fig. 3", "CE's balancedness on the source falls from alpha 0 to 1", "balancedness",
     "ce-overlap-lt0/source - ce-overlap-lt/source"),
    ("Fig. 3", "CE's accuracy on new classes falls with it", "top1", "ce-overlap-lt0/target - ce-overlap-lt/target"),
    ("Table 2", "KCL above CE with class-balanced sampling (SL-c)", "top1", "kcl/lt - ce-class/joint"),
    ("Table 2", "KCL above CE with square-root sampling (SL-s)", "top1", "kcl/lt - ce-sqrt/joint"),
    ("Table 2", "KCL above CE with progressive sampling (SL-p)", "top1", "kcl/lt - ce-progressive/joint"),
    ("Table 2", "FCL above cRT", "top1", "fcl/lt - ce/lt"),
    ("Table 3", "KCL above CB-Focal", "top1", "kcl/lt - cb-focal/joint"),
    ("Table 3", "KCL above LDAM", "top1", "kcl/lt - ldam/joint"),
    ("Table 3", "KCL above BBN", "top1", "kcl/lt - bbn/joint"),
    ("Fig. 4", "KCL's space is more balanced than SL-c's", "balancedness", "kcl/rep - ce-class/rep"),
    ("Fig. 4", "KCL's space is more balanced than SL-s's", "balancedness", "kcl/rep - ce-sqrt/rep"),
    ("Fig. 4", "KCL's space is more balanced than SL-p's", "balancedness", "kcl/rep - ce-progressive/rep"),
    ("Fig. 4", "KCL's space is more balanced than FCL's", "balancedness", "kcl/rep - fcl/rep"),
    ("Fig. 4", "KCL's space is more accurate than CL's", "top1", "kcl/rep - cl/rep"),
    ("Table 4", "overlap: CE's gap is larger than CL's", "top1",
     "ce-overlap/source - ce-overlap/target - cl-overlap/source + cl-overlap/target"),
    ("Table 4", "independent: CE's gap is larger than CL's", "top1",
     "ce-independent/source - ce-independent/target - cl-independent/source + cl-independent/target"),
    ("Table 4", "overlap: CE above CL on the target", "top1", "ce-overlap/target - cl-overlap/target"),
    ("Table 4", "independent: CL above CE on the target", "top1", "cl-independent/target - ce-independent/target"),
    ("Table 4", "overlap: KCL above CE on the target", "top1", "kcl-overlap/target - ce-overlap/target"),
    ("Table 4", "overlap: KCL above CL on the target", "top1", "kcl-overlap/target - cl-overlap/target"),
    ("Table 4", "independent: KCL above CE on the target", "top1", "kcl-independent/target - ce-independent/target"),
    ("Table 4", "independent: KCL above CL on the target", "top1", "kcl-independent/target - cl-independent/target"),
    ("Table 4", "overlap: KCL above CE on all classes", "top1", "kcl-overlap/full - ce-overlap/full"),
    ("Table 4", "independent: KCL above CE on all classes", "top1", "kcl-independent/full - ce-independent/full"),
    ("Table 4", "on all classes CE loses more than CL from overlap to independent", "top1",
     "ce-overlap/full - ce-independent/full - cl-overlap/full + cl-independent/full"),
    ("Fig. 5", "k = 6 above k = 0", "top1", "kcl/lt - cl/lt"),
    ("Fig. 5", "k = 6 above k = 1", "top1", "kcl/lt - kcl-k1/lt"),
    ("Fig. 5", "k = 6 above k = 2", "top1", "kcl/lt - kcl-k2/lt"),
    ("Fig. 5", "k = 6 above k = 4", "top1", "kcl/lt - kcl-k4/lt"),
    ("Fig. 5", "k = 6 above k = 10", "top1", "kcl/lt - kcl-k10/lt"),
    ("Fig. 5", "k = 6 above k = 20", "top1", "kcl/lt - kcl-k20/lt"),
    ("Table 1", "detection: CL above CE", "box AP", "det-cl/det - det-ce/det"),
    ("Table 11", "detection: KCL above CL", "box AP", "det-kcl/det - det-cl/det"),
    ("Table 11", "detection: KCL above CE", "box AP", "det-kcl/det - det-ce/det"),
    # not the paper's: choices that it leaves open, as train_rep.py makes them
    ("open there", "random positives above the k lowest slots", "top1", "kcl/lt - kcl-first-k/lt"),
    ("open there", "dividing by the positives found above dividing by k + 1", "top1", "kcl/lt - kcl-fixed-divisor/lt"),
    ("open there", "unused positives in the denominator above leaving them out", "top1", "kcl/lt - kcl-drop-unused/lt"),
    ("open there", "a queue of real keys at the start above a random one", "top1", "kcl/lt - kcl-no-fill/lt"),
]

ROWS = {
    "KCL": "kcl/lt", "FCL (all)": "fcl/lt", "CL (k = 0)": "cl/lt",
    "CE, joint (SL-i)": "ce/joint", "CE, tau-norm": "ce/tau", "CE, cRT": "ce/lt",
    "CE, LWS": "ce/lws", "CE, NCM": "ce/ncm",
    "CE 200 epochs, joint": "ce-200/joint", "CE 200, tau-norm": "ce-200/tau", "CE 200, cRT": "ce-200/lt",
    "CE 280 epochs, joint": "ce-280/joint", "CE 280, tau-norm": "ce-280/tau", "CE 280, cRT": "ce-280/lt",
    "CE, class-balanced sampling (SL-c)": "ce-class/joint", "CE, square-root (SL-s)": "ce-sqrt/joint",
    "CE, progressive (SL-p)": "ce-progressive/joint",
    "Focal": "focal/joint", "CB-Focal": "cb-focal/joint", "LDAM": "ldam/joint", "LDAM-DRW": "ldam-drw/joint",
    "BBN": "bbn/joint", "SSP, CE from CL": "ssp/joint", "SupCon, FCL in the batch": "supcon/lt", "TSC": "tsc/lt",
    "KCL, k = 1": "kcl-k1/lt", "KCL, k = 2": "kcl-k2/lt", "KCL, k = 4": "kcl-k4/lt", "KCL, k = 10": "kcl-k10/lt",
    "KCL, k = 20": "kcl-k20/lt", "KCL, divided by k + 1": "kcl-fixed-divisor/lt",
    "KCL, the k lowest slots": "kcl-first-k/lt", "KCL, unused positives left out": "kcl-drop-unused/lt",
    "KCL, random queue at the start": "kcl-no-fill/lt", "KCL, learning rate 0.1": "kcl-lr-0.1/lt",
}


# ---- statistics

def interval(x):
    """The mean of x (n,) and half the width of its 95 % interval, nan for n = 1."""
    n = len(x)
    return np.mean(x), T975[n - 2] * np.std(x, ddof=1) / n ** 0.5 if n > 1 else math.nan


def p_value(x):
    """Of the two-sided t-test that x (n,) has mean 0: 1 - 2 * the integral of t's density from 0 to |t|."""
    n = len(x)
    t = abs(np.mean(x)) / (np.std(x, ddof=1) / n ** 0.5)
    u = (np.arange(100_000) + 0.5) / 100_000 * t
    density = (1 + u ** 2 / (n - 1)) ** (-n / 2)
    density *= math.gamma(n / 2) / math.gamma((n - 1) / 2) / math.sqrt((n - 1) * math.pi)
    return max(0.0, 1 - 2 * density.mean() * t)


def holm(p):
    """Adjusted p-values (Holm 1979): who rejects those below 0.05 is wrong anywhere with a chance of at most 0.05."""
    adjusted, largest = np.empty(len(p)), 0.0
    for rank, i in enumerate(np.argsort(p)):
        largest = max(largest, (len(p) - rank) * p[i])
        adjusted[i] = min(1.0, largest)
    return adjusted


def judge(lines):
    """[(paper, claim, column, difference (n,), Holm's p or None, verdict)] of the claims whose cells have lines."""
    rows = []
    for family in (HEADLINE, CLAIMS):
        found = [(*claim[:3], difference(lines, *claim[2:])) for claim in family]
        found = [row for row in found if len(row[3]) > 1]
        adjusted = holm([p_value(x) for *_, x in found]) if family is HEADLINE else [None] * len(found)
        for (*claim, x), p in zip(found, adjusted):
            mean, half = interval(x)
            clear = abs(mean) > half if p is None else p < 0.05
            rows.append((*claim, x, p, "open" if not clear else "holds" if mean > 0 else "contradicted"))
    return rows


# ---- the lines

def read(file):
    """{cell/classifier: {seed: line}}. Seconds compare on one machine: lines of another than the first lose theirs."""
    lines, first = {}, None
    for line in map(json.loads, file.read_text().splitlines()):
        first = first or line["machine"]
        if line["machine"] != first:
            line.pop("seconds", None)
        lines.setdefault(f"{line['cell']}/{line['classifier']}", {})[line["seed"]] = line
    return lines


def number(line, column):
    """Accuracies in percent; "box AP", of a detector, is so already."""
    if " " in column:
        part, measure = column.split()
        return line[part][measure]
    return line[column] if column in ("balancedness", "seconds") else 100 * line[column]


def difference(lines, column, expression):
    """(n,): `kcl/lt`, or `a/lt - b/lt + c/rep`, on each seed for which all of its terms have it."""
    sign, terms = 1, []
    for word in expression.split():
        if word in ("+", "-"):
            sign = 1 if word == "+" else -1
        else:
            its = {seed: line for seed, line in lines.get(word, {}).items() if column.split()[0] in line}
            terms.append({seed: sign * number(line, column) for seed, line in its.items()})
    seeds = set.intersection(*map(set, terms))
    return np.array([sum(term[seed] for term in terms) for seed in sorted(seeds)])


# ---- the tables. A cell is a text, or (column, expression): its mean and 95 % interval

TAIL, BALANCED = ("top1", "many", "medium", "few", "balancedness"), ("top1", "few", "balancedness")
ALPHAS = {"0": "-lt0", "0.2": "-lt2", "0.4": "-lt4", "0.6": "-lt6", "0.8": "-lt8", "1": ""}
LOSSES = {"CE": "ce", "CL": "cl", "KCL": "kcl"}
SIX = (("CE, joint", "ce/joint"), ("CE, tau-norm", "ce/tau"), ("CE, cRT", "ce/lt"), ("KCL", "kcl/lt"),
       ("balanced set: CE", "ce/rep"), ("balanced set: KCL", "kcl/rep"))  # of the main job


def show(x, column, sign=""):
    digits = {"balancedness": 3, "seconds": 0}.get(column, 1)
    if not len(x):
        return "-"
    mean, half = interval(x)
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if len(x) > 1 and digits else "")


def table(lines, header, rows):
    """Markdown. Of a row with numbers, the second column is n. Rows of which nothing has been run are left out."""
    text, n = "", []
    for name, *cells in rows:
        texts, seeds = [], set()
        for cell in cells:
            if not isinstance(cell, str):
                x = difference(lines, *cell)
                seeds |= {len(x)} - {0}
                cell = show(x, cell[0])
            texts.append(cell)
        if set(texts) - {"-"}:
            n = [" to ".join(map(str, sorted({min(seeds), max(seeds)})))] if seeds else []
            text += f"| {' | '.join([name, *n, *texts])} |\n"
    if n:
        header = header.replace(" |", " | n |", 1)
    head = f"| {header} |\n" + "|---" * (header.count("|") + 1) + "|\n"
    return head + text if text else "Not run yet.\n"


def columns(names, expression):
    return [(name, expression) for name in names]


def main_table(lines):
    return table(lines, " | all | many | medium | few | beta", [(name, *columns(TAIL, of)) for name, of in SIX])


def methods_table(lines):
    """A representation's numbers on the balanced set stand beside its first classifier. The seconds are also those of
    the runs that chose its learning rate. KCL minus it: on their common seeds, which makes the interval narrow."""
    seen, rows, tried = set(), [], tried_rates(lines)
    for name, of in ROWS.items():
        cell, _, classifier = of.partition("/")
        balanced = ["-"] * 3 if cell in seen else columns(BALANCED, f"{cell}/rep")
        same = [of, *(trial for trial in tried.get(cell, {}).values() if trial.endswith(f"/{classifier}"))]
        seconds = np.concatenate([difference(lines, "seconds", one) for one in same])
        if of in lines:
            minus = "-" if of == "kcl/lt" else ("top1", f"kcl/lt - {of}")
            rows.append((name, *columns(TAIL, of), minus, *balanced, f"{seconds.mean():.0f}" if len(seconds) else "-"))
        seen.add(cell)
    header = " | all | many | medium | few | beta | KCL minus it: all | balanced set: all | few | beta | CPU s"
    return table(lines, header, rows)


def claims_table(rows, kind):
    cells = []
    for paper, claim, column, x, p, verdict in rows:
        if verdict == kind:
            holm_p = "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
            cells.append((paper, claim, str(len(x)), show(x, column, "+"), holm_p))
    return table({}, "paper | claim | n | difference | Holm's p", cells) if cells else "None.\n"


def tried_rates(lines):
    """{method: {rate: cell/classifier}} of the runs that chose a learning rate."""
    tried = {}
    for name in lines:
        if name.startswith("tune-"):
            method, rate = name.partition("/")[0].removeprefix("tune-").rsplit("-", 1)
            tried.setdefault(method, {})[rate] = name
    return tried


def rates_table(lines):
    rows = []
    for method, tried in tried_rates(lines).items():
        of = {rate: difference(lines, "top1", name) for rate, name in tried.items()}
        if len(of) < 4 or len(set(map(len, of.values()))) > 1:
            continue  # not all have been tried yet
        of = {rate: top1.mean() for rate, top1 in of.items()}
        rates = sorted(of, key=float)
        best = max(rates, key=of.get)
        rows.append((method, *(f"**{of[rate]:.1f}**" if rate == best else f"{of[rate]:.1f}" for rate in rates)))
    return table({}, " | " + " | ".join(rates), rows) if rows else ""


def sizes_table(lines):
    """What the digits' defaults, width 16, batch 64 and a queue of 512, were chosen among."""
    def mean(column, name):
        of_two = {seed: line for seed, line in lines.get(name, {}).items() if seed in (10, 11)}
        x = difference({name: of_two}, column, name)
        return f"{x.mean():.{int(column == 'top1')}f}" if len(x) else "-"

    sizes = {"as they are": ("tune-kcl-0.1", "tune-ce-0.3")}
    sizes |= {size.replace("-", " "): (f"size-kcl-{size}", f"size-ce-{size}")
              for size in ("width-24", "width-32", "batch-32", "batch-128", "queue-256", "queue-1024")}
    rows = [(size, *(mean(column, name) for name in (f"{kcl}/lt", f"{ce}/lt") for column in ("top1", "seconds")))
            for size, (kcl, ce) in sizes.items()]
    return table({}, " | KCL | s | cRT | s", rows)


PAGE = """# The paper's findings in miniature

```
python recipes/study.py       # trains and evaluates; stopped, it goes on where it was
python recipes/findings.py    # this page, from the lines of results/study.jsonl
```

The embedded digits in clutter, 10 classes. The long tail, alpha = 1, has 864 images, 350 to 3 a class; its classes are
in another order for each seed. Where nothing else is said, contrastive losses train for 200 epochs and losses on logits
for 90, the paper's numbers. Numbers are means with 95 % intervals (Student's t) over n seeds, in percent but for beta,
whose sigma is 0.1. Learning rates were chosen on val with seeds 10 to 13; seeds from 100 on are reported.
Runs, one thread each: {machines}.

"Long tail": a classifier trained on the long-tailed list with class-balanced sampling, on CE features cRT; or the head
that was trained along. "Balanced set": a classifier trained on all 3,500 images, which measures the feature space; each
image is encoded once, not augmented, where the paper augments it anew in each epoch.

## The claims

They stand in [recipes/findings.py](../recipes/findings.py) since before the runs, each as a difference that is above
0 where the paper is right. *Ours* are those at equal epochs and at equal CPU time, which the paper does not compare.
KCL's learning rate is younger than the claims: it was chosen anew after test results had been seen
([below](#learning-rates)).

The {headline} claims with a p-value are one family: KCL against CE, FCL and LDAM-DRW at the paper's epochs, at equal
epochs and at equal CPU time. A claim of the family is **open** unless Holm's p is below 0.05; then it **holds** where
the difference is above 0, and is **contradicted** where it is below. The other {others} go by their 95 % intervals:
above 0, below 0, or open. They are not corrected for their number: were all their differences 0, about
{by_chance:.1f} would leave the list of open ones.

There are 20 seeds for the family, 10 for the ends of Fig. 2, and 5 for all else, which takes 2.5 CPU hours a seed. The
plan had 10 there until two rows had 7.

### Hold

{holds}
### Contradicted

{contradicted}
### Open

{open}
## Every method

{methods}
"KCL minus it" is of the seeds that both have, with the same images and the same order of the classes: compare rows of
different n by it. KCL, FCL, LDAM-DRW, SupCon and TSC ran on the Xeon, CE on the EPYC with another torch, which round
in other ways; on one GPU KCL minus joint CE is {gpu_joint}, minus cRT {gpu_crt}.

Since these runs the augmentation computes its grid in another order, which rounds in other places. Seeds 100 to 104
once more, on the EPYC (their lines taken out of study.jsonl, then `python recipes/study.py --only kcl ce`): joint CE
+0.1 ± 0.3 against the lines, cRT -0.3 ± 1.3, KCL +0.2 ± 2.1, KCL minus cRT +2.2 ± 2.2.

CE's 280 epochs take the CPU time of KCL's 200: on one core, in turn, a KCL step takes 1.38 of a CE step. CPU seconds
are those on {machine}, of a method that ran elsewhere those of its trials; they change by a fifth from day to day.

## Accuracy and balancedness against alpha (Fig. 2)

{fig2}A classifier on the balanced set. KCL is {kcl_lt0} above CE at alpha 0 already; the paper has chosen the epochs so
that both are level on balanced data. CL, which sees no label, is far below both and has little to lose: its beta does
not compare with theirs.

{alphas}
## New classes (Fig. 3)

{fig3}The representation is trained on five classes of each long tail. The classifier is trained on all images of these
five (source), or of the other five (target).

{new_classes}
## Near and far classes (Table 4)

The representation is trained on all images of five classes, the source. The paper's *independent* halves share no super
class. Digits have none: 0-4 and 5-9 are independent in name only, so that a verdict on them does not judge the paper's.
These runs are a GPU's, an H200.

{halves}
## How many positives (Fig. 5)

{fig5}The numbers stand in the table of methods. The points have different n: compare two k by the claims, which take
common seeds.

## Detection (Tables 1, 5)

Scenes of digits, a Mask R-CNN fine-tuned from backbones of the long tail. A seed draws the backbone's training, the
detector's and the order of the scenes.

{detection}
## On a GPU

The cells ce and kcl once more, by the same commands on one H100 (recipes/study.py itself hides a GPU, for Table 4 too).
Its convolutions round to TF32, and it draws other random numbers.

{gpu}
## Learning rates

Top-1 on val, four seeds; CE's is that of cRT. SSP, CE's samplers and its 200 and 280 epochs take CE's rate, all
variants of KCL KCL's. CL's is the lowest tried. At first two seeds, 10 and 11, chose, and KCL had the rate 0.1: the
last row of the table of methods. Two seeds cannot tell 0.1 from 0.3, so all rates were chosen anew with four, after
the test results with 0.1 had been seen. Four cannot either: on val KCL with 0.3 is {rates_differ} above KCL with 0.1.

{rates}
## Other sizes

Top-1 on val and CPU seconds, seeds 10 and 11, with the learning rates 0.1 (KCL) and 0.3 (CE) times batch / 64. The
sizes were kept as they are: width makes the quick start too slow, and two seeds cannot tell whether a queue of 256 is
better. Width 24 and batch 32 favoured cRT.

{sizes}"""


def page(lines):
    rows = judge(lines)
    others = sum(p is None for *_, p, _ in rows)
    machine_of = {(line["cell"], seed): line["machine"] for of in lines.values() for seed, line in of.items()}
    machines = Counter(machine_of.values())                              # that of the first line first
    texts = {kind: claims_table(rows, kind) for kind in ("holds", "contradicted", "open")}
    texts["methods"], texts["sizes"] = methods_table(lines), sizes_table(lines)

    alphas, new_classes, halves = [], [], []
    for alpha, suffix in ALPHAS.items():
        alphas.append([alpha])
        new_classes.append([alpha])
        for loss in LOSSES.values():
            alphas[-1] += columns(("top1", "balancedness"), f"{loss}{suffix}/rep")
            new_classes[-1] += columns(("top1", "balancedness"), f"{loss}-overlap{suffix or '-lt'}/source")
            new_classes[-1] += columns(("top1",), f"{loss}-overlap{suffix or '-lt'}/target")
    texts["alphas"] = table(lines, "alpha" + "".join(f" | {name} | beta" for name in LOSSES), alphas)
    texts["new_classes"] = table(
        lines, "alpha" + "".join(f" | {name}: source | beta | target" for name in LOSSES), new_classes)

    for half in ("overlap", "independent"):
        for name, loss in LOSSES.items():
            of = f"{loss}-{half}"
            expressions = (f"{of}/source", f"{of}/target", f"{of}/source - {of}/target", f"{of}/full")
            halves.append((f"{half}: {name}", *(("top1", expression) for expression in expressions)))
    texts["halves"] = table(lines, " | source | target | gap | all classes", halves)

    texts["gpu"] = table(lines, " | top-1 | minus the CPU's | beta | minus the CPU's",
                         [(name, *(cell for column in ("top1", "balancedness") for cell in
                                   ((column, f"gpu-{of}"), (column, f"gpu-{of} - {of}")))) for name, of in SIX])

    measures = [f"{part} {measure}" for part in ("box", "mask") for measure in ("AP", "AP50", "AP75")]
    starts = LOSSES | {"random weights": "random"}
    texts["detection"] = table(lines, "start | " + " | ".join(measures),
                               [(name, *columns(measures, f"det-{start}/det")) for name, start in starts.items()])
    for name, column, expression in (("gpu_joint", "top1", "gpu-kcl/lt - gpu-ce/joint"),
                                     ("gpu_crt", "top1", "gpu-kcl/lt - gpu-ce/lt"),
                                     ("kcl_lt0", "top1", "kcl-lt0/rep - ce-lt0/rep"),
                                     ("rates_differ", "top1", "tune-kcl-0.3/lt - tune-kcl-0.1/lt")):
        texts[name] = show(difference(lines, column, expression), column, "+")
    for picture, (title, *_, curves) in pictures().items():
        texts[picture] = f"![{title}](findings/{picture}.png)\n\n" if complete(lines, curves) else ""
    return PAGE.format(headline=len(rows) - others, others=others, by_chance=0.05 * others,
                       rates=rates_table(lines), machine=next(iter(machines)),
                       machines="; ".join(f"{n} on {name}" for name, n in machines.items()), **texts)


# ---- the pictures: Okabe and Ito's colours, which a colour-blind reader can tell apart, and a marker each

STYLES = {"CE": ("#D55E00", "o"), "CE, joint": ("#D55E00", "o"), "CE, cRT": ("#0072B2", "s"), "CL": ("#0072B2", "s"),
          "KCL": ("#009E73", "D"), "long tail": ("#009E73", "D"), "balanced set": ("#E69F00", "v")}


def curve(ax, x, samples, name):
    """Means of samples [(n,)] with the band of their 95 % intervals."""
    mean, half = np.array([interval(sample) for sample in samples]).T
    ax.plot(x, mean, *STYLES[name][1:], color=STYLES[name][0], linestyle="-", label=name)
    ax.fill_between(x, mean - half, mean + half, color=STYLES[name][0], alpha=0.2, linewidth=0)


def pictures():
    """{file: (title, x, label of x, {curve: (what top-1 is of, what balancedness is of)})}."""
    fig2, fig3 = {}, {}
    for name, loss in LOSSES.items():
        fig2[name] = [[f"{loss}{suffix}/rep" for suffix in ALPHAS.values()]] * 2
        fig3[name] = [[f"{loss}-overlap{suffix or '-lt'}/{side}" for suffix in ALPHAS.values()]
                      for side in ("target", "source")]
    cells = {"0\n(CL)": "cl", "1": "kcl-k1", "2": "kcl-k2", "4": "kcl-k4", "6": "kcl", "10": "kcl-k10", "20": "kcl-k20",
             "all\n(FCL)": "fcl"}
    fig5 = {"long tail": [[f"{cell}/lt" for cell in cells.values()]] * 2,
            "balanced set": [[f"{cell}/rep" for cell in cells.values()]] * 2}
    return {"fig2": ("Accuracy and balancedness against alpha", list(ALPHAS), "alpha", fig2),
            "fig3": ("Accuracy on new classes, balancedness on the old", list(ALPHAS), "alpha", fig3),
            "fig5": ("Accuracy and balancedness against k", list(cells), "k", fig5)}


def complete(lines, curves):
    """Whether each of them has 5 seeds: with fewer its band would hide the picture."""
    return all(len(lines.get(of, ())) >= 5 for sides in curves.values() for side in sides for of in side)


def two_panels(plt, lines, file, x, xlabel, curves):
    """Top-1 and balancedness of an entry of pictures()."""
    fig, axes = plt.subplots(1, 2, figsize=(6.4, 3.4), layout="constrained")
    for ax, column, ylabel, side in zip(axes, ("top1", "balancedness"), ("top-1, %", "balancedness"), (0, 1)):
        for name, expressions in curves.items():
            curve(ax, x, [difference(lines, column, expression) for expression in expressions[side]], name)
        ax.set(xlabel=xlabel, ylabel=ylabel)
    axes[0].legend()
    fig.savefig(file)


def tail(plt, lines, file):
    """The picture on top of README.md: accuracy of each class against its training images."""
    fig, ax = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    few, shifts = [], (1.04, 1, 0.96)                                     # of x, so that no bar hides another
    for name, of, said, shift in zip(("CE, joint", "CE, cRT", "KCL"), ("ce/joint", "ce/lt", "kcl/lt"),
                                     ("plain CE", "CE with a new classifier (cRT)", "KCL"), shifts):
        few.append(f"{said} {difference(lines, 'few', of).mean():.0f} %")
        accuracy = []  # of each seed, largest class first
        for line in lines[of].values():
            order = np.argsort(line["counts"], kind="stable")[::-1]
            sizes = np.array(line["counts"])[order]
            accuracy.append(100 * np.array(line["per_class"])[order])
        mean, half = np.transpose([interval(x) for x in np.array(accuracy).T])                   # (C,) each
        color, marker = STYLES[name]
        ax.errorbar(sizes * shift, mean, half, color=color, marker=marker, capsize=3, label=said)
    ax.axvspan(20, 2.5, color="0.92", zorder=0)
    ax.set(xscale="log", xlim=(420, 2.5), ylim=(0, 100), xlabel="training images of the class (each of 10 digits)",
           ylabel="test accuracy of the class, %",
           title=f"Test accuracy on classes with fewer than 20 images (grey):\n{', '.join(few)}")
    ax.legend(loc="lower left", title=f"mean of {len(accuracy)} seeds, 95 % interval")
    ax.set_xticks(sizes, sizes)
    ax.minorticks_off()
    fig.savefig(file)


def draw(lines, folder):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 11, "figure.facecolor": "white", "savefig.dpi": 150,
                         "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
    tail(plt, lines, folder / "tail.png")
    (folder / "findings").mkdir(exist_ok=True)
    for name, (_, x, xlabel, curves) in pictures().items():
        if complete(lines, curves):
            two_panels(plt, lines, folder / f"findings/{name}.png", x, xlabel, curves)
    plt.close("all")


def honest(lines):
    """The lines below README.md's table: KCL minus CE in each regime of HEADLINE."""
    text = ""
    for what, column, kcl, of in (("KCL minus joint CE, top-1", "top1", "lt", "joint"),
                                  ("KCL minus cRT, top-1", "top1", "lt", "lt"),
                                  ("KCL minus CE, beta on the balanced set", "balancedness", "rep", "rep"),
                                  ("KCL minus CE, few-shot classes on the balanced set", "few", "rep", "rep")):
        parts = []
        for ce, when in (("ce", "with the paper's epochs"), ("ce-200", "with 200 epochs each"),
                         ("ce-280", "with equal CPU time")):
            x = difference(lines, column, f"kcl/{kcl} - {ce}/{of}")
            parts.append(f"{show(x, column, '+')} {when} (n = {len(x)})" if len(x) else f"not run yet {when}")
        text += f"- {what}: {', '.join(parts)}.\n"
    x = difference(lines, "top1", "kcl-lr-0.1/lt - ce/lt")
    if len(x):
        text += ("- KCL minus cRT, top-1, with the learning rate that KCL had until test results had been seen, 0.1 in "
                 f"place of 0.3: {show(x, 'top1', '+')} (n = {len(x)}).\n")
    return text


def with_numbers(readme, lines):
    """The text of README.md with the numbers between its markers."""
    for name, text in (("main", main_table(lines)), ("honest", honest(lines))):
        begin = f"<!-- {name} -->\n"
        before, found, rest = readme.partition(begin)
        if found:
            readme = before + begin + text + rest[rest.index("<!-- end -->"):]
    return readme


def main():
    lines, readme = read(ROOT / "results/study.jsonl"), ROOT / "README.md"
    (ROOT / "results/findings.md").write_text(page(lines))
    readme.write_text(with_numbers(readme.read_text(), lines))
    draw(lines, ROOT / "results")


if __name__ == "__main__":
    main()
