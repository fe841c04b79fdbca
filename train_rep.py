"""
Stage 1: train a representation with KCL, or with what it is compared with: CE, CL (MoCo), FCL, and baselines.py.

    python train_rep.py --loss kcl                                  # embedded digits, CPU or one GPU, about a minute
    torchrun --nproc_per_node=2 train_rep.py --loss kcl             # the same on two processes
    torchrun --nproc_per_node=8 train_rep.py --loss kcl --data /path/to/imagenet --list ImageNet_LT_train.txt

Writes to --out: backbone.pt (a plain state_dict in torchvision's names, no fc), for losses on logits (CE, Focal, LDAM,
BBN) also head.pt, which evaluate.py reads, ckpt.pt (everything to resume: the same command goes on where it stopped)
and log.jsonl (first line: command, settings, versions; then a line every --log-every steps; --tensorboard draws it).
What comes next: train_linear.py.
"""
import argparse
import collections
import contextlib
import importlib.util
import itertools
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

import baselines
import checkpoint
import data
import ddp
import make_lt
from baselines import CONTRASTIVE, SUPERVISED
from checkpoint import Stop, need_tensorboard, open_log, save
from ddp import InputError
from kcl import fast_kcl_loss
from moco import MoCo, keep_statistics, with_head
from reading import read_json
from resnet import ARCHS, load_backbone

