"""
What KCL is compared with: the losses and networks of the paper's tables, and SupCon and TSC, which are not in it. What
train_rep.py asks of this file stands first.

    focal, cb-focal   focal_loss, effective_number_weights     Lin et al. 2017; Cui et al. 2019
    ldam, --drw       ldam_loss, ldam_margins, NormedLinear    Cao et al. 2019
    bbn               BBN, bbn_loss                            Zhou et al. 2020
    supcon            supcon_loss: FCL inside the batch        Khosla et al. 2020
    tsc               tsc_loss, uniform_targets, Targets       Li et al. 2022

CE's samplers, cRT, LWS, NCM, tau-norm and SSP are no losses of their own: train_rep.py --sampler and --init,
train_linear.py --classifier, evaluate.py --ncm and --tau-norm.

Add your loss here: its name in LOSSES; in LOGITS if it trains a classifier along, which is model.fc; in VIEWS if it
takes two views, as every MoCo does, and in WHOLE_BATCH then; a branch in `criterion`, and in `network` if it needs more
than a ResNet with C outputs. A flag of its own goes into train_rep.py's parse_args. What `criterion` returns takes
    logits (b, C), labels (b,)                        for most losses
    z (2 b, d), labels (b,)                           with two views, one after the other; z is not normalised
    q, k (b, d), queue, labels (b,), queue_labels     where `network` returns a MoCo: what kcl_loss takes
"""
import itertools
import math
import sys
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import ddp
from kcl import choose_positives, fast_kcl_loss
from moco import MoCo, with_head
from resnet import branch

LOSSES = {"ce": "CE", "focal": "Focal", "cb-focal": "CB-Focal", "ldam": "LDAM", "bbn": "BBN", "supcon": "SupCon",
          "tsc": "TSC"}                                                   # train_rep.py --loss: the name in tables
LOGITS = ("ce", "focal", "cb-focal", "ldam", "bbn")                       # these train a classifier along
VIEWS = {"supcon": 2, "tsc": 2}                                           # of an image; the others take one
WHOLE_BATCH = ("bbn", "supcon", "tsc")                                    # these have no --virtual-gpus
DEFAULTS = {"bbn": dict(sampler="bilateral")}                             # defaults of flags that a loss changes


# ---- what train_rep.py asks for

def network(args, encoder, counts):
    """The network of a loss; encoder: a torchvision-style constructor, counts (C,): training images of each class.
    If it is a MoCo, train_rep.py runs key encoder and queue."""
    C = len(counts)
    if args.loss == "supcon":
        return with_head(encoder, args.dim, args.mlp)
    if args.loss == "bbn":
        return BBN(encoder, C)
    if args.loss == "tsc":
        model = MoCo(encoder, args.dim, args.queue, args.m, args.mlp, args.seed)
        model.targets = Targets(C, args.dim)
        return model

    model = encoder(num_classes=C)
    if args.loss == "ldam":
        model.fc = NormedLinear(model.fc.in_features, C)
    if args.loss in ("focal", "cb-focal"):
        nn.init.constant_(model.fc.bias, -math.log(C - 1))                # sigmoids start at 1 / C
    return model


def criterion(args, model, counts, epoch):
    """The loss function of an epoch. It is built anew for each from the epoch's number, so a resumed run needs no state
    of it."""
    device, t = next(model.parameters()).device, epoch / args.epochs
    if args.loss == "bbn":
        model.alpha = 1 - t ** 2  # eq. 6, from the whole to the tail; the authors divide by another constant
        return partial(bbn_loss, alpha=model.alpha)
    if args.loss == "supcon":
        return partial(supcon_of_all_ranks, temperature=args.temperature)
    if args.loss == "tsc":
        return partial(tsc_of_all_ranks, targets=model.targets, pull=epoch >= args.epochs // 2,
                       steps=itertools.count(1),
                       num_positives=args.num_positives, temperature=args.temperature)

    weight = None
    if args.loss == "cb-focal":
        weight = effective_number_weights(counts, 0.999).to(device)       # Cui et al. on iNaturalist
    if args.drw and t >= 0.8:                                             # deferred: from 160 of 200, Cao et al. 2019
        weight = effective_number_weights(counts, 0.9999).to(device)
    if args.loss == "ce":
        return partial(F.cross_entropy, weight=weight)
    if args.loss == "ldam":
        return partial(ldam_loss, margins=ldam_margins(counts).to(device), weight=weight)
    if args.loss == "focal":
        return focal_loss
    if args.loss == "cb-focal":
        return partial(focal_loss, gamma=0.5, weight=weight)
    raise NotImplementedError(f"--loss {args.loss} has no branch here")


