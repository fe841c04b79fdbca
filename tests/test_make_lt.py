"""Class sizes against published counts; which images a list takes; the digits; one's own folder; what is refused."""
import hashlib
import json
import os
import pickle
import re
import shlex
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

import data
import make_lt
import sources

IMAGENET_LT = [int(n) for n in sources.EMBEDDED.with_name("imagenet_lt_counts.txt").read_text().split()]
WNIDS = Path(__file__).with_name("imagenet_wnids.txt").read_text().split()
OWN = ("--dataset", "folder", "--data")


def split_of(file):
    """{label: its paths} of a list file."""
    split = {}
    for line in Path(file).read_text().splitlines():
        path, label = line.rsplit(" ", 1)
        split.setdefault(int(label), []).append(path)
    return split


def sizes_of(file):
    return [len(paths) for _, paths in sorted(split_of(file).items())]


def folder(root, kind="JPEG", **parts):
    """Empty files root/<part>/class<c>/<part>_<i>.<kind>: folder(root, train=[5, 4], val=[2, 2])."""
    for part, sizes in parts.items():
        for c, n in enumerate(sizes):
            (root / part / f"class{c}").mkdir(parents=True)
            for i in range(n):
                (root / part / f"class{c}" / f"{part.strip('.')}_{i:03d}.{kind}").touch()
    return root


# ---- class sizes and halves

@pytest.mark.parametrize("alpha, published", [
    (0.0, (116, 116, 116_000)), (0.2, (204, 67, 115_885)), (0.4, (343, 37, 115_801)), (0.6, (553, 20, 115_836)),
    (0.8, (857, 10, 115_852)), (1.0, (1279, 5, 115_846))])
def test_alpha_counts_give_the_papers_table(alpha, published):
    """Table 8; its last row says 1280, but the largest class of the published list has 1279 images."""
    n = make_lt.alpha_counts(IMAGENET_LT, alpha)
    assert (max(n), min(n), sum(n)) == published
    assert alpha < 1 or n == IMAGENET_LT


def test_table_of_sizes(script, tmp_path, capsys):
    script(make_lt, "--sizes", "imagenet-lt", "--lt0", "authors")
    rows = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1][:5] == ["lt0", "1000", "115", "115", "115000"]
    assert rows[-1] == "lt 1000 1279 5 115846 255.8 385 / 479 / 136".split()
    (tmp_path / "sizes.txt").write_text("40 20\n4")
    script(make_lt, "--sizes", tmp_path / "sizes.txt")
    assert capsys.readouterr().out.splitlines()[-1].split()[:5] == ["lt", "3", "40", "4", "64"]
    with pytest.raises(SystemExit, match="error: --sizes .*nothing.txt is not a file of class sizes"):
        script(make_lt, "--sizes", tmp_path / "nothing.txt")


def test_exponential_counts_are_cifar_lts():
    """CIFAR-10-LT has 12,406 and 20,431 images at imbalance 100 and 10."""
    n = make_lt.exponential_counts(10, 5000, 100)
    assert n == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50] and sum(n) == 12_406
    assert sum(make_lt.exponential_counts(10, 5000, 10)) == 20_431


def test_overlap_is_the_authors_list():
    source, target = make_lt.class_split(1000, "overlap")
    listed = "\n".join(sorted(WNIDS[c] for c in source))
    assert hashlib.sha256(listed.encode()).hexdigest().startswith("3456136b1798faa4")
    assert len(source) == 500 and source == sorted(source) and sorted(source + target) == list(range(1000))
    assert make_lt.class_split(5, "independent") == ([0, 1], [2, 3, 4])


# ---- ImageNet, with its published lists

@pytest.fixture
def imagenet(tmp_path):
    """Four classes of 60 images; the published lists take 5, 40, 2 and 12 of them, and two of each class for val."""
    root = folder(tmp_path / "imagenet", train=[60] * 4, val=[3] * 4)
    lists = {"train": "", "val": "", "test": ""}
    rng = np.random.RandomState(0)
    for c, n in enumerate((5, 40, 2, 12)):
        drawn = rng.permutation(60)
        for i in drawn[:n + 2]:
            lists["val" if i in drawn[:2] else "train"] += f"train/class{c}/train_{i:03d}.JPEG {c}\n"
        lists["test"] += "".join(f"val/class{c}/val_{i:03d}.JPEG {c}\n" for i in range(3))
    for part, text in lists.items():
        (root / f"ImageNet_LT_{part}.txt").write_text(text)
    return root


