"""
kcl_loss without a (B, K) tensor. Use it if you run out of memory with large B and K, or train on a CPU with K >= 4,096.
The scripts do not use it: at the paper's sizes, 256 queries and K = 65,536, `kcl_loss` is faster on a GPU. There it
takes 272 MiB and this version takes 5.

    from kcl_fast import fast_kcl_loss as kcl_loss    # the same arguments, but other random positives

It needs torch and kcl.py. tools/bench.py compares the two.
"""
import math

import torch

from kcl import check_shapes, kcl_loss


def choose_slots(labels, queue_labels, num_positives=6):
    """Choose the positives as kcl.choose_positives does, without a (B, K) mask.

    Returns slots (B, k) int64 and found (B, k) bool, with k = num_positives. found is False for slots that a class with
    fewer keys cannot fill.

    Once the queue is sorted by label, each class is a range of n keys. Each query draws k places in its range with
    Floyd's method ("A sample of brilliance", CACM 1987): place j is uniform in the first n - k + j + 1. If that place
    was drawn before, the last of these is taken instead.
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
    place = place.where(n > num_positives, step)                          # with k keys or fewer, take all of them
    return order[(first[:, None] + place).clamp(max=len(order) - 1)], step < n


def class_sums(labels, queue, queue_labels):
    """FCL's positives, also without a mask: the sum (B, d) and number (B,) of queue keys with the query's label."""
    classes = labels.sort().values                                        # (B,), a class may occur more than once
    at = torch.searchsorted(classes, queue_labels).clamp(max=len(classes) - 1)
    of_a_query = (classes[at] == queue_labels) & (queue_labels >= 0)
    at = at.where(of_a_query, len(classes))                               # (K,), B if no query has the class
    sums = queue.new_zeros(len(classes) + 1, queue.shape[1]).index_add(0, at, queue)
    n = at.new_zeros(len(classes) + 1).index_add(0, at, torch.ones_like(at))
    first = torch.searchsorted(classes, labels)                           # (B,), the row that has the class's sum
    return sums[first], n[first]


def fast_kcl_loss(q, k, queue, labels, queue_labels, num_positives=6, temperature=0.07,
                  fixed_divisor=False, drop_unused=False, first_k=False, reduction="mean", chunk=None):
    """Same arguments and result as kcl_loss, but it draws other positives. In addition to its inputs it needs a few
    (B, chunk) and (B, d) tensors. On a CPU it takes the time of two matmuls, q @ queue^T and softmax @ queue.

    Rows must be unit vectors. Then |logit| <= 1/T, and exp stays inside fp32 (exp(1/0.03) = 3e14) without subtracting
    the maximum. Longer rows may give inf or nan. One pass over chunks of the queue computes loss and gradient. With
    u = q / T, Z the sum of exp over own view and queue, m the number of positives, and D the divisor, they are
        loss         (m * log Z - u . sum of positive keys) / D
        d loss / du  (m * softmax-weighted mean of all keys - sum of positive keys) / D
    chunk is the number of keys per matmul. The default is 1024 on a CPU, whose cache holds it for B = 256. On a GPU a
    kernel launch takes longer than its arithmetic, so chunks are larger: (B, chunk) takes 4 MiB.

    torch.compile(fullgraph=True) and torch.func.grad work. Use kcl_loss for vmap, and for a second derivative (a
    gradient penalty), which would be silently wrong here.
    This function calls kcl_loss for drop_unused, first_k, an empty queue, T as a tensor, and T < 0.03. At T = 0.011 a
    single exp(1/T) overflows fp32, and Z sums up to K of them.
    """
    if drop_unused or first_k or not len(queue) or isinstance(temperature, torch.Tensor) or temperature < 0.03:
        return kcl_loss(q, k, queue, labels, queue_labels, num_positives, temperature, fixed_divisor, drop_unused,
                        first_k, reduction)
    check_shapes(q, k, queue, labels, queue_labels)
    chunk = chunk or (2**20 // len(q) if q.is_cuda else 1024)
    labels, queue_labels = labels.contiguous(), queue_labels.contiguous()  # otherwise searchsorted warns and copies

    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, queue = q.to(dtype), k.detach().to(dtype), queue.detach().to(dtype)
        u = q / temperature                                               # (B, d), the only tensor with a gradient
        with torch.no_grad():
            # sum and number of the positives
            if num_positives is None:
                positive_sum, found = class_sums(labels, queue, queue_labels)
            else:
                slots, drawn = choose_slots(labels, queue_labels, num_positives)
                positive_sum, found = (queue[slots] * drawn[:, :, None]).sum(1), drawn.sum(1)
            positive_sum, m = k + positive_sum, 1 + found                 # (B, d), (B,)
            divisor = torch.full_like(m, 1 + num_positives) if fixed_divisor else m

            # the softmax over own view and queue, chunk by chunk
            scaled = u * math.log2(math.e)                                # on a CPU 2^x takes a quarter of exp's time
            e = (scaled * k).sum(1).exp2()                                # (B,), of the own view
            Z, weighted = e.clone(), e[:, None] * k                       # (B,), (B, d)
            logits = u.new_empty(len(u) * min(chunk, len(queue)))         # one buffer for all chunks stays in the cache
            for begin in range(0, len(queue), chunk):
                keys = queue[begin:begin + chunk]                         # (c, d)
                e = logits[:len(u) * len(keys)].view(len(u), len(keys))   # (B, c)
                torch.mm(scaled, keys.T, out=e).exp2_()
                Z += e.sum(1)
                weighted.addmm_(e, keys)
            value = (m * Z.log() - (u * positive_sum).sum(1)) / divisor   # (B,)
            gradient = ((m / Z)[:, None] * weighted - positive_sum) / divisor[:, None]    # (B, d)
        loss = value + (gradient * (u - u.detach())).sum(1)               # adds 0, which carries the gradient
    return {"mean": loss.mean(), "none": loss}[reduction]
