"""
Stage 1: train a representation with KCL or a method it is compared with: CE, CL (MoCo), FCL, those in baselines.py.

    python train_rep.py --loss kcl                                  # embedded digits, CPU or one GPU, 3 minutes
    torchrun --nproc_per_node=2 train_rep.py --loss kcl             # two processes; BatchNorm sees half a batch
    torchrun --nproc_per_node=8 train_rep.py --loss kcl --data /path/to/imagenet --list ImageNet_LT_train.txt

Writes to --out:
    log.jsonl      the first line has command, settings and versions; then comes a line every --log-every steps
    ckpt.pt        saved at the end of an epoch if the last save is a minute old; the same command resumes from it
    head.pt        the classifier that was trained with the encoder; only classification losses have one
    backbone.pt    written last: a plain state_dict with torchvision's names, without the fc
Next: train_linear.py.
"""
import argparse
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import augment
import baselines
import checkpoint
import data
import ddp
from kcl import kcl_loss
from moco import MoCo, freeze_bn_statistics
from resnet import ARCHS, check_fc, fit, load_backbone, with_head

KCL_FAMILY = ("kcl", "cl", "fcl")  # they take k, no, or all same-class keys of the queue

# The hyper-parameters. Later rows override earlier ones: all, kind of data, (kind, loss), loss. Flags override them.
# all and photos are from BalFeat, the authors' code: KCL on ImageNet-LT has lr 0.1 with a cosine. cifar is from Cao et
# al. 2019, except queue and m, which are our choice.
DEFAULTS = {
    "all": dict(epochs=200, lr=0.1, schedule="cosine", sampler="instance"),
    # ImageNet-LT, iNaturalist, Places365
    "photos": dict(arch="resnet50", batch=256, weight_decay=5e-4, aug="sup", queue=65536, m=0.999),
    "cifar": dict(arch="resnet32", batch=128, weight_decay=2e-4, aug="cifar", queue=4096, m=0.99),
    "digits": dict(arch="resnet8s", batch=64, weight_decay=5e-4, aug="affine", queue=512, m=0.99,
                   workers=0),
    ("photos", "classification"): dict(epochs=90),
    ("photos", "cl"): dict(lr=0.03, schedule="step", aug="moco"),
    ("cifar", "cl"): dict(lr=0.03, aug="moco"),
    ("digits", "classification"): dict(epochs=90, lr=0.3),                # chosen on val: results/findings.md
    ("digits", "kcl"): dict(lr=0.3),
    ("digits", "cl"): dict(lr=0.03),
    "bbn": dict(sampler="bilateral"),                                     # BBN's two streams; no other loss has them
}
BN_BATCH = 32  # photographs: BatchNorm sees this many images, as on the authors' 8 GPUs with 32 images each

# flags that these losses would silently ignore; your own loss may read them all
NO_POSITIVES = ("ce", "focal", "cb-focal", "ldam", "bbn", "cl", "fcl", "supcon")
IGNORED_BY = {
    "mlp": baselines.CLASSIFICATION,
    "num_positives": NO_POSITIVES,
    "fixed_divisor": (*NO_POSITIVES, "kcl-batch"),
    "drop_unused": (*NO_POSITIVES, "kcl-batch"),
    "first_k": (*NO_POSITIVES, "kcl-batch"),
    "drw": (*KCL_FAMILY, "focal", "cb-focal", "bbn", "supcon", "kcl-batch"),
    "sampler": ("bbn",),
}


