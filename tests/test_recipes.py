"""The recipes: every line of each in miniature, as SMOKE=1 runs it, when they stop, and what slurm.sh starts."""
import importlib
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot  # noqa: F401  before the forks, which would import it one by one
from test_det import TINY

import data
import ddp
import transfer_det

ROOT = Path(__file__).parent.parent
SCRIPTS = {name: importlib.import_module(name.replace("/", ".")).main for name in (
    "make_lt", "train_rep", "train_linear", "evaluate", "transfer_det", "tools/plots", "recipes/stand_ins")}

# Stands for `python` and `torchrun`: sends its arguments to the test, prints what the test replies, and ends with the
# exit status at the reply's end. A real one would take three seconds to import torch, 200 times.
SHIM = """#!/bin/bash
exec 3<>/dev/tcp/127.0.0.1/{port}
printf '%s\\0' "$#" "$PWD" "${{0##*/}}" "$@" >&3
reply=$(cat <&3)
printf '%s' "${{reply%$'\\n'*}}"
exit "${{reply##*$'\\n'}}"
"""


def forked(cwd, argv, output):
    os.chdir(cwd)
    sys.stdout = sys.stderr = open(output, "w", buffering=1)
    torch.set_num_threads(1)
    sys.argv = argv
    ddp.run(SCRIPTS[re.sub(r"^.*?(((recipes|tools)/)?\w+)\.py$", r"\1", argv[0])])


@pytest.fixture(scope="module")
def project(tmp_path_factory, digits):
    """The recipes in a folder of their own, so that what they write lies there."""
    root = tmp_path_factory.mktemp("recipes")
    shutil.copytree(ROOT / "recipes", root / "recipes")
    (root / "data").mkdir()
    (root / "data/digits").symlink_to(digits)
    (root / ".venv/bin").mkdir(parents=True)
    return root


@pytest.fixture
def bash(project, tmp_path, monkeypatch):
    """bash("table4_ood", SMOKE=1) runs a recipe with images of 32 px. Returns its exit status, what it printed, and
    [[program, arguments ...] of each command]."""
    for name in ("imagenet", "inat18", "places365"):
        monkeypatch.setitem(data.DATASETS, name, {**data.DATASETS[name], "pixels": 32, "resize": 36})
    for name in ("voc", "coco"):
        monkeypatch.setitem(transfer_det.SPECS, name, {**transfer_det.SPECS[name], "scales": [48], "max_size": 64})
    monkeypatch.setitem(transfer_det.HEADS, "c4", TINY)
    with socket.create_server(("127.0.0.1", 0)) as server:
        for shim in (tmp_path / "python", tmp_path / "torchrun", project / ".venv/bin/python"):
            shim.write_text(SHIM.format(port=server.getsockname()[1]))
            shim.chmod(0o755)

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
                if args[:3] == ["-m", "pip", "install"]:
                    args = ["recipes/stand_ins.py", tmp_path / "nothing"]
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
    """Each line of the tables that were printed: `run: classifier` of evaluate.py, `run/data set` of transfer_det.py."""
    return re.findall(r"^\| (\S+/\S+) +\|", printed, re.M) + [
        f"{run}: {classifier}" for run, classifier in re.findall(r"^\| ([\w-]+) +\|.*\| ([^|,]+)[^|]*\|$", printed, re.M)
        if run != "run"]


LT, REP = "lt: linear on ImageNet_LT_train.txt", "rep: linear on train_full.txt"


def cifar(name, *methods, seeds=1):
    """The rows of cifar_lt.sh, without those of means."""
    methods = methods or ("ce", "ldam-drw", "supcon", "kcl-batch", "kcl")
    joint = {"ce": "joint CE", "ldam-drw": "joint LDAM-DRW"}
    groups = [[f"{name}-lt100-{method}: {joint[method]}" for method in methods if method in joint]]
    for protocol, trained_on in ("lt", "lt"), ("rep", "full"):
        groups.append([f"{name}-lt100-{method}: {protocol}: linear on data/{name}-lt100/train_{trained_on}.txt"
                       for method in methods if method != "ldam-drw"])
    return [row for group in groups for row in group * seeds]


SIX = [f"imagenet{lt}-{loss}" for lt in ("-lt", "") for loss in ("ce", "cl", "kcl")]
EXPECTED = {
    "table2_imagenet_lt": [
        "imagenet-lt-ce: joint CE", "imagenet-lt-ce: tau-norm of joint CE",
        *(f"imagenet-lt-{loss}: {LT}" for loss in ("ce", "cl", "fcl", "kcl")),
        *(f"imagenet-lt-ce-{sampler}: joint CE" for sampler in ("class", "sqrt", "progressive")),
        *(f"imagenet-lt-{run}: {REP}" for run in ("ce", "ce-class", "ce-sqrt", "ce-progressive", "cl", "fcl", "kcl"))],
    "table3_inaturalist": [
        "inat18-ce: joint CE", "inat18-cb-focal: joint CB-Focal", "inat18-ldam: joint LDAM",
        "inat18-ldam-drw: joint LDAM-DRW", "inat18-bbn: joint BBN", "inat18-ssp: joint CE from another backbone",
        "inat18-ce: lt: linear on iNaturalist18_train.txt", "inat18-ce: lt: lws on iNaturalist18_train.txt",
        "inat18-fcl: lt: linear on iNaturalist18_train.txt", "inat18-kcl: lt: linear on iNaturalist18_train.txt",
        "inat18-ce-tau: joint CE", "inat18-ce-tau: tau-norm of joint CE"],
    "table4_ood": [f"imagenet-{split}-{loss}: rep: linear on {half}train_full.txt" for split in ("overlap", "independent")
                   for loss in ("ce", "cl", "kcl") for half in (f"{split}_source/", f"{split}_target/", "")],
    "table6_imagenet": ["imagenet-ce: joint CE", *(f"imagenet-{loss}: {REP}" for loss in ("ce", "cl", "kcl"))],
    "places": [f"{run}: {REP}" for run in SIX],
    # each as its run ends, then all in one table
    "detection": [f"{run}/{name}" for name in ("voc", "coco") for _ in range(2) for run in SIX],
    "fig2_alpha": [f"imagenet-{alpha}-{loss}: {REP}" for alpha in ("lt0", "lt") for loss in ("ce", "cl")],
    "fig3_generalisation": [f"imagenet-overlap-{alpha}-ce: rep: linear on overlap_target/train_full.txt"
                            for alpha in ("lt0", "lt")],
    "fig5_k": [f"imagenet-lt-{run}: {LT}" for run in ("kcl", "fcl", "kcl-k2")],
    "cifar_lt": cifar("cifar10") + cifar("cifar100"),
    "cifar_gpu": [*cifar("cifar10", "ce", "kcl", seeds=3), "cifar10-lt100-published: lt: ldam on data/cifar10-lt100/train_lt.txt",
                  "cifar10-lt100-published: rep: linear on data/cifar10-lt100/train_full.txt",
                  *cifar("cifar10", "ldam-drw", "supcon", "kcl-batch", seeds=3)],
}