# The hyper-parameters by kind of data set and loss: the paper's Table 7 for photographs (batch 256 = 8 GPUs x 32,
# BatchNorm sees 32 images), Cao et al. 2019 for CIFAR-LT, and scaled down for the digits. A flag wins.
SETTINGS = {
    "photos": dict(arch="resnet50", batch=256, queue=65536, m=0.999, weight_decay=5e-4, save_every=1,
                   workers=min(8, os.cpu_count())),
    "cifar": dict(arch="resnet32", batch=128, queue=4096, m=0.99, weight_decay=2e-4, save_every=5,
                  workers=min(8, os.cpu_count())),
    "digits": dict(arch="resnet8", batch=64, queue=512, m=0.99, weight_decay=5e-4, workers=0, save_every=5),
}
BY_LOSS = {  # "": all others
    "photos": {"supervised": dict(lr=0.1, schedule="cosine", epochs=90, aug="sup"),
               "cl": dict(lr=0.03, schedule="step", epochs=200, aug="moco"),
               "": dict(lr=0.1, schedule="cosine", epochs=200, aug="sup")},
    "cifar": {"cl": dict(lr=0.03, schedule="cosine", epochs=200, aug="moco"),
              "": dict(lr=0.1, schedule="cosine", epochs=200, aug="cifar")},
    "digits": {"cl": dict(lr=0.1, schedule="cosine", epochs=80, aug="affine"),  # chosen on val: results/findings.md
               "": dict(lr=0.3, schedule="cosine", epochs=80, aug="affine")},
}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # method
    p.add_argument("--loss", choices=(*SUPERVISED, *CONTRASTIVE), default="kcl",
                   help="fcl: all same-class keys of the queue; supcon: FCL inside the batch, as Khosla et al.")
    p.add_argument("--num-positives", type=int, help="k of KCL, TSC; 6, the paper's choice on ImageNet-LT's val")
    p.add_argument("--temperature", type=float, default=0.07, help="T of the contrastive softmax")
    p.add_argument("--fixed-divisor", action="store_true", help="KCL: divide by k + 1 also where fewer are found")
    p.add_argument("--drop-unused", action="store_true", help="KCL: keys of the class not drawn leave the denominator")
    p.add_argument("--first-k", action="store_true", help="KCL: the k lowest slots of the class, not random ones")
    p.add_argument("--queue", type=int, help="K, keys in the queue: 65536, CIFAR 4096, digits 512")
    p.add_argument("--m", type=float, help="momentum of the key encoder: 0.999; CIFAR, digits 0.99")
    p.add_argument("--dim", type=int, default=128, help="d, size of the embedding")
    p.add_argument("--mlp", action="store_true", help="MoCo v2's two-layer head in place of the linear one")
    p.add_argument("--no-fill", action="store_true", help="start from a random queue without labels, as MoCo")
    p.add_argument("--drw", action="store_true", help="CE, LDAM: re-weight classes in the last 20 %% of the epochs")
    p.add_argument("--init", help="backbone.pt to start from: with --loss ce on a CL backbone this is SSP")
    # data
    p.add_argument("--dataset", choices=tuple(data.DATASETS),
                   help="default: what make_lt.py made of --data, else imagenet; without --data digits")
    p.add_argument("--data", help="the folder that the list's paths start from")
    p.add_argument("--list", help="training list, `path label` a line; looked up as given, then in --data")
    p.add_argument("--val", help="validation list, by default from the folder of --list: no image of it may be in "
                   "--list; `none` if there is none")
    p.add_argument("--sampler", choices=("instance", "class", "sqrt", "progressive"), default="instance")
    p.add_argument("--aug", choices=tuple(data.AUGMENTATIONS), help="sup, cl moco; CIFAR cifar; digits affine")
    p.add_argument("--workers", type=int, help="data workers of each rank: 8 or the cores; by default digits and CIFAR "
                   "need none, they lie in the device's memory and are augmented there, a batch at a time")
    p.add_argument("--check", action="store_true", help="open every image of --list and --val before the first step")
    p.add_argument("--skip-broken", action="store_true", help="open every image of --list before the first step; those "
                   "that do not open are left out and stand in OUT/skipped.txt")
    p.add_argument("--short-side", type=int, help="px that larger images are scaled down to before the crops; default: "
                   "none, as the paper; with --cache 256")
    p.add_argument("--cache", help="folder for the decoded images of --list at --short-side, about 30 GB for "
                   "ImageNet-LT; built by the first run, read by the next ones")
    # optimisation
    p.add_argument("--arch", choices=tuple(ARCHS), help="resnet50, CIFAR resnet32, digits resnet8")
    p.add_argument("--epochs", type=int, help="losses on logits 90, others 200; CIFAR 200; digits 80")
    p.add_argument("--batch", type=int, help="images a step over all ranks together: 256, CIFAR 128, digits 64")
    p.add_argument("--lr", type=float, help="for the whole --batch, not rescaled: 0.1, cl 0.03; digits "
                   "0.3, cl 0.1")
    p.add_argument("--schedule", choices=("cosine", "step"), help="per epoch; step = x0.1 at 60 %% and 80 %%")
    p.add_argument("--weight-decay", type=float, help="5e-4 (the paper takes 1e-4 on full ImageNet), CIFAR 2e-4")
    p.add_argument("--seed", type=int, default=0)
    # speed and memory
    p.add_argument("--virtual-gpus", type=int, metavar="V", help="do what V ranks would: each rank takes its batch in "
                   "V / ranks parts, one by one, and BatchNorm sees one part; 8 on one GPU is the paper's 8 x 32")
    p.add_argument("--amp", action="store_true", help="encoders in bfloat16, weights, keys and loss in float32")
    p.add_argument("--compile", action="store_true", help="torch.compile the encoders; pays with few images a GPU")
    # the run
    p.add_argument("--out", help="default: runs/<folder of --data>-<list>-<loss>[-drw][-init][-<sampler>]-seed<n>"
                   "[-<n>ranks]")
    p.add_argument("--log-every", type=int, default=10, help="steps between log lines; only then is the loss read")
    p.add_argument("--tensorboard", action="store_true", help="the log also as scalars, in OUT/tensorboard")
    p.add_argument("--save-every", type=int, help="epochs between checkpoints: 1; CIFAR, digits 5")
    p.add_argument("--restart", action="store_true", help="throw away what --out holds; else it goes on from there")
    p.add_argument("--override", action="store_true", help="go on with other settings than the run in --out began with")
    p.add_argument("--skip-nonfinite", type=int, default=0, metavar="N", help="leave out up to N steps whose gradient "
                   "is not finite, in place of stopping at the first")
    args = p.parse_args()

    if args.tensorboard:
        need_tensorboard()
    if args.dataset is None:  # make_lt.py knows
        made = Path(args.data or "") / "splits.json"
        args.dataset = "digits" if args.data is None else "imagenet"
        if args.data is not None and made.is_file():
            table = read_json(made, expected := "the table that make_lt.py writes; or say --dataset")
            args.dataset = table.get("dataset") if isinstance(table, dict) else None
            if not isinstance(args.dataset, str) or args.dataset not in data.DATASETS:
                raise InputError(f"{made}: names no data set; expected {expected}")
    spec = data.DATASETS[args.dataset]
    args.data = args.data or spec["root"]
    if args.data is None:
        raise InputError(f"--dataset {args.dataset} needs --data, the folder that the list's paths start from")
    args.data = str(Path(args.data))  # without a last slash
    args.list = args.list or spec["train"]
    args.val = args.val or data.beside(args.data, args.list, spec["val"])
    if args.loss in ("kcl", "tsc") and args.num_positives is None:
        args.num_positives = 6
    by_loss = BY_LOSS[spec["kind"]]
    by_loss = by_loss.get("supervised" if args.loss in SUPERVISED else args.loss, by_loss[""])
    args.in_memory = args.workers is None and spec["kind"] != "photos" and (args.aug or by_loss["aug"]) in data.BATCHED
    for name, value in {**SETTINGS[spec["kind"]], **by_loss}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.cache and args.short_side is None:
        args.short_side = spec["resize"]
    if args.short_side is not None and args.short_side < spec["pixels"]:
        raise InputError(f"--short-side {args.short_side} must be at least the {spec['pixels']} px of a crop")
    for name in ("temperature", "queue", "dim", "epochs", "batch", "lr", "log_every", "save_every"):
        if getattr(args, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} must be above 0")
    if args.num_positives is not None and (args.loss not in ("kcl", "tsc") or args.num_positives < 0):
        raise InputError("--num-positives, 0 or more, goes with --loss kcl and tsc; cl takes none, fcl all")
    if args.drw and args.loss not in ("ce", "ldam"):
        raise InputError("--drw goes with --loss ce and ldam")
    if args.init and args.loss == "bbn":
        raise InputError("--init does not go with --loss bbn, whose backbone has two branches")
    if args.init and not Path(args.init).is_file():
        raise InputError(f"--init {args.init}: no such file; expected a backbone.pt, which train_rep.py writes")
    if args.loss == "tsc" and importlib.util.find_spec("scipy") is None:
        raise InputError("--loss tsc assigns its targets with scipy: pip install scipy")
    if (args.fixed_divisor or args.drop_unused or args.first_k) and args.loss != "kcl":
        raise InputError("--fixed-divisor, --drop-unused and --first-k go with --loss kcl")
    args.virtual_gpus = args.virtual_gpus or ddp.world()
    if args.virtual_gpus % ddp.world() or args.batch % args.virtual_gpus:
        raise InputError(f"--virtual-gpus {args.virtual_gpus} must be a multiple of the {ddp.world()} ranks and divide "
                         f"--batch {args.batch}")
    if args.virtual_gpus > ddp.world() and args.loss in ("supcon", "tsc", "bbn"):
        raise InputError(f"--virtual-gpus takes a batch in parts, but --loss {args.loss} needs it whole")
    if args.workers < 0 or args.weight_decay < 0:
        raise InputError("--workers and --weight-decay must be 0 or more")
    how = args.loss + "-drw" * args.drw + "-init" * bool(args.init)
    how += "" if args.sampler == "instance" else f"-{args.sampler}"
    list_name = Path(args.list).with_suffix("").as_posix().strip("/").replace("/", "-").replace("train_", "")
    ranks = "" if args.virtual_gpus == 1 else f"-{args.virtual_gpus}ranks"  # other batches for BatchNorm: another run
    args.out = Path(args.out or f"runs/{Path(args.data).name}-{list_name}-{how}-seed{args.seed}{ranks}")
    return args