def parse_args():
    table = "".join(f"  {key}: {row}\n" for key, row in DEFAULTS.items())
    p = argparse.ArgumentParser(description=__doc__, epilog=f"defaults by data and loss:\n{table}",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    # method
    p.add_argument("--loss", choices=(*KCL_FAMILY, *baselines.LOSSES), default="kcl",
                   help="default kcl; cl is MoCo, fcl takes all positives; others: baselines.py")
    p.add_argument("--num-positives", type=int, default=6,
                   help="k of KCL; default 6, the best in Fig. 5")
    p.add_argument("--temperature", type=float, default=0.07, help="T of the softmax; default 0.07")
    p.add_argument("--fixed-divisor", action="store_true", help="KCL: always divide by k + 1")
    p.add_argument("--drop-unused", action="store_true",
                   help="KCL: remove undrawn same-class keys from the denominator")
    p.add_argument("--first-k", action="store_true",
                   help="KCL: take the first k same-class slots, not random ones")
    p.add_argument("--queue", type=int, help="K, the number of keys in the queue")
    p.add_argument("--m", type=float, help="momentum of the key encoder")
    p.add_argument("--dim", type=int, default=128, help="d, the size of an embedding; default 128")
    p.add_argument("--mlp", action="store_true", help="MoCo v2's two-layer head, not a linear one")
    p.add_argument("--no-fill", action="store_true", help="start from a random queue, like MoCo")
    p.add_argument("--drw", action="store_true",
                   help="CE, LDAM: re-weight the classes in the last fifth of the epochs")
    p.add_argument("--init", help="backbone.pt to start from; --loss ce on a CL backbone is "
                                  "self-supervised pre-training (SSP)")
    # data
    p.add_argument("--dataset", choices=tuple(data.DATASETS),
                   help="default: digits without --data; with --data, what its splits.json says, "
                        "otherwise small or small64 if the images have at most 64 px, or imagenet")
    p.add_argument("--data", help="the folder that the list's paths start from")
    p.add_argument("--list", help="training list, in --data or any path, with one `path label` per "
                                  "line; default: the data set's long tail")
    p.add_argument("--sampler", choices=("instance", "class", "sqrt", "progressive"),
                   help="how images are drawn; default: instance, every image once per epoch")
    p.add_argument("--aug", choices=augment.AUGMENTATIONS, help="see augment.py")
    p.add_argument("--workers", type=int, help="per rank; default: its share of the cores")
    # optimisation
    p.add_argument("--arch", choices=tuple(ARCHS), metavar="ARCH",
                   help="one of ARCHS in resnet.py; add your own there")
    p.add_argument("--epochs", type=int, help="epochs over the list")
    p.add_argument("--batch", type=int, help="images per step, over all ranks")
    p.add_argument("--lr", type=float, help="learning rate for the whole --batch")
    p.add_argument("--schedule", choices=("cosine", "step"),
                   help="step: x0.1 at 60 and 80 %% of the epochs")
    p.add_argument("--warmup", type=int, default=0,
                   help="epochs in which the lr rises linearly from 0.01; default 0")
    p.add_argument("--weight-decay", type=float, help="the authors use 1e-4 on full ImageNet")
    p.add_argument("--seed", type=int, default=0,
                   help="seed of weights, draws and augmentations; default 0")
    # speed and memory
    p.add_argument("--virtual-gpus", type=int, metavar="V",
                   help="train as V GPUs would: each rank splits its batch into V / ranks parts, "
                        "and BatchNorm sees one part. Default: photographs are split into parts of 32 "
                        "images on 1, 2, 4 or 8 GPUs; everything else has one part per rank")
    p.add_argument("--amp", action="store_true", help="run encoders in bfloat16, the loss in fp32")
    p.add_argument("--compile", action="store_true", help="torch.compile the encoders")
    # the run
    p.add_argument("--out", type=Path,
                   help="default: runs/<data>-<list>-<loss>-seed<n>; another k or --epochs is not in "
                        "this name, so pass --out for each")
    p.add_argument("--log-every", type=int, default=10, help="steps between log lines; default 10")
    p.add_argument("--tensorboard", action="store_true", help="also log to OUT/tensorboard")
    p.add_argument("--restart", action="store_true",
                   help="delete this stage's files in --out and start over; by default the run resumes")
    args = p.parse_args()

    for flag, losses in IGNORED_BY.items():
        if args.loss in losses and getattr(args, flag) != p.get_default(flag):
            sys.exit(f"error: --{flag.replace('_', '-')} has no effect with --loss {args.loss}")

    # fill in what was not given
    args.dataset = dataset_of(args)
    spec = data.DATASETS[args.dataset]
    kind = spec["kind"]
    loss = "classification" if args.loss in baselines.CLASSIFICATION else args.loss
    table = dict(data=spec["root"], list=spec["train"], workers=data.workers_per_rank())
    for key in ("all", kind, (kind, loss), args.loss):
        table |= DEFAULTS.get(key, {})
    batch, usual_parts = args.batch or table["batch"], 1
    if kind == "photos" and args.loss not in baselines.WHOLE_BATCH and batch % BN_BATCH == 0:
        usual_parts = batch // BN_BATCH
    table["virtual_gpus"] = max(ddp.world(), usual_parts)
    for flag, default in table.items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)

    # refuse what would go wrong silently
    if args.data is None:
        sys.exit(f"error: --dataset {args.dataset} needs --data, the folder that the list's paths "
                 "start from")
    args.data = str(Path(args.data))                                      # without a trailing slash
    if args.virtual_gpus % ddp.world() or args.batch % args.virtual_gpus:
        sys.exit(f"error: --virtual-gpus {args.virtual_gpus} must be a multiple of the {ddp.world()} "
                 f"ranks and divide --batch {args.batch}")
    if args.virtual_gpus > ddp.world() and args.loss in baselines.WHOLE_BATCH:
        sys.exit(f"error: --virtual-gpus {args.virtual_gpus} splits the batch, but "
                 f"--loss {args.loss} needs it whole")

    # runs/digits-lt-kcl-seed0; runs that differ in flags that are not in the name need an --out
    name = Path(args.list).with_suffix("").as_posix().replace("train_", "")
    name = name.strip("/").replace("/", "-")
    variant = args.loss + "-drw" * args.drw + "-init" * bool(args.init)
    if args.sampler not in ("instance", "bilateral"):
        variant += f"-{args.sampler}"
    folder = f"{Path(args.data).name}-{name}-{variant}-seed{args.seed}"
    if args.virtual_gpus != usual_parts:
        folder += f"-{args.virtual_gpus}ranks"                            # BatchNorm sees other batches
    args.out = args.out or Path("runs", folder)
    return args


