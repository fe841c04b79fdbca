"""
The images of a list, decoded once: `--cache DIR` of train_rep.py reads them at a quarter of the cost of JPEG.

Of a list NAME and a short side of S px there lie in DIR
    NAME-S.bin     the pixels, image after image: uint8 (H, W, 3), scaled down to the short side, as ImageList.image
    NAME-S.idx     a row an image: its height, width and the CRC-32 of its pixels, uint32
    NAME-S.json    the folder, paths and short side that they are of; once complete, also the sizes of the two
A photograph of 4:3 takes 256 * 341 * 3 = 262 kB: ImageNet-LT (115,846 images) 30 GB, iNaturalist 2018 (437,513) 115 GB,
ImageNet (1,281,167) 336 GB, against 110 kB or so an ImageNet JPEG. Where DIR's disk does not deliver batch after batch
of that, and memory does not hold it, decoding may be faster.

A build that is cut off goes on after its last whole block. Another list, folder or short side is built anew. Every
image is checked when it is read. An image file that is replaced under its old name is not noticed: delete NAME-S.json.
"""
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ddp import InputError

BLOCK = 1024  # images that a build writes between two safe points: 0.3 GB


class Pixels(Dataset):
    """Item i of an ImageList as the cache stores it: uint8 (H, W, 3), CRC-32."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        pixels = self.images.image(i).permute(1, 2, 0).contiguous()       # (H, W, 3)
        return pixels, zlib.crc32(pixels.numpy())


class Cache:
    """cache[i] is images.image(i), for an ImageList, without decoding: build() on one process, then open() on each."""

    def __init__(self, folder, images):
        self.folder, self.images = Path(folder), images
        name = Path(images.name).with_suffix("").as_posix().lstrip("./").replace("/", "-")
        self.bin, self.idx, self.json = (self.folder / f"{name}-{images.short_side or 'whole'}.{ending}"
                                         for ending in ("bin", "idx", "json"))
        self.of = {"data": str(images.root.resolve()), "short_side": images.short_side, "images": len(images),
                   "paths_sha256": hashlib.sha256("\n".join(images.paths).encode()).hexdigest()}
        self.pixels = None

    def found(self):
        """What NAME-S.json says; {} where it is not there."""
        try:
            return json.loads(self.json.read_text()) if self.json.exists() else {}
        except ValueError:
            raise InputError(f"{self.json} is not the description of a cache; delete it, and the cache is built "
                             "anew") from None

    def describe(self, **more):
        self.json.with_suffix(".tmp").write_text(json.dumps({**self.of, **more}, indent=1))
        os.replace(self.json.with_suffix(".tmp"), self.json)

    def build(self, workers):
        """Build what is missing. Raises InputError where an image does not decode or the disk is too small."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.json.with_suffix(".lock"), "w")
        except OSError as error:
            raise InputError(f"--cache {self.folder}: {error.strerror}; name a folder to write to") from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two runs that start together the second waits
            found = self.found()
            differ = [f"{name}: {found.get(name)} there, {value} here" for name, value in self.of.items()
                      if found.get(name) != value]
            if found and differ:
                print(f"{self.json} is of other images ({differ[0]}); building the cache anew", flush=True)
            if differ:
                for file in (self.json, self.bin, self.idx):
                    file.unlink(missing_ok=True)  # a run that still reads them keeps what it has open
                self.describe()
            if "bytes" not in found or differ:
                self.append(workers)
                self.describe(bytes=self.bin.stat().st_size, index_sha256=self.sha256_of_index())

    def append(self, workers):
        """Write the images that are not yet in the two files."""
        self.bin.touch()
        self.idx.touch()
        rows, ends = self.read_index()
        start = int(np.searchsorted(ends, self.bin.stat().st_size, side="right"))  # images that are there whole
        os.truncate(self.idx, start * 12)
        os.truncate(self.bin, ends[start - 1] if start else 0)
        N = len(self.images)
        sample = range(start, N, max(1, (N - start) // 64))
        need = 1.05 * (N - start) * np.mean([self.images.image(i).numel() for i in sample] or 0)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise InputError(f"--cache {self.folder}: the images of {self.images.name} take about {need / 1e9:.3g} GB "
                             f"more, but {free / 1e9:.3g} GB are free; name another folder, or a smaller --short-side")
        loader = DataLoader(Pixels(self.images), batch_size=None, sampler=range(start, N), num_workers=workers)
        with open(self.bin, "ab") as pixels, open(self.idx, "ab") as index:
            rows = []
            for i, (image, crc) in enumerate(tqdm(loader, desc=f"caching {self.images.name}", unit="image",
                                                  initial=start, total=N), start + 1):
                pixels.write(image.numpy())
                rows.append((*image.shape[:2], crc))
                if len(rows) == BLOCK or i == N:
                    pixels.flush()
                    os.fsync(pixels.fileno())  # a row is written after its pixels, also where the power fails
                    index.write(np.array(rows, "<u4").tobytes())
                    index.flush()
                    rows.clear()

    def sha256_of_index(self):
        return hashlib.sha256(self.idx.read_bytes()).hexdigest()

    def read_index(self):
        """Rows of (height, width, CRC-32), (n, 3) int64, and where each image ends in NAME-S.bin, (n,) bytes."""
        rows = np.fromfile(self.idx, "<u4")
        rows = rows[:len(rows) // 3 * 3].reshape(-1, 3).astype(np.int64)
        return rows, np.cumsum(rows[:, 0] * rows[:, 1] * 3)

    def open(self):
        """Make sure that the files are whole, and of these images; returns self. Raises InputError."""
        found = self.found()
        if "bytes" not in found or any(found.get(name) != value for name, value in self.of.items()):
            raise InputError(f"{self.json} is not a complete cache of these images on this machine; --cache must be "
                             "one folder for all ranks")
        size = self.bin.stat().st_size if self.bin.exists() else 0
        if size != found["bytes"]:  # a memory map that is shorter than it should be would kill the process
            raise InputError(f"{self.bin} has {size:,} bytes where {found['bytes']:,} were written; delete "
                             f"{self.json}, and the cache is built anew")
        if not self.idx.exists() or self.sha256_of_index() != found["index_sha256"]:
            raise InputError(f"{self.idx} is not the index that was written; delete {self.json}, and the cache is "
                             "built anew")
        self.rows, self.ends = self.read_index()
        return self

    def __getitem__(self, i):
        """uint8 (3, H, W). Raises InputError where the pixels are not those that were written."""
        if self.pixels is None:  # each worker maps the file for itself
            self.pixels = np.memmap(self.bin, np.uint8, "r")
        (H, W, crc), end = self.rows[i].tolist(), int(self.ends[i])
        # copied (20 us): without, the map would have to be writable, and Linux refuses that beyond memory
        pixels = np.array(self.pixels[end - H * W * 3:end])
        if zlib.crc32(pixels) != crc:
            raise InputError(f"{self.bin}: the pixels of {self.images.paths[i]} are not those that were written; "
                             f"delete {self.json}, and the cache is built anew")
        return torch.from_numpy(pixels.reshape(H, W, 3)).permute(2, 0, 1)

    def __getstate__(self):
        return {**self.__dict__, "pixels": None}  # a memory map would be pickled with all of its bytes
