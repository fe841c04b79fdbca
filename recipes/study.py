"""
The paper's findings on the embedded digits. This script trains and evaluates every cell of results/findings.md except
those of the GPU. It appends one line per classifier to results/study.jsonl, which recipes/findings.py turns into the
page.

    python recipes/study.py                    # everything, most important first; if you run it again, it resumes
    python recipes/study.py --only headline    # one block, or one cell
    python recipes/study.py --smoke            # one epoch and one seed per cell, into runs/smoke

A cell is a representation (stage 1) with its classifiers (stage 2). A seed draws the digit images, the order of the
classes, the weights, the order of the images and the positives, so all cells of a seed see the same images. A line
holds the commands, the project's commit, the machine, the commands' CPU seconds on one thread (without the time that
Python takes to start), and what evaluate.py found.

The learning rate of each method is chosen on val among four rates, on four seeds that no reported run uses. A variant
takes its method's rate. On each run's val list stage 2 chooses among its eight rates, and tau-norm among 21 values of
tau.
"""
import argparse
import importlib
import json
import multiprocessing
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
LRS, TUNE_SEEDS = (0.03, 0.1, 0.3, 1), (10, 11, 12, 13)
HEADLINE_SEEDS, ENDS_SEEDS, SEEDS = range(100, 120), range(100, 110), range(100, 105)

# name -> train_rep.py's flags, and the classifier that chooses the learning rate
METHODS = {
    "ce": ("--loss ce", "lt"),
    "kcl": ("--loss kcl", "lt"),
    "fcl": ("--loss fcl", "lt"),
    "cl": ("--loss cl", "lt"),
    "supcon": ("--loss supcon", "lt"),
    "focal": ("--loss focal", "joint"),
    "cb-focal": ("--loss cb-focal", "joint"),
    "ldam": ("--loss ldam", "joint"),
    "ldam-drw": ("--loss ldam --drw", "joint"),
    "bbn": ("--loss bbn", "joint"),
}

# classifier -> train_linear.py's flags. rep trains on the balanced set; cached takes a quarter of the time
REP = "--protocol rep --features cached"
STAGE2 = {
    "lt": "--protocol lt",
    "rep": REP,
    "lws": "--classifier lws",
    # if the backbone saw half of the classes: classifiers for that half, for the other half, and for all classes
    "source": REP,
    "target": REP + " --list {half}_target/train_full.txt --out {out}/target",
    "full": REP + " --list train_full.txt --out {out}/full",
}
# classifier -> the file with its numbers
FILES = {
    "joint": "eval.json",
    "tau": "eval_tau_norm.json",
    "ncm": "eval_ncm.json",
    "lt": "linear-lt/eval.json",
    "rep": "linear-rep-cached/eval.json",
    "lws": "lws-lt/eval.json",
    "source": "linear-rep-cached/eval.json",
    "target": "target/eval.json",
    "full": "full/eval.json",
    "det": "det/results.json",
}
# what a line keeps from that file
KEPT = ("list", "chosen", "top1", "many", "medium", "few", "balancedness", "std",
        "per_class", "counts", "box", "mask")
# what --smoke adds to a command
SHORT = {
    "train_rep.py": " --epochs 1",
    "train_linear.py": " --epochs 1",
    "transfer_det.py": " --iterations 2 --train-scenes 16 --test-scenes 8 --precise-bn 1",
}

# method: None means that detection starts from random weights. init: the method whose backbone stage 1 starts from
Cell = namedtuple("Cell", "name method flags classifiers init", defaults=("", ("lt", "rep"), None))


