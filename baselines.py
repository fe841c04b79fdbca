"""
What KCL is compared with: the losses, classifiers and branches of the paper's tables, and two relatives it should stand
next to. Pure functions of logits or embeddings; train_rep.py calls them by --loss. Needs torch and kcl.py (TSC: scipy).

    focal, cb-focal   focal_loss, effective_number_weights     Lin et al. 2017; Cui et al. 2019
    ldam, --drw       ldam_loss, ldam_margins, NormedLinear    Cao et al. 2019
    bbn               BBN, bbn_loss                            Zhou et al. 2020
    supcon            supcon_loss: FCL inside the batch        Khosla et al. 2020
    tsc               tsc_loss, uniform_targets, Targets       Li et al. 2022

CE and its samplers, cRT, LWS, NCM, tau-norm and SSP are no losses of their own: train_rep.py --sampler and --init,
train_linear.py --classifier, evaluate.py --tau-norm.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from kcl import choose_positives

# train_rep.py --loss, kcl.py's among them, and the name in tables of those that train a classifier along
SUPERVISED = {"ce": "CE", "focal": "Focal", "cb-focal": "CB-Focal", "ldam": "LDAM", "bbn": "BBN"}  # on logits
CONTRASTIVE = ("cl", "kcl", "fcl", "supcon", "tsc")                                              # on embeddings


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
    make the first steps unstable.
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

class Branches(nn.Module):
    """A residual block and its copy. `use` (0: conventional, 1: re-balanced) picks one; None runs both and
    concatenates their channels."""

    def __init__(self, block):
        super().__init__()
        self.conventional, self.rebalanced, self.use = block, copy.deepcopy(block), None

    def forward(self, x):
        if self.use is None:
            return torch.cat([self.conventional(x), self.rebalanced(x)], dim=1)
        return self.rebalanced(x) if self.use else self.conventional(x)


def branch(encoder):
    """Give an encoder (torchvision's or CIFAR's ResNet, its fc an nn.Identity) BBN's two branches: the last residual
    block twice, all before it shared. Changes it in place; features double to (B, 2 D). Returns the Branches."""
    stage = getattr(encoder, "layer4", None) or encoder.layer3
    stage[-1] = Branches(stage[-1])
    return stage[-1]


class BBN(nn.Module):
    """The bilateral-branch network: Zhou et al., "BBN: Bilateral-Branch Network with Cumulative Learning for
    Long-Tailed Visual Recognition", CVPR 2020, sec. 4.

    In training: images (B, 3, H, W) of the conventional and of the reversed sampler, and alpha -> logits (B, C) of
    2 [alpha f_c, (1 - alpha) f_r]. In evaluation: images -> logits of [f_c, f_r], as at alpha = 1/2.
    """

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.encoder = encoder()
        D, self.encoder.fc = self.encoder.fc.in_features, nn.Identity()
        self.branches = [branch(self.encoder)]  # in a list: a part of the encoder, not a second module
        self.fc = nn.Linear(2 * D, num_classes)

    def forward(self, images, reversed_images=None, alpha=None):
        if reversed_images is None:
            return self.fc(self.encoder(images))
        features = []
        for use, x, share in ((0, images, alpha), (1, reversed_images, 1 - alpha)):
            self.branches[0].use = use
            features.append(share * self.encoder(x))                      # (B, D)
        self.branches[0].use = None
        return self.fc(2 * torch.cat(features, dim=1))


def bbn_alpha(epoch, epochs):
    """alpha = 1 - (t / T)^2, the parabolic decay of cumulative learning from the whole to the tail (eq. 6)."""
    return 1 - (epoch / epochs) ** 2


def bbn_loss(logits, labels, reversed_labels, alpha):
    """alpha CE(logits, labels) + (1 - alpha) CE(logits, reversed_labels), eq. 5; logits (B, C), labels (B,) each."""
    return alpha * F.cross_entropy(logits, labels) + (1 - alpha) * F.cross_entropy(logits, reversed_labels)


# ---- contrastive relatives

def supcon_loss(z, labels, temperature=0.07):
    """FCL as Khosla et al. mean it: all same-class embeddings of the batch are positives, all others but itself stand
    in the denominator; no queue, no key encoder. "Supervised Contrastive Learning", NeurIPS 2020, eq. 2 (L_out).

    z (N, d): unit embeddings, those of both views one after the other; labels (N,). The mean over embeddings that have
    a positive. Returns a scalar in fp32 or finer. Raises ValueError where none has one.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        self_ = torch.eye(len(z), dtype=torch.bool, device=z.device)
        positive = (labels[:, None] == labels) & ~self_                   # (N, N)
        found = positive.sum(1)
        if not found.any():
            raise ValueError("no embedding has a positive: expected both views of each image, one after the other")
        log_p = (z @ z.T / temperature).masked_fill(self_, -torch.inf).log_softmax(dim=1)
        return -(log_p.where(positive, 0).sum(1)[found > 0] / found[found > 0]).mean()


def uniform_targets(C, d, device="cpu", steps=1000, seed=0):
    """C unit vectors (C, d) spread over the sphere: the minimum of mean_i log sum_{j != i} exp(t_i . t_j / 0.07), found
    by Adam. Li et al., "Targeted Supervised Contrastive Learning for Long-Tailed Recognition", CVPR 2022, sec. 3.2,
    whose sum has j = i too: a constant exp(1 / 0.07) that buries the rest in fp32. For C <= d + 1 the minimum is the
    regular simplex, t_i . t_j = -1 / (C - 1). 13 s for 1000 classes on a CPU core, growing with C^2."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(C, d, generator=g).to(device).requires_grad_()
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

    def __init__(self, C, d, device="cpu"):
        super().__init__()
        self.register_buffer("targets", uniform_targets(C, d, device))    # (C, d)
        self.register_buffer("means", F.normalize(torch.randn(C, d)))     # (C, d)
        self.register_buffer("owned", torch.arange(C))                    # (C,) the target of each class

    def of_classes(self):
        """(C, d): row c is the target of class c."""
        return self.targets[self.owned]

    @torch.no_grad()
    def follow(self, q, labels):
        """Move the means of the classes in labels (N,) towards those of their unit queries q (N, d)."""
        classes, index = labels.unique(return_inverse=True)
        batch_means = torch.zeros(len(classes), q.shape[1], device=q.device).index_add_(0, index, q.float())
        self.means[classes] = F.normalize(0.9 * self.means[classes] + 0.1 * F.normalize(batch_means))

    @torch.no_grad()
    def assign(self):
        """The Hungarian method on means . targets: about 0.1 s for 1000 classes, growing with C^3, and it waits for the
        device. Raises ImportError without scipy."""
        from scipy.optimize import linear_sum_assignment
        _, owned = linear_sum_assignment((self.means @ self.targets.T).cpu().numpy(), maximize=True)
        self.owned.copy_(torch.from_numpy(owned))


def tsc_loss(q, k, queue, labels, queue_labels, targets, num_positives=6, temperature=0.07, weight=0.2):
    """KCL's loss with the class targets among the keys, plus weight * -log softmax of the query's own target: L_TSC of
    Li et al. 2022, eq. 4, with their lambda = 0.2.

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
