"""Files of others: checkpoints from and to the world, what is refused of a stranger, and fuzzing of every reader."""
import argparse
import io
import itertools
import json
import os
import pickle
import resource
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import checkpoint
import data
import det_data
import evaluate
import export
import make_lt
import reading
import resnet
import train_rep
import transfer_det
from ddp import InputError

# ---- checkpoints from the world


def below(prefix, state):
    return {prefix + name: x for name, x in state.items()}


def scrambled(state):
    """The same names and shapes, other numbers: what must not be taken."""
    return {name: x + 1 for name, x in state.items()}


LINEAR = {"weight": torch.ones(10, 64), "bias": torch.ones(10)}
MLP = {**below("0.", LINEAR), **below("2.", LINEAR)}
QUEUE = {"queue": torch.ones(8, 16), "queue_ptr": torch.zeros(1, dtype=torch.long)}


def formats(s):
    """{who writes it: (what its file holds around the encoder's tensors s, the prefix, how many are left out)}, with the
    names of each project's public code."""
    def moco(fc):
        return {"epoch": 200, "arch": "resnet50", "optimizer": {"state": {}, "param_groups": [{"lr": 0.03, "params": [0]}]},
                "state_dict": {**below("module.encoder_q.", {**s, **below("fc.", fc)}),
                               **below("module.encoder_k.", scrambled({**s, **below("fc.", fc)})), **below("module.", QUEUE)}}

    n = len(s)
    return {
        "torchvision, timm, VICReg, Barlow Twins, DINO: resnet50.pth": ({**s, **below("fc.", LINEAR)}, "", 2),
        "Barlow Twins, VICReg and DINO without fc": (s, "", 0),
        "MoCo v1": (moco(LINEAR), "module.encoder_q.", n + 6), "MoCo v2": (moco(MLP), "module.encoder_q.", n + 10),
        "the authors' supervised": ({"state_dict": below("module.", {**s, **below("fc.", LINEAR)})}, "module.", 2),
        "DINO, full": ({"student": below("module.", {**below("backbone.", scrambled(s)), **below("head.", MLP)}), "epoch": 800,
                        "teacher": below("module.", {**below("backbone.", s), **below("head.mlp.", MLP)})},
                       "module.backbone.", 4),
        "Barlow Twins, VICReg, full": ({"epoch": 1000, "model": {
            **below("module.backbone.", s), **below("module.projector.", MLP), "module.bn.running_mean": torch.ones(4)}},
            "module.backbone.", 5),
        "solo-learn": ({"epoch": 400, "global_step": 3, "state_dict": {
            **below("backbone.", s), **below("momentum_backbone.", scrambled(s)), **below("projector.", MLP), **QUEUE,
            **below("classifier.", LINEAR)}, "loops": {}}, "backbone.", n + 8),
        "solo-learn before 1.0": ({"state_dict": {**below("encoder.", s), **below("projector.", MLP)}}, "encoder.", 4),
        "lightly's benchmarks": ({"state_dict": {
            **below("backbone.", s), **below("query_backbone.", scrambled(s)), **below("projection_head.layers.", MLP),
            "criterion.memory_bank.bank": torch.ones(4, 4)}}, "backbone.", n + 5),
        "SwAV": ({**below("module.", s), **below("module.projection_head.", MLP),
                  "module.prototypes.weight": torch.ones(8, 4)}, "module.", 5),
        "SupCon": ({"model": {**below("module.encoder.", s), **below("module.head.", MLP)}}, "module.encoder.", 4)}


@pytest.fixture(scope="module")
def trained():
    """A ResNet-8 whose numbers are nobody's default."""
    torch.manual_seed(0)
    net = resnet.ARCHS["resnet8"]()
    return {name: x + 0.5 if x.is_floating_point() else x + 7 for name, x in net.state_dict().items() if "fc." not in name}


@pytest.mark.parametrize("who", formats({}))
def test_checkpoints_from_the_world(trained, tmp_path, capsys, who):
    content, prefix, left_out = formats(trained)[who]
    for legacy in (False, True):  # before torch 1.6, as MoCo's published ones
        torch.save(content, tmp_path / "x.pth.tar", _use_new_zipfile_serialization=not legacy)
        encoder = resnet.load_backbone(tmp_path / "x.pth.tar", "resnet8")
        assert all(torch.equal(x, trained[name]) for name, x in encoder.state_dict().items())
        printed = capsys.readouterr().out
        assert printed.startswith(f"{tmp_path}/x.pth.tar: {len(trained)} of {len(trained)} tensors matched"
                                  + f" after removing `{prefix}`" * bool(prefix))
        assert (f"({left_out})\n" in printed) if left_out else printed.endswith("matched\n" if not prefix else f"`{prefix}`\n")


