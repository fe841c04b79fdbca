"""Metrics against closed forms and literal loops; heads together against each alone."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import ddp
import evaluate
import make_lt
import resnet
import train_linear
from evaluate import balancedness, feature_space, group_accuracy, hits, pca, scores, tau_normalize


@pytest.fixture
def process_group():
    ddp.init()
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("n, m, high, low", [(5, 5, 0.9, 0.1), (3, 7, 0.8, 0.75), (9, 1, 1.0, 0.0)])
def test_balancedness_of_two_groups(sigma, n, m, high, low):
    """p^2 + (1-p)^2 + 2 p (1-p) exp(-d^2 / sigma)."""
    p = n / (n + m)
    closed = p ** 2 + (1 - p) ** 2 + 2 * p * (1 - p) * math.exp(-(high - low) ** 2 / sigma)
    assert balancedness([high] * n + [low] * m, sigma) == pytest.approx(closed, rel=1e-12)


def test_balancedness_against_the_literal_sum_and_its_bounds():
    acc = np.random.RandomState(0).rand(30)
    literal = sum(math.exp(-abs(a - b) ** 2 / 0.1) for a in acc for b in acc) / 30 ** 2
    assert balancedness(acc) == pytest.approx(literal, rel=1e-12)
    assert balancedness([0.3] * 7) == 1 and balancedness([0.5]) == 1
    assert 1 / 2 < balancedness([0, 1], sigma=0.1) < 1 / 2 + 1e-4
    assert balancedness(torch.tensor([0.2, 0.4])) == pytest.approx(0.5 + 0.5 * math.exp(-0.4), rel=1e-6)


@pytest.mark.parametrize("acc, sigma", [([50, 60], 0.1), ([], 0.1), ([float("nan")], 0.1), ([-0.1], 0.1), ([0.5], 0)])
def test_balancedness_refuses_nonsense(acc, sigma):
    with pytest.raises(ValueError, match="expected class accuracies"):
        balancedness(acc, sigma)


def test_groups_are_means_of_class_accuracies():
    acc, sizes = [0.9, 0.7, 0.6, 0.5, 0.1], [1280, 101, 100, 20, 19]
    assert group_accuracy(acc, sizes) == {"many": 0.8, "medium": 0.55, "few": 0.1}
    assert group_accuracy([0.5, 0.7], [50, 60]) == {"many": None, "medium": 0.6, "few": None}


def test_hits_and_scores_against_literal_loops(process_group):
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(300, 8, generator=g), torch.randint(8, (300,), generator=g)
    labels[:8] = torch.arange(8)
    n, top1, top5 = [0] * 8, [0] * 8, [0] * 8
    for row, y in zip(logits.tolist(), labels.tolist()):
        order = sorted(range(8), key=lambda c: -row[c])
        n[y] += 1
        top1[y] += order[0] == y
        top5[y] += y in order[:5]
    counts = hits(logits, labels)
    assert counts.tolist() == [n, top1, top5]
    s = scores(counts, [200] * 4 + [50] * 3 + [2], 0.1)
    acc = [a / b for a, b in zip(top1, n)]
    assert s["top1"] == sum(top1) / 300 and s["top5"] == sum(top5) / 300 and s["images"] == 300
    assert s["per_class"] == acc and s["many"] == pytest.approx(sum(acc[:4]) / 4) and s["few"] == acc[7]
    assert s["balancedness"] == balancedness(acc) and s["std"] == pytest.approx(np.std(acc))


def test_top5_of_fewer_than_five_classes(process_group):
    assert hits(torch.eye(3), torch.tensor([0, 1, 0])).tolist() == [[2, 1, 0], [1, 1, 0], [2, 1, 0]]


def test_tau_norm():
    w = torch.randn(6, 10) * torch.arange(1, 7)[:, None]
    assert torch.equal(tau_normalize(w, 0), w)
    assert torch.allclose(tau_normalize(w, 1).norm(dim=1), torch.ones(6))
    assert torch.allclose(tau_normalize(w, 0.5).norm(dim=1), w.norm(dim=1).sqrt())


def test_table_prints_a_dash_for_an_empty_group_and_the_mean_over_seeds(capsys):
    rows = [{"run": f"digits-lt-kcl-seed{i}", "protocol": "lt: x", "chosen": f"lr {i + 1}", "top1": t, "top5": 1.0, "many": t,
             "medium": None, "few": 0.1, "balancedness": 0.5, "std": 0.2, "sigma": 0.1, "counts_of": "train_lt.txt"}
            for i, t in enumerate((0.6, 0.7))]
    evaluate.print_table(rows)
    lines = capsys.readouterr().out.splitlines()
    cells = [[c.strip() for c in line.split("|")] for line in lines]
    assert cells[2][1:9] == ["digits-lt-kcl-seed0", "60.0", "100.0", "60.0", "-", "10.0", "0.500", "20.0"]
    assert cells[4][1:6] == ["digits-lt-kcl, 2 seeds", "65.0 +- 7.1", "100.0 +- 0.0", "65.0 +- 7.1", "-"]
    assert "nan" not in "".join(lines) and "sigma = 0.1" in lines[-1]


def test_heads_together_score_as_each_alone_and_encode_once(script, digits, tmp_path, monkeypatch, capsys):
    """Two heads of one backbone, one of them joint, and a head of another backbone: with tau-norm and NCM the first
    backbone encodes test, val and training list once, the second test and training list."""
    def part(name, every):
        lines = (digits / name).read_text().splitlines(keepends=True)[::every]
        (tmp_path / name).write_text("".join(lines))
        return tmp_path / name

    test, val, train = part("test.txt", 10), part("val.txt", 5), part("train_lt0.txt", 8)
    heads = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        (tmp_path / f"run{seed}").mkdir()
        backbone = tmp_path / f"run{seed}/backbone.pt"
        torch.save({n: x for n, x in resnet.ARCHS["resnet8"]().state_dict().items() if n[:3] != "fc."}, backbone)
        for out, *how in (("streamed",), ("cached", "--features", "cached")) if seed == 0 else (("streamed",),):
            script(train_linear, backbone, "--arch", "resnet8", "--dataset", "digits", "--data", digits, "--list", train,
                   "--epochs", 2, "--lr", 0.1, "--batch", 50, *how, "--out", tmp_path / f"run{seed}" / out)
            heads.append(tmp_path / f"run{seed}" / out / "head.pt")
    head = torch.load(heads[0], weights_only=True)
    torch.save({**head, "protocol": "joint CE, instance sampling"}, heads[0])

    encoded, extract = [], evaluate.extract

    def spy(backbone, dataset, head, *rest):
        encoded.append((head["name"], dataset.paths[0].split("/")[0]))
        return extract(backbone, dataset, head, *rest)
    monkeypatch.setattr(evaluate, "extract", spy)
    drawn, results = [], []
    monkeypatch.setattr(evaluate, "draw", lambda rows, spaces, out: drawn.append([s["name"] for s in spaces]))
    for group in (heads, heads[:1], heads[1:2], heads[2:]):
        more = ("--tau-norm",) if heads[0] in group else ()
        pictures = ("--pictures", "none") if group == heads[2:] else ()
        script(evaluate, *group, "--list", test, "--val", val, "--ncm", *more, "--workers", 0, *pictures)
        results.append({(path, file.name): json.loads(file.read_text()) for path in group
                        for file in path.parent.glob("eval*.json")})
        if len(group) == 3:
            assert sorted(encoded) == [("run0", "test"), ("run0", "train"), ("run0", "val"), ("run1", "test"),
                                       ("run1", "train")]
            table = capsys.readouterr().out
            assert "| lt, cached features: linear on" in table and "| tau-norm of joint CE" in table
    assert drawn == [["run0", "run1"], ["run0"], ["run0"]]  # each backbone once, and none of the last
    together, alone = results[0], {**results[1], **results[2], **results[3]}
    assert len(together) == 6 and all(alone[key] == row for key, row in together.items())
    assert together[heads[0], "eval_ncm.json"]["per_class"] != together[heads[2], "eval_ncm.json"]["per_class"]


def test_pca_against_the_svd():
    x = np.random.RandomState(0).randn(50, 7) * np.arange(1, 8) + 3
    points, share = pca(x)
    U, s, _ = np.linalg.svd(x - np.mean(x, axis=0), full_matrices=False)
    assert np.allclose(abs(points), abs(U[:, :2] * s[:2]))
    assert np.allclose(share, [s[0] ** 2 / (s ** 2).sum(), s[1] ** 2 / (s ** 2).sum()])
    assert np.allclose(share, points.var(0) / x.var(0).sum())
    assert np.array_equal(pca(np.ones((4, 3)))[1], [0, 0])  # a collapsed backbone


def test_feature_space_shows_as_many_of_each_class(process_group):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(12).repeat_interleave(torch.arange(30, 42))
    features = torch.randn(len(labels), 8, generator=g) + labels[:, None] % 5
    sizes = [5, 900, 7, 120, 80, 60, 1, 30, 20, 2, 10, 300]
    points, share, y, shown = feature_space(features, labels, sizes, most=200)
    assert shown.tolist() == [1, 11, 3, 4, 5, 10, 2, 0, 9, 6]  # the five largest, the five smallest
    assert points.shape == (200, 2) and [(y == c).sum() for c in range(12)] == [20] * 7 + [0, 0] + [20] * 3
    rows = [x / math.sqrt(sum(v * v for v in x)) for c in shown for x in features[labels == int(c)][:20].double().numpy()]
    literal, literal_share = pca(np.array(rows))
    assert np.allclose(abs(points), abs(literal), atol=1e-5) and np.allclose(share, literal_share, atol=1e-5)
    assert len(feature_space(features[:30 + 31], labels[:30 + 31], [3, 4])[0]) == 61  # all, where there are fewer


def test_pictures(tmp_path, monkeypatch):
    """features.png: a point an image, a marker a group, a size a class, largest first; all pictures on opaque white."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.markers import MarkerStyle
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    monkeypatch.setitem(plt.rcParams, "figure.facecolor", "black")  # a reader's dark style
    sizes, shown = [20, 1200, 3], np.array([1, 0, 2])
    y = np.repeat(shown, 4)
    points = np.random.RandomState(0).randn(12, 2)
    spaces = [dict(name=f"digits-lt-{loss}-seed0", counts=sizes, counts_of="train_lt.txt", points=points, share=(0.314, 0.2), labels=y,
                   shown=shown) for loss in ("ce", "cl", "kcl")]
    rows = [{"run": f"digits-lt-{loss}-seed{i}", "protocol": f"lt: {'long ' * 20}", "top1": 0.5 + i / 10, "balancedness": 0.5, "sigma": 0.1,
             "counts": sizes, "counts_of": "train_lt.txt", "per_class": [0.5, 0.9, 0.1 * i]} for loss in ("ce", "kcl") for i in range(2)]
    evaluate.draw(rows, spaces, tmp_path)
    make_lt.draw_sizes(tmp_path, {"full": [50] * 3, "lt": [3, 50, 9]})
    by_class, bars, space, class_sizes = figures[:4]
    assert [line.get_ydata().tolist() for line in by_class.axes[0].lines] == [[90, 50, 5]] * 2
    assert [label.get_text() for label in by_class.axes[0].get_xticklabels()] == ["1200", "20", "3"]
    assert all(max(map(len, t.get_text().split("\n"))) <= 64 for t in by_class.legends[0].get_texts())
    assert [[round(bar.get_width(), 9) for bar in ax.patches] for ax in bars.axes] == [[0.5, 0.5], [55, 55]]
    for ax, loss in zip(space.axes, ("ce", "cl", "kcl")):
        assert ax.get_title() == f"digits-lt-{loss}-seed0" and ax.get_xlabel() == "PC 1: 31 % of variance"
        for drawn, c, marker, mean in zip(ax.collections, shown, "os^", ax.texts, strict=True):
            assert np.array_equal(drawn.get_offsets(), points[y == c])
            path = MarkerStyle(marker).get_path().transformed(MarkerStyle(marker).get_transform())
            assert np.array_equal(drawn.get_paths()[0].vertices, path.vertices)
            assert mean.get_text() == f"{sizes[c]:,}" and np.allclose(mean.get_position(), points[y == c].mean(0))
    assert [t.get_text() for t in space.axes[3].get_legend().get_texts()] == ["1,200 many", "20 medium", "3 few"]
    assert space.axes[3].get_legend().get_title().get_text() == "classes by their images in\ntrain_lt.txt"
    evaluate.draw_features(plt, [spaces[0], {**spaces[1], "counts": [7, 8, 9]}], tmp_path / "two.png")
    assert "(first panel)" in figures[4].legends[0].get_title().get_text()
    assert [line.get_ydata().tolist() for line in class_sizes.axes[0].lines] == [[50, 50, 50], [50, 9, 3]]
    for name in ("accuracy_by_class", "balancedness", "features", "class_sizes"):
        image = np.array(Image.open(tmp_path / f"{name}.png").convert("RGBA"))
        assert 900 < image.shape[1] < 1000 and (image[..., 3] == 255).all()
        assert all((edge == 255).all() for edge in (image[:10], image[-10:], image[:, :10], image[:, -10:]))
