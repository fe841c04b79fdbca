"""
The CUDA paths, tested without a GPU. Tensors lie in the CPU's memory, but claim to be on cuda:0 and refuse what CUDA
refuses. They go through all three stages and detection, and the results must equal the CPU's to the bit.

The tensors refuse a call on tensors of both devices (except copies, indices and numbers), numpy, a generator of the
other device, pinning of elements that overlap, and a file that only a GPU can read. What makes the host wait for the
device is counted. Only a GPU can show the rest: CUDA's kernels and their rounding (bf16, cuDNN, foreach) and what else
torch's C++ chooses by device, NCCL and DDP, copies and streams that really run next to the host, pinning threads,
--compile, memory, and speed.
"""
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_det import TINY, TINY_RUN
from test_train_rep import without_times
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import baselines
import checkpoint
import data
import ddp
import det_data
import evaluate
import train_linear
import train_rep
import transfer_det

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")
CPU, GPU, on_cpu = torch.device("cpu"), torch.device("cuda", 0), torch._C._DisableTorchDispatch
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "repeat_interleave", "_unique2", "nms")
events = []                                                               # "step", or the line that waits for the GPU


def waits():
    frame = sys._getframe()
    while frame and Path(frame.f_code.co_filename).parent != Path(ddp.__file__).parent:
        frame = frame.f_back
    events.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "a test")


def on_gpu(x):
    return x if isinstance(x, Cuda) else torch.Tensor._make_subclass(Cuda, x)


class Cuda(torch.Tensor):
    """Everything that ATen does to this tensor, in the backward pass too, goes through __torch_dispatch__."""
    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = GPU, True, False

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name, kwargs, leaves = func._schema.name.split("::")[1], kwargs or {}, tree_leaves((args, kwargs))
        elsewhere = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Cuda)]
        if name == "copy_":
            if elsewhere and True not in args[2:]:
                waits()
        elif "index" in name and isinstance(args[1], (list, tuple)) and isinstance(args[0], Cuda):  # x[i], x[i] = y
            mask = any(i is not None and i.dtype == torch.bool for i in args[1])  # the host must know its size
            if elsewhere or mask and not (len(args) > 2 and args[2].numel() == 1):
                waits()
        elif any(x.ndim or name in ("cat", "stack") or x is args[0] and name[-1] == "_" for x in elsewhere):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found cuda:0 and cpu")
        elif any(isinstance(x, torch.Generator) for x in leaves):
            raise RuntimeError(f"{name}: expected a 'cuda' device type for generator but found 'cpu'")
        elif name in WAITS:
            waits()
        with on_cpu():
            out = func(*args, **kwargs)
        return out if name == "copy_" else tree_map_only(torch.Tensor, on_gpu, out)

    def cpu(self):
        waits()
        with on_cpu():
            return self.detach().as_subclass(torch.Tensor).clone()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy
    tolist = lambda self: self.cpu().tolist()
    __reduce_ex__ = lambda self, protocol: self.cpu().__reduce_ex__(protocol)


