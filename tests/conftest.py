import importlib
import multiprocessing
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

import ddp
import make_lt

ROOT = Path(__file__).parent.parent
# The suite runs on the CPU: a process that sees a GPU cannot be forked once it has called backward, and equality to the
# bit is promised there only. TEST_GPU=0 shows it the first GPU, and leaves out what forks.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_GPU", "")
os.environ["OMP_NUM_THREADS"] = "1"  # of what the tests start; pytest-xdist fills the cores
torch.set_num_threads(1)
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # a GPU's convolutions would round to 10 bits, and literal loops do not


def pytest_collection_modifyitems(items):
    for item in items if torch.cuda.is_available() else ():
        if {"ranks", "bash"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.skip(reason="forks"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The embedded set, composed once."""
    root = tmp_path_factory.mktemp("digits") / "set"
    make_lt.make_digits(root)
    return root


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A clean copy of the project in which commands can be run."""
    root = tmp_path_factory.mktemp("project") / "kcl"
    left_out = shutil.ignore_patterns(".git", ".venv", "data", "runs", "__pycache__", ".*cache")
    shutil.copytree(ROOT, root, ignore=left_out)
    return root


@pytest.fixture
def script(monkeypatch):
    """script(train_rep, "--loss", "kcl", ...) runs a script's main in this process, as its command line would."""
    def run(module, *args):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        ddp.run(module.main)
    return run


def as_rank(rank, world, port, module, args, output):
    """Be one of torchrun's processes, but as a fork, which need not import torch again."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout = sys.stderr = open(output, "a", buffering=1)
    torch.set_num_threads(1)  # more would wait for threads that a fork does not copy
    sys.argv = [f"{module}.py", *map(str, args)]
    ddp.run(importlib.import_module(module).main)


@pytest.fixture
def ranks(tmp_path):
    """ranks(2, "train_rep", "--loss", "kcl", ...) runs a script's main on that many ranks and returns what they print. Ranks
    that have not ended after `seconds` are killed, and the test fails."""
    def run(world, module, *args, seconds=120):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        output, fork = tmp_path / f"ranks-{port}.txt", multiprocessing.get_context("fork")
        forks = [fork.Process(target=as_rank, args=(r, world, port, module, args, output)) for r in range(world)]
        for process in forks:
            process.start()
        end = time.monotonic() + seconds
        for process in forks:
            process.join(max(0, end - time.monotonic()))
        hung = [process for process in forks if process.is_alive()]
        for process in hung:
            process.kill()
        assert not hung, f"{len(hung)} ranks hung: {output.read_text()[-3000:]}"
        assert not any(process.exitcode for process in forks), output.read_text()[-3000:]
        return output.read_text()
    return run
