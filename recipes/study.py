"""
The paper's findings on the embedded digits: trains, probes and evaluates every cell of results/findings.md, and appends
a line a classifier to results/study.jsonl. recipes/findings.py makes tables and pictures of the lines.

    .venv/bin/python recipes/study.py                    # about 2 hours on 2 cores; stopped, it goes on where it was
    .venv/bin/python recipes/study.py --only fig5        # one finding, with the cells that it needs
    .venv/bin/python recipes/study.py --smoke            # one epoch, trial and seed each, into runs/smoke

A cell is a representation (stage 1) with its classifiers (stage 2); with a seed it is a run, of its own digit images,
order of the classes, weights and draws. A line holds the commands that made it, their CPU seconds on one thread
(Python's start apart) and what evaluate.py found.

Chosen on val before all else, on two seeds that are used for nothing else: the learning rate of CE, CL, KCL and FCL,
four trials of 60 epochs each, by the top-1 of the class-balanced classifier on the long tail. Variants take the rate of
what they are a variant of; no trial was given to another setting. Stage 2 chooses among its eight rates, tau among 21,
on each run's val list.
"""
import argparse
import importlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# of a long-tailed list of 864 images, 13 steps each; the paper gives contrastive losses 200 epochs, CE 90
CE_EPOCHS, EPOCHS = 40, 80
LRS, TUNE_SEEDS = (0.03, 0.1, 0.3, 1), (100, 101)

# classifiers: name -> (train_linear.py's flags, or None where there is no stage 2; the file that evaluate.py writes)
CLASSIFIERS = {
    "joint": (None, "eval"), "tau": (None, "eval_tau_norm"), "ncm": (None, "eval_ncm"),
    "lws": ("--classifier lws", "lws-lt/eval"),
    "lt": ("--protocol lt", "linear-lt/eval"),            # long-tailed recognition; on CE features cRT
    # representation evaluation, on the balanced set; cached, which is what that is for: a sweep of many
    "rep": ("--protocol rep --features cached", "linear-rep-cached/eval"),
    # of a representation of one half of the classes: on that half, on the other half, on all
    "source": ("--protocol rep --features cached", "linear-rep-cached/eval"),
    "target": ("--protocol rep --features cached --list {half}_target/train_full.txt --out {out}/target",
               "target/eval"),
    "full": ("--protocol rep --features cached --list train_full.txt --out {out}/full", "full/eval"),
}


