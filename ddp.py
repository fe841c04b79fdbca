"""
The process group: `python x.py` starts one process, `torchrun --nproc_per_node=N x.py` starts N, called ranks.

The table compares one process with eight in train_rep.py, for a batch of 256 photographs. Training depends on how many
images BatchNorm sees, so by default one process splits the batch into 8 parts of 32 (--virtual-gpus 1 keeps it whole).
--batch and --lr are for all processes together. Rank 0 writes the files.

                one process                                 eight processes
    data        takes all draws of an epoch                 each takes every eighth draw of the same epoch
    seeds       one per step and part                       one per step and rank, the same numbers
    BatchNorm   sees 8 parts of 32 images in turn           sees 32 images per rank
    statistics  the first part updates the running ones     rank 0 saves its own, of the same images
    shuffle     the keys' images move between the 8 parts   they move between ranks, as uint8
    gather      returns its input                           returns keys and labels of all ranks, in rank order
    gradients   are averaged over the parts, without DDP    DDP averages them over the ranks
    run name    the same                                    the same

The batch is not split for digits, CIFAR and the losses that need it whole (--loss supcon, kcl-batch, bbn). BatchNorm
then sees all images on one process and an eighth of them on eight. This trains differently, so the name of a run on
eight ends in -8ranks. Parts, seeds and gradients are in the loop `for j in range(parts)` of train_rep.main.
"""
import atexit
import ctypes
import gc
import os
import sys
import traceback

import torch
import torch.distributed as dist

atexit.register(gc.freeze)  # garbage collection at exit would take 1.4 s of each command


def init():
    """Start the process group. Returns this rank's device: a GPU of its own, or the CPU if the machine has none."""
    gpus, ranks_here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if 0 < gpus < ranks_here:
        sys.exit(f"error: {ranks_here} processes for {gpus} GPUs; use --nproc_per_node={gpus}, or "
                 "put CUDA_VISIBLE_DEVICES= before the command to run it on the CPU")
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))

    if "RANK" in os.environ:
        # torchrun keeps its store across restarts; the prefix hides the addresses of ranks that have ended
        store, rank_, world_ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank_, world_size=world_)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    if gpus:
        return torch.device("cuda", torch.cuda.current_device())
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD make glibc keep freed memory. Otherwise zeroing new pages takes a fifth
        # of a small step
        libc.mallopt(-1, 2**31 - 1)
        libc.mallopt(-3, 2**31 - 1)
    return torch.device("cpu")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args):
    """Print, on rank 0 only."""
    if rank() == 0:
        print(*args, flush=True)


def of_all_ranks(x):
    """[x of rank 0, x of rank 1, ...], for any x that pickles."""
    everyone = [x] * world()
    if world() > 1:
        dist.all_gather_object(everyone, x)
    return everyone


def wrap(module):
    """Wrap a module that gets gradients in DistributedDataParallel if there are several ranks. Each rank keeps its own
    BatchNorm statistics, as on the authors' 8 GPUs with 32 images each. Those of rank 0 are saved."""
    if world() == 1:
        return module
    # gradients become views of DDP's buckets; otherwise DDP copies each of them twice per step
    net = torch.nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    net.broadcast_buffers = False  # the constructor's argument was renamed in torch 2.14
    return net


@torch.no_grad()
def gather(x):
    """Concatenate x (n, ...) of all ranks to (world * n, ...), in rank order, without gradient. n must be the same on
    all ranks."""
    if world() == 1:
        return x
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(out, x.contiguous())
    return torch.cat(out)


@torch.no_grad()
def exchange(x, owner, place):
    """All-to-all: rank r receives, as row n, the row x[place[r, n]] of rank owner[r, n].

    x (b, ...); owner, place (world, n) int64 on the CPU, the same on all ranks. Returns (n, ...).
    """
    me, W = rank(), world()
    wanted = torch.cat([place[r][owner[r] == me] for r in range(W)])      # the rows to send, rank by rank
    sent = x[wanted.to(x.device, non_blocking=True)]
    if W == 1:
        return sent

    got = x.new_empty(owner.shape[1], *x.shape[1:])
    from_each = owner[me].bincount(minlength=W).tolist()
    to_each = (owner == me).sum(1).tolist()
    dist.all_to_all_single(got, sent.contiguous(), from_each, to_each)
    arrived = owner[me].argsort(stable=True)                              # the rows arrive rank by rank
    return got[arrived.argsort().to(x.device, non_blocking=True)]


def run(main):
    """Call main() and leave the process group, however it ends."""
    try:
        main()
    except BaseException as error:
        # With several ranks, a rank that fails prints why and exits at once. To leave the group it would
        # wait for the others (NCCL), while they wait for it. torchrun ends them.
        stopped = isinstance(error, SystemExit)
        if world() > 1 and not (stopped and not error.code):
            if not (stopped and isinstance(error.code, int)):  # argparse has printed why
                print(error.code if stopped else traceback.format_exc(), file=sys.stderr, flush=True)
            os._exit(1)
        raise
    finally:
        if world() > 1:
            gc.collect()  # a DDP wrapper that outlives its gloo group aborts at exit
        if dist.is_initialized():
            dist.destroy_process_group()
