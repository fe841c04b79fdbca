"""From image files to batches: decoding against PIL, broken files, the cache, the in-memory loader."""
import io
import json
import math
import pickle
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torchvision import transforms as pil_transforms
from torchvision.transforms import v2

import cache
import data
import train_rep
from ddp import InputError


def photo(w=90, h=70, seed=0):
    """Something smooth in colour, PIL RGB."""
    small = np.random.RandomState(seed).randint(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(small).resize((w, h), Image.BICUBIC)


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(image):
    """PIL -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def folder(root, files, name="l.txt"):
    """Write {relative path: bytes} and a list of them, labels 0, 1, 0, 1 ..."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    (root / name).write_text("".join(f"{path} {i % 2}\n" for i, path in enumerate(files)), encoding="utf-8")
    return root


# ---- decoding

@pytest.mark.parametrize("options", [dict(quality=90), dict(quality=30, subsampling=0), dict(progressive=True)])
def test_jpeg_decodes_as_with_pil(options):
    """The same library underneath: equal here; one level is what another version of it may round otherwise."""
    for image in (photo(), photo(81, 63, seed=1), photo().convert("L"), photo().convert("CMYK")):
        content = encoded(image, "JPEG", **options)
        assert (data.decode(content).int() - pixels(Image.open(io.BytesIO(content))).int()).abs().max() <= 1


def test_other_formats_decode_exactly():
    """Palette, greyscale, alpha: the stored colours, alpha dropped, also where it is in the palette."""
    image = photo()
    mask = Image.fromarray(np.tile(np.linspace(0, 255, 90).astype(np.uint8), (70, 1)))
    rgba, la = image.copy(), image.convert("L")
    rgba.putalpha(mask)
    la.putalpha(mask)
    palette = image.quantize(64)
    grey = pixels(image.convert("L"))
    for content, expected in ((encoded(image, "PNG"), pixels(image)), (encoded(rgba, "PNG"), pixels(image)),
                              (encoded(image.convert("L"), "PNG"), grey), (encoded(la, "PNG"), grey),
                              (encoded(image.convert("1"), "PNG"), pixels(image.convert("1"))),
                              (encoded(palette, "PNG"), pixels(palette)),
                              (encoded(palette, "PNG", transparency=bytes(range(64))), pixels(palette)),
                              (encoded(palette, "PNG", transparency=3), pixels(palette)),
                              (encoded(palette, "GIF"), pixels(palette)),
                              (encoded(image, "BMP"), pixels(image))):
        assert torch.equal(data.decode(content), expected)


def test_16_bit_grey_is_scaled():
    """0 and 65535 are black and white; convert("RGB") would make everything above 255 white."""
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for form in ("PNG", "TIFF"):
        out = data.decode(encoded(Image.fromarray(deep), form))           # (3, 256, 256)
        assert torch.equal(out[0], torch.from_numpy(np.round(deep / 65535 * 255).astype(np.uint8)))
        assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
    with pytest.raises(ValueError, match="32 bit"):
        data.decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


def test_which_jpegs_torchvision_decodes():
    """Not CMYK, not bombs: those are PIL's to decode or to refuse. Nor what is cut off in its header."""
    image, exif = photo(), Image.Exif()
    exif[0x10e] = "x" * 5000
    for content in (encoded(image, "JPEG"), encoded(image.convert("L"), "JPEG"), encoded(image, "JPEG", exif=exif),
                    encoded(image, "JPEG", progressive=True)):
        assert data.plain_jpeg(content) and not any(data.plain_jpeg(content[:n]) for n in range(20))
    cmyk = encoded(image.convert("CMYK"), "JPEG")
    assert not any(data.plain_jpeg(content) for content in (cmyk, PNG, huge(JPEG, JPEG.index(b"\xff\xc0") + 5)))


def test_without_torchvisions_decoder(monkeypatch):
    content = encoded(photo(), "JPEG")
    fast = data.decode(content)
    monkeypatch.setattr(data, "decode_jpeg", None)
    assert (data.decode(content).int() - fast.int()).abs().max() <= 1


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x112] = 6  # a quarter turn
    assert data.decode(encoded(photo(), "JPEG", exif=exif)).shape == (3, 70, 90)


