"""The recipes: every line of every one, in small, as SMOKE=1 runs it; where they stop; what slurm.sh starts."""
import importlib
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

import data
import ddp
import transfer_det
from test_det import TINY

matplotlib.use("Agg")
import matplotlib.pyplot  # noqa: E402, F401  before the forks, which would import it one by one

ROOT = Path(__file__).parent.parent
SCRIPTS = {name: importlib.import_module(name.replace("/", ".")).main for name in (
    "make_lt", "train_rep", "train_linear", "evaluate", "transfer_det", "recipes/stand_ins")}

# Stands for `python` and `torchrun`: hands its arguments to the test, and ends as the test says. A real one would take
# three seconds to import torch, 200 times.
SHIM = """#!/bin/bash
exec 3<>/dev/tcp/127.0.0.1/{port}
printf '%s\\0' "$#" "$PWD" "${{0##*/}}" "$@" >&3
said=$(cat <&3)
printf '%s\\n' "${{said%$'\\n'*}}"
exit "${{said##*$'\\n'}}"
"""


def forked(cwd, argv, output):
    os.chdir(cwd)
    sys.stdout = sys.stderr = open(output, "w", buffering=1)
    torch.set_num_threads(1)
    sys.argv = argv
    ddp.run(SCRIPTS[re.sub(r"^.*?((recipes/)?\w+)\.py$", r"\1", argv[0])])


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The recipes in a folder of their own, so that what they write lies there."""
    root = tmp_path_factory.mktemp("recipes")
    shutil.copytree(ROOT / "recipes", root / "recipes")
    return root


@pytest.fixture
def bash(project, tmp_path, monkeypatch):
    """bash("table4_ood", SMOKE=1): a recipe, with images of 32 px; returns (exit status, what it printed, [[program,
    arguments ...] of each command])."""
    for name in ("imagenet", "inat18", "places365"):
        monkeypatch.setitem(data.DATASETS, name, {**data.DATASETS[name], "pixels": 32, "resize": 36})
    for name in ("voc", "coco"):
        monkeypatch.setitem(transfer_det.SETTINGS, name, {**transfer_det.SETTINGS[name], "scales": [48], "max_size": 64})
    monkeypatch.setitem(transfer_det.HEADS, "c4", TINY)
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("python", "torchrun"):
            (tmp_path / name).write_text(SHIM.format(port=server.getsockname()[1]))
            (tmp_path / name).chmod(0o755)

        def run(recipe, **env):
            commands = []
            env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **{name: str(x) for name, x in env.items()}}
            with open(tmp_path / "printed.txt", "w") as printed:
                bash = subprocess.Popen(["bash", project / f"recipes/{recipe}.sh"], env=env, stdout=printed, stderr=printed)
            server.settimeout(0.02)
            while bash.poll() is None:
                try:
                    shim = server.accept()[0]
                except TimeoutError:
                    continue
                shim.settimeout(60)
                received = b""
                while (words := received.decode().split("\0"))[0] == "" or len(words) < int(words[0]) + 4:
                    received += shim.recv(65536)
                _, cwd, program, *args = words[:-1]
                commands.append([program, *args])
                if program == "torchrun":
                    assert re.fullmatch(r"--nproc_per_node=\d+", args.pop(0))
                fork = multiprocessing.get_context("fork").Process(target=forked, args=(cwd, args, tmp_path / "fork.txt"))
                fork.start()
                fork.join()
                with shim:
                    shim.sendall(f"{(tmp_path / 'fork.txt').read_text()}\n{fork.exitcode}".encode())
            return bash.returncode, (tmp_path / "printed.txt").read_text(), commands
        yield run


def rows(printed):
    """Of evaluate.py's tables: a run and its classifier a line."""
    return [f"{run}: {classifier}" for run, classifier in re.findall(r"^\| (\S+) +\|.*\| ([^|,]+)[^|]*\|$", printed, re.M)
            if run != "run"]


EXPECTED = {}


@pytest.mark.parametrize("recipe", ["table2_imagenet_lt", "table3_inaturalist", "table4_ood", "table6_imagenet", "places", "detection", "fig2_alpha", "fig3_generalisation", "fig5_k", "cifar_lt"])
def test_every_line_in_small(bash, recipe):
    code, printed, commands = bash(recipe, SMOKE=1, SEED=3)
    assert code == 0, printed[-3000:]
    print(recipe, len(commands), rows(printed), sep="\n")
