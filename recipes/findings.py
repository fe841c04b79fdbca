"""
What the results of recipes/study.py say about the paper's findings.

    python recipes/findings.py    # writes results/findings.md, its pictures, and the table in README.md; trains nothing

A claim is a difference that is above 0 if the paper is right. All cells of a seed see the same images, so the
difference is taken seed by seed, and its 95 % interval is Student's t over the seeds. A claim holds if the interval
is above 0, is contradicted if it is below 0, and is open otherwise. The claims were written down before the runs. The
claims of HEADLINE ask one question many times, so they are judged by Holm's p < 0.05 instead of the interval.
"""
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.plots import OKABE_ITO, largest_first, plt

ROOT = Path(__file__).resolve().parent.parent
# 97.5 % quantiles of Student's t, n = 2 to 20
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
        2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)

# ---- the claims: where in the paper, what it says, the column, and a difference between cell/classifier entries

HEADLINE = [
    # the paper's epochs: KCL 200, CE 90
    ("Table 2", "KCL, 200 epochs, above joint CE, 90", "top1", "kcl/lt - ce/joint"),
    ("Table 2", "KCL, 200 epochs, above tau-norm, 90", "top1", "kcl/lt - ce/tau"),
    ("Table 2", "KCL, 200 epochs, above cRT, 90", "top1", "kcl/lt - ce/lt"),
    ("Table 2", "KCL above FCL, 200 epochs each", "top1", "kcl/lt - fcl/lt"),
    ("Table 3", "KCL, 200 epochs, above LDAM-DRW, 90", "top1", "kcl/lt - ldam-drw/joint"),
    ("Fig. 4", "KCL's space, 200 epochs, more balanced than CE's, 90", "balancedness",
     "kcl/rep - ce/rep"),
    ("Fig. 4", "KCL's space, 200 epochs, better on few-shot classes than CE's, 90", "few",
     "kcl/rep - ce/rep"),
    # equal epochs
    ("ours", "KCL above joint CE, 200 epochs each", "top1", "kcl/lt - ce-200/joint"),
    ("ours", "KCL above tau-norm, 200 epochs each", "top1", "kcl/lt - ce-200/tau"),
    ("ours", "KCL above cRT, 200 epochs each", "top1", "kcl/lt - ce-200/lt"),
    ("ours", "KCL's space more balanced than CE's, 200 epochs each", "balancedness",
     "kcl/rep - ce-200/rep"),
    ("ours", "KCL's space better on few-shot classes than CE's, 200 epochs each", "few",
     "kcl/rep - ce-200/rep"),
    # equal CPU time
    ("ours", "KCL above joint CE, equal time", "top1", "kcl/lt - ce-280/joint"),
    ("ours", "KCL above tau-norm, equal time", "top1", "kcl/lt - ce-280/tau"),
    ("ours", "KCL above cRT, equal time", "top1", "kcl/lt - ce-280/lt"),
    ("ours", "KCL's space more balanced than CE's, equal time", "balancedness",
     "kcl/rep - ce-280/rep"),
    ("ours", "KCL's space better on few-shot classes than CE's, equal time", "few",
     "kcl/rep - ce-280/rep"),
]

