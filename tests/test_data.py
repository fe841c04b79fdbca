"""Lists, decoding, augmentations, draws and batches against PIL, torchvision, literal loops and one process."""
import io
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import augment
import checkpoint
import data
import ddp

DIGITS = data.DATASETS["digits"]
SPEC = dict(pixels=32, resize=40)


def photo(w=90, h=70, seed=0, mode="RGB"):
    """Something smooth in colour."""
    small = np.random.RandomState(seed).randint(0, 256, (6, 6, len(mode)), np.uint8)
    bands = [Image.fromarray(small[:, :, i]).resize((w, h), Image.BICUBIC) for i in range(len(mode))]
    return Image.merge(mode, bands)


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(image):
    """PIL -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.fixture
def photos(tmp_path):
    """Eight JPEGs of two classes and their list, l.txt."""
    for i in range(8):
        photo(seed=i).save(tmp_path / f"{i}.jpg")
    (tmp_path / "l.txt").write_text("".join(f"{i}.jpg {i % 2}\n" for i in range(8)))
    return tmp_path


def of_ranks(monkeypatch, world, f):
    """[f() on rank 0, f() on rank 1, ...]"""
    found = []
    for rank in range(world):
        monkeypatch.setattr(ddp, "world", lambda: world)
        monkeypatch.setattr(ddp, "rank", lambda: rank)
        found.append(f())
    monkeypatch.undo()
    return found


# ---- lists

def test_published_forms_of_list_lines(tmp_path):
    (tmp_path / "l.txt").write_text("train/n01/x.JPEG 0\n/n01/y z.JPEG 1\r\nval/é.JPEG 2\n", encoding="utf-8")
    paths, labels = data.read_list(tmp_path, "l.txt")
    assert paths == ["train/n01/x.JPEG", "train/n01/y z.JPEG", "val/é.JPEG"] and labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("line", [
    "./train/a/x.jpg 0", "train//a/x.jpg 0", "train/b/../a/./x.jpg 0", "/a/x.jpg 0", "//a/x.jpg 0", "train\\a\\x.jpg 0",
    "../X/train/a/x.jpg 0", "\ufefftrain/a/x.jpg 0", "\n\n  train/a/x.jpg   0 \r\n\r\n"])
def test_an_image_has_one_name_however_a_list_spells_it(tmp_path, line):
    root = tmp_path / "X"
    root.mkdir()
    (root / "l.txt").write_text(line, encoding="utf-8")
    (root / "train.txt").write_text("train/a/x.jpg 0\n")
    paths, labels = data.read_list(root, "l.txt")
    assert paths == ["train/a/x.jpg"] and labels.tolist() == [0]
    with pytest.raises(SystemExit, match="1 images of the validation list"):
        data.refuse_overlap(root, "train.txt", "l.txt")


def test_a_list_of_another_encoding_and_an_empty_one(tmp_path):
    (tmp_path / "l.txt").write_bytes(b"M\xfcller/x.jpg 0\n")
    assert os.fsencode(data.read_list(tmp_path, "l.txt")[0][0]) == b"M\xfcller/x.jpg"
    for content in (b"", b"\n \r\n"):
        (tmp_path / "l.txt").write_bytes(content)
        with pytest.raises(SystemExit, match="error: .*l.txt is empty"):
            data.read_list(tmp_path, "l.txt")


def test_what_lies_in_the_working_directory_hides_no_list_of_the_data_folder(tmp_path, monkeypatch):
    for name in ("X/half/l.txt", "X/half/val.txt", "X/l.txt", "X/val.txt", "here/val.txt", "here/half/val.txt", "here/own/l.txt",
                 "here/l.txt", "here/own/val.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name} 0\n")
    monkeypatch.chdir(tmp_path / "here")
    root = tmp_path / "X"
    for name, found in (("l.txt", "X/l.txt"), ("half/l.txt", "X/half/l.txt"), ("own/l.txt", "here/own/l.txt")):
        assert data.read_list(root, name)[0] == [found]
        val = data.sibling_list(root, name, "val.txt")
        assert data.read_list(root, val)[0] == [found.replace("l.txt", "val.txt")]
    (root / "half/val.txt").unlink()
    assert data.sibling_list(root, "half/l.txt", "val.txt") == "val.txt"        # not here/half/val.txt
    trained = {"data": str(root), "list": "l.txt", "list_sha256": checkpoint.sha256(root / "l.txt")}
    checkpoint.same_list(trained)                                         # not here/l.txt


@pytest.mark.parametrize("second", ["b.png", "b.png x", "b.png -1", "7"])
def test_broken_list_line_and_missing_list_are_named(tmp_path, second):
    (tmp_path / "l.txt").write_text(f"a.png 0\n{second}\n")
    with pytest.raises(SystemExit, match=rf"l.txt, line 2: expected `relative/path label`, got `{second}`"):
        data.read_list(tmp_path, "l.txt")
    with pytest.raises(SystemExit, match="nowhere.txt: no such list file"):
        data.read_list(tmp_path, "nowhere.txt")


def test_lists_that_must_not_be_confused(tmp_path):
    (tmp_path / "half").mkdir()
    for name, images in (("l.txt", "ab"), ("val.txt", "c"), ("half/l.txt", "b"), ("half/val.txt", "a")):
        (tmp_path / name).write_text("".join(f"{image} 0\n" for image in images))
    data.refuse_overlap(tmp_path, "l.txt", "val.txt")
    with pytest.raises(SystemExit, match=r"1 images of .*half/val.txt are also in .*l.txt \(first: a\)"):
        data.refuse_overlap(tmp_path, "l.txt", "half/val.txt")

    assert data.sibling_list(tmp_path, "l.txt", "val.txt") == data.sibling_list(tmp_path, "other/l.txt", "val.txt") == "val.txt"
    assert data.sibling_list(tmp_path, "half/l.txt", "val.txt") == "half/val.txt"


ANT_BEE = "train/ant/1.jpg 0\ntrain/ant/red/2.jpg 0\ntrain/bee/1.jpg 1\n"


@pytest.mark.parametrize("train, here, sentence", [
    (ANT_BEE, "test/ant/1.jpg 1\ntest/bee/1.jpg 0\n", "label 0 is class bee in l.txt, but ant in the training list"),
    (ANT_BEE, "test/2020/a/ant/1.jpg 1\ntest/2020/a/bee/1.jpg 0\n", "label 0 is class bee in l.txt, but ant"),
    (ANT_BEE, "aphid/1.jpg 0\nant/1.jpg 1\nbee/1.jpg 2\n", "label 0 is class aphid in l.txt, but ant"),  # one class more
    (ANT_BEE, "ant/1.jpg 0\ncat/1.jpg 1\n", "label 1 is class cat in l.txt, but bee"),                   # another class
    (ANT_BEE, "./ant/1.jpg 1\nbee/1.jpg 2\n", "label 1 is class ant in l.txt, but bee"),                 # labels from 1
    (ANT_BEE, "test/bee/7.jpg 1\ntest/bee/red/8.jpg 1\ntest/ant/1.jpg 0\n", None),
    (ANT_BEE, "1.jpg 1\n2.jpg 0\n", None),                                                              # no folders
    (ANT_BEE, "v2/0/1.jpg 0\nv2/1/1.jpg 1\n", None),                                                    # other names
    ("p1/l.jpg 0\np2/l.jpg 1\np3/l.jpg 1\n", "p1/r.jpg 1\np2/r.jpg 1\np3/r.jpg 0\n", None)])          # eyes of patients
def test_class_folders_of_two_lists_have_one_numbering(tmp_path, train, here, sentence):
    (tmp_path / "train.txt").write_text(train)
    (tmp_path / "l.txt").write_text(here)
    names, found = data.class_names(tmp_path, "train.txt"), None
    assert names == ({0: "ant", 1: "bee"} if train == ANT_BEE else {})
    try:
        data.refuse_other_classes(names, tmp_path, "l.txt")
    except SystemExit as error:
        found = str(error)
    assert found is None if sentence is None else found.startswith(f"error: {sentence}")


@pytest.mark.parametrize("sizes, name", [
    ([(32, 32)], "small"), ([(28, 20)], "small"), ([(33, 20)], "small64"), ([(48, 48)], "small64"), ([(64, 40)], "small64"),
    ([(65, 30)], None), ([(500, 300)], None), ([(30, 32), (32, 28), (900, 700)], "small"), ([], None)])
def test_the_size_of_the_images_decides_about_a_folder(tmp_path, capsys, sizes, name):
    """One of them does not open. All become squares of the set's size, so that they fit into one tensor."""
    for i, (w, h) in enumerate(sizes):
        photo(w, h, seed=i).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").touch()
    paths = [f"{i}.png" for i in range(len(sizes))]
    assert data.small_dataset(tmp_path, [*paths, "broken.png", "missing.png"]) == name
    assert (f"the data set is {name}" in capsys.readouterr().out) == bool(name)
    if name:
        spec, side = data.DATASETS[name], int(name[5:] or 32)
        assert spec["kind"] == "cifar" and spec["val"] == "val.txt" and spec["pixels"] == side
        (tmp_path / "l.txt").write_text("".join(f"{path} 0\n" for path in paths))
        images = data.ImageList(tmp_path, "l.txt", spec, "cifar")
        loader = data.train_loader(images, data.Draws(images.labels, "instance", 1), 0, torch.device("cpu"))
        assert loader.images.shape == (len(sizes), 3, side, side)