def test_family_of_the_published_list(script, imagenet):
    published = (imagenet / "ImageNet_LT_train.txt").read_bytes()
    script(make_lt, "--dataset", "imagenet", "--data", imagenet)
    assert (imagenet / "ImageNet_LT_train.txt").read_bytes() == published
    full, val = split_of(imagenet / "train_full.txt"), split_of(imagenet / "ImageNet_LT_val.txt")
    splits = {1.0: split_of(imagenet / "ImageNet_LT_train.txt")}
    splits |= {alpha: split_of(imagenet / f"train_lt{10 * alpha:.0f}.txt") for alpha in (0.0, 0.2, 0.4, 0.6, 0.8)}

    for alpha, split in splits.items():
        share = [(n / 59) ** alpha for n in (5, 40, 2, 12)]
        assert [len(split[c]) for c in range(4)] == [int(59 * q / sum(share) + 0.5) for q in share]
        for c in range(4):
            assert len(full[c]) == 58 and set(split[c]) <= set(full[c]) and not set(full[c]) & set(val[c])
            for other in splits.values():  # prefixes of one order: as many shared as the sizes allow
                assert len(set(split[c]) & set(other[c])) == min(len(split[c]), len(other[c]))

    row = json.loads((imagenet / "splits.json").read_text())["lists"]["ImageNet_LT_train"]
    assert row == {"classes": 4, "max": 40, "min": 2, "total": 59, "many": 0, "medium": 1, "few": 3,
                   "imbalance": 20.0, "counts": [5, 40, 2, 12]}


@pytest.mark.parametrize("how", ["overlap", "independent"])
def test_halves_are_the_lists_renumbered(script, imagenet, how):
    script(make_lt, "--dataset", "imagenet", "--data", imagenet)
    for name in ("ImageNet_LT_train.txt", "ImageNet_LT_val.txt", "ImageNet_LT_test.txt", "train_lt4.txt"):
        whole = split_of(imagenet / name)
        for side, classes in zip(("source", "target"), make_lt.class_split(4, how)):
            half = split_of(imagenet / f"{how}_{side}" / name)
            assert {i: sorted(half[i]) for i in half} == {i: sorted(whole[c]) for i, c in enumerate(classes)}


def test_same_seed_same_lists(script, imagenet, tmp_path):
    """In whatever order the published lines are."""
    run = (make_lt, "--dataset", "imagenet", "--data", imagenet, "--out")
    script(*run, tmp_path / "a", "--seed", 3)
    train = imagenet / "ImageNet_LT_train.txt"
    train.write_text("".join(sorted(train.read_text().splitlines(keepends=True), reverse=True)))
    script(*run, tmp_path / "b", "--seed", 3)
    script(*run, tmp_path / "c", "--seed", 4)
    for name in ("train_full.txt", "train_lt2.txt", "overlap_target/train_lt2.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a/train_lt2.txt").read_bytes() != (tmp_path / "c/train_lt2.txt").read_bytes()
    lists = (tmp_path / "a/train_lt0.txt").read_bytes() + (tmp_path / "a/train_lt6.txt").read_bytes()
    assert hashlib.sha256(lists).hexdigest()[:16] == "9af26a06e7effbd4"  # on every platform


# ---- the digits

def test_digits_lists(digits):
    split = {file.stem: split_of(file) for file in digits.glob("*.txt")}
    sizes = {name: [len(of[c]) for c in range(10)] for name, of in split.items()}
    assert sizes["train_full"] == [350] * 10 and sizes["val"] == [200] * 10 and sizes["test"] == [400] * 10
    assert sorted(sizes["train_lt"], reverse=True) == [350, 209, 125, 75, 45, 27, 16, 9, 5, 3]
    assert sizes["train_lt"] != sorted(sizes["train_lt"], reverse=True)  # the order of the classes is drawn
    for name, alpha in make_lt.ALPHAS.items():
        assert sizes[f"train_{name}"] == make_lt.alpha_counts(sizes["train_lt"], alpha)
        for c, n in enumerate(sizes[f"train_{name}"]):
            assert split[f"train_{name}"][c] == split["train_full"][c][:n]


