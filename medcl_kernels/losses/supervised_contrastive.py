"""Dense supervised contrast: anchors against candidates, positives by label.

Per anchor i, A(i) all candidates but i itself, P(i) those with its label, N(i) the others
(reference/pair_logsumexp.py (L1), reference/positive_mean.py (M1), reference/pair_positive_log.py
(Q1)):

    out:    lse_{A(i)} s_ij - mean_{P(i)} s_ip
    in:     lse_{A(i)} s_ij - lse_{P(i)} s_ip + log |P(i)|
    pixel:  mean_{p in P(i)} [log(exp(s_ip) + sum_{n in N(i)} exp(s_in)) - s_ip]

"out" and "in" are Khosla et al.'s; "pixel" (ContrastiveSeg, NT-Xent with several positives) keeps
the other positives out of a positive's denominator. Anchors without a positive are dropped from the
mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..distributed import Gather, Ranks, taking_part, with_ranks
from ..layout import label_rows, row_shape, rows
from ..ops.pair_logsumexp import pair_logsumexp
from ..ops.pair_positive_log import pair_positive_log
from ..ops.positive_mean import positive_mean
from ..ops.supervised_sum import supervised_sum
from .scaling import fixed, log_add, reduce_rows, scale_rows

Labels = Tensor | Sequence[Tensor]
# Candidates and their `(M, Bk, Lk)` labels; (None, None): the anchors among themselves. What they
# say of an anchor adds up.
Sets = list[tuple[Tensor | None, Tensor | None]]


@with_ranks
@checks.explains_memory
def supervised_contrastive(
    features: Tensor,
    labels: Labels,
    *,
    key: Tensor | None = None,
    key_labels: Labels | None = None,
    temperature: float | Tensor = 0.1,
    base_temperature: float | None = None,
    pairs: str = "batch",
    form: str = "out",
    normalize: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str = "auto",
    gather_distributed: Gather = False,
) -> Tensor:
    """Pull pixels of one label together and push the rest away, in O(N D) memory.

    Equals, for flat `(N, C)` input, form "out" and no ignored pixel:
        s = F.normalize(features) @ F.normalize(features).T / temperature
        s.fill_diagonal_(-inf); same = labels[:, None] == labels; same.fill_diagonal_(False)
        value = s.logsumexp(1) - s.where(same, 0).sum(1) / same.sum(1)
        loss = value[same.any(1)].mean()

    Args:
        features: `(B, C, *spatial)` or `(N, C)`; float64 (CPU), float32, bfloat16 or float16; any
            strides.
        labels: `(B, *spatial)` or `(B, 1, *spatial)` integers at the features' resolution, or a
            sequence of M such maps (perspectives), which share one pass over the pairs.
        key: candidates, with B of their own when pairs="batch". None: the features themselves,
            without the pair of a pixel with itself.
        key_labels: labels of `key`, as many maps as `labels`.
        temperature: positive number, or a 0-d tensor that learns (it gets a gradient).
        base_temperature: multiplies the loss by temperature / base_temperature, as in Khosla et
            al.'s code.
        pairs: candidates from the whole "batch" or from the same "image".
        form: "out", "in" or "pixel", see above.
        normalize: scale rows to unit length; zero vectors have similarity 0 and gradient 0.
        ignore_index: label of pixels that are neither anchor nor candidate; they may hold NaN.
        reduction: "mean" over anchors that have a positive, "sum", or "none".
        impl: "auto", "reference", "cpu", "triton" or "cuda"; a named one never falls back.
        gather_distributed: True, or a ProcessGroup: the candidates (of `key`, if given) come from
            all ranks, see `medcl_kernels.distributed`. Needs pairs="batch".

    Returns:
        0-d tensor, for "none" shaped like the labels with 0 for pixels without a positive. For M
        label maps `(M,)`, for "none" `(M, B, *spatial)`. float64 for float64 input, else float32.
        Without any anchor: a zero connected to the graph.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names the way out.

    Example:
        >>> import torch, medcl_kernels as medcl
        >>> features, labels = torch.randn(2, 64, 14, 14), torch.randint(0, 4, (2, 14, 14))
        >>> loss = medcl.supervised_contrastive(features, labels, temperature=0.1)
    """
    checks.features(features, "features")
    checks.temperature(temperature)
    if base_temperature is not None:
        checks.temperature(base_temperature, "base_temperature")
    checks.choice("pairs", pairs, ("batch", "image"))
    checks.choice("form", form, ("out", "in", "pixel"))
    checks.options(reduction, impl)
    checks.gathered_pairs(gather_distributed, pairs)
    anchors = label_maps(labels, features, "labels", "features")
    candidates = key_label_maps(features, key, key_labels, anchors, pairs)

    def scaled(x: Tensor, maps: Tensor, name: str) -> Tensor:
        return _scaled(x, maps, ignore_index, temperature, normalize, name)

    x = scaled(rows(features), anchors, "features")
    sets: Sets = [(None, None)]
    if key is not None and candidates is not None:
        sets = [(scaled(rows(key), candidates, "key"), candidates)]
    ranks = taking_part(gather_distributed)
    if ranks is not None:
        if key is None or candidates is None:  # the own rows stay a set of their own
            k, candidates = gathered_candidates(ranks, features, anchors, own=False)
        else:
            sets = []
            k, candidates = gathered_candidates(ranks, key, candidates)
        sets.append((scaled(k, candidates, "key"), candidates))
    sizes = [x.shape[0], *(k.shape[0] for k, _ in sets if k is not None)]
    across = pairs == "batch" and max(sizes) > 1
    options: dict[str, Any] = {
        **fixed(temperature, normalize),
        "ignore_index": ignore_index,
        "across": across,
        "impl": impl,
    }
    one_set = key is None and ranks is None
    whole = form == "out" and one_set and reduction != "none"
    found = _out_totals(x, anchors, options) if whole else None
    if found is not None:
        total, count = found
        value = total if reduction == "sum" else total / count
        if base_temperature is not None:
            value = value * (temperature / base_temperature)
        return value[0] if isinstance(labels, Tensor) else value
    values, valid = _FORMS[form](x, sets, anchors, options)
    if base_temperature is not None:
        values = values * (temperature / base_temperature)
    if reduction != "none":
        values = reduce_rows(values, valid, reduction, (1, 2))
        return values[0] if isinstance(labels, Tensor) else values
    if isinstance(labels, Tensor):
        return values.reshape(labels.shape)
    return values.reshape(len(labels), *row_shape(features))


def label_maps(labels: Labels, features: Tensor, name: str, other: str) -> Tensor:
    """`(M, B, L)` int64."""
    if isinstance(labels, Tensor):
        checks.labels(labels, features, name, other)
        return label_rows(labels, features).unsqueeze(0)
    if not isinstance(labels, Sequence) or isinstance(labels, str):
        raise TypeError(
            f"{name} must be a tensor or a sequence of tensors; got {type(labels).__name__}"
        )
    if not labels:
        raise ValueError(f"{name} must hold at least one label map; got an empty sequence")
    for position, one in enumerate(labels):
        checks.labels(one, features, f"{name}[{position}]", other)
    return torch.stack([label_rows(one, features) for one in labels])


def key_label_maps(
    features: Tensor,
    key: Tensor | None,
    key_labels: Labels | None,
    anchors: Tensor,
    pairs: str,
    name: str = "features",
) -> Tensor | None:
    """`(M, Bk, Lk)` int64, or None in self mode."""
    if key is None:
        if key_labels is not None:
            raise ValueError("key_labels without key: pass key=, the features that they describe")
        return None
    if key_labels is None:
        raise ValueError(
            "key needs key_labels, the labels of its pixels: positives are formed by label"
        )
    checks.key_features(features, key, names=(name, "key"), same_batch=pairs == "image")
    candidates = label_maps(key_labels, key, "key_labels", "key")
    if candidates.shape[0] != anchors.shape[0]:
        raise ValueError(
            f"key_labels must be as many maps as labels ({anchors.shape[0]}); got "
            f"{candidates.shape[0]}"
        )
    return candidates


def gathered_candidates(
    ranks: Ranks, key: Tensor, key_labels: Tensor, own: bool = True
) -> tuple[Tensor, Tensor]:
    """Candidate rows `(Bk, D, Lk)` and their labels `(M, Bk, Lk)` of all ranks, with or without
    the own ones."""
    axis = 2 if key.dim() == 2 else 1  # flat rows are gathered as such
    names = ("key", "key_labels") if own else ("features", "labels")
    found = ranks.gather(**dict(zip(names, (key, key_labels.movedim(axis, 0)), strict=True)))
    features, labels = (one.everyone() if own else one.others() for one in found)
    return rows(features), labels.movedim(0, axis)


def _scaled(
    x: Tensor,
    labels: Tensor,
    ignore_index: int,
    temperature: float | Tensor,
    normalize: bool,
    name: str,
) -> Tensor:
    """Rows checked and scaled; a row counts if any label map has it."""
    valid = None
    if isinstance(temperature, Tensor) or checks.env.check_finite():
        valid = (labels != ignore_index).any(0)
        checks.finite(x, name, valid)
    return scale_rows(x, temperature, normalize, valid)


def selections_of_all(labels: Tensor, candidates: Tensor | None, ignore_index: int) -> int:
    """How many of M label maps need a log-sum-exp over "all" candidates of their own: 1 when they
    ignore the same pixels, M when they do not or when finding out would cost a synchronisation."""
    for maps in (labels, candidates):
        if maps is None or maps.shape[0] == 1:
            continue
        if not checks.readable(maps):
            return maps.shape[0]
        if not _alike(maps != ignore_index):
            return maps.shape[0]
    return 1


def _alike(maps: Tensor) -> bool:
    """Whether M maps are the same M times."""
    return torch.equal(maps[1:], maps[:1].expand_as(maps[1:]))


def _positive_mean(
    x: Tensor, sets: Sets, labels: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Mean similarity to the positives of all sets and their number, both `(M, B, L)`."""
    found = [positive_mean(x, k, query_labels=labels, key_labels=c, **options) for k, c in sets]
    if len(found) == 1:
        return found[0]
    count = torch.stack([each for _, each in found]).sum(0)
    total = torch.stack([mean * each for mean, each in found]).sum(0)
    return total / count.clamp_min(1), count