CLAIMS = [
    ("Fig. 2", "CE loses accuracy from alpha 0 to 1", "top1", "ce-lt0/rep - ce/rep"),
    ("Fig. 2", "CL loses less accuracy than CE", "top1",
     "ce-lt0/rep - ce/rep - cl-lt0/rep + cl/rep"),
    ("Fig. 2", "KCL loses less accuracy than CE", "top1",
     "ce-lt0/rep - ce/rep - kcl-lt0/rep + kcl/rep"),
    ("Fig. 2", "CE loses balancedness from alpha 0 to 1", "balancedness", "ce-lt0/rep - ce/rep"),
    ("Fig. 2", "CL loses less balancedness than CE", "balancedness",
     "ce-lt0/rep - ce/rep - cl-lt0/rep + cl/rep"),
    ("Fig. 2", "KCL loses less balancedness than CE", "balancedness",
     "ce-lt0/rep - ce/rep - kcl-lt0/rep + kcl/rep"),
    ("Fig. 2", "CL's space is more balanced than CE's at alpha 1", "balancedness",
     "cl/rep - ce/rep"),
    ("Fig. 2", "CE is more accurate than CL at alpha 1", "top1", "ce/rep - cl/rep"),
    ("Fig. 3", "CE's balancedness on the source falls from alpha 0 to 1", "balancedness",
     "ce-overlap-lt0/source - ce-overlap-lt/source"),
    ("Fig. 3", "CE's accuracy on new classes falls with it", "top1",
     "ce-overlap-lt0/target - ce-overlap-lt/target"),
    ("Table 2", "KCL above CE with class-balanced sampling (SL-c)", "top1",
     "kcl/lt - ce-class/joint"),
    ("Table 2", "KCL above CE with square-root sampling (SL-s)", "top1", "kcl/lt - ce-sqrt/joint"),
    ("Table 2", "KCL above CE with progressive sampling (SL-p)", "top1",
     "kcl/lt - ce-progressive/joint"),
    ("Table 2", "FCL above cRT", "top1", "fcl/lt - ce/lt"),
    ("Table 3", "KCL above CB-Focal", "top1", "kcl/lt - cb-focal/joint"),
    ("Table 3", "KCL above LDAM", "top1", "kcl/lt - ldam/joint"),
    ("Table 3", "KCL above BBN", "top1", "kcl/lt - bbn/joint"),
    ("Fig. 4", "KCL's space is more balanced than SL-c's", "balancedness",
     "kcl/rep - ce-class/rep"),
    ("Fig. 4", "KCL's space is more balanced than SL-s's", "balancedness", "kcl/rep - ce-sqrt/rep"),
    ("Fig. 4", "KCL's space is more balanced than SL-p's", "balancedness",
     "kcl/rep - ce-progressive/rep"),
    ("Fig. 4", "KCL's space is more balanced than FCL's", "balancedness", "kcl/rep - fcl/rep"),
    ("Fig. 4", "KCL's space is more accurate than CL's", "top1", "kcl/rep - cl/rep"),
    ("Table 4", "overlap: CE's gap is larger than CL's", "top1",
     "ce-overlap/source - ce-overlap/target - cl-overlap/source + cl-overlap/target"),
    ("Table 4", "independent: CE's gap is larger than CL's", "top1",
     "ce-independent/source - ce-independent/target"
     " - cl-independent/source + cl-independent/target"),
    ("Table 4", "overlap: CE above CL on the target", "top1",
     "ce-overlap/target - cl-overlap/target"),
    ("Table 4", "independent: CL above CE on the target", "top1",
     "cl-independent/target - ce-independent/target"),
    ("Table 4", "overlap: KCL above CE on the target", "top1",
     "kcl-overlap/target - ce-overlap/target"),
    ("Table 4", "overlap: KCL above CL on the target", "top1",
     "kcl-overlap/target - cl-overlap/target"),
    ("Table 4", "independent: KCL above CE on the target", "top1",
     "kcl-independent/target - ce-independent/target"),
    ("Table 4", "independent: KCL above CL on the target", "top1",
     "kcl-independent/target - cl-independent/target"),
    ("Table 4", "overlap: KCL above CE on all classes", "top1",
     "kcl-overlap/full - ce-overlap/full"),
    ("Table 4", "independent: KCL above CE on all classes", "top1",
     "kcl-independent/full - ce-independent/full"),
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
    # not claims of the paper, but choices that it leaves open: train_rep.py's defaults against the alternatives
    ("open there", "random positives above the k lowest slots", "top1", "kcl/lt - kcl-first-k/lt"),
    ("open there", "dividing by the positives found above dividing by k + 1", "top1",
     "kcl/lt - kcl-fixed-divisor/lt"),
    ("open there", "unused positives in the denominator above leaving them out", "top1",
     "kcl/lt - kcl-drop-unused/lt"),
    ("open there", "a queue of real keys at the start above a random one", "top1",
     "kcl/lt - kcl-no-fill/lt"),
]

# the rows of the table of methods: name -> cell/classifier
ROWS = {
    "KCL": "kcl/lt",
    "FCL (all)": "fcl/lt",
    "CL (k = 0)": "cl/lt",
    "CE, joint (SL-i)": "ce/joint",
    "CE, tau-norm": "ce/tau",
    "CE, cRT": "ce/lt",
    "CE, LWS": "ce/lws",
    "CE, NCM": "ce/ncm",
    "CE 200 epochs, joint": "ce-200/joint",
    "CE 200, tau-norm": "ce-200/tau",
    "CE 200, cRT": "ce-200/lt",
    "CE 280 epochs, joint": "ce-280/joint",
    "CE 280, tau-norm": "ce-280/tau",
    "CE 280, cRT": "ce-280/lt",
    "CE, class-balanced sampling (SL-c)": "ce-class/joint",
    "CE, square-root (SL-s)": "ce-sqrt/joint",
    "CE, progressive (SL-p)": "ce-progressive/joint",
    "Focal": "focal/joint",
    "CB-Focal": "cb-focal/joint",
    "LDAM": "ldam/joint",
    "LDAM-DRW": "ldam-drw/joint",
    "BBN": "bbn/joint",
    "SSP, CE from CL": "ssp/joint",
    "SupCon, FCL in the batch": "supcon/lt",
    "KCL, k = 1": "kcl-k1/lt",
    "KCL, k = 2": "kcl-k2/lt",
    "KCL, k = 4": "kcl-k4/lt",
    "KCL, k = 10": "kcl-k10/lt",
    "KCL, k = 20": "kcl-k20/lt",
    "KCL, divided by k + 1": "kcl-fixed-divisor/lt",
    "KCL, the k lowest slots": "kcl-first-k/lt",
    "KCL, unused positives left out": "kcl-drop-unused/lt",
    "KCL, random queue at the start": "kcl-no-fill/lt",
    "KCL, learning rate 0.1": "kcl-lr-0.1/lt",
}


# ---- statistics

def interval(x):
    """The mean of x (n,) and half the width of its 95 % interval, which is nan for n = 1."""
    n = len(x)
    if n == 1:
        return x[0], math.nan
    return np.mean(x), T975[n - 2] * np.std(x, ddof=1) / n ** 0.5


