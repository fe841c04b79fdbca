"""
The loss of k-positive contrastive learning (KCL), as train_rep.py uses it. It needs only torch: copy this one file.

    from kcl import kcl_loss
    loss = kcl_loss(q, k, queue, labels, queue_labels)                       # KCL, k = 6
    loss = kcl_loss(q, k, queue, labels, queue_labels, num_positives=0)      # CL: MoCo's InfoNCE, eq. 2
    loss = kcl_loss(q, k, queue, labels, queue_labels, num_positives=None)   # FCL: all keys of the class

"Exploring Balanced Feature Spaces for Representation Learning", Kang, Li, Xie, Yuan, Feng, ICLR 2021, eq. 4.
kcl_fast.py computes the same loss without a (B, K) tensor, in case you run out of memory.
"""
import torch


def choose_positives(same_class, num_positives=6, first_k=False):
    """Choose the queue keys that are positives of each query. kcl_loss adds the key of the query's own image.

    same_class     (B, K) bool, True if the key has the query's label
    num_positives  how many keys to draw per query, at random without replacement. If the class has fewer keys, the
                   query gets all of them. With None every query gets all keys of its class
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
    scores = scores.where(same_class, -1)                                 # keys of other classes come last
    drawn = scores.topk(min(num_positives, K), dim=1).indices             # (B, k)
    return torch.zeros_like(same_class).scatter(1, drawn, True) & same_class


def kcl_loss(q, k, queue, labels, queue_labels, num_positives=6, temperature=0.07,
             fixed_divisor=False, drop_unused=False, first_k=False, reduction="mean"):
    """The k-positive contrastive loss, eq. 4 except for the divisor (see fixed_divisor): the mean over queries i of
    1/(1 + number drawn) * sum over positives j of -log softmax_j([q.k, q.queue^T] / T).
    The positives of a query are the key of its own image and num_positives keys of its class, drawn from the
    queue. If the queue has fewer keys of the class, all of them are positives. An older key of the same image counts
    like any other.

    q              (B, d)  queries, unit rows
    k              (B, d)  keys: the other view of the same images, unit rows. k and queue get no gradient
    queue          (K, d)  keys of earlier batches, unit rows. Every row is in the denominator, so leave out empty
                           slots: pass queue[:filled]
    labels         (B,)    int class of each query. A label below 0 means unknown: the only positive is its own key
    queue_labels   (K,)    int class of each key. A label below 0 means empty or unknown: never a positive
    num_positives          the paper's k. 6 gives KCL, 0 gives CL (InfoNCE, eq. 2), None gives FCL (the whole class)
    temperature            T (tau in the paper), a number or a tensor, which may be learned
    fixed_divisor          divide by 1 + num_positives even if fewer were found, as eq. 4 is written. This needs a
                           number as num_positives. The default divides by 1 + the number found, as the authors'
                           code does, so that tail classes do not lose weight
    drop_unused            remove from the denominator the same-class keys that were not drawn
    first_k                take the lowest slots of the class, as the authors' code does: its topk of a 0/1 mask
                           finds only ties
    reduction              "mean" returns a scalar, "none" the loss per query (B,)

    The loss is computed in fp32 under autocast and for half-precision inputs; float64 stays float64. It is finite
    for any queue, even an empty one. vmap needs randomness="different". Raises ValueError if shapes do not match.
    """
    check_shapes(q, k, queue, labels, queue_labels)
    same_class = (labels[:, None] == queue_labels) & (queue_labels >= 0)  # (B, K)
    positive = choose_positives(same_class, num_positives, first_k)       # (B, K)
    own_view = positive.new_ones(len(q), 1)                               # slot 0 is always a positive

    with torch.autocast(q.device.type, enabled=False):                    # near 1/0.07 = 14, bf16 has steps of 1/16
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, queue = q.to(dtype), k.detach().to(dtype), queue.detach().to(dtype)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature  # (B, 1+K)
        if drop_unused:
            unused = torch.cat([~own_view, same_class & ~positive], dim=1)
            logits = logits.masked_fill(unused, -torch.inf)
        positive = torch.cat([own_view, positive], dim=1)                 # (B, 1+K)
        log_p = logits.log_softmax(dim=1)
        summed = log_p.where(positive, 0).sum(1)                          # a product would give -inf * 0 = nan
        divisor = 1 + num_positives if fixed_divisor else positive.sum(1)
        loss = -summed / divisor                                          # (B,)
    return {"mean": loss.mean(), "none": loss}[reduction]


def check_shapes(q, k, queue, labels, queue_labels):
    """Raise ValueError unless the shapes are as documented. Wrong ones might broadcast silently."""
    B, d, K = len(q), q.shape[-1], len(queue)
    found = [tuple(x.shape) for x in (q, k, queue, labels, queue_labels)]
    if found != [(B, d), (B, d), (K, d), (B,), (K,)]:
        raise ValueError(f"expected q (B, d), k (B, d), queue (K, d), labels (B,), queue_labels (K,); got {found}")
