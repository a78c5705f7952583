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

from . import patch_cases, samples
from .cases import Case, Draw, Sample


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
        moved = 1 if self.name == "pair_argmax" else 2
        return moved * tensors * case.channels * itemsize + 4.0 * case.maps * batch * length

    def _self_mode(self, case: Case) -> bool:
        return case.key_shape is None and self.name in _SELF_MODE


_SELF_MODE = (
    "pair_logsumexp",
    "pair_positive_log",
    "positive_mean",
    "supervised_contrastive",
    "pair_affinity",
    "patch_affinity_contrast",
)


def _import(path: str) -> Callable[..., Any]:
    module, name = path.split(":")
    return getattr(import_module(module), name)


def _key_rows(case: Case) -> int:
    batch, length = case.rows(key=True)
    return batch * length


# Shapes shared by the operations. N = B * L; tiles are 64 to 384 rows, packed rows 8 or 16 wide.
SELF_CASES = (
    Case("aligned", "whole tiles, a plain NCHW map", (1, 64, 16, 16), ignored=0.2),
    Case("ragged", "last tile and last vector incomplete", (1, 24, 787), ignored=0.1),
    Case("one_row", "no pair at all against itself", (1, 8, 1, 1)),
    Case("two_rows", "the smallest problem with a pair", (1, 8, 2), classes=1),
    Case("one_row_per_image", "pairs only across images", (5, 8, 1, 1), pairs="batch"),
    Case("channels_1", "D = 1: every similarity is +1 or -1", (2, 1, 5, 7)),
    Case("channels_3", "D below one vector", (2, 3, 5, 7), ignored=0.2),
    Case("channels_128", "a deep projection", (2, 128, 5, 7), pairs="batch"),
    Case("channels_256", "D above one tile of channels", (2, 256, 5, 7)),
    Case("volume", "NCDHW", (2, 16, 3, 4, 5), ignored=0.2),
    Case("batch", "candidates of all images, row index b * L + l", (3, 16, 7, 9), pairs="batch"),
    Case("image", "candidates of the own image only", (3, 16, 7, 9), ignored=0.2),
    Case("flat", "rows as (N, C)", (150, 16), ignored=0.2),
    Case("channels_last", "channel stride 1", (2, 16, 6, 9), layout="channels_last"),
    Case("transposed", "spatial strides do not merge", (2, 16, 6, 9), layout="transposed"),
    Case("sliced", "a window: offset, gaps, NaN around", (2, 16, 6, 9), layout="sliced"),
    Case("stepped", "channel stride doubled", (2, 16, 6, 9), layout="stepped", pairs="batch"),
    Case("flat_transposed", "rows stored column by column", (90, 16), layout="transposed"),
    Case("all_ignored", "no anchor: zeros, not NaN", (2, 16, 5, 5), labels="ignored"),
    Case("no_positives", "every label once", (1, 16, 9, 9), labels="distinct"),
    Case("single_class", "no negative", (2, 16, 6, 6), labels="single"),
    Case("duplicates", "equal rows", (2, 16, 8, 8), duplicates=True, pairs="batch"),
    Case("zero_rows", "zero vectors: similarity and gradient 0", (2, 16, 6, 6), zero_rows=True),
    Case("cold", "s up to 100: exp overflows without a shift", (1, 16, 200), temperature=0.01),
    Case("cool", "the usual temperature of MoCo", (2, 16, 100), temperature=0.07, pairs="batch"),
    Case("warm", "flat softmax", (2, 16, 100), temperature=0.5, ignored=0.1),
    Case("raw", "rows not normalised", (2, 8, 6, 9), normalize=False, temperature=1.0),
    Case("poisoned", "NaN in ignored rows must not leak", (2, 16, 9, 9), ignored=0.3, poison=True),
    Case(
        "poisoned_batch",
        "NaN in ignored rows of other images",
        (2, 16, 9, 9),
        ignored=0.3,
        poison=True,
        pairs="batch",
    ),
    Case(
        "bfloat16",
        "widened per tile",
        (2, 32, 9, 9),
        ignored=0.1,
        pairs="batch",
        dtypes=(torch.bfloat16,),
    ),
    Case("float16", "widened per tile", (2, 32, 9, 9), ignored=0.1, dtypes=(torch.float16,)),
)
_TWICE = {"one_row_per_image": (3, 8, 2, 1), "batch": (3, 16, 4, 5), "flat": (97, 16)}
_TWICE |= {"ragged": (1, 24, 411), "image": (3, 16, 5, 13), "channels_last": (2, 16, 7, 7)}


def against_key(case: Case) -> Case:
    """The same case with a key, of another size where `_TWICE` says so."""
    return replace(case, name=f"key_{case.name}", key_shape=_TWICE.get(case.name, case.shape))


KEY_CASES = (
    *(against_key(case) for case in SELF_CASES),
    Case(
        "key_no_anchors", "d_key is zero, not memory", (2, 16, 6), (2, 16, 9), labels="no_anchors"
    ),
    Case("key_no_candidates", "lse -inf", (2, 16, 6), (2, 16, 9), labels="no_candidates"),
)
SEVERAL_MAPS = (
    Case("three_maps", "perspectives share one pass", (2, 16, 6, 6), maps=3, ignored=0.2),
    Case("key_two_maps", "perspectives against a key", (2, 16, 6), (2, 16, 8), maps=2, ignored=0.2),
)
_QUEUE = Case("key_queue", "one set of rows for all images", (3, 16, 5, 5), (37, 16), pairs="batch")


def _kinds(case: Case, *kinds: str) -> Case:
    return replace(
        case,
        name=f"{case.name}_{'_'.join(kinds)}",
        options=(*case.options, ("kinds", kinds)),
        maps=len(kinds),
    )


def _some(cases: tuple[Case, ...], *names: str) -> tuple[Case, ...]:
    """Cases by name, the prefix of key cases left out."""
    return tuple(case for case in cases if case.name.removeprefix("key_") in names)


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
    replace(_QUEUE, labels="none"),
    *(_kinds(case, "same") for case in _some(SELF_CASES, *_MASKED, "flat", "all_ignored")),
    *(_kinds(case, "different") for case in _some(SELF_CASES, *_MASKED, "cold", "bfloat16")),
    *(_kinds(case, "same") for case in _some(KEY_CASES, *_MASKED)),
    *(_kinds(case, "different") for case in _some(KEY_CASES, *_MASKED)),
    *(_kinds(case, "all", "same") for case in _some(SELF_CASES, "image", "poisoned", "cold")),
    *(_kinds(case, "all", "same", "different") for case in SEVERAL_MAPS),
)


def _with(case: Case, name: str, reason: str, **options: Any) -> Case:
    return replace(
        case, name=name, reason=reason, options=(*case.options, *sorted(options.items()))
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
    replace(_QUEUE, labels="none"),
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
