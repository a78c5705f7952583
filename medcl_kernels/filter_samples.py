"""Arguments of the Gradient Filter's and the Gradient Mitigator's operations from a drawn case.

A selection is a step function: rounding may swap pairs whose scores are almost equal. So k is put
where consecutive scores lie furthest apart, and every arithmetic selects the same pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cases import IGNORE, Draw, Sample, bind, spatial
from .layout import rows
from .losses.filter_statistics import Perspective, Problem, problem_of
from .losses.gradient_mitigator import meeting_order
from .reference.pair_gradients import num_units, pair_gradients, unit_of_rows
from .reference.pair_topk import pair_topk as reference_topk

Leaves = dict[str, Tensor]
LARGE = 2**22  # pairs from which the reference takes too long, and k need not be exact
_NUMBERS = ("statistics", "threshold", "gradient")


def _labelled(draw: Draw) -> tuple[Leaves, dict[str, Any]]:
    """Leaves, and what says where positives are, as the losses take it."""
    case = draw.case
    if dict(case.options).get("indexed"):
        index = draw.positives(dict(case.options).get("positives", 0))
        blank = (index < 0) if index.dim() == 2 else (index < 0).all(2)
        leaves = {"query": draw.features(blank=blank), "key": draw.features(key=True)}
        return leaves, {"positives": spatial(index, leaves["query"])}
    labels = draw.labels()
    leaves = {"query": draw.features(blank=(labels == IGNORE).all(0))}
    said: dict[str, Any] = {"labels": spatial(labels[0], leaves["query"])}
    if case.key_shape is not None:
        key_labels = draw.labels(key=True)
        leaves["key"] = draw.features(key=True, blank=(key_labels == IGNORE).all(0))
        said["key_labels"] = spatial(key_labels[0], leaves["key"])
    return leaves, said


def _exact_problem(draw: Draw, leaves: Leaves, said: dict[str, Any]) -> tuple[Problem, Perspective]:
    """The problem in float64, by the reference; large ones in their own dtype by any backend."""
    case, options = draw.case, dict(draw.case.options)
    large = case.num_pairs() > LARGE
    exact = {
        name: leaf.detach() if large else leaf.detach().double() for name, leaf in leaves.items()
    }
    problem = problem_of(
        exact["query"],
        exact.get("key"),
        said.get("labels"),
        said.get("key_labels"),
        said.get("positives"),
        scope=options.get("scope", "image"),
        score=options.get("score", "pair"),
        form=options.get("form", "out"),
        temperature=case.temperature,
        pairs=case.pairs,
        normalize=case.normalize,
        ignore_index=IGNORE,
        impl="auto" if large else "reference",
        direction=options.get("direction", "directed"),
        pos_sign=options.get("pos_sign", "any"),
    )
    return problem, next(problem.perspectives())


def _selection(problem: Problem, one: Perspective, classes: int) -> tuple[Tensor, Tensor]:
    """k and a threshold between two scores, both `(classes, U)`."""
    if one.value.numel() * (problem.query if problem.key is None else problem.key).shape[2] > LARGE:
        k = problem.quota(one, 0.01)[0].clamp_max(2**20)
        return k, torch.zeros(k.shape, dtype=torch.float64, device=k.device)
    options = problem.selection_options(one)
    scope = options.pop("scope")
    options.pop("impl")
    _, gradient, ranked, positive = pair_gradients(problem.query, problem.key, **options)
    if problem.direction == "undirected":
        gradient = (gradient + gradient.transpose(1, 2)).triu(1)
        ranked = gradient.abs()
    if problem.sign == "attract_only":
        ranked = torch.where(positive & (gradient > 0), 0.0, ranked)
    unit = unit_of_rows(problem.query, scope, problem.across).unsqueeze(2).expand_as(ranked)
    units = num_units(problem.query, scope)
    k = torch.zeros((classes, units), dtype=torch.int64, device=ranked.device)
    threshold = torch.full(k.shape, torch.inf, dtype=torch.float64, device=ranked.device)
    for kind in range(classes):
        of_kind = torch.ones_like(positive) if classes == 1 else positive == (kind == 0)
        for u in range(units):
            scores = ranked[of_kind & (unit == u) & (ranked > 0)].sort(descending=True).values
            n = len(scores)
            if n == 0:
                continue
            first, last = max(1, n // 20), max(1, min(n - 1, n // 3))
            ratio = scores[first - 1 : last] / scores[first : last + 1] if n > 1 else scores[:1]
            k[kind, u] = first + int(ratio.argmax())
            at = int(k[kind, u])
            threshold[kind, u] = (scores[at - 1] * scores[at]).sqrt() if at < n else 0.0
    return k, threshold


def _in_dtype(kwargs: dict[str, Any], leaf: Tensor) -> dict[str, Any]:
    """Numbers rounded to float32, the same for every dtype of the features."""
    exact = leaf.dtype == torch.float64
    numbers = {name: kwargs[name].float() for name in _NUMBERS if name in kwargs}
    if exact:
        numbers = {name: value.double() for name, value in numbers.items()}
    return {**kwargs, **numbers}


def _row_args(leaves: Leaves) -> tuple[Tensor, Tensor | None]:
    key = leaves.get("key")
    return rows(leaves["query"]), None if key is None else rows(key)


def draw_topk(draw: Draw) -> Sample:
    leaves, said = _labelled(draw)
    problem, one = _exact_problem(draw, leaves, said)
    options = problem.selection_options(one)
    options.pop("impl")
    k, _ = _selection(problem, one, dict(draw.case.options).get("classes", 1))
    k = k.clamp_max(dict(draw.case.options).get("most", 2**62))
    listed = dict(draw.case.options).get("listed", True)
    kwargs = {**options, "k": k, "capacity": int(k.sum()) + 3 if listed else 0}
    return bind(lambda leaves: (_row_args(leaves), _in_dtype(kwargs, leaves["query"])), leaves)


def draw_filtered_grad(draw: Draw) -> Sample:
    leaves, said = _labelled(draw)
    problem, one = _exact_problem(draw, leaves, said)
    options = problem.selection_options(one)
    options.pop("impl")
    k, threshold = _selection(problem, one, dict(draw.case.options).get("classes", 1))
    kwargs = {**options, "threshold": threshold, "cut": torch.full_like(k, -1)}
    if dict(draw.case.options).get("listed"):
        found = reference_topk(
            problem.query, problem.key, k=k, capacity=int(k.sum()) + 3, **options
        )
        kwargs |= dict(zip(("anchor", "candidate", "gradient"), found[:3], strict=True))
    value = one.value.float()

    def build(leaves: Leaves) -> tuple[tuple[Any, ...], dict[str, Any]]:
        query, key = _row_args(leaves)
        own = value.double() if query.dtype == torch.float64 else value
        return (own, query, key), _in_dtype(kwargs, leaves["query"])

    return bind(build, leaves)


def draw_at(draw: Draw) -> Sample:
    case = draw.case
    leaves = {"query": draw.features()}
    if case.key_shape is not None:
        leaves["key"] = draw.features(key=True)
    query, key = _row_args(leaves)
    n = query.shape[0] * query.shape[2]
    m = n if key is None else key.shape[0] * key.shape[2]
    anchor = torch.randint(-1, n, (3 * n,), generator=draw.generator).to(draw.device)
    candidate = torch.randint(0, m, (3 * n,), generator=draw.generator).to(draw.device)
    kwargs = {"temperature": case.temperature, "normalize": case.normalize}
    return bind(lambda leaves: ((*_row_args(leaves), anchor, candidate), kwargs), leaves)


def draw_mitigate(draw: Draw) -> Sample:
    case = draw.case
    options = dict(case.options)
    # perspectives that share a part, so that only some rows conflict
    common = draw.features()
    stacked = torch.stack([draw.features() + 0.1 * common for _ in range(case.maps)])
    order = meeting_order(case.maps, "random", draw.generator).to(draw.device)

    def build(leaves: Leaves) -> tuple[tuple[Any, ...], dict[str, Any]]:
        stack = leaves["gradients"]
        in_rows = stack.movedim(2, 1).unsqueeze(1) if stack.dim() == 3 else stack.flatten(3)
        return (in_rows, order), options

    return bind(build, {"gradients": stacked})


def draw_filtered(draw: Draw) -> Sample:
    case = draw.case
    leaves, said = _labelled(draw)
    kwargs = {"pairs": case.pairs, "temperature": case.temperature, "normalize": case.normalize}
    kwargs |= {"ignore_index": IGNORE, "keep": dict(case.options).get("keep", 0), **said}
    if not kwargs["keep"]:
        problem, one = _exact_problem(draw, leaves, said)
        kwargs["keep"] = max(1, int(_selection(problem, one, 1)[0][0, 0]))
    kwargs |= {name: value for name, value in case.options if name not in ("indexed", "positives")}

    def build(leaves: Leaves) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (leaves["query"], leaves.get("key")), kwargs

    return bind(build, leaves)


def draw_perspectives(draw: Draw) -> Sample:
    case = draw.case
    labels = draw.labels()
    features = draw.features(blank=(labels == IGNORE).all(0))
    maps = [spatial(one, features) for one in labels]
    kwargs = {"pairs": case.pairs, "temperature": case.temperature, "normalize": case.normalize}
    kwargs |= {"ignore_index": IGNORE, "order": "fixed", **dict(case.options)}
    return bind(lambda leaves: ((leaves["features"], maps), kwargs), {"features": features})
