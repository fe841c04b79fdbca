"""
The baselines: losses and networks of the paper's tables, and KCL and FCL inside the batch, without a queue.

    focal, cb-focal   focal_loss, effective_number_weights     Lin et al. 2017; Cui et al. 2019
    ldam, --drw       ldam_loss, ldam_margins, NormedLinear    Cao et al. 2019
    bbn               BBN, bbn_loss                            Zhou et al. 2020
    supcon            supcon_loss: FCL inside the batch        Khosla et al. 2020
    kcl-batch         supcon_loss with k positives             Kang et al. 2021, sec. 4

CE's samplers, cRT, LWS, NCM, tau-norm and SSP need no loss of their own. cRT is train_linear.py on a CE backbone. The
others are flags: train_rep.py --sampler and --init, train_linear.py --classifier, evaluate.py --ncm and --tau-norm.

Your own classification loss takes five lines. Here is logit adjustment (Menon et al. 2021), `--loss la`:
    "la": "Logit adjustment"                                              # 1. in LOSSES: its name in tables
    "la"                                                                  # 2. in CLASSIFICATION: it trains model.fc
    if args.loss == "la":                                                 # 3. in `criterion`
        log_prior = (counts / counts.sum()).log().to(device)              # 4.
        return lambda logits, labels: F.cross_entropy(logits + log_prior, labels)    # 5.
What `criterion` returns is called with
    logits (b, C), labels (b,)                        by default
    z (2 * b, d), labels (b,)                         for a loss in TWO_VIEWS: all first views, then all second
                                                      views, not normalised
    q, k (b, d), queue, labels (b,), queue_labels     for a loss in QUEUE: unit rows, as kcl_loss gets them
b is the number of images that are encoded together; a batch may have several such parts (--virtual-gpus). If your loss
compares all images of a batch, add it to WHOLE_BATCH and gather them as supcon_of_all_ranks does. If it needs other
heads or branches, build them in `network`. Every loss can read flags such as --num-positives from args. In
train_rep.py, add new flags to parse_args, and other defaults to DEFAULTS, as a row (kind, loss). To change KCL itself,
edit kcl_loss in kcl.py: --loss kcl, cl and fcl call it.
"""
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import ddp
from kcl import choose_positives
from resnet import branch, with_head

LOSSES = {                                                                # value of --loss: name in tables
    "ce": "CE", "focal": "Focal", "cb-focal": "CB-Focal", "ldam": "LDAM", "bbn": "BBN",
    "supcon": "SupCon", "kcl-batch": "KCL in the batch",
}
CLASSIFICATION = ("ce", "focal", "cb-focal", "ldam", "bbn")               # these train a classifier too
TWO_VIEWS = ("supcon", "kcl-batch")                                       # two views of each image, no queue
QUEUE = ()                                                                # two views, key encoder and queue, like KCL
WHOLE_BATCH = ("bbn", "supcon", "kcl-batch")                              # these need the whole batch at once


# ---- called by train_rep.py

def network(args, encoder, counts):
    """The network for a loss. encoder: a torchvision-style constructor; counts (C,): training images per class."""
    C = len(counts)
    if args.loss in TWO_VIEWS:
        return with_head(encoder, args.dim, args.mlp)
    if args.loss == "bbn":
        return BBN(encoder, C)

    model = encoder(num_classes=C)
    if args.loss == "ldam":
        model.fc = NormedLinear(model.fc.in_features, C)
    if args.loss in ("focal", "cb-focal"):
        nn.init.constant_(model.fc.bias, -math.log(C - 1))                # sigmoids start at 1 / C
    return model


def criterion(args, model, counts, epoch):
    """The loss function for an epoch. It depends only on these arguments, so a resumed run can rebuild it."""
    device, t = next(model.parameters()).device, epoch / args.epochs
    if args.loss == "bbn":
        model.alpha = 1 - t ** 2  # eq. 6, from the conventional to the reversed sampler
        return partial(bbn_loss, alpha=model.alpha)
    if args.loss in ("supcon", "kcl-batch"):
        num_positives = args.num_positives if args.loss == "kcl-batch" else None
        return partial(supcon_of_all_ranks, temperature=args.temperature, num_positives=num_positives)

    weight = None
    if args.loss == "cb-focal":
        weight = effective_number_weights(counts, 0.999).to(device)       # Cui et al. on iNaturalist
    if args.drw and t >= 0.8:                                             # from epoch 160 of 200, as in Cao et al. 2019
        weight = effective_number_weights(counts, 0.9999).to(device)
    if args.loss == "ce":
        return partial(F.cross_entropy, weight=weight)
    if args.loss == "ldam":
        return partial(ldam_loss, margins=ldam_margins(counts).to(device), weight=weight)
    if args.loss == "focal":
        return focal_loss
    if args.loss == "cb-focal":
        return partial(focal_loss, gamma=0.5, weight=weight)
    raise NotImplementedError(f"baselines.criterion has no branch for --loss {args.loss}")


def weight_and_bias(classifier):
    """Weight (C, D) and bias (C,), on the CPU, of a linear layer that makes the same decisions as the classifier."""
    weight = classifier.weight.detach().cpu().clone()
    if isinstance(classifier, NormedLinear):  # the norm of an image's features does not change the order of its logits
        return F.normalize(weight), torch.zeros(len(weight))
    return weight, classifier.bias.detach().cpu().clone()


# ---- re-weighting