def test_lightly_numbers_its_children(tmp_path):
    net = torchvision.models.resnet18()
    numbered = nn.Sequential(*list(net.children())[:-1])  # lightly's examples
    torch.save({"state_dict": {**below("backbone.", numbered.state_dict()), **below("projection_head.", MLP)}}, tmp_path / "x.ckpt")
    encoder = resnet.load_backbone(tmp_path / "x.ckpt", "resnet18")
    assert all(torch.equal(x, net.state_dict()[name]) for name, x in encoder.state_dict().items())


def test_only_a_head_may_be_missing_or_too_much(trained, tmp_path, capsys):
    file = tmp_path / "x.pt"
    first, counter = "layer1.0.conv1.weight", "bn1.num_batches_tracked"
    for change, expected in (
            ({first: None}, "does not fit --arch resnet8: 1 of its 42"), ({"layer9.weight": torch.ones(2)}, "1 unknown .first: layer9"),
            ({first: trained[first][:, :3]}, "of another shape"), ({first: trained[first].int()}, "of another shape"),
            ({first: trained[first] + torch.nan}, "layer1.0.conv1.weight holds numbers that are not finite"),
            ({first: 3}, "1 of its"), ({first: trained[first].expand(5, *trained[first].shape)}, "claims a tensor of shape .5, "),
            ({first: trained[first].to(torch.complex64)}, "ComplexFloatStorage"), ({"conv1.weight": None}, "not a plain state_dict"),
            ({first: trained[first].to_sparse()}, "_rebuild_sparse_tensor"), ({3: 4}, "1 unknown .first: 3")):
        torch.save({name: x for name, x in {**trained, **change}.items() if x is not None}, file)
        with pytest.raises(InputError, match=expected):
            resnet.load_backbone(file, "resnet8")
    with pytest.raises(InputError, match="resnet9: no such architecture; expected one of resnet8"):
        resnet.load_backbone(file, "resnet9")
    capsys.readouterr()
    torch.save({name: x.half() if x.is_floating_point() else x for name, x in trained.items() if name != counter}, file)
    half = resnet.load_backbone(file, "resnet8").state_dict()
    assert half[counter] == 0 and torch.allclose(half[first], trained[first], atol=1e-2) and half[first].dtype == torch.float32
    assert f": {len(trained) - 1} of {len(trained)} tensors matched\n" in capsys.readouterr().out


# ---- checkpoints to the world

def test_torchvision_and_timm_read_backbone_pt(tmp_path):
    """What train_rep.py writes: torchvision's names without fc."""
    state = {n: x + 0.5 for n, x in torchvision.models.resnet18().state_dict().items() if not n.startswith("fc.")}
    torch.save(state, tmp_path / "backbone.pt")
    for net in (torchvision.models.resnet18(), timm.create_model("resnet18")):
        missing, unexpected = net.load_state_dict(torch.load(tmp_path / "backbone.pt", weights_only=True), strict=False)
        assert missing == ["fc.weight", "fc.bias"] and not unexpected
        assert all(torch.equal(net.state_dict()[name], x.to(net.state_dict()[name].dtype)) for name, x in state.items())
    with torch.device("meta"):
        ours, theirs = torchvision.models.resnet50(), timm.create_model("resnet50")
    assert {n: x.shape for n, x in ours.state_dict().items()} == {n: x.shape for n, x in theirs.state_dict().items()}


# as MoCo's converter writes them for a ResNet-50; all of the rest follows from these by numbers
DETECTRON2 = {
    "stem.conv1.weight": (64, 3, 7, 7), "stem.conv1.norm.weight": (64,), "stem.conv1.norm.running_var": (64,),
    "res2.0.conv1.weight": (64, 64, 1, 1), "res2.0.conv1.norm.running_mean": (64,), "res2.0.conv3.norm.bias": (256,),
    "res2.0.shortcut.weight": (256, 64, 1, 1), "res2.0.shortcut.norm.weight": (256,), "res2.2.conv2.weight": (64, 64, 3, 3),
    "res3.0.conv2.weight": (128, 128, 3, 3), "res3.0.shortcut.weight": (512, 256, 1, 1), "res3.3.conv3.weight": (512, 128, 1, 1),
    "res4.5.conv1.weight": (256, 1024, 1, 1), "res5.0.shortcut.norm.running_var": (2048,), "res5.2.conv3.weight": (2048, 512, 1, 1),
    "res5.2.conv3.norm.num_batches_tracked": ()}