def classifier(model):
    """Weight (C, D) and bias (C,) of the classifier that a loss in LOGITS has trained along."""
    weight = model.fc.weight.detach()
    if isinstance(model.fc, NormedLinear):  # the norm of an image's features scales all of its logits alike
        return F.normalize(weight), torch.zeros(len(weight))
    return weight, model.fc.bias.detach()


# ---- re-weighting

def effective_number_weights(counts, beta):
    """Class weights (C,) ~ (1 - beta) / (1 - beta^n_c), scaled to sum to C: Cui et al., "Class-Balanced Loss Based on
    Effective Number of Samples", CVPR 2019, eq. 2 and sec. 4.

    counts (C,): training images of each class; one without images counts as 1. beta in [0, 1): 0 weights all alike,
    towards 1 the weights go to 1 / n_c. Raises ValueError for a beta outside.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"expected 0 <= beta < 1, got {beta}")
    n = torch.as_tensor(counts).double().clamp(min=1)
    weight = (1 - beta) / (1 - beta ** n)
    return (weight / weight.sum() * len(n)).float()


def focal_loss(logits, labels, gamma=2.0, weight=None):
    """Mean over the batch of weight_y * sum_c -(1 - p_c)^gamma log p_c, a sigmoid for each class: p_c = sigmoid(z_c)
    for the label and 1 - sigmoid(z_c) for all others. Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017,
    eq. 4; over classes as in Cui et al. 2019, sec. 4.3.

    logits (B, C), labels (B,). gamma 2 is Lin's; 0 with weight None is the binary cross-entropy of all classes.
    weight (C,): effective_number_weights makes it CB-Focal, for which Cui et al. took gamma 0.5 and beta 0.999 on
    iNaturalist and ImageNet. Start the classifier's bias at -log(C - 1), their prior of 1 / C, or the many negatives
    make the first steps unstable. Their code keeps that bias out of weight decay; train_rep.py does not.
    """
    sign = 2 * F.one_hot(labels, logits.shape[1]) - 1                     # (B, C): +1 for the label, -1 for others
    log_p = F.logsigmoid(sign * logits)
    loss = -(F.logsigmoid(-sign * logits) * gamma).exp() * log_p          # 1 - p = sigmoid of the negated logit
    return (loss.sum(1) * (1 if weight is None else weight[labels])).mean()


# ---- LDAM

class NormedLinear(nn.Module):
    """Cosine classifier: (B, D) -> (B, C) in [-1, 1], unit features times unit rows of `weight` (C, D), no bias."""

    def __init__(self, D, C):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.rand(C, D) * 2 - 1))

    def forward(self, x):
        return F.normalize(x) @ F.normalize(self.weight).T


def ldam_margins(counts, max_margin=0.5):
    """Delta_c ~ n_c^(-1/4), (C,), the largest (of the smallest class) = max_margin: Cao et al. 2019, eq. 13."""
    margins = torch.as_tensor(counts).double().clamp(min=1) ** -0.25
    return (margins * max_margin / margins.max()).float()


def ldam_loss(cosines, labels, margins, scale=30.0, weight=None):
    """Cross-entropy of scale * (cos_c - Delta_c [c = label]): Cao et al., "Learning Imbalanced Datasets with
    Label-Distribution-Aware Margin Loss", NeurIPS 2019, eqs 12 and 13, with their code's scale and largest margin.

    cosines (B, C) of a NormedLinear, labels (B,), margins (C,); weight (C,) or None as in F.cross_entropy.
    """
    own = F.one_hot(labels, cosines.shape[1])                             # (B, C)
    return F.cross_entropy(scale * (cosines - margins * own), labels, weight=weight)


# ---- BBN

class BBN(nn.Module):
    """The bilateral-branch network: Zhou et al., "BBN: Bilateral-Branch Network with Cumulative Learning for
    Long-Tailed Visual Recognition", CVPR 2020, sec. 4. It takes `bilateral` batches, data.py.

    In training: images (2 B, 3, H, W), of the conventional sampler and then of the reversed one -> logits (B, C) of
    2 [alpha f_c, (1 - alpha) f_r]. In evaluation: images -> logits of [f_c, f_r], as at alpha = 1/2.
    """

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.encoder = encoder()
        D, self.encoder.fc = self.encoder.fc.in_features, nn.Identity()
        self.branches = [branch(self.encoder)]  # in a list: a part of the encoder, not a second module
        self.fc = nn.Linear(2 * D, num_classes)
        self.alpha = 1.0

    def forward(self, images):
        if not self.training:
            return self.fc(self.encoder(images))
        conventional, reversed_ = images.chunk(2)
        self.branches[0].use = 0
        f_c = self.alpha * self.encoder(conventional)                     # (B, D)
        self.branches[0].use = 1
        f_r = (1 - self.alpha) * self.encoder(reversed_)                  # (B, D)
        self.branches[0].use = None
        return self.fc(2 * torch.cat([f_c, f_r], dim=1))


def bbn_loss(logits, labels, alpha):
    """alpha CE(logits, y_c) + (1 - alpha) CE(logits, y_r), eq. 5; logits (B, C), labels (2 B,): y_c, then y_r."""
    labels, reversed_labels = labels.chunk(2)
    return alpha * F.cross_entropy(logits, labels) + (1 - alpha) * F.cross_entropy(logits, reversed_labels)


# ---- contrastive relatives

def supcon_loss(z, labels, temperature=0.07):
    """FCL as Khosla et al. mean it: all same-class embeddings of the batch are positives, all others but itself stand
    in the denominator; no queue, no key encoder. "Supervised Contrastive Learning", NeurIPS 2020, eq. 2 (L_out).

    z (N, d): unit embeddings, those of both views one after the other; labels (N,). The mean over embeddings that have
    a positive, nan where none has. Returns a scalar in fp32 or finer.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        self_ = torch.eye(len(z), dtype=torch.bool, device=z.device)
        positive = (labels[:, None] == labels) & ~self_                   # (N, N)
        found = positive.sum(1)                                           # (N,)
        log_p = (z @ z.T / temperature).masked_fill(self_, -torch.inf).log_softmax(dim=1)
        losses = -log_p.where(positive, 0).sum(1) / found.clamp(min=1)    # 0 where none was found
        return losses.sum() / (found > 0).sum()