def p_value(x):
    """The p-value of the two-sided t-test that x (n,) has mean 0: 1 - 2 * the integral of t's density from 0 to |t|."""
    n = len(x)
    t = abs(np.mean(x)) / (np.std(x, ddof=1) / n ** 0.5)
    u = (np.arange(100_000) + 0.5) / 100_000 * t
    density = (1 + u ** 2 / (n - 1)) ** (-n / 2)
    density *= math.gamma(n / 2) / math.gamma((n - 1) / 2) / math.sqrt((n - 1) * math.pi)
    return max(0.0, 1 - 2 * density.mean() * t)


def holm(p):
    """Adjusted p-values (Holm 1979). If all hypotheses with a p below 0.05 are rejected, the chance that any rejection
    is wrong is at most 0.05."""
    adjusted, largest = np.empty(len(p)), 0.0
    for rank, i in enumerate(np.argsort(p)):
        largest = max(largest, (len(p) - rank) * p[i])
        adjusted[i] = min(1.0, largest)
    return adjusted


def judge(lines):
    """[(paper, claim, column, difference (n,), Holm's p or None, verdict)] for the claims whose cells have been run."""
    rows = []
    for family in (HEADLINE, CLAIMS):
        found = []
        for paper, claim, column, expression in family:
            x = difference(lines, column, expression)
            if len(x) > 1:
                found.append((paper, claim, column, x))

        adjusted = [None] * len(found)
        if family is HEADLINE:
            adjusted = holm([p_value(x) for *_, x in found])

        for (paper, claim, column, x), p in zip(found, adjusted):
            mean, half = interval(x)
            clear = abs(mean) > half if p is None else p < 0.05
            verdict = "open"
            if clear:
                verdict = "holds" if mean > 0 else "contradicted"
            rows.append((paper, claim, column, x, p, verdict))
    return rows


# ---- the lines

def read(file):
    """{cell/classifier: {seed: line}}. The last line of a seed counts. If it replaced a line without a commit, that one
    is kept as its "before".

    Seconds can only be compared on one machine, so only those of the first line's machine are kept.
    """
    lines, first = {}, None
    for line in map(json.loads, file.read_text().splitlines()):
        first = first or line["machine"]
        of_seed = lines.setdefault(f"{line['cell']}/{line['classifier']}", {})
        replaced = of_seed.get(line["seed"], {})
        if line["machine"] != first:
            line.pop("seconds", None)
            if "seconds" in replaced:
                line["seconds"] = replaced["seconds"]
        before = replaced.get("before", replaced)
        if before and "commit" in line and "commit" not in before:
            line["before"] = before
        of_seed[line["seed"]] = line
    return lines


def number(line, column):
    """The number in a column, accuracies in percent. A detector's "box AP" is in percent already."""
    if " " in column:
        part, measure = column.split()
        return line[part][measure]
    if column in ("balancedness", "seconds"):
        return line[column]
    return 100 * line[column]


def difference(lines, column, expression):
    """Evaluate `kcl/lt`, or `a/lt - b/lt + c/rep`, on each seed for which all terms have the column. Returns (n,)."""
    sign, terms = 1, []
    for word in expression.split():
        if word in ("+", "-"):
            sign = 1 if word == "+" else -1
            continue
        term = {}
        for seed, line in lines.get(word, {}).items():
            if column.split()[0] in line:
                term[seed] = sign * number(line, column)
        terms.append(term)
    seeds = set.intersection(*map(set, terms))
    return np.array([sum(term[seed] for term in terms) for seed in sorted(seeds)])


# ---- the tables. A cell is a text, or (column, expression), which is shown as its mean and 95 % interval

TAIL = ("top1", "many", "medium", "few", "balancedness")
BALANCED = ("top1", "few", "balancedness")
ALPHAS = {"0": "-lt0", "0.2": "-lt2", "0.4": "-lt4", "0.6": "-lt6", "0.8": "-lt8", "1": ""}
LOSSES = {"CE": "ce", "CL": "cl", "KCL": "kcl"}
MAIN_JOB = {
    "CE, joint": "ce/joint",
    "CE, tau-norm": "ce/tau",
    "CE, cRT": "ce/lt",
    "KCL": "kcl/lt",
    "balanced set: CE": "ce/rep",
    "balanced set: KCL": "kcl/rep",
}


def show(x, column, sign=""):
    if not len(x):
        return "-"
    digits = 3 if column == "balancedness" else 1
    mean, half = interval(x)
    text = f"{mean:{sign}.{digits}f}"
    if len(x) > 1:
        text += f" ± {half:.{digits}f}"
    return text


def table(lines, header, rows):
    """A Markdown table. If it has numbers, its second column is n. A row whose cells have not been run is left out."""
    text, has_n = "", False
    for name, *cells in rows:
        texts, seeds = [], set()
        for cell in cells:
            if not isinstance(cell, str):
                x = difference(lines, *cell)
                seeds |= {len(x)} - {0}
                cell = show(x, cell[0])
            texts.append(cell)
        if set(texts) == {"-"}:
            continue
        if seeds:
            has_n = True
            texts.insert(0, " to ".join(map(str, sorted({min(seeds), max(seeds)}))))
        text += f"| {' | '.join([name, *texts])} |\n"

    if not text:
        return "Not run yet.\n"
    if has_n:
        header = header.replace(" |", " | n |", 1)
    return f"| {header} |\n" + "|---" * (header.count("|") + 1) + "|\n" + text