def test_export(script, tmp_path, capsys, monkeypatch):
    with torch.device("meta"):
        model = {export.detectron2_name(n): x.shape for n, x in torchvision.models.resnet50().state_dict().items() if "fc." not in n}
    assert {name: model[name] for name in DETECTRON2} == DETECTRON2 and len(model) == 318
    assert {name.split(".")[0] for name in model} == {"stem", "res2", "res3", "res4", "res5"}
    assert not any(x in name for name in model for x in ("layer", "bn", "downsample"))

    monkeypatch.setitem(resnet.ARCHS, "resnet10", partial(torchvision.models.ResNet, torchvision.models.resnet.BasicBlock, [1] * 4))
    state = {n: x for n, x in resnet.ARCHS["resnet10"]().state_dict().items() if not n.startswith("fc.")}
    torch.save(below("module.encoder_q.", state), tmp_path / "moco.pth")
    script(export, tmp_path / "moco.pth", "--to", "detectron2", tmp_path / "d2.pkl", "--arch", "resnet10")
    with open(tmp_path / "d2.pkl", "rb") as f:
        content = pickle.load(f)
    model = content.pop("model")
    assert content == {"__author__": "KCL", "matching_heuristics": True} and len(model) == len(state) == 72
    assert all(isinstance(x, np.ndarray) for x in model.values()) and np.array_equal(model["res3.0.conv2.weight"], state["layer2.0.conv2.weight"])
    script(export, tmp_path / "moco.pth", "--to", "safetensors", tmp_path / "x.safetensors", "--arch", "resnet10")
    back = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(back[name], x) for name, x in state.items()) and len(back) == 72
    resnet.load_backbone(tmp_path / "x.safetensors", "resnet10")
    assert "72 tensors in" in capsys.readouterr().out and not list(tmp_path.glob("*.tmp"))
    torch.save(resnet.ARCHS["resnet8"]().state_dict(), tmp_path / "cifar.pt")
    for args, expected in (((tmp_path / "cifar.pt", "--to", "detectron2", tmp_path / "y", "--arch", "resnet8"), "detectron2 has no resnet8"),
                           ((tmp_path / "cifar.pt", "--to", "safetensors", tmp_path / "y"), "say --arch"),
                           ((tmp_path / "none.pt", "--to", "safetensors", tmp_path / "y", "--arch", "resnet8"), "no such file")):
        with pytest.raises(SystemExit, match=expected):
            script(export, *args)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for args in ((tmp_path / "cifar.pt", "--arch", "resnet8"), (tmp_path / "x.safetensors", "--arch", "resnet10")):
        with pytest.raises(SystemExit, match="pip install safetensors"):
            script(export, *args, "--to", "safetensors", tmp_path / "y")
    assert not (tmp_path / "y").exists()


# ---- strangers' checkpoints

class Calls:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def archive(file, pickled, entries=(), compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, "w", compress) as z:
        for name, content in {"x/data.pkl": pickled, "x/byteorder": b"little", "x/version": b"3\n", **dict(entries)}.items():
            z.writestr(name, content)


def legacy(pickled, keys, tail=b""):
    start = [torch.serialization.MAGIC_NUMBER, 1001, {"protocol_version": 1001, "little_endian": True}]
    return b"".join([*(pickle.dumps(x, 2) for x in start), pickled, pickle.dumps(keys, 2), tail])


class Storage:
    """Pickles as a storage that claims n floats."""

    def __init__(self, n, key="0"):
        self.id = ("storage", torch.FloatStorage, key, "cpu", n)


def dumps(thing, view=()):
    f = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, x):
            return x.id + view if isinstance(x, Storage) else None
    pickler = Pickler(f, 2)
    pickler.dump(thing)
    return f.getvalue()


def tensor(storage, size=(2,), stride=(1,), offset=0, hooks=None, *more):
    return {"conv1.weight": Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, hooks or {}, *more)}


# {x: 1} and {1: x} with x = (x', x'), x' = (x'', x'') ... fifty deep, by hand: Python itself would not come back from a hash
NESTED = b")" + b"q\0h\0\x86" * 50
PAIRS = {"key": b"\x80\x02}" + NESTED + b"K\1s.", "value": b"\x80\x02}K\1" + NESTED + b"s."}