def test_an_image_of_the_right_size_stays_as_it_is(digits):
    images = data.ImageList(digits, "val.txt", DIGITS)
    assert all(torch.equal(images[i][0][0], images.image(i)) for i in range(0, 2000, 100))


def test_groups():
    assert data.groups([1280, 101, 100, 20, 19, 1]) == ["many", "many", "medium", "medium", "few", "few"]


# ---- decoding

@pytest.mark.parametrize("options", [dict(quality=90), dict(quality=30, subsampling=0), dict(progressive=True)])
def test_jpeg_decodes_as_with_pil(options):
    """A difference of one level is allowed, because another version of the JPEG library may round differently."""
    for image in (photo(), photo(81, 63, seed=1), photo().convert("L"), photo(mode="CMYK")):
        content = encoded(image, "JPEG", **options)
        assert (data.decode(content).int() - pixels(Image.open(io.BytesIO(content))).int()).abs().max() <= 1


def test_other_formats_decode_exactly():
    """The stored colours come out. Alpha is dropped, even if it is in the palette, and EXIF's quarter turn is ignored."""
    image, palette, rgba = photo(), photo().quantize(64), photo(mode="RGBA")
    grey, exif = image.convert("L"), Image.Exif()
    exif[0x112] = 6
    for content, stored in ((encoded(image, "PNG"), image), (encoded(grey, "PNG"), grey),
                            (encoded(rgba, "PNG"), rgba), (encoded(palette, "PNG"), palette),
                            (encoded(palette, "PNG", transparency=3), palette),
                            (encoded(palette, "GIF"), palette), (encoded(image, "BMP"), image)):
        assert torch.equal(data.decode(content), pixels(stored))
    assert data.decode(encoded(image, "JPEG", exif=exif)).shape == (3, 70, 90)
    for deep in (np.full((4, 4), 999, np.uint16), np.ones((4, 4), np.float32)):
        with pytest.raises(ValueError, match="more than 8 bits"):
            data.decode(encoded(Image.fromarray(deep), "TIFF"))


