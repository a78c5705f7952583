"""Gradient Filter: a contrastive loss that learns from its most telling pairs only.

The loss is that of supervised_contrastive or info_nce; reference/pair_gradients.py (G1) to (G4)
give the gradient and the score of every pair, reference/pair_topk.py (K1) the selection T. What T
is used for:

    mask_grad      value: the full loss; gradient: through T (reference/pair_filtered_grad.py)
    renorm         as mask_grad, with the gradient times sum |G| / sum_T |G|, sums over all pairs of
                   the loss: as large as the unfiltered one, whatever is kept
    recompute      the loss as if only the pairs in T existed. An anchor without a selected positive
                   drops out, and one whose only selected pair is a positive has loss and gradient
                   0: give quotas, keep=(positives, negatives)
    pos_full_den   log-sum-exp over all candidates, positives only those in T; the gradient of the
                   negatives stays dense

After Wu et al., "Gradient-Guided Contrastive Learning for Medical Image Segmentation with
Multi-Perspective Meta Labels", ACM MM 2023 (arXiv:2309.08888): pairs are screened "based on the
magnitude of gradients". The formulas, k and the uses are this project's reading.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..distributed import Gather, taking_part, with_ranks
from ..layout import row_shape
from ..ops.pair_filtered_grad import pair_filtered_grad
from .filter_magnitude import total_magnitude
from .filter_refinement import listing
from .filter_statistics import Keep, Labels, Perspective, Problem, check_keep, full_loss, problem_of
from .filter_uses import full_denominator, recomputed
from .scaling import reduce_rows

# Selected pairs per anchor up to which the list of pairs is cheaper than a pass over all pairs, or
# costs 5 % more at most, at every measured size (docs/performance.md).
LISTED_PER_ANCHOR = 256
USES = ("mask_grad", "renorm", "recompute", "pos_full_den")


class PairSelection(NamedTuple):
    """The selected pairs, in the order of (anchor, candidate).

    Attributes:
        anchor: `(K,)` int64, row b * L + l of the query.
        candidate: `(K,)` int64, row b * L + l of the key (of the query where there is no key); in
            an undirected pair the larger of both rows.
        gradient: `(K,)`, d loss / d cosine of the pair.
        threshold: the score that the last selected pair reached, in the units of `gradient`: 0-d
            for scope "global", `(B,)` for "image", `(B, *spatial)` for "anchor"; with quotas
            stacked (positives, negatives); 0 where every pair is selected, inf where none is.
    """

    anchor: Tensor
    candidate: Tensor
    gradient: Tensor
    threshold: Tensor


@with_ranks
@checks.explains_memory
def filtered_contrastive(
    query: Tensor,
    key: Tensor | None = None,
    *,
    labels: Labels | None = None,
    key_labels: Labels | None = None,
    positives: Tensor | None = None,
    keep: Keep = 0.1,
    scope: str = "image",
    score: str = "pair",
    direction: str = "directed",
    pos_sign: str = "any",
    use: str = "mask_grad",
    form: str = "out",
    temperature: float | Tensor = 0.1,
    pairs: str = "image",
    normalize: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str = "auto",
    gather_distributed: Gather = False,
) -> Tensor:
    """Contrast pixels through the pairs with the largest gradient, in O(N D + k) memory.

    Equals, for flat `(N, C)` input, labels without ignored ones, a count k and scope "global":
        cosine = F.normalize(query) @ F.normalize(query).T
        loss = supervised_contrastive as a function of cosine
        (g,) = torch.autograd.grad(loss, cosine, retain_graph=True)
        g = g.where(g.abs() >= g.abs().flatten().topk(k).values[-1], 0)
        d_query = torch.autograd.grad(cosine, query, g)

    Args:
        query: `(B, C, *spatial)` or `(N, C)`; float64 (CPU), float32, bfloat16 or float16; any
            strides.
        key: candidates of the same form and C. None: the query itself, without the pair of a pixel
            with itself.
        labels: `(B, *spatial)` or `(B, 1, *spatial)` integers: positives share the label. Or a
            sequence of M such maps (perspectives), each with its own selection.
        key_labels: labels of `key`, as many maps as `labels`.
        positives: `(B, *spatial)` flat index into the key pixels of the same image (for either
            `pairs`), or `(B, *spatial, R)` of R different ones; negative or `ignore_index` = none.
            Without labels and positives: the same position of `key`.
        keep: what part of the candidate pairs to select, a fraction in (0, 1] (at least one pair)
            or a count, of every image, of all pairs or of every anchor after `scope`. Two of them,
            either of which may be 0: quotas for positives and for negatives. Fewer candidates than
            the count: all of them. Pairs whose gradient is exactly 0 are never selected.
        scope: where pairs compete: within the "image" of the anchor, "global"ly, or for each
            "anchor" by itself.
        score: "pair", |d loss / d similarity|; or "representation", the size of the pair's share in
            the gradient of the anchor before normalisation.
        direction: "directed", (i, j) and (j, i) are two pairs; or "undirected", they are one with
            the score |G_ij + G_ji| (of labels without a key, for scope "image" or "global").
        pos_sign: "any", or "attract_only": positives that the loss would push apart (see `form`)
            are not selected. `keep` as a fraction still counts them.
        use: "mask_grad", "renorm", "recompute" or "pos_full_den", see above.
        form: "out", "in" or "pixel", as in `supervised_contrastive`. "out" pushes a positive away
            that has more than its share 1/|P| of the softmax.
        temperature: positive number, or a 0-d tensor that learns.
        pairs: candidates of the same "image" or of the whole "batch".
        normalize: scale rows to unit length; zero vectors have similarity 0 and gradient 0.
        ignore_index: label of pixels that are neither anchor nor candidate.
        reduction: "mean" over anchors, "sum", or "none".
        impl: "auto", "reference", "cpu", "triton" or "cuda"; a named one never falls back.
        gather_distributed: True, or a ProcessGroup: the key pixels of all ranks are candidates, see
            `medcl_kernels.distributed`. Needs a key, pairs="batch", a scope that lies on one rank
            ("anchor", or "image" of maps), any use but "renorm", and one positive per anchor where
            they are given by index.

    Returns:
        0-d tensor, for "none" `(B, *spatial)`; for M label maps with M in front. float64 for
        float64 input, else float32. Without any anchor: a zero connected to the graph.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names the way out.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> q, k = torch.randn(2, 2, 64, 14, 14).unbind(0)
        >>> match = medcl.dense_correspondence(q, k)
        >>> loss = medcl.filtered_contrastive(q, k, positives=match, keep=0.1)
    """
    checks.choice("use", use, USES)
    checks.options(reduction, impl)
    check_keep(keep)
    if use == "pos_full_den" and form == "pixel":
        raise ValueError(
            "use='pos_full_den' replaces the positives of one log-sum-exp, which form='pixel' does "
            "not have: choose form='out' or 'in', or use='mask_grad'"
        )
    if use == "renorm" and gather_distributed is not False:
        raise ValueError(
            "use='renorm' is a ratio of sums over all anchors, and each rank knows its own only: "
            "with gather_distributed choose use='mask_grad'"
        )
    problem = problem_of(
        query,
        key,
        labels,
        key_labels,
        positives,
        scope=scope,
        score=score,
        form=form,
        temperature=temperature,
        pairs=pairs,
        normalize=normalize,
        ignore_index=ignore_index,
        impl=impl,
        direction=direction,
        pos_sign=pos_sign,
        gather_distributed=gather_distributed,
    )
    everything = isinstance(keep, float) and keep == 1.0 and pos_sign == "any"
    one_process = taking_part(gather_distributed) is None
    if use in ("mask_grad", "renorm") and everything and one_process:
        unfiltered = full_loss(problem, query, key, labels, key_labels, reduction)
        if unfiltered is not None:
            return unfiltered
    losses = [
        _reduced(_values(problem, one, keep, use), reduction, query)
        for one in problem.perspectives()
    ]
    return torch.stack(losses) if problem.several else losses[0]


@checks.explains_memory
def select_pairs(
    query: Tensor,
    key: Tensor | None = None,
    *,
    labels: Labels | None = None,
    key_labels: Labels | None = None,
    positives: Tensor | None = None,
    keep: Keep = 0.1,
    scope: str = "image",
    score: str = "pair",
    direction: str = "directed",
    pos_sign: str = "any",
    form: str = "out",
    temperature: float = 0.1,
    pairs: str = "image",
    normalize: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str = "auto",
) -> PairSelection | tuple[PairSelection, ...]:
    """The pairs that `filtered_contrastive` with the same arguments learns from; no gradient.

    Args:
        reduction: whose gradient is reported: of the "mean" over anchors or of the "sum".
        query, key, labels, key_labels, positives, keep, scope, score, direction, pos_sign, form,
        temperature, pairs, normalize, ignore_index, impl: see `filtered_contrastive`.

    Returns:
        A `PairSelection`; for a sequence of label maps one each.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names the way out.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> features, labels = torch.randn(100, 16), torch.randint(0, 3, (100,))
        >>> hardest = medcl.select_pairs(features, labels=labels, keep=5)
    """
    checks.choice("reduction", reduction, ("mean", "sum"))
    checks.choice("impl", impl, checks.IMPLS)
    check_keep(keep)
    with torch.no_grad():
        problem = problem_of(
            query,
            key,
            labels,
            key_labels,
            positives,
            scope=scope,
            score=score,
            form=form,
            temperature=temperature,
            pairs=pairs,
            normalize=normalize,
            ignore_index=ignore_index,
            impl=impl,
            direction=direction,
            pos_sign=pos_sign,
        )
        selections = []
        for one in problem.perspectives():
            anchor, candidate, gradient, threshold = listing(problem, one, keep)[:4]
            anchors = one.valid.sum().clamp_min(1) if reduction == "mean" else torch.tensor(1)
            weight = 1.0 / (temperature * anchors.to(gradient))
            used = anchor >= 0
            shape = {
                "global": (),
                "image": threshold.shape[1:],
                "anchor": row_shape(query),
            }[scope]
            shape = (*threshold.shape[: threshold.shape[0] - 1], *shape)
            selections.append(
                PairSelection(
                    anchor[used],
                    candidate[used],
                    gradient[used] * weight,
                    (threshold * weight).reshape(shape),
                )
            )
    return tuple(selections) if problem.several else selections[0]


def _values(problem: Problem, one: Perspective, keep: Keep, use: str) -> tuple[Tensor, Tensor]:
    """Value per anchor `(B, L)` with the gradient that `use` means, and which rows count."""
    if use in ("mask_grad", "renorm"):
        return _masked(problem, one, keep, use == "renorm"), one.valid
    anchor, candidate, _ = listing(problem, one, keep).directed()
    if use == "recompute":
        return recomputed(problem, one, anchor, candidate)
    return full_denominator(problem, one, anchor, candidate)


def _masked(problem: Problem, one: Perspective, keep: Keep, renorm: bool) -> Tensor:
    """The loss of every anchor `(B, L)` with the gradient of the selected pairs."""
    most = LISTED_PER_ANCHOR * one.value.numel()
    found = listing(problem, one, keep, most, whole=renorm)
    if found.cut is None:
        names = ("anchor", "candidate", "gradient")
        chosen: dict[str, Any] = dict(zip(names, found.directed(), strict=True))
    else:
        chosen = {"threshold": found.threshold, "cut": found.cut}
    value = pair_filtered_grad(
        one.value, problem.query, problem.key, **chosen, **problem.selection_options(one)
    )
    value = torch.where(one.valid, value, 0.0)
    if not renorm:
        return value
    kept = found.gradient.abs().sum()
    factor = torch.where(kept > 0, total_magnitude(problem, one) / kept, 1.0).to(value.dtype)
    return value.detach() + factor * (value - value.detach())


def _reduced(values: tuple[Tensor, Tensor], reduction: str, query: Tensor) -> Tensor:
    value, valid = values
    if reduction == "none":
        return value.reshape(row_shape(query))
    return reduce_rows(value, valid, reduction, (0, 1))