CIFAR = {  # row: (its eval.json in results/cifar/seed<n>, published top-1)
    "CE, joint": ("ce", "70.4"),
    "CE, cRT": ("ce/linear-lt", "-"),
    "LDAM-DRW": ("ldam-drw", "77.0"),
    "FCL in the batch (SupCon)": ("supcon/linear-lt", "-"),
    "KCL, queue": ("kcl/linear-lt", "-"),
    "KCL in the batch": ("kcl-batch/linear-lt", "-"),
    "KCL in the batch, published protocol": ("published/ldam-lt", "77.6"),
    "balanced set: CE": ("ce/linear-rep", "-"),
    "balanced set: FCL in the batch": ("supcon/linear-rep", "-"),
    "balanced set: KCL, queue": ("kcl/linear-rep", "-"),
    "balanced set: KCL in the batch": ("kcl-batch/linear-rep", "-"),
}


def cifar_table():
    """CIFAR-10-LT, one row per classifier, with the published top-1."""
    text = "|  | n | top-1 | 3 largest classes | 3 smallest | beta | published |\n|" + "---|" * 7 + "\n"
    for name, (folder, published) in CIFAR.items():
        files = sorted((ROOT / "results/cifar").glob(f"seed*/cifar10-lt100-{folder}/eval.json"))
        found = [json.loads(file.read_text()) for file in files]
        if not found:
            text += f"| {name} | - | not run here | | | | {published} |\n"
            continue
        top1 = np.array([scored["top1"] for scored in found]) * 100
        accuracies = np.array([scored["per_class"] for scored in found]) * 100    # (n, C), largest class first
        beta = np.array([scored["balancedness"] for scored in found])
        cells = [show(top1, "top1"), show(accuracies[:, :3].mean(1), "top1"), show(accuracies[:, -3:].mean(1), "top1"),
                 show(beta, "balancedness")]
        text += f"| {name} | {len(found)} | {' | '.join(cells)} | {published} |\n"
    return text


def cifar_val_table():
    """Top-1 on CIFAR's validation list by settings of stage 1 and by the learning rate of stage 2."""
    tried = json.loads((ROOT / "results/cifar/val.json").read_text())
    rates = list(next(iter(tried.values())))
    text = f"|  | {' | '.join(rates)} |\n|{'---|' * (len(rates) + 1)}\n"
    for name, top1 in tried.items():
        best = max(top1.values())
        text += f"| {name} | {' | '.join(f'**{x}**' if x == best else str(x) for x in top1.values())} |\n"
    return text


def columns(names, expression):
    return [(name, expression) for name in names]


def methods_table(lines):
    """One row per classifier of ROWS. The numbers on the balanced set belong to the representation, so they are in the
    row of its first classifier. CPU seconds are the mean over the runs and the trials of the method's learning rate."""
    seen, rows, tried = set(), [], tried_rates(lines)
    for name, expression in ROWS.items():
        if expression not in lines:
            continue
        cell, _, classifier = expression.partition("/")

        balanced = ["-"] * len(BALANCED)
        if cell not in seen:
            balanced = columns(BALANCED, f"{cell}/rep")
        seen.add(cell)

        minus = "-"
        if name != "KCL":
            minus = ("top1", f"kcl/lt - {expression}")  # on common seeds, for a narrow interval

        runs = [expression]
        for trial in tried.get(cell, {}).values():
            if trial.endswith(f"/{classifier}"):
                runs.append(trial)
        seconds = np.concatenate([difference(lines, "seconds", run) for run in runs])
        seconds = f"{seconds.mean():.0f}" if len(seconds) else "-"
        rows.append((name, *columns(TAIL, expression), minus, *balanced, seconds))
    header = (" | all | many | medium | few | beta | KCL minus it: all"
              " | balanced set: all | few | beta | CPU s")
    return table(lines, header, rows)


def claims_table(rows, kind):
    cells = []
    for paper, claim, column, x, p, verdict in rows:
        if verdict != kind:
            continue
        holm_p = ""
        if p is not None:
            holm_p = "< 0.001" if p < 0.001 else f"{p:.3f}"
        cells.append((paper, claim, str(len(x)), show(x, column, "+"), holm_p))
    return table({}, "paper | claim | n | difference | Holm's p", cells) if cells else "None.\n"


def tried_rates(lines):
    """{method: {rate: cell/classifier}} for the runs that chose a learning rate."""
    tried = {}
    for name in lines:
        if name.startswith("tune-"):
            method, rate = name.partition("/")[0].removeprefix("tune-").rsplit("-", 1)
            tried.setdefault(method, {})[rate] = name
    return tried


def rates_table(lines):
    rows = []
    for method, tried in tried_rates(lines).items():
        top1 = {rate: difference(lines, "top1", name) for rate, name in tried.items()}
        if len(top1) < 4 or len(set(map(len, top1.values()))) > 1:
            continue  # not all have been tried yet
        rates = sorted(top1, key=float)
        best = max(rates, key=lambda rate: top1[rate].mean())
        texts = [f"{top1[rate].mean():.1f}" for rate in rates]
        texts[rates.index(best)] = f"**{texts[rates.index(best)]}**"
        rows.append((method, *texts))
    return table({}, " | " + " | ".join(rates), rows) if rows else ""