@pytest.mark.parametrize("options", [dict(quality=90), dict(quality=30, subsampling=0)])
def test_a_jpeg_without_its_end_marker_has_pils_pixels(options):
    for image in (photo(), photo(81, 63, seed=1), photo().convert("L")):
        content = encoded(image, "JPEG", **options)
        without_end = content[:-2] + bytes(100)
        assert torch.equal(data.decode(without_end), pixels(Image.open(io.BytesIO(without_end))))
        assert (data.decode(without_end).int() - data.decode(content).int()).abs().max() <= 1
        with pytest.raises(OSError, match="truncated"):
            data.decode(content[:-300])


def test_an_image_that_does_not_decode_is_named(photos):
    (photos / "1.jpg").write_bytes((photos / "1.jpg").read_bytes()[:-300])
    with pytest.raises(RuntimeError, match="1.jpg of l.txt is missing or does not decode"):
        data.ImageList(photos, "l.txt", SPEC)[1]


# ---- transforms of one image

def test_crop_and_flip_are_torchvisions_pixel_for_pixel():
    """From the same random numbers, which they draw in the same order."""
    image, ours = pixels(photo(200, 150)), augment.augmentation("sup", 64)
    theirs = v2.Compose([v2.RandomResizedCrop(64), v2.RandomHorizontalFlip()])
    for seed in range(40):
        out = []
        for transform in (ours, theirs):
            torch.manual_seed(seed)
            out.append((transform(image), torch.rand(1)))
        assert torch.equal(out[0][0], out[1][0]) and out[0][1] == out[1][1]


