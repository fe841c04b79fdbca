"""
What a step costs, in time and memory, as ratios of two figures taken side by side, and the goals they are held to.

    python bench.py                              # every row, under 5 minutes on 2 cores: a Markdown table
    python bench.py --only S1 S2                 # some of them
    python bench.py --json results/bench.json    # the same figures once more, for programs

Absolute times do not carry over between machines, ratios nearly do. So what is compared runs in turn, A B A B ..., in
one process, after a warm-up, without garbage collection; a row is the median and the quartiles of the n ratios A / B,
and the medians of A and of B. Time is the CPU time of all threads, on a GPU that of CUDA events. Memory is measured:
the largest running sum of what torch's profiler saw allocated and freed, on a GPU that of the caching allocator. "The
authors'" is what their code does, operation by operation, written down anew.
"""
import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision import transforms as T

import data
import ddp
import make_lt
from ddp import InputError
from kcl import choose_positives, choose_slots, fast_kcl_loss, kcl_loss
from moco import MoCo
from resnet import ARCHS
from train_linear import linear_heads

# N queries, K keys, d: the loss alone. arch, images, pixels: whole steps, small on a CPU, to which 256 images of 224 px
# are a minute or two; the ratio of two steps is that of large ones while convolutions outweigh the weights' traffic.
# n: scale of the number of rounds, 0 = two.
CPU = dict(N=256, K=65536, d=128, arch="resnet50", images=16, pixels=160, n=1)
GPU = dict(CPU, images=256, pixels=224)
QUICK = dict(N=8, K=16384, d=16, arch="resnet8", images=4, pixels=32, n=0)


# ---- measuring

def seconds(f, device):
    if device.type != "cuda":
        begin = time.process_time()
        f()
        return time.process_time() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    f()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def in_turn(n, device, *functions):
    """n rounds (0: two) of each function in turn -> for each its n seconds."""
    for f in (*functions, *functions):
        f()
    gc.collect()
    gc.disable()
    rounds = [[seconds(f, device) for f in functions] for _ in range(n or 2)]
    gc.enable()
    return [list(times) for times in zip(*rounds)]


def peak_memory(f, device):
    """Bytes that f() holds at its peak beyond what was there before."""
    f()  # what is allocated once and kept does not count
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        f()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], i, e["args"]["Bytes"]) for i, e in enumerate(events) if e["name"] == "[memory]")
    return int(max(np.cumsum([0, *(bytes for _, _, bytes in changes)])))  # below 0 where memory is freed


class Watch(TorchDispatchMode):
    """While active, counts by operator: waits, what would wait for a GPU as its value or shape is needed; large, new
    tensors of `size` elements or more; copies, where what was drawn from a generator of its own on the CPU (the plan of
    the shuffle, which is on the CPU on every device) meets the device. Only a GPU can say which copies wait.
    """
    WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim",
             "unique_consecutive", "bincount"}

    def __init__(self, size):
        super().__init__()
        self.size, self.waits, self.large, self.copies, self.plan = size, Counter(), Counter(), Counter(), {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs, where = kwargs or {}, torch.Tensor.untyped_storage
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        old, name = {where(x).data_ptr() for x in given}, operator.overloadpacket.__name__
        result = operator(*args, **kwargs)
        new = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if given and old <= self.plan.keys() or kwargs.get("generator") is not None:
            self.plan |= {where(x).data_ptr(): x for x in new}  # the tensor too, or its place might be taken again
            return result
        by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in given[1:])
        self.waits[name] += name in self.WAITS or by_mask
        self.copies[name] += bool(old & self.plan.keys())
        self.large[name] += sum(where(x).nbytes() >= x.numel() >= self.size and where(x).data_ptr() not in old
                                for x in new)
        return result