def blocks():
    """[(name, seeds, cells)], most important first. A cell without --epochs takes train_rep.py's default."""
    ce = ("joint", "tau", "lt", "rep")
    headline = [
        Cell("kcl", "kcl"),
        Cell("ce", "ce", classifiers=(*ce, "lws", "ncm")),
        Cell("ce-200", "ce", "--epochs 200", ce),  # KCL's epochs
        Cell("ce-280", "ce", "--epochs 280", ce),  # KCL's CPU time: a KCL step takes as long as 1.4 CE steps
        Cell("fcl", "fcl"),
        Cell("ldam-drw", "ldam-drw", classifiers=("joint", "rep")),
    ]

    ends, fig2, fig3 = [Cell("cl", "cl")], [], []
    for alpha in ("lt0", "lt2", "lt4", "lt6", "lt8", "lt"):
        for loss in ("ce", "cl", "kcl"):
            if alpha != "lt":  # the cells of lt are above
                block = ends if alpha == "lt0" else fig2
                block.append(Cell(f"{loss}-{alpha}", loss, f"--list train_{alpha}.txt", ("rep",)))
            flags = f"--list overlap_source/train_{alpha}.txt"
            fig3.append(Cell(f"{loss}-overlap-{alpha}", loss, flags, ("source", "target")))

    table4 = []
    for half in ("overlap", "independent"):
        for loss in ("ce", "cl", "kcl"):
            flags = f"--list {half}_source/train_full.txt"
            table4.append(Cell(f"{loss}-{half}", loss, flags, ("source", "target", "full")))

    fig5 = [Cell(f"kcl-k{k}", "kcl", f"--num-positives {k}") for k in (1, 2, 4, 10, 20)]
    options = [Cell(f"kcl-{flag.replace(' ', '-')}", "kcl", f"--{flag}")
               for flag in ("fixed-divisor", "drop-unused", "first-k", "no-fill", "lr 0.1")]

    joint = ("joint", "rep")
    methods = [Cell(f"ce-{sampler}", "ce", f"--sampler {sampler}", joint)
               for sampler in ("class", "sqrt", "progressive")]
    methods += [Cell(loss, loss, classifiers=joint) for loss in ("focal", "cb-focal", "ldam", "bbn")]
    methods.append(Cell("ssp", "ce", "--init {out}/init/backbone.pt", joint, init="cl"))
    methods.append(Cell("supcon", "supcon"))

    detection = [Cell(f"det-{loss}", loss, classifiers=("det",)) for loss in ("ce", "cl", "kcl")]
    detection.append(Cell("det-random", None, classifiers=("det",)))

    return [
        ("headline", HEADLINE_SEEDS, headline),
        ("ends", ENDS_SEEDS, ends),
        ("methods", SEEDS, methods),
        ("fig5", SEEDS, fig5),
        ("fig2", SEEDS, fig2),
        ("options", SEEDS, options),
        ("fig3", SEEDS, fig3),
        ("table4", SEEDS, table4),
        ("detection", SEEDS, detection),
    ]


def trials(method, lrs=LRS):
    """The cells that choose a method's learning rate."""
    classifiers = METHODS[method][1:]
    return [Cell(f"tune-{method}-{lr:g}", method, f"--lr {lr:g}", classifiers) for lr in lrs]


def chosen(lines, method, lrs=LRS):
    """The rate with the best mean top-1 on val over the seeds. If there is a tie, the smaller one."""
    def on_val(lr):
        return sum(line["top1"] for line in lines if line["cell"] == f"tune-{method}-{lr:g}")
    return max(sorted(lrs), key=on_val)


def plan(cell, seed, rates, runs):
    """{classifier: the commands that train it}, and the command that evaluates all of them (None for detectors)."""
    detects = cell.classifiers == ("det",)
    # transfer_det.py's test scenes share no digit with data/digits, but they would with the images of another seed
    images = "data/digits" if detects else f"data/digits-seed{seed}"
    out = f"{runs}/{cell.name}-seed{seed}"

    def stage1(method, flags, out):
        words = [f"train_rep.py {METHODS[method][0]}"]
        if method in rates:
            words.append(f"--lr {rates[method]:g}")
        if flags:
            words.append(flags)
        words.append(f"--dataset digits --data {images} --seed {seed} --out {out}")
        return " ".join(words)

    first = []
    if cell.init:
        first.append(stage1(cell.init, "", f"{out}/init"))
    if cell.method:
        first.append(stage1(cell.method, cell.flags.format(out=out), out))

    commands = {}
    for name in cell.classifiers:
        commands[name] = list(first)
        if name in STAGE2:
            half = "independent" if "independent" in cell.name else "overlap"
            flags = STAGE2[name].format(half=half, out=out)
            commands[name].append(f"train_linear.py {out}/backbone.pt {flags} --seed {seed}")
    if detects:
        start = f"{out}/backbone.pt" if cell.method else "none --encoder resnet8s"
        command = f"transfer_det.py --pretrained {start} --seed {seed} --out {out}/det"
        commands["det"].append(command)
        return commands, None

    files = [FILES[name] for name in cell.classifiers if FILES[name].endswith("eval.json")]
    heads = " ".join(f"{out}/{file.replace('eval.json', 'head.pt')}" for file in files)
    flags = ""
    if "tau" in cell.classifiers:
        flags += " --tau-norm"
    if "ncm" in cell.classifiers:
        flags += " --ncm"
    if cell.name.startswith("tune-"):
        flags += " --list val.txt"  # nothing is chosen on the test list
    return commands, f"evaluate.py {heads}{flags} --workers 0"


def machine():
    import torch
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name, = re.findall(r"model name\s*: (.*)", info)[:1] or [platform.machine()]
    version = torch.__version__.partition("+")[0]
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {version}"