def commits_table(lines):
    """Each cell/classifier that was run again, before and now on the same seeds, and a summary of the rows."""
    rows, mixed, commits, agree = [], [], set(), Counter()
    for name, of_seed in lines.items():
        now = {seed: line for seed, line in of_seed.items() if "before" in line}
        before = {seed: line["before"] for seed, line in now.items()}
        pair = {"now": now, "before": before}
        n = len(difference(pair, "top1", "now - before"))
        if n < 2:
            continue

        row = [name, str(n)]
        for column in ("top1", "balancedness"):
            x = difference(pair, column, "now - before")
            mean, half = interval(x)
            agree[column] += int(abs(mean) <= half)
            row.append(show(difference(pair, column, "before"), column))
            row.append(show(difference(pair, column, "now"), column))
            row.append(show(x, column, "+"))
        rows.append(row)

        commits |= {line["commit"] for line in now.values()}
        cell = f"{name.partition('/')[0]} ({n} of {len(of_seed)} seeds)"
        if n < len(of_seed) and cell not in mixed:
            mixed.append(cell)
    if not rows:
        return "Not run yet.\n"

    header = " | n | top-1 before | now | difference | beta before | now | difference"
    text = table({}, header, rows)
    text += (f"\nThe new lines are from commit {' and '.join(sorted(commits))}. The 95 % interval of the "
             f"difference contains 0 in {agree['top1']} of {len(rows)} rows for top-1, "
             f"and in {agree['balancedness']} for beta.\n")
    if mixed:
        text += (f"Only some seeds are new in {', '.join(mixed)}. The means of these cells mix old and new lines, "
                 "but each difference is taken seed by seed, on the same images.\n")
    return text


def changed_verdicts(lines):
    """One line per claim whose verdict would be different with the lines that were replaced."""
    before = {}
    for cell, of_seed in lines.items():
        before[cell] = {seed: line.get("before", line) for seed, line in of_seed.items()}
    earlier = {claim: (show(x, column, "+"), verdict) for _, claim, column, x, _, verdict in judge(before)}

    changed = []
    for paper, claim, column, x, _, verdict in judge(lines):
        difference_then, verdict_then = earlier[claim]
        if verdict != verdict_then:
            changed.append(f"- {paper}: {claim}: {verdict_then} before ({difference_then}), {verdict} now "
                           f"({show(x, column, '+')})")
    return "\n".join(changed) + "\n" if changed else "None.\n"


