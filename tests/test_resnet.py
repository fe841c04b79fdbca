"""The encoders, and reading one from the files of other programs, laid out as their code writes them."""
import argparse
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
import torchvision

from resnet import ARCHS, branch, load_backbone


def test_shapes_and_the_shortcut_without_parameters():
    net = ARCHS["resnet8"](num_classes=7)
    x = torch.rand(2, 16, 32, 32)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert net.layer3(net.layer2(net.layer1(x))).shape == (2, 64, 8, 8)

    block = net.layer2[0]
    block.bn2.weight.data.zero_()  # what is left is the shortcut
    expected = torch.zeros(2, 32, 16, 16)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


# ---- files

def below(prefix, state):
    return {prefix + name: x for name, x in state.items()}


def scrambled(state):
    """Tensors with the same names and shapes but other numbers, which must not be taken."""
    return {name: x + 1 for name, x in state.items()}


LINEAR = {"weight": torch.ones(10, 64), "bias": torch.ones(10)}
MLP = {**below("0.", LINEAR), **below("2.", LINEAR)}
ARGS = argparse.Namespace(model="resnet8", lr_decay_epochs=[7, 8], crops=(0.4, 1.0), resume=None)


def sgd(lr):
    return {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": lr, "params": [0]}]}


def two_encoders(taken, other, s, fc):
    s = {**s, **below("fc.", fc)}
    return {**below(taken, s), **below(other, scrambled(s)), "module.queue": torch.ones(8, 16)}


def formats(s):
    """{who writes it: (what is in the file around the encoder's tensors s, how many are left out)}"""
    n, plain, head = len(s), {**s, **below("fc.", LINEAR)}, below("head.", MLP)
    swav = below("module.", {**s, **below("projection_head.", MLP), "prototypes.weight": torch.ones(8, 4)})
    deepcluster = below("module.", {**s, "prototypes.prototypes0.weight": torch.ones(8, 4)})
    return {
        "torchvision, timm; DINO, Barlow Twins, VICReg (released)": (plain, 2),
        "timm (training)": ({"arch": "resnet8", "state_dict": plain, "optimizer": sgd(0.1), "args": ARGS,
                             "state_dict_ema": scrambled(plain), "metric": 71.5}, 2),
        "MoCo v1, the authors' KCL": ({"epoch": 200, "arch": "resnet50", "optimizer": sgd(0.03), "state_dict": two_encoders(
            "module.encoder_q.", "module.encoder_k.", s, LINEAR)}, n + 5),
        "MoCo v2": ({"state_dict": two_encoders("module.encoder_q.", "module.encoder_k.", s, MLP)}, n + 9),
        "MoCo v3": ({"scaler": {"scale": 1.0}, "state_dict": {
            **two_encoders("module.base_encoder.", "module.momentum_encoder.", s, MLP), **below("module.predictor.", MLP)}}, n + 13),
        "the authors' CE": ({"best_acc1": torch.tensor(40.0), "state_dict": below("module.", plain)}, 2),
        "DINO": ({"student": below("module.", {**below("backbone.", scrambled(s)), **head}),
                  "teacher": below("module.", {**below("backbone.", s), **head}), "epoch": 800, "args": ARGS,
                  "optimizer": sgd(np.float64(0.3)), "dino_loss": {"center": torch.ones(1, 9)}}, 4),
        "Barlow Twins, VICReg": ({"epoch": 1000, "optimizer": sgd(0.2), "model": {
            **below("module.backbone.", s), **below("module.projector.", MLP), "module.bn.bias": torch.ones(4)}}, 5),
        "SwAV (released)": (swav, 5),
        "DeepCluster v2": ({"epoch": 9, "optimizer": sgd(np.float64(0.6)), "state_dict": deepcluster}, 1),
        "SupCon": ({"opt": ARGS, "optimizer": sgd(np.float32(0.05)), "model": {**below("encoder.", s), **head}}, 4),
        "SupCon, GPUs": ({"opt": ARGS, "epoch": 1, "model": {**below("encoder.module.", s), **head}}, 4),
        "solo-learn": ({"global_step": 3, "loops": {}, "state_dict": {
            **below("backbone.", s), **below("classifier.", LINEAR), **below("momentum_backbone.", scrambled(s))}}, n + 2),
        "solo-learn before 1.0": ({"state_dict": {**below("encoder.", s), **below("classifier.", LINEAR)}}, 2),
        "lightly": ({"hyper_parameters": {"num_classes": 10}, "state_dict": {
            **below("backbone.", s), **below("projection_head.layers.", MLP), **below("query_backbone.", scrambled(s)),
            "criterion.memory_bank.bank": torch.ones(4, 4)}}, n + 5),
        "classifier-balancing, targeted-supcon": ({"epoch": 90, "best_acc": np.float64(0.4), "centroids": None, "state_dict_best": {
            "classifier": below("module.fc.", LINEAR), "feat_model": below("module.", s)}}, 0),
        "classifier-balancing (latest)": ({"epoch": 90, "state_dict": {"feat_model": s, "classifier": below("fc.", LINEAR)}}, 0),
        "LDAM-DRW": ({"arch": "resnet32", "best_acc1": torch.tensor(77.0), "state_dict": below("module.", {
            **s, "linear.weight": torch.ones(64, 10)}), "optimizer": sgd(0.1)}, 1),
        "torch.compile": (below("_orig_mod.", plain), 2),
        "torch.compile, DDP": ({"model_state_dict": below("module._orig_mod.", plain)}, 2)}


@pytest.fixture(scope="module")
def trained():
    """A ResNet-8 whose numbers are nobody's default."""
    state = ARCHS["resnet8"]().state_dict()
    return {name: x + 0.5 if x.is_floating_point() else x + 7 for name, x in state.items() if "fc." not in name}


def assert_reads(file, arch, expected):
    state = load_backbone(file, arch).state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[name], x) for name, x in expected.items())