def git_commit():
    """The project's commit; empty in a copy without git's history."""
    command = ("git", "describe", "--always", "--dirty")
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def as_command(command, log):
    """Run a command in the fork that run() made, and append its output to log."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.argv = shlex.split(command)
    importlib.import_module("ddp").run(importlib.import_module(Path(sys.argv[0]).stem).main)


def run(command, log):
    """Run `train_rep.py ...` as a shell would, but in a fork, which has torch already. Returns its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    fork = multiprocessing.get_context("fork").Process(target=as_command, args=(command, log))
    fork.start()
    fork.join()
    if fork.exitcode:
        sys.exit(f"error: python {command}\n{log.read_text()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(task, runs, file, smoke, commit):
    """Run a cell with one seed and append its lines to file. A cell that was stopped half-way starts over."""
    cell, seed, rates = task
    out = runs / f"{cell.name}-seed{seed}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if not Path(f"data/digits-seed{seed}").exists():
        run(f"make_lt.py --seed {seed} --out data/digits-seed{seed}", out / "output.txt")

    commands, stage3 = plan(cell, seed, rates, runs)
    seconds = {}
    for command in sum(commands.values(), []):
        if command not in seconds:  # classifiers share stage 1
            short = SHORT[command.split()[0]] if smoke else ""
            seconds[command] = run(command + short, out / "output.txt")
    if stage3:
        run(stage3, out / "output.txt")

    text = ""
    for name, its in commands.items():
        scored = out / FILES[name]
        if cell.name.startswith("tune-"):
            scored = scored.with_name(f"on_val_{scored.name}")
        result = json.loads(scored.read_text())
        line = {"cell": cell.name, "seed": seed, "classifier": name, "commit": commit,
                "machine": machine(), "seconds": round(sum(seconds[c] for c in its), 1)}
        line |= {key: result[key] for key in KEPT if key in result}
        line["commands"] = [*its, stage3] if stage3 else its
        text += json.dumps(line) + "\n"
    with open(file, "a") as f:
        f.write(text)


def read(file):
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def main():
    names = ", ".join(name for name, *_ in blocks())
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", help=f"blocks or cells; blocks: {names}")
    p.add_argument("--seeds", type=int, nargs="+",
                   help="default: 100 to 119 for the headline, 100 to 109 for the ends of Fig. 2, else 100 to 104")
    p.add_argument("--jobs", type=int, default=2, help="number of runs at a time, with one thread each")
    p.add_argument("--smoke", action="store_true", help="one epoch, one trial and one seed per cell, into runs/smoke")
    args = p.parse_args()
    runs, file, lrs, tune_seeds = Path("runs/study"), Path("results/study.jsonl"), LRS, TUNE_SEEDS
    if args.smoke:
        runs, file = Path("runs/smoke/study"), Path("runs/smoke/study.jsonl")
        lrs, tune_seeds = LRS[:1], TUNE_SEEDS[:1]
        args.seeds = args.seeds or SEEDS[:1]

    os.chdir(ROOT)
    runs.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # must be set before torch is imported, because a fork loses torch's threads
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # methods are compared by CPU seconds
    sys.path.insert(0, str(ROOT))
    for script in ("make_lt", "train_rep", "train_linear", "evaluate", "transfer_det"):
        importlib.import_module(script)  # once for all forks
    # ask for it now, because the forks run the code that has just been imported, whatever is committed later
    commit = git_commit()
    measure_one = partial(measure, runs=runs, file=file, smoke=args.smoke, commit=commit)

    def work(title, tasks):
        """Measure the tasks, [(cell, seed, rates)], that have no line yet."""
        measured = {(line["cell"], line["seed"]) for line in read(file)}
        tasks = [task for task in tasks if (task[0].name, task[1]) not in measured]
        if not tasks:
            return
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
            for _ in tqdm(pool.map(measure_one, tasks), desc=title, total=len(tasks), unit="run"):
                pass

    rates = {}
    for block, seeds, cells in blocks():
        if args.only:
            cells = [cell for cell in cells if {block, cell.name} & set(args.only)]

        # choose a method's learning rate when its first cell comes up
        methods = [cell.method for cell in cells] + [cell.init for cell in cells]
        for method in dict.fromkeys(filter(None, methods)):
            if method not in rates:
                tried = trials(method, lrs)
                tasks = [(cell, seed, {}) for seed in tune_seeds for cell in tried]
                work(f"learning rate of {method}", tasks)
                rates[method] = chosen(read(file), method, lrs)

        work(block, [(cell, seed, rates) for seed in args.seeds or seeds for cell in cells])


if __name__ == "__main__":
    main()
