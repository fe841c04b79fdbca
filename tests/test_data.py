"""Splits, list files and samplers against published counts, literal loops and frequencies."""
import hashlib
import math

import numpy as np
import pytest
import torch
from PIL import Image

import data
import ddp
import make_lt
from ddp import InputError
from digits import clutter

# ---- splits

@pytest.mark.parametrize("alpha, published", [
    (0.0, (116, 116, 116_000)), (0.2, (204, 67, 115_885)), (0.4, (343, 37, 115_801)), (0.6, (553, 20, 115_836)),
    (0.8, (857, 10, 115_852)), (1.0, (1279, 5, 115_846))])
def test_alpha_counts_give_the_papers_table(alpha, published):
    """Table 8; its last row says 1280, but the largest class of the list itself, whose total it gives, has 1279."""
    counts = [int(line) for line in (make_lt.EMBEDDED / "imagenet_lt_counts.txt").read_text().split()]
    n = make_lt.alpha_counts(counts, alpha)
    assert (max(n), min(n), sum(n)) == published
    if alpha == 1:
        assert n == counts
        group = data.groups(n)
        assert [group.count(g) for g in ("many", "medium", "few")] == [385, 479, 136]


def test_exponential_counts_are_cifar_lts():
    """The counts that CIFAR-10-LT is published with: 12,406 / 20,431 images at imbalance 100 / 10."""
    n = make_lt.exponential_counts(10, 5000, 100)
    assert n == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50] and sum(n) == 12_406
    assert sum(make_lt.exponential_counts(10, 5000, 10)) == 20_431


def test_group_boundaries():
    assert data.groups([1280, 101, 100, 20, 19, 1]) == ["many", "many", "medium", "medium", "few", "few"]


def test_digits_lists(digits):
    lists = {f.stem: f.read_text().splitlines() for f in digits.glob("*.txt")}
    count = {name: torch.bincount(torch.tensor([int(line.split()[1]) for line in lines])).tolist()
             for name, lines in lists.items()}
    assert count["train_full"] == [350] * 10 and count["val"] == [50] * 10 and count["test"] == [100] * 10
    base = make_lt.exponential_counts(10, 350, 100)
    assert sorted(count["train_lt"], reverse=True) == base == [350, 209, 125, 75, 45, 27, 16, 9, 5, 3]
    assert count["train_lt"] != base  # the order of the classes is shuffled
    for name, alpha in (("lt0", 0), ("lt2", 0.2), ("lt4", 0.4), ("lt6", 0.6), ("lt8", 0.8)):
        assert count[f"train_{name}"] == make_lt.alpha_counts(count["train_lt"], alpha)
    for lines in lists.values():
        assert len(set(lines)) == len(lines) and all((digits / line.split()[0]).exists() for line in lines)
    for a, b in (("train_lt", "train_lt8"), ("train_lt8", "train_lt6"), ("train_lt0", "train_lt")):  # maximal reuse
        shared = len(set(lists[a]) & set(lists[b]))
        assert shared == sum(map(min, zip(count[a], count[b])))
    assert not set(lists["val"]) & set(lists["train_full"])


def test_digits_are_the_same_everywhere(digits):
    """Same seed, same pixels and lists, on any platform; another seed, others."""
    pixels = hashlib.sha256(b"".join(np.asarray(Image.open(f)).tobytes() for f in sorted(digits.glob("test/*/*.png"))))
    lists = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(digits.glob("*.txt"))))
    assert (pixels.hexdigest()[:16], lists.hexdigest()[:16]) == ("ece1624d7f5af613", "3e5a0ab97aacca49")


def test_no_digit_serves_two_splits(tmp_path, monkeypatch):
    """Neither as the digit nor as a fragment: clutter() is handed one split's digits only."""
    seen = {}

    def record(digits, i, rng):
        if len(digits) not in seen:
            seen[len(digits)] = {d.tobytes() for d in digits}
        return np.zeros((32, 32), np.uint8)
    monkeypatch.setattr("digits.clutter", record)
    make_lt.make_digits(tmp_path / "set", seed=3)
    assert sorted(seen) == [500, 1000, 3500]
    assert len(set.union(*seen.values())) == sum(len(s) for s in seen.values()) == 5000


