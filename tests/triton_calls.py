"""Calls of the Triton operations that triton_compile.py compiles, by kernel and form, and which
table of medcl_kernels/triton/configs.py serves each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import medcl_kernels.triton as kernels
from medcl_kernels.triton import pair_gradients, pair_threshold


def arguments_of(dtype: torch.dtype, channels: int, selections: int = 1) -> dict[str, Tensor]:
    """Small aligned tensors; only types, strides and alignment matter."""
    rows = torch.zeros(2, channels, 64, dtype=dtype)
    labels = torch.zeros(selections, 2, 64, dtype=torch.int64)
    return {"x": rows, "k": rows.clone(), "y": labels, "v": labels.float()}


def selections_of(label: str) -> int:
    """How many label selections a call of this name has."""
    return 4 if "four" in label else 3 if label == "heavy" or "three" in label else 1


def _logsumexp(a: dict[str, Tensor], key: bool, kinds: str, t: float) -> Callable[[], Any]:
    k, y = (a["k"], a["y"]) if key else (None, None)
    return lambda: kernels.pair_logsumexp(a["x"], k, a["y"], y, kinds, -1, t, True, False)


def _logsumexp_backward(a: dict[str, Tensor], key: bool, kinds: str, t: float) -> Any:
    k, y = (a["k"], a["y"]) if key else (None, None)
    rest = (kinds, -1, t, True, False, True, True)
    return lambda: kernels.pair_logsumexp_backward(a["v"], a["v"], a["x"], k, a["y"], y, *rest)


def _positive_log(a: dict[str, Tensor]) -> Callable[[], Any]:
    rest = (a["v"], -1, 0.1, True, False)
    return lambda: kernels.pair_positive_log(a["x"], None, a["y"], None, *rest)


def _positive_log_backward(a: dict[str, Tensor], key: bool) -> Callable[[], Any]:
    k, y = (a["k"], a["y"]) if key else (None, None)
    rest = (a["y"], y, a["v"], -1, 0.1, True, False, True, True)
    return lambda: kernels.pair_positive_log_backward(a["v"], a["x"], k, *rest)


def _mean(a: dict[str, Tensor]) -> Callable[[], Any]:
    rest = (a["y"], None, -1, 0.1, True, False)
    return lambda: (
        kernels.positive_mean(a["x"], None, *rest),
        kernels.positive_mean_backward(a["v"], a["x"], None, *rest, True, True),
    )


def _at(a: dict[str, Tensor]) -> Callable[[], Any]:
    rest = (a["y"][0], 0.1, True)
    return lambda: (
        kernels.positive_at(a["x"], a["k"], *rest),
        kernels.positive_at_backward(a["v"][0], a["x"], a["k"], *rest, True, True),
    )


def _affinity(
    a: dict[str, Tensor],
    key: bool = False,
    classes: int = 1,
    form: str = "affinity",
    t: float = 1.0,
    patches: int = 3,
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Several patch sizes, forward and backward; between two tensors the shift is given and takes a
    gradient."""
    k = a["k"] if key else None
    ratios, terms = torch.zeros(patches, 2, classes, 64), torch.zeros(patches, 2, 64)
    shift = torch.zeros(()) if key else None
    given = (k, ratios, ratios if key else None, shift, form, t, True)
    need = (True, key, key)
    return (
        lambda: kernels.pair_affinity(a["x"], *given),
        lambda: kernels.pair_affinity_backward(terms, terms, terms, a["x"], *given, *need),
    )


def _class_ratio(a: dict[str, Tensor]) -> Callable[[], Any]:
    """Few windows, which are counted, and many, which are looked up."""
    maps = a["y"].reshape(2, 8, 8)
    few, many = torch.zeros(2, 2).long(), torch.zeros(4096, 2).long()
    rest = ([-2, 3, -2, 3, -4, 5, -4, 5], 3, False, False)
    return lambda: (
        kernels.patch_class_ratio(maps, few, *rest),
        kernels.patch_class_ratio(maps, many, *rest),
    )


def _gate(a: dict[str, Tensor]) -> Callable[[], Any]:
    z = a["x"][:, :16].contiguous()
    return lambda: (
        kernels.uncertainty_reweight(a["x"], z),
        kernels.uncertainty_reweight_backward(a["x"], a["x"], z, True, True),
    )


def _listed(a: dict[str, Tensor]) -> Callable[[], Any]:
    rest = (a["y"].flatten(), a["y"].flatten(), 0.1, True)
    return lambda: (
        kernels.pair_at(a["x"], None, *rest),
        kernels.pair_at_backward(a["v"].flatten(), a["x"], None, *rest, True, True),
    )


def _statistics(a: dict[str, Tensor]) -> Tensor:
    return a["v"][:1].expand(3, -1, -1).contiguous()


def _count(a: dict[str, Tensor]) -> Callable[[], Any]:
    """Quotas of positives and negatives, and the longest formulas: the sweep that counts."""
    options = ("pixel", "representation", -1, True, False)
    k = torch.ones(2, 2, dtype=torch.int64)

    def call() -> Any:
        rows = (a["x"], None, a["y"], None, None, _statistics(a))
        return pair_threshold.threshold_of(pair_gradients.pairs_of(*rows, *options), k, (1.0,))

    return call


def _topk(a: dict[str, Tensor]) -> Callable[[], Any]:
    options = (128, "out", "pair", "global", -1, 0.1, True, False)
    k = torch.ones(1, 1, dtype=torch.int64)
    return lambda: kernels.pair_topk(a["x"], None, a["y"], None, None, _statistics(a), k, *options)


