"""
k-positive contrastive learning (KCL): the loss. Needs torch and nothing else; copy this one file.

    from kcl import kcl_loss
    loss = kcl_loss(q, k, queue, labels, queue_labels)                       # KCL, k = 6
    loss = kcl_loss(q, k, queue, labels, queue_labels, num_positives=0)      # CL: MoCo's InfoNCE, eq. 2
    loss = kcl_loss(q, k, queue, labels, queue_labels, num_positives=None)   # FCL: all same-class keys are positives
    loss = fast_kcl_loss(q, k, queue, labels, queue_labels)                  # the same, without a (B, K) tensor

"Exploring Balanced Feature Spaces for Representation Learning", Kang, Li, Xie, Yuan, Feng, ICLR 2021, eq. 4.
"""
import math

import torch


def choose_positives(labels, queue_labels, num_positives=6, first_k=False):
    """Which queue slots serve as positives of which query (V+_{i,k} of eq. 4).

    labels (B,) int and queue_labels (K,) int; a label below 0 matches nothing (an empty slot, an unlabelled query).
    num_positives: k slots of the query's class at random, without replacement, every such slot equally likely; all of
    them where the class has fewer than k; None takes all always. first_k: the k lowest slots in place of random ones.
    Returns a bool mask (B, K).
    """
    same = (labels[:, None] == queue_labels) & (queue_labels >= 0)        # (B, K)
    if num_positives is None:
        return same
    K = same.shape[1]
    lottery = torch.arange(K, 0, -1.0, device=same.device) if first_k else torch.rand(same.shape, device=same.device)
    lottery = lottery.expand_as(same).masked_fill(~same, -1)
    winners = lottery.topk(min(num_positives, K), dim=1).indices  # (B, min(k, K))
    return torch.zeros_like(same).scatter_(1, winners, True) & same


def check(q, k, queue, labels, queue_labels, num_positives, temperature, fixed_divisor):
    """Raise ValueError on shapes or settings that do not fit."""
    B, d, K = len(q), q.shape[-1], len(queue)
    got = [tuple(x.shape) for x in (q, k, queue, labels, queue_labels)]
    if got != [(B, d), (B, d), (K, d), (B,), (K,)]:
        raise ValueError("expected q (B, d), k (B, d), queue (K, d), labels (B,), queue_labels (K,); got " +
                         ", ".join(map(str, got)))
    if labels.is_floating_point() or queue_labels.is_floating_point():
        raise ValueError(f"expected integer labels and queue_labels, got {labels.dtype} and {queue_labels.dtype}")
    if num_positives is not None and num_positives < 0 or num_positives is None and fixed_divisor or temperature <= 0:
        raise ValueError("expected temperature > 0, and num_positives >= 0, or None for all, which has no fixed "
                         f"divisor; got {temperature}, {num_positives} with fixed_divisor={fixed_divisor}")


