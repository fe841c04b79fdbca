"""
k-positive contrastive learning (KCL): the loss. Needs torch and nothing else; copy this one file.

    from kcl import kcl_loss
    loss = kcl_loss(q, k, queue, labels, queue_labels)                       # KCL, k = 6
    loss = kcl_loss(q, k, queue, labels, queue_labels, num_positives=0)      # CL: MoCo's InfoNCE, eq. 2
    loss = kcl_loss(q, k, queue, labels, queue_labels, num_positives=None)   # FCL: all same-class keys are positives
    loss = fast_kcl_loss(q, k, queue, labels, queue_labels)                  # without a (B, K) tensor; other draws

"Exploring Balanced Feature Spaces for Representation Learning", Kang, Li, Xie, Yuan, Feng, ICLR 2021, eq. 4.
"""
import math

import torch


def choose_positives(labels, queue_labels, num_positives=6, first_k=False):
    """Which queue slots are positives of which query: V+_{i,k} of eq. 4.

    labels (B,) int and queue_labels (K,) int; a label below 0 matches nothing: an empty slot, an unlabelled query.
    num_positives: k slots of the query's class, drawn at random without replacement; all of them where the class has
    fewer than k. None takes all always. first_k: the k lowest slots of the class in place of random ones.
    Returns a bool mask (B, K).
    """
    same = (labels[:, None] == queue_labels) & (queue_labels >= 0)        # (B, K)
    if num_positives is None:
        return same
    if num_positives == 0:
        return torch.zeros_like(same)
    K = same.shape[1]
    lottery = torch.arange(K, 0, -1.0, device=same.device) if first_k else torch.rand(same.shape, device=same.device)
    winners = lottery.where(same, -1).topk(min(num_positives, K), dim=1).indices    # (B, min(k, K))
    return torch.zeros_like(same).scatter(1, winners, True) & same


def kcl_loss(q, k, queue, labels, queue_labels, num_positives=6, temperature=0.07,
             fixed_divisor=False, drop_unused=False, first_k=False, reduction="mean"):
    """The k-positive contrastive loss, eq. 4: the mean over queries i of
    1/(1+k) * sum over positives j of -log softmax_j([q.k, q.queue^T] / T); positives = own other view + k drawn keys.
    Where the queue has fewer than k of the class, k is the number found, as in the authors' code.

    q             (B, d)  queries, unit rows
    k             (B, d)  keys of the same images' other view, unit rows; no gradient flows into k and queue
    queue         (K, d)  earlier keys, unit rows, none of this batch; all are in the denominator, whatever their label,
                          empty slots too: pass queue[:filled]
    labels        (B,)    int class of each query; below 0 = unknown, only its own view is a positive (for CL: any)
    queue_labels  (K,)    int class of each queue slot, -1 = empty or unknown: never a positive
    num_positives         k of the paper: 6 = KCL, 0 = CL (InfoNCE, eq. 2), None = all of the class (FCL)
    temperature           T (tau in the paper), a number or a tensor, which may be learned
    fixed_divisor         divide by k + 1 to the letter of eq. 4, also where a class has fewer than k keys in the queue.
                          Default: divide by 1 + the number found, so that tail classes are not weighted down.
                          FCL has no k to divide by
    drop_unused           leave same-class keys that were not drawn out of the denominator. Default: they stay (eq. 4)
    first_k               the k lowest slots of the class in place of random ones, as the authors' code in effect
    reduction             "mean", a scalar; or "none", the loss of each query (B,)

    Computes in fp32 also under autocast and for half inputs; float64 stays float64. The loss is finite for any queue,
    with K = 0 or without a positive in it too. vmap needs randomness="different". Raises ValueError on shapes that do
    not fit.
    """
    check_shapes(q, k, queue, labels, queue_labels)
    positive = choose_positives(labels, queue_labels, num_positives, first_k)   # (B, K)
    own = positive.new_ones(len(q), 1)                                    # slot 0, the own other view, always counts

    with torch.autocast(q.device.type, enabled=False):                    # half precision would round 1/0.07 = 14
        q, k, queue = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k.detach(), queue.detach()))
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature  # (B, 1+K)
        if drop_unused:
            unused = choose_positives(labels, queue_labels, None) & ~positive
            logits = logits.masked_fill(torch.cat([~own, unused], dim=1), -torch.inf)
        positive = torch.cat([own, positive], dim=1)                      # (B, 1+K)
        log_p = logits.log_softmax(dim=1)
        summed = log_p.where(positive, 0).sum(1)                          # where, not *: -inf * 0 is nan
        divisor = 1 + num_positives if fixed_divisor else positive.sum(1)
        loss = -summed / divisor                                          # (B,)
    return {"mean": loss.mean(), "none": loss}[reduction]


def check_shapes(q, k, queue, labels, queue_labels):
    """Raise ValueError where shapes would broadcast to something else."""
    B, d, K = len(q), q.shape[-1], len(queue)
    found = [tuple(x.shape) for x in (q, k, queue, labels, queue_labels)]
    if found != [(B, d), (B, d), (K, d), (B,), (K,)]:
        raise ValueError(f"expected q (B, d), k (B, d), queue (K, d), labels (B,), queue_labels (K,); got {found}")


# ---- the same, on a CPU at the cost of its two matmuls, q @ queue^T and softmax @ queue: for large B and K