def dataset_of(args):
    """The data set: --dataset, or what splits.json says, which make_lt.py writes next to the lists. If neither names
    one, or it is `folder`, the size of the images may make it small or small64. Otherwise it is imagenet."""
    if args.data is None:
        return args.dataset or "digits"
    name, list_name = args.dataset, args.list or data.LISTS["train"]
    file = data.find_list(args.data, list_name)
    for folder in (Path(args.data), file.parent if args.list else Path(args.data)):
        if name is None and (folder / "splits.json").exists():
            name = json.loads((folder / "splits.json").read_text())["dataset"]
    if name in (None, "folder") and file.is_file():
        name = data.small_dataset(args.data, data.read_list(args.data, list_name)[0]) or name
    return name or "imagenet"


def learning_rate(base, schedule, t):
    """The rate at t = epoch / epochs. cosine reaches 0 after the last epoch; step drops at 120 and 160 of 200, as in
    MoCo."""
    if schedule == "cosine":
        return base * (0.5 * (1 + math.cos(math.pi * t)))
    return base * 0.1 ** ((t >= 0.6) + (t >= 0.8))


def network(args, class_sizes, parts):
    """The model to train, the same on all ranks."""
    constructor = ARCHS[args.arch]
    if args.init:
        start = load_backbone(args.init, args.arch).state_dict()

        def constructor(**num_classes):
            encoder = ARCHS[args.arch](**num_classes)
            encoder.load_state_dict(start, strict=False)                  # all except fc; checked below
            return encoder

    check_fc(args.arch, data.DATASETS[args.dataset]["pixels"])
    torch.manual_seed(args.seed)
    if args.loss in (*KCL_FAMILY, *baselines.QUEUE):
        encoder = partial(with_head, constructor, mlp=args.mlp)
        model = MoCo(encoder, args.dim, args.queue, args.m, args.seed, parts)
    else:
        model = baselines.network(args, constructor, class_sizes)

    # Read its backbone as stage 2 will, so that a fault shows now and not after hours. With --init, check that the
    # weights are still those of the file.
    backbone, _ = fit(backbone_of(model), args.arch, f"the network of --loss {args.loss}")
    for name, x in backbone.state_dict().items() if args.init else ():
        in_file = re.sub(r"\.(conventional|rebalanced)\b", "", name)      # BBN has its last block twice
        if in_file not in start or not torch.equal(x, start[in_file]):
            sys.exit(f"error: {name} of --loss {args.loss} differs from that of {args.init}; "
                     "--init cannot use the backbone of a BBN, and baselines.network must use the "
                     "constructor it is given")
    return model


def backbone_of(model):
    """What backbone.pt holds: {name: tensor} of the encoder, with its own names and without its fc."""
    encoder = getattr(model, "encoder", model)                            # a BBN contains one
    if isinstance(model, MoCo):
        encoder = model.encoder_q
    return {name: x for name, x in encoder.state_dict().items() if not name.startswith("fc.")}


def criterion_of(args, model, class_sizes, epoch):
    """The loss function for an epoch."""
    if args.loss not in KCL_FAMILY:
        return baselines.criterion(args, model, class_sizes, epoch)
    num_positives = {"kcl": args.num_positives, "cl": 0, "fcl": None}[args.loss]
    return partial(kcl_loss, num_positives=num_positives, temperature=args.temperature,
                   fixed_divisor=args.fixed_divisor, drop_unused=args.drop_unused,
                   first_k=args.first_k)


