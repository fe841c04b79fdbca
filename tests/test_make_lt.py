"""Splits of every data set, on tiny stand-ins in the real layouts; class splits against the authors' list; the check."""
import hashlib
import json
import pickle
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import data
import evaluate
import make_lt
import train_linear
import train_rep
from ddp import InputError

WNIDS = Path(__file__).with_name("imagenet_wnids.txt").read_text().split()


def lines(file):
    return [line.rsplit(" ", 1) for line in Path(file).read_text().splitlines()]


def per_class(file):
    split = {}
    for path, label in lines(file):
        split.setdefault(int(label), []).append(path)
    return split


def touch(root, paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def folder(root, sizes, val=3, test=0):
    """train/<class>/ with the given numbers of empty files, val/ and test/ where asked for."""
    for c, n in enumerate(sizes):
        for part, m in (("train", n), ("val", val), ("test", test)):
            touch(root, [f"{part}/class{c}/{part}_{i:04d}.JPEG" for i in range(m)])


# ---- the published class splits

def test_overlap_is_the_authors_list():
    source, target = make_lt.class_split(1000, "overlap")
    listed = "\n".join(sorted(WNIDS[c] for c in source))
    assert hashlib.sha256(listed.encode()).hexdigest().startswith("3456136b1798faa4")
    assert sorted(source + target) == list(range(1000)) and len(source) == 500 and source == sorted(source)


def test_independent_is_the_first_half_in_order():
    assert make_lt.class_split(1000, "independent") == (list(range(500)), list(range(500, 1000)))
    assert make_lt.class_split(5, "independent") == ([0, 1], [2, 3, 4])


# ---- class sizes

def test_pareto_counts():
    n = make_lt.pareto_counts(1000, 1280, 5)
    quantiles = [((j + 0.5) / 1000) ** (-1 / 6) for j in range(1000)]
    literal = [5 + 1275 * (x - quantiles[-1]) / (quantiles[0] - quantiles[-1]) for x in quantiles]
    assert n == [int(x + 0.5) for x in literal] and (n[0], n[-1]) == (1280, 5)
    assert sum(n) == pytest.approx(104_850, abs=50) and n == sorted(n, reverse=True)


def test_table_of_the_published_sizes(script, digits, capsys):
    """Table 8, to the class: max, min, total of each alpha, printed without any image."""
    script(make_lt, "--sizes", "imagenet-lt", "--lt0", "authors")
    rows = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:5] for row in rows] == [
        ["lt0", "1000", "115", "115", "115000"], ["lt2", "1000", "204", "67", "115885"], ["lt4", "1000", "343", "37", "115801"],
        ["lt6", "1000", "553", "20", "115836"], ["lt8", "1000", "857", "10", "115852"], ["lt", "1000", "1279", "5", "115846"]]
    assert rows[-1][-5:] == ["385", "/", "479", "/", "136"]
    script(make_lt, "--sizes", digits / "train_lt.txt")  # of a list
    assert capsys.readouterr().out.splitlines()[-1].split()[:5] == ["lt", "10", "350", "3", "864"]


def test_lt0_in_both_readings():
    counts = make_lt.read_counts("imagenet-lt")
    assert set(make_lt.family_counts(counts)["lt0"]) == {116}
    authors = make_lt.family_counts(counts, "authors")
    assert set(authors["lt0"]) == {115} and sum(authors["lt0"]) == 115_000
    assert authors["lt8"] == make_lt.alpha_counts(counts, 0.8) and list(authors) == ["lt0", "lt2", "lt4", "lt6", "lt8"]


# ---- ImageNet, with its published lists