def supcon_of_all_ranks(z, labels, temperature):
    """supcon_loss of z (2 b, d), not normalised, of both views of each rank's b images, and their labels (b,). The
    gradient reaches this rank's share alone; times world, since DDP takes the mean over ranks: together the whole."""
    z = F.normalize(z)
    shares = list(ddp.gather(z.detach()).split(len(z)))
    shares[ddp.rank()] = z
    loss = supcon_loss(torch.cat(shares), ddp.gather(labels.repeat(2)), temperature)
    return loss.detach() + ddp.world() * (loss - loss.detach())


def uniform_targets(C, d, steps=1000, seed=0):
    """C unit vectors (C, d) spread over the sphere: the minimum of mean_i log sum_{j != i} exp(t_i . t_j / 0.07), found
    by Adam. Li et al., "Targeted Supervised Contrastive Learning for Long-Tailed Recognition", CVPR 2022, sec. 3.2,
    whose sum has j = i too: a constant exp(1 / 0.07) that buries the rest in fp32. For C <= d + 1 the minimum is the
    regular simplex, t_i . t_j = -1 / (C - 1). 13 s for 1000 classes on a CPU core, growing with C^2."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(C, d, generator=g).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        t = F.normalize(x)
        loss = (t @ t.T / 0.07).fill_diagonal_(-torch.inf).logsumexp(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return F.normalize(x.detach())


class Targets(nn.Module):
    """TSC's targets and which class owns which (sec. 3.3): class means of the queries, followed with momentum 0.9, and
    the assignment that brings targets nearest to them, of all one-to-one assignments the best."""

    def __init__(self, C, d):
        super().__init__()
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError:
            sys.exit("error: --loss tsc assigns its targets with scipy: pip install scipy")
        self.assignment = linear_sum_assignment
        targets = uniform_targets(C, d)
        if ddp.world() > 1:
            dist.broadcast(targets, 0)  # another kind of CPU may round otherwise
        self.register_buffer("targets", targets)                          # (C, d)
        self.register_buffer("means", F.normalize(torch.randn(C, d)))     # (C, d)
        self.register_buffer("owned", torch.arange(C))                    # (C,) the target of each class

    def of_classes(self):
        """(C, d): row c is the target of class c."""
        return self.targets[self.owned]

    @torch.no_grad()
    def follow(self, q, labels):
        """Move the means of the classes in labels (N,) towards those of their unit queries q (N, d)."""
        sums = torch.zeros_like(self.means).index_add_(0, labels, q.float())                    # (C, d)
        there = torch.zeros_like(self.owned).index_add_(0, labels, torch.ones_like(labels)) > 0  # (C,) in the batch
        moved = F.normalize(0.9 * self.means + 0.1 * F.normalize(sums))
        self.means.copy_(moved.where(there[:, None], self.means))

    @torch.no_grad()
    def assign(self):
        """The Hungarian method on means . targets: about 0.1 s for 1000 classes, growing with C^3, and it waits for the
        device."""
        _, owned = self.assignment((self.means @ self.targets.T).cpu().numpy(), maximize=True)
        self.owned.copy_(torch.from_numpy(owned))


def tsc_loss(q, k, queue, labels, queue_labels, targets, num_positives=6, temperature=0.07, weight=0.2):
    """KCL's loss with the class targets among the keys, plus weight * -log softmax of the query's own target: L_TSC of
    Li et al. 2022, eq. 4, with their lambda = 0.2. Their code divides both terms by k + 2: beside the keys' term the
    target's is a seventh of this at k = 6. It restarts optimiser and schedule after the warm-up. Neither is done here.

    targets (C, d): row c is the target of class c. All others as in kcl_loss; labels must be 0..C-1 here.
    """
    own = torch.ones(len(q), 1, dtype=torch.bool, device=q.device)
    positive = torch.cat([own, choose_positives(labels, queue_labels, num_positives)], dim=1)   # (B, 1+K)
    with torch.autocast(q.device.type, enabled=False):
        q, k, queue, targets = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, queue, targets))
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T, q @ targets.T], dim=1)    # (B, 1+K+C)
        log_p = (logits / temperature).log_softmax(dim=1)
        to_keys = log_p[:, :positive.shape[1]].where(positive, 0).sum(1) / positive.sum(1)
        to_target = log_p[:, positive.shape[1]:].gather(1, labels[:, None])[:, 0]
        return -(to_keys + weight * to_target).mean()


def tsc_of_all_ranks(q, k, queue, labels, queue_labels, targets, pull, steps, num_positives, temperature):
    """A step of TSC: the Targets follow the queries of all ranks. pull: whether they are among the keys; in the first
    half of the epochs they are not (App. B: warm-up with KCL). steps: counts those of the epoch from 1."""
    targets.follow(ddp.gather(q.detach()), ddp.gather(labels))
    if not pull:
        return fast_kcl_loss(q, k, queue, labels, queue_labels, num_positives, temperature)
    step = next(steps)
    if step == 1 or step % max(1, len(targets.owned) // 100) == 0:  # the authors: each step, 0.1 s for 1000 classes
        targets.assign()
    return tsc_loss(q, k, queue, labels, queue_labels, targets.of_classes(), num_positives, temperature)
