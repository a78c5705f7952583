"""How the arguments of every operation and loss are put together from a drawn case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cases import IGNORE, Case, Draw, Sample, bind, spatial
from .layout import rows

Leaves = dict[str, Tensor]


def _options(case: Case) -> dict[str, Any]:
    """The options that every pair operation takes."""
    return {
        "temperature": case.temperature,
        "normalize": case.normalize,
        "across": case.across,
    }


def _labelled(draw: Draw) -> tuple[Leaves, Tensor | None, Tensor | None]:
    """Leaves and labels `(M, B, L)` of operations that have an optional key and optional labels."""
    case = draw.case
    labels = None if case.labels == "none" else draw.labels()
    blank = None if labels is None else (labels == IGNORE).all(0)
    leaves = {"query": draw.features(blank=blank)}
    if case.key_shape is None:
        return leaves, labels, None
    key_labels = None if case.labels == "none" else draw.labels(key=True)
    blank = None if key_labels is None else (key_labels == IGNORE).all(0)
    leaves["key"] = draw.features(key=True, blank=blank)
    return leaves, labels, key_labels


def _row_args(leaves: Leaves) -> tuple[Any, ...]:
    """`(query, key)` in row form; the key may be None."""
    key = leaves.get("key")
    return rows(leaves["query"]), None if key is None else rows(key)


def draw_logsumexp(draw: Draw) -> Sample:
    leaves, labels, key_labels = _labelled(draw)
    kinds = dict(draw.case.options).get("kinds", ("all",))
    kwargs = {"query_labels": labels, "key_labels": key_labels, "kinds": kinds}
    kwargs |= {"ignore_index": IGNORE, **_options(draw.case)}
    return bind(lambda leaves: (_row_args(leaves), kwargs), leaves)


def draw_positive_mean(draw: Draw) -> Sample:
    leaves, labels, key_labels = _labelled(draw)
    kwargs = {"query_labels": labels, "key_labels": key_labels, "ignore_index": IGNORE}
    kwargs |= _options(draw.case)
    return bind(lambda leaves: (_row_args(leaves), kwargs), leaves)


def draw_supervised_sum(draw: Draw) -> Sample:
    leaves, labels, _ = _labelled(draw)
    kwargs = {"ignore_index": IGNORE, **_options(draw.case)}
    return bind(lambda leaves: ((rows(leaves["query"]), labels), kwargs), leaves)


def draw_positive_log(draw: Draw) -> Sample:
    leaves, labels, key_labels = _labelled(draw)
    assert labels is not None
    # Of the size that a log-sum-exp over N negatives has; -inf where there is but one class.
    negative = draw.numbers(tuple(labels.shape)) * 2 + 0.5 / draw.case.temperature
    if draw.case.labels == "single":
        negative = torch.full_like(negative, float("-inf"))
    leaves["lse_negative"] = negative
    kwargs = {"query_labels": labels, "key_labels": key_labels, "ignore_index": IGNORE}
    kwargs |= _options(draw.case)

    def build(leaves: Leaves) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _row_args(leaves), {**kwargs, "lse_negative": leaves["lse_negative"]}

    return bind(build, leaves)


def draw_positive_at(draw: Draw) -> Sample:
    index = draw.positives(dict(draw.case.options).get("positives", 0))
    blank = (index < 0) if index.dim() == 2 else (index < 0).all(2)
    leaves = {"query": draw.features(blank=blank), "key": draw.features(key=True)}
    return bind(lambda leaves: ((*_row_args(leaves), index), _options(draw.case)), leaves)


def draw_info_nce_sum(draw: Draw) -> Sample:
    index = draw.positives()
    leaves = {"query": draw.features(blank=index < 0), "key": draw.features(key=True)}
    weight = draw.numbers(tuple(index.shape))

    def build(leaves: Leaves) -> tuple[tuple[Any, ...], dict[str, Any]]:
        dtype = leaves["query"].dtype
        own = weight.double() if dtype == torch.float64 else weight
        return (*_row_args(leaves), index, own), _options(draw.case)

    return bind(build, leaves)


def draw_argmax(draw: Draw) -> Sample:
    leaves = {"query": draw.features(), "key": draw.features(key=True)}
    return bind(lambda leaves: (_row_args(leaves), {"normalize": draw.case.normalize}), leaves)


def draw_pair_hinge(draw: Draw) -> Sample:
    options = dict(draw.case.options)
    several, margin = options.get("positives", 0), options.get("margin", 0.5)
    excluded = None if draw.case.labels == "none" else draw.positives(several)
    leaves = {"query": draw.features(), "key": draw.features(key=True)}
    kwargs = {"margin": margin, "across": draw.case.across}
    return bind(lambda leaves: ((*_row_args(leaves), excluded), kwargs), leaves)


def draw_info_nce(draw: Draw) -> Sample:
    case, options = draw.case, dict(draw.case.options)
    several, queue_rows = options.pop("positives", 0), options.pop("queue_rows", 0)
    index = draw.positives(several)
    blank = (index < 0) if index.dim() == 2 else (index < 0).all(2)
    leaves = {"query": draw.features(blank=blank), "key": draw.features(key=True)}
    if queue_rows:
        rows_shape = (queue_rows, case.channels)
        values = torch.randn(rows_shape, generator=draw.generator, dtype=torch.float64)
        leaves["queue"] = values.to(draw.dtype).to(draw.device)
    positives: Any = spatial(index, leaves["query"])
    if options.get("symmetric"):
        positives = (positives, spatial(draw.positives(several), leaves["key"]))
    if case.labels == "none":
        positives = None
    kwargs = {"pairs": case.pairs, "temperature": case.temperature, "normalize": case.normalize}
    kwargs |= options
    if "margin" in options:  # a hinge has no temperature
        del kwargs["temperature"]

    def build(leaves: Leaves) -> tuple[tuple[Any, ...], dict[str, Any]]:
        extra = {"queue": leaves["queue"]} if "queue" in leaves else {}
        return (leaves["query"], leaves["key"], positives), {**kwargs, **extra}

    return bind(build, leaves)


def draw_supervised(draw: Draw) -> Sample:
    case = draw.case
    leaves, labels, key_labels = _labelled(draw)
    assert labels is not None
    leaves = {"features": leaves["query"], **({"key": leaves["key"]} if "key" in leaves else {})}

    def maps(stacked: Tensor, features: Tensor) -> Any:
        several = [spatial(one, features) for one in stacked]
        return several if case.maps > 1 else several[0]

    kwargs = {"pairs": case.pairs, "temperature": case.temperature, "normalize": case.normalize}
    kwargs |= {"ignore_index": IGNORE, **dict(case.options)}
    if key_labels is not None:
        kwargs["key_labels"] = maps(key_labels, leaves["key"])
    own_labels = maps(labels, leaves["features"])

    def build(leaves: Leaves) -> tuple[tuple[Any, ...], dict[str, Any]]:
        extra = {"key": leaves["key"]} if "key" in leaves else {}
        return (leaves["features"], own_labels), {**kwargs, **extra}

    return bind(build, leaves)


def draw_correspondence(draw: Draw) -> Sample:
    leaves = {"query": draw.features(), "key": draw.features(key=True)}
    kwargs = {"normalize": draw.case.normalize, **dict(draw.case.options)}
    return bind(lambda leaves: ((leaves["query"], leaves["key"]), kwargs), leaves)
