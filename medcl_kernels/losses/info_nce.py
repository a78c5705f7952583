"""Dense InfoNCE: every query pixel against key pixels, with one or several positives per anchor.

Notation and gradients: reference/pair_logsumexp.py (L1)-(L4), reference/positive_at.py (A1), (A2),
reference/info_nce_sum.py (I1), (I2). Per anchor i, with candidates A(i) that contain the positives
P(i):

    out:  lse_{A(i)} s_ij - mean_{P(i)} s_ip          in:  lse_{A(i)} s_ij - lse_{P(i)} s_ip

which are the same for one positive. The log-sum-exp over several candidate sets (key pixels, queue,
intra-view) is the log-sum-exp of theirs.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..distributed import Gather, Gathered, taking_part, with_ranks
from ..layout import row_shape, rows
from ..ops.info_nce_sum import info_nce_sum
from ..ops.pair_logsumexp import pair_logsumexp
from ..ops.positive_at import positive_at
from ..ops.supervised_sum import supervised_sum
from .scaling import fixed, log_add, reduce_rows, scale_rows

Pairs = Literal["image", "batch", "queue"]


class _Settings(NamedTuple):
    """The options that both directions share; the queue in row form `(1, C, K)`."""

    temperature: float | Tensor
    pairs: Pairs
    queue: Tensor | None
    intra_view: bool
    normalize: bool
    reduction: str
    impl: str
    multi_positive: str


@with_ranks
@checks.explains_memory
def info_nce(
    query: Tensor,
    key: Tensor,
    positives: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    temperature: float | Tensor = 0.1,
    pairs: Pairs = "image",
    queue: Tensor | None = None,
    intra_view: bool = False,
    symmetric: bool = False,
    normalize: bool = True,
    ignore_index: int = -1,
    reduction: str = "mean",
    impl: str = "auto",
    multi_positive: str = "out",
    gather_distributed: Gather = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Contrast every query pixel with key pixels, its positive among them, in O(N D) memory.

    Equals, for flat `(N, C)` input and the default options:
        logits = F.normalize(query) @ F.normalize(key).T / temperature
        loss = F.cross_entropy(logits, positives, ignore_index=-1)

    Args:
        query: `(B, C, *spatial)` or `(N, C)`; float64 (CPU), float32, bfloat16 or float16; any
            strides.
        key: same B and C. Give a detached key (an EMA encoder's) to skip its gradient.
        positives: `(B, *spatial)` integers: flat index into the key pixels of the same image,
            whatever `pairs` is; `ignore_index` = not an anchor. `(B, *spatial, R)`: R positives,
            padded with `ignore_index`. None: the same position. With `symmetric`, a pair (query to
            key, key to query).
        temperature: positive number, or a 0-d tensor that learns (it gets a gradient).
        pairs: the candidates: key pixels of the same "image", of the whole "batch", or, with
            "queue", the positives and the queue only.
        queue: `(K, C)` further negatives without gradient of their own unless they require one;
            converted to the dtype of `query`. K = 0 (a queue not yet filled) adds none.
        intra_view: all other query pixels of the image are further negatives, whether they are
            anchors or not.
        symmetric: half the sum of query to key and key to query.
        normalize: scale rows to unit length; zero vectors have similarity 0 and gradient 0.
        ignore_index: marks entries of `positives`.
        reduction: "mean" over anchors, "sum", or "none".
        impl: "auto", "reference", "cpu", "triton" or "cuda"; a named one never falls back.
        multi_positive: with several positives, the mean "out" of the logarithm (SupCon) or the sum
            "in" it.
        gather_distributed: True, or a ProcessGroup: the key pixels of all ranks are candidates, see
            `medcl_kernels.distributed`. Needs pairs="batch". `positives` still count from the own
            images (flat input: from the own rows), and the queue is the own one; `intra_view` means
            the own image, for flat input the rows of all ranks.

    Returns:
        0-d tensor, or for "none" `(B, *spatial)` with 0 for pixels that are not anchors (with
        `symmetric`: one such map for the query and one for the key). float64 for float64 input,
        else float32. Without any anchor: a zero connected to the graph.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names the way out.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> q, k = torch.randn(2, 2, 64, 14, 14).unbind(0)
        >>> loss = medcl.info_nce(q, k, medcl.dense_correspondence(q, k), temperature=0.2)
    """
    check_candidates(query, key, pairs, queue, intra_view)
    checks.temperature(temperature)
    checks.choice("multi_positive", multi_positive, ("out", "in"))
    checks.options(reduction, impl)
    checks.gathered_pairs(gather_distributed, pairs)
    forth, back = directions(query, key, positives, symmetric, ignore_index)
    negatives = None
    if queue is not None and queue.shape[0] > 0:
        negatives = rows(queue.to(query.dtype))
        checks.finite(negatives, "queue")
    settings = _Settings(
        temperature, pairs, negatives, intra_view, normalize, reduction, impl, multi_positive
    )
    ranks = taking_part(gather_distributed)
    whole_q = whole_k = None
    if ranks is not None:
        _check_finite(query, key, forth, intra_view)
        if symmetric or (intra_view and query.dim() == 2):
            _check_finite(key, query, back, intra_view)
            whole_q, whole_k = ranks.gather(query=query, key=key)
        else:
            (whole_k,) = ranks.gather(key=key)
    elif symmetric and positives is None and _is_nt_xent(query, settings):
        return _nt_xent(query, key, settings)
    loss = _one_direction(query, key, forth, settings, whole_q, whole_k)
    if not symmetric:
        return loss
    other = _one_direction(key, query, back, settings, whole_k, whole_q)
    return (loss, other) if reduction == "none" else 0.5 * (loss + other)


