"""
What a training step costs in time and memory. Most rows are ratios, because these carry over between machines, and some
have a goal.

    python tools/bench.py                       # prints all rows as a Markdown table, three minutes on a CPU
    python tools/bench.py --only loss memory    # prints some of them
    python tools/bench.py > bench.md            # on a GPU it also measures samples/s and memory of a step

For a row "A / B" the two are timed in turn, A B A B ..., and the result is the median of the n ratios. Time is the CPU
time of one thread, or on a GPU the time between CUDA events. Memory is the peak of what torch allocates. If
pytorch-metric-learning and lightly are installed, there are rows that compare with them.
"""
import argparse
import gc
import importlib.util
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms.v2.functional import adjust_hue

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import augment
import data
import ddp
from kcl import kcl_loss
from kcl_fast import fast_kcl_loss
from moco import MoCo, freeze_bn_statistics
from resnet import ARCHS
from train_linear import linear_heads

# The loss alone takes N queries and K keys of d numbers. A step takes `images` images of `pixels` px through `arch`; on
# a CPU 256 images would take a minute.
CPU = dict(N=256, K=65536, d=128, arch="resnet50", images=16, pixels=160)
GPU = dict(CPU, images=256, pixels=224)
QUICK = dict(N=8, K=16384, d=16, arch="resnet8", images=4, pixels=32)


# ---- measuring

def seconds(f, device):
    if device.type == "cpu":
        begin = time.process_time()
        f()
        return time.process_time() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    f()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def in_turn(a, n, *functions, device=None):
    """Time the functions in turn for n rounds. Returns the n times in seconds of each function."""
    for f in functions * 2:
        f()
    gc.collect()
    gc.disable()
    rounds = [[seconds(f, device or a.device) for f in functions] for _ in range(2 if a.quick else n)]
    gc.enable()
    return list(zip(*rounds))


def peak_memory(f, device):
    """The MiB that f() allocates at its peak, on top of what was allocated before."""
    f()  # run it once, so that memory which it allocates once and keeps does not count
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        f()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    changes = [(e["ts"], i, e["args"]["Bytes"]) for i, e in enumerate(events) if e["name"] == "[memory]"]
    return max(np.cumsum([0, *(change for _, _, change in sorted(changes))])) / 2**20


def row(what, value, unit="", goal=None, source="", n=1):
    """A line of the table. The measurement is bold if it misses its goal."""
    mark = "**" if goal and value > goal else ""
    measured = f"{mark}{value:.3g}{mark} {unit}".strip()
    return f"| {what} | {measured} | {goal or ''} | {source} | {n} |"


def ratio(what, A, B, goal=None, more=""):
    source = f"{1000 * statistics.median(A):.4g} / {1000 * statistics.median(B):.4g} ms"
    return row(what, statistics.median(x / y for x, y in zip(A, B)), "", goal, source + more, len(A))


# ---- the loss

def loss_inputs(a, K, C=1000):
    """q, k (N, d), queue (K, d), labels (N,), queue_labels (K,): noisy unit vectors around one centre per class."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(C, a.d, generator=g)
    labels, queue_labels = (torch.randint(C, (n,), generator=g) for n in (a.N, K))
    vectors = [F.normalize(centres[y] + torch.randn(len(y), a.d, generator=g)) for y in (labels, labels, queue_labels)]
    return [x.to(a.device) for x in (*vectors, labels, queue_labels)]


def with_gradient(loss, q, *inputs, **settings):
    """A function that computes the loss and its gradient."""
    return lambda: loss(q.detach().requires_grad_(), *inputs, **settings).backward()


def two_matmuls(a):
    """A lower bound for the loss: compute q @ queue.T, skip the softmax, multiply by queue, and allocate nothing."""
    chunk = 1024 if a.device.type == "cpu" else a.K  # the faster choice on each device
    q, _, queue, _, _ = loss_inputs(a, a.K)
    logits, out = q.new_empty(a.N, min(chunk, a.K)), torch.empty_like(q)

    def floor():
        out.zero_()
        for keys in queue.split(chunk):
            out.addmm_(torch.mm(q, keys.T, out=logits[:, :len(keys)]), keys)
    return floor


def loss_row(a):
    fast, plain = (with_gradient(loss, *loss_inputs(a, a.K)) for loss in (fast_kcl_loss, kcl_loss))
    floor, fast, plain = in_turn(a, 15, two_matmuls(a), fast, plain)
    yield ratio(f"fast_kcl_loss with its gradient / its two matmuls, N={a.N} K={a.K} d={a.d}", fast, floor, 1.10)
    yield ratio("kcl_loss with its gradient / these matmuls", plain, floor)


def memory_row(a):
    for loss, goal in ((fast_kcl_loss, 5), (kcl_loss, None)):
        peak = peak_memory(with_gradient(loss, *loss_inputs(a, a.K)), a.device)
        yield row(f"peak memory of {loss.__name__} with its gradient, beyond the inputs", peak, "MiB", goal,
                  f"N x K fp32 = {a.N * a.K / 2**18:.3g} MiB")


def metric_learning(queue, queue_labels, N):
    """FCL. CrossBatchMemory stores the batch's keys before it computes the loss, so it needs N more slots."""
    from pytorch_metric_learning.losses import CrossBatchMemory, SupConLoss
    memory = CrossBatchMemory(SupConLoss(temperature=0.07), queue.shape[1], N + len(queue))
    memory.embedding_memory = torch.cat([queue[:N], queue])
    memory.label_memory = torch.cat([queue_labels[:N], queue_labels])
    memory.has_been_filled = True
    is_key = torch.arange(2 * N, device=queue.device) >= N
    return lambda q, k, labels: memory(torch.cat([q, k]), labels.repeat(2), enqueue_mask=is_key)