PAGE = """# The paper's findings in miniature

```
python recipes/study.py       # trains and evaluates; if you run it again, it resumes
python recipes/findings.py    # makes this page from the lines of results/study.jsonl
```

In short: KCL is more accurate than plain CE and than FCL. If CE trains as long as KCL and its classifier is
re-balanced afterwards (cRT, tau-norm), KCL is not measurably better, and its feature space is not measurably more
balanced. CL itself reaches 26 % on these digits, so they hardly test what the paper says of its balance.

The data are the embedded digits in clutter, in 10 classes. The long tail, alpha = 1, has 864 images, from 350 down to
3 per class, and each seed puts the classes in another order. Unless a row says otherwise, contrastive losses train
for 200 epochs and classification losses for 90, as in the paper. Numbers are means with 95 % intervals (Student's t)
over n seeds. They are in percent, except for beta, the balancedness of the class accuracies with sigma = 0.1.
Learning rates were chosen on val with seeds 10 to 13; the seeds that are reported start at 100.
The runs, with one thread each: {machines}.

"Long tail" means a classifier trained on the long-tailed list with class-balanced sampling (on CE features this is
cRT), or the head that was trained together with the features. "Balanced set" means a classifier trained on all
3,500 images, which measures the feature space. Here each image is encoded once and not augmented, whereas the paper
augments it again in every epoch.

## The claims

The claims were written into [recipes/findings.py](../recipes/findings.py) before the runs, each as a difference that is
above 0 if the paper is right. The claims marked *ours* are at equal epochs or at equal CPU time, comparisons that the
paper does not make. Those marked *open there* compare the default with an alternative where the paper leaves a choice
open. KCL's learning rate is younger than the claims: it was chosen again after test results had been seen
([below](#learning-rates)).

The {headline} claims with a p-value form one family: KCL against CE, FCL and LDAM-DRW at the paper's epochs, at
equal epochs and at equal CPU time. A claim of the family is **open** unless Holm's p is below 0.05. If it is, the
claim **holds** when the difference is above 0 and is **contradicted** when it is below 0. The other {others} claims are
judged by their 95 % intervals: they hold above 0, are contradicted below 0, and are open otherwise. They are not
corrected for their number: if all their differences were 0, about {by_chance:.1f} of them would not be open.

The family has 20 seeds, the ends of Fig. 2 have 10, and everything else has 5, which takes 2.5 CPU hours per seed.
Everything else was planned with 10 seeds too; the plan was cut to 5 when two rows had 7.

### Hold

{holds}
### Contradicted

{contradicted}
### Open

{open}
## Every method

{methods}
"KCL minus it" is KCL's top-1 minus the row's, on the seeds that both have, with the same images and the same order of
the classes. Use it to compare rows with different n. The rows do not all come from the same machine and version of
torch, and these round differently. On one GPU KCL minus joint CE is {gpu_joint}, and KCL minus cRT is {gpu_crt}.

CE's 280 epochs take the CPU time of KCL's 200: measured in turn on one core, a KCL step took 1.38 times as long as
a CE step. CPU seconds can only be compared on one machine, here {machine}. A method that ran elsewhere shows the
seconds of its trials, and one that was run again elsewhere keeps the seconds of its first runs. The seconds change by a
fifth from day to day.

## Photographs: CIFAR-10-LT

```
DATASETS=cifar10 IMBALANCES=100 METHODS="ce kcl" FLAGS=--amp bash recipes/cifar_lt.sh
```

ResNet-32, imbalance 100: the ten classes have 5,000 down to 50 images. All images, those of the test list too, are a
**JPEG copy** of CIFAR-10 (quality 75, 4:2:0 colours), which costs accuracy; how much was not measured. Stage 1 has 200
epochs of 96 steps of 128 images, in bfloat16 on two cores of an AMD EPYC. The published numbers are those of Li et al.
2022, and LDAM-DRW's that of Cao et al. 2019, on the original images.

{cifar}
Joint CE is 7 points below the published number. What differs is the JPEG copy, the cosine instead of two steps, and
bfloat16; none of them was tried alone.

The published KCL differs in more than the images: it is inside the batch, trains for 1000 epochs of batch 1024 with
SimCLR's augmentation and an MLP head, and its classifier has LDAM. Of these differences the augmentation and the head
were tried with the queue, for 15 epochs, on a validation list of 100 images per class that was held out of the training
images (`make_lt.py --dataset cifar10 --holdout 100 --out data/cifar10-val`, then `train_rep.py --epochs 15 --amp` and
`train_linear.py --epochs 10 --val data/cifar10-val/val.txt`, seed 0). Top-1 on it, by the learning rate of stage 2:

{cifar_val}
The 95 % interval of one of these numbers is ± 3, from the 1,000 images of the list alone. So KCL has crops and flips
and a linear head here, and stage 2 the rate 0.1. Short runs favour weak augmentation; 1000 epochs may not. CE has the
settings of Cao et al. 2019 and was not tried with others.

## Accuracy and balancedness against alpha (Fig. 2)

{fig2}The classifier is trained on the balanced set. Already at alpha 0 KCL is {kcl_lt0} above CE, whereas the paper
chose the epochs so that both are level on balanced data. CL, which sees no labels, is far below both and has little
to lose, so its beta cannot be compared with theirs.

{alphas}
## New classes (Fig. 3)

{fig3}The representation is trained on five classes of each long tail. The classifier is trained on all images of
these five (source), or of the other five (target).

{new_classes}
## Near and far classes (Table 4)

The representation is trained on all images of five classes, the source. The other five are the target, and the gap is
the accuracy on the source minus that on the target. The paper's *independent* halves share no super class. Digits have
no super classes, so 0-4 and 5-9 are independent in name only, and a verdict on them does not judge the paper's claim.
These runs are from a GPU, an H200.

{halves}
## How many positives (Fig. 5)

{fig5}The numbers are in the table of methods. The points have different n. To compare two values of k, use the claims,
which take common seeds.

## Detection (Tables 1, 5)

A Mask R-CNN is fine-tuned on scenes of digits. It starts from a backbone that was trained on the long tail. A seed
draws the training of the backbone, the training of the detector, and the order of the scenes.

{detection}
## On a GPU

These are the cells ce and kcl, run with the same commands on one H100. recipes/study.py hides the GPU, so these runs
and those of Table 4 were started without it. The GPU's convolutions round to TF32, and it draws different random
numbers. The GPU's lines are from commit d8cbf2d or earlier. The CPU's lines that are subtracted have the new draws (see
below).

{gpu}
## Which lines are of which commit

The lines of results/study.jsonl without a commit are from d8cbf2d or earlier. The random draws have changed since then:
the numbers come in another order, but from the same distribution. The cells listed below were run once more with the
new draws. On the rest of this page the last line of a seed counts.

{commits}
fcl, ldam-drw and ce-280 have ten new seeds, because with the first five one interval of each did not contain 0.
These verdicts changed with the draws:

{changed_verdicts}
## Learning rates

The table has top-1 on val, as the mean over four seeds. CE's is that of cRT. The best rate, in bold, is used. SSP, CE
with other samplers, and CE with 200 and 280 epochs take CE's rate, and all variants of KCL take KCL's. CL's rate is the
lowest that was tried. At first only two seeds, 10 and 11, chose the rates, and KCL had 0.1 (the last row of the table
of methods). Two seeds cannot tell 0.1 from 0.3, so all rates were chosen again with four seeds, after the test results
with 0.1 had been seen. Four seeds cannot tell them apart either: on val, KCL with 0.3 is {rates_differ} above KCL with
0.1.

{rates}"""