def _is_nt_xent(query: Tensor, settings: _Settings) -> bool:
    """Whether both directions and the intra-view negatives of each are all pairs of two views."""
    one_image = settings.pairs == "image" or query.dim() == 2 or query.shape[0] == 1
    return (
        settings.intra_view
        and settings.queue is None
        and one_image
        and settings.reduction != "none"
        and settings.impl != "reference"  # the specification stays what it says
    )


def _nt_xent(query: Tensor, key: Tensor, settings: _Settings) -> Tensor:
    """NT-Xent: supervised contrast of the rows of both views, every position a class of two. One
    pass over a triangle instead of four over squares."""
    both = torch.cat([rows(query), rows(key)], 2)
    checks.finite(both, "query and key")
    batch, _, length = both.shape
    position = torch.arange(length // 2, device=both.device).repeat(2).expand(1, batch, -1)
    both = scale_rows(both, settings.temperature, settings.normalize, None)
    options: dict[str, Any] = fixed(settings.temperature, settings.normalize)
    total, count = supervised_sum(both, position, **options, impl=settings.impl)
    return 0.5 * total if settings.reduction == "sum" else total / count


def check_candidates(
    query: Tensor, key: Tensor, pairs: str, queue: Tensor | None, intra_view: bool
) -> None:
    """The tensors and which of their pixels are contrasted."""
    checks.features(query, "query")
    checks.key_features(query, key)
    checks.choice("pairs", pairs, ("image", "batch", "queue"))
    if queue is not None:
        checks.queue(queue, query)
    elif pairs == "queue":
        raise ValueError(
            "pairs='queue' needs queue=(K, C) negatives; got None: pass MemoryQueue.negatives() "
            "or choose pairs='image'"
        )
    if pairs == "queue" and intra_view:
        raise ValueError(
            "pairs='queue' means the positives and the queue only, so intra_view=True contradicts "
            "it: choose pairs='image' or 'batch' with queue= and intra_view=True"
        )


def directions(
    query: Tensor,
    key: Tensor,
    positives: Tensor | tuple[Tensor, Tensor] | None,
    symmetric: bool,
    ignore_index: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Index rows `(B, L)` or `(B, L, R)`, -1 = none, for query to key and for key to query."""
    if positives is None:
        if row_shape(query) != row_shape(key):
            raise ValueError(
                "positives=None pairs equal positions, so query and key must have the same spatial "
                f"shape; got {checks.shape_of(query)} and {checks.shape_of(key)}: pass positives"
            )
        return None, None
    if not symmetric:
        if not isinstance(positives, Tensor):
            raise TypeError(
                f"positives must be one tensor when symmetric=False; got {type(positives).__name__}"
            )
        return _index_rows(positives, query, key, ignore_index, "positives"), None
    if isinstance(positives, Tensor) or len(positives) != 2:
        raise ValueError(
            "symmetric=True needs positives=(query_to_key, key_to_query): an index from query to "
            "key does not say which query pixel is the positive of a key pixel. Use "
            "dense_correspondence both ways, or positives=None"
        )
    return (
        _index_rows(positives[0], query, key, ignore_index, "positives[0]"),
        _index_rows(positives[1], key, query, ignore_index, "positives[1]"),
    )


def _index_rows(
    positives: Tensor, query: Tensor, key: Tensor, ignore_index: int, name: str
) -> Tensor:
    """`(B, L)` or `(B, L, R)` int64 with -1 for none."""
    checks.positives(positives, query, key, ignore_index, name)
    batch = 1 if query.dim() == 2 else query.shape[0]
    several = positives.dim() == len(row_shape(query)) + 1
    shape = (batch, -1, positives.shape[-1]) if several else (batch, -1)
    index = positives.reshape(shape).long()
    return index if ignore_index == -1 else torch.where(index == ignore_index, -1, index)


def _check_finite(query: Tensor, key: Tensor, index: Tensor | None, intra_view: bool) -> None:
    """`checks.finite` of the rows that count: anchors, or with `intra_view` all of the query."""
    if not checks.env.check_finite():
        return
    named = None if index is None or intra_view else index >= 0
    checks.finite(
        rows(query), "query", named if named is None or named.dim() == 2 else named.any(2)
    )
    checks.finite(rows(key), "key")


def _one_direction(
    query: Tensor,
    key: Tensor,
    index: Tensor | None,
    settings: _Settings,
    whole_query: Gathered | None = None,
    whole_key: Gathered | None = None,
) -> Tensor:
    """Query to key, reduced; with the tensors of all ranks, if these are to be candidates."""
    q, k = rows(query), rows(key)
    temperature, pairs, queue, intra_view, normalize, reduction, impl, form = settings
    several = index is not None and index.dim() == 3
    one_set = pairs != "queue" and queue is None and not intra_view and whole_key is None
    fused = one_set and reduction != "none" and not several
    # the fused sum tells anchors by their index itself
    masked = not fused or isinstance(temperature, Tensor)
    named = index >= 0 if index is not None and masked else None
    valid = named.any(2) if named is not None and several else named
    if whole_key is None:  # else looked at before the ranks met
        _check_finite(query, key, index, intra_view)
    q = scale_rows(q, temperature, normalize, None if intra_view else valid)
    k = scale_rows(k, temperature, normalize, None)
    options: dict[str, Any] = {**fixed(temperature, normalize), "impl": impl}
    across = pairs == "batch" and q.shape[0] > 1

    if fused:
        total, count = info_nce_sum(q, k, index, across=across, **options)
        return total if reduction == "sum" else total / count

    if index is None:
        index = torch.arange(q.shape[2], device=q.device).repeat(q.shape[0], 1)
    anchors = _anchor_labels(index, valid)
    at_positives = positive_at(q, k, index, **options)
    sets = []
    if whole_key is not None:
        everyone = scale_rows(rows(whole_key.everyone()), temperature, normalize, None)
        sets.append(_logsumexp(q, everyone, anchors, valid, True, options))
    elif pairs != "queue":
        sets.append(_logsumexp(q, k, anchors, valid, across, options))
    if intra_view:
        # labels would also choose the candidates, so every row is an anchor here and dropped after
        sets.append(_logsumexp(q, None, None, valid, False, options))
    if intra_view and whole_query is not None and query.dim() == 2:
        others = scale_rows(rows(whole_query.others()), temperature, normalize, None)
        sets.append(_logsumexp(q, others, anchors, valid, True, options))
    if queue is not None:
        queue = scale_rows(queue, temperature, normalize, None)
        sets.append(_logsumexp(q, queue, anchors, valid, True, options))
    target = together = at_positives
    if named is not None and valid is not None and several:
        together = _logsumexp_of_positives(at_positives, named, valid)
        # entries that are not named are 0 already
        mean = at_positives.sum(2) / named.sum(2).clamp_min(1)
        target = together if form == "in" else mean
    if pairs == "queue":
        sets.append(together)
    values = log_add(sets) - target
    if valid is None:
        valid = torch.ones_like(values, dtype=torch.bool)
    else:
        values = torch.where(valid, values, 0.0)
    if reduction == "none":
        return values.reshape(row_shape(query))
    return reduce_rows(values, valid, reduction, (0, 1))


def _anchor_labels(index: Tensor, valid: Tensor | None) -> Tensor | None:
    """`(1, B, L)` labels, -1 for pixels that are not anchors. None where all are."""
    if valid is None:
        return None
    return (valid.long() - 1 if index.dim() == 3 else index).unsqueeze(0)


def _logsumexp(
    q: Tensor,
    k: Tensor | None,
    anchors: Tensor | None,
    valid: Tensor | None,
    across: bool,
    options: dict[str, Any],
) -> Tensor:
    """`(B, L)` log-sum-exp over one candidate set, 0 instead of -inf where there is no anchor."""
    lse = pair_logsumexp(q, k, query_labels=anchors, ignore_index=-1, across=across, **options)[0]
    return lse if valid is None else torch.where(valid, lse, 0.0)


def _logsumexp_of_positives(at_positives: Tensor, named: Tensor, valid: Tensor) -> Tensor:
    """`(B, L, R)` -> `(B, L)`; any finite value where nothing is named."""
    blank = torch.where(valid, float("-inf"), 0.0).to(at_positives.dtype).unsqueeze(2)
    return torch.where(named, at_positives, blank).logsumexp(2)