@pytest.fixture
def imagenet(tmp_path):
    """Four classes in ImageNet's layout, with the lists that are published for it: 40, 12, 5 and 2 images; two of each
    class, taken from train, for val."""
    root, rng = tmp_path / "imagenet", random.Random(0)
    text = {"train": "", "val": "", "test": ""}
    for c, (wnid, n) in enumerate(zip(WNIDS[:4], (5, 40, 2, 12))):
        train = [f"train/{wnid}/{wnid}_{i}.JPEG" for i in range(60)]
        test = [f"val/{wnid}/ILSVRC2012_val_{50 * c + i:08d}.JPEG" for i in range(3)]
        touch(root, train + test)
        drawn = rng.sample(train, n + 2)
        for part, paths in (("train", drawn[2:]), ("val", drawn[:2]), ("test", test)):
            text[part] += "".join(f"{path} {c}\n" for path in paths)
    for part, lines_ in text.items():
        (root / f"ImageNet_LT_{part}.txt").write_text(lines_)
    return root


def test_alpha_family_from_the_published_list(script, imagenet, capsys):
    published = (imagenet / "ImageNet_LT_train.txt").read_bytes()
    script(make_lt, "--dataset", "imagenet", "--data", imagenet)
    assert (imagenet / "ImageNet_LT_train.txt").read_bytes() == published
    base, val = per_class(imagenet / "ImageNet_LT_train.txt"), per_class(imagenet / "ImageNet_LT_val.txt")
    full = per_class(imagenet / "train_full.txt")
    assert all(len(full[c]) == 58 and not set(full[c]) & set(val[c]) for c in range(4))  # all but the validation images
    splits = {1.0: base}
    for name, alpha in make_lt.ALPHAS.items():
        if alpha < 1:
            splits[alpha] = per_class(imagenet / f"train_{name}.txt")
            literal = [0.0] * 4
            for c in range(4):
                literal[c] = int(59 * (len(base[c]) / 59) ** alpha / sum((len(base[k]) / 59) ** alpha for k in range(4)) + 0.5)
            assert [len(splits[alpha][c]) for c in range(4)] == literal
    for a, b in ((1.0, 0.8), (0.8, 0.6), (0.6, 0.4), (0.4, 0.2), (0.2, 0.0), (1.0, 0.0)):  # as many shared as can be
        for c in range(4):
            assert len(set(splits[a][c]) & set(splits[b][c])) == min(len(splits[a][c]), len(splits[b][c]))
    assert all(set(paths) <= set(full[c]) and len(set(paths)) == len(paths)
               for split in splits.values() for c, paths in split.items())
    table = json.loads((imagenet / "splits.json").read_text())
    assert table["dataset"] == "imagenet" and table["lists"]["ImageNet_LT_train"] == {"classes": 4, "max": 40, "min": 2, "total": 59, "many": 0, "medium": 1, "few": 3,
                                          "imbalance": 20.0, "counts": [5, 40, 2, 12]}
    assert "ImageNet_LT_train" in capsys.readouterr().out
    with Image.open(imagenet / "class_sizes.png") as picture:
        assert picture.size[0] > 500


def test_class_split_lists_are_the_lists_halved_and_renumbered(script, imagenet):
    script(make_lt, "--dataset", "imagenet", "--data", imagenet)
    for how in ("overlap", "independent"):
        source, target = make_lt.class_split(4, how)
        for name in ("ImageNet_LT_train.txt", "ImageNet_LT_val.txt", "ImageNet_LT_test.txt", "train_full.txt", "train_lt4.txt"):
            whole = per_class(imagenet / name)
            for side, classes in (("source", source), ("target", target)):
                half = per_class(imagenet / f"{how}_{side}" / name)
                assert sorted(half) == [0, 1] and all(sorted(half[i]) == sorted(whole[c]) for i, c in enumerate(classes))