def kcl_loss(q, k, queue, labels, queue_labels, num_positives=6, temperature=0.07,
             fixed_divisor=False, drop_unused=False, first_k=False):
    """The k-positive contrastive loss, eq. 4: the mean over queries i of
    1/(1+k) * sum over positives j of -log softmax_j([q.k, q.queue^T] / T); positives = own other view + k drawn keys.

    q             (B, d)  queries, unit rows; the only input that gets a gradient
    k             (B, d)  keys of the same images' other view, unit rows
    queue         (K, d)  earlier keys, unit rows, none of this batch; all are in the denominator, whatever their label
    labels        (B,)    int class of each query; below 0 = unknown, only its own view is a positive
    queue_labels  (K,)    int class of each queue slot, -1 = empty or unknown: never a positive
    num_positives         k of the paper: 6 = KCL, 0 = CL (InfoNCE, eq. 2), None = all of the class (FCL)
    temperature           T (tau in the paper)
    fixed_divisor         divide by k + 1 to the letter of eq. 4, also where a class has fewer than k keys in the queue.
                          Default: divide by 1 + the number found, so that tail classes are not weighted down
    drop_unused           leave same-class keys that were not drawn out of the denominator. Default: they stay (eq. 4)
    first_k               the k lowest slots of the class in place of random ones, what topk makes of a 0/1 mask

    Returns a scalar, in fp32 also under autocast and for half inputs (float64 stays float64); finite for any queue,
    with K = 0 or no positive in it too. Raises ValueError on shapes or settings that do not fit.
    """
    check(q, k, queue, labels, queue_labels, num_positives, temperature, fixed_divisor)
    positive = choose_positives(labels, queue_labels, num_positives, first_k)   # (B, K)
    own = positive.new_ones(len(q), 1)                                    # slot 0, the own other view, always counts
    with torch.autocast(q.device.type, enabled=False):                    # exp(1/0.07) = 1.6e6 overflows fp16
        q, k, queue = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k.detach(), queue.detach()))
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature  # (B, 1+K)
        if drop_unused:
            unused = choose_positives(labels, queue_labels, None) & ~positive
            logits = logits.masked_fill(torch.cat([~own, unused], dim=1), -torch.inf)
        positive = torch.cat([own, positive], dim=1)                      # (B, 1+K)
        log_p = logits.log_softmax(dim=1)
        summed = log_p.where(positive, 0).sum(1)                          # where, not *: -inf * 0 is nan
        divisor = 1 + num_positives if fixed_divisor else positive.sum(1)
        return -(summed / divisor).mean()


# ---- the same at the cost of its two matmuls, q @ queue^T and softmax @ queue: for large B and K

def choose_slots(labels, queue_labels, num_positives=6, first_k=False):
    """What choose_positives does, without a (B, K) mask: slots (B, k) int64 and taken (B, k) bool, k = num_positives.

    Sorted by label, a class is a range of n slots, of which each query draws k places after Floyd ("A sample of
    brilliance", CACM 1987): the j-th is uniform in the first n - k + j + 1, or the last of these if that one is taken.
    """
    by_label, order = queue_labels.sort(stable=first_k)                   # (K,)
    first = torch.searchsorted(by_label, labels)                          # (B,)
    n = ((torch.searchsorted(by_label, labels, right=True) - first) * (labels >= 0))[:, None]   # (B, 1)
    step = torch.arange(num_positives, device=labels.device)
    last = (n - num_positives).clamp(min=0) + step                        # (B, k)
    place = (torch.rand(last.shape, device=labels.device, dtype=torch.float64) * (last + 1)).long()
    for j in range(1, num_positives):
        repeated = (place[:, :j] == place[:, j:j + 1]).any(1)
        place[:, j] = last[:, j].where(repeated, place[:, j])
    if first_k:
        place = step
    place = place.where(n > num_positives, step)                          # all of a class that has no more than k
    return order[(first[:, None] + place).clamp(max=len(order) - 1)], step < n


def class_sums(labels, queue, queue_labels):
    """FCL's positives: the sum (B, d) and number (B,) of the queue's keys of each query's class, without a mask too."""
    classes = labels.sort().values                                        # (B,), a class may be there more than once
    at = torch.searchsorted(classes, queue_labels).clamp(max=len(classes) - 1)
    at = at.where((classes[at] == queue_labels) & (queue_labels >= 0), len(classes))            # (K,), B = of no query
    sums = queue.new_zeros(len(classes) + 1, queue.shape[1]).index_add_(0, at, queue)
    n = torch.zeros(len(classes) + 1, dtype=torch.long, device=at.device).index_add_(0, at, torch.ones_like(at))
    mine = torch.searchsorted(classes, labels)                            # the first place of the query's class
    return sums[mine] * (labels >= 0)[:, None], n[mine] * (labels >= 0)