def effective_number_weights(counts, beta):
    """Class weights (C,) ~ (1 - beta) / (1 - beta^n_c), scaled to sum to C: Cui et al., "Class-Balanced Loss Based on
    Effective Number of Samples", CVPR 2019, eq. 2 and sec. 4.

    counts (C,): training images per class; a class without images counts as 1. beta in [0, 1): at 0 all weights are
    equal, and towards 1 they become proportional to 1 / n_c. Raises ValueError for any other beta.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"expected 0 <= beta < 1, got {beta}")
    n = torch.as_tensor(counts).double().clamp(min=1)
    weight = (1 - beta) / (1 - beta ** n)
    return (weight / weight.sum() * len(n)).float()


def focal_loss(logits, labels, gamma=2.0, weight=None):
    """Mean over the batch of weight_y * sum_c -(1 - p_c)^gamma log p_c, with a sigmoid per class: p_c = sigmoid(z_c)
    for the label and 1 - sigmoid(z_c) for all others. Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017,
    eq. 4, summed over classes as in Cui et al. 2019, sec. 4.3.

    logits (B, C), labels (B,). Lin et al. use gamma 2. With gamma 0 and no weight, the loss is the binary cross-entropy
    summed over classes. With effective_number_weights as weight (C,) it is CB-Focal, for which Cui et al. use gamma 0.5
    and beta 0.999 on iNaturalist and ImageNet. Start the classifier's bias at -log(C - 1), their prior of 1 / C, or the
    many negatives make the first steps unstable. Their code exempts that bias from weight decay; train_rep.py does not.
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
    """Delta_c ~ n_c^(-1/4), (C,), Cao et al. 2019, eq. 13. The smallest class gets the largest margin, max_margin."""
    margins = torch.as_tensor(counts).double().clamp(min=1) ** -0.25
    return (margins * max_margin / margins.max()).float()


def ldam_loss(cosines, labels, margins, scale=30.0, weight=None):
    """Cross-entropy of scale * (cos_c - Delta_c [c = label]): Cao et al., "Learning Imbalanced Datasets with
    Label-Distribution-Aware Margin Loss", NeurIPS 2019, eqs 12 and 13, with the scale and largest margin of their code.

    cosines (B, C) of a NormedLinear, labels (B,), margins (C,); weight (C,) or None as in F.cross_entropy.
    """
    one_hot = F.one_hot(labels, cosines.shape[1])                         # (B, C)
    return F.cross_entropy(scale * (cosines - margins * one_hot), labels, weight=weight)


# ---- BBN

class BBN(nn.Module):
    """The bilateral-branch network: Zhou et al., "BBN: Bilateral-Branch Network with Cumulative Learning for
    Long-Tailed Visual Recognition", CVPR 2020, sec. 4. It needs the `bilateral` batches of data.py.

    In training the images (2 * B, 3, H, W) are those of the conventional sampler, then those of the reversed one. The
    logits (B, C) are a linear layer of 2 * [alpha * f_c, (1 - alpha) * f_r]. In evaluation every image goes through
    both branches, and the logits are that layer of [f_c, f_r], as with alpha = 1/2.
    """

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.encoder = encoder()
        D, self.encoder.fc = self.encoder.fc.in_features, nn.Identity()
        self.branches = [branch(self.encoder)]  # in a list, so that it is not registered twice
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
    """alpha * CE(logits, y_c) + (1 - alpha) * CE(logits, y_r), eq. 5. logits (B, C), labels (2 * B,): y_c, then y_r."""
    labels, reversed_labels = labels.chunk(2)
    return alpha * F.cross_entropy(logits, labels) + (1 - alpha) * F.cross_entropy(logits, reversed_labels)


# ---- KCL and FCL inside the batch

def supcon_loss(z, labels, temperature=0.07, num_positives=None):
    """Every embedding of the batch is an anchor. Its positives are its own other view and same-class embeddings of
    other images. The denominator has all embeddings except the anchor itself. There is no queue and no key encoder.

    z (2N, d)      unit embeddings of N images: all first views, then all second views in the same order
    labels (2N,)   int. A label below 0 means unknown: the only positive is the own other view
    num_positives  None takes the whole class. This is Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020,
                   eq. 2 (L_out), and the paper's FCL inside the batch. A number k draws k embeddings at random without
                   replacement, in addition to the own other view. This is eq. 4 as sec. 4 of the paper writes it. If
                   the class has fewer, all are taken, and the divisor is 1 + the number found

    Returns the mean over anchors, a scalar in fp32 or float64.
    """
    self_mask = torch.eye(len(z), dtype=torch.bool, device=z.device)      # (2N, 2N)
    other_view = self_mask.roll(len(z) // 2, dims=1)                      # (2N, 2N)
    same_class = (labels[:, None] == labels) & (labels >= 0)
    positive = choose_positives(same_class & ~self_mask & ~other_view, num_positives) | other_view

    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        logits = (z @ z.T / temperature).masked_fill(self_mask, -torch.inf)
        log_p = logits.log_softmax(dim=1)
        return (-log_p.where(positive, 0).sum(1) / positive.sum(1)).mean()


def supcon_of_all_ranks(z, labels, temperature=0.07, num_positives=None):
    """supcon_loss over the images of all ranks. z (2b, d) holds both views of this rank's b images, not normalised, and
    labels (b,) is theirs. Every rank computes the same loss and must draw the same positives, so use the same torch
    seed on all of them.

    The gradient reaches only this rank's embeddings. It is multiplied by the number of ranks because DDP averages over
    ranks: the average is then the gradient of the whole loss.
    """
    z, W, b = F.normalize(z), ddp.world(), len(labels)
    shares = list(ddp.gather(z.detach()).split(2 * b))
    shares[ddp.rank()] = z
    views = torch.stack(shares).view(W, 2, b, -1).transpose(0, 1)         # (2, W, b, d), as supcon_loss wants them
    loss = supcon_loss(views.flatten(0, 2), ddp.gather(labels).repeat(2), temperature, num_positives)
    return loss.detach() + W * (loss - loss.detach())