def test_lists_are_the_same_everywhere_and_never_replaced_unasked(script, imagenet, tmp_path):
    script(make_lt, "--dataset", "imagenet", "--data", imagenet, "--seed", 3)
    names = ("train_lt0.txt", "train_lt6.txt")
    before = [(imagenet / name).read_bytes() for name in names]
    assert hashlib.sha256(b"".join(before)).hexdigest()[:16] == "528fb9162145d8dc"
    script(make_lt, "--dataset", "imagenet", "--data", imagenet, "--seed", 3)  # again: nothing changes
    assert before == [(imagenet / name).read_bytes() for name in names]
    with pytest.raises(SystemExit, match="exists with other content; --overwrite replaces it"):
        script(make_lt, "--dataset", "imagenet", "--data", imagenet, "--seed", 4)
    assert before == [(imagenet / name).read_bytes() for name in names]
    shuffled = (imagenet / "ImageNet_LT_train.txt").read_text().splitlines(keepends=True)
    random.Random(1).shuffle(shuffled)  # the order of the lines is no part of the list
    (imagenet / "ImageNet_LT_train.txt").write_text("".join(shuffled))
    script(make_lt, "--dataset", "imagenet", "--data", imagenet, "--seed", 3, "--out", tmp_path / "lists")
    assert before == [(tmp_path / "lists" / name).read_bytes() for name in names]
    script(make_lt, "--dataset", "imagenet", "--data", imagenet, "--seed", 4, "--overwrite")
    assert before != [(imagenet / name).read_bytes() for name in names]