def lightly(queue, queue_labels, N):
    """CL."""
    from lightly.loss import NTXentLoss
    loss = NTXentLoss(temperature=0.07, memory_bank_size=tuple(queue.shape))
    loss.memory_bank.bank = queue.clone()
    return lambda q, k, labels: loss(q, k)


def others_row(a, K=16384):
    q, k, queue, labels, queue_labels = loss_inputs(a, K)
    for package, name, num_positives, make in (("pytorch_metric_learning", "FCL", None, metric_learning),
                                               ("lightly", "CL", 0, lightly)):
        if importlib.util.find_spec(package) is None:
            continue
        one_q, one_k, doubles = q[:1].double(), k[:1].double(), queue.double()
        ours = kcl_loss(one_q, one_k, doubles, labels[:1], queue_labels, num_positives).item()
        theirs = make(doubles, queue_labels, 1)(one_q, one_k, labels[:1]).item()
        if abs(theirs / ours - 1) > 1e-6:  # with more queries, theirs would also see the keys of the other queries
            sys.exit(f"error: {package} computes a different loss, {theirs} instead of {ours}; try another version")

        functions = [with_gradient(loss, q, k, queue, labels, queue_labels, num_positives=num_positives)
                     for loss in (fast_kcl_loss, kcl_loss)]
        functions.append(with_gradient(make(queue, queue_labels, a.N), q, k, labels))
        times = in_turn(a, 9, *functions)
        peaks = [peak_memory(f, a.device) for f in functions]
        for i, ours in enumerate(("fast_kcl_loss", "kcl_loss")):
            yield ratio(f"{name}: {ours} / {package}, N={a.N} K={K} d={a.d}", times[i], times[2],
                        more=f"; memory {peaks[i]:.3g} / {peaks[2]:.3g} MiB")


# ---- a step

def kcl_step(a, amp=False, compiled=False, parts=1):
    """A step of train_rep.py, beginning with uint8 images, with the same calls in the same order."""
    autocast = torch.autocast(a.device.type, torch.bfloat16, enabled=amp)
    moco = MoCo(ARCHS[a.arch], a.d, a.K, parts=parts).to(a.device, memory_format=torch.channels_last)
    moco.queue_labels.random_(1000)
    if compiled:
        moco.encoder_q.compile()
        moco.encoder_k.compile()
    net = ddp.wrap(moco.encoder_q)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    views, labels = random_batch(a)

    def step():
        moco.update_key_encoder()
        with autocast:
            keys, key_labels = moco.keys(views[1], labels, to_input)
        optimizer.zero_grad()
        for j in range(parts):
            if parts > 1:
                freeze_bn_statistics(net, j > 0)
            with autocast:
                z = net(to_input(views[0][j::parts])).float()
            k, y = moco.local_keys(keys, j), labels[j::parts]
            (kcl_loss(F.normalize(z), k, moco.queue, y, moco.queue_labels) / parts).backward()
        optimizer.step()
        moco.enqueue(keys, key_labels)
    return step


def ce_step(a):
    net = ddp.wrap(ARCHS[a.arch](num_classes=1000).to(a.device, memory_format=torch.channels_last))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    views, labels = random_batch(a)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(net(to_input(views[0])), labels).backward()
        optimizer.step()
    return step


def random_batch(a):
    views = torch.randint(256, (2, a.images, 3, a.pixels, a.pixels), dtype=torch.uint8, device=a.device)
    return views, torch.randint(1000, (a.images,), device=a.device)


def to_input(images):
    return data.normalize(images, data.IMAGENET_MEAN, data.IMAGENET_STD, images.device)


def momentum_row(a):
    moco, other = (MoCo(ARCHS[a.arch], a.d, 1).to(a.device) for _ in range(2))

    def loop():
        for p, p_key in zip(other.encoder_q.parameters(), other.encoder_k.parameters()):
            p_key.data = p_key.data * other.m + p.data * (1 - other.m)

    update, loop = in_turn(a, 15, moco.update_key_encoder, loop)
    yield ratio(f"update of the key encoder / MoCo's loop over its parameters, {a.arch}", update, loop, 0.40)


def step_row(a):
    kcl, ce = in_turn(a, 5, kcl_step(a), ce_step(a))
    yield ratio(f"KCL step / CE step, {a.arch}, {a.images} x {a.pixels} px, fp32", kcl, ce, 1.40)


