"""tools/: the export to other programs, and the benchmark's yardsticks."""
import pickle
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

from resnet import ARCHS, branch
from tools import bench, export

CPU = torch.device("cpu")

# as MoCo's converter writes them for a ResNet-50; the rest follows from these by numbers
DETECTRON2 = {
    "stem.conv1.weight": (64, 3, 7, 7), "stem.conv1.norm.weight": (64,), "stem.conv1.norm.running_var": (64,),
    "res2.0.conv1.weight": (64, 64, 1, 1), "res2.0.conv3.norm.bias": (256,), "res2.0.shortcut.weight": (256, 64, 1, 1),
    "res2.0.shortcut.norm.weight": (256,), "res3.0.conv2.weight": (128, 128, 3, 3), "res4.5.conv1.weight": (256, 1024, 1, 1),
    "res5.0.shortcut.norm.running_var": (2048,), "res5.2.conv3.norm.num_batches_tracked": ()}


def test_names_of_detectron2():
    with torch.device("meta"):
        state = torchvision.models.resnet50().state_dict()
    shapes = {export.detectron2_name(name): x.shape for name, x in state.items() if "fc." not in name}
    assert {name: shapes[name] for name in DETECTRON2} == DETECTRON2 and len(shapes) == 318
    assert {name.split(".")[0] for name in shapes} == {"stem", "res2", "res3", "res4", "res5"}
    assert not any(x in name for name in shapes for x in ("layer", "bn", "downsample"))


def test_export(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ARCHS, "resnet10", partial(torchvision.models.ResNet, torchvision.models.resnet.BasicBlock, [1] * 4))
    state = {name: x for name, x in ARCHS["resnet10"]().state_dict().items() if "fc." not in name}
    torch.save({f"module.encoder_q.{name}": x for name, x in state.items()}, tmp_path / "moco.pth")

    script(export, tmp_path / "moco.pth", "--to", "detectron2", tmp_path / "d2.pkl", "--arch", "resnet10")
    content = pickle.loads((tmp_path / "d2.pkl").read_bytes())
    model = content.pop("model")
    assert content == {"__author__": "KCL", "matching_heuristics": True} and len(model) == len(state)
    assert np.array_equal(model["res3.0.conv2.weight"], state["layer2.0.conv2.weight"])
    said = capsys.readouterr().out
    assert "MODEL.RESNETS.STRIDE_IN_1X1: False" in said and "INPUT.FORMAT: RGB" in said
    assert "PIXEL_MEAN: [123.675, 116.28, 103.53], MODEL.PIXEL_STD: [58.395, 57.12, 57.375]" in said

    script(export, tmp_path / "moco.pth", "--to", "safetensors", tmp_path / "x.safetensors", "--arch", "resnet10")
    back = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(back[name], x) for name, x in state.items()) and len(back) == len(state)
    assert f"wrote {len(state)} tensors to {tmp_path}/x.safetensors" in capsys.readouterr().out


def test_what_cannot_be_exported(script, tmp_path):
    encoder = ARCHS["resnet8"]()
    torch.save(encoder.state_dict(), tmp_path / "cifar.pt")
    branch(encoder)
    torch.save(encoder.state_dict(), tmp_path / "bbn.pt")
    for file, to, arch, sentence in (("cifar.pt", "detectron2", ["--arch", "resnet8"], "detectron2 has no resnet8"),
                                     ("cifar.pt", "safetensors", [], "no log.jsonl of train_rep.py next to .*; pass --arch"),
                                     ("bbn.pt", "safetensors", ["--arch", "resnet8"], "two branches")):
        with pytest.raises(SystemExit, match=f"^error: .*{sentence}"):
            script(export, tmp_path / file, "--to", to, tmp_path / "y", *arch)
    assert not (tmp_path / "y").exists()


# ---- the benchmark

def test_quick_benchmark_has_every_row(script, capsys):
    threads = torch.get_num_threads()
    script(bench, "--quick")
    torch.set_num_threads(threads)
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    ours = [row for row in table if "metric_learning" not in row[0] and "lightly" not in row[0]]
    assert len(ours) == 10 + 8 * torch.cuda.is_available() and all(len(row) == 5 and float(row[1].split()[0].strip("*")) > 0 for row in table)


def test_peak_memory_of_known_allocations():
    def f():
        a = torch.empty(2**20)                                            # 4 MiB
        b = torch.empty(2**21)                                            # 8 MiB more
        del a, b
        torch.empty(2**19)                                                # 2 MiB when they are gone
    assert bench.peak_memory(f, CPU) == 12


def test_rounds_in_turn_and_the_median_of_ratios():
    calls, a = [], bench.argparse.Namespace(quick=False, device=CPU)
    times = bench.in_turn(a, 3, lambda: calls.append("a"), lambda: calls.append("b"))
    assert "".join(calls) == "ab" * 5 and [len(t) for t in times] == [3, 3]
    assert bench.ratio("x", [2.0, 3.0, 8.0], [1.0, 3.0, 2.0], 1.9) == "| x | **2** | 1.9 | 3000 / 2000 ms | 3 |"