def test_a_list_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "l.txt").write_text("old")

    def die(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr("os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        make_lt.write(tmp_path / "l.txt", "new", overwrite=True)
    assert (tmp_path / "l.txt").read_text() == "old"


def test_full_list_in_place_of_the_folder(script, imagenet, tmp_path):
    """The same lists where only the names are known, in any order."""
    script(make_lt, "--dataset", "imagenet", "--data", imagenet)
    everything = [f"{path.relative_to(imagenet)} {c}\n" for c, w in enumerate(WNIDS[:4]) for path in (imagenet / "train" / w).iterdir()]
    (tmp_path / "full.txt").write_text("".join(everything))
    script(make_lt, "--dataset", "imagenet", "--data", imagenet, "--full", tmp_path / "full.txt", "--out", tmp_path / "lists")
    for name in ("train_full.txt", "train_lt2.txt", "overlap_target/train_lt2.txt"):
        assert (imagenet / name).read_bytes() == (tmp_path / "lists" / name).read_bytes()


def test_imagenet_refusals(script, imagenet, tmp_path):
    run = (make_lt, "--dataset", "imagenet", "--data")
    with pytest.raises(SystemExit, match="no such folder; expected there ILSVRC 2012"):
        script(*run, tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="--data names the folder; expected there ILSVRC"):
        script(make_lt, "--dataset", "imagenet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty/train is missing; expected ILSVRC 2012"):
        script(*run, tmp_path / "empty")
    train = imagenet / "ImageNet_LT_train.txt"
    text = train.read_text()
    train.unlink()
    with pytest.raises(SystemExit, match="ImageNet_LT_train.txt is missing; .*liuziwei7.* `--dataset folder --long-tail imagenet-lt`"):
        script(*run, imagenet)
    train.write_text(text + (imagenet / "ImageNet_LT_val.txt").read_text().splitlines()[0] + "\n")
    with pytest.raises(SystemExit, match="long tail holds the validation image train/n01440764"):
        script(*run, imagenet)
    train.write_text(text.replace(" 0\n", " 7\n").replace(" 1\n", " 0\n"))
    with pytest.raises(SystemExit, match="has label 0, but class 0 of the 4 sorted class folders is n01440764"):
        script(*run, imagenet)
    train.write_text(text)
    (imagenet / "few.txt").write_text(text)
    with pytest.raises(SystemExit, match="train_lt0 wants 15 images of class 0, but there are 5 without"):
        script(*run, imagenet, "--full", imagenet / "few.txt")
    with pytest.raises(SystemExit, match="has its own long tail"):
        script(*run, imagenet, "--long-tail", "pareto")


# ---- any folder, with a long tail by rule

def test_folder_with_an_exponential_tail(script, tmp_path):
    folder(tmp_path, [70, 64, 60])
    script(make_lt, "--dataset", "folder", "--data", tmp_path, "--long-tail", "exponential", "--imbalance", 10, "--holdout", 10)
    sizes = {file.stem: [len(paths) for paths in per_class(file).values()] for file in tmp_path.glob("*.txt")}
    assert sizes["train_lt"] == make_lt.exponential_counts(3, 50, 10) == [50, 15, 5]
    assert sizes["val"] == [10] * 3 and sizes["train_full"] == [60, 54, 50] and sizes["test"] == [3] * 3
    assert sizes["train_lt0"] == make_lt.alpha_counts([50, 15, 5], 0)
    train, val = ({path for path, _ in lines(tmp_path / name)} for name in ("train_full.txt", "val.txt"))
    assert not train & val and all(path.startswith("val/") for path, _ in lines(tmp_path / "test.txt"))


def test_folder_with_val_and_test_and_no_tail(script, tmp_path):
    folder(tmp_path, [5, 6], val=2, test=4)
    script(make_lt, "--dataset", "folder", "--data", tmp_path)
    assert sorted(file.name for file in tmp_path.glob("*.txt")) == ["test.txt", "train_full.txt", "val.txt"]
    assert all(path.startswith("val/") for path, _ in lines(tmp_path / "val.txt")) and len(lines(tmp_path / "val.txt")) == 4
    assert all(path.startswith("test/") for path, _ in lines(tmp_path / "test.txt")) and len(lines(tmp_path / "test.txt")) == 8
    assert len(lines(tmp_path / "train_full.txt")) == 11


def test_folder_with_class_sizes_from_a_file_or_a_list(script, tmp_path, capsys):
    folder(tmp_path / "set", [30, 30, 30])
    (tmp_path / "sizes.txt").write_text("3\n20\n7\n")
    run = (make_lt, "--dataset", "folder", "--data", tmp_path / "set", "--holdout", 5, "--long-tail")
    script(*run, tmp_path / "sizes.txt", "--out", tmp_path / "a")
    assert "another draw of images" in capsys.readouterr().out
    made = per_class(tmp_path / "a/train_lt.txt")
    assert [len(made[c]) for c in range(3)] == [3, 20, 7]
    script(*run, tmp_path / "a/train_lt.txt", "--out", tmp_path / "b", "--seed", 0)  # a list: its own images
    assert per_class(tmp_path / "b/train_lt.txt") == made
    with pytest.raises(SystemExit, match="--long-tail imagenet-lt holds 1000 class sizes for 3 classes"):
        script(*run, "imagenet-lt")
    with pytest.raises(SystemExit, match="nothing.txt: no such list file"):
        script(*run, "nothing.txt")
    with pytest.raises(SystemExit, match="train_lt0 wants 29 images of class 0, but there are 25"):
        script(*run, "exponential", "--n-max", 40, "--imbalance", 2, "--lt0", "authors")
    with pytest.raises(SystemExit, match="smallest class would have no image .the largest 25."):
        script(*run, "exponential", "--imbalance", 1000)
    with pytest.raises(SystemExit, match="class class0 has 30 training images; --holdout 30 would leave none"):
        script(make_lt, "--dataset", "folder", "--data", tmp_path / "set", "--holdout", 30)
    (tmp_path / "set/val/class2").rename(tmp_path / "set/val/class9")
    with pytest.raises(SystemExit, match="hold other classes: class2 is in one of them only"):
        script(*run, "exponential")


def test_pareto_tail_draws_which_class_is_how_large(script, tmp_path):
    folder(tmp_path, [40] * 6)
    for seed in (0, 1):
        script(make_lt, "--dataset", "folder", "--data", tmp_path, "--long-tail", "pareto", "--n-min", 2, "--seed", seed,
               "--out", tmp_path / str(seed))
    sizes = [[len(paths) for paths in per_class(tmp_path / f"{seed}/train_lt.txt").values()] for seed in (0, 1)]
    assert sorted(sizes[0], reverse=True) == sorted(sizes[1], reverse=True) == make_lt.pareto_counts(6, 20, 2)
    assert sizes[0] != sizes[1]


def test_places365_in_its_easy_format(script, tmp_path):
    for c in ("airfield", "zen_garden"):
        touch(tmp_path, [f"train/{c}/{i:08d}.jpg" for i in range(25)] + [f"val/{c}/Places365_val_{i:08d}.jpg" for i in range(2)])
    script(make_lt, "--dataset", "places365", "--data", tmp_path)
    assert [len(lines(tmp_path / f)) for f in ("train_full.txt", "val.txt", "test.txt")] == [10, 40, 4]
    spec = data.DATASETS["places365"]
    assert (spec["mean"], spec["full"], spec["test"]) == (data.IMAGENET_MEAN, "train_full.txt", "test.txt")


# ---- iNaturalist, CIFAR: from the official files to a trained classifier

def test_inaturalist_from_json_to_a_head(script, tmp_path):
    rng = np.random.RandomState(0)
    for part, n in (("train", 12), ("val", 3)):
        images, annotations = [], []
        for i in range(n):
            file = f"train_val2018/Plantae/{i % 3}/{part}{i}.jpg"
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.randint(0, 255, (40, 50, 3), np.uint8)).save(tmp_path / file)
            images.append({"id": 100 + i, "file_name": file})
            annotations.append({"id": i, "image_id": 100 + i, "category_id": i % 3})
        (tmp_path / f"{part}2018.json").write_text(json.dumps({"images": images, "annotations": annotations[::-1]}))
    script(make_lt, "--dataset", "inat18", "--data", tmp_path)
    assert lines(tmp_path / "iNaturalist18_train.txt") == [[f"train_val2018/Plantae/{i % 3}/train{i}.jpg", str(i % 3)] for i in range(12)]
    script(train_rep, "--dataset", "inat18", "--data", tmp_path, "--loss", "ce", "--arch", "resnet18", "--batch", 6,
           "--epochs", 1, "--workers", 0, "--out", tmp_path / "run")
    with pytest.raises(SystemExit, match="inat18 has no balanced training list for --protocol rep"):
        script(train_linear, tmp_path / "run/backbone.pt", "--protocol", "rep")
    script(train_linear, tmp_path / "run/backbone.pt", "--epochs", 1, "--batch", 6, "--workers", 0)
    head = torch.load(tmp_path / "run/linear-lt/head.pt", weights_only=True)
    assert head["mean"] == (0.466, 0.471, 0.380) and head["std"] == (0.195, 0.194, 0.192) and head["chosen"] == "lr 0.1, weight decay 0.0005 given"
    script(evaluate, tmp_path / "run/head.pt", "--workers", 0, "--pictures", tmp_path)
    assert json.loads((tmp_path / "run/eval.json").read_text())["list"] == "iNaturalist18_val.txt"
    (tmp_path / "val2018.json").write_text('{"images": []}')
    with pytest.raises(SystemExit, match="val2018.json: not the annotations of iNaturalist 2018 .KeyError"):
        script(make_lt, "--dataset", "inat18", "--data", tmp_path, "--out", tmp_path / "new")
    (tmp_path / "train2018.json").unlink()
    with pytest.raises(SystemExit, match="train2018.json or .* is missing; expected iNaturalist 2018"):
        script(make_lt, "--dataset", "inat18", "--data", tmp_path)


def cifar_stand_in(root, monkeypatch, per_class=20):
    """CIFAR-10's pickles with few images; torchvision is told their checksums."""
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    rng, sums = np.random.RandomState(0), {}
    for name, n in (*((f"data_batch_{i}", per_class // 5 * 10) for i in range(1, 6)), ("test_batch", 20)):
        content = pickle.dumps({"data": rng.randint(0, 255, (n, 3072), np.uint8), "labels": [i % 10 for i in range(n)]})
        (base / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    content = pickle.dumps({"label_names": names})
    (base / "batches.meta").write_bytes(content)
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name in sums if name != "test_batch"])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": hashlib.md5(content).hexdigest()})
    return base


def test_cifar10_lt_from_pickles_to_a_head(script, tmp_path, monkeypatch):
    root = tmp_path / "cifar10"
    base = cifar_stand_in(root, monkeypatch)
    script(make_lt, "--dataset", "cifar10", "--data", root, "--imbalance", 10)
    sizes = [len(paths) for paths in per_class(root / "train_lt.txt").values()]
    assert sizes == make_lt.exponential_counts(10, 20, 10) and not (root / "val.txt").exists()
    raw = pickle.loads((base / "data_batch_1").read_bytes())["data"][3].reshape(3, 32, 32).transpose(1, 2, 0)
    assert (np.asarray(Image.open(root / "train/cat/00003.png")) == raw).all()  # label 3, its pixels as they are
    assert lines(root / "test.txt")[2] == ["test/automobile/00001.png", "1"] and len(lines(root / "test.txt")) == 20
    monkeypatch.setattr(sys, "argv", ["train_rep.py", "--dataset", "cifar10", "--data", str(root), "--loss", "kcl"])
    a = train_rep.parse_args()
    assert (a.arch, a.batch, a.lr, a.weight_decay, a.aug, a.val) == ("resnet32", 128, 0.1, 2e-4, "cifar", "none")
    script(train_rep, "--dataset", "cifar10", "--data", root, "--loss", "kcl", "--arch", "resnet8", "--batch", 16, "--queue", 30,
           "--epochs", 1, "--workers", 0, "--out", tmp_path / "run")
    script(train_linear, tmp_path / "run/backbone.pt", "--epochs", 1, "--batch", 16, "--workers", 0)
    head = torch.load(tmp_path / "run/linear-lt/head.pt", weights_only=True)
    assert head["counts"] == sizes and head["chosen"] == "lr 30, weight decay 0 given" and head["std"] == (0.2023, 0.1994, 0.2010)


def test_broken_cifar_pickles_are_noticed(script, tmp_path, monkeypatch):
    base = cifar_stand_in(tmp_path, monkeypatch)
    (base / "data_batch_2").write_bytes((base / "data_batch_2").read_bytes()[:-1] + b"x")

    def no_network(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", no_network)
    with pytest.raises(SystemExit, match="cifar10 is not in .* and did not download .no network.; put there cifar-10-python"):
        script(make_lt, "--dataset", "cifar10", "--data", tmp_path)


# ---- the check

def test_check_finds_what_is_wrong(script, tmp_path, capsys):
    rng = np.random.RandomState(0)
    files = [f"{part}/{i}.png" for part in ("train", "val") for i in range(5)]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.randint(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / file)
    (tmp_path / "train_lt.txt").write_text("".join(f"train/{i}.png {i % 2}\n" for i in range(5)))
    (tmp_path / "val.txt").write_text("".join(f"val/{i}.png {i % 2}\n" for i in range(4)))
    script(make_lt, "--check", "--data", tmp_path, "--workers", 0)
    out = capsys.readouterr().out
    assert "train_lt.txt: 5 images, 2 classes of 2 to 3" in out and out.endswith("9 images of 2 lists: 0 faults\n")
    (tmp_path / "train/0.png").write_bytes((tmp_path / "train/0.png").read_bytes()[:60])
    (tmp_path / "train/1.png").write_bytes(b"")
    (tmp_path / "train/2.png").unlink()
    (tmp_path / "val/0.png").write_bytes((tmp_path / "train/3.png").read_bytes())
    (tmp_path / "val.txt").write_text((tmp_path / "val.txt").read_text() + "train/4.png 3\nval/1.png 1\n")
    with pytest.raises(SystemExit, match="7 faults in"):
        script(make_lt, "--check", "--data", tmp_path, "--workers", 0)
    found = [line for line in capsys.readouterr().out.splitlines() if "classes of" not in line]
    for start, end in (("val.txt: class 2 has no image", ""), ("val.txt: val/1.png is there twice", ""), ("train/0.png: ", ""),
                       ("train/1.png: UnidentifiedImageError", ""), ("train/2.png: FileNotFoundError", ""),
                       ("train/4.png: in the lists of train and val", ""), ("the same image under 2 names", "train/3.png, val/0.png")):
        assert sum(line.startswith(start) and line.endswith(end) for line in found) == 1, start
    with pytest.raises(SystemExit, match="holds no list; name them with --lists"):
        script(make_lt, "--check", "--data", tmp_path / "train")


def test_check_before_training(script, digits, tmp_path, capsys):
    shutil.copytree(digits, tmp_path / "set")
    run = (train_rep, "--data", tmp_path / "set", "--loss", "ce", "--check", "--epochs", 1, "--out", tmp_path / "run")
    (tmp_path / "set/val/3/007.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="1 faults in train_lt.txt or val.txt, listed above"):
        script(*run)
    assert "val/3/007.png: UnidentifiedImageError" in capsys.readouterr().out and not (tmp_path / "run").exists()
    shutil.copy(digits / "val/3/007.png", tmp_path / "set/val/3/007.png")
    script(*run)
    assert (tmp_path / "run/head.pt").exists()


def test_the_embedded_digits_pass_their_check(script, digits, capsys):
    script(make_lt, "--check", "--data", digits, "--workers", 0)
    assert capsys.readouterr().out.endswith("5,000 images of 9 lists: 0 faults\n")


def test_class_splits_of_the_digits_train_and_choose_on_their_own_lists(script, digits, tmp_path):
    """Table 4 in miniature: source classes, then a classifier for the target classes."""
    script(train_rep, "--dataset", "digits", "--data", digits, "--list", "overlap_source/train_lt0.txt", "--loss", "ce",
           "--epochs", 1, "--out", tmp_path / "run")
    script(train_linear, tmp_path / "run/backbone.pt", "--protocol", "rep", "--list", "overlap_target/train_full.txt",
           "--epochs", 1, "--lr", 0.1, 1, "--out", tmp_path / "target")
    source, target = (torch.load(tmp_path / f, weights_only=True) for f in ("run/head.pt", "target/head.pt"))
    assert len(source["counts"]) == len(target["counts"]) == 5 and target["counts"] == [350] * 5
    assert target["chosen"].endswith("chosen on overlap_target/val.txt")
    script(evaluate, tmp_path / "run/head.pt", tmp_path / "target/head.pt", "--pictures", tmp_path)
    for folder_, file in (("overlap_source", "run/eval.json"), ("overlap_target", "target/eval.json")):
        scored = json.loads((tmp_path / file).read_text())
        assert scored["list"] == f"{folder_}/test.txt" and scored["images"] == 500


def test_train_rep_knows_the_data_set_from_its_folder(script, digits, tmp_path, monkeypatch):
    folder(tmp_path / "any", [5, 6])
    script(make_lt, "--dataset", "folder", "--data", tmp_path / "any", "--holdout", 1)
    for root, expected in ((digits, "digits"), (tmp_path / "any", "folder"), (tmp_path, "imagenet")):
        monkeypatch.setattr(sys, "argv", ["train_rep.py", "--data", str(root)])
        assert train_rep.parse_args().dataset == expected


def test_small_refusals(script, tmp_path):
    with pytest.raises(SystemExit, match="exists already; delete it or name another folder with --out"):
        script(make_lt, "--out", tmp_path)
    folder(tmp_path, [5])
    with pytest.raises(SystemExit, match="train has 1 class folders; two at least"):
        script(make_lt, "--dataset", "folder", "--data", tmp_path)
    with pytest.raises(SystemExit, match="the embedded digits come from the project itself"):
        script(make_lt, "--data", tmp_path)
    (tmp_path / "train/class1").mkdir()
    with pytest.raises(SystemExit, match="train/class1 holds no image; every class folder needs one"):
        script(make_lt, "--dataset", "folder", "--data", tmp_path)


def test_take_refuses_what_is_not_there():
    with pytest.raises(InputError, match="wants 3 images of class 1, but there are 2"):
        make_lt.take([["a", "b", "c"], ["d", "e"]], [1, 3], "x")
    assert make_lt.take([["a", "b", "c"], ["d", "e"]], [1, 2], "x") == [["a"], ["d", "e"]]