HOSTILE = {  # what is in the pickle -> the sentence
    "runs a command": ({"a": Calls(os.system, "touch harmed")}, "holds `posix.system`, where only tensors"),
    "evaluates": ({"a": Calls(eval, "open('harmed', 'w')")}, "holds `(__builtin__|builtins).eval`"),
    "allocates a bytearray": ({"a": Calls(bytearray, 10**13)}, "holds `(__builtin__|builtins).bytearray`"),
    "allocates a tensor": ({"a": Calls(torch.Tensor, 10**6, 10**7)}, "holds `torch(._tensor)?.Tensor`"),
    "allocates a storage": ({"a": Calls(torch.UntypedStorage, 10**13)}, "holds `torch.storage.UntypedStorage`"),
    "claims a storage": (tensor(Storage(10**12)), "claims 4,000,000,000,000 bytes"),
    "claims a little more": (tensor(Storage(7)), "claims 28 bytes|no file of torch.save"),
    "claims a negative storage": (tensor(Storage(-1)), "refers to what is no storage"),
    "claims two sizes": (tensor(Storage(6)) | {"b": tensor(Storage(7))}, "claims two sizes"),
    "one number often": (tensor(Storage(6), (10**6, 10**6), (0, 0)), "claims a tensor of shape .1000000, 1000000. in a storage of 6"),
    "a view outside": (tensor(Storage(6), (2,), (6,)), "claims a tensor of shape .2,. in a storage of 6"),
    "an offset outside": (tensor(Storage(6), offset=5), "claims a tensor"),
    "a negative stride": (tensor(Storage(6), (2,), (-1,)), "impossible shape"),
    "a fractional size": (tensor(Storage(6), (1.5,), (1,)), "impossible shape"),
    "a thousand dimensions": (tensor(Storage(6), (1,) * 1000, (1,) * 1000), "claims a tensor"),
    "a quantised tensor": ({"a": Calls(torch._utils._rebuild_qtensor, Storage(6), 0, (2,))}, "holds `torch._utils._rebuild_qtensor`"),
    "hooks": (tensor(Storage(6), hooks={0: 3}), "hooks or marks"),
    "conjugates": (tensor(Storage(6), (2,), (1,), 0, None, {"neg": True}), "hooks or marks"),
    "calls a string": ({"a": Calls(torch.Size, (1,))}, None),
    "a key that takes years to hash": (PAIRS["key"], "one container in two places"),
    "a value that takes years to print": (PAIRS["value"], "one container in two places"),
    "a namespace": ({"args": argparse.Namespace(lr=1)}, "holds `argparse.Namespace`, where only .*; if you trust it, save its state_dict alone"),
    "no dictionary": ([1, 2], "holds a list"), "a key that is none": ({None: 1}, "keys are no names")}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickles(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    thing, expected = HOSTILE[what]
    zipped = thing if isinstance(thing, bytes) else dumps(thing)
    archive("a.pt", zipped, {"x/data/0": bytes(24)})
    Path("b.pt").write_bytes(legacy(thing if isinstance(thing, bytes) else dumps(thing, (None,)), ["0"] if b"storage" in zipped else [], b"\6" + bytes(31)))
    for file in ("a.pt", "b.pt"):
        if expected is None:  # harmless, and loads
            assert reading.read(file, "x") == {"a": torch.Size([1])}
            continue
        with pytest.raises(InputError, match=f"^{file}: .*({expected}).*; expected a checkpoint$"):
            reading.read(file, "a checkpoint")
    assert not Path("harmed").exists()


def test_hostile_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = dumps(tensor(Storage(6)))
    archive("good.pt", good, {"x/data/0": bytes(24)})
    assert reading.read("good.pt", "x")["conv1.weight"].tolist() == [0, 0]
    Path("good.old").write_bytes(legacy(dumps(tensor(Storage(6)), (None,)), ["0"], b"\6" + bytes(31)))
    assert reading.read("good.old", "x")["conv1.weight"].tolist() == [0, 0]
    archive("bomb.pt", dumps(tensor(Storage(2**25), (2**25,))), {"x/data/0": bytes(2**27)}, zipfile.ZIP_DEFLATED)
    assert os.path.getsize("bomb.pt") < 2**18
    archive("script.pt", good, {"x/constants.pkl": b""})
    archive("twice.pt", good, {"x/data/0": bytes(24), "x/DATA/0": bytes(24)})
    archive("deep.pt", b"\x80\x02" + b"}" * (reading.STRUCTURE + 1) + b".")
    archive("short.pt", good, {"x/data/0": bytes(20)})  # torch 2.6 read four bytes behind it
    archive("new.pt", pickle.dumps({"a": 1}, 4))
    Path("front.pt").write_bytes(b"PK\3\4" + Path("good.pt").read_bytes())
    with zipfile.ZipFile("overlap.pt", "w") as z:  # every entry is the same megabyte
        z.writestr("x/data.pkl", good)
        z.writestr("x/data/0", bytes(2**20))
        for i in range(1, 99):
            entry = zipfile.ZipInfo(f"x/data/{i}")
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(entry, name, getattr(z.filelist[1], name))
            z.filelist.append(entry)
    with tarfile.open("tar.pt", "w") as t:
        t.addfile(tarfile.TarInfo("storages"))
    Path("empty.pt").touch()
    os.mkfifo("pipe.pt")
    Path("folder.pt").mkdir()
    Path("cut.pt").write_bytes(Path("good.old").read_bytes()[:-8])
    Path("unlisted.pt").write_bytes(legacy(dumps(tensor(Storage(6)), (None,)), []))
    for file, expected in (("bomb", "unpacks to 134,.* bytes from 1"), ("script", "TorchScript"), ("twice", "torch.save does not write"),
                           ("deep", "more than 8,388,608 bytes of structure"), ("short", "claims 24 bytes for storage 0, which has 20"),
                           ("new", "pickle of protocol|instruction PROTO 4"), ("front", "torch.save does not write"), ("overlap", "unpacks to"),
                           ("tar", "tar archive"), ("empty", "no file of torch.save"), ("pipe", "no such file"), ("folder", "no such file"),
                           ("cut", "no file of torch.save"), ("unlisted", "other storages"), ("none", "no such file")):
        with pytest.raises(InputError, match=f"{file}.pt: .*({expected})"):
            reading.read(f"{file}.pt", "a checkpoint")
    Path("x.safetensors").write_bytes((2**40).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}')
    with pytest.raises(InputError, match="x.safetensors: no file"):
        reading.read("x.safetensors", "a checkpoint")


def test_a_foreign_checkpoint_or_head(tmp_path, capsys):
    head = {**dict.fromkeys(("backbone", "backbone_sha256", "data", "list", "counts_of", "list_sha256", "name", "protocol"), "x"),
            "arch": "resnet8", "dataset": "digits", "weight": torch.ones(3, 4), "bias": torch.ones(3), "counts": [3, 2, 1],
            "mean": (0.1,) * 3, "std": (0.2,) * 3, "pixels": 32, "resize": 32}
    torch.save(head, tmp_path / "head.pt")
    assert evaluate.load_head(tmp_path / "head.pt", None, None)["counts"] == [3, 2, 1]
    for change, wrong in (({"weight": torch.ones(4)}, "weight or bias"), ({"bias": torch.ones(4)}, "weight or bias"), ({"counts": [1.5]}, "counts"),
                          ({"weight": torch.ones(3, 4) * torch.inf}, "weight or bias"), ({"pixels": 10**9}, "pixels or resize"), ({"std": (0.0,) * 3}, "mean or std"),
                          ({"mean": 3}, "mean or std"), ({"arch": "none"}, "arch or dataset"), ({"data": None}, "data"), ({"chosen": 3}, "chosen")):
        torch.save({**head, **change}, tmp_path / "head.pt")
        with pytest.raises(InputError, match=f"head.pt: not a head.pt .{wrong} is missing or none.; expected a head.pt of train_linear.py"):
            evaluate.load_head(tmp_path / "head.pt", None, None)
    for content in ({"settings": 3}, {"model": {}}, [1]):
        torch.save(content, tmp_path / "ckpt.pt")
        with pytest.raises(InputError, match="ckpt.pt does not load, nor one before it; --restart throws it away"):
            checkpoint.load(tmp_path, {}, (), False, "cpu")
        assert "ckpt.pt: " in capsys.readouterr().out  # why


# ---- strangers' lists

def test_lists_stay_below_the_data_folder(tmp_path):
    root = tmp_path / "data"
    for path in ("../x.png", "a/../../x.png", "a/..", "..", "/../x.png", "C:/x.png", "c:x.png", "a\\x.png", "..\\x.png", "a\0.png", "a\x1b[2J.png"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (root / "l.txt").write_text(f"a/x.png 0\n{path} 1\n")
        with pytest.raises(InputError, match="l.txt, line 2: .* is not a path below the data folder") as error:
            data.read_list(root, "l.txt")
        assert str(error.value).isprintable()
    (root / "l.txt").write_text("/n01/x.png 0\na/..x/b..png 1\n.../x 1\n//etc/passwd 2\n")
    assert data.read_list(root, "l.txt")[0] == ["train/n01/x.png", "a/..x/b..png", ".../x", "train//etc/passwd"]
    (root / "l.txt").write_text("a.png 9999999\n")
    with pytest.raises(InputError, match="label 9999999 in a list of 1 images"):
        data.read_list(root, "l.txt")


def test_links_stay_below_the_data_folder(tmp_path):
    real, secret = tmp_path / "disk/data", tmp_path / "secret"
    for folder in (real / "a", secret):
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "x.png")
    (real / "inner").symlink_to(real / "a")
    (real / "outer").symlink_to(secret)
    (real / "a/file.png").symlink_to(secret / "x.png")
    (tmp_path / "data").symlink_to(real)  # the root may be one
    (real / "l.txt").write_text("a/x.png 0\ninner/x.png 0\nouter/x.png 0\na/file.png 0\nnone/x.png 0\n")
    images = data.ImageList(tmp_path / "data", "l.txt", data.center(8, 8))
    assert images[0][0][0].shape == images[1][0][0].shape == (3, 8, 8)
    for i in (2, 3):
        with pytest.raises(InputError, match="leaves the data folder by a link, to .*secret/x.png; put a copy there, or name as --data"):
            images[i]
    with pytest.raises(InputError, match="is missing"):
        images[4]
    assert make_lt.check(tmp_path / "data", ["l.txt"], 0) == 3
    with pytest.raises(InputError, match="leaves the data folder"):
        det_data.load_file(tmp_path / "data", {"file_name": "outer/x.png", "width": 8, "height": 8})


def test_voc_entities_and_names(tmp_path):
    lists, notes = (tmp_path / "VOC2007" / folder for folder in ("ImageSets/Main", "Annotations"))
    lists.mkdir(parents=True)
    notes.mkdir()
    for name, xml, expected in (("../../secret", "", "is not the name of an image"), ("a/b", "", "is not the name"), ("x" * 300, "", "no such"),
                                ("a", '<!DOCTYPE a [<!ENTITY b "bbbb">]><a>&b;</a>', "with a document type"), ("a", "<a/>", "not an annotation"),
                                ("a", "<a><size><width/><height/></size></a>", "not an annotation of VOC"), ("gone", "", "no such annotation")):
        (lists / "test.txt").write_text(name)
        (notes / "a.xml").write_text(xml)
        with pytest.raises(InputError, match=expected):
            det_data.voc_dictionary(tmp_path, [("2007", "test")])


# ---- fuzzing: of any input comes a result or one InputError, and no great allocation on the way

def fuzz(n, **strategies):
    options = settings(max_examples=n, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    return lambda test: options(given(**strategies)(test))


@pytest.fixture(autouse=True)
def little_memory(request):
    """The process grows by less than 200 MB in a fuzzing test, and asks for less than 1 GB at once."""
    def asked():
        status = Path("/proc/self/status")
        return int(status.read_text().split("VmPeak:")[1].split()[0]) if status.exists() else 0
    held, virtual = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, asked()
    yield
    if "fuzz" in request.node.name or "hostile" in request.node.name:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 200_000 and asked() - virtual < 1_000_000  # kB


def survives(read, *args):
    """read(*args), or None where it is refused with a sentence that a terminal can print."""
    try:
        return read(*args)
    except InputError as error:
        assert str(error) and str(error).isprintable(), repr(str(error))


def mutated(good):
    """Bytes that were `good` before a few flips, deletions, insertions, repetitions or a cut."""
    n, place = len(good), st.integers(0, max(0, len(good) - 1))
    edit = st.one_of(st.tuples(st.just("flip"), place, st.integers(1, 255)), st.tuples(st.just("cut"), place, st.just(0)),
                     st.tuples(st.just("drop"), place, st.integers(1, 40)), st.tuples(st.just("insert"), place, st.binary(max_size=12)),
                     st.tuples(st.just("repeat"), place, st.integers(1, 60)), st.tuples(st.just("ones"), place, st.integers(1, 8)))

    def apply(edits):
        content = bytearray(good)
        for kind, i, x in edits:
            if kind == "flip" and i < len(content):
                content[i] ^= x
            elif kind == "cut":
                del content[max(i, n // 2):]
            elif kind == "drop":
                del content[i:i + x]
            elif kind == "insert":
                content[i:i] = x
            elif kind == "repeat":
                content[i:i] = content[i:i + x]
            elif kind == "ones":
                content[i:i + x] = b"\xff" * x
        return bytes(content)
    return st.lists(edit, min_size=1, max_size=4).map(apply)


class Tiny(nn.Module):
    """The smallest thing with an encoder's names: what is fuzzed is the reader."""

    def __init__(self, num_classes=2):
        super().__init__()
        self.conv1, self.bn1, self.fc = nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Linear(2, num_classes)


HEAD = {**dict.fromkeys(("backbone", "backbone_sha256", "data", "list", "counts_of", "list_sha256", "name", "protocol"), "x"),
        "arch": "resnet8", "dataset": "digits", "weight": torch.ones(2, 3), "bias": torch.ones(2), "counts": [2, 1],
        "mean": (0.1, 0.2, 0.3), "std": (0.2, 0.2, 0.2), "pixels": 32, "resize": 32}
WEIGHTS = {**HEAD, "state_dict": Tiny().state_dict(), "settings": {"lr": 0.1, "list": "x"}, "epoch": 1}


def saved(content, **how):
    f = io.BytesIO()
    torch.save(content, f, **how)
    return f.getvalue()


NEW, OLD = saved(WEIGHTS), saved(WEIGHTS, _use_new_zipfile_serialization=False)
with zipfile.ZipFile(io.BytesIO(NEW)) as z:
    ENTRIES = {entry.filename.replace("archive/", "x/"): z.read(entry) for entry in z.infolist()}


READERS = {"backbone": lambda file: resnet.load_backbone(file, "tiny"), "head": lambda file: evaluate.load_head(file, None, None),
           "checkpoint": lambda file: checkpoint.load(file.parent, {"lr": 0.1}, (), False, "cpu")}


@pytest.fixture
def tiny(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(resnet.ARCHS, "tiny", Tiny)
    return tmp_path / "ckpt.pt"


@pytest.mark.parametrize("good", [NEW, OLD], ids=["zip", "legacy"])
def test_fuzz_checkpoints(tiny, good):
    tiny.write_bytes(good)
    assert all(read(tiny) for read in READERS.values())

    @fuzz(500, content=st.one_of(mutated(good), st.binary(max_size=200).map(lambda tail: good[:300] + tail)), read=st.sampled_from([*READERS]))
    def run(content, read):
        tiny.write_bytes(content)
        survives(READERS[read], tiny)
    run()


def test_fuzz_the_pickle_in_an_archive(tiny):
    """With checksums that fit, which a mutated archive has not."""
    @fuzz(700, pickled=mutated(ENTRIES["x/data.pkl"]), read=st.sampled_from([*READERS]))
    def run(pickled, read):
        archive(tiny, pickled, {name: x for name, x in ENTRIES.items() if name.startswith("x/data/")})
        survives(READERS[read], tiny)
    run()


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.integers(-2**70, 2**70), st.floats(), st.text(max_size=8))
JSON = st.recursive(SCALARS, lambda x: st.one_of(st.lists(x, max_size=4), st.dictionaries(st.text(max_size=4), x, max_size=3)), max_leaves=6)
TENSORS = st.one_of(
    st.lists(st.integers(0, 3), max_size=4).map(torch.zeros), st.sampled_from([torch.float16, torch.int8, torch.bool, torch.complex64]).map(
        lambda dtype: torch.ones(2, 3, dtype=dtype)), st.just(torch.full((2, 3), torch.nan)), st.just(torch.ones(2, 3).to_sparse()),
    st.just(torch.ones(1).expand(2, 3)), st.just(torch.ones(()).as_strided((2**20, 2**20), (0, 0))), st.just(torch.ones(4, 9)[1:3, 2:8:2]),
    st.just(nn.Parameter(torch.ones(2, 3))), st.just(torch.ones(2, 3, device="meta")))


def test_fuzz_what_a_checkpoint_holds(tiny):
    """One to three entries of a good one replaced by anything that torch.save writes, or put below another key."""
    @fuzz(500, changes=st.dictionaries(st.one_of(st.sampled_from([*WEIGHTS, *WEIGHTS["state_dict"], "model", "0.weight", "backbone.conv1.weight"]), SCALARS.filter(
        lambda x: x == x)), st.one_of(TENSORS, JSON), min_size=1, max_size=3), read=st.sampled_from([*READERS]))
    def run(changes, read):
        content = {**(WEIGHTS["state_dict"] if read == "backbone" else WEIGHTS), **changes}
        torch.save(content, tiny)
        survives(READERS[read], tiny)
    run()


WORDS = st.one_of(st.sampled_from(["a/b.png", "/n01/x", "..", "/", "\\", "C:", "0", "12", "99999999", "-1", "\u0663", "1.5", "a b", "\x85", "\x1b", "\ufeff", "#"]),
                  st.text(max_size=6))


def test_fuzz_lists(tmp_path):
    file, seen = tmp_path / "l.txt", []

    @fuzz(800, content=st.one_of(st.binary(max_size=60), mutated(b"train/a/x.JPEG 0\n/n01440764/x.JPEG 1\n"), st.lists(
        st.tuples(WORDS, st.sampled_from(["", " ", "/", "\t", "\n", "\r\n"])), max_size=12).map(
            lambda words: "".join(itertools.chain(*words)).encode("utf-8", "surrogatepass"))))
    def run(content):
        file.write_bytes(content)
        survives(make_lt.read_counts, file)
        if found := survives(data.read_list, tmp_path, "l.txt"):
            paths, labels = found
            assert len(paths) == len(labels) and labels.min() >= 0 and len(data.class_counts(labels)) <= 100_001
            assert all(not os.path.isabs(path) and ".." not in path.split("/") for path in paths)
            assert all(os.path.realpath(tmp_path / path).startswith(f"{tmp_path.resolve()}/") for path in paths)
            seen.append(paths)
            with pytest.raises(InputError):
                data.ImageList(tmp_path, "l.txt", None)[0]
    run()
    assert len(seen) > 50  # not only refusals


# {reader: a good document}; each is mutated as text, and as a tree of which a node becomes another
DOCUMENTS = {
    "settings": {"settings": {"arch": "resnet8", "dataset": "digits", "data": "d", "list": "l", "list_sha256": "0", "loss": "ce"}},
    "splits": {"dataset": "digits", "lists": {}},
    "results": {"run": "r", "box": {"AP": 1.0, "AP50": None, "AP75": 2}, "mask": {"AP": 1.0, "AP50": 2.0, "AP75": 3.0}},
    "coco": {"images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 8}, {"id": 2, "file_name": "b.png", "width": 9, "height": 8}],
             "categories": [{"id": 1, "name": "a"}, {"id": 7, "name": "b"}],
             "annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 1, 4, 4.5], "area": 16, "iscrowd": 0,
                              "segmentation": [[1, 1, 5, 1, 5, 5]]},
                             {"image_id": 2, "category_id": 1, "bbox": [0, 0, 5, 5], "segmentation": {"size": [8, 9], "counts": [8, 20, 44]}},
                             {"image_id": 2, "category_id": 1, "bbox": [0, 0, 5, 5], "segmentation": det_data.to_rle(np.eye(8, 9, dtype=bool))}]},
    "inat": {"images": [{"id": 1, "file_name": "train_val2018/a.jpg"}], "annotations": [{"image_id": 1, "category_id": 3}]}}


def places(tree, at=()):
    yield at
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*at, key))