LEVELS = torch.arange(0, 257, 16).clamp(max=255).to(torch.uint8)          # 0, 16, ..., 240, 255
COLOURS = {"noise": torch.randint(256, (3, 60, 80), generator=torch.Generator().manual_seed(0)).to(torch.uint8),
           "smooth": pixels(photo(seed=3)),                               # channels last in memory
           "greys": torch.arange(256, dtype=torch.uint8).expand(3, 1, 256),  # one plane in memory, as RandomGrayscale's
           "lattice": torch.stack(torch.meshgrid(LEVELS, LEVELS, LEVELS, indexing="ij")).flatten(2)}  # (3, 17, 289)


@pytest.mark.parametrize("name", COLOURS)
def test_hue_is_torchvisions_to_one_level(name):
    """The lattice has black, white and all saturated colours. Multiples of a sixth of a turn are kinks of the function.
    Hardly any pixel differs at all."""
    image = COLOURS[name]
    before, differ, turns = image.clone(), [], [i / 60 for i in range(-30, 31)] + [-1e-4, 1e-4, -0.4999, 0.4999]
    for turn in turns:
        ours, theirs = augment.adjust_hue(image, turn), v2.functional.adjust_hue(image, turn)
        assert ours.dtype == torch.uint8 and (ours.int() - theirs.int()).abs().max() <= 1
        differ.append((ours != theirs).double().mean().item())
    assert np.mean(differ) < 1e-3
    assert (augment.adjust_hue(image, 0.0).int() - image.int()).abs().max() <= 1
    assert torch.equal(image, before)


def test_hue_of_known_colours():
    """Red, yellow, green, cyan, blue and magenta are a sixth of a turn apart; a grey stays; chroma and value stay."""
    circle = [[255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 255, 255], [0, 0, 255], [255, 0, 255]]
    image = torch.tensor([*circle, [77, 77, 77]], dtype=torch.uint8).T[:, None]            # (3, 1, 7)
    for sixths in range(-3, 4):
        turned = augment.adjust_hue(image, sixths / 6)[:, 0].T.tolist()
        assert turned == [circle[(i + sixths) % 6] for i in range(6)] + [[77, 77, 77]]
    pink = torch.tensor([200, 100, 100], dtype=torch.uint8).view(3, 1, 1)
    assert augment.adjust_hue(pink, 1 / 12).flatten().tolist() == [200, 150, 100]


def test_constants_of_the_colour_augmentations(monkeypatch):
    _, _, grey, jitter, _ = augment.augmentation("moco", 224)
    _, _, softer, grey_after, blur, _ = augment.augmentation("mocov2", 224)
    for colours, hue in ((jitter, (-0.4, 0.4)), (softer.transforms[0], (-0.1, 0.1))):
        assert colours.brightness == colours.contrast == colours.saturation == (0.6, 1.4) and colours.hue == hue
    assert grey.p == grey_after.p == 0.2 and softer.p == 0.8 and blur.p == 0.5
    assert list(blur.transforms[0].kernel_size) == [23, 23] and list(blur.transforms[0].sigma) == [0.1, 2.0]

    monkeypatch.setattr(augment, "adjust_hue", lambda image, turns: torch.zeros_like(image))
    assert not jitter(pixels(photo())).any()                              # the hue is ours; black stays black


@pytest.mark.parametrize("name, bound", [("moco", 6), ("mocov2", 6), ("lt", 0)])
def test_colours_are_torchvisions_from_the_same_random_numbers(name, bound):
    """One level of hue is at most two after brightness (times 1.4, rounded), three after contrast (times 1.4), and six
    after saturation (times 1.4, less 0.4 of the grey). Hardly any pixel differs at all."""
    flip, grey = v2.RandomHorizontalFlip(), v2.RandomGrayscale(0.2)
    crop = v2.RandomResizedCrop(64, (0.08 if name == "lt" else 0.2, 1))
    softer = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    blur = v2.RandomApply([v2.GaussianBlur(7, (0.1, 2.0))], 0.5)
    theirs = v2.Compose({"moco": [crop, grey, v2.ColorJitter(0.4, 0.4, 0.4, 0.4), flip],
                         "mocov2": [crop, softer, grey, blur, flip],
                         "lt": [crop, flip, v2.ColorJitter(0.4, 0.4, 0.4)]}[name])
    image, ours, differ = pixels(photo(200, 150)), augment.augmentation(name, 64), []
    for seed in range(60):
        views, following = [], []
        for transform in (ours, theirs):
            torch.manual_seed(seed)
            views.append(transform(image).int())
            following.append(torch.rand(1))
        assert following[0] == following[1] and (views[0] - views[1]).abs().max() <= bound
        differ.append((views[0] != views[1]).double().mean().item())
    assert np.mean(differ) < 1e-3