def test_digits_are_the_same_everywhere(digits):
    pixels = b"".join(np.asarray(Image.open(file)).tobytes() for file in sorted(digits.glob("test/*/*.png")))
    lists = b"".join(file.read_bytes() for file in sorted(digits.glob("*.txt")))
    assert hashlib.sha256(pixels).hexdigest()[:16] == "c8b3807d61d5ebd3"
    assert hashlib.sha256(lists).hexdigest()[:16] == "dc1addd39e2bb638"


def test_no_digit_serves_two_splits(tmp_path, monkeypatch):
    """Neither as the digit nor as a fragment: clutter() is handed the digits of one split."""
    handed = {}

    def record(digits, i, rng):
        handed[len(digits)] = {digit.tobytes() for digit in digits}
        return np.zeros((32, 32), np.uint8)
    monkeypatch.setattr(sources, "clutter", record)
    monkeypatch.setattr(sources, "PER_CLASS", {"train": 35, "val": 5, "test": 10})
    sources.compose(tmp_path, np.random.RandomState(3))
    assert sorted(handed) == [50, 100, 350] and len(set.union(*handed.values())) == 500


# ---- one's own folder, and the other data sets

@pytest.mark.parametrize("layout, args, sizes", [
    (dict(train=[70, 64, 60], val=[3] * 3), "--holdout 10 --long-tail exponential --imbalance 10",
     dict(train_full=[60, 54, 50], train_lt=[60, 18, 6], train_lt0=[28] * 3, val=[10] * 3, test=[3] * 3)),
    (dict(train=[25, 9, 150], test=[3] * 3), "--long-tail exponential --imbalance 16",  # 84 / 4 = 21 would not fit
     dict(train_full=[20, 8, 130], train_lt=[20, 5, 83], val=[5, 1, 20], test=[3] * 3)),
    (dict(train=[5, 6], val=[2] * 2, test=[4] * 2), "",
     dict(train_full=[5, 6], train_lt=[5, 6], val=[2] * 2, test=[4] * 2)),
    ({".": [12, 9]}, "--holdout 3", dict(train_full=[6, 3], train_lt=[6, 3], val=[3] * 2, test=[3] * 2)),
    ({".": [12, 29]}, "", dict(train_full=[8, 20], val=[2, 4], test=[2, 5])),  # a fifth, then a fifth of the rest
])
def test_own_folder(script, tmp_path, capsys, layout, args, sizes):
    root = folder(tmp_path, "tiff", **layout)
    for _ in range(2):  # again: the folders of the lists are no classes
        script(make_lt, *OWN, root, *args.split())
    assert {name: sizes_of(root / f"{name}.txt") for name in sizes} == sizes
    paths = sum((data.read_list(root, f"{name}.txt")[0] for name in ("train_full", "val", "test")), [])
    assert len(set(paths)) == len(paths) and all((root / path).is_file() for path in paths)
    batch, queue = map(int, re.search(rf"--data {root} --batch (\d+) --queue (\d+);", capsys.readouterr().out).groups())
    n = sum(sizes.get("train_lt", sizes["train_full"]))
    assert 4 * batch == queue and n / 2 < queue <= n


def test_a_tail_that_the_images_allow_though_not_its_family(script, tmp_path, capsys):
    root = folder(tmp_path, train=[40, 14, 9], val=[2] * 3)
    script(make_lt, *OWN, root, *"--holdout 3 --long-tail exponential --n-max 30 --imbalance 9".split())
    assert sizes_of(root / "train_lt.txt") == [30, 10, 3] and not (root / "train_lt0.txt").exists()  # 14 of a class of 11
    assert "left out: train_lt0.txt" in capsys.readouterr().out