def cells(lr):
    """[(finding, cell, train_rep.py's flags, names of its classifiers)]; lr {loss: the chosen one}."""
    def stage1(loss, flags="", epochs=None, like=None):
        epochs = epochs or (CE_EPOCHS if (like or loss) == "ce" else EPOCHS)
        return f"--loss {loss} --lr {lr[like or loss]:g} --epochs {epochs:g} {flags}".strip()

    both = ["lt", "rep"]
    found = [("table2", loss, stage1(loss), ["joint", "tau", "ncm", "lws", *both] if loss == "ce" else both)
             for loss in ("ce", "cl", "kcl", "fcl")]
    found += [("table2", f"ce-{sampler}", stage1("ce", f"--sampler {sampler}"), ["joint", "rep"])
              for sampler in ("class", "sqrt", "progressive")]
    # CE with KCL's epochs, KCL with CE's, and CE with KCL's time: its step takes 1.45 times as long
    found += [("cost", f"{loss}-{epochs}", stage1(loss, epochs=epochs),
               ["joint", "tau", *both] if loss == "ce" else both)
              for loss, epochs in (("ce", EPOCHS), ("kcl", CE_EPOCHS), ("ce", 116))]
    found += [("fig2", f"{loss}-lt{alpha}", stage1(loss, f"--list train_lt{alpha}.txt"), ["rep"])
              for loss, alpha in (("ce", 0), ("cl", 0), ("kcl", 0), ("ce", 8), ("cl", 8), ("ce", 4), ("cl", 4))]
    found += [("fig5", f"kcl-k{k}", stage1("kcl", f"--num-positives {k}"), both) for k in (1, 2, 4, 10, 20)]
    # half of the classes, half of the images: twice the epochs are the same steps
    found += [("fig3", f"ce-overlap-{alpha}", stage1("ce", f"--list overlap_source/train_{alpha}.txt", 2 * CE_EPOCHS),
               ["source", "target"]) for alpha in ("lt0", "lt2", "lt4", "lt6", "lt8", "lt")]
    # 1,750 images: half the epochs are the same steps
    found += [("table4", f"{loss}-{half}", stage1(loss, f"--list {half}_source/train_full.txt",
                                                  (CE_EPOCHS if loss == "ce" else EPOCHS) // 2),
               ["source", "target", "full"]) for half in ("overlap", "independent") for loss in ("ce", "cl", "kcl")]
    found += [("ablations", f"kcl-{flag}", stage1("kcl", f"--{flag}"), both)
              for flag in ("fixed-divisor", "drop-unused", "first-k", "no-fill")]
    found += [("others", name, stage1(loss, flags, like=like), ["joint"] if like == "ce" else ["lt"])
              for name, loss, like, flags in (
                  ("focal", "focal", "ce", ""), ("cb-focal", "cb-focal", "ce", ""), ("ldam", "ldam", "ce", ""),
                  ("ldam-drw", "ldam", "ce", "--drw"), ("bbn", "bbn", "ce", ""), ("tsc", "tsc", "kcl", ""),
                  ("supcon", "supcon", "kcl", ""), ("ssp", "ce", "ce", "--init {runs}/cl-seed{seed}/backbone.pt"))]
    return found


def tuning(lrs=LRS):
    return [("tune", f"tune-{loss}-lr{lr}", f"--loss {loss} --lr {lr} --epochs 60", ["lt"])
            for lr in lrs for loss in ("ce", "cl", "kcl", "fcl")]


def chosen(lines, lrs=LRS):
    """{loss: learning rate}: of lrs the best mean val top-1 over TUNE_SEEDS, the smaller one where two are level."""
    def val(loss, lr):
        return sum(line["val_top1"] for line in lines if line["cell"] == f"tune-{loss}-lr{lr}")
    return {loss: max(lrs, key=lambda lr: (val(loss, lr), -lr)) for loss in ("ce", "cl", "kcl", "fcl")}


def as_command(command, log):
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.argv = shlex.split(command)
    importlib.import_module("ddp").run(importlib.import_module(Path(sys.argv[0]).stem).main)


def run(command, out):
    """Run `train_rep.py ...` as the shell would, but forked, without importing torch again; returns its CPU seconds."""
    (ROOT / out).mkdir(parents=True, exist_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    fork = multiprocessing.get_context("fork").Process(target=as_command, args=(command, ROOT / out / "output.txt"))
    fork.start()
    fork.join()
    if fork.exitcode:
        sys.exit(f"error: python {command}\n{(ROOT / out / 'output.txt').read_text()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(cell, seed, runs, short, file):
    """Append the lines of one cell and seed to file."""
    finding, name, flags, heads = cell
    data, out = f"data/digits-seed{seed}", f"{runs}/{name}-seed{seed}"
    flags = flags.format(runs=runs, seed=seed)
    stage1 = f"train_rep.py {flags} --dataset digits --data {data} --seed {seed} --out {out}{short}"
    spent = ROOT / out / "seconds.json"  # of each command, also of one that was stopped and went on

    def timed(command):
        seconds = json.loads(spent.read_text()) if spent.exists() else {}
        seconds[command] = seconds.get(command, 0) + run(command, out)
        spent.write_text(json.dumps(seconds, indent=1))
        return seconds[command]

    seconds = {stage1: timed(stage1)}
    half = "independent" if "independent" in name else "overlap"
    stage2 = {head: f"train_linear.py {out}/backbone.pt {CLASSIFIERS[head][0].format(out=out, half=half)} "
                    f"--seed {seed}{short}" for head in heads if CLASSIFIERS[head][0]}
    seconds |= {command: timed(command) for command in stage2.values()}
    if finding != "tune":  # which does not see the test list
        files = " ".join(f"{out}/{Path(CLASSIFIERS[head][1]).parent}/head.pt" for head in heads
                         if CLASSIFIERS[head][1].endswith("eval"))
        stage3 = (f"evaluate.py {files}{' --tau-norm' * ('tau' in heads)}{' --ncm' * ('ncm' in heads)} --workers 0 "
                  "--pictures none")
        run(stage3, out)
    text = ""
    for head in heads:
        commands = [stage1, *filter(None, [stage2.get(head)])]
        line = {"finding": finding, "cell": name, "seed": seed, "classifier": head,
                "seconds": round(sum(seconds[c] for c in commands), 1)}
        file_of = ROOT / out / CLASSIFIERS[head][1]
        if finding == "tune":
            line |= json.loads(file_of.with_name("log.jsonl").read_text().splitlines()[-1]) | {"commands": commands}
        else:
            line |= json.loads(file_of.with_suffix(".json").read_text()) | {"commands": [*commands, stage3]}
        text += json.dumps(line) + "\n"
    with open(file, "a") as f:
        f.write(text)


def in_forks(jobs, todo):
    """Run todo, a list of (function, *arguments), in so many processes at a time."""
    running, failed = [], False
    while (todo and not failed) or running:
        while todo and not failed and len(running) < jobs:
            function, *arguments = todo.pop(0)
            running.append(multiprocessing.get_context("fork").Process(target=function, args=arguments))
            running[-1].start()
        multiprocessing.connection.wait([fork.sentinel for fork in running])
        for fork in [fork for fork in running if not fork.is_alive()]:
            running.remove(fork)
            failed |= bool(fork.exitcode)
    if failed:
        sys.exit("error: a run failed, see above; the same command goes on from there")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    p.add_argument("--only", nargs="+", help="cells, or findings: table2, fig2, fig3, fig5, table4, ablations, "
                   "cost, others")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    p.add_argument("--smoke", action="store_true", help="one epoch, one trial and one seed each, into runs/smoke")
    args = p.parse_args()
    runs, short = ("runs/smoke/study", " --epochs 1") if args.smoke else ("runs/study", "")
    file = ROOT / ("runs/smoke/study.jsonl" if args.smoke else "results/study.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    seeds, tune_seeds, lrs = (args.seeds[:1], TUNE_SEEDS[:1], LRS[:1]) if args.smoke else (args.seeds, TUNE_SEEDS, LRS)
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded: a fork copies no other thread
    sys.path.insert(0, str(ROOT))
    for script in ("make_lt", "train_rep", "train_linear", "evaluate"):
        importlib.import_module(script)  # once for all forks

    def lines():
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def work(cells, seeds):
        """Do what of these is not in the file yet; returns its lines."""
        there = {(line["cell"], line["seed"]) for line in lines()}
        blocks = [list(block) for _, block in itertools.groupby(cells, key=lambda cell: cell[0])]
        todo = [(cell, seed) for block in blocks for seed in seeds for cell in block if (cell[1], seed) not in there]
        in_forks(args.jobs, [(run, f"make_lt.py --seed {seed} --out data/digits-seed{seed}", f"{runs}/data")
                             for seed in seeds if todo and not Path(f"data/digits-seed{seed}").exists()])
        in_forks(args.jobs, [(measure, cell, seed, runs, short, file) for cell, seed in todo])
        return lines()

    lr = chosen(work(tuning(lrs), tune_seeds), lrs)
    print("learning rates chosen on val: " + ", ".join(f"{loss} {rate:g}" for loss, rate in lr.items()), flush=True)
    wanted = [cell for cell in cells(lr) if {cell[0], cell[1]} & set(args.only or (cell[0],))]
    if not wanted:
        sys.exit(f"error: --only {' '.join(args.only)}: no such finding or cell")
    work(wanted, seeds)
    print(f"{len(wanted)} cells x {len(seeds)} seeds are in {file}")


if __name__ == "__main__":
    main()
