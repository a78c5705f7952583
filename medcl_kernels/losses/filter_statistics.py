"""What the Gradient Filter knows of a loss before it selects: values and row constants, in O(N).

The constants are those of reference/pair_gradients.py (G1) to (G3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..distributed import Gather, taking_part
from ..layout import row_shape, rows
from ..ops.pair_logsumexp import pair_logsumexp
from ..ops.pair_positive_log import pair_positive_log
from ..ops.positive_at import positive_at
from ..ops.positive_mean import positive_mean
from .filter_gather import check_gather, indexed_by_label
from .info_nce import info_nce
from .scaling import fixed, scale_rows
from .supervised_contrastive import (
    Labels,
    gathered_candidates,
    key_label_maps,
    label_maps,
    selections_of_all,
    supervised_contrastive,
)

Amount = float | int
Keep = Amount | tuple[Amount, Amount]
SCOPES, SCORES, FORMS = (
    ("image", "global", "anchor"),
    ("pair", "representation"),
    ("out", "in", "pixel"),
)
DIRECTIONS, SIGNS = ("directed", "undirected"), ("any", "attract_only")


@dataclass(frozen=True)
class Perspective:
    """One loss of a problem; nothing of it has a gradient.

    Attributes:
        value: `(B, L)`, the loss of every anchor, 0 elsewhere.
        valid: `(B, L)` bool, the anchors.
        statistics: `(3, B, L)`, the row constants (a, b, c).
        positive: `(B, L)` int64, number of positives.
        candidates: `(B, L)` int64, number of candidates.
        labels, key_labels: `(1, B, L)`, `(1, Bk, Lk)`, as `pair_topk` takes them.
    """

    value: Tensor
    valid: Tensor
    statistics: Tensor
    positive: Tensor
    candidates: Tensor
    labels: Tensor | None
    key_labels: Tensor | None


@dataclass(frozen=True)
class Problem:
    """Checked arguments in row form.

    Attributes:
        query, key: `(B, D, L)`, `(Bk, D, Lk)` or None.
        labels, key_labels: `(M, B, L)`, `(M, Bk, Lk)`; None where positives are given by index.
        index: `(B, L, R)` positives, -1 = none; None where they are given by label.
        several: whether the labels came as a sequence.
        options: of every pair operation.
        direction, sign: which pairs are candidates; `refined` says whether `pair_topk` alone
            knows.
    """

    query: Tensor
    key: Tensor | None
    labels: Tensor | None
    key_labels: Tensor | None
    index: Tensor | None
    several: bool
    form: str
    score: str
    scope: str
    temperature: float | Tensor
    pairs: str
    normalize: bool
    ignore_index: int
    impl: str
    across: bool
    options: dict[str, Any] = field(default_factory=dict)
    direction: str = "directed"
    sign: str = "any"

    @property
    def refined(self) -> bool:
        """Whether the selection takes more than `pair_topk`. Only form "out" pushes positives
        apart, so only there pairs are left out for their sign."""
        return self.direction == "undirected" or (self.sign != "any" and self.form == "out")

    def perspectives(self) -> Iterator[Perspective]:
        """The loss of each label map, or the one of the index."""
        if self.index is not None:
            yield _by_index(self)
            return
        assert self.labels is not None
        maps, shared = self.labels.shape[0], None
        if self.form != "pixel" and maps > 1:
            shared = _shared_logsumexp(self)
        for m in range(maps):
            other = None if self.key_labels is None else self.key_labels[m : m + 1]
            lse = None if shared is None else shared[min(m, len(shared) - 1)]
            yield _by_label(self, self.labels[m : m + 1], other, lse)

    def selection_options(self, one: Perspective) -> dict[str, Any]:
        """Keyword arguments that `pair_topk` and `pair_filtered_grad` share."""
        return {
            "query_labels": one.labels,
            "key_labels": one.key_labels,
            "positives": self.index,
            "statistics": one.statistics,
            "form": self.form,
            "score": self.score,
            "scope": self.scope,
            **self.options,
        }

    def quota(self, one: Perspective, keep: Keep) -> tuple[Tensor, int]:
        """k of `pair_topk`, `(C, U)` int64, and the length of a list that holds its sum."""
        amounts: list[Amount] = [*keep] if isinstance(keep, tuple) else [keep]
        counts = self.candidates(one, len(amounts))
        k = torch.stack([_amount(n, a) for n, a in zip(counts, amounts, strict=True)])
        if checks.readable(k):
            return k, int(k.sum())
        batch, length = one.value.shape
        other = self.query if self.key is None else self.key
        wide = other.shape[2] * (other.shape[0] if self.across else 1)
        units = k.shape[1]
        per_unit = batch * length * wide // units
        bounds = (ceil(a * per_unit) if isinstance(a, float) else a for a in amounts)
        return k, units * min(sum(bounds), per_unit)

    def candidates(self, one: Perspective, classes: int, direction: str = "") -> Tensor:
        """How many pairs may be selected, `(C, U)`; direction: "" is that of the problem. An
        undirected pair counts once, where one of its pixels or both are anchors."""
        everything = torch.where(one.valid, one.candidates, 0)
        positive = self._by_unit(torch.where(one.valid, one.positive, 0))
        if (direction or self.direction) == "undirected":
            valid = one.valid.reshape(1, -1) if self.across else one.valid
            earlier = (valid.cumsum(1) - 1).reshape(one.valid.shape)  # anchors, each paired once
            everything = everything - torch.where(one.valid, earlier, 0)
            positive = positive // 2
        total = self._by_unit(everything)
        return total.unsqueeze(0) if classes == 1 else torch.stack([positive, total - positive])

    def _by_unit(self, count: Tensor) -> Tensor:
        """`(U,)` sums of numbers per anchor."""
        if self.scope == "global":
            return count.sum().reshape(1)
        return count.sum(1) if self.scope == "image" else count.flatten()


def _amount(count: Tensor, amount: Amount) -> Tensor:
    """How many of `count` pairs to keep."""
    if isinstance(amount, int):
        return count.clamp_max(amount)
    # ceil of the product as it would be without rounding: 0.1 of 30 pairs is 3
    wanted = (count.double() * (amount * (1 - 1e-12))).ceil().long().clamp_min(1)
    return torch.minimum(wanted, count) if amount > 0 else torch.zeros_like(count)


def check_keep(keep: Any) -> None:
    """A fraction, a count, or a pair of them."""
    parts = keep if isinstance(keep, tuple) else (keep,)
    if isinstance(keep, tuple) and len(keep) != 2:
        raise ValueError(f"keep must be one number or (positives, negatives); got {keep!r}")
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, (int, float)):
            raise TypeError(
                "keep must be a fraction (float), a count (int), or a pair of them; got "
                f"{type(part).__name__}"
            )
        if isinstance(part, float) and not 0 <= part <= 1:
            raise ValueError(
                f"keep must be in (0, 1] as a fraction; got {part}: an int is a count of pairs"
            )
        if part < 0:
            raise ValueError(f"keep must not be negative; got {part}")
    if not any(parts):
        raise ValueError(
            f"keep={keep!r} selects no pair, so there would be nothing to learn from: use a "
            "fraction such as 0.1 or a count of at least 1"
        )


def problem_of(
    query: Tensor,
    key: Tensor | None,
    labels: Labels | None,
    key_labels: Labels | None,
    positives: Tensor | None,
    *,
    scope: str,
    score: str,
    form: str,
    temperature: float | Tensor,
    pairs: str,
    normalize: bool,
    ignore_index: int,
    impl: str,
    direction: str = "directed",
    pos_sign: str = "any",
    gather_distributed: Gather = False,
) -> Problem:
    """Every argument checked, in row form; the candidates of all ranks if asked."""
    checks.features(query, "query")
    checks.temperature(temperature)
    checks.choice("scope", scope, SCOPES)
    checks.choice("score", score, SCORES)
    checks.choice("form", form, FORMS)
    checks.choice("pairs", pairs, ("image", "batch"))
    if score == "representation" and (not normalize or isinstance(temperature, Tensor)):
        raise ValueError(
            "score='representation' weighs a pair by the sine of its angle, so it needs "
            "normalize=True and a temperature that is a number; use score='pair' otherwise"
        )
    _check_candidates(query, key, labels, direction, pos_sign, scope, score, pairs)
    if labels is not None and positives is not None:
        raise ValueError("labels and positives both say what a positive is: give one of them")
    anchors = candidates = index = None
    if labels is not None:
        anchors = label_maps(labels, query, "labels", "query")
        candidates = key_label_maps(query, key, key_labels, anchors, pairs, "query")
    else:
        if key is None:
            raise ValueError(
                "nothing says what a positive is: give labels=, or key= with positives= (the index "
                "of each pixel's positive in key) or without (the same position)"
            )
        if key_labels is not None:
            raise ValueError("key_labels without labels: give both, or positives= alone")
        checks.key_features(query, key)
        index = _index_rows(positives, query, key, ignore_index)
    if gather_distributed is not False:
        checks.gathered_pairs(gather_distributed, pairs)
        check_gather(query, key, index, scope)
    q, k = rows(query), None if key is None else rows(key)
    valid = (anchors != ignore_index).any(0) if anchors is not None else None
    if index is not None:
        valid = (index >= 0).any(2)
    key_valid = None if candidates is None else (candidates != ignore_index).any(0)
    checks.finite(q, "query", valid)
    if k is not None:
        checks.finite(k, "key", key_valid)
    ranks = taking_part(gather_distributed)
    if ranks is not None and key is not None:
        if candidates is None:
            k, candidates, anchors = indexed_by_label(ranks, key, index, ignore_index)
            index = None
        else:
            k, candidates = gathered_candidates(ranks, key, candidates)
        key_valid = (candidates != ignore_index).any(0)
    if k is not None:
        k = scale_rows(k, temperature, normalize, key_valid)
    q = scale_rows(q, temperature, normalize, valid)
    across = pairs == "batch" and (q.shape[0] > 1 or (k is not None and k.shape[0] > 1))
    options = {**fixed(temperature, normalize), "ignore_index": ignore_index, "across": across}
    return Problem(
        q,
        k,
        anchors,
        candidates,
        index,
        labels is not None and not isinstance(labels, Tensor),
        form,
        score,
        scope,
        temperature,
        pairs,
        normalize,
        ignore_index,
        impl,
        across,
        {**options, "impl": impl},
        direction,
        pos_sign,
    )


def _check_candidates(
    query: Tensor,
    key: Tensor | None,
    labels: Labels | None,
    direction: str,
    pos_sign: str,
    scope: str,
    score: str,
    pairs: str,
) -> None:
    """`direction` and `pos_sign` beside the options that they depend on."""
    checks.choice("direction", direction, DIRECTIONS)
    checks.choice("pos_sign", pos_sign, SIGNS)
    if direction == "undirected":
        if key is not None or labels is None:
            raise ValueError(
                "direction='undirected' is about pairs of one set of pixels: give labels= and no "
                "key=, or use direction='directed'"
            )
        if score != "pair":
            raise ValueError(
                "direction='undirected' ranks |G_ij + G_ji|: use score='pair', or "
                f"direction='directed' with score={score!r}"
            )
        several = query.dim() > 2 and query.shape[0] > 1
        if scope == "anchor" or (scope == "image" and pairs == "batch" and several):
            raise ValueError(
                f"direction='undirected' with scope={scope!r} and pairs={pairs!r}: a pair of two "
                f"{scope}s would belong to both; use scope='global'"
            )
    if (direction, pos_sign) != ("directed", "any") and checks.traced(query):
        raise ValueError(
            "direction='undirected' and pos_sign='attract_only' take as many passes as the data "
            "needs, which torch.compile and vmap cannot trace: call the loss outside of them"
        )


def _index_rows(positives: Tensor | None, query: Tensor, key: Tensor, ignore_index: int) -> Tensor:
    """`(B, L, R)` int64, -1 = none."""
    if positives is None:
        if row_shape(query) != row_shape(key):
            raise ValueError(
                "without labels and positives equal positions are paired, so query and key must "
                f"have the same spatial shape; got {checks.shape_of(query)} and "
                f"{checks.shape_of(key)}: pass positives"
            )
        batch, length = rows(query).shape[0], rows(query).shape[2]
        return torch.arange(length, device=query.device).expand(batch, length).unsqueeze(2)
    if isinstance(positives, Tensor) and not positives.is_floating_point():
        positives = torch.where(positives == ignore_index, -1, positives.long())
    checks.positives(positives, query, key, -1, "positives")
    batch = 1 if query.dim() == 2 else query.shape[0]
    several = positives.dim() == len(row_shape(query)) + 1
    return positives.reshape(batch, -1, positives.shape[-1] if several else 1)


@torch.no_grad()
def _shared_logsumexp(problem: Problem) -> Tensor:
    """`(1 or M, B, L)`: one log-sum-exp where all maps ignore the same pixels."""
    labels, key_labels = problem.labels, problem.key_labels
    assert labels is not None
    s = selections_of_all(labels, key_labels, problem.ignore_index)
    return pair_logsumexp(
        problem.query.detach(),
        None if problem.key is None else problem.key.detach(),
        query_labels=labels[:s],
        key_labels=None if key_labels is None else key_labels[:s],
        kinds=("all",) * s,
        **problem.options,
    )


@torch.no_grad()
def _by_label(
    problem: Problem, labels: Tensor, key_labels: Tensor | None, lse: Tensor | None
) -> Perspective:
    """Values and constants of one label map; `lse` `(B, L)` over all candidates if it is known."""
    x = problem.query.detach()
    k = None if problem.key is None else problem.key.detach()
    options = {"query_labels": labels, "key_labels": key_labels, **problem.options}
    mean, count = (one[0] for one in positive_mean(x, k, **options))
    valid = count > 0
    other = labels if key_labels is None else key_labels
    candidates = (other[0] != problem.ignore_index).sum(1, keepdim=True)
    if problem.across:
        candidates = candidates.sum().reshape(1, 1)
    candidates = (candidates - int(k is None)).expand_as(count)
    share = 1 / count.clamp_min(1).to(mean.dtype)
    if problem.form == "pixel":
        negative = pair_logsumexp(x, k, kinds=("different",), **options)
        logs, tail = _positive_logs(x, k, negative, options)
        value = logs * share - mean
        a = -(tail * share).log() + negative[0]
        constants = (torch.where(tail > 0, a, inf), share, negative[0])
        blank = (inf, 0.0, inf)
    else:
        if lse is None:
            lse = pair_logsumexp(x, k, **options)[0]
        if problem.form == "in":
            together = pair_logsumexp(x, k, kinds=("same",), **options)[0]
            value = lse - together - share.log()
            constants, blank = (lse, together, lse), (inf, inf, inf)
        else:
            value = lse - mean
            constants, blank = (lse, share, lse), (inf, 0.0, inf)
    statistics = torch.stack(
        [torch.where(valid, one, other) for one, other in zip(constants, blank, strict=True)]
    )
    value = torch.where(valid, value, 0.0)
    return Perspective(value, valid, statistics, count, candidates, labels, key_labels)


def _positive_logs(
    x: Tensor, k: Tensor | None, negative: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """sum_p log(exp(s_ip) + D_i), and its derivative by log D_i, sum_p D_i / (exp(s_ip) + D_i)."""
    with torch.enable_grad():
        leaf = negative.detach().requires_grad_()
        logs = pair_positive_log(x, k, lse_negative=leaf, **options)
        (tail,) = torch.autograd.grad(logs.sum(), leaf)
    return logs[0].detach(), tail[0]


@torch.no_grad()
def _by_index(problem: Problem) -> Perspective:
    """Values and constants where positives are given by index."""
    index = problem.index
    assert index is not None and problem.key is not None
    x, k = problem.query.detach(), problem.key.detach()
    named = index >= 0
    count = named.sum(2)
    valid = count > 0
    labels = torch.where(valid, 0, problem.ignore_index).unsqueeze(0)
    lse = pair_logsumexp(x, k, query_labels=labels, **problem.options)[0]
    lse = torch.where(valid, lse, 0.0)
    options = {name: value for name, value in problem.options.items() if name != "ignore_index"}
    at = positive_at(x, k, index, **options)  # 0 where nothing is named
    share = 1 / count.clamp_min(1).to(lse.dtype)
    mean = at.sum(2) * share
    together = torch.where(named, at, -inf).logsumexp(2)
    if problem.form == "out":
        value, constants, blank = lse - mean, (lse, share, lse), (inf, 0.0, inf)
    elif problem.form == "in":
        value, constants, blank = lse - together - share.log(), (lse, together, lse), (inf,) * 3
    else:
        # what the positives leave of the sum over all candidates
        rest = (-(together - lse).exp().clamp_max(1)).log1p() + lse
        log = torch.logaddexp(at, rest.unsqueeze(2))
        value = torch.where(named, log, 0.0).sum(2) * share - mean
        a = -(torch.where(named, -log, -inf).logsumexp(2) + share.log())
        constants, blank = (a, share, rest), (inf, 0.0, inf)
    statistics = torch.stack(
        [torch.where(valid, one, other) for one, other in zip(constants, blank, strict=True)]
    )
    wide = k.shape[2] * (k.shape[0] if problem.across else 1)
    candidates = torch.full_like(count, wide)
    value = torch.where(valid, value, 0.0)
    return Perspective(value, valid, statistics, count, candidates, labels, None)


def full_loss(
    problem: Problem,
    query: Tensor,
    key: Tensor | None,
    labels: Labels | None,
    key_labels: Labels | None,
    reduction: str,
) -> Tensor | None:
    """The unfiltered loss with its own gradient, to the bit; None where no function has it."""
    options: dict[str, Any] = {
        "temperature": problem.temperature,
        "pairs": problem.pairs,
        "normalize": problem.normalize,
        "reduction": reduction,
        "impl": problem.impl,
    }
    if labels is not None:
        options |= {"key": key, "key_labels": key_labels, "ignore_index": problem.ignore_index}
        return supervised_contrastive(query, labels, form=problem.form, **options)
    assert problem.index is not None and key is not None
    one = problem.index.shape[2] == 1
    if not one and problem.form != "out":
        return None  # info_nce's "in" has no log |P|
    index = problem.index.squeeze(2) if one else problem.index
    index = index.reshape(*row_shape(query), *index.shape[2:])
    loss = info_nce(query, key, index, **options)
    assert isinstance(loss, Tensor)
    return loss