def keys_to_fill(loader, draws, device):
    """Yield (images, labels) to fill the queue with. They come from epochs -1, -2, ..., as many as K needs."""
    for epoch in itertools.count(-1, -1):
        draws.set_epoch(epoch)
        for (_, view), labels, _ in loader:
            yield view.to(device), labels.to(device)


def save_results(args, header, model, class_sizes):
    """Write head.pt if the loss trains a classifier, then backbone.pt, which marks the run as finished."""
    state = {name: x.cpu().contiguous() for name, x in backbone_of(model).items()}
    checkpoint.save(state, args.out / "backbone.new")                     # head.pt needs its hash
    if args.loss in baselines.CLASSIFICATION:
        weight, bias = baselines.weight_and_bias(model.fc)
        spec = data.DATASETS[args.dataset]
        name = baselines.LOSSES[args.loss] + "-DRW" * args.drw
        name += " from another backbone" * bool(args.init)
        checkpoint.save({
            "weight": weight, "bias": bias, "name": args.out.name, "chosen": "",
            "protocol": f"joint {name}, {args.sampler} sampling", "seed": args.seed,
            "backbone": "backbone.pt", "arch": args.arch,
            "backbone_sha256": checkpoint.sha256(args.out / "backbone.new"),
            "dataset": args.dataset, "data": args.data, "list": args.list,
            "counts": class_sizes.tolist(), "counts_of": args.list,
            "list_sha256": header["settings"]["list_sha256"],
            "class_names": data.class_names(args.data, args.list),
            **{key: spec[key] for key in ("mean", "std", "pixels", "resize")},
        }, args.out / "head.pt")
    os.replace(args.out / "backbone.new", args.out / "backbone.pt")
    print(f"wrote {args.out / 'backbone.pt'}")


