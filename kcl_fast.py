"""
kcl_loss without a (B, K) tensor: for researchers who run out of memory with large B and K, and for training on a CPU
with K >= 4,096. Nothing here trains with it: with the paper's sizes `kcl_loss` is faster on a GPU and takes 288 MiB for
256 queries and K = 65,536, where this takes 5.

    from kcl_fast import fast_kcl_loss as kcl_loss    # the same arguments, other draws of the positives

Needs torch and kcl.py. tools/bench.py compares the two.
"""
import math

import torch

from kcl import check_shapes, kcl_loss


def choose_slots(labels, queue_labels, num_positives=6):
    """Choose the positives as kcl.choose_positives does, without a (B, K) mask.

    Returns slots (B, k) int64 and found (B, k) bool, k = num_positives: a class with fewer keys leaves slots unfound.

    Sorted by label, a class is a range of n slots. Each query draws k places in its range by Floyd's method ("A sample
    of brilliance", CACM 1987): place j is uniform in the first n - k + j + 1, or the last of these if it was drawn
    before.
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
    place = place.where(n > num_positives, step)                          # all of a class with k keys or fewer
    return order[(first[:, None] + place).clamp(max=len(order) - 1)], step < n


def class_sums(labels, queue, queue_labels):
    """FCL's positives, without a mask too: the sum (B, d) and number (B,) of the queue's keys of each query's class."""
    classes = labels.sort().values                                        # (B,), a class may occur more than once
    at = torch.searchsorted(classes, queue_labels).clamp(max=len(classes) - 1)
    of_a_query = (classes[at] == queue_labels) & (queue_labels >= 0)
    at = at.where(of_a_query, len(classes))                               # (K,), B = the class of no query
    sums = queue.new_zeros(len(classes) + 1, queue.shape[1]).index_add(0, at, queue)
    n = at.new_zeros(len(classes) + 1).index_add(0, at, torch.ones_like(at))
    first = torch.searchsorted(classes, labels)                           # (B,), where the class was counted
    return sums[first], n[first]


def fast_kcl_loss(q, k, queue, labels, queue_labels, num_positives=6, temperature=0.07,
                  fixed_divisor=False, drop_unused=False, first_k=False, reduction="mean", chunk=None):
    """kcl_loss with the same arguments and result, but other draws of the positives. Beyond the inputs it needs a few
    (B, chunk) and (B, d) tensors; on a CPU it takes the time of two matmuls, q @ queue^T and softmax @ queue.

    Rows must be unit vectors: then |logit| <= 1/T, and exp stays inside fp32 (exp(1/0.03) = 3e14) without a maximum to
    subtract. Longer rows may give inf or nan. One pass over chunks of the queue gives loss and gradient. With
    u = q / T, Z the sum of exp over own view and queue, m the number of positives, and D the divisor:
        loss         (m log Z - u . sum of positive keys) / D
        d loss / du  (m softmax-weighted mean of all keys - sum of positive keys) / D
    chunk: keys at a time. The default is 1024 on a CPU, whose cache holds it for B = 256. On a GPU, where a launch
    takes longer than its arithmetic, it is so many that B x chunk numbers are 4 MiB.

    torch.compile(fullgraph=True) and torch.func.grad work. Use kcl_loss for vmap, and for a second derivative (a
    gradient penalty), which would be silently wrong here.
    It calls kcl_loss itself for drop_unused, first_k, an empty queue, T as a tensor, and T < 0.03: at 0.011 a single
    exp(1/T) leaves fp32, and Z sums up to K of them.
    """
    if drop_unused or first_k or not len(queue) or isinstance(temperature, torch.Tensor) or temperature < 0.03:
        return kcl_loss(q, k, queue, labels, queue_labels, num_positives, temperature, fixed_divisor, drop_unused,
                        first_k, reduction)
    check_shapes(q, k, queue, labels, queue_labels)
    chunk = chunk or (2**20 // len(q) if q.is_cuda else 1024)
    labels, queue_labels = labels.contiguous(), queue_labels.contiguous()  # or searchsorted copies, and warns

    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, queue = q.to(dtype), k.detach().to(dtype), queue.detach().to(dtype)
        u = q / temperature                                               # (B, d), the only one with a gradient
        with torch.no_grad():
            # the positives: sum and number
            if num_positives is None:
                positive_sum, found = class_sums(labels, queue, queue_labels)
            else:
                slots, drawn = choose_slots(labels, queue_labels, num_positives)
                positive_sum, found = (queue[slots] * drawn[:, :, None]).sum(1), drawn.sum(1)
            positive_sum, m = k + positive_sum, 1 + found                 # (B, d), (B,)
            divisor = torch.full_like(m, 1 + num_positives) if fixed_divisor else m

            # the softmax over own view and queue, chunk by chunk
            scaled = u * math.log2(math.e)                                # exp as 2^x: a quarter of its time on a CPU
            e = (scaled * k).sum(1).exp2()                                # (B,), of the own view
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