def test_clutter_is_as_described():
    """A 22 px digit plus fragments of other digits: without noise, no pixel of the digit is darkened."""
    class NoNoise(np.random.RandomState):
        def standard_normal(self, size):
            return np.zeros(size)
    digits = np.zeros((3, 28, 28), np.uint8)
    digits[0] = 200
    alone = clutter(digits, 0, NoNoise(0))
    assert (alone == 200).sum() == 22 * 22 and set(np.unique(alone)) == {0, 200}
    digits[1:] = 255
    fragments = clutter(np.stack([np.zeros((28, 28), np.uint8), digits[1]]), 0, NoNoise(0))
    assert 7 * 7 <= (fragments == 255).sum() <= 5 * 7 * 7
    noisy = np.stack([clutter(np.full((2, 28, 28), 128, np.uint8), 0, np.random.RandomState(i))[12:20, 12:20]
                      for i in range(200)]) / 255
    assert noisy.std() == pytest.approx(0.15, rel=0.03)


# ---- lists

def test_published_forms_of_list_lines(tmp_path):
    (tmp_path / "l.txt").write_text("train/n01/x.JPEG 0\n/n01/y z.JPEG 1\r\nval/é.JPEG 2\n\n", encoding="utf-8")
    paths, labels = data.read_list(tmp_path, "l.txt")
    assert paths == ["train/n01/x.JPEG", "train/n01/y z.JPEG", "val/é.JPEG"] and labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("text, where", [("a.png 0\nb.png\n", "line 2"), ("a.png x\n", "line 1"),
                                         ("a.png -1\n", "line 1"),
                                         ("7\n", "line 1"), ("a.png 99999999999999999999\n", "line 1"), ("", "empty"), ("\n\n", "empty")])
def test_broken_list_line_is_named(tmp_path, text, where):
    (tmp_path / "l.txt").write_text(text)
    with pytest.raises(InputError, match=where):
        data.read_list(tmp_path, "l.txt")


def test_a_list_that_is_no_text(tmp_path):
    (tmp_path / "l.txt").write_bytes(b"\xff\xfe\x00 1\n")
    with pytest.raises(InputError, match="UTF-8"):
        data.read_list(tmp_path, "l.txt")


def test_missing_folder_and_list(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        data.read_list(tmp_path / "nowhere", "l.txt")
    with pytest.raises(InputError, match="l.txt: no such list file"):
        data.read_list(tmp_path, "l.txt")


# ---- images

@pytest.mark.parametrize("name", data.AUGMENTATIONS)
def test_augmentations_make_squares_of_any_image(name):
    for size in ((90, 60), (300, 400)):
        out = data.augmentation(name, 64)(torch.zeros(3, *size, dtype=torch.uint8))
        assert out.shape == (3, 64, 64) and out.dtype == torch.uint8


@pytest.mark.parametrize("name", data.AUGMENTATIONS)
def test_augmentations_are_uint8_and_depend_on_the_seed_only(digits, name):
    images = data.ImageList(digits, "val.txt", data.augmentation(name, 32), num_views=2)
    torch.manual_seed(0)
    (a, b), label, index = images[7, 123]
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))  # the caller's random stream did not move
    assert a.dtype == torch.uint8 and a.shape == (3, 32, 32) and not torch.equal(a, b)
    (c, d), *_ = images[7, 123]
    assert torch.equal(a, c) and torch.equal(b, d) and (label, index) == (0, 7)
    assert not torch.equal(a, images[7, 124][0][0])


def test_normalize():
    x = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    y = data.normalize(x, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "cpu")
    assert y[1, 2, 3, 0].item() == pytest.approx((x[1, 2, 3, 0].item() / 255 - 0.3) / 0.7, rel=1e-5)


def test_embedded_normalisation_is_that_of_the_set(digits):
    pixels = np.stack([np.asarray(Image.open(f)) for f in sorted(digits.glob("train/*/*.png"))]) / 255
    spec = data.DATASETS["digits"]
    assert spec["mean"] == pytest.approx([pixels.mean()] * 3, abs=1e-3)
    assert spec["std"] == pytest.approx([pixels.std()] * 3, abs=1e-3)


