"""
k-positive contrastive learning (KCL): the loss. Needs torch and nothing else; copy this one file.

    from kcl import kcl_loss
    loss = kcl_loss(q, k, queue, labels, queue_labels)                       # KCL, k = 6
    loss = kcl_loss(q, k, queue, labels, queue_labels, num_positives=0)      # CL: MoCo's InfoNCE, eq. 2
    loss = kcl_loss(q, k, queue, labels, queue_labels, num_positives=None)   # FCL: all same-class keys are positives

"Exploring Balanced Feature Spaces for Representation Learning", Kang, Li, Xie, Yuan, Feng, ICLR 2021, eq. 4.
"""
import torch


def choose_positives(labels, queue_labels, num_positives=6):
    """Which queue slots serve as positives of which query (V+_{i,k} of eq. 4).

    labels (B,) int and queue_labels (K,) int; a label below 0 matches nothing (an empty slot, an unlabelled query).
    num_positives: k slots of the query's class at random, without replacement, every such slot equally likely; all of
    them where the class has fewer than k; None takes all always.
    Returns a bool mask (B, K).
    """
    same = (labels[:, None] == queue_labels) & (queue_labels >= 0)        # (B, K)
    if num_positives is None:
        return same
    lottery = torch.rand(same.shape, device=same.device).masked_fill_(~same, -1)
    winners = lottery.topk(min(num_positives, same.shape[1]), dim=1).indices  # (B, min(k, K))
    return torch.zeros_like(same).scatter_(1, winners, True) & same


def kcl_loss(q, k, queue, labels, queue_labels, num_positives=6, temperature=0.07,
             fixed_divisor=False, drop_unused=False):
    """The k-positive contrastive loss, eq. 4: the mean over queries i of
    1/(1+k) * sum over positives j of -log softmax_j([q.k, q.queue^T] / T); positives = own other view + k drawn keys.

    q             (B, d)  queries, unit rows; the only input that gets a gradient
    k             (B, d)  keys of the same images' other view, unit rows
    queue         (K, d)  earlier keys, unit rows; all of them stand in the denominator, whatever their label
    labels        (B,)    int class of each query; below 0 = unknown, only its own view is a positive
    queue_labels  (K,)    int class of each queue slot, -1 = empty or unknown: never a positive
    num_positives         k of the paper: 6 = KCL, 0 = CL (InfoNCE, eq. 2), None = all of the class (FCL)
    temperature           T (tau in the paper)
    fixed_divisor         divide by k + 1 to the letter of eq. 4, also where a class has fewer than k keys in the queue.
                          Default: divide by 1 + the number found, so that tail classes are not weighted down
    drop_unused           leave same-class keys that were not drawn out of the denominator. Default: they stay (eq. 4)

    Returns a scalar, in fp32 also under autocast and for half inputs (float64 stays float64); finite for any queue,
    with K = 0 or no positive in it too. Raises ValueError on shapes or settings that do not fit.
    """
    (B, d), K = q.shape, len(queue)
    if k.shape != (B, d) or queue.shape != (K, d) or labels.shape != (B,) or queue_labels.shape != (K,):
        raise ValueError("expected q (B, d), k (B, d), queue (K, d), labels (B,), queue_labels (K,); got " +
                         ", ".join(str(tuple(x.shape)) for x in (q, k, queue, labels, queue_labels)))
    if num_positives is not None and num_positives < 0 or num_positives is None and fixed_divisor or temperature <= 0:
        raise ValueError("expected temperature > 0, and num_positives >= 0, or None for all, which has no fixed "
                         f"divisor; got {temperature}, {num_positives} with fixed_divisor={fixed_divisor}")

    positive = choose_positives(labels, queue_labels, num_positives)      # (B, K)
    own = positive.new_ones(B, 1)                                         # slot 0, the own other view, always counts
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
