"""
Every method on the embedded digits: alpha = 1, three seeds, one line of results/methods.jsonl for each method and seed.

    .venv/bin/python recipes/methods.py              # about an hour on 2 cores; stop it any time, it goes on from there
    .venv/bin/python recipes/methods.py --table      # only the table of what is there
    .venv/bin/python recipes/methods.py --smoke      # one epoch each, into runs/smoke, to see every step work

Every method has train_rep.py's and train_linear.py's defaults for the digits: the same 120 epochs, batch, learning rate
0.1 (CL: 0.03) and augmentation. Nothing is tuned but what the scripts choose on val: stage 2's learning rate, and tau.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent

# one entry a representation: its name, train_rep.py's flags, and the methods that it gives: (name, evaluation file, by
# which stage 2). No stage 2: the joint head, or what evaluate.py makes of the features without training.
CELLS = [
    ("ce", "--loss ce", [("CE, instance sampling (SL-i)", "eval", ""), ("CE, tau-norm", "eval_tau_norm", ""),
                         ("CE, NCM", "eval_ncm", ""), ("CE, LWS", "lws-lt/eval", "--classifier lws"),
                         ("CE, cRT", "linear-lt/eval", "--classifier linear")]),
    ("kcl", "--loss kcl", [("KCL", "linear-lt/eval", "--classifier linear"), ("KCL, NCM", "linear-lt/eval_ncm", "")]),
    ("ce-class", "--loss ce --sampler class", [("CE, class-balanced sampling (SL-c)", "eval", "")]),
    ("ce-sqrt", "--loss ce --sampler sqrt", [("CE, square-root sampling (SL-s)", "eval", "")]),
    ("ce-progressive", "--loss ce --sampler progressive", [("CE, progressive sampling (SL-p)", "eval", "")]),
    ("fcl", "--loss fcl", [("FCL, queue", "linear-lt/eval", "--classifier linear")]),
    ("tsc", "--loss tsc", [("TSC", "linear-lt/eval", "--classifier linear")]),
    ("cl", "--loss cl", [("CL", "linear-lt/eval", "--classifier linear")]),
    ("focal", "--loss focal", [("Focal", "eval", "")]),
    ("cb-focal", "--loss cb-focal", [("CB-Focal", "eval", "")]),
    ("ldam", "--loss ldam", [("LDAM", "eval", "")]),
    ("ldam-drw", "--loss ldam --drw", [("LDAM-DRW", "eval", "")]),
    ("supcon", "--loss supcon", [("FCL, batch (SupCon)", "linear-lt/eval", "--classifier linear")]),
    ("bbn", "--loss bbn", [("BBN", "eval", "")]),
    ("ssp", "--loss ce --init {runs}/cl-seed{seed}/backbone.pt", [("SSP (CE from CL)", "eval", "")]),
]
COLUMNS = ("top1", "many", "medium", "few", "balancedness", "std", "seconds")


def run(command):
    """Run a command of the project on one thread; returns its CPU seconds, which a busy neighbour hardly changes."""
    process = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"error: python {command}\n{errors[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def measure(cell, seed, runs, short):
    """The result lines of one representation: {method, seed, commands, seconds, and what evaluate.py found}."""
    name, flags, methods = cell
    data, out = f"data/digits-seed{seed}", f"{runs}/{name}-seed{seed}"
    flags = flags.format(runs=runs, seed=seed)
    stage1 = f"train_rep.py {flags} --dataset digits --data {data} --seed {seed} --out {out}{short}"
    seconds = {stage1: run(stage1)}
    stage2 = {how: f"train_linear.py {out}/backbone.pt {how} --seed {seed}{short}" for _, _, how in methods if how}
    seconds |= {command: run(command) for command in stage2.values()}
    heads = " ".join(f"{out}/{Path(file).parent}/head.pt" for file in dict.fromkeys(
        file for _, file, _ in methods if Path(file).name == "eval"))
    also = {"ce": "--tau-norm --ncm ", "kcl": "--ncm "}.get(name, "")
    stage3 = f"evaluate.py {heads} {also}--workers 0 --pictures {out}"
    run(stage3)
    lines = []
    for method, file, how in methods:
        commands = [stage1, *filter(None, [stage2.get(how)])]
        lines.append({"method": method, "seed": seed, "commands": [*commands, stage3],
                      "seconds": round(sum(seconds[c] for c in commands), 1),
                      **json.loads((ROOT / out / f"{file}.json").read_text())})
    return lines


def print_table(lines):
    """Markdown: mean +- standard deviation over the seeds, in percent but for balancedness and seconds."""
    print("| method | n | all | many | medium | few | beta | std of classes | CPU s |\n" + "|---" * 9 + "|")
    for method in dict.fromkeys(method for _, _, methods in CELLS for method, _, _ in methods):
        rows = [line for line in lines if line["method"] == method]
        if not rows:
            continue
        cells = []
        for column in COLUMNS:
            x = [row[column] for row in rows]
            scale, digits = {"balancedness": (1, 3), "seconds": (1, 0)}.get(column, (100, 1))
            cells.append("-" if None in x else f"{scale * np.mean(x):.{digits}f}" + (
                f" ± {scale * np.std(x, ddof=1):.{digits}f}" if len(x) > 1 and column != "seconds" else ""))
        print(f"| {method} | {len(rows)} | " + " | ".join(cells) + " |")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--only", nargs="+", choices=[name for name, _, _ in CELLS], help="these representations")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    p.add_argument("--table", action="store_true", help="print the table of what is there and stop")
    p.add_argument("--smoke", action="store_true", help="one epoch each, into runs/smoke")
    args = p.parse_args()
    runs, short = ("runs/smoke", " --epochs 1") if args.smoke else ("runs/methods", "")
    file = ROOT / ("runs/smoke/methods.jsonl" if args.smoke else "results/methods.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    there = {(line["method"], line["seed"]) for line in lines}
    todo = [(cell, seed) for seed in args.seeds for cell in CELLS
            if cell[0] in (args.only or cell[0]) and not {(method, seed) for method, _, _ in cell[2]} <= there]
    if todo and not args.table:
        for seed in args.seeds:
            if not (ROOT / f"data/digits-seed{seed}").exists():
                run(f"make_lt.py --seed {seed} --out data/digits-seed{seed}")

        def work(job):
            for line in measure(*job, runs, short):
                if (line["method"], line["seed"]) not in there:
                    lines.append(line)
                    with open(file, "a") as f:
                        f.write(json.dumps(line) + "\n")
            print(f"done: {job[0][0]}, seed {job[1]}", flush=True)
        with ThreadPoolExecutor(args.jobs) as pool:  # SSP starts from CL's backbone, which is many cells earlier
            for _ in pool.map(work, todo):
                pass
    print_table(lines)


if __name__ == "__main__":
    main()