def test_hidden_files_and_subfolders(script, tmp_path, capsys):
    """The labels are those of the same folder without them, and each image counts once."""
    root = folder(tmp_path / "X", train=[9, 8], test=[2] * 2)
    script(make_lt, *OWN, root, "--holdout", 2, "--out", tmp_path / "plain")
    for name in (".ipynb_checkpoints/x.jpg", "class0/._train_000.JPEG", "class1/.cache/x.jpg", "class1/notes.csv", "class1/a.npy",
                 "class0/red/x.jpg", "class0/red/old/y.JFIF", "class1/z.pgm", "class1/z.GIF", "loose.png"):
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / name).touch()
    (tmp_path / "blue").mkdir()
    (tmp_path / "blue/b.png").touch()
    (root / "train/class1/blue").symlink_to(tmp_path / "blue")
    capsys.readouterr()
    script(make_lt, *OWN, root, "--holdout", 2, "--out", tmp_path / "lists")
    out = capsys.readouterr().out
    assert (f"ignored 3 files in {root}/train that are in no class folder or do not have the ending of an image "
            "(first: train/class1/a.npy)") in out
    plain, split = ({c: {path for name in ("train_full", "val") for path in split_of(tmp_path / out / f"{name}.txt")[c]}
                     for c in (0, 1)} for out in ("plain", "lists"))
    assert split[0] - plain[0] == {"train/class0/red/x.jpg", "train/class0/red/old/y.JFIF"} and plain[0] <= split[0]
    assert split[1] - plain[1] == {f"train/class1/{name}" for name in ("blue/b.png", "z.GIF", "z.pgm")} and plain[1] <= split[1]
    assert all(sizes_of(tmp_path / "lists/train_full.txt")[c] == len(split[c]) - 2 for c in (0, 1))


