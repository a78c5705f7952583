"""One record per operation and loss: where it is, what to try it on, what it costs.

Tests, benchmarks, `python -m medcl_kernels list` and the documentation read this; a new operation
or loss is one more record in `SPECS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch

from . import filter_cases, filter_samples, patch_cases, samples
from .case_shapes import KEY_CASES, QUEUE, SELF_CASES, SEVERAL_MAPS
from .cases import Case, Draw, Sample
from .cases import named as _some
from .cases import variant as _with


@dataclass(frozen=True)
class OpSpec:
    """What is known about one operation or loss.

    Attributes:
        name: as in `torch.ops.medcl` (operations) or in `medcl_kernels.functional` (losses).
        kind: "op" or "loss".
        summary: one line.
        function: "module:name", imported when first resolved.
        reference: "module:name" of the specification; for losses the loss itself, run with
            impl="reference".
        draw: makes a sample from a `Draw`.
        cases: inputs to test, each with a reason.
        benchmarks: inputs to time.
        cost: needed multiply-add FLOPs of forward and backward per unit u = pairs * D (2 per GEMM
            pass; recomputation is never counted), as (query against itself, query against key).
        tolerance: multiplies eps * scale in the tolerance of a test.
    """

    name: str
    kind: str
    summary: str
    function: str
    reference: str
    draw: Callable[[Draw], Sample]
    cases: tuple[Case, ...]
    benchmarks: tuple[Case, ...]
    cost: tuple[float, float]
    tolerance: float = 4.0

    def resolve(self) -> Callable[..., Any]:
        """The function itself; it takes `impl=`."""
        return _import(self.function)

    def resolve_reference(self) -> Callable[..., Any]:
        """The specification, called without `impl=`."""
        function = _import(self.reference)
        return partial(function, impl="reference") if self.kind == "loss" else function

    def sample(
        self, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
    ) -> Sample:
        """Arguments for one call; dtype and device only round and place the same values."""
        return self.draw(Draw(case, dtype, device, seed))

    def flops(self, case: Case) -> float:
        """FLOPs that forward and backward need."""
        batch, length = case.rows()
        if self.name in ("positive_mean", "positive_at"):
            return 6.0 * (batch * length + _key_rows(case)) * case.channels
        if self.name == "mitigate_rows":
            return float(case.maps * (case.maps + 3)) * batch * length * case.channels
        if self.name == "pair_at":
            return 18.0 * batch * length * case.channels
        unit = float(case.num_pairs()) * case.channels
        per_unit = self.cost[0] if self._self_mode(case) else self.cost[1]
        options = dict(case.options)
        directions = 2 if options.get("symmetric") else 1
        form = 2 if options.get("form") == "pixel" else 1  # a second pass over the pairs
        extra = batch * length * case.channels * float(options.get("queue_rows", 0))
        if options.get("intra_view"):
            extra += batch * length * length * case.channels * 0.75  # 6u
        return per_unit * (directions * form * unit + extra)

    def bytes(self, case: Case, itemsize: int = 4) -> float:
        """Bytes that must move: inputs in, gradients out, one float per row and map."""
        batch, length = case.rows()
        tensors = batch * length + (0 if self._self_mode(case) else _key_rows(case))
        if self.name == "mitigate_rows":
            return (2.0 * case.maps + 1) * batch * length * case.channels * itemsize
        moved = 1 if self.name in ("pair_argmax", "pair_topk") else 2
        return moved * tensors * case.channels * itemsize + 4.0 * case.maps * batch * length

    def _self_mode(self, case: Case) -> bool:
        return case.key_shape is None and self.name in _SELF_MODE


_SELF_MODE = (
    "pair_logsumexp",
    "pair_positive_log",
    "positive_mean",
    "supervised_contrastive",
    "pair_topk",
    "pair_filtered_grad",
    "pair_at",
    "filtered_contrastive",
    "mitigated_contrastive",
    "pair_affinity",
    "patch_affinity_contrast",
)


def _import(path: str) -> Callable[..., Any]:
    module, name = path.split(":")
    return getattr(import_module(module), name)


def _key_rows(case: Case) -> int:
    batch, length = case.rows(key=True)
    return batch * length


def _kinds(case: Case, *kinds: str) -> Case:
    return replace(
        case,
        name=f"{case.name}_{'_'.join(kinds)}",
        options=(*case.options, ("kinds", kinds)),
        maps=len(kinds),
    )


_MASKED = (
    "aligned",
    "ragged",
    "one_row",
    "batch",
    "no_positives",
    "single_class",
    "poisoned_batch",
)
_INDEXED = tuple(case for case in KEY_CASES if case.name != "key_one_row_per_image")
_LOGSUMEXP = (
    *SELF_CASES,
    *KEY_CASES,
    replace(SELF_CASES[0], name="no_labels", labels="none", ignored=0.0),
    replace(QUEUE, labels="none"),
    *(_kinds(case, "same") for case in _some(SELF_CASES, *_MASKED, "flat", "all_ignored")),
    *(_kinds(case, "different") for case in _some(SELF_CASES, *_MASKED, "cold", "bfloat16")),
    *(_kinds(case, "same") for case in _some(KEY_CASES, *_MASKED)),
    *(_kinds(case, "different") for case in _some(KEY_CASES, *_MASKED)),
    *(_kinds(case, "all", "same") for case in _some(SELF_CASES, "image", "poisoned", "cold")),
    *(_kinds(case, "all", "same", "different") for case in SEVERAL_MAPS),
)


_MAP = Case("map", "a dense map of two images", (2, 16, 6, 7), (2, 16, 6, 7), ignored=0.2)
_INFO_NCE = (
    *_some(KEY_CASES, "ragged", "one_row", "batch", "volume", "flat", "channels_last", "sliced"),
    *_some(KEY_CASES, "transposed", "all_ignored", "duplicates", "zero_rows", "cold", "poisoned"),
    *_some(KEY_CASES, "bfloat16", "float16", "raw"),
    replace(_MAP, name="identity", reason="positives=None", labels="none"),
    _with(_MAP, "none", "one value per anchor", reduction="none"),
    _with(_MAP, "sum", "not divided by the anchors", reduction="sum"),
    _with(_MAP, "queue", "two candidate sets", queue_rows=19),
    _with(replace(_MAP, pairs="queue"), "queue_only", "positive and queue", queue_rows=19),
    _with(_MAP, "intra_view", "a self pass beside a key pass", intra_view=True),
    _with(replace(_MAP, pairs="batch"), "everything", "all sets", intra_view=True, queue_rows=5),
    _with(_MAP, "symmetric", "both directions", symmetric=True),
    _with(_MAP, "several_out", "ragged positives", positives=3, multi_positive="out"),
    _with(_MAP, "several_in", "ragged positives", positives=3, multi_positive="in"),
    _with(
        replace(_MAP, pairs="queue"),
        "several_queue",
        "several positives and a queue",
        positives=3,
        queue_rows=5,
    ),
)
_ROWS_HINGE = (
    *_some(KEY_CASES, "ragged", "one_row", "batch", "image", "flat", "channels_last", "sliced"),
    *_some(KEY_CASES, "transposed", "zero_rows", "bfloat16", "float16", "two_rows", "channels_1"),
    replace(QUEUE, labels="none"),
    replace(_MAP, name="nothing_excluded", labels="none"),
    _with(_MAP, "several", "ragged positives", positives=3),
    Case("tiles", "several tiles of anchors and of candidates", (1, 8, 700), (1, 8, 2500)),
)


def _hinge(cases: tuple[Case, ...], **options: Any) -> tuple[Case, ...]:
    """The same cases at temperature 1, which a hinge has."""
    return tuple(
        _with(replace(one, temperature=1.0), one.name, one.reason, **options) for one in cases
    )


_DENSE_HINGE = _hinge(
    (
        *_some(KEY_CASES, "ragged", "one_row", "batch", "volume", "flat", "channels_last", "raw"),
        *_some(KEY_CASES, "transposed", "all_ignored", "zero_rows", "poisoned", "float16"),
        *_some(_INFO_NCE, "identity", "none", "sum", "queue", "queue_only", "intra_view"),
        *_some(_INFO_NCE, "everything", "symmetric"),
        _with(_MAP, "several", "ragged positives", positives=3),
    ),
    margin=0.25,
)
_SUPERVISED_BASE = (
    *_some(SELF_CASES, "ragged", "one_row", "batch", "image", "volume", "flat", "channels_last"),
    *_some(SELF_CASES, "sliced", "transposed", "all_ignored", "no_positives", "single_class"),
    *_some(SELF_CASES, "duplicates", "zero_rows", "cold", "poisoned", "bfloat16", "float16"),
    *_some(KEY_CASES, "batch", "image", "poisoned_batch", "single_class"),
    *SEVERAL_MAPS,
)
_SUPERVISED = (
    *(_with(case, f"{case.name}_out", case.reason, form="out") for case in _SUPERVISED_BASE),
    *(_with(case, f"{case.name}_in", case.reason, form="in") for case in _SUPERVISED_BASE),
    *(_with(case, f"{case.name}_pixel", case.reason, form="pixel") for case in _SUPERVISED_BASE),
    _with(SELF_CASES[0], "none", "one value per anchor", form="out", reduction="none"),
    _with(SELF_CASES[0], "base_temperature", "Khosla et al.'s factor", base_temperature=0.07),
)
_CORRESPONDENCE = tuple(
    case
    for case in KEY_CASES
    if case.name not in ("key_poisoned", "key_poisoned_batch", "key_one_row_per_image")
)


_FILTERED = filter_cases.filtered(SELF_CASES, KEY_CASES, _MAP)


def _timed(*sizes: tuple[int, int], key: bool) -> tuple[Case, ...]:
    """Flat float32 rows of N x D, and at the last size bfloat16 rows and an NCHW map."""
    cases = [
        Case(f"{n}x{d}", "flat rows", (n, d), (n, d) if key else None, dtypes=(torch.float32,))
        for n, d in sizes
    ]
    n, d = sizes[-1]
    dense = (n // 1024, d, 32, 32)
    cases += [
        replace(cases[-1], name=f"{n}x{d}_bf16", reason="widened", dtypes=(torch.bfloat16,)),
        replace(
            cases[-1],
            name=f"{n}x{d}_nchw",
            reason="a dense map, packed per tile",
            shape=dense,
            key_shape=dense if key else None,
            pairs="batch",
        ),
    ]
    return tuple(cases)


_SIZES = ((1024, 64), (1024, 128), (4096, 64), (4096, 128), (8192, 128), (8192, 64))
_SELF_TIMED, _KEY_TIMED = _timed(*_SIZES, key=False), _timed(*_SIZES, key=True)


def _op(
    name: str,
    summary: str,
    draw: Callable[[Draw], Sample],
    cases: tuple[Case, ...],
    benchmarks: tuple[Case, ...],
    cost: tuple[float, float],
) -> OpSpec:
    function = f"medcl_kernels.ops.{name}:{name}"
    reference = f"medcl_kernels.reference.{name}:{name}"
    return OpSpec(name, "op", summary, function, reference, draw, cases, benchmarks, cost)


def _loss(
    name: str,
    summary: str,
    draw: Callable[[Draw], Sample],
    cases: tuple[Case, ...],
    benchmarks: tuple[Case, ...],
    cost: tuple[float, float],
) -> OpSpec:
    function = f"medcl_kernels.losses.{name}:{name}"
    return OpSpec(name, "loss", summary, function, function, draw, cases, benchmarks, cost)


SPECS: tuple[OpSpec, ...] = (
    _op(
        "pair_logsumexp",
        "log-sum-exp of the similarities to the allowed candidates",
        samples.draw_logsumexp,
        _LOGSUMEXP,
        (*_SELF_TIMED, *_KEY_TIMED),
        (6.0, 8.0),
    ),
    _op(
        "pair_positive_log",
        "one logarithm per positive pair against the negatives",
        samples.draw_positive_log,
        (*SELF_CASES, *_some(KEY_CASES, *_MASKED, "cold", "bfloat16"), *SEVERAL_MAPS),
        _SELF_TIMED[:4],
        (6.0, 8.0),
    ),
    _op(
        "positive_mean",
        "mean similarity to the candidates of the same label, by class sums",
        samples.draw_positive_mean,
        (*SELF_CASES, *_some(KEY_CASES, *_MASKED, "cold", "bfloat16"), *SEVERAL_MAPS),
        _SELF_TIMED[:4],
        (0.0, 0.0),
    ),
    _op(
        "positive_at",
        "similarity to the key pixel that an index names",
        samples.draw_positive_at,
        (*_INDEXED, _with(_MAP, "several", "ragged positives", positives=3)),
        _KEY_TIMED[:4],
        (0.0, 0.0),
    ),
    _op(
        "info_nce_sum",
        "weighted sum of InfoNCE, gradients made in the forward pass",
        samples.draw_info_nce_sum,
        _INDEXED,
        _KEY_TIMED,
        (8.0, 8.0),
    ),
    _op(
        "supervised_sum",
        'sum of SupCon "out" over its anchors, gradient made in the forward pass',
        samples.draw_supervised_sum,
        SELF_CASES,
        _SELF_TIMED,
        (6.0, 6.0),
    ),
    _op(
        "pair_topk",
        "the k pairs with the largest gradient: per image, per anchor or of all",
        filter_samples.draw_topk,
        (*_FILTERED, _with(SELF_CASES[1], "rule", "no list", scope="global", listed=False)),
        _SELF_TIMED[:2],
        (2.0, 2.0),
    ),
    _op(
        "pair_filtered_grad",
        "values handed through with the gradient of the selected pairs only",
        filter_samples.draw_filtered_grad,
        (
            *_FILTERED,
            *(
                _with(case, f"{case.name}_listed", "a list of pairs", listed=True)
                for case in _some(_FILTERED, "ragged", "batch", "indexed", "poisoned_batch")
            ),
        ),
        _SELF_TIMED[:2],
        (6.0, 6.0),
    ),
    _op(
        "pair_at",
        "similarities of listed pairs of rows",
        filter_samples.draw_at,
        (
            *_some(SELF_CASES, "ragged", "batch", "flat", "two_rows", "channels_last", "bfloat16"),
            *_some(SELF_CASES, "zero_rows", "raw", "duplicates"),
            *_some(KEY_CASES, "ragged", "batch", "flat"),
        ),
        _SELF_TIMED[:2],
        (0.0, 0.0),
    ),
    _op(
        "mitigate_rows",
        "one gradient out of M that may contradict each other, by their Gram matrix",
        filter_samples.draw_mitigate,
        filter_cases.MITIGATED,
        tuple(replace(case, maps=3, dtypes=(torch.float32,)) for case in _SELF_TIMED[:4]),
        (0.0, 0.0),
    ),
    _op(
        "pair_argmax",
        "most similar key pixel of the same image, ties to the smallest index",
        samples.draw_argmax,
        _CORRESPONDENCE,
        _KEY_TIMED[:4],
        (2.0, 2.0),
    ),
    _op(
        "pair_hinge",
        "sum over the negatives of what their similarities exceed a margin by",
        samples.draw_pair_hinge,
        _hinge(_ROWS_HINGE),
        _KEY_TIMED[:4],
        (6.0, 6.0),
    ),
    _op(
        "pair_affinity",
        "log-sum-exp and sum over all pairs, weighted by the affinity of patches",
        patch_cases.draw_affinity,
        (*patch_cases.SELF, *patch_cases.KEY),
        patch_cases.TIMED,
        (6.0, 8.0),
    ),
    _op(
        "patch_class_ratio",
        "class shares of windows of a label map",
        patch_cases.draw_ratio,
        patch_cases.RATIO,
        patch_cases.RATIO_TIMED,
        (0.0, 0.0),
    ),
    _op(
        "uncertainty_reweight",
        "features times two minus the entropy of a few logits",
        patch_cases.draw_gate,
        patch_cases.GATE,
        patch_cases.GATE_TIMED,
        (0.0, 0.0),
    ),
    _loss(
        "patch_affinity_contrast",
        "patch-dragsaw contrast within a layer or across two",
        patch_cases.draw_contrast,
        patch_cases.LOSS,
        patch_cases.TIMED,
        (6.0, 8.0),
    ),
    _loss(
        "info_nce",
        "dense InfoNCE: image, batch or queue negatives, intra-view, symmetric",
        samples.draw_info_nce,
        _INFO_NCE,
        _KEY_TIMED,
        (8.0, 8.0),
    ),
    _loss(
        "supervised_contrastive",
        "dense supervised contrast in the forms out, in and pixel",
        samples.draw_supervised,
        _SUPERVISED,
        _SELF_TIMED,
        (6.0, 8.0),
    ),
    OpSpec(
        "mitigated_contrastive",
        "loss",
        "supervised contrast of several perspectives, their gradients mitigated per pixel",
        "medcl_kernels.losses.gradient_mitigator:mitigated_contrastive",
        "medcl_kernels.losses.gradient_mitigator:mitigated_contrastive",
        filter_samples.draw_perspectives,
        filter_cases.perspectives(SELF_CASES),
        (),
        (6.0, 6.0),
    ),
    OpSpec(
        "filtered_contrastive",
        "loss",
        "contrast whose gradient flows through the most telling pairs only",
        "medcl_kernels.losses.gradient_filter:filtered_contrastive",
        "medcl_kernels.losses.gradient_filter:filtered_contrastive",
        filter_samples.draw_filtered,
        filter_cases.losses(_FILTERED),
        _SELF_TIMED[:2],
        (8.0, 10.0),
    ),
    _loss(
        "dense_hinge",
        "matched pixels at cosine 1, all others below a margin",
        samples.draw_info_nce,
        _DENSE_HINGE,
        _hinge(_KEY_TIMED[:4], margin=0.5),
        (6.0, 6.0),
    ),
    _loss(
        "dense_correspondence",
        "which key pixel matches which query pixel, one way or mutual",
        samples.draw_correspondence,
        (
            *_some(_CORRESPONDENCE, "ragged", "one_row", "image", "volume", "flat", "sliced"),
            _with(_MAP, "mutual", "both ways agree", mutual=True),
        ),
        _KEY_TIMED[:4],
        (2.0, 2.0),
    ),
)


def spec(name: str) -> OpSpec:
    """The record of one operation or loss.

    Raises:
        KeyError: there is none; the message lists the names.
    """
    for one in SPECS:
        if one.name == name:
            return one
    raise KeyError(f"no operation or loss {name!r}: {', '.join(one.name for one in SPECS)}")