def page(lines):
    rows = judge(lines)
    others = sum(p is None for *_, p, _ in rows)
    texts = {kind: claims_table(rows, kind) for kind in ("holds", "contradicted", "open")}
    texts["methods"] = methods_table(lines)
    texts["commits"] = commits_table(lines)
    texts["changed_verdicts"] = changed_verdicts(lines)
    texts["rates"] = rates_table(lines)
    texts["cifar"], texts["cifar_val"] = cifar_table(), cifar_val_table()

    machine_of = {}  # a run has a line per classifier
    for name, of_seed in lines.items():
        for seed, line in of_seed.items():
            machine_of[name.partition("/")[0], seed] = line["machine"]
    machines = Counter(machine_of.values())  # the first line's machine comes first

    # Figs 2 and 3
    alphas, new_classes = [], []
    for alpha, suffix in ALPHAS.items():
        alphas.append([alpha])
        new_classes.append([alpha])
        for loss in LOSSES.values():
            cell = f"{loss}-overlap{suffix or '-lt'}"
            alphas[-1] += columns(("top1", "balancedness"), f"{loss}{suffix}/rep")
            new_classes[-1] += columns(("top1", "balancedness"), f"{cell}/source")
            new_classes[-1] += columns(("top1",), f"{cell}/target")
    header = "alpha" + "".join(f" | {name} | beta" for name in LOSSES)
    texts["alphas"] = table(lines, header, alphas)
    header = "alpha" + "".join(f" | {name}: source | beta | target" for name in LOSSES)
    texts["new_classes"] = table(lines, header, new_classes)

    # Table 4
    halves = []
    for half in ("overlap", "independent"):
        for name, loss in LOSSES.items():
            cell = f"{loss}-{half}"
            gap = f"{cell}/source - {cell}/target"
            expressions = (f"{cell}/source", f"{cell}/target", gap, f"{cell}/full")
            halves.append((f"{half}: {name}", *(("top1", of) for of in expressions)))
    texts["halves"] = table(lines, " | source | target | gap | all classes", halves)

    gpu = []
    for name, of in MAIN_JOB.items():
        gpu.append([name])
        for column in ("top1", "balancedness"):
            gpu[-1] += [(column, f"gpu-{of}"), (column, f"gpu-{of} - {of}")]
    texts["gpu"] = table(lines, " | top-1 | minus the CPU's | beta | minus the CPU's", gpu)

    measures = ("box AP", "box AP50", "box AP75", "mask AP", "mask AP50", "mask AP75")
    starts = LOSSES | {"random weights": "random"}
    detection = [(name, *columns(measures, f"det-{start}/det")) for name, start in starts.items()]
    texts["detection"] = table(lines, "start | " + " | ".join(measures), detection)

    for name, expression in (("gpu_joint", "gpu-kcl/lt - gpu-ce/joint"),
                             ("gpu_crt", "gpu-kcl/lt - gpu-ce/lt"),
                             ("kcl_lt0", "kcl-lt0/rep - ce-lt0/rep"),
                             ("rates_differ", "tune-kcl-0.3/lt - tune-kcl-0.1/lt")):
        texts[name] = show(difference(lines, "top1", expression), "top1", "+")
    for picture, (title, *_, curves) in pictures().items():
        texts[picture] = ""
        if complete(lines, curves):
            texts[picture] = f"![{title}](findings/{picture}.png)\n\n"

    texts["machine"] = next(iter(machines))
    texts["machines"] = "; ".join(f"{n} on {name}" for name, n in machines.items())
    return PAGE.format(headline=len(rows) - others, others=others, by_chance=0.05 * others, **texts)


# ---- the pictures

STYLES = {  # curve -> colour and marker
    "CE": (OKABE_ITO["vermilion"], "o"),
    "CE, joint": (OKABE_ITO["vermilion"], "o"),
    "CE, cRT": (OKABE_ITO["blue"], "s"),
    "CL": (OKABE_ITO["blue"], "s"),
    "KCL": (OKABE_ITO["green"], "D"),
    "long tail": (OKABE_ITO["green"], "D"),
    "balanced set": (OKABE_ITO["orange"], "v"),
}


def curve(ax, x, samples, name):
    """Draw the means of samples [(n,)] and a band with their 95 % intervals."""
    mean, half = np.array([interval(sample) for sample in samples]).T
    color, marker = STYLES[name]
    ax.plot(x, mean, marker, color=color, linestyle="-", label=name)
    ax.fill_between(x, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)


def pictures():
    """{file: (title, x, label of x, {curve: (expressions for top-1, expressions for balancedness)})}."""
    fig2, fig3 = {}, {}
    for name, loss in LOSSES.items():
        fig2[name] = [[f"{loss}{suffix}/rep" for suffix in ALPHAS.values()]] * 2
        fig3[name] = [[f"{loss}-overlap{suffix or '-lt'}/{side}" for suffix in ALPHAS.values()]
                      for side in ("target", "source")]
    cells = {"0\n(CL)": "cl", "1": "kcl-k1", "2": "kcl-k2", "4": "kcl-k4", "6": "kcl",
             "10": "kcl-k10", "20": "kcl-k20", "all\n(FCL)": "fcl"}
    fig5 = {"long tail": [[f"{cell}/lt" for cell in cells.values()]] * 2,
            "balanced set": [[f"{cell}/rep" for cell in cells.values()]] * 2}
    return {"fig2": ("Accuracy and balancedness against alpha", list(ALPHAS), "alpha", fig2),
            "fig3": ("Accuracy on new classes, balancedness on the old", list(ALPHAS), "alpha", fig3),
            "fig5": ("Accuracy and balancedness against k", list(cells), "k", fig5)}