def grafted(tree, at, new):
    if not at:
        return new
    return type(tree)((key, grafted(x, at[1:], new) if key == at[0] else x) for key, x in tree.items()) if isinstance(tree, dict) else [
        grafted(x, at[1:], new) if i == at[0] else x for i, x in enumerate(tree)]


def json_readers(root, monkeypatch):
    """{reader: (the file that it reads, a function of no argument)}"""
    def splits():
        monkeypatch.setattr(sys, "argv", ["train_rep.py", "--data", str(root)])
        train_rep.parse_args()

    def coco():
        found = det_data.checked(det_data.coco_dictionary(root, "val2017"), "the test set", root, masks=True)
        scenes = det_data.Scenes(found, partial(det_data.load_file, root), masks=True)
        for i in range(len(scenes)):
            image, target = scenes[i]
            assert image.shape == (3, 8, 9) and target["masks"].shape[1:] == (8, 9)
        transfer_det.coco_ap({**found, "annotations": found["annotations"][:5]}, [
            {"image_id": found["images"][0]["id"], "category_id": found["categories"][0]["id"], "bbox": [0, 0, 3, 3], "score": 0.5}], "bbox")

    def inat():
        (root / "out").mkdir(exist_ok=True)
        for name in ("train", "val"):
            (root / f"out/iNaturalist18_{name}.txt").unlink(missing_ok=True)
        make_lt.make_inat(root, root / "out", True)

    for folder in ("annotations", "train_val2018", "val2017"):
        (root / folder).mkdir()
    for name in "ab":
        Image.new("RGB", (9, 8)).save(root / f"val2017/{name}.png")
    (root / "val2018.json").write_text(json.dumps(DOCUMENTS["inat"]))
    return {"settings": (root / "log.jsonl", lambda: checkpoint.settings_of(root / "backbone.pt")), "splits": (root / "splits.json", splits),
            "results": (root / "r.json", lambda: transfer_det.print_table([transfer_det.load_results(root / "r.json")] * 2)),
            "coco": (root / "annotations/instances_val2017.json", coco), "inat": (root / "train2018.json", inat)}


@pytest.mark.parametrize("reader", DOCUMENTS)
def test_fuzz_json(tmp_path, monkeypatch, capsys, reader):
    (file, read), good = json_readers(tmp_path, monkeypatch)[reader], DOCUMENTS[reader]
    text = json.dumps(good)
    file.write_text(text)
    read()  # is good
    trees = st.tuples(st.sampled_from(list(places(good))), JSON).map(lambda change: json.dumps(grafted(good, *change)).encode())

    @fuzz(240, content=st.one_of(trees, trees, mutated(text.encode()), st.sampled_from([b"[" * 100_000, b"9" * 10_000, b"", b"{}", b"1e999", b'"\\ud800"'])))
    def run(content):
        file.write_bytes(content)
        survives(read)
    run()