def main():
    device = ddp.init()
    args = parse_args()
    spec = data.DATASETS[args.dataset]
    queued = args.loss in (*KCL_FAMILY, *baselines.QUEUE)
    num_views = 2 if queued or args.loss in baselines.TWO_VIEWS else 1
    parts = args.virtual_gpus // ddp.world()

    # the images, and which of them an epoch draws
    if args.data == data.DATASETS["digits"]["root"]:
        if ddp.rank() == 0 and not Path(args.data).exists():
            subprocess.run([sys.executable, Path(__file__).with_name("make_lt.py")], check=True)
        dist.barrier()
    dataset = data.ImageList(args.data, args.list, spec, args.aug, num_views)
    draws = data.Draws(dataset.labels, args.sampler, args.batch, args.epochs, args.seed)
    class_sizes = dataset.labels.bincount()                               # (C,)
    val = data.sibling_list(args.data, args.list, spec["val"])  # stage 2 selects on it, so stage 1 must not train on it
    if data.find_list(args.data, val).is_file():
        data.refuse_overlap(args.data, args.list, val)

    # resume, if --out holds a checkpoint
    list_sha256 = checkpoint.sha256(data.find_list(args.data, args.list))
    header = checkpoint.header(args, list_sha256=list_sha256)
    ddp.print0("settings: " + ", ".join(f"{name}={x}" for name, x in header["settings"].items())
               + f"; on {device.type}, BatchNorm sees {args.batch // args.virtual_gpus} images of "
               f"{spec['pixels']} px")
    ckpt = checkpoint.resume(args.out, header["settings"], "backbone.pt", args.restart)
    loader = data.train_loader(dataset, draws, args.workers, device)
    steps, begin = len(loader), ckpt["epoch"] if ckpt else 0

    # model and optimiser
    model = network(args, class_sizes, parts).to(device, memory_format=torch.channels_last)
    encoders = [model.encoder_q, model.encoder_k] if queued else [model]
    for encoder in encoders if args.compile else ():
        encoder.compile()
    net = ddp.wrap(encoders[0])                                           # only this one gets gradients
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9,
                                weight_decay=args.weight_decay, fused=True)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=args.amp)
    to_input = partial(data.normalize, mean=spec["mean"], std=spec["std"], device=device)
    if ckpt:
        model.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
        ddp.print0(f"{args.out}: resuming after epoch {begin} of {args.epochs}")
    elif queued and not args.no_fill:
        if args.queue > 2 * len(dataset):
            sys.exit(f"error: --queue {args.queue} would hold each of the {len(dataset)} images many "
                     f"times; use --queue {2 ** int(math.log2(len(dataset)))} or so")
        ddp.print0(f"filling the queue with {args.queue} keys")
        with amp:
            model.fill_queue(keys_to_fill(loader, draws, device), to_input)

    # train
    if ddp.rank() == 0:
        log = checkpoint.open_log(args.out, header, begin * steps or None, args.tensorboard)
    bar = tqdm(desc=args.out.name, total=steps * args.epochs, initial=steps * begin, unit="step",
               mininterval=1, disable=ddp.rank() > 0 or None)             # None hides it outside a terminal
    saved = time.time()
    for epoch in range(begin, args.epochs):
        draws.set_epoch(epoch)
        lr = learning_rate(args.lr, args.schedule, epoch / args.epochs)
        if epoch < args.warmup:  # as in SupCon's code, for large batches
            lr = 0.01 + (lr - 0.01) * epoch / args.warmup
        for group in optimizer.param_groups:
            group["lr"] = lr
        criterion = criterion_of(args, model, class_sizes, epoch)

        total, since, since_step = torch.zeros((), device=device), time.time(), epoch * steps
        for step, (views, labels, _) in enumerate(loader, epoch * steps + 1):
            views = [view.to(device, non_blocking=True) for view in views]  # (B / ranks, 3, H, W) uint8 each
            labels = labels.to(device, non_blocking=True)                 # (B / ranks,)

            # let the key encoder follow the query encoder, then encode the keys of all ranks
            if queued:
                model.update_key_encoder()
                with amp:
                    keys, key_labels = model.keys(views[1], labels, to_input)    # (B, d), (B,)
            images = views[0] if queued else torch.cat(views)

            # compute gradients part by part; DDP averages them over ranks after the last part
            optimizer.zero_grad()
            for j in range(parts):
                # There is one random stream per step and virtual rank, so a resumed run draws the same numbers as an
                # uninterrupted one. A loss of the whole batch is the same on all ranks, so they share one stream.
                stream = 0 if args.loss in baselines.WHOLE_BATCH else ddp.rank() + ddp.world() * j
                torch.manual_seed((args.seed * 1_000_003 + step) * 1_009 + stream)
                if parts > 1:
                    freeze_bn_statistics(net, j > 0)  # only the first part updates the running statistics
                net.require_backward_grad_sync = j == parts - 1
                x, y = to_input(images[j::parts]), labels[j::parts]       # (b, 3, H, W), (b,), as local_keys
                with amp:
                    z = net(x).float()                                    # (b, d), or logits (b, C)
                if queued:
                    q, k = F.normalize(z), model.local_keys(keys, j)      # (b, d) each
                    loss = criterion(q, k, model.queue, y, model.queue_labels)
                else:
                    loss = criterion(z, y)
                (loss / parts).backward()
                total += loss.detach() / parts
            optimizer.step()

            # enqueue after backward, which still reads the slots that this overwrites. Before the loss would be
            # wrong too: a query's own key would be in the queue and count twice
            if queued:
                model.enqueue(keys, key_labels)
            bar.update()

            # write the log; only here does the host wait for the device
            if step % args.log_every == 0 or step == (epoch + 1) * steps:
                dist.all_reduce(total)
                n = step - since_step
                line = {"epoch": epoch, "step": step, "loss": total.item() / ddp.world() / n,
                        "lr": optimizer.param_groups[0]["lr"],
                        "images_per_s": n * args.batch / (time.time() - since)}
                if queued:  # 1 if the queries fill the sphere, 0 if the network has collapsed to one vector
                    spread = q.detach().std(0, correction=0).mean() * args.dim**0.5
                    line["feature_std"] = spread.item()
                if not math.isfinite(line["loss"]):
                    sys.exit(f"error: the loss is {line['loss']} at step {step}; {args.out} keeps its "
                             "last checkpoint; try a smaller --lr")
                if ddp.rank() == 0:
                    log(line)
                    bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)
                    if bar.disable:  # nohup, Slurm
                        print(f"step {step} of {steps * args.epochs}: loss {line['loss']:.3f}, "
                              f"{line['images_per_s']:.0f} images/s", flush=True)
                total, since, since_step = torch.zeros_like(total), time.time(), step

        due = time.time() - saved >= checkpoint.SAVE_EVERY or epoch + 1 == args.epochs
        if ddp.rank() == 0 and due:
            checkpoint.save({"epoch": epoch + 1, "model": model.state_dict(),
                             "optimizer": optimizer.state_dict()}, args.out / "ckpt.pt")
            saved = time.time()
    bar.close()
    if ddp.rank() == 0:
        save_results(args, header, model, class_sizes)


if __name__ == "__main__":
    ddp.run(main)