# ---- samplers

LABELS = torch.tensor([0] * 1000 + [1] * 200 + [2] * 40)[torch.randperm(1240, generator=torch.Generator().manual_seed(0))]


def drawn(kind, epochs, epoch):
    """Class shares of the draws of one epoch, over 60 seeds."""
    draws, count = data.Draws(LABELS, kind, batch=10, epochs=epochs), torch.zeros(3)
    for seed in range(60):
        draws.seed = seed
        draws.set_epoch(epoch)
        count += torch.bincount(LABELS[[i for i, _ in draws]], minlength=3)
    return count / count.sum()


@pytest.mark.parametrize("kind, epoch, expected", [
    ("instance", 0, [1000 / 1240, 200 / 1240, 40 / 1240]), ("class", 0, [1 / 3] * 3),
    ("sqrt", 0, [math.sqrt(n) / (math.sqrt(1000) + math.sqrt(200) + math.sqrt(40)) for n in (1000, 200, 40)]),
    ("progressive", 0, [1000 / 1240, 200 / 1240, 40 / 1240]),
    ("progressive", 25, [0.75 * n / 1240 + 0.25 / 3 for n in (1000, 200, 40)]),
    ("progressive", 99, [0.01 * n / 1240 + 0.99 / 3 for n in (1000, 200, 40)]),
    ("reversed", 0, [1 / n / (1 / 1000 + 1 / 200 + 1 / 40) for n in (1000, 200, 40)])])
def test_sampler_frequencies(kind, epoch, expected):
    share, n = drawn(kind, epochs=100, epoch=epoch), 60 * 1240
    for s, p in zip(share.tolist(), expected):
        assert s == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))


def test_balanced_sampler_is_uniform_inside_a_class():
    draws, count = data.Draws(LABELS, "class", batch=10), torch.zeros(len(LABELS))
    for epoch in range(300):
        draws.set_epoch(epoch)
        count += torch.bincount(torch.tensor([i for i, _ in draws]), minlength=len(LABELS))
    tail = count[LABELS == 2]
    p = 1 / 3 / 40
    assert (tail / (300 * 1240) - p).abs().max() < 5 * math.sqrt(p / (300 * 1240))


def test_instance_epoch_has_every_image_once_and_epochs_differ():
    draws = data.Draws(LABELS, "instance", batch=10)
    first = [i for i, _ in draws]
    assert sorted(first) == list(range(1240)) and first == [i for i, _ in draws]
    draws.set_epoch(1)
    assert first != [i for i, _ in draws]
    assert len(data.Draws(LABELS, "instance", batch=100)) == 1200  # the last, short batch is left out


@pytest.mark.parametrize("kind", ["instance", "class", "sqrt", "progressive", "reversed"])
@pytest.mark.parametrize("world", [2, 5])
def test_ranks_share_one_sequence(monkeypatch, kind, world):
    """Rank r takes each world-th draw: no draw twice, and global batch s is the one that a single rank would see."""
    alone = list(data.Draws(LABELS, kind, batch=20, epochs=10))
    monkeypatch.setattr(ddp, "world", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(ddp, "rank", lambda: rank)
        draws = data.Draws(LABELS, kind, batch=20, epochs=10)
        shares.append(list(draws))
        assert len(draws) == len(shares[-1]) == 1240 // world
    assert [pair for row in zip(*shares) for pair in row] == alone
    for s in (0, 17):
        together = sum((share[s * 20 // world:(s + 1) * 20 // world] for share in shares), [])
        assert sorted(together) == sorted(alone[s * 20:(s + 1) * 20])


def test_sampler_refuses_what_it_cannot_draw(monkeypatch):
    with pytest.raises(InputError, match="class 1 has no image"):
        data.Draws(torch.tensor([0, 0, 2, 2]), "class", batch=2)
    with pytest.raises(InputError, match="fewer than one batch"):
        data.Draws(LABELS, "instance", batch=2000)
    monkeypatch.setattr(ddp, "world", lambda: 3)
    with pytest.raises(InputError, match="must divide"):
        data.Draws(LABELS, "instance", batch=10)