def _logsumexp(
    x: Tensor,
    sets: Sets,
    labels: Tensor,
    selected: Callable[[Tensor], Tensor],
    kinds: tuple[str, ...],
    options: dict[str, Any],
) -> Tensor:
    """`(S, B, L)` over the candidates of all sets, each of S `kinds` by a `selected` label map."""
    return log_add(
        [
            pair_logsumexp(
                x,
                k,
                query_labels=selected(labels),
                key_labels=None if c is None else selected(c),
                kinds=kinds,
                **options,
            )
            for k, c in sets
        ]
    )


def _common(sets: Sets, labels: Tensor, ignore_index: int) -> int:
    """`selections_of_all` for every set."""
    return max(selections_of_all(labels, candidates, ignore_index) for _, candidates in sets)


def _out(x: Tensor, sets: Sets, labels: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Values and valid anchors, both `(M, B, L)`."""
    mean, count = _positive_mean(x, sets, labels, options)
    s = _common(sets, labels, options["ignore_index"])
    lse = _logsumexp(x, sets, labels, lambda maps: maps[:s], ("all",) * s, options)
    valid = count > 0
    return torch.where(valid, lse - mean, 0.0), valid


def _out_totals(x: Tensor, labels: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Sums over the anchors `(M,)` and the number of anchors, by one `supervised_sum`, whose
    gradient is made on the way: label maps with the same anchors differ in the mean over their
    positives only. None: the anchors differ, or finding out would cost a synchronisation."""
    if labels.shape[0] == 1:
        total, number = supervised_sum(x, labels, **options)
        return total.unsqueeze(0), number
    if not checks.readable(labels):
        return None
    mean, count = positive_mean(x, query_labels=labels, **options)
    valid = count > 0
    if not _alike(torch.stack((labels != options["ignore_index"], valid), 1)):  # one look for both
        return None
    total, number = supervised_sum(x, labels[:1], **options)
    pull = torch.where(valid, mean, 0.0).sum((1, 2))
    return total + (pull[0] - pull), number


def _in(x: Tensor, sets: Sets, labels: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Values and valid anchors, both `(M, B, L)`."""
    m, s = labels.shape[0], _common(sets, labels, options["ignore_index"])
    detached: Sets = [(None if k is None else k.detach(), c) for k, c in sets]
    _, count = _positive_mean(x.detach(), detached, labels, options)
    kinds = ("all",) * s + ("same",) * m
    lse = _logsumexp(x, sets, labels, lambda maps: torch.cat([maps[:s], maps]), kinds, options)
    valid = count > 0
    same = torch.where(valid, lse[s:], 0.0)
    everything = torch.where(valid, lse[:s], 0.0)
    log_count = count.clamp_min(1).to(lse.dtype).log()
    return torch.where(valid, everything - same + log_count, 0.0), valid


def _pixel(x: Tensor, sets: Sets, labels: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Values and valid anchors, both `(M, B, L)`."""
    mean, count = _positive_mean(x, sets, labels, options)
    kinds = ("different",) * labels.shape[0]
    negative = _logsumexp(x, sets, labels, lambda maps: maps, kinds, options)
    logs = [
        pair_positive_log(x, k, query_labels=labels, key_labels=c, lse_negative=negative, **options)
        for k, c in sets
    ]
    valid = count > 0
    return torch.where(valid, sum(logs[1:], logs[0]) / count.clamp_min(1) - mean, 0.0), valid


_FORMS = {"out": _out, "in": _in, "pixel": _pixel}