def keep_freed_memory(keep):
    """As ddp.init() sets glibc; or as glibc is by itself, whose thresholds grow up to these."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, size in ((-1, 2**26), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(option, 2**31 - 1 if keep else size)


# ---- what is measured

def authors_mask(labels, queue_labels, num_positives=6):
    """Their positives as fp32 0 and 1, (N, K): the same slots each time, as topk happens to break a 0/1 mask's ties."""
    N, K = len(labels), len(queue_labels)
    same = (queue_labels.clone().expand(N, K) == labels.expand(K, N).T).float()
    place = same.topk(num_positives, dim=1).indices
    return same * torch.zeros(N, K).to(labels.device).scatter_(1, place, 1.0)


def authors_loss(q, k, queue, labels, queue_labels, num_positives=6, temperature=0.07):
    """Their loss, with a queue (d, K): all logits, and a target for each, as matrices of N x (1 + K)."""
    own = torch.einsum("nd,nd->n", q, k)[:, None]                         # (N, 1)
    others = torch.einsum("nd,dk->nk", q, queue.clone())                  # (N, K)
    mask = authors_mask(labels, queue_labels, num_positives)
    target = torch.cat([torch.ones(len(q), 1).to(q.device), mask], dim=1)
    target = target / target.sum(1, keepdim=True)
    logits = torch.cat([own, others], dim=1)
    logits /= temperature
    return (-logits.log_softmax(1) * target).sum() / len(q)


def exact(q, k, queue, mask, temperature=0.07):
    """Loss and gradient in float64, the positives in a mask (N, K)."""
    q, k, queue = q.double().requires_grad_(), k.double(), queue.double()
    log_p = (torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature).log_softmax(1)
    mask = torch.cat([mask.new_ones(len(q), 1), mask], dim=1).double()
    loss = -((log_p * mask).sum(1) / mask.sum(1)).mean()
    return loss.detach(), *torch.autograd.grad(loss, q)