def test_normalize(digits):
    x = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    y = data.normalize(x, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "cpu")
    assert y[1, 2, 3, 0].item() == pytest.approx((x[1, 2, 3, 0].item() / 255 - 0.3) / 0.7, rel=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    train = np.stack([np.asarray(Image.open(f)) for f in sorted(digits.glob("train/*/*.png"))]) / 255
    assert DIGITS["mean"] == pytest.approx([train.mean()] * 3, abs=1e-3)
    assert DIGITS["std"] == pytest.approx([train.std()] * 3, abs=1e-3)


# ---- augmentations of a batch

def test_affine_is_torchvisions(digits):
    """With the same angle, shift and scale, to within one level."""
    images = data.ImageList(digits, "val.txt", DIGITS)
    images = torch.stack([images[i][0][0] for i in range(0, 500, 10)])    # (50, 3, 32, 32)
    u = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    for image, (a, x, y, s), ours in zip(images, u.tolist(), augment.affine(images, u)):
        theirs = v2.functional.affine(image, 15 * (2 * a - 1), [round(3.2 * (2 * x - 1)), round(3.2 * (2 * y - 1))],
                                      0.85 + 0.3 * s, [0.0, 0.0], v2.InterpolationMode.BILINEAR)
        assert (ours.int() - theirs.int()).abs().max() <= 1


def test_crop_flip_is_a_crop_of_the_padded_image():
    images = torch.randint(256, (50, 3, 32, 32), dtype=torch.uint8)
    u = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    for image, (y, x, flip), ours in zip(images, u.tolist(), augment.crop_flip(images, u)):
        theirs = v2.functional.crop(v2.functional.pad(image, 4), int(9 * y), int(9 * x), 32, 32)
        assert torch.equal(ours, theirs if flip < 0.5 else theirs.flip(-1))


# ---- draws

COUNTS = (1000, 200, 40)
LABELS = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
LABELS = LABELS[torch.randperm(1240, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("kind, epoch, expected", [
    ("class", 0, [1 / 3] * 3), ("sqrt", 3, [math.sqrt(n) / sum(map(math.sqrt, COUNTS)) for n in COUNTS]),
    ("progressive", 0, [n / 1240 for n in COUNTS]), ("progressive", -1, [n / 1240 for n in COUNTS]),
    ("progressive", 25, [0.75 * n / 1240 + 0.25 / 3 for n in COUNTS]),
    ("progressive", 99, [0.01 * n / 1240 + 0.99 / 3 for n in COUNTS]),
    ("reversed", 0, [1 / n / sum(1 / n for n in COUNTS) for n in COUNTS])])
def test_draws_have_their_class_probabilities_and_are_uniform_inside_a_class(kind, epoch, expected):
    draws, count, n = data.Draws(LABELS, kind, batch=10, epochs=100), torch.zeros(1240), 20 * 1240
    for seed in range(20):
        draws.seed = seed
        draws.set_epoch(epoch)
        count += torch.bincount(torch.tensor([i for i, _ in draws]), minlength=1240)
    assert draws.class_probabilities(kind).tolist() == pytest.approx(expected, rel=1e-12)
    for c, p in enumerate(expected):
        mine = count[LABELS == c]
        assert mine.sum().item() / n == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))
        chi2, dof = ((mine - mine.mean()) ** 2 / mine.mean()).sum(), len(mine) - 1
        assert abs(chi2 - dof) < 5 * math.sqrt(2 * dof)


def test_an_instance_epoch_has_every_image_once():
    draws, epochs = data.Draws(LABELS, "instance", batch=10), []
    for epoch in (0, 1, 0):
        draws.set_epoch(epoch)
        epochs.append(list(draws))
        assert sorted(i for i, _ in epochs[-1]) == list(range(1240))
    order, seeds = zip(*[zip(*epoch) for epoch in epochs])
    assert epochs[0] == epochs[2] and order[0] != order[1] and not set(seeds[0]) & set(seeds[1])
    assert epochs[0] != list(data.Draws(LABELS, "instance", batch=10, seed=1))
    assert len(data.Draws(LABELS, "instance", batch=100)) == 1200         # the last, short batch is left out


@pytest.mark.parametrize("kind", ["instance", "class", "progressive", "bilateral"])
@pytest.mark.parametrize("world", [2, 5])
def test_ranks_share_the_batches_of_one_process(monkeypatch, kind, world):
    def draws():
        draws = data.Draws(LABELS, kind, batch=20, epochs=10)
        batches = torch.tensor(list(draws)).view(62, -1, 2)               # (steps, b, 2)
        assert draws.per_rank == batches.shape[1] and len(draws) == batches.shape[0] * batches.shape[1]
        return batches
    alone, shares = draws(), of_ranks(monkeypatch, world, draws)
    streams = 2 if kind == "bilateral" else 1
    shares = [share.view(62, streams, 20 // world, 2) for share in shares]
    assert torch.equal(torch.stack(shares, 3).flatten(1, 3), alone)       # rank r has each world-th draw of a stream


def test_bilateral_halves_are_the_two_samplers():
    both = torch.tensor(list(data.Draws(LABELS, "bilateral", batch=20))).view(62, 2, 20, 2)
    for half, kind in enumerate(("instance", "reversed")):
        assert torch.equal(both[:, half].flatten(0, 1), torch.tensor(list(data.Draws(LABELS, kind, batch=20))))


def test_draws_refuse_what_they_cannot_draw(monkeypatch):
    for kind in ("instance", "class", "sqrt", "progressive", "bilateral"):
        with pytest.raises(SystemExit, match="class 1 has no image in the training list; number the classes from 0 .* --list"):
            data.Draws(torch.tensor([0, 0, 2, 2]), kind, batch=2)
        with pytest.raises(SystemExit, match="class 0 has no image in the training list .do the labels begin at 1..; number .* --list"):
            data.Draws(torch.tensor([1, 1, 2, 2]), kind, batch=2)
    with pytest.raises(SystemExit, match="1240 images, fewer than --batch 2000"):
        data.Draws(LABELS, "instance", batch=2000)
    with pytest.raises(SystemExit, match="must be divisible"):
        of_ranks(monkeypatch, 3, lambda: data.Draws(LABELS, "instance", batch=10))


# ---- batches

@pytest.mark.parametrize("aug, workers", [("sup", 0), ("sup", 2), ("lt", 0), ("moco", 0), ("mocov2", 0)])
def test_batches_hold_the_items_however_many_workers(photos, aug, workers):
    """An item depends on its draw's seed alone, and takes nothing from the run's own random stream."""
    images = data.ImageList(photos, "l.txt", SPEC, aug, num_views=2)
    draws = data.Draws(images.labels, "instance", 4)
    keys, loader = list(draws), data.train_loader(images, draws, workers, torch.device("cpu"))
    before = torch.get_rng_state()
    for step, (views, labels, index) in enumerate(loader):
        for row, key in enumerate(keys[4 * step:4 * step + 4]):
            expected, label, i = images[key]
            assert (labels[row], index[row]) == (label, i) == (key[0] % 2, key[0])
            assert torch.equal(views[0][row], expected[0]) and torch.equal(views[1][row], expected[1])
            assert not torch.equal(*expected) and not torch.equal(expected[0], images[i, key[1] + 1][0][0])
        assert views[0].shape == (4, 3, 32, 32) and views[0].dtype == torch.uint8
    assert step == 1 and len(loader) == 2 and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once(photos, monkeypatch, workers):
    images = data.ImageList(photos, "l.txt", SPEC)
    seen = of_ranks(monkeypatch, 3, lambda: list(data.eval_loader(images, 2, workers)))
    assert [[index.tolist() for *_, index in batches] for batches in seen] == [[[0, 3], [6]], [[1, 4], [7]], [[2, 5]]]
    center = v2.Compose([v2.Resize(40), v2.CenterCrop(32)])(data.decode((photos / "4.jpg").read_bytes()))
    assert torch.equal(seen[1][0][0][0][1], center)


def test_simclr_against_torchvision_image_by_image():
    """The same box, flip and factors, one image at a time with torchvision's functions in this order."""
    from torchvision.transforms.v2 import functional as V
    g = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, generator=g)
    smooth = torch.nn.functional.interpolate(torch.rand(64, 3, 4, 4, generator=g) * 255, 32, mode="bicubic").clamp(0, 255).byte()
    images, u = torch.cat([noise, smooth]), torch.rand(128, 29, generator=g)
    found, kinds = augment.simclr(images, u), []
    for image, view, v in zip(images, found, u.tolist()):
        for area, aspect in zip(v[:10], v[10:20]):
            area, aspect = (0.2 + 0.8 * area) * 1024, math.exp((2 * aspect - 1) * math.log(4 / 3))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w <= 32 and h <= 32:
                break
        x, y = int(v[20] * (32 - w + 1)), int(v[21] * (32 - h + 1))
        expected = V.resized_crop(image, y, x, h, w, [32, 32], antialias=True)
        expected = expected if v[22] < 0.5 else V.horizontal_flip(expected)
        if v[27] < 0.8:
            for adjust, factor in ((V.adjust_brightness, 0.6 + 0.8 * v[23]), (V.adjust_contrast, 0.6 + 0.8 * v[24]),
                                   (V.adjust_saturation, 0.6 + 0.8 * v[25]), (V.adjust_hue, 0.2 * v[26] - 0.1)):
                expected = adjust(expected, factor)
        if v[28] < 0.2:
            expected = V.rgb_to_grayscale(expected, 3)
        kinds.append((v[22] < 0.5, v[27] < 0.8, v[28] < 0.2))
        difference = (view.int() - expected.int()).abs()
        # a level of rounding in the box: times 1.4, plus rounding, in each of three jitters, and one more of the hue
        assert difference.max() <= 8 and difference.float().mean() < 0.5
    assert len(set(kinds)) == 8


@pytest.mark.parametrize("aug", ["affine", "cifar", "simclr"])
def test_in_memory_augmentation_depends_on_the_draw_alone(digits, monkeypatch, aug):
    """The batches of two ranks together are the batch of one process."""
    images = data.ImageList(digits, "val.txt", DIGITS, aug, num_views=2)

    def batches():
        draws = data.Draws(images.labels, "class", 100)
        return list(data.train_loader(images, draws, 0, torch.device("cpu")))
    alone, shares = batches(), of_ranks(monkeypatch, 2, batches)
    assert len(alone) == 20 and not torch.equal(*alone[0][0])
    for whole, *parts in zip(alone, *shares):
        for view in (0, 1):
            assert torch.equal(torch.stack([part[0][view] for part in parts], 1).flatten(0, 1), whole[0][view])
        assert torch.equal(torch.stack([part[2] for part in parts], 1).flatten(), whole[2])
        assert torch.equal(images.labels[whole[2]], whole[1])

    function, n = augment.BATCHED[aug]
    i, *bits = data.Draws(images.labels, "class", 100).of_this_rank(2 * n)[0].tolist()
    u = torch.tensor([[b // 256 / 2**24 for b in bits]])                  # the 24 bits that float32 has
    assert torch.equal(alone[0][0][1][:1], function(images[i][0][0][None], u[:, n:]))


def test_a_default_list_is_never_that_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "X/half").mkdir(parents=True)
    for file in ("val.txt", "X/train.txt"):                               # the first is a stray one
        (tmp_path / file).write_text("a.jpg 0\n")
    monkeypatch.chdir(tmp_path)
    assert data.sibling_list("X", "train.txt", "val.txt") == "X/val.txt" and data.sibling_list("X", "train.txt", "none") == "none"
    with pytest.raises(SystemExit, match="error: X/val.txt: no such list file"):
        data.read_list("X", data.sibling_list("X", "train.txt", "val.txt"))
    for file in ("X/val.txt", "X/half/train.txt", "X/half/val.txt"):
        (tmp_path / file).write_text("b.jpg 0\n")
    assert data.sibling_list("X", "train.txt", "val.txt") == "val.txt"    # find_list takes that of X
    assert data.sibling_list("X", "half/train.txt", "val.txt") == "half/val.txt"