def complete(lines, curves):
    """Whether each point has at least 5 seeds. With fewer, its band would hide the picture."""
    points = [point for sides in curves.values() for side in sides for point in side]
    return all(len(lines.get(point, ())) >= 5 for point in points)


def two_panels(lines, file, x, xlabel, curves):
    """Draw top-1 and balancedness for an entry of pictures()."""
    fig, axes = plt.subplots(1, 2, figsize=(6.4, 3.4), layout="constrained")
    columns_and_labels = (("top1", "top-1, %"), ("balancedness", "balancedness"))
    for side, (ax, (column, ylabel)) in enumerate(zip(axes, columns_and_labels)):
        for name, expressions in curves.items():
            samples = [difference(lines, column, expression) for expression in expressions[side]]
            curve(ax, x, samples, name)
        ax.set(xlabel=xlabel, ylabel=ylabel)
    axes[0].legend()
    fig.savefig(file)


def tail(lines, file):
    """Draw the picture at the top of README.md: the accuracy of each class against its training images."""
    fig, ax = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    accuracies = []
    for name, expression, label, shift in (  # shift of x, so that no bar hides another
            ("CE, joint", "ce-200/joint", "plain CE", 1.04),
            ("CE, cRT", "ce-200/lt", "CE with a new classifier", 1),
            ("KCL", "kcl/lt", "KCL", 0.96)):
        top1, of_few = (difference(lines, column, expression).mean() for column in ("top1", "few"))
        accuracies.append(f"{label} {top1:.0f} / {of_few:.0f} %")
        accuracy = []  # per seed, largest class first
        for line in lines[expression].values():
            sizes, of_classes = largest_first(line)
            accuracy.append(of_classes)
        mean, half = np.transpose([interval(x) for x in np.array(accuracy).T])  # (C,) each
        color, marker = STYLES[name]
        ax.errorbar(sizes * shift, mean, half, color=color, marker=marker, capsize=3, label=label)
    ax.axvspan(20, 2.5, color="0.92", zorder=0)
    ax.set(xscale="log", xlim=(420, 2.5), ylim=(0, 100),
           xlabel="training images in the class",
           ylabel="test accuracy of the class, %",
           title="Digits, test accuracy on all classes / on those in grey:\n" + ", ".join(accuracies))
    ax.legend(loc="lower left", title=f"200 epochs each, mean of {len(accuracy)} seeds,\n95 % interval")
    ax.set_xticks(sizes, sizes)
    ax.minorticks_off()
    fig.savefig(file)


def draw(lines, folder):
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 11, "figure.facecolor": "white",
                         "savefig.dpi": 150, "axes.grid": True, "grid.alpha": 0.3,
                         "axes.spines.top": False, "axes.spines.right": False})
    tail(lines, folder / "tail.png")
    (folder / "findings").mkdir(exist_ok=True)
    for name, (_, x, xlabel, curves) in pictures().items():
        if complete(lines, curves):
            two_panels(lines, folder / f"findings/{name}.png", x, xlabel, curves)
    plt.close("all")


# ---- the texts

def against(lines):
    """README.md's table: KCL, and KCL minus CE trained for three lengths, on common seeds."""
    cells = {"90": "ce", "200": "ce-200", "280": "ce-280"}                # epochs
    text = f"| compared with | KCL | {' | '.join(f'CE, {n} epochs' for n in cells)} |\n|---|---|---|---|---|\n"
    for what, column, kcl, classifier in (
            ("CE, joint", "top1", "kcl/lt", "joint"),
            ("CE, tau-norm", "top1", "kcl/lt", "tau"),
            ("CE, cRT", "top1", "kcl/lt", "lt"),
            ("CE, cRT; KCL's first rate", "top1", "kcl-lr-0.1/lt", "lt"),
            ("balanced set", "top1", "kcl/rep", "rep"),
            ("balanced set: beta", "balancedness", "kcl/rep", "rep")):
        differences = [difference(lines, column, f"{kcl} - {cell}/{classifier}") for cell in cells.values()]
        texts = [show(difference(lines, column, kcl), column), *(show(x, column, "+") for x in differences)]
        text += f"| {' | '.join([what, *texts])} |\n"
    return text


def with_numbers(readme, lines):
    """The text of README.md with new numbers between its markers."""
    before, begin, rest = readme.partition("<!-- against -->\n")
    return before + begin + against(lines) + rest[rest.index("<!-- end -->"):]


def main():
    lines, readme = read(ROOT / "results/study.jsonl"), ROOT / "README.md"
    (ROOT / "results/findings.md").write_text(page(lines))
    readme.write_text(with_numbers(readme.read_text(), lines))
    draw(lines, ROOT / "results")


if __name__ == "__main__":
    main()