def loss_inputs(a, C=1000, seed=0):
    """q, k (N, d), queue (K, d), labels (N,), queue_labels (K,): noisy unit vectors round a centre for each class."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(C, a.d, generator=g)
    labels, queue_labels = (torch.randint(C, (n,), generator=g) for n in (a.N, a.K))
    rows = (F.normalize(centres[y] + torch.randn(len(y), a.d, generator=g)) for y in (labels, labels, queue_labels))
    return [x.to(a.device) for x in (*rows, labels, queue_labels)]


def losses(a):
    """name -> a function that computes the loss and its gradient, all on one input."""
    q, k, queue, *labels = loss_inputs(a)

    def both(loss, queue):
        loss(q.detach().requires_grad_(), k, queue, *labels).backward()

    return {"fast_kcl_loss": partial(both, fast_kcl_loss, queue), "kcl_loss": partial(both, kcl_loss, queue),
            "the authors' loss": partial(both, authors_loss, queue.T.contiguous())}


def two_matmuls(a, chunk=None):
    """The floor: q queue^T, and that (in the place of its softmax) times queue; nothing allocated. On a CPU in chunks
    that its cache holds, on a GPU at once: the faster way on each, the other one has a row."""
    chunk = chunk or (a.K if a.device.type == "cuda" else 1024)
    q, _, queue, _, _ = loss_inputs(a)
    logits, out = q.new_empty(a.N, min(chunk, a.K)), torch.empty_like(q)

    def floor():
        out.zero_()
        for keys in queue.split(chunk):
            out.addmm_(torch.mm(q, keys.T, out=logits[:, :len(keys)]), keys)
    return floor


class Step:
    """A step of train_rep.py from uint8 images on, its calls in its order: with KCL, or with CE on 1000 classes."""

    def __init__(self, a, kcl=True, amp=False, layout=torch.channels_last, compiled=False):
        self.layout, self.amp = layout, torch.autocast(a.device.type, torch.bfloat16, enabled=amp)
        self.moco = MoCo(ARCHS[a.arch], a.d, a.K) if kcl else None
        model = (self.moco or ARCHS[a.arch](num_classes=1000)).to(a.device, memory_format=layout)
        for e in ((model.encoder_q, model.encoder_k) if kcl else (model,)) if compiled else ():
            e.compile()
        self.net = ddp.wrap(model.encoder_q if kcl else model)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, fused=True)
        self.views = torch.randint(256, (2, a.images, 3, a.pixels, a.pixels), dtype=torch.uint8, device=a.device)
        self.labels, labels = (torch.randint(1000, (n,), device=a.device) for n in (a.images, a.K))
        if kcl:
            model.queue_labels.copy_(labels)

    def to_input(self, view):
        x = data.normalize(view, data.IMAGENET_MEAN, data.IMAGENET_STD, view.device)
        return x.contiguous(memory_format=self.layout)

    def __call__(self):
        if self.moco:
            self.moco.update_key_encoder()
            with self.amp:
                keys, key_labels = self.moco.keys(self.views[1], self.labels, self.to_input)
        self.optimizer.zero_grad()
        with self.amp:
            z = self.net(self.to_input(self.views[0])).float()
        if self.moco:
            loss = fast_kcl_loss(F.normalize(z), self.moco.own(keys), self.moco.queue, self.labels,
                                 self.moco.queue_labels)
        else:
            loss = F.cross_entropy(z, self.labels)
        loss.backward()
        self.optimizer.step()
        if self.moco:
            self.moco.enqueue(keys, key_labels)


# ---- the rows

def row(what, value=None, goal=None, figures="", n=None, quartiles=None, unit="", sign="<=", needs=None):
    """A line of the table. figures: what the value comes from; needs: what is missing where there is no value."""
    met = None if value is None or goal is None else bool(value <= goal if sign == "<=" else value >= goal)
    return dict(what=what, value=value, unit=unit, sign=sign, goal=goal, met=met, figures=figures, n=n,
                quartiles=quartiles, needs=needs)


def ratio(what, A, B, goal=None, sign="<="):
    low, middle, high = np.quantile(np.array(A) / B, (0.25, 0.5, 0.75)).tolist()
    figures = f"{1000 * statistics.median(A):.4g} / {1000 * statistics.median(B):.4g} ms"
    return row(what, middle, goal, figures, len(A), [low, high], "", sign)


def s1(a):
    compared, floor = losses(a), two_matmuls(a)
    if a.device.type == "cpu":  # first: what glibc has kept once, it does not give back
        keep_freed_memory(False)
        base, *times = in_turn(5 * a.n, a.device, floor, *compared.values())
        for name, each in zip(compared, times):
            yield ratio(f"{name} over the two matmuls, glibc giving freed memory back", each, base)
        keep_freed_memory(True)
    base, *times, other = in_turn(15 * a.n, a.device, floor, *compared.values(), two_matmuls(
        a, 1024 if a.device.type == "cuda" else a.K))
    for name, each in zip(compared, times):
        yield ratio(f"{name} with choice and gradient over the two matmuls, N={a.N} K={a.K} d={a.d}", each, base,
                    1.10 if name == "fast_kcl_loss" else None)
    yield ratio(f"these matmuls {'in chunks of 1024' if a.device.type == 'cuda' else 'at once'} over them", other, base)


def s2(a):
    for name, f in losses(a).items():
        peak = peak_memory(f, a.device) / 2**20
        yield row(f"peak extra memory of {name} with its gradient", peak, 5.0 if name == "fast_kcl_loss" else None,
                  f"{peak:.4g} MiB; N x K fp32 = {a.N * a.K / 2**18:.4g}", 1, unit="MiB")


def s3(a):
    *_, y, queue_y = loss_inputs(a)
    *_, y_many, queue_y_many = loss_inputs(a, C=8142)
    base, ours, authors = in_turn(15 * a.n, a.device, two_matmuls(a), partial(choose_slots, y, queue_y),
                                  partial(authors_mask, y, queue_y))
    yield ratio("choice of the positives over the two matmuls", ours, base, 0.02)
    yield ratio("the authors' choice over the two matmuls", authors, base)
    yield ratio("choice with 8142 classes over 1000", *in_turn(60 * a.n, a.device, partial(
        choose_slots, y_many, queue_y_many), partial(choose_slots, y, queue_y)), 1.1)


def s4(a):
    errors = {}
    for seed in range(3 * a.n or 2):
        q, k, queue, *labels = loss_inputs(a, seed=seed)
        torch.manual_seed(seed)
        slots, taken = choose_slots(*labels)
        drawn = torch.zeros(a.N, a.K + 1, dtype=torch.bool, device=a.device).scatter_(1, slots.where(taken, a.K), True)
        torch.manual_seed(seed)
        for name, loss, keys, mask in (("fast_kcl_loss", fast_kcl_loss, queue, drawn[:, :-1]),
                                       ("kcl_loss", kcl_loss, queue, choose_positives(*labels)),
                                       ("the authors' loss", authors_loss, queue.T, authors_mask(*labels))):
            torch.manual_seed(seed)  # the draws of the mask
            x = q.clone().requires_grad_()
            value = loss(x, k, keys, *labels)
            value.backward()
            true, gradient = exact(q, k, queue, mask)
            errors.setdefault(name, []).append((abs(value.item() / true.item() - 1),
                                                ((x.grad - gradient).norm() / gradient.norm()).item()))
    for name, each in errors.items():
        of_loss, of_gradient = map(max, zip(*each))
        yield row(f"error of {name} and its gradient against float64, relative, the largest", max(of_loss, of_gradient),
                  1e-6 if name == "fast_kcl_loss" else None, f"{of_loss:.1e}; {of_gradient:.1e}", len(each))


def s5(a):
    moco, copies = (MoCo(ARCHS[a.arch], a.d, 1).to(a.device) for _ in range(2))

    def loop():
        for p, p_key in zip(copies.encoder_q.parameters(), copies.encoder_k.parameters()):
            p_key.data = p_key.data * copies.m + p.data * (1 - copies.m)

    def sgd(model, **how):
        for p in model.encoder_q.parameters():
            p.grad = torch.full_like(p, 1e-4)
        return torch.optim.SGD(model.encoder_q.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, **how).step

    yield ratio(f"update_key_encoder over a loop that rebinds .data, {a.arch}",
                *in_turn(15 * a.n, a.device, moco.update_key_encoder, loop), 0.40)
    yield ratio("SGD(fused=True) over SGD(foreach=True)",
                *in_turn(15 * a.n, a.device, sgd(moco, fused=True), sgd(copies, foreach=True)))


def s6(a):
    yield ratio(f"KCL step over CE step, {a.arch}, {a.images} x {a.pixels} px, fp32, channels_last",
                *in_turn(5 * a.n, a.device, Step(a), Step(a, kcl=False)), 1.40)


def s7(a):
    what = f"KCL step, {a.arch}, {a.images} x {a.pixels} px: fp32 NCHW over bf16 autocast and channels_last"
    units = any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile"))
    if units or a.device.type == "cuda" or a.quick:
        yield ratio(what, *in_turn(5 * a.n, a.device, Step(a, layout=torch.contiguous_format), Step(a, amp=True)), 2.5,
                    ">=")
    else:
        yield row(what, goal=2.5, sign=">=", needs="a CPU with bf16 units, or a GPU")


def s8(a):
    # ResNet-8 on small images: no activation, gradient or weight of it reaches N x K elements
    small = argparse.Namespace(**{**vars(a), "arch": "resnet8", "images": a.N, "pixels": 8 if a.quick else 32})
    step, (q, k, queue, *labels), pointer = Step(small), loss_inputs(a), torch.zeros(1, dtype=torch.long)

    def authors():
        loss = authors_loss(q.clone().requires_grad_(), k, queue.T, *labels)
        loss.backward()
        return int(pointer), loss.item()  # of their queue, of their log

    for f, what, goal in (step, "a KCL step", 0), (authors, "the authors' loss, queue pointer and log", None):
        f()
        with Watch(a.N * a.K) as watch:
            f()
        waits = watch.waits.total()
        if a.device.type == "cuda":
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                f()
                torch.cuda.set_sync_debug_mode("default")
            waits = sum("called a synchronizing" in str(w.message) for w in caught)
        found = ", ".join(f"{name} {n}" for name, n in (watch.waits + watch.large).items() if n)
        yield row(f"device waits and N x K tensors made in {what}", waits + watch.large.total(), goal,
                  f"{waits} waits, {watch.large.total()} tensors, {watch.copies.total()} copies to the device" +
                  f" ({found})" * bool(found), 1)


def photograph(file, width, seed):
    """A JPEG with about a photograph's spectrum: noise of every scale, the coarser the stronger."""
    rng, image = np.random.default_rng(seed), 0
    for scale in (2, 4, 8, 16, 32):
        small = (width * 3 // 4 // scale + 1, width // scale + 1, 3)
        noise = Image.fromarray(rng.integers(256, size=small, dtype=np.uint8))
        image = image + scale**0.5 * np.asarray(noise.resize((width, width * 3 // 4), Image.Resampling.BICUBIC), float)
    image = (115 + 55 * (image - image.mean()) / image.std()).clip(0, 255).astype(np.uint8)
    Image.fromarray(image).save(file, quality=95)


def s9(a):
    count, pixels, cpu = 8, 32 if a.quick else 224, torch.device("cpu")
    to_views = T.Compose([T.RandomResizedCrop(pixels), T.RandomHorizontalFlip(), T.ToTensor(),
                          T.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)])
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            photograph(f"{folder}/{i}.jpg", 60 if a.quick else 500, i)
        kB = sum(file.stat().st_size for file in Path(folder).iterdir()) / count / 1000
        Path(folder, "list.txt").write_text("".join(f"{i}.jpg 0\n" for i in range(count)))

        def pil():
            for i in range(count):
                image = Image.open(f"{folder}/{i}.jpg").convert("RGB")
                to_views(image), to_views(image)

        def ours(images):
            for i in range(count):
                images[i, i]

        image_list = partial(data.ImageList, folder, "list.txt", data.augmentation("sup", pixels), num_views=2)
        yield ratio(f"{count} samples of two crops from JPEGs of {kB:.0f} kB over PIL's path to fp32, CPU time",
                    *in_turn(9 * a.n, cpu, partial(ours, image_list()), pil), 0.55)
        cached = image_list(short_side=256)
        cached.use_cache(f"{folder}/cache", workers=0)
        yield ratio("the same from the cache of decoded images, short side 256",
                    *in_turn(9 * a.n, cpu, partial(ours, cached), pil), 0.28)


def s10(a):
    W, b, pixels, received, steps = 8, 32, 224, [], 5
    if a.quick:
        b, pixels = 4, 32

    def all_to_all(out, sent, from_each, to_each):
        received.append(sum(from_each[1:]) * out[:1].nbytes)              # rank 0's own do not travel
        out.zero_()

    def all_gather(out, x):
        received.append((len(out) - 1) * x.nbytes)
        for o in out:
            o.copy_(x)

    moco = MoCo(lambda num_classes: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes)),
                a.d, 1)
    images, labels = torch.zeros(b, 3, pixels, pixels, dtype=torch.uint8), torch.zeros(b, dtype=torch.long)
    with mock.patch.multiple(ddp.dist, all_to_all_single=all_to_all, all_gather=all_gather), \
            mock.patch.object(ddp, "world", lambda: W):  # as rank 0 of W, the collectives replaced by counters
        for _ in range(steps):
            moco.keys(images, labels, torch.Tensor.float)
    ours = sum(received) / steps
    # what a rank of the authors' receives; in MB with ResNet-50, 224 px, K = 65536, d = 128:
    authors = ((W - 1) * b * 3 * pixels**2 * 4                            # 134.9  images of all ranks, gathered, fp32
               + 2 * (W - 1) * b * a.d * 4                                #   0.2  keys, to unshuffle and to enqueue
               + (W - 1) * b * 8 + W * b * 8                              #   0.0  labels; the permutation
               + a.K * (a.d * 4 + 8) + 8                                  #  34.1  DDP broadcasts queue, labels, pointer
               + 2 * sum(x.nbytes for x in ARCHS[a.arch]().buffers()))    #   0.4  and both encoders' BatchNorm
    yield row(f"bytes that a rank receives a step, gradients aside, W={W}, {b} x {pixels} px a rank, over the authors'",
              ours / authors, 0.03, f"{ours / 1e6:.4g} MB counted / {authors / 1e6:.4g} MB on paper", steps)


def s11(a):
    backbone = ARCHS[a.arch]()
    D, backbone.fc = backbone.fc.in_features, nn.Identity()
    backbone = backbone.to(a.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    x = torch.randn(a.images, 3, a.pixels, a.pixels, device=a.device).to(memory_format=torch.channels_last)
    y = torch.randint(1000, (a.images,), device=a.device)

    def probe(M):
        heads = linear_heads(M, D, 1000).to(a.device)
        optimizer = torch.optim.SGD([{"params": head.parameters()} for head in heads], 0.1, momentum=0.9, fused=True)

        def step():  # of train_linear.py
            with torch.no_grad():
                features = backbone(x)
            losses = torch.stack([F.cross_entropy(logits, y) for logits in heads(features)])
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
        return step

    yield ratio(f"step of a probe with 8 learning rates over one with 1, {a.arch}, {a.images} x {a.pixels} px",
                *in_turn(7 * a.n, a.device, probe(8), probe(1)), 1.15)


def s12(a):
    """train_rep.py itself, 4 steps of 16 digits as four virtual GPUs, on 1, 2 and 4 processes: their checkpoints."""
    what = "one global batch as 1 x 4, 2 x 2, 4 x 1 processes x parts: weights, momentum, queue, BatchNorm, largest gap"
    if a.quick:
        yield row(what, goal=1e-5, needs="a run without --quick")
        return
    found, scripts = [], Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        make_lt.make_digits(Path(folder, "digits"))
        lines = Path(folder, "digits/train_lt0.txt").read_text().splitlines(keepends=True)[::13]
        Path(folder, "list.txt").write_text("".join(lines))
        for world in (1, 2, 4):
            subprocess.run([
                sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", scripts / "train_rep.py",
                *f"--dataset digits --data {folder}/digits --list {folder}/list.txt --batch 16 --queue 50 --epochs 1 "
                f"--virtual-gpus 4 --out {folder}/{world}".split()], check=True, capture_output=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
            ckpt = torch.load(f"{folder}/{world}/ckpt.pt", weights_only=True)
            momentum = [x["momentum_buffer"] for x in ckpt["optimizer"]["state"].values()]
            found.append([x.double() for x in (*ckpt["model"].values(), *momentum) if isinstance(x, torch.Tensor)])
    gaps = [max((x - y).abs().max().item() for x, y in zip(found[0], other)) for other in found[1:]]
    yield row(what, max(gaps), 1e-5, f"{gaps[0]:.1e}, {gaps[1]:.1e} on values up to "
              f"{max(x.abs().max().item() for x in found[0]):.3g}", 2)


def parts(a):
    """What a part of a step takes by itself over the whole; on a GPU also the step's rate and peak memory."""
    cuda = a.device.type == "cuda"
    for amp, compiled in ((True, False), (True, True)) if cuda else ((False, False),):
        how = f"KCL step, {a.arch}, {a.images} x {a.pixels} px" + ", bf16" * amp + ", compiled" * compiled
        step = Step(a, amp=amp, compiled=compiled)
        moco, q = step.moco, F.normalize(torch.randn(a.images, a.d, device=a.device))
        owner, place = torch.zeros(1, a.images, dtype=torch.long), torch.randperm(a.images)[None]
        alone = {"loss": lambda: fast_kcl_loss(q.requires_grad_(), q, moco.queue, step.labels,
                                               moco.queue_labels).backward(),
                 "input": lambda: [step.to_input(view) for view in step.views],
                 "momentum update": moco.update_key_encoder,
                 "communication (one process: the shuffle's copy)": lambda: (
                     ddp.exchange(step.views[1], owner, place), ddp.gather(q))}
        base, *times = in_turn(5 * a.n, a.device, step, *alone.values())
        for name, part in zip(alone, times):
            yield ratio(f"{name} over the {how}", part, base)
        if cuda:
            yield row(f"samples/s, {how}", a.images / statistics.median(base), None, "", len(base))
            yield row(f"memory at the peak beyond what stays, {how}", peak_memory(step, a.device) / 2**30, None, "", 1,
                      unit="GiB")
    if not cuda:
        yield row("samples/s and peak memory of a KCL step in bf16, compiled", needs="a GPU")


ROWS = dict(S1=s1, S2=s2, S3=s3, S4=s4, S5=s5, S6=s6, S7=s7, S8=s8, S9=s9, S10=s10, S11=s11, S12=s12, parts=parts)


# ---- the table

def number(x):
    return f"{x:.1e}" if 0 < abs(x) < 1e-3 else f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def line(r):
    """A row as a line of the Markdown table."""
    value = f"needs {r['needs']}" if r["needs"] else f"{number(r['value'])} {r['unit']}".strip()
    goal = "" if r["goal"] is None else f"{r['sign']} {r['goal']:g} {r['unit']}".strip()
    met = {True: "yes", False: "**no**", None: ""}[r["met"]]
    spread = " - ".join(number(x) for x in r["quartiles"] or ())
    return f"| {r['id']} | {r['what']} | {value} | {goal} | {met} | {r['figures']} | {r['n'] or ''} | {spread} |"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=tuple(ROWS), default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    p.add_argument("--json", help="write the figures to this file too")
    p.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    p.add_argument("--images", type=int, help="in a whole step: 16, on a GPU 256; fewer where they do not fit")
    p.add_argument("--quick", action="store_true", help="tiny sizes, n = 2: whether it runs; the figures mean nothing")
    device = ddp.init()
    args = p.parse_args()
    if args.threads < 1 or args.images is not None and args.images < 2:
        raise InputError("expected --threads of 1 or more and --images of 2 or more")
    if args.json and not Path(args.json).parent.is_dir():
        raise InputError(f"{args.json}: there is no folder {Path(args.json).parent}; make it, or name another file")
    a = argparse.Namespace(**(QUICK if args.quick else GPU if device.type == "cuda" else CPU), device=device,
                           quick=args.quick)
    a.images = args.images or a.images
    torch.set_num_threads(args.threads)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [x.split(":")[1].strip() for x in info.splitlines() if x.startswith("model name")] or [platform.machine()]
    head = {"torch": torch.__version__, "threads": args.threads, "cpu": names[0], "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None, "date": time.strftime("%Y-%m-%d"),
            "clock": "CUDA events" if device.type == "cuda" else "CPU seconds", "quick": args.quick}
    if args.quick:
        print("Tiny sizes, n = 2: these figures mean nothing.\n")
    print(f"torch {head['torch']}, {head['threads']} thread(s), {head['cores']} cores of {head['cpu']}, GPU: "
          f"{head['gpu']}, {head['date']}; {head['clock']}; freed memory is kept (ddp.init) where a row does not say "
          "otherwise.\n")
    print("| | what | measured | goal | met | from | n | quartiles |\n|---|---|---|---|---|---|---|---|", flush=True)
    rows, began = [], time.time()
    for name in (name for name in ROWS if name in args.only):
        torch.manual_seed(0)
        for r in ROWS[name](a):
            rows.append({"id": name, **r})
            print(line(rows[-1]), flush=True)
        gc.collect()
    print(f"\n{time.time() - began:.0f} s")
    if args.json:
        Path(args.json).write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    ddp.run(main)