def test_none_is_forgotten():
    others = {"digits", "slurm", "smoke", "backbones"}  # below, and what the others source
    assert {file.stem for file in (ROOT / "recipes").glob("*.sh")} == others | set(EXPECTED)


@pytest.mark.parametrize("recipe", EXPECTED)
def test_every_line_in_small(bash, project, recipe):
    """Each command of the recipe ends well and the tables have their rows. A command has its real flags, and after them
    those that shorten it, so a flag that a script no longer knows fails here."""
    code, printed, commands = bash(recipe, SMOKE=1)
    assert code == 0, printed[-3000:]
    assert rows(printed) == EXPECTED[recipe]
    assert not any("--compile" in command for command in commands)  # minutes each, on a CPU
    if recipe == "fig5_k":  # it chooses, so the numbers on the test list are not overwritten
        written = (project / "runs/smoke/runs/seed0/imagenet-lt-kcl-k2/linear-lt").glob("*.json")
        assert [file.name for file in written] == ["on_ImageNet_LT_val_eval.json"]


@pytest.mark.parametrize("loss", ["ce", "ldam", "supcon", "kcl-batch", "kcl"])
def test_one_of_the_losses_side_by_side_fails(tmp_path, loss):
    """Then the recipe does too, before it evaluates."""
    log = tmp_path / "commands.txt"
    (tmp_path / "python").write_text(f'#!/bin/bash\necho "$*" >> {log}\n[[ "$*" != *"--loss {loss} "* ]] || exit 7\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "recipes").mkdir()
    shutil.copy(ROOT / "recipes/cifar_lt.sh", tmp_path / "recipes")       # it makes the folder of its runs
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run(["bash", tmp_path / "recipes/cifar_lt.sh"], env=env).returncode == 7
    assert "train_rep.py --loss kcl" in log.read_text() and "evaluate.py" not in log.read_text()


def test_the_main_job(bash):
    """The six rows of the README, by their names. With one seed nothing is printed about seeds."""
    code, printed, commands = bash("digits", SMOKE=1)
    assert code == 0, printed[-3000:]
    assert re.findall(r"^\| ([^|]+?) +\|", printed, re.M) == [
        "run", "CE, joint", "CE, tau-norm", "CE, cRT", "KCL", "balanced set: CE", "balanced set: KCL"]
    assert "seeds" not in printed and commands[0][1:4] == ["-m", "pip", "install"]


def test_run_again_it_resumes(bash):
    """Nothing is trained twice: neither a representation nor a classifier."""
    assert bash("fig3_generalisation", SMOKE=1, SEED=1)[0] == 0
    code, printed, _ = bash("fig3_generalisation", SMOKE=1, SEED=1)
    assert code == 0 and printed.count("is finished already") == 4
    assert rows(printed) == EXPECTED["fig3_generalisation"]


@pytest.mark.parametrize("recipe", [name for name in EXPECTED if "cifar" not in name])  # which would download
def test_without_data_one_sentence(bash, recipe):
    code, printed, commands = bash(recipe)
    assert code == 1 and re.fullmatch(r"error: /path/to/\S+( is missing|: no such folder).*; .*\n", printed.lstrip()), printed
    assert all(command[0] == "python" and command[1] == "make_lt.py" for command in commands) and len(commands) < 2


def test_slurm(tmp_path):
    """What slurm.sh starts on a cluster, with stubs of its commands. When its time runs out it queues itself again."""
    stubs = {"srun": 'exec "$@"', "torchrun": 'printf "%s\\n" "$@" > torchrun.txt; kill -USR1 $PPID; sleep 0.2; exit 9',
             "scontrol": 'echo "$@" >> scontrol.txt; printf "node7\\nnode8\\n"'}
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2",
           "SLURM_JOB_ID": "42", "SLURM_GPUS_ON_NODE": "4"}
    args = ["--loss", "kcl", "--data", "/some where", "--out", "runs/kcl"]
    subprocess.run(["bash", ROOT / "recipes/slurm.sh", *args], cwd=tmp_path, env=env)
    assert (tmp_path / "torchrun.txt").read_text().splitlines() == [
        "--nnodes=2", "--nproc_per_node=4", "--rdzv_id=42", "--rdzv_backend=c10d", "--rdzv_endpoint=node7:29500",
        "train_rep.py", *args]
    assert (tmp_path / "scontrol.txt").read_text().splitlines() == ["show hostnames node[7-8]", "requeue 42"]