def _filtered(a: dict[str, Tensor], key: bool, form: str, score: str) -> Callable[[], Any]:
    """Positives by label in both directions at once, or by index in one."""
    classes = 1 if key else 2
    rule = (torch.ones(classes, 2), torch.ones(classes, 2, dtype=torch.int64), None, None, None)
    options = (form, score, "image", -1, 0.1, True, False, True, True)
    index = a["y"][0, :, :, None].contiguous() if key else None
    k, v = a["k"] if key else None, a["v"][0]

    def call() -> Any:
        rows = (v, a["x"], k, v, a["y"][:1], None, index, _statistics(a))
        return kernels.pair_filtered_grad_backward(*rows, *rule, *options)

    return call


def _mitigate(a: dict[str, Tensor]) -> Callable[[], Any]:
    """The most perspectives, and the most rounds."""
    eight, three = (a["x"].repeat(m, 1, 1, 1) for m in (8, 3))
    order, few = (torch.zeros(m, m - 1, dtype=torch.int64) for m in (8, 3))
    rows = three.transpose(2, 3).contiguous().transpose(2, 3)
    return lambda: (
        kernels.mitigate_rows(eight, order, "pcgrad", "row", "mean", 0.5, False),
        kernels.mitigate_rows(rows, few, "cagrad", "flat", "mean", 0.5, True),
        kernels.mitigate_rows(rows, few, "consensus", "row", "mean", 0.5, True),
    )


THREE = "all,same,different"
FOUR = f"{THREE},different"  # a launch of three and one of the rest
CALLS: dict[str, Callable[[dict[str, Tensor]], Callable[[], Any]]] = {
    "statistics": lambda a: _logsumexp(a, False, "all", 0.1),
    "heavy": lambda a: _logsumexp(a, False, THREE, 0.1),
    "argmax": lambda a: lambda: kernels.pair_argmax(a["x"], a["k"], True),
    "gradient": lambda a: _logsumexp_backward(a, False, "all", 0.1),
    "heavy_gradient": lambda a: _affinity(a)[1],
    "filter": _count,
    "filtered": lambda a: _filtered(a, False, "pixel", "representation"),
}
AFFINITIES: dict[str, dict[str, Any]] = {
    "pair_affinity": {},
    "pair_affinity, key and shift": {"key": True},
    "pair_affinity, key and shift, cold": {"key": True, "t": 0.01},
    "pair_affinity, cold": {"t": 0.01},
    "pair_affinity, release2d, 3 classes": {"classes": 3, "form": "release2d"},
    "pair_affinity, 10 classes": {"classes": 10},
    "pair_affinity, one size": {"patches": 1},
}
OTHER_CALLS: dict[str, Callable[[dict[str, Tensor]], Callable[[], Any]]] = {
    "pair_logsumexp, key, running maximum": lambda a: _logsumexp(a, True, "all", 0.01),
    "pair_logsumexp, different": lambda a: _logsumexp(a, False, "different", 0.1),
    "pair_logsumexp, three, running maxima": lambda a: _logsumexp(a, False, THREE, 0.01),
    "pair_logsumexp backward, key": lambda a: _logsumexp_backward(a, True, "all", 0.1),
    "pair_logsumexp backward, three": lambda a: _logsumexp_backward(a, False, THREE, 0.1),
    "pair_logsumexp backward, four": lambda a: _logsumexp_backward(a, False, FOUR, 0.1),
    "pair_logsumexp backward, cold": lambda a: _logsumexp_backward(a, False, "all", 0.01),
    "pair_logsumexp backward, three, cold": lambda a: _logsumexp_backward(a, False, THREE, 0.01),
    "pair_positive_log": _positive_log,
    "pair_positive_log, three": _positive_log,
    "pair_positive_log backward, key": lambda a: _positive_log_backward(a, True),
    "pair_positive_log backward, three": lambda a: _positive_log_backward(a, False),
    "positive_mean": _mean,
    "positive_at": _at,
    "patch_class_ratio": _class_ratio,
    "uncertainty_reweight": _gate,
    "pair_topk": _topk,
    "pair_filtered_grad, key": lambda a: _filtered(a, True, "in", "pair"),
    "listed": _listed,
    "mitigate_rows": _mitigate,
}
OTHER_TABLES = {
    "pair_logsumexp, key, running maximum": "statistics",
    "pair_logsumexp, different": "statistics",
    "pair_logsumexp, three, running maxima": "heavy",
    "pair_logsumexp backward, key": "gradient",
    "pair_logsumexp backward, three": "heavy_gradient",
    "pair_logsumexp backward, four": "heavy_gradient",
    "pair_logsumexp backward, cold": "gradient",
    "pair_logsumexp backward, three, cold": "heavy_gradient",
    "pair_positive_log": "heavy",
    "pair_positive_log, three": "heavy",
    "pair_positive_log backward, key": "heavy_gradient",
    "pair_positive_log backward, three": "heavy_gradient",
    "pair_topk": "filter",
    "pair_filtered_grad, key": "filtered",
}
# further forms of kernels that are compiled with every cell under another label
VARIANTS = {
    "pair_logsumexp, different",
    "pair_logsumexp, three, running maxima",
    "pair_logsumexp backward, key",
    "pair_logsumexp backward, four",
    "pair_logsumexp backward, cold",
    "pair_logsumexp backward, three, cold",
    "pair_positive_log, three",
    "pair_positive_log backward, key",
}
for _name, _options in AFFINITIES.items():
    for _way, _table in enumerate(("heavy", "heavy_gradient")):
        _label = f"{_name}{' backward' * _way}"
        OTHER_CALLS[_label] = lambda a, way=_way, options=_options: _affinity(a, **options)[way]
        OTHER_TABLES[_label] = "statistics" if (_options, _way) == ({"patches": 1}, 0) else _table
        if _options:
            VARIANTS.add(_label)