@pytest.mark.parametrize("spelling", ["./{}", "train//{}", "other/../{}", "../X/{}"])
def test_a_tail_in_another_spelling_is_the_same_tail(script, tmp_path, spelling):
    root = folder(tmp_path / "X", train=[12, 12], test=[2] * 2)
    script(make_lt, *OWN, root, "--holdout", 3)
    val = (root / "val.txt").read_text().splitlines()
    paths = [f"train/class{c}/train_{i:03d}.JPEG {c}" for c in range(2) for i in range(12)]
    tail = [line for line in paths if line not in val][3:]
    lists = []
    for name, form in (("plain", "{}"), ("other", spelling)):
        lines = [form.format(line.removeprefix("train/") if "//" in form else line) + "\n" for line in tail]
        (root / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
        script(make_lt, *OWN, root, "--holdout", 3, "--long-tail", f"{name}.txt", "--out", tmp_path / name)
        lists.append({file.name: file.read_bytes() for file in (tmp_path / name).glob("*.txt")})
    assert lists[0] == lists[1] and len(lists[0]) > 4
    (root / "bad.txt").write_text(spelling.format(val[0].removeprefix("train/") if "//" in spelling else val[0]))
    with pytest.raises(SystemExit, match=f"bad.txt names 1 images that .* are held out .* .first: {val[0]}.;"):
        script(make_lt, *OWN, root, "--holdout", 3, "--long-tail", "bad.txt", "--out", tmp_path / "bad")


@pytest.mark.parametrize("part, file", [("train", "train/class1"), ("val", "train/class0"), ("test", "val/class2")])
def test_imagenet_lt_without_one_of_its_files(script, imagenet, tmp_path, part, file):
    lines = (imagenet / f"ImageNet_LT_{part}.txt").read_text().splitlines()
    gone = next(line.split()[0] for line in lines if line.startswith(file))
    (imagenet / gone).unlink()
    with pytest.raises(SystemExit, match=f"^error: ImageNet_LT_{part}.txt names 1 images that do not exist, .*first: {gone} \\d.;"):
        script(make_lt, "--dataset", "imagenet", "--data", imagenet, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_file_names_in_another_encoding(script, tmp_path, capsys):
    """They are listed as they are, and printed as well as can be."""
    root, name = folder(tmp_path / "X", train=[30, 3], test=[2] * 2), os.fsdecode(b"M\xfcller")
    for part in ("train", "test"):
        (root / part / "class1").rename(root / part / name)
    (root / "train/class0/train_000.JPEG").rename(root / f"train/class0/{name}.jpg")
    script(make_lt, *OWN, root, *"--holdout 0 --long-tail exponential --n-max 30 --imbalance 10".split())
    paths, labels = data.read_list(root, "train_full.txt")
    assert all((root / path).is_file() for path in paths) and labels.bincount().tolist() == [3, 30]
    assert f"train/class0/{name}.jpg" in paths and data.class_names(root, "train_full.txt") == {0: name, 1: "class0"}
    assert "left out: train_lt0.txt, because class M\\udcfcller has 3 images and would need 17" in capsys.readouterr().out


def test_a_list_is_written_whole_or_not_at_all(script, tmp_path, monkeypatch):
    root = folder(tmp_path, train=[9, 8], test=[2] * 2)

    def full_disk(path, content):
        open(path, "wb").close()
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as m, pytest.raises(OSError, match="No space left"):
        m.setattr(Path, "write_bytes", full_disk)
        m.setattr(Path, "write_text", lambda path, *args, **kwargs: full_disk(path, args))
        script(make_lt, *OWN, root, "--holdout", 2)
    assert not list(root.rglob("*.txt"))
    script(make_lt, *OWN, root, "--holdout", 2)
    assert sizes_of(root / "train_full.txt") == [7, 6] and not list(root.rglob("*.tmp"))


@pytest.mark.parametrize("imbalance", [2, 5, 20, 50])
def test_what_is_said_to_fit_makes_every_list(script, tmp_path, capsys, imbalance):
    """Of classes of 3 to 200 images. No class may be left without an image either."""
    root = folder(tmp_path / "X", train=[200, 60, 20, 7, 3])
    run = (make_lt, *OWN, root, *f"--long-tail exponential --imbalance {imbalance}".split())
    script(*run, "--out", tmp_path / "first")
    out = capsys.readouterr().out
    fits = re.search(r"with --n-max (\d+) the whole alpha family fits", out)
    assert bool(fits) != ("no --n-max lets the whole alpha family fit" in out)
    if fits:
        script(*run, "--n-max", fits[1], "--out", tmp_path / "all")
        assert "left out:" not in capsys.readouterr().out
        assert {file.name for file in (tmp_path / "all").glob("train_lt?.txt")} == {f"train_lt{i}.txt" for i in (0, 2, 4, 6, 8)}


@pytest.mark.parametrize("sizes, n_max, imbalance, said, fits", [
    ([40, 14, 9], 30, 9, {"lt0": "class2 has 6 images and would need 14", "lt6": "class1 has 11 images and would need 13"}, 14),
    ([400, 70, 33], 200, 10, {"lt0": "class2 has 30 images and would need 94"}, 65)])
def test_what_would_fit_is_said_and_fits(script, tmp_path, capsys, sizes, n_max, imbalance, said, fits):
    root = folder(tmp_path / "X", train=sizes, test=[2] * 3)
    run = (make_lt, *OWN, root, *f"--holdout 3 --long-tail exponential --imbalance {imbalance}".split())
    script(*run, "--n-max", n_max, "--out", tmp_path / "out")
    out = capsys.readouterr().out
    smallest = n_max // imbalance
    assert (f"largest class of the long tail has {n_max} images and the smallest {smallest}, an imbalance of "
            f"{n_max / smallest:.1f}; with --n-max {fits} the whole alpha family fits") in out
    for name, sentence in said.items():
        assert f"left out: train_{name}.txt, because class {sentence}" in out
        assert not (tmp_path / f"out/train_{name}.txt").exists()
    for n_max in (fits, fits + 1):
        script(*run, "--n-max", n_max, "--out", tmp_path / str(n_max))
        assert ("left out:" in capsys.readouterr().out) == (n_max > fits)


def test_what_is_held_out_is_said_where_nobody_asked_for_it(script, tmp_path, capsys):
    root, held = folder(tmp_path, train=[30, 200]), "20 images per class, but at most a fifth and at least one, are held out for val.txt; --holdout 0"
    script(make_lt, *OWN, root)
    out = capsys.readouterr().out
    assert held in out and held.replace("val", "test") in out
    script(make_lt, *OWN, root, "--holdout", 0, "--out", tmp_path / "all")
    assert "held out" not in capsys.readouterr().out and sizes_of(tmp_path / "all/train_full.txt") == [30, 200]
    assert not (tmp_path / "all/test.txt").exists()  # an empty one would be none


@pytest.mark.parametrize("side, dataset, images, flags", [
    (32, "small", 700, "--queue 1024"), (50, "small64", 700, "--queue 1024"), (80, "folder", 700, "--queue 1024"),
    (32, "small", 40, "--batch 16 --queue 64")])
def test_the_next_command_can_be_pasted_and_knows_the_images(script, tmp_path, capsys, side, dataset, images, flags):
    root = folder(tmp_path / "my photos", "png", train=[images, images + 10], test=[2] * 2)
    for file in root.glob("train/*/*"):
        Image.new("RGB", (side, side - 4)).save(file)
    script(make_lt, *OWN, root)
    assert json.loads((root / "splits.json").read_text())["dataset"] == dataset
    command = re.search(r"next: python (train_rep.py .*?);", capsys.readouterr().out)[1]
    assert shlex.split(command) == ["train_rep.py", "--data", str(root), *flags.split()]
    out = tmp_path / "lists"
    script(make_lt, *OWN, root, "--out", out)
    command = re.search(r"next: python (train_rep.py .*?);", capsys.readouterr().out)[1]
    assert shlex.split(command) == ["train_rep.py", "--data", str(root), "--dataset", dataset, "--list", str(out / "train_lt.txt"), *flags.split()]


def test_lists_in_another_folder(script, tmp_path):
    root, out = folder(tmp_path / "X", train=[30] * 2, val=[2] * 2), tmp_path / "lists"
    script(make_lt, *OWN, root, "--out", out)
    assert sorted(path.name for path in root.iterdir()) == ["train", "val"]
    for name in ("val.txt", "test.txt"):
        assert data.sibling_list(root, f"{out}/train_lt.txt", name) == f"{out}/{name}"


def test_class_sizes_from_a_file_and_from_a_list(script, tmp_path):
    root = folder(tmp_path / "X", train=[30] * 3, val=[2] * 3)
    (tmp_path / "sizes.txt").write_text("3\n20\n7\n")
    run = (make_lt, *OWN, root, "--holdout", 5, "--long-tail")
    script(*run, tmp_path / "sizes.txt", "--out", tmp_path / "a")
    assert sizes_of(tmp_path / "a/train_lt.txt") == [3, 20, 7]
    script(*run, tmp_path / "a/train_lt.txt", "--out", tmp_path / "b")  # a list: its own images
    assert split_of(tmp_path / "b/train_lt.txt") == split_of(tmp_path / "a/train_lt.txt")
    with pytest.raises(SystemExit, match="--long-tail imagenet-lt has 1000 classes, but the training images have 3"):
        script(*run, "imagenet-lt")


def test_inaturalist(script, tmp_path):
    (tmp_path / "train_val2018").mkdir()
    for part, n in (("train", 12), ("val", 3)):
        images = [{"id": 100 + i, "file_name": f"train_val2018/Aves/{i % 3}/{part}{i}.jpg"} for i in range(n)]
        annotations = [{"id": i, "image_id": 100 + i, "category_id": i % 3} for i in reversed(range(n))]
        (tmp_path / f"{part}2018.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    script(make_lt, "--dataset", "inat18", "--data", tmp_path)
    expected = [f"train_val2018/Aves/{i % 3}/train{i}.jpg {i % 3}" for i in range(12)]
    assert (tmp_path / "iNaturalist18_train.txt").read_text().splitlines() == expected


def test_cifar10_from_its_pickles(script, tmp_path, monkeypatch):
    kind = torchvision.datasets.CIFAR10
    base, rng = tmp_path / kind.base_folder, np.random.RandomState(0)
    base.mkdir()
    for name, _ in kind.train_list + kind.test_list:
        content = {"data": rng.randint(0, 255, (40, 3072), np.uint8), "labels": [i % 10 for i in range(40)]}
        (base / name).write_bytes(pickle.dumps(content))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    script(make_lt, "--dataset", "cifar10", "--data", tmp_path, "--imbalance", 10)
    assert sizes_of(tmp_path / "train_lt.txt") == make_lt.exponential_counts(10, 20, 10)
    assert sizes_of(tmp_path / "test.txt") == [4] * 10 and not (tmp_path / "val.txt").exists()
    pixels = pickle.loads((base / "data_batch_1").read_bytes())["data"][3].reshape(3, 32, 32).transpose(1, 2, 0)
    assert (np.asarray(Image.open(tmp_path / "train/d/00003.png")) == pixels).all()


@pytest.mark.parametrize("kind, sizes, sentence", [
    ("jpg", [4999] + [5000] * 9, "/train does not have the 10 classes of 5000 images that cifar10 has; pass another --data"),
    ("ppm", [3, 400], "does not have the 10 classes"), ("", [], "cifar10 could not be downloaded .*; put cifar-10-python.tar.gz from www.cs.*, or class folders")])
def test_what_is_not_cifar10(script, tmp_path, monkeypatch, kind, sizes, sentence):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "__init__", offline)
    classes = [(f"class{c}", [f"{i}.{kind}" for i in range(n)]) for c, n in enumerate(sizes)]
    monkeypatch.setattr(sources.os, "walk", lambda top, **_: [(top / name, [], files) for name, files in classes])
    root = folder(tmp_path, train=[0] * len(sizes))
    with pytest.raises(SystemExit, match=f"^error: .*{sentence}"):
        script(make_lt, "--dataset", "cifar10", "--data", root)
    assert not list(root.glob("*.txt"))


def test_cifar10_from_class_folders_of_any_type(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sources.os, "walk", lambda top, **_: [
        (top / f"class{c}", [], [f"{i:04d}.{('JPG', 'ppm')[i % 2]}" for i in range(5000 if top.name == "train" else 1000)])
        for c in range(10)])
    root = folder(tmp_path, train=[0] * 10, test=[0] * 10)
    script(make_lt, "--dataset", "cifar10", "--data", root)
    assert sizes_of(root / "train_lt.txt") == make_lt.exponential_counts(10, 5000, 100) and not (root / "val.txt").exists()


# ---- what is refused, in a folder X with three classes of 30 images and 2 in val/

EVERY = "".join(f"train/class{c}/train_{i:03d}.JPEG {c}\n" for c in range(3) for i in range(30))
BACKWARDS = "".join(f"train/class{2 - c}/train_000.JPEG {c}\n" for c in range(3))


@pytest.mark.parametrize("file, text, args, sentence", [
    ("train_lt.txt", "x 0", "", "X/train_lt.txt exists with different content; pass --overwrite or another --out"),
    ("val/class9/a.png", "", "", "X/val has different classes from the training images: class9 is in only one of them"),
    ("lt.txt", EVERY, "--long-tail lt.txt", "lt.txt names 18 images that .* are held out .* .first: train/class0/"),
    ("lt.txt", BACKWARDS, "--holdout 0 --long-tail lt.txt", "lt.txt names 2 images that do not exist, are held out or have a different label .first: train/class2/train_000.JPEG 0."),
    ("lt.txt", BACKWARDS.replace("JPEG", "jpeg"), "--holdout 0 --long-tail lt.txt", "lt.txt names 3 images that do not exist, .* .first: train/class2/"),
    ("lt.txt", EVERY + "val/class0/9.JPEG 0", "--holdout 0 --long-tail lt.txt", "lt.txt names 1 images that do not exist, .*: val/class0/9.JPEG 0"),
    ("lt.txt", EVERY.replace("_007.JPEG 1", "_007.JPEG 2"), "--holdout 0 --long-tail lt.txt", "lt.txt names 1 images .* have a different label .first: train/class1/train_007.JPEG 2"),
    ("sizes.txt", "3 4", "--long-tail X/sizes.txt", "sizes.txt has 2 classes, but the training images have 3"),
    ("", "", "--long-tail exponential --n-max 60", "train_lt needs 60 images of class 0 .class0., which has 24 for training; pass a smaller --n-max or"),
    ("", "", "--holdout 30", "no training image of class 0 .class0. is left; pass a smaller --holdout"),
    ("", "", "--long-tail exponential --imbalance 1000", "train_lt0 needs 0 images of class 0 .*; pass a smaller --imbalance or"),
    ("", "", "--data nowhere", "nowhere is missing: .*; `python make_lt.py --help` shows the layouts"),
    ("", "", "--data .", ". contains fewer than two <class>/ folders of images; an image's name must end in .jpg"),
    ("", "", "--dataset imagenet", "ImageNet_LT_train.txt is missing: a published list; --dataset folder --long-tail"),
    ("", "", "--dataset inat18", "X/train_val2018 is missing: the folder of the images"),
    ("", "", "--dataset inat18 --long-tail exponential", "inat18 has its own long tail"),
    ("", "", "--dataset digits", "the digits are embedded and take no --data"),
])
def test_one_sentence_where_a_number_would_be_wrong(script, tmp_path, monkeypatch, file, text, args, sentence):
    monkeypatch.chdir(tmp_path)
    root = folder(Path("X"), train=[30] * 3, val=[2] * 3)
    if file:
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text(text)
    with pytest.raises(SystemExit, match=f"^error: .*{sentence}"):
        script(make_lt, *OWN, root, *args.split())
    assert {path.name for path in root.glob("*.*")} <= {file}  # no list was written
