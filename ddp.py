"""
The process group: `python x.py` is a group of one process, `torchrun --nproc_per_node=N x.py` one of N ranks.

What one process does differently from eight, in train_rep.py with a batch of 256 photographs. Digits and CIFAR do not
take their batch in parts: on one process BatchNorm sees the whole of it, on eight an eighth.

                one process                                 eight processes
    data        all draws of an epoch                       every eighth draw of the same epoch
    seeds       per step and part: seed, step, part         per step and rank: the same numbers
    BatchNorm   8 parts of 32 images, one after another     32 images per rank
    statistics  running ones are those of the first part    of rank 0, whose images are the same
    shuffle     of the keys' images over the 8 parts        over the ranks, which exchange uint8 images
    gather      returns what it is given                    the keys and labels of all ranks, in rank order
    gradients   the parts add up; there is no DDP           DDP averages the ranks'
    run name    none of the two says how many               (digits, CIFAR: -8ranks, since it is another training)
"""
import atexit
import ctypes
import gc
import os
import sys
import traceback

import torch
import torch.distributed as dist

atexit.register(gc.freeze)  # Python's last look at every object of torch would take 1.4 s of each command


def init():
    """Start the process group. Returns this rank's device: a GPU of its own, or the CPU if the machine has none."""
    gpus, ranks_here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if 0 < gpus < ranks_here:
        sys.exit(f"error: {ranks_here} processes for {gpus} GPUs; use --nproc_per_node={gpus}, or "
                 "CUDA_VISIBLE_DEVICES= before the command, which then runs on the CPU")
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))

    if "RANK" in os.environ:
        # torchrun keeps its store over restarts; the prefix hides the addresses of the ranks that have ended
        store, rank_, world_ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank_, world_size=world_)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    if gpus:
        return torch.device("cuda", torch.cuda.current_device())
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc keeps freed memory (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD): zeroing new pages takes a fifth of a small step
        libc.mallopt(-1, 2**31 - 1)
        libc.mallopt(-3, 2**31 - 1)
    return torch.device("cpu")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args):
    """print, on rank 0 only."""
    if rank() == 0:
        print(*args, flush=True)


def of_all_ranks(x):
    """[x of rank 0, x of rank 1, ...], for any x that pickles."""
    everyone = [x] * world()
    if world() > 1:
        dist.all_gather_object(everyone, x)
    return everyone


def wrap(module):
    """DistributedDataParallel around what gets gradients, if there are several ranks. BatchNorm's buffers stay each
    rank's own, as on the authors' 8 GPUs x 32 images; rank 0's are saved."""
    if world() == 1:
        return module
    # gradients are views of DDP's buckets, or it would copy each of them twice per step
    net = torch.nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    net.broadcast_buffers = False  # the constructor's argument has another name in each generation of torch
    return net


@torch.no_grad()
def gather(x):
    """(n, ...) of each rank, n the same on all -> (world * n, ...) in rank order; no gradient."""
    if world() == 1:
        return x
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(out, x.contiguous())
    return torch.cat(out)


@torch.no_grad()
def exchange(x, owner, place):
    """All-to-all: row n of the result is row place[r, n] of rank owner[r, n]'s x, on each rank r.

    x (b, ...); owner, place (world, n) int64 on the CPU, the same on all ranks. Returns (n, ...).
    """
    me, W = rank(), world()
    wanted = torch.cat([place[r][owner[r] == me] for r in range(W)])      # this rank's rows, by who wants them
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
        # One of several ranks says why it ends, and ends at once: to leave the group it would wait
        # for the others (NCCL), which wait for it. torchrun ends them.
        stopped = isinstance(error, SystemExit)
        if world() > 1 and not (stopped and not error.code):
            print(error.code if stopped else traceback.format_exc(), file=sys.stderr, flush=True)
            os._exit(1)
        raise
    finally:
        if world() > 1:
            gc.collect()  # a DDP wrapper that outlives its gloo group aborts at exit
        if dist.is_initialized():
            dist.destroy_process_group()
