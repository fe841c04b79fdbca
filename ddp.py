"""
One launcher, read from the environment: `python x.py` is a process group of size one,
`torchrun --nproc_per_node=N x.py` one of size N, and no other line asks which it is.
"""
import ctypes
import datetime
import gc
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist


class InputError(Exception):
    """Something that a user can get wrong. run() ends the script with its one sentence instead of a traceback."""


def init():
    """Start the process group; returns this process' torch.device: its own GPU, or the CPU where not each has one."""
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # how long a rank waits for the others in one collective; the longest wait is for rank 0's evaluation or checkpoint
    timeout = datetime.timedelta(seconds=float(os.environ.get("KCL_TIMEOUT", 1800)))
    if "RANK" in os.environ:
        # torchrun keeps its store over restarts: without a prefix the ranks find the addresses of those before
        store, rank_, world_ = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank_, world_size=world_, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if not cuda and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: glibc keeps what is freed. Given back, the kernel
            libc.mallopt(option, 2**31 - 1)  # would zero it again in each step, a fifth of a small step's time
    if torch.cuda.is_available() and not cuda:
        print0("fewer GPUs than processes: running on the CPU")
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args, **kwargs):
    """print, on rank 0 only."""
    if rank() == 0:
        print(*args, **kwargs, flush=True)


def wrap(module):
    """DistributedDataParallel around what gets gradients. BatchNorm buffers stay each rank's own (as on the authors'
    8 GPUs x 32); rank 0's are the ones that are saved."""
    net = torch.nn.parallel.DistributedDataParallel(module)
    net.broadcast_buffers = False  # the constructor argument has another name in each generation of torch
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

    x (b, ...); owner, place (world, n) int64 on the CPU, the same on all ranks: each knows what the others want, so
    that nothing travels but the rows. Returns (n, ...).
    """
    me, W = rank(), world()
    sent = x[torch.cat([place[r][owner[r] == me] for r in range(W)]).to(x.device, non_blocking=True)]
    if W == 1:
        return sent
    got = x.new_empty(owner.shape[1], *x.shape[1:])
    dist.all_to_all_single(got, sent.contiguous(), owner[me].bincount(minlength=W).tolist(),
                           (owner == me).sum(1).tolist())
    return got[owner[me].argsort(stable=True).argsort().to(x.device, non_blocking=True)]  # it arrived rank by rank


class GatherWithGradient(torch.autograd.Function):
    """gather() for a loss that every rank computes in full, on all embeddings. A rank's backward reaches its own share
    only; times world, since DDP takes the mean over ranks: together the whole gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.mine = slice(rank() * len(x), (rank() + 1) * len(x))
        return gather(x).clone()

    @staticmethod
    def backward(ctx, grad):
        return world() * grad[ctx.mine]


def waited_for(error):
    """The sentence for an error of gloo or NCCL about a rank that hangs or has died: who waited for it, and where."""
    reason = {"imed out": "longer than KCL_TIMEOUT seconds, 1800 by default",
              "onnection closed by peer": "that has ended", "onnection reset by peer": "that has ended"}
    for sign, why in reason.items():
        if sign in str(error):
            ours = [frame for frame in traceback.extract_tb(error.__traceback__)
                    if Path(torch.__file__).parent not in Path(frame.filename).parents and frame.filename != __file__]
            me, all_ranks = os.environ.get("RANK", 0), os.environ.get("WORLD_SIZE", 1)  # also before the group is there
            return (f"rank {me} of {all_ranks} waited for another rank in {Path(ours[-1].filename).name}, line "
                    f"{ours[-1].lineno} (`{ours[-1].line}`) {why}; see what the others say")
    return None


def run(main):
    """Call main() and leave the process group, whatever happens. Bad input ends with one sentence and exit code 1 (on
    several ranks torchrun adds its own report, and a rank that waits for the one that stopped may add its own)."""
    sentence = None
    try:
        main()
    except InputError as error:  # raised in a data worker it arrives with a traceback, the sentence in the last line
        sentence = str(error).strip().splitlines()[-1].removeprefix("ddp.InputError: ")
    except KeyboardInterrupt:
        sentence = "interrupted"
    except RuntimeError as error:
        sentence = waited_for(error)
        if not sentence:
            raise
    finally:
        gc.collect()  # a DDP wrapper that outlives its gloo group aborts at exit
        if dist.is_initialized():
            dist.destroy_process_group()
    if sentence:
        sys.exit(f"error: {sentence}")