JPEG, PNG = encoded(photo(), "JPEG"), encoded(photo(), "PNG")


def huge(content, at):
    """A JPEG or PNG whose header says 20,000 x 20,000."""
    side = (20_000).to_bytes(4 if content is PNG else 2, "big")
    return content[:at] + side * 2 + content[at + 2 * len(side):]


@pytest.mark.parametrize("content, message", [
    *((JPEG[:n], "") for n in (3, 100, len(JPEG) // 2, len(JPEG) - 1)),
    *((PNG[:n], "") for n in (9, 40, len(PNG) // 2)),
    (encoded(photo(), "JPEG", progressive=True)[:-1], "truncated"), (encoded(photo().convert("CMYK"), "JPEG")[:-9], ""),
    (b"", "empty"), (b"<html>404 not found</html>", "no format"), (None, "No such file"),
    (huge(JPEG, JPEG.index(b"\xff\xc0") + 5), "decompression bomb"), (huge(PNG, 16), "")])
def test_broken_file_is_one_sentence(tmp_path, content, message):
    """With the file, and the line as an editor counts it."""
    folder(tmp_path, {"a.jpg": JPEG, "b.jpg": content or b""})
    (tmp_path / "l.txt").write_text("a.jpg 0\n\nb.jpg 1\n")
    if content is None:
        (tmp_path / "b.jpg").unlink()
    images = data.ImageList(tmp_path, "l.txt", data.center(32, 40))
    start = time.time()
    sentence = rf"b.jpg \(line 3 of l.txt\) is missing or does not decode.*{message}"
    with pytest.raises(InputError, match=sentence) as error:
        images[1]
    assert "\n" not in str(error.value) and time.time() - start < 2 and images[0][0][0].shape == (3, 32, 32)
    assert [wrong is None for _, _, wrong in data.opened(tmp_path, images.paths, 0)] == [True, False]


def test_names_with_spaces_and_letters_of_all_kinds(tmp_path):
    files = {"Ünï cödé/日本 1.png": PNG, "b c/d  e.JPEG": JPEG, "f 7": JPEG}
    folder(tmp_path, files)
    (tmp_path / "l.txt").write_bytes((tmp_path / "l.txt").read_bytes().replace(b"\n", b"\r\n"))
    images = data.ImageList(tmp_path, "l.txt", data.center(32, 40))
    assert images.paths == list(files) and [len(images[i][0]) for i in range(3)] == [1, 1, 1]


def test_file_that_disappears_while_a_run_reads(tmp_path):
    folder(tmp_path, {f"{i}.jpg": JPEG for i in range(8)})
    images = data.ImageList(tmp_path, "l.txt", data.center(32, 40))
    loader = iter(data.train_loader(images, data.Draws(images.labels, "instance", 2), workers=0))
    next(loader)
    for file in tmp_path.glob("*.jpg"):
        file.unlink()
    with pytest.raises(InputError, match="is missing"):
        list(loader)


# ---- transforms

def test_crop_and_flip_are_torchvisions_pixel_for_pixel():
    """From the same random numbers, which they draw in the same order."""
    image = pixels(photo(200, 150))
    ours = data.augmentation("sup", 64)
    theirs = v2.Compose([v2.RandomResizedCrop(64), v2.RandomHorizontalFlip()])
    for seed in range(40):
        out = []
        for transform in (ours, theirs):
            torch.default_generator.manual_seed(seed)
            out.append((transform(image), torch.rand(1)))
        assert torch.equal(out[0][0], out[1][0]) and out[0][1] == out[1][1]


@pytest.mark.parametrize("size", [(300, 200), (64, 200), (40, 50)])
def test_center_is_pils_within_rounding(size):
    """torchvision's antialiased uint8 kernel against Pillow's: at most one level."""
    image = photo(*size)
    steps = [pil_transforms.Resize(64), pil_transforms.CenterCrop(48), pil_transforms.PILToTensor()]
    reference = pil_transforms.Compose(steps)(image)
    assert (data.center(48, 64)(pixels(image)).int() - reference.int()).abs().max() <= 1
    assert torch.equal(data.center(64, 64)(pixels(image)), pixels(image))  # digits, CIFAR: the stored pixels


def test_two_views_come_from_one_decode(tmp_path, monkeypatch):
    folder(tmp_path, {f"{i}.jpg": encoded(photo(seed=i), "JPEG") for i in range(4)})
    calls, decode = [], data.decode
    monkeypatch.setattr(data, "decode", lambda content: calls.append(1) or decode(content))
    images = data.ImageList(tmp_path, "l.txt", data.augmentation("sup", 32), num_views=2)
    views, *_ = images[1, 5]
    assert len(calls) == 1 and len(views) == 2 and not torch.equal(*views)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_items(tmp_path, workers):
    """The collated views are the items', channels last; labels and indices with them; workers persist."""
    folder(tmp_path, {f"{i}.jpg": encoded(photo(seed=i), "JPEG") for i in range(8)})
    images = data.ImageList(tmp_path, "l.txt", data.augmentation("moco", 32), num_views=2)
    draws = data.Draws(images.labels, "instance", 4)
    loader = data.train_loader(images, draws, workers)
    assert loader.persistent_workers == (workers > 0)
    keys = list(draws)
    for step, (views, labels, index) in enumerate(loader):
        for row, key in enumerate(keys[4 * step:4 * step + 4]):
            expected = images[key]
            assert all(torch.equal(view[row], e) for view, e in zip(views, expected[0]))
            assert (labels[row], index[row]) == expected[1:]
        assert all(v.dtype == torch.uint8 and v.is_contiguous(memory_format=torch.channels_last) for v in views)
    assert step == 1
    images = data.ImageList(tmp_path, "l.txt", data.center(32, 40))
    (view,), labels, index = next(iter(data.eval_loader(images, 3, workers)))
    assert view.shape == (3, 3, 32, 32) and index.tolist() == [0, 1, 2]


# ---- the cache

@pytest.fixture
def photos(tmp_path):
    """Eleven images of different shapes around a short side of 40, one of them a PNG."""
    files = {f"{i} .jpg": encoded(photo(90 - 3 * i, 30 + 3 * i, seed=i), "JPEG") for i in range(10)}
    return folder(tmp_path / "photos", {**files, "x.png": PNG})


def images_of(root, name="l.txt", short_side=40, aug="sup"):
    return data.ImageList(root, name, data.augmentation(aug, 32), 2, short_side)


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_gives_the_pixels_of_the_uncached_path(photos, tmp_path, workers):
    plain, cached = images_of(photos), images_of(photos)
    cached.use_cache(tmp_path / "cache", workers)
    sides = set()
    for i in range(11):
        assert torch.equal(plain.image(i), cached.cache[i])
        with Image.open(photos / plain.paths[i]) as opened:
            side = min(opened.size)
        assert min(plain.image(i).shape[1:]) == min(side, 40)  # never enlarged
        sides.add(side > 40)
        for a, b in zip(plain[i, 7][0], cached[i, 7][0]):
            assert torch.equal(a, b)
    assert sides == {True, False}
    expected = b"".join(plain.image(i).permute(1, 2, 0).numpy().tobytes() for i in range(11))
    assert (tmp_path / "cache/l-40.bin").read_bytes() == expected
    (photos / "0 .jpg").unlink()  # what is cached is not decoded again
    again = images_of(photos)
    again.use_cache(tmp_path / "cache", 0)
    again[0, 1]
    copy = pickle.loads(pickle.dumps(again))
    assert len(pickle.dumps(again)) < 10_000 and torch.equal(copy.cache[3], plain.image(3))
    loader = data.train_loader(cached, data.Draws(cached.labels, "instance", 5), workers)
    assert sum(len(labels) for _, labels, _ in loader) == 10


@pytest.mark.parametrize("stop, tear", [(3, b""), (6, b"torn"), (10, b"x" * 30_000)])
def test_build_that_was_cut_off_goes_on(photos, tmp_path, monkeypatch, stop, tear):
    """Killed at image `stop`, with a block of two and half-written ends: the same bytes as in one go."""
    monkeypatch.setattr(cache, "BLOCK", 2)
    images_of(photos).use_cache(tmp_path / "whole", 0)
    images, decoded = images_of(photos), []

    class Cut(data.ImageList):
        def image(self, i):
            decoded.append(i)
            if i == stop and len(decoded) > 11 + stop:  # the first eleven are the estimate of the size
                raise KeyboardInterrupt
            return super().image(i)
    cut = Cut(photos, "l.txt", None, short_side=40)
    with pytest.raises(KeyboardInterrupt):
        cut.use_cache(tmp_path / "cut", 0)
    with pytest.raises(InputError, match="not a complete cache"):
        cache.Cache(tmp_path / "cut", images).open()
    for ending in ("bin", "idx"):
        with open(tmp_path / f"cut/l-40.{ending}", "ab") as file:
            file.write(tear[:7] if ending == "idx" else tear)
    decoded.clear()
    cut.use_cache(tmp_path / "cut", 0)
    assert set(decoded) == set(range(stop // 2 * 2, 11))  # nothing of a whole block again
    for ending in ("bin", "idx", "json"):
        assert (tmp_path / f"cut/l-40.{ending}").read_bytes() == (tmp_path / f"whole/l-40.{ending}").read_bytes()


def test_cache_of_another_list_is_built_anew(photos, tmp_path, capsys):
    folder_ = tmp_path / "cache"
    images_of(photos).use_cache(folder_, 0)
    assert "building the cache anew" not in capsys.readouterr().out
    lines = (photos / "l.txt").read_text().splitlines(keepends=True)
    (photos / "l.txt").write_text("".join(lines[::-1][:6]))
    images = images_of(photos)
    with pytest.raises(InputError, match="not a complete cache of these"):
        cache.Cache(folder_, images).open()
    images.use_cache(folder_, 0)
    assert "building the cache anew" in capsys.readouterr().out
    assert all(torch.equal(images.cache[i], images.image(i)) for i in range(6))
    other = images_of(photos, short_side=48)  # another short side has files of its own, so has another list
    other.use_cache(folder_, 0)
    (photos / "split").mkdir()
    (photos / "split/l.txt").write_text("x.png 0\n")
    images_of(photos, "split/l.txt").use_cache(folder_, 0)
    images_of(photos).use_cache(folder_, 0)
    assert "anew" not in capsys.readouterr().out
    assert {file.stem for file in folder_.iterdir()} == {"l-40", "l-48", "split-l-40"}
    elsewhere = folder(tmp_path / "elsewhere", {path: JPEG for path in images.paths})  # same paths, other images
    moved = images_of(elsewhere)
    moved.use_cache(folder_, 0)
    assert "anew" in capsys.readouterr().out and torch.equal(moved.cache[0], moved.image(0))


def test_damage_to_a_cache_is_named(photos, tmp_path):
    images = images_of(photos)
    images.use_cache(tmp_path, 0)
    whole = (tmp_path / "l-40.bin").read_bytes()
    at = int(images.cache.ends[4]) + 11  # in image 5
    (tmp_path / "l-40.bin").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    images.use_cache(tmp_path, 0)
    images[4, 0]
    with pytest.raises(InputError, match="the pixels of 5 .jpg are not those that were written; delete .*l-40.json"):
        images[5, 0]
    for broken in (whole[:-1], whole + b"x"):
        (tmp_path / "l-40.bin").write_bytes(broken)
        with pytest.raises(InputError, match=rf"has {len(broken):,} bytes where {len(whole):,} were"):
            images.use_cache(tmp_path, 0)
    (tmp_path / "l-40.bin").write_bytes(whole)
    index = (tmp_path / "l-40.idx").read_bytes()
    (tmp_path / "l-40.idx").write_bytes(index[:-1] + b"\0")
    with pytest.raises(InputError, match="l-40.idx is not the index"):
        images.use_cache(tmp_path, 0)
    (tmp_path / "l-40.json").unlink()  # what the sentences say to do
    images.use_cache(tmp_path, 0)
    assert (tmp_path / "l-40.idx").read_bytes() == index and (tmp_path / "l-40.bin").read_bytes() == whole
    (tmp_path / "l-40.json").write_text("{")
    with pytest.raises(InputError, match="not the description of a cache"):
        images.use_cache(tmp_path, 0)


def test_cache_needs_room_and_a_folder(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: cache.shutil._ntuple_diskusage(10**6, 0, 50_000))
    with pytest.raises(InputError, match="take about .* GB more, but 5e-05 GB are free; name another"):
        images_of(photos).use_cache(tmp_path, 0)
    with pytest.raises(InputError, match="name a folder to write to"):
        images_of(photos).use_cache(photos / "x.png", 0)


def test_builders_take_turns(photos, tmp_path):
    """Two runs that start together: one builds, the other waits and reads."""
    start = [mp.get_context("fork").Process(target=images_of(photos).use_cache, args=(tmp_path / "c", 0)) for _ in "ab"]
    for process in start:
        process.start()
    for process in start:
        process.join()
    images_of(photos).use_cache(tmp_path / "one", 0)
    assert [process.exitcode for process in start] == [0, 0]
    assert (tmp_path / "c/l-40.bin").read_bytes() == (tmp_path / "one/l-40.bin").read_bytes()


# ---- broken files left out, and waiting for rank 0

@pytest.fixture
def some_broken(tmp_path):
    files = {f"{i}.jpg": encoded(photo(seed=i), "JPEG") for i in range(12)}
    return folder(tmp_path / "photos", {**files, "2.jpg": b"", "5.jpg": files["5.jpg"][:-20]})


def test_broken_images_are_left_out(some_broken, tmp_path, capsys):
    images, file = images_of(some_broken), tmp_path / "out/skipped.txt"
    assert images.leave_out_broken(file, False, 0) == 2
    printed = capsys.readouterr().out
    assert "2 files of l.txt do not open" in printed and "2.jpg\tUnidentifiedImageError: empty file" in printed and "5.jpg" in printed
    assert [line.split("\t")[0] for line in file.read_text().splitlines()] == ["2.jpg", "5.jpg"]
    kept = [i for i in range(12) if i not in (2, 5)]
    assert images.paths == [f"{i}.jpg" for i in kept] and images.labels.tolist() == [i % 2 for i in kept]
    assert torch.equal(images.image(2), images_of(some_broken).image(3))
    (some_broken / "9.jpg").unlink()
    again = images_of(some_broken)
    assert again.leave_out_broken(file, True, 0) == 2 and again.paths == images.paths  # as the run began
    with pytest.raises(InputError, match=r"9.jpg \(line 10 of"):
        again[7]
    for i in range(1, 12, 2):
        (some_broken / f"{i}.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="no image of class 1 opens"):
        images_of(some_broken).leave_out_broken(file, False, 0)


def test_run_that_leaves_out_broken_images_and_caches_the_others(script, some_broken, tmp_path, monkeypatch, capsys):
    run = ("--loss", "ce", "--dataset", "cifar10", "--data", some_broken, "--list", "l.txt", "--val", "none",
           "--batch", 5, "--workers", 0, "--arch", "resnet8", "--out", tmp_path / "run", "--aug", "sup")
    with pytest.raises(SystemExit, match=r"error: .*/[25].jpg \(line [36] of l.txt\)"):
        script(train_rep, *run, "--epochs", 1)
    script(train_rep, *run, "--epochs", 1, "--skip-broken")
    settings = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[0])["settings"]
    assert settings["skipped_sha256"] == data.sha256(tmp_path / "run/skipped.txt") and settings["short_side"] is None
    with pytest.raises(SystemExit, match="skipped_sha256"):  # without them it would be another run
        (some_broken / "2.jpg").write_bytes(JPEG)
        (some_broken / "5.jpg").write_bytes(JPEG)
        script(train_rep, *run, "--epochs", 1)
    capsys.readouterr()
    script(train_rep, *run, "--epochs", 1, "--skip-broken")
    assert "2 files" in capsys.readouterr().out  # read from skipped.txt, though they open by now
    with pytest.raises(SystemExit, match="short_side: None there, 32 here"):
        script(train_rep, *run, "--epochs", 1, "--skip-broken", "--cache", tmp_path / "cache")
    states = []
    for how in (("--short-side", 40), ("--short-side", 40, "--cache", tmp_path / "cache")):
        script(train_rep, *run, "--epochs", 2, "--skip-broken", "--restart", *how)
        states.append(torch.load(tmp_path / "run/backbone.pt", weights_only=True))
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())  # the cache changes no weight
    assert (tmp_path / "cache/l-40.json").exists()
    with pytest.raises(SystemExit, match="--short-side 16 must be at least the 32 px"):
        script(train_rep, *run, "--short-side", 16)


def one_of_two(rank, store, results):
    """A default group that gives up after a second, and work that takes longer."""
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2,
                            timeout=timedelta(seconds=1))
    ran = []

    def work():
        ran.append(rank)
        time.sleep(1.5)
        return ["done"]

    def fail():
        raise InputError("no room")
    got = [data.on_rank0(work), ran]
    try:
        data.on_rank0(fail)
    except InputError as error:
        got.append(str(error))
    results.put((rank, got))
    dist.destroy_process_group()


def test_ranks_wait_for_rank_0(tmp_path):
    """Longer than the default group's patience; its result and its error arrive everywhere."""
    context = mp.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=one_of_two, args=(r, str(tmp_path / "store"), results)) for r in (0, 1)]
    for process in ranks:
        process.start()
    got = dict(results.get(timeout=30) for _ in ranks)
    for process in ranks:
        process.join()
    assert got == {0: [["done"], [0], "no room"], 1: [["done"], [], "no room"]}


# ---- the in-memory loader against the transforms of single images

def test_uniforms_are_uniform_and_of_the_seed_alone():
    seed = torch.randint(2**32, (20_000,), generator=torch.Generator().manual_seed(0))
    for seeds in (seed, torch.arange(20_000)):  # neighbouring seeds too
        u = data.uniforms(seeds, 8)
        assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1
        even = torch.linspace(0, 1, 200_001, dtype=torch.float64)
        assert all(kolmogorov_smirnov(column, even) < 1.95 / math.sqrt(20_000) for column in u.T)  # p = 0.001
        assert (torch.corrcoef(u.T) - torch.eye(8)).abs().max() < 5 / math.sqrt(20_000)
        assert abs(torch.corrcoef(torch.stack([u[:-1, 0], u[1:, 0]]))[0, 1]) < 5 / math.sqrt(20_000)
    for some in (slice(5, 6), slice(100, 164)):  # whatever the batch, however many columns
        assert torch.equal(data.uniforms(seed[some], 3), data.uniforms(seed, 8)[some, :3])

    def splitmix(seed, column):  # with Python's whole numbers
        m = 2**64 - 1
        z = (seed * 2**20 + column) * 0x9E3779B97F4A7C15 & m
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & m
        z = (z ^ z >> 27) * 0x94D049BB133111EB & m
        return ((z ^ z >> 31) >> 11) / 2**53
    for s in (0, 1, 2**32 - 1):
        assert data.uniforms(torch.tensor([s]), 3)[0].tolist() == [splitmix(s, c) for c in (1, 2, 3)]


def kolmogorov_smirnov(a, b):
    """The largest distance of two empirical distributions."""
    both = torch.cat([a, b])
    below = [torch.searchsorted(x.sort().values, both, right=True) / len(x) for x in (a, b)]
    return (below[0] - below[1]).abs().max().item()


def test_batched_affine_is_the_transform_of_one_image(digits):
    """At the same angle, shift and scale: torchvision's map, to one level."""
    images = torch.stack([image for (image,), *_ in map(data.ImageList(digits, "val.txt", v2.Identity()).__getitem__,
                                                        range(0, 500, 10))])
    u = data.uniforms(torch.arange(50), 4)
    out = data.batched_affine(images, u)
    for image, (a, x, y, s), ours in zip(images, u.tolist(), out):
        theirs = v2.functional.affine(image, 15 * (2 * a - 1), [round(3.2 * (2 * x - 1)), round(3.2 * (2 * y - 1))],
                                      0.85 + 0.3 * s, [0.0, 0.0], v2.InterpolationMode.BILINEAR)
        assert (ours.int() - theirs.int()).abs().max() <= 1


def test_batched_affine_draws_as_the_transform():
    """The transform's own parameters, 4,000 of them, against those that the uniforms stand for."""
    step = [t for t in data.augmentation("affine", 32) if isinstance(t, v2.RandomAffine)][0]
    torch.manual_seed(0)
    drawn = [step.make_params([torch.zeros(3, 32, 32)]) for _ in range(4000)]
    u = data.uniforms(torch.arange(4000), 4)
    bound = 1.95 * math.sqrt(2 / 4000)  # p = 0.001
    for theirs, ours in (([p["angle"] for p in drawn], 15 * (2 * u[:, 0] - 1)),
                         ([p["translate"][0] for p in drawn], (3.2 * (2 * u[:, 1] - 1)).round()),
                         ([p["translate"][1] for p in drawn], (3.2 * (2 * u[:, 2] - 1)).round()),
                         ([p["scale"] for p in drawn], 0.85 + 0.3 * u[:, 3])):
        assert kolmogorov_smirnov(torch.tensor(theirs, dtype=torch.float64), ours) < bound


def test_batched_crop_flip_is_the_transform_of_one_image():
    """Literally: padded, cut at the offsets, mirrored; and all 9 x 9 x 2 of them equally often."""
    images = torch.randint(256, (50, 3, 32, 32), dtype=torch.uint8)
    u = data.uniforms(torch.arange(50), 3)
    for image, (y, x, flip), ours in zip(images, u.tolist(), data.batched_crop_flip(images, u)):
        theirs = v2.functional.crop(v2.functional.pad(image, 4), int(9 * y), int(9 * x), 32, 32)
        assert torch.equal(ours, theirs if flip < 0.5 else theirs.flip(-1))
    n, place = 16_200, torch.arange(1, 32 * 32 + 1).view(1, 1, 32, 32)  # each pixel another number
    u = data.uniforms(torch.arange(n), 3)
    corner = torch.cat([data.batched_crop_flip(place.expand(len(v), 3, 32, 32), v)[:, 0, 8, (8, 23)]
                        for v in u.split(900)])
    counts = torch.unique(corner, dim=0, return_counts=True)[1].double()
    assert len(counts) == 162 and ((counts - n / 162) ** 2 / (n / 162)).sum() < 161 + 4 * math.sqrt(2 * 161)


@pytest.mark.parametrize("aug", ["affine", "cifar"])
def test_in_memory_views_are_distributed_as_the_transforms(digits, tmp_path, aug):
    """The same mean and variance of the pixels, over all and at each place, within 5 standard errors."""
    (tmp_path / "few.txt").write_text("".join((digits / "val.txt").read_text().splitlines(keepends=True)[::63]))
    single = data.ImageList(digits, tmp_path / "few.txt", data.augmentation(aug, 32))
    memory = data.ImageList(digits, tmp_path / "few.txt", data.center(32, 32))
    n = len(single)
    loader = data.InMemory(memory, data.Draws(memory.labels, "instance", n), aug, 2, torch.device("cpu"))
    ours, theirs = [], []
    for epoch in range(100):
        loader.draws.set_epoch(epoch)
        (views, labels, index), = loader
        assert torch.equal(labels, memory.labels[index]) and not torch.equal(*views)
        ours += [view[index.argsort()] for view in views]
        theirs += [torch.stack([single[i, 2 * epoch + 1000 * k + i][0][0] for i in range(n)]) for k in (0, 1)]
    a, b = (torch.stack(x).double() for x in (ours, theirs))              # (200, n, 3, 32, 32)
    for moment in (lambda x: x, lambda x: (x - torch.cat([a, b]).mean(0)) ** 2):
        p, q = moment(a), moment(b)
        of_image = [x.mean((2, 3, 4)) for x in (p, q)]                    # (200, n): independent draws of each image
        z = (of_image[0].mean(0) - of_image[1].mean(0)) / (sum(x.var(0) for x in of_image) / 200).sqrt()
        assert z.abs().max() < 5
        error = ((p.var(0) + q.var(0)) / 200).sqrt() + 1e-9
        z = ((p.mean(0) - q.mean(0)) / error)[p.var(0) > 1]
        assert (z**2).mean() == pytest.approx(1, abs=0.15)                # of each pixel: chance, and nothing else