@pytest.mark.parametrize("who", formats({}))
def test_files_of_other_programs(trained, tmp_path, capsys, who):
    content, left_out = formats(trained)[who]
    for zipped in (True, False):  # before torch 1.6 files were not, as MoCo's released ones
        torch.save(content, tmp_path / "x.pth.tar", _use_new_zipfile_serialization=zipped)
        assert_reads(tmp_path / "x.pth.tar", "resnet8", trained)
        out = capsys.readouterr().out
        assert out.startswith(f"{tmp_path}/x.pth.tar: 42 of 42 tensors matched") and f"; {left_out} left out: " in out


def test_files_of_numpy_1(trained, tmp_path):
    """DINO's and SwAV's checkpoints were written with numpy 1, which has another name for the module of a number."""
    torch.save(formats(trained)["DINO"][0], tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert b"cnumpy.core.multiarray\n" in (tmp_path / "old.pth").read_bytes()
    assert_reads(tmp_path / "old.pth", "resnet8", trained)


def test_timm_writes_what_we_read_and_reads_what_we_write(tmp_path):
    model = timm.create_model("resnet18")
    args = argparse.Namespace(model="resnet18")
    ema = timm.utils.ModelEmaV2(timm.create_model("resnet18"))
    saver = timm.utils.CheckpointSaver(model, torch.optim.SGD(model.parameters()), args, ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    encoder = load_backbone(tmp_path / "last.pth.tar", "resnet18")

    torch.save(encoder.state_dict(), tmp_path / "backbone.pt")  # as train_rep.py does
    for net in (torchvision.models.resnet18(), timm.create_model("resnet18")):
        missing, unexpected = net.load_state_dict(torch.load(tmp_path / "backbone.pt"), strict=False)
        assert missing == ["fc.weight", "fc.bias"] and not unexpected
        state = net.state_dict()
        assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items() if "fc." not in name)


@pytest.mark.parametrize("arch", ["resnet18", "resnet8"])
def test_numbered_children(tmp_path, arch):
    """Lightly's examples: nn.Sequential(*list(resnet.children())[:-1])."""
    net = ARCHS[arch]()
    numbered = nn.Sequential(*list(net.children())[:-1]).state_dict()
    torch.save({"state_dict": {**below("backbone.", numbered), **below("projection_head.", MLP)}}, tmp_path / "x.ckpt")
    net.fc = nn.Identity()
    assert_reads(tmp_path / "x.ckpt", arch, net.state_dict())


def of_children(*names):
    """An architecture of your own, whose convolutions have these names."""
    def constructor(num_classes=10):
        net = nn.Sequential()
        for i, name in enumerate(names):
            net.add_module(name, nn.Conv2d(3 if i == 0 else 4, 4, 3))
        net.fc = nn.Linear(4, num_classes)
        return net
    return constructor


@pytest.mark.parametrize("names", [("stem", "head"), ("module", "linear"), ("encoder", "classifier"), ("projector", "0"), ("1", "0")])
def test_names_of_your_own(tmp_path, monkeypatch, names):
    """A child may be called as another program calls its heads or prefixes."""
    monkeypatch.setitem(ARCHS, "mine", of_children(*names))
    net = ARCHS["mine"]()
    del net.fc
    torch.save(net.state_dict(), tmp_path / "backbone.pt")
    assert_reads(tmp_path / "backbone.pt", "mine", net.state_dict())


def test_the_last_layer_must_be_fc(tmp_path, monkeypatch):
    """Otherwise the features would be another data set's logits."""
    monkeypatch.setitem(ARCHS, "mobile", torchvision.models.mobilenet_v3_small)
    torch.save(ARCHS["mobile"]().state_dict(), tmp_path / "x.pth")
    with pytest.raises(SystemExit, match="^error: mobile must end in an nn.Linear called fc"):
        load_backbone(tmp_path / "x.pth", "mobile")


def test_bbn_comes_back_with_both_branches(tmp_path):
    encoder = ARCHS["resnet8"]()
    encoder.fc = nn.Identity()
    branch(encoder).rebalanced.bn1.bias.data += 1
    torch.save(encoder.state_dict(), tmp_path / "backbone.pt")
    assert_reads(tmp_path / "backbone.pt", "resnet8", encoder.state_dict())


def test_half_precision_and_no_step_counters(trained, tmp_path):
    old = {name: x.half() for name, x in trained.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "x.pt")
    state = load_backbone(tmp_path / "x.pt", "resnet8").state_dict()
    assert all(torch.equal(state[name], x.float()) for name, x in old.items()) and state["bn1.num_batches_tracked"] == 0


def test_safetensors(trained, tmp_path, monkeypatch):
    safetensors.torch.save_file(trained, tmp_path / "x.safetensors")
    assert_reads(tmp_path / "x.safetensors", "resnet8", trained)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(SystemExit, match="error: .*x.safetensors needs a package: pip install safetensors"):
        load_backbone(tmp_path / "x.safetensors", "resnet8")


@pytest.mark.parametrize("change, sentence", [
    ({"layer1.0.conv1.weight": None}, "layer1.0.conv1.weight is absent in the file and .16, 16, 3, 3. in resnet8"),
    ({"conv1.weight": torch.ones(64, 3, 3, 3)}, "conv1.weight is .64, 3, 3, 3. in the file"),  # SupCon's stem
    ({"layer9.weight": torch.ones(2)}, "layer9.weight is .2,. in the file and absent in resnet8; pass the file's architecture"),
    ({"conv1.weight": None}, "has no conv1.weight, with or without a prefix .encoder_q., .*; its names begin with bn1, layer1")])
def test_a_half_loaded_backbone_is_refused(trained, tmp_path, change, sentence):
    torch.save({name: x for name, x in {**trained, **change}.items() if x is not None}, tmp_path / "x.pt")
    with pytest.raises(SystemExit, match=f"^error: .*x.pt .*{sentence}"):
        load_backbone(tmp_path / "x.pt", "resnet8")


def test_damaged_files_and_what_is_no_checkpoint(trained, tmp_path):
    torch.save(trained, tmp_path / "whole.pth")
    torch.save(trained, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(trained, tmp_path / "whole.safetensors")
    whole, old, safe = ((tmp_path / name).read_bytes() for name in ("whole.pth", "old.pth", "whole.safetensors"))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 94567890\n"
    files = {"a.pth": whole[:-1000], "b.pth": whole[:500], "c.pth": old[:-1000], "d.pth": pointer, "e.pth": b"", "f.pth": b"lr = 0.1",
             "g.pth": bytes(range(256)), "h.safetensors": safe[:-1000], "i.safetensors": pointer, "j.safetensors": b"", "k.safetensors": whole}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name, content in {"list.pth": list(trained.values()), "tensor.pth": torch.ones(2), "model.pth": ARCHS["resnet8"]()}.items():
        torch.save(content, tmp_path / name)
        files[name] = content
    for name in files:
        with pytest.raises(SystemExit, match=f"^error: .*{name} is damaged or not a checkpoint, or it holds more than tensors; save "):
            load_backbone(tmp_path / name, "resnet8")
    torch.save({**trained, "epoch": 3}, tmp_path / "flat.pth")            # what is no tensor is left out
    assert_reads(tmp_path / "flat.pth", "resnet8", trained)
