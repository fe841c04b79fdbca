"""
k-positive contrastive learning (KCL): the loss that trains. Needs torch and nothing else; copy this one file.

    from kcl import kcl_loss
    loss = kcl_loss(q, k, queue, labels, queue_labels)                       # KCL, k = 6
    loss = kcl_loss(q, k, queue, labels, queue_labels, num_positives=0)      # CL: MoCo's InfoNCE, eq. 2
    loss = kcl_loss(q, k, queue, labels, queue_labels, num_positives=None)   # FCL: all keys of the class

"Exploring Balanced Feature Spaces for Representation Learning", Kang, Li, Xie, Yuan, Feng, ICLR 2021, eq. 4.
kcl_fast.py has the same loss without a (B, K) tensor, if memory runs out.
"""
import torch


def choose_positives(same_class, num_positives=6, first_k=False):
    """Choose the queue keys that are positives of each query. Its own view, always one too, is added in kcl_loss.

    same_class     (B, K) bool, which keys have the query's label
    num_positives  how many, drawn at random without replacement. A query whose class has fewer keys gets all of
                   them. None gives every query all of them
    first_k        take the first keys of the class instead of random ones

    Returns a bool mask (B, K).
    """
    if num_positives is None:
        return same_class
    if num_positives == 0:
        return torch.zeros_like(same_class)
    B, K = same_class.shape
    if first_k:
        scores = torch.arange(K, 0, -1.0, device=same_class.device).expand(B, K)
    else:
        scores = torch.rand(B, K, device=same_class.device)
    scores = scores.where(same_class, -1)                                 # other classes come last
    drawn = scores.topk(min(num_positives, K), dim=1).indices             # (B, k)
    return torch.zeros_like(same_class).scatter(1, drawn, True) & same_class


def kcl_loss(q, k, queue, labels, queue_labels, num_positives=6, temperature=0.07,
             fixed_divisor=False, drop_unused=False, first_k=False, reduction="mean"):
    """The k-positive contrastive loss, eq. 4: the mean over queries i of
    1/(1 + number drawn) * sum over positives j of -log softmax_j([q.k, q.queue^T] / T).
    A query's positives are its own other view and num_positives keys drawn from its class in the queue; if the
    queue has fewer, all of them.

    q              (B, d)  queries, unit rows
    k              (B, d)  keys of the same images' other view, unit rows. k and queue get no gradient
    queue          (K, d)  earlier keys, unit rows, none of this batch. All of them are in the denominator,
                           empty slots too: pass queue[:filled]
    labels         (B,)    int class of each query. Below 0 is unknown: only its own view is a positive
    queue_labels   (K,)    int class of each key. Below 0 is empty or unknown: never a positive
    num_positives          k of the paper: 6 is KCL, 0 is CL (InfoNCE, eq. 2), None is FCL: all of the class
    temperature            T (tau in the paper), a number or a tensor, which may be learned
    fixed_divisor          divide by 1 + num_positives even if fewer were found, as eq. 4 is written (not with
                           None). The default divides by 1 + the number found, as the authors' code does, so
                           that tail classes do not lose weight
    drop_unused            remove the same-class keys that were not drawn from the denominator
    first_k                take the lowest slots of the class, which is what the authors' code does (its topk of a
                           0/1 mask)
    reduction              "mean" gives a scalar, "none" the loss of each query (B,)

    Computes in fp32 under autocast and for half inputs; float64 stays float64. The loss is finite for any queue,
    including an empty one. vmap needs randomness="different". Raises ValueError if shapes do not fit.
    """
    check_shapes(q, k, queue, labels, queue_labels)
    same_class = (labels[:, None] == queue_labels) & (queue_labels >= 0)  # (B, K)
    positive = choose_positives(same_class, num_positives, first_k)       # (B, K)
    own_view = positive.new_ones(len(q), 1)                               # slot 0 is always a positive

    with torch.autocast(q.device.type, enabled=False):                    # bf16 has steps of 1/16 at 1/0.07 = 14
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, queue = q.to(dtype), k.detach().to(dtype), queue.detach().to(dtype)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature  # (B, 1+K)
        if drop_unused:
            unused = torch.cat([~own_view, same_class & ~positive], dim=1)
            logits = logits.masked_fill(unused, -torch.inf)
        positive = torch.cat([own_view, positive], dim=1)                 # (B, 1+K)
        log_p = logits.log_softmax(dim=1)
        summed = log_p.where(positive, 0).sum(1)                          # * would give -inf * 0 = nan
        divisor = 1 + num_positives if fixed_divisor else positive.sum(1)
        loss = -summed / divisor                                          # (B,)
    return {"mean": loss.mean(), "none": loss}[reduction]


def check_shapes(q, k, queue, labels, queue_labels):
    """Raise ValueError unless the shapes are those documented: others might broadcast silently."""
    B, d, K = len(q), q.shape[-1], len(queue)
    found = [tuple(x.shape) for x in (q, k, queue, labels, queue_labels)]
    if found != [(B, d), (B, d), (K, d), (B,), (K,)]:
        raise ValueError(f"expected q (B, d), k (B, d), queue (K, d), labels (B,), queue_labels (K,); got {found}")
