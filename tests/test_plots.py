"""The pictures: what is drawn, PCA against the SVD, and paper that no dark page reaches."""
import json
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import resnet
from tools import plots


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is drawn, before it is closed."""
    made, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda fig, file: (made.append(fig), save(fig, file)))
    plots.style()
    return made


def opaque(file):
    image = np.array(Image.open(file).convert("RGBA"))
    edges = (image[:10], image[-10:], image[:, :10], image[:, -10:])
    return (900 < image.shape[1] < 1000 and (image[..., 3] == 255).all() and all((edge == 255).all() for edge in edges)
            and (image[..., :3] < 128).any())


def test_pca_against_the_svd():
    x = np.random.RandomState(0).randn(50, 7) * np.arange(1, 8) + 3
    points, share = plots.pca(x)
    U, s, _ = np.linalg.svd(x - np.mean(x, axis=0), full_matrices=False)
    assert np.allclose(abs(points), abs(U[:, :2] * s[:2]))
    assert np.allclose(share, [s[0] ** 2 / (s ** 2).sum(), s[1] ** 2 / (s ** 2).sum()])
    assert np.array_equal(plots.pca(np.ones((4, 3)))[1], [0, 0])  # a collapsed backbone


@pytest.fixture
def head(digits, tmp_path):
    """A run with a joint head and its eval.json; the groups are by sizes that no list has."""
    torch.manual_seed(0)
    encoder = resnet.ARCHS["resnet8s"]()
    torch.save({n: x for n, x in encoder.state_dict().items() if n[:3] != "fc."}, tmp_path / "backbone.pt")
    counts = [20, 1200, 3, 50, 60, 70, 80, 90, 300, 7]
    spec = {name: data.DATASETS["digits"][name] for name in ("mean", "std", "pixels", "resize")}
    torch.save({"weight": torch.randn(10, 64), "bias": torch.zeros(10), "backbone": "backbone.pt", "arch": "resnet8s",
                "dataset": "digits", "data": str(digits), "list": "train_lt.txt", "counts": counts, "counts_of": "lt.txt",
                "list_sha256": "", "name": "digits-lt-ce-seed0", "protocol": "joint CE", "chosen": "", **spec}, tmp_path / "head.pt")
    row = {"run": "digits-lt-ce-seed0", "seed": 0, "protocol": "joint CE, instance sampling", "top1": 0.5, "balancedness": 0.7,
           "sigma": 0.1, "counts": counts, "counts_of": "lt.txt", "list": "val.txt", "per_class": np.arange(10) / 10}
    (tmp_path / "eval.json").write_text(json.dumps({**row, "per_class": [i / 10 for i in range(10)]}))
    return tmp_path / "head.pt"


def test_feature_space_shows_as_many_of_each_class(head, digits):
    loaded = plots.load_head(head)
    points, share, labels, shown = plots.feature_space(loaded, "val.txt", torch.device("cpu"), most=100)
    assert shown.tolist() == [1, 8, 7, 6, 5, 4, 3, 0, 9, 2]  # largest first
    assert points.shape == (100, 2) and np.bincount(labels).tolist() == [10] * 10 and 0 < share[1] <= share[0] < 1
    first = [line for line in (digits / "val.txt").read_text().splitlines() if line.endswith(" 1")][:10]
    images = torch.stack([torch.from_numpy(np.array(Image.open(digits / line[:-2]).convert("RGB"))) for line in first])
    backbone = resnet.load_backbone(head.with_name("backbone.pt"), "resnet8s").eval()
    with torch.no_grad():
        x = backbone((images.permute(0, 3, 1, 2) / 255 - 0.179) / 0.279).double()
    x = (x / x.norm(dim=1, keepdim=True)).numpy()
    distances = np.linalg.norm(points[:10, None] - points[:10], axis=-1)  # a projection shortens
    assert (labels[:10] == 1).all() and (distances <= np.linalg.norm(x[:, None] - x, axis=-1) + 1e-5).all()
    loaded["counts"] = loaded["counts"] + [1, 2]
    assert plots.feature_space(loaded, "val.txt", torch.device("cpu"))[3].tolist() == [1, 8, 7, 6, 5, 0, 9, 2, 11, 10]


def test_pictures_of_heads(script, head, tmp_path, figures):
    script(plots, head, "--out", tmp_path / "pictures")
    by_class, bars, space = figures
    order = [1, 8, 7, 6, 5, 4, 3, 0, 9, 2]
    assert by_class.axes[0].lines[0].get_ydata().tolist() == pytest.approx([10 * c for c in order])
    ticks = [tick.get_text() for tick in by_class.axes[0].get_xticklabels()]
    assert ticks == ["1200", "300", "90", "80", "70", "60", "50", "20", "7", "3"]
    assert [t.get_text() for t in by_class.legends[0].get_texts()] == ["digits-lt-ce: joint CE"]
    assert [[bar.get_width() for bar in ax.patches] for ax in bars.axes] == [[0.7], [50]]
    panel = space.axes[0]
    assert panel.get_title() == "digits-lt-ce-seed0" and panel.get_xlabel().startswith("PC 1: ")
    assert [t.get_text() for t in panel.texts] == ["1,200", *ticks[1:]] and len(panel.collections) == 10
    assert [t.get_text() for t in space.legends[0].get_texts()][::4] == ["1,200 many", "70 medium", "7 few"]
    assert space.legends[0].get_title().get_text() == "classes by their images in lt.txt"
    for name in ("accuracy_by_class", "balancedness", "features"):
        assert opaque(tmp_path / f"pictures/{name}.png")

    head.with_name("eval.json").unlink()
    with pytest.raises(SystemExit, match="no eval.json next to .*; run evaluate.py on it first, without --list"):
        script(plots, head, "--out", tmp_path / "pictures")


def test_seeds_are_one_mean(tmp_path, figures):
    rows = [{"run": f"digits-lt-{loss}-seed{i}", "seed": i, "protocol": f"lt: {'long ' * 20}", "top1": 0.5 + i / 10, "balancedness": 0.5,
             "sigma": 0.1, "counts": [20, 1200, 3], "counts_of": "lt.txt", "per_class": [0.5, 0.9, 0.1 * i]}
            for loss in ("ce", "kcl") for i in range(2)]
    plots.draw_accuracy(rows, tmp_path / "accuracy.png")
    plots.draw_balancedness(rows, tmp_path / "bars.png")
    by_class, bars = figures
    assert [line.get_ydata().tolist() for line in by_class.axes[0].lines] == [[90, 50, 5]] * 2
    assert all(len(line) <= 64 for t in by_class.legends[0].get_texts() for line in t.get_text().split("\n"))
    assert [[round(bar.get_width(), 9) for bar in ax.patches] for ax in bars.axes] == [[0.5, 0.5], [55, 55]]
    assert opaque(tmp_path / "accuracy.png") and opaque(tmp_path / "bars.png")


def test_class_sizes(script, digits, tmp_path, figures):
    script(plots, digits / "splits.json", "--out", tmp_path)
    lines = {line.get_label(): list(line.get_ydata()) for line in figures[0].axes[0].lines}
    assert lines["full"] == [350] * 10 and lines["lt"] == [350, 209, 125, 75, 45, 27, 16, 9, 5, 3] and len(lines) == 7
    assert opaque(tmp_path / "class_sizes.png")


def test_without_matplotlib_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="error: tools/plots.py draws with matplotlib: pip install matplotlib"):
        runpy.run_path(plots.__file__)