def learning_rate(base, schedule, t):
    """At t = epoch / epochs; cosine reaches 0 after the last epoch, step is MoCo's 120 and 160 of 200."""
    return base * (0.5 * (1 + math.cos(math.pi * t)) if schedule == "cosine" else 0.1 ** ((t >= 0.6) + (t >= 0.8)))


def header(args):
    """What a later reader needs to repeat the run: the first line of log.jsonl."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, check=True,
                             capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        git = None  # no git, or a copy without its history
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    settings |= {"world": ddp.world(), "list_sha256": data.sha256(data.find_list(args.data, args.list)),
                 "init_sha256": data.sha256(args.init) if args.init else None}
    return {"command": " ".join(["train_rep.py", *sys.argv[1:]]), "settings": settings,
            "torch": torch.__version__, "torchvision": torchvision.__version__, "python": sys.version.split()[0],
            "git": git, "time": time.strftime("%Y-%m-%d %H:%M:%S")}


def main():
    device = ddp.init()
    args = parse_args()
    spec = data.DATASETS[args.dataset]

    # data
    if args.data == data.DATASETS["digits"]["root"]:
        if ddp.rank() == 0 and not Path(args.data).exists():
            print(f"composing the embedded digits in {args.data}")
            make_lt.make_digits(args.data)
        torch.distributed.barrier()
    num_views = 2 if args.loss in CONTRASTIVE else 1
    if args.in_memory:
        dataset = data.ImageList(args.data, args.list, data.center(spec["pixels"], spec["resize"]))
        loader_of = partial(data.InMemory, dataset, aug=args.aug, num_views=num_views, device=device)
    else:
        augmentation = data.augmentation(args.aug, spec["pixels"])
        dataset = data.ImageList(args.data, args.list, augmentation, num_views, args.short_side)
        loader_of = partial(data.train_loader, dataset, workers=args.workers)
    if args.val != "none":
        data.refuse_overlap(args.data, args.list, args.val)
    if args.check:
        if faults := data.on_rank0(lambda: make_lt.check(args.data, {args.list, args.val} - {"none"}, args.workers)):
            raise InputError(f"{faults:,} faults in {args.list} or {args.val}, listed above")
    skipped = args.out / "skipped.txt"
    resume = not args.restart and any((args.out / name).exists() for name in checkpoint.FILES)
    none_skipped = not args.skip_broken or not dataset.leave_out_broken(skipped, resume, args.workers)
    if args.cache:
        dataset.use_cache(args.cache, args.workers)
    draws = data.Draws(dataset.labels, args.sampler, args.batch, args.epochs, args.seed)
    loader = loader_of(draws)
    counts = data.class_counts(dataset.labels)
    C = len(counts)
    if args.loss == "bbn":  # a second stream, for its second branch
        reversed_draws = data.Draws(dataset.labels, "reversed", args.batch, args.epochs, args.seed + 1)
        reversed_loader = loader_of(reversed_draws)

    # model
    torch.manual_seed(args.seed)  # the same on all ranks: the same weights and the same random queue
    encoder = ARCHS[args.arch]
    queued = args.loss in CONTRASTIVE and args.loss != "supcon"  # with a key encoder and a queue
    micro_batches = args.virtual_gpus // ddp.world()
    if queued:
        model = MoCo(encoder, args.dim, args.queue, args.m, args.mlp, args.seed, micro_batches)
    elif args.loss == "supcon":
        model = with_head(encoder, args.dim, args.mlp)
    elif args.loss == "bbn":
        model = baselines.BBN(encoder, C)
    else:
        model = encoder(num_classes=C)
    if args.loss == "ldam":
        model.fc = baselines.NormedLinear(model.fc.in_features, C)
    if args.loss in ("focal", "cb-focal"):
        nn.init.constant_(model.fc.bias, -math.log(C - 1))  # sigmoids start at 1 / C
    if args.loss == "tsc":
        model.targets = baselines.Targets(C, args.dim, device)
    if args.init:
        state = load_backbone(args.init, args.arch).state_dict()
        for e in (model.encoder_q, model.encoder_k) if queued else (model,):
            e.load_state_dict(state, strict=False)  # all but the fc, which load_backbone has made sure of
    model = model.to(device, memory_format=torch.channels_last)
    if args.compile:  # the encoders alone: the queue is written in place, and DDP has hooks
        for e in (model.encoder_q, model.encoder_k) if queued else (model,):
            e.compile()
    net = ddp.wrap(model.encoder_q if queued else model)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)

    # loss
    on_logits = {"ce": F.cross_entropy, "focal": baselines.focal_loss,
                 "cb-focal": partial(baselines.focal_loss, gamma=0.5),  # Cui et al. on iNaturalist; beta 0.999 below
                 "ldam": partial(baselines.ldam_loss, margins=baselines.ldam_margins(counts).to(device))}.get(args.loss)
    num_positives = {"cl": 0, "fcl": None}.get(args.loss, args.num_positives)
    match_every = max(1, C // 100)  # steps: TSC's matching takes 0.1 s for 1000 classes, its authors do it every step

    def to_input(view):
        return data.normalize(view, spec["mean"], spec["std"], device)

    amp = torch.autocast(device.type, torch.bfloat16, enabled=args.amp)

    def encode(*inputs):
        with amp:
            return net(*inputs).float()

    # resume, or begin
    first_epoch, first_step, running, left_out, head_line = 0, 0, 0.0, 0, header(args)
    head_line["settings"]["skipped_sha256"] = None if none_skipped else data.sha256(skipped)
    ddp.print0("settings: " + ", ".join(f"{name}={v}" for name, v in head_line["settings"].items()))
    free = {"out", "val", "workers", "check", "log_every", "save_every", "restart", "override", "skip_nonfinite",
            "compile", "skip_broken", "cache", "tensorboard",
            "world"}  # whatever the ranks, the parts of a batch are those of virtual_gpus
    ckpt = None if args.restart else checkpoint.load(args.out, head_line["settings"], free, args.override, device)
    if ckpt:
        with checkpoint.fitting(args.out):
            model.load_state_dict(ckpt["model"])
            optimizer.load_state_dict(ckpt["optimizer"])
            first_epoch, first_step, running = (ckpt[name] for name in ("epoch", "step", "running"))
            left_out = ckpt["left_out"]
        if first_epoch == args.epochs and (args.out / "backbone.pt").exists():
            ddp.print0(f"{args.out} is finished already; --restart trains it again")
            return
        ddp.print0(f"{args.out}: going on after epoch {first_epoch} of {args.epochs}, step {first_step}")
    elif queued and not args.no_fill:
        def batches():
            for epoch in range(-1, -args.queue - 1, -1):  # epochs before the first; more than one if K > the data set
                draws.set_epoch(epoch)
                for (_, view), labels, _ in loader:
                    yield view.to(device), labels.to(device)
                    bar.update(args.batch)
        with tqdm(total=args.queue, desc="filling the queue", unit="key", disable=ddp.rank() > 0, leave=False) as bar:
            with amp:
                model.fill_queue(batches(), to_input)
    steps = len(loader)
    if ddp.rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        if not ckpt:
            checkpoint.remove(args.out, "backbone.pt", "head.pt")
        log = open_log(args.out, head_line, first_epoch * steps + first_step if ckpt else None, args.tensorboard)

    def save_checkpoint(epoch, step):
        """After so many whole epochs and steps of the next one."""
        if ddp.rank() == 0:
            checkpoint.save_checkpoint({
                "epoch": epoch, "step": step, "running": total.item(), "left_out": left_out,
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "settings": head_line["settings"]}, args.out)

    # train
    bar = tqdm(total=steps * args.epochs, initial=steps * first_epoch + first_step, desc=args.out.name, unit="step",
               disable=ddp.rank() > 0, mininterval=1)
    net.train()
    recent = collections.deque(maxlen=args.log_every)  # the images of the last steps
    collapsed, stop = False, Stop()
    for epoch in range(first_epoch, args.epochs):
        draws.set_epoch(epoch, first_step)
        reversed_batches = itertools.repeat(None)
        if args.loss == "bbn":
            reversed_draws.set_epoch(epoch, first_step)
            reversed_batches = reversed_loader
            alpha = baselines.bbn_alpha(epoch, args.epochs)
        class_weight = None
        if args.loss == "cb-focal":
            class_weight = baselines.effective_number_weights(counts, 0.999).to(device)
        if args.drw and epoch >= 0.8 * args.epochs:  # deferred: from 160 of 200 in Cao et al. 2019, sec. 3.3
            class_weight = baselines.effective_number_weights(counts, 0.9999).to(device)
        lr = learning_rate(args.lr, args.schedule, epoch / args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total, since, since_step, waited = torch.full((), running, device=device), time.time(), first_step, 0.0
        waiting_since = time.time()
        broken_at = torch.zeros((), dtype=torch.long, device=device)  # the first step whose gradient is not finite
        batches = enumerate(zip(loader, reversed_batches), first_step + 1)
        for step, ((views, labels, indices), reversed_batch) in batches:
            waited += time.time() - waiting_since
            labels = labels.to(device, non_blocking=True)
            if args.skip_nonfinite:
                before, total_before = [x.clone() for x in model.buffers()], total.clone()
            if queued:
                model.update_key_encoder()
                with amp:
                    keys, key_labels = model.keys(views[1].to(device, non_blocking=True), labels, to_input)
            optimizer.zero_grad()
            for j in range(micro_batches):
                # each step and (virtual) rank has a stream of its own: a resumed run draws what an undisturbed one does
                torch.manual_seed((args.seed * 1_000_003 + epoch * steps + step) * 1_009 + ddp.rank() + ddp.world() * j)
                keep_statistics(net, j > 0)                                   # the running ones are virtual rank 0's
                x, y = to_input(views[0][j::micro_batches]), labels[j::micro_batches]  # (b, 3, H, W), (b,)
                with contextlib.nullcontext() if j == micro_batches - 1 else net.no_sync():
                    if on_logits:
                        loss = on_logits(encode(x), y, weight=class_weight)
                    elif args.loss == "bbn":
                        (reversed_view,), reversed_labels, _ = reversed_batch
                        logits = encode(x, to_input(reversed_view), alpha)    # (b, C)
                        loss = baselines.bbn_loss(logits, y, reversed_labels.to(device), alpha)
                    elif args.loss == "supcon":
                        z = torch.cat([x, to_input(views[1])])                # BatchNorm sees both views
                        z = F.normalize(encode(z))                            # (2 b, d)
                        loss = baselines.supcon_loss(ddp.GatherWithGradient.apply(z), ddp.gather(y.repeat(2)),
                                                     args.temperature)
                    else:
                        q, k = F.normalize(encode(x)), model.own(keys, j)     # (b, d) each
                        if args.loss == "tsc":
                            model.targets.follow(ddp.gather(q.detach()), ddp.gather(y))
                        if args.loss == "tsc" and epoch >= args.epochs // 2:  # before, KCL alone (App. B: warm-up)
                            if step % match_every == 0 or step == 1:
                                model.targets.assign()
                            loss = baselines.tsc_loss(q, k, model.queue, y, model.queue_labels,
                                                      model.targets.of_classes(), args.num_positives, args.temperature)
                        else:
                            loss = fast_kcl_loss(q, k, model.queue, y, model.queue_labels, num_positives,
                                                 args.temperature, args.fixed_divisor, args.drop_unused, args.first_k)
                    (loss / micro_batches).backward()
                total += loss.detach() / micro_batches
            # all ranks share the gradient. The fused step leaves itself out where found_inf is 1, on the device, so
            # nothing waits for the answer, and on a GPU the steps up to the log line, where it is read, do no harm
            finite = torch.stack(torch._foreach_norm([p.grad for p in net.parameters()])).isfinite().all()
            broken_at = torch.where(finite | (broken_at > 0), broken_at, step)
            optimizer.grad_scale, optimizer.found_inf = None, 1 - finite.float()
            optimizer.step()
            recent.append((step, indices))

            log_now = step % args.log_every == 0 or step == steps
            if (log_now or args.skip_nonfinite or device.type == "cpu") and (broken := int(broken_at)):
                images = [dataset.paths[i] for i in dict(recent)[broken].tolist()]
                (args.out / f"nonfinite-rank{ddp.rank()}.txt").write_text("\n".join(images) + "\n")
                why = (f"step {epoch * steps + broken}: the gradient is not finite with learning rate {lr:.3g} on "
                       f"{images[0]} and others (nonfinite-rank{ddp.rank()}.txt names them)")
                left_out += 1
                if left_out > args.skip_nonfinite:
                    raise InputError(f"{why}; {args.out} keeps its last checkpoint; try a smaller --lr")
                ddp.print0(f"warning: {why}; left out, {left_out} of {args.skip_nonfinite}")
                for x, saved in zip(model.buffers(), before):
                    x.copy_(saved)
                broken_at.zero_()
                total = total_before
            elif queued:
                model.enqueue(keys, key_labels)
            if log_now:
                n = (step - 1) % args.log_every + 1
                torch.distributed.all_reduce(total)
                seconds = time.time() - since
                line = {"epoch": epoch, "step": epoch * steps + step, "loss": total.item() / ddp.world() / n, "lr": lr,
                        "images_per_s": (step - since_step) * args.batch / seconds,
                        "loader_wait": waited / seconds}                      # the share of the time
                if queued:
                    of_class = torch.bincount(model.queue_labels + 1, minlength=C + 1)[1:]  # (C,), without empty slots
                    share = of_class / of_class.sum().clamp(min=1)
                    line |= {"queue_filled": of_class.sum().item() / args.queue,
                             "queue_classes": (of_class > 0).sum().item(),
                             "queue_share": [share.min().item(), share.median().item(), share.max().item()],
                             "positives_in_queue": of_class[labels].float().mean().item(),
                             # 1: the queries fill the sphere; 0: all are one vector
                             "feature_std": (q.detach().std(0, correction=0).mean() * args.dim**0.5).item()}
                    if line["feature_std"] < 0.01 and not collapsed:
                        ddp.print0(f"warning: step {line['step']}: all queries are nearly one vector (feature_std "
                                   f"{line['feature_std']:.2g}): the representation has collapsed; try a smaller --lr")
                        collapsed = True
                if ddp.rank() == 0:
                    log(line)
                    bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)
                total, since, since_step, waited = torch.zeros_like(total), time.time(), step, 0.0
            bar.update()
            if (log_now or ddp.world() == 1) and step < steps and (number := stop.asked()):
                save_checkpoint(epoch, step)
                stop.leave(number, args.out)
            waiting_since = time.time()
        first_step, running, number = 0, 0.0, stop.asked()
        if number or (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            save_checkpoint(epoch + 1, 0)
        if number:
            stop.leave(number, args.out)
    bar.close()

    # hand on
    if ddp.rank() == 0:
        backbone = model.encoder_q if queued else model.encoder if args.loss == "bbn" else model
        save({name: x.cpu().contiguous() for name, x in backbone.state_dict().items() if not name.startswith("fc.")},
             args.out / "backbone.pt")
        if args.loss in SUPERVISED:
            W, b = model.fc.weight.detach().cpu(), getattr(model.fc, "bias", torch.zeros(C)).detach().cpu()
            if args.loss == "ldam":  # the cosine's other norm, of an image's features, is the same for all classes
                W = F.normalize(W)
            how = SUPERVISED[args.loss] + "-DRW" * args.drw + " from another backbone" * bool(args.init)
            save({"weight": W.contiguous(), "bias": b, "backbone": "backbone.pt",
                  "backbone_sha256": data.sha256(args.out / "backbone.pt"), "arch": args.arch,
                  "dataset": args.dataset, "data": args.data, "name": args.out.name,
                  "list": args.list, "counts": counts.tolist(), "counts_of": args.list,
                  "list_sha256": head_line["settings"]["list_sha256"],
                  "protocol": f"joint {how}, {args.sampler} sampling",
                  **{name: spec[name] for name in ("mean", "std", "pixels", "resize")}}, args.out / "head.pt")
        print(f"backbone in {args.out / 'backbone.pt'}")


if __name__ == "__main__":
    ddp.run(main)
