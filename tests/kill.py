"""
Kill a real training run at random moments, again and again, and see that it ends where an undisturbed one does.

    python tests/kill.py --kills 60 --out runs/kill            # about 3 minutes; results/reliability.md has its output
    python tests/kill.py --elastic --out runs/kill             # one of two ranks, under torchrun with --max-restarts

SIGKILL (three of four) and the signals that the run may answer with a checkpoint: SIGTERM, SIGINT, SIGUSR1. A checkpoint
is written every epoch of three steps, so that many kills fall into the writing of one.
"""
import argparse
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ddp  # noqa: E402 (the folder of the scripts has to be named first)
import make_lt  # noqa: E402
import train_rep  # noqa: E402


def forked(args):
    sys.argv = ["train_rep.py", *args]
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)
    ddp.run(train_rep.main)


def start(args):
    process = multiprocessing.get_context("fork").Process(target=forked, args=(args,))
    process.start()
    return process


def final(out):
    ckpt = torch.load(out / "ckpt.pt", weights_only=True)
    tensors = {**torch.load(out / "backbone.pt", weights_only=True), **{f"model.{n}": x for n, x in ckpt["model"].items()}}
    return {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=60)
    p.add_argument("--loss", default="kcl")
    p.add_argument("--elastic", action="store_true", help="two ranks under torchrun, one of them killed")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("runs/kill"))
    args = p.parse_args()
    rng = random.Random(args.seed)
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    digits = args.out / "digits"
    make_lt.make_digits(digits)
    (args.out / "small.txt").write_text("".join((digits / "train_lt0.txt").read_text().splitlines(keepends=True)[::8]))
    epochs = max(4, args.kills // 2)
    run = ["--loss", args.loss, "--dataset", "digits", "--data", str(digits), "--list", str(args.out / "small.txt"),
           "--batch", "36", "--queue", "100", "--save-every", "1", "--epochs", str(epochs), "--out"]

    if args.elastic:
        straight, killed = args.out / "straight", args.out / "killed"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1",
                    str(ROOT / "train_rep.py"), *run]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*torchrun, straight], env=env, check=True, capture_output=True)
        with open(args.out / "torchrun.txt", "w") as said:
            process = subprocess.Popen([*torchrun, killed], env=env, stdout=said, stderr=subprocess.STDOUT)
        while not (killed / "ckpt.pt").exists():
            time.sleep(0.05)
        time.sleep(rng.random())
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(rng.choice(ranks)), signal.SIGKILL)
        code = process.wait()
        if code:
            sys.exit(f"error: torchrun ended with {code}")
        print(f"one of two ranks killed under torchrun: the same weights and queue: "
              f"{same(final(straight), final(killed))}")
        return

    begun = time.time()
    process = start([*run, str(args.out / "straight")])
    process.join()
    length, first = time.time() - begun, final(args.out / "straight")

    kills, codes, during_write = 0, {}, 0
    while True:
        process = start([*run, str(args.out / "killed")])
        if kills < args.kills:
            process.join(rng.uniform(0.2, 1) * length * 4 / args.kills)
            if process.is_alive():
                number = rng.choice([signal.SIGKILL] * 3 + [rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])])
                os.kill(process.pid, number)
                process.join(60)
                if process.exitcode:
                    kills += 1
                    during_write += (args.out / "killed/ckpt.pt.tmp").exists()
                    codes[process.exitcode] = codes.get(process.exitcode, 0) + 1
                    continue
        process.join()
        if process.exitcode:
            sys.exit(f"error: after {kills} kills the run ended with {process.exitcode}")
        if kills >= args.kills:
            break
        (args.out / "killed/backbone.pt").unlink()  # it was faster than the kills: from its last checkpoint but one
        shutil.copy(args.out / "killed/ckpt.prev.pt", args.out / "killed/ckpt.pt")
    ok = same(first, final(args.out / "killed"))
    print(f"{kills} kills of a run of {3 * epochs} steps ({args.loss}; exit codes {dict(sorted(codes.items()))}; "
          f"{during_write} while a checkpoint was written): the same weights, BatchNorm statistics and queue: {ok}")
    if not ok:
        sys.exit(1)


if __name__ == "__main__":
    main()