class Devices(TorchFunctionMode):
    """Catches calls that name a device, because torch would look for the GPU before it asks ATen."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        named = [x for x in (*args[1:], kwargs.get("device")) if isinstance(x, torch.device)]
        if not named:
            if func is not F.one_hot:
                return func(*args, **kwargs)
            with on_cpu():                                                # its C++ makes a tensor where it thinks it is
                return type(args[0])._make_subclass(type(args[0]), func(*args, **kwargs))
        cuda, x, args = named[0] == GPU, args[0], [CPU if isinstance(a, torch.device) else a for a in args]
        kwargs |= {"device": CPU} if "device" in kwargs else {}
        if func is not torch.Tensor.to:                                   # it makes a new tensor
            if cuda and kwargs.get("generator"):
                raise RuntimeError("expected a 'cuda' device type for generator but found 'cpu'")
            if cuda and func in (torch.tensor, torch.as_tensor) and not isinstance(x, Cuda):
                waits()
            return on_gpu(func(*args, **kwargs)) if cuda else func(*args, **kwargs)
        if isinstance(x, Cuda) == cuda:
            return func(*args, **kwargs)
        assert not (x.requires_grad and torch.is_grad_enabled()), "copies with a gradient are not simulated"
        if not cuda:
            return func(x.cpu(), *args[1:], **kwargs)
        if not kwargs.get("non_blocking") or x.nbytes > 2**16 and not hasattr(x, "pinned"):  # CUDA has a buffer of 64 kB
            waits()
        return on_gpu(func(x.detach().clone(), *args[1:], **kwargs))


def pin(x):
    x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)  # as torch does: fails where elements overlap
    x.pinned = True
    return x


class Loader(torch.utils.data.DataLoader):
    def __iter__(self):
        return (tree_map_only(torch.Tensor, pin, batch) for batch in super().__iter__())


@pytest.fixture
def gpu(monkeypatch, script):
    load, save, step, init, autocast = torch.load, checkpoint.save, torch.optim.SGD.step, ddp.init, torch.autocast

    def save_for_all(state, path):
        assert path.name == "ckpt.pt" or not any(isinstance(x, Cuda) for x in tree_leaves(state)), path
        save(state, path)

    def run(*args):
        events.clear()
        with monkeypatch.context() as m, Devices():
            for module in (data, det_data, transfer_det):
                m.setattr(module, "DataLoader", Loader)
            m.setattr(data, "channels", functools.cache(data.channels.__wrapped__))
            m.setattr(ddp, "init", lambda: init() and GPU)
            m.setattr(checkpoint, "save", save_for_all)
            m.setattr(torch, "load", lambda *a, map_location, **kw: load(*a, map_location={"cpu": "cpu"}[map_location], **kw))
            m.setattr(torch, "autocast", lambda kind, *a, **kw: autocast({"cuda": "cpu"}[kind], *a, **kw))
            m.setattr(torch.optim.SGD, "step", lambda self: events.append("step") or step(self))
            m.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
            script(*args)
    return run


def same(a, b):
    """Assert that two runs wrote the same files, except for times and paths. results.json is skipped, because its AP
    follows from detections.json."""
    names = [sorted(str(f.relative_to(x)) for f in x.rglob("*.*") if f.name != "results.json") for x in (a, b)]
    assert names[0] == names[1] != []
    for x, y in ((a / name, b / name) for name in names[0]):
        if x.suffix == ".pt":
            pairs = zip(*(tree_leaves(torch.load(file, weights_only=True)) for file in (x, y)), strict=True)
            assert all(torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q for p, q in pairs), x
        elif x.suffix == ".jsonl":
            assert without_times(x) == without_times(y)
        else:
            assert x.read_text().replace(str(a), str(b)) == y.read_text()


def test_what_is_refused_and_counted():
    with Devices():
        x, index = torch.ones(3, device=GPU), torch.tensor([0])
        for wrong, words in ((lambda: x + torch.ones(3), "same device"), (lambda: torch.ones(3).add_(x), "same device"),
                             (lambda: torch.stack([x[0], torch.tensor(1.0)]), "same device"),
                             (lambda: torch.rand(3, device=GPU, generator=torch.Generator()), "generator"),
                             (lambda: x.uniform_(generator=torch.Generator()), "generator"), (x.numpy, "numpy"),
                             (x.__array__, "numpy"), (lambda: pin(torch.ones(1, 2).expand(3, 2)), "single memory location")):
            with pytest.raises((RuntimeError, TypeError), match=words):
                wrong()
        for lines, call in ((1, x[0].item), (1, lambda: bool(x[0])), (1, x.tolist), (1, x.nonzero), (1, lambda: x[x > 0]),
                            (1, lambda: x[index]), (1, lambda: index.to(GPU)), (1, lambda: torch.tensor([1], device=GPU)),
                            (1, lambda: torch.ones(3).copy_(x)), (0, lambda: index.to(GPU, non_blocking=True)),
                            (0, lambda: x[index.to(GPU, non_blocking=True)]), (0, lambda: x * torch.tensor(2.0))):
            events.clear()
            call()
            assert len(events) == lines


@pytest.fixture(scope="module")
def lists(digits, tmp_path_factory):
    """Lists of 80 images for training, which is three steps of 24 per epoch, 40 for validation and 40 for testing."""
    root = tmp_path_factory.mktemp("lists")
    for name, n in ("train_full.txt", 80), ("val.txt", 40), ("test.txt", 40):
        lines = (digits / name).read_text().splitlines(keepends=True)
        (root / name).write_text("".join(lines[::len(lines) // n][:n]))
    return root


@pytest.mark.parametrize("loss", ["kcl", "cl", "fcl", *baselines.LOSSES, "ldam --drw", "kcl --aug sup --amp --virtual-gpus 2"])
def test_three_stages(loss, gpu, script, digits, lists, tmp_path, monkeypatch):
    """On the GPU, stage 1 is killed after its first epoch and resumes. Steps of stages 1 and 2 do not wait for the device."""
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0)
    rate, alive = train_rep.learning_rate, []
    monkeypatch.setattr(train_rep, "learning_rate", lambda *args: rate(*args) if args[2] < 0.5 or alive else alive.pop())

    def stages(run, out):
        run(train_rep, "--loss", *loss.split(), "--dataset", "digits", "--data", digits, "--list", lists / "train_full.txt",
            "--epochs", 2, "--batch", 24, "--queue", 50, "--dim", 16, "--out", out)
        between = " ".join(events).split("step")[1:-1]                    # a step and the next; then comes a line of the log
        run(train_linear, out / "backbone.pt", "--val", lists / "val.txt", "--epochs", 1, "--batch", 24, "--lr", 1, 10)
        between += " ".join(events).split("step")[1:-1]
        run(evaluate, out / "linear-lt", *out.glob("head.pt"), "--list", lists / "test.txt", "--val", lists / "val.txt",
            "--tau-norm", "--ncm")
        return between

    with pytest.raises(IndexError):
        stages(gpu, tmp_path / "gpu/run")
    alive.append(True)
    between = stages(gpu, tmp_path / "gpu/run")
    assert len(between) == 4 and not "".join(between).strip(), between
    stages(script, tmp_path / "cpu/run")
    same(tmp_path / "gpu", tmp_path / "cpu")


@pytest.mark.parametrize("arch", ["fpn", "c4"])
def test_detection(arch, gpu, script, tmp_path, monkeypatch):
    monkeypatch.setitem(transfer_det.HEADS, "digits", TINY)
    for run, name in (gpu, "gpu"), (script, "cpu"):
        run(transfer_det, "--arch", arch, "--pretrained", "none", *TINY_RUN, "--out", tmp_path / name / "run")
    assert events and json.loads((tmp_path / "cpu/run/detections.json").read_text())
    same(tmp_path / "gpu", tmp_path / "cpu")