def choose_slots(labels, queue_labels, num_positives=6):
    """What choose_positives does, without a (B, K) mask: slots (B, k) int64 and taken (B, k) bool, k = num_positives.

    Sorted by label, a class is a range of n slots, of which each query draws k places after Floyd ("A sample of
    brilliance", CACM 1987): the j-th is uniform in the first n - k + j + 1, or the last of these if that one is taken.
    """
    by_label, order = queue_labels.sort()                                 # (K,)
    first = torch.searchsorted(by_label, labels)                          # (B,)
    n = torch.searchsorted(by_label, labels, right=True) - first
    n = (n * (labels >= 0))[:, None]                                      # (B, 1)
    step = torch.arange(num_positives, device=labels.device)
    last = (n - num_positives).clamp(min=0) + step                        # (B, k)
    place = (torch.rand(last.shape, device=labels.device, dtype=torch.float64) * (last + 1)).long()
    for j in range(1, num_positives):
        repeated = (place[:, :j] == place[:, j:j + 1]).any(1)
        place[:, j] = last[:, j].where(repeated, place[:, j])
    place = place.where(n > num_positives, step)                          # all of a class that has no more than k
    return order[(first[:, None] + place).clamp(max=len(order) - 1)], step < n


def class_sums(labels, queue, queue_labels):
    """FCL's positives: the sum (B, d) and number (B,) of the queue's keys of each query's class, without a mask too."""
    classes = labels.sort().values                                        # (B,), a class may be there more than once
    at = torch.searchsorted(classes, queue_labels).clamp(max=len(classes) - 1)
    at = at.where((classes[at] == queue_labels) & (queue_labels >= 0), len(classes))    # (K,), B = of no query
    sums = queue.new_zeros(len(classes) + 1, queue.shape[1]).index_add(0, at, queue)
    n = at.new_zeros(len(classes) + 1).index_add(0, at, torch.ones_like(at))
    mine = torch.searchsorted(classes, labels)                            # the first place of the query's class
    return sums[mine], n[mine]


def fast_kcl_loss(q, k, queue, labels, queue_labels, num_positives=6, temperature=0.07,
                  fixed_divisor=False, drop_unused=False, first_k=False, reduction="mean", chunk=None):
    """kcl_loss with the same arguments and result, but other draws of the positives. Its memory beyond the inputs is a
    few (B, chunk) and (B, d) tensors, its time on a CPU that of two matmuls.

    Rows must be unit vectors: |logit| <= 1/T then, and exp stays inside fp32 (exp(1/0.03) = 3e14) with no maximum to
    subtract; longer rows may give inf or nan. One pass over chunks of the queue gives loss and gradient. u = q / T, Z
    is the sum of exp over own view and queue, m the number of positives, D the divisor:
        loss         (m log Z - u . sum of positive keys) / D
        d loss / du  (m softmax-weighted mean of all keys - sum of positive keys) / D
    chunk: keys at a time, by default 1024, which a CPU's cache holds for B = 256, and on a GPU, where a launch takes
    longer than its arithmetic, so many that B x chunk numbers are 4 MiB.

    torch.compile(fullgraph=True) and torch.func.grad take it. For vmap take kcl_loss, and for a second derivative (a
    gradient penalty), which would be wrong here in silence.
    It is kcl_loss itself with drop_unused or first_k, an empty queue, T as a tensor, and T < 0.03: at 0.011 a single
    exp(1/T) leaves fp32, and Z sums up to K of them.
    """
    if drop_unused or first_k or not len(queue) or isinstance(temperature, torch.Tensor) or temperature < 0.03:
        return kcl_loss(q, k, queue, labels, queue_labels, num_positives, temperature, fixed_divisor, drop_unused,
                        first_k, reduction)
    check_shapes(q, k, queue, labels, queue_labels)
    chunk = chunk or (2**20 // len(q) if q.is_cuda else 1024)
    labels, queue_labels = labels.contiguous(), queue_labels.contiguous()  # or searchsorted copies, and warns

    with torch.autocast(q.device.type, enabled=False):
        q, k, queue = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k.detach(), queue.detach()))
        u = q / temperature                                               # (B, d), the only one with a gradient
        with torch.no_grad():
            if num_positives is None:
                positive_sum, found = class_sums(labels, queue, queue_labels)
            else:
                slots, taken = choose_slots(labels, queue_labels, num_positives)
                positive_sum, found = (queue[slots] * taken[:, :, None]).sum(1), taken.sum(1)
            positive_sum, m = k + positive_sum, 1 + found                 # (B, d), (B,)
            divisor = torch.full_like(m, 1 + num_positives) if fixed_divisor else m

            scaled = u * math.log2(math.e)                                # exp as 2^x: a quarter of its time on a CPU
            e = (scaled * k).sum(1).exp2()                                # (B,), the own view's
            Z, weighted = e.clone(), e[:, None] * k                       # (B,), (B, d)
            logits = u.new_empty(len(u) * min(chunk, len(queue)))         # one for all chunks: it stays in the cache
            for begin in range(0, len(queue), chunk):
                keys = queue[begin:begin + chunk]                         # (c, d)
                e = logits[:len(u) * len(keys)].view(len(u), len(keys))   # (B, c)
                torch.mm(scaled, keys.T, out=e).exp2_()
                Z += e.sum(1)
                weighted.addmm_(e, keys)
            value = (m * Z.log() - (u * positive_sum).sum(1)) / divisor   # (B,)
            gradient = ((m / Z)[:, None] * weighted - positive_sum) / divisor[:, None]    # (B, d)
        loss = value + (gradient * (u - u.detach())).sum(1)               # the value, with the gradient
    return {"mean": loss.mean(), "none": loss}[reduction]