class FusedKCL(torch.autograd.Function):
    """Loss and its gradient in one pass over chunks of the queue. Both sides are unit vectors, so |logit| <= 1/T and
    exp stays inside fp32 (exp(1/0.03) = 3e14) with no maximum to subtract. It is taken as 2^(logit log2 e): on a CPU a
    quarter of exp's time. With Z the sum of exp over own view and queue, m the positives and D the divisor, a query's
    loss is (m log Z - sum of positive logits) / D, and
    d loss / d q = (m softmax-weighted mean of the keys - sum of positive keys) / (D T)."""

    @staticmethod
    def forward(ctx, q, k, queue, positive_sum, m, divisor, forbidden, temperature, chunk):
        scaled = q * (math.log2(math.e) / temperature)
        e = (scaled * k).sum(1).exp2()                                    # (B,), the own view's
        Z, weighted = e.clone(), e[:, None] * k                           # (B,), (B, d)
        logits = q.new_empty(len(q), min(chunk, len(queue)))              # one for all chunks: it stays in the cache
        for begin in range(0, len(queue), chunk):
            keys = queue[begin:begin + chunk]                             # (c, d)
            e = torch.mm(scaled, keys.T, out=logits[:, :len(keys)]).exp2_()  # (B, c)
            if forbidden is not None:
                e.masked_fill_(forbidden(begin, begin + len(keys)), 0)
            Z += e.sum(1)
            weighted.addmm_(e, keys)
        positive_logits = (q * positive_sum).sum(1) / temperature         # their sum
        ctx.save_for_backward(((m / Z)[:, None] * weighted - positive_sum) / (divisor[:, None] * temperature * len(q)))
        return ((m * Z.log() - positive_logits) / divisor).mean()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("fast_kcl_loss has no second derivative; use kcl_loss")
        return grad * ctx.saved_tensors[0], *[None] * 8


def fast_kcl_loss(q, k, queue, labels, queue_labels, num_positives=6, temperature=0.07,
                  fixed_divisor=False, drop_unused=False, first_k=False, chunk=None):
    """kcl_loss with the same arguments, result and errors, but other draws of the positives: its memory beyond the
    inputs is a few (B, chunk) and (B, d) tensors, its time that of two matmuls. Rows must be unit vectors, or exp
    overflows. chunk: keys at a time; by default 1024, which a CPU's cache holds for B = 256, and 4096 on a GPU, where
    launches take longer than the arithmetic.

    Below T = 0.03 (at 0.011 exp(1 / T) leaves fp32) and with an empty queue it is kcl_loss itself. Differentiable once:
    a second derivative raises RuntimeError.
    """
    check(q, k, queue, labels, queue_labels, num_positives, temperature, fixed_divisor)
    if temperature < 0.03 or not len(queue):
        return kcl_loss(q, k, queue, labels, queue_labels, num_positives, temperature, fixed_divisor, drop_unused,
                        first_k)
    chunk = chunk or (4096 if q.is_cuda else 1024)
    labels, queue_labels = labels.contiguous(), queue_labels.contiguous()  # or searchsorted copies, and warns
    with torch.autocast(q.device.type, enabled=False):
        q, k, queue = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k.detach(), queue.detach()))
        slots = taken = None
        if num_positives is None:
            positive_sum, found = class_sums(labels, queue, queue_labels)
        else:
            slots, taken = choose_slots(labels, queue_labels, num_positives, first_k)
            positive_sum, found = (queue[slots] * taken[:, :, None]).sum(1), taken.sum(1)

        def forbidden(begin, end):
            """(B, end - begin): the keys of the query's class that were not drawn."""
            same = (labels[:, None] == queue_labels[begin:end]) & (labels >= 0)[:, None]
            inside = taken & (slots >= begin) & (slots < end)
            at = (slots - begin).where(inside, end - begin)               # one column more, for what lies elsewhere
            drawn = same.new_zeros(len(same), end - begin + 1).scatter_(1, at, True)
            return same & ~drawn[:, :-1]

        m = (1 + found).to(q.dtype)                                       # (B,)
        divisor = torch.full_like(m, 1 + num_positives) if fixed_divisor else m
        return FusedKCL.apply(q, k, queue, k + positive_sum, m, divisor,
                              forbidden if drop_unused and num_positives is not None else None, temperature, chunk)