def input_row(a):
    count, pixels, rng = 8, 32 if a.quick else 224, np.random.default_rng(0)
    to_view = T.Compose([T.RandomResizedCrop(pixels), T.RandomHorizontalFlip(), T.ToTensor(),
                         T.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)])
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):  # shapes and grain make JPEGs of 100 kB, like ImageNet's
            shapes, grain = (Image.fromarray(rng.integers(256, size=size, dtype=np.uint8)).resize((500, 375))
                             for size in ((24, 32, 3), (375, 500, 3)))
            Image.blend(shapes, grain, 0.1).save(f"{folder}/{i}.jpg", quality=95)
        Path(folder, "list.txt").write_text("".join(f"{i}.jpg 0\n" for i in range(count)))
        spec = {"pixels": pixels, "resize": pixels}
        lists = [data.ImageList(folder, "list.txt", spec, aug, num_views=2) for aug in ("sup", "moco")]

        def load(images):
            for i in range(count):
                images[i, i]

        def pil():
            for i in range(count):
                image = Image.open(f"{folder}/{i}.jpg").convert("RGB")
                to_view(image), to_view(image)

        functions = [partial(load, images) for images in lists] + [pil]
        sup, moco, pil = in_turn(a, 15, *functions, device=torch.device("cpu"))
    yield ratio(f"{count} samples of two crops from JPEGs / PIL and torchvision's transforms, CPU", sup, pil, 0.55)
    yield ratio("samples of CL, with colour jitter / of KCL, crops and flips, CPU", moco, sup)


def hue_row(a):
    pixels = 32 if a.quick else 224
    view = torch.randint(256, (3, pixels, pixels), dtype=torch.uint8)
    functions = partial(augment.adjust_hue, view, 0.2), partial(adjust_hue, view, 0.2)
    ours, torchvisions = in_turn(a, 99, *functions, device=torch.device("cpu"))
    yield ratio(f"hue of a view of {pixels} px / torchvision's adjust_hue, CPU", ours, torchvisions, 0.33)


def probe_row(a):
    backbone = ARCHS[a.arch]()
    D, backbone.fc = backbone.fc.in_features, nn.Identity()
    backbone.to(a.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    views, labels = random_batch(a)

    def probe(M):
        heads = linear_heads(M, D, 1000).to(a.device)
        optimizer = torch.optim.SGD(heads.parameters(), 0.1, momentum=0.9, fused=True)

        def step():
            losses = [F.cross_entropy(logits, labels) for logits in heads(backbone(to_input(views[0])))]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
        return step

    eight, one = in_turn(a, 7, probe(8), probe(1))
    yield ratio(f"probe with 8 learning rates / with one, {a.arch}, {a.images} x {a.pixels} px", eight, one, 1.15)


def gpu_row(a, steps=5):
    if a.device.type == "cpu":
        return
    for parts, compiled in ((8, False), (8, True), (1, False), (1, True)):    # train_rep.py computes 8 x 32 by default
        step = kcl_step(a, amp=True, compiled=compiled, parts=parts)
        times, = in_turn(a, 5, lambda step=step: [step() for _ in range(steps)])
        torch.cuda.reset_peak_memory_stats()
        step()
        what = f"KCL step, {a.arch}, {parts} x {a.images // parts} x {a.pixels} px, bf16{', compiled' * compiled}"
        yield row(what, steps * a.images / statistics.median(times), "samples/s", n=len(times))
        yield row("its peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")


ROWS = {"loss": loss_row, "memory": memory_row, "others": others_row, "momentum": momentum_row, "step": step_row,
        "input": input_row, "hue": hue_row, "probe": probe_row, "gpu": gpu_row}


def hardware(device):
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"model name\s*: (.*)", info) or [platform.machine()]
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    return f"{gpu}; {os.cpu_count()} cores of {names[0]}, {torch.backends.cpu.get_cpu_capability()}, one thread"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=tuple(ROWS), default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    p.add_argument("--images", type=int, help="images per step; default: 16, on a GPU 256; fewer if they do not fit")
    p.add_argument("--quick", action="store_true", help="tiny sizes and n = 2, only to see that it runs")
    args = p.parse_args()

    device = ddp.init()  # on a CPU this also makes glibc keep freed memory
    torch.set_num_threads(1)
    a = argparse.Namespace(**(QUICK if args.quick else GPU if device.type == "cuda" else CPU))
    a.device, a.quick, a.images = device, args.quick, args.images or a.images

    began = time.time()
    print(f"{hardware(device)}; torch {torch.__version__}; {time.strftime('%Y-%m-%d')}")
    print("\n| what | measured | goal | from | n |\n|---|---|---|---|---|", flush=True)
    for name in args.only:
        torch.manual_seed(0)
        for line in ROWS[name](a):
            print(line, flush=True)
        gc.collect()
    print(f"\n{time.time() - began:.0f} s")


if __name__ == "__main__":
    ddp.run(main)
