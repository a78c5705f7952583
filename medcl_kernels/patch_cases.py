"""Sample inputs of patch-affinity contrast and the uncertainty gate, for medcl_kernels.registry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Draw, Sample, bind
from .layout import rows

F32 = (torch.float32,)


def _case(name: str, reason: str, shape: tuple[int, ...], *more: Any, **changes: Any) -> Case:
    """A case; options of the call are given as a dict."""
    options = tuple(sorted(changes.pop("options", {}).items()))
    return Case(name, reason, shape, *more, **{"temperature": 1.0, **changes}, options=options)


SELF = (
    _case("aligned", "whole tiles, a plain NCHW map", (1, 64, 16, 16)),
    _case("ragged", "last tile and last vector incomplete", (1, 24, 787), options={"patches": 3}),
    _case("one_row", "only the pair with itself", (1, 8, 1, 1)),
    _case("two_rows", "the smallest problem with two rows", (1, 8, 2), options={"patches": 2}),
    _case("channels_1", "D = 1: every similarity is +1 or -1", (2, 1, 5, 7)),
    _case("channels_3", "D below one vector", (2, 3, 5, 7), options={"patches": 3}),
    _case("channels_256", "D above one tile of channels", (2, 256, 5, 7)),
    _case("volume", "NCDHW", (2, 16, 3, 4, 5), temperature=0.5, options={"classes": 3}),
    _case("image", "pairs of the own image only", (3, 16, 7, 9), options={"patches": 2}),
    _case("flat", "rows as (N, C)", (150, 16)),
    _case("channels_last", "channel stride 1", (2, 16, 6, 9), layout="channels_last"),
    _case("transposed", "spatial strides do not merge", (2, 16, 6, 9), layout="transposed"),
    _case("sliced", "a window: offset, gaps, NaN around", (2, 16, 6, 9), layout="sliced"),
    _case("duplicates", "equal rows", (2, 16, 8, 8), duplicates=True),
    _case("zero_rows", "similarity and gradient 0", (2, 16, 6, 6), zero_rows=True),
    _case("equal_ratios", "D = 0 everywhere", (2, 16, 6, 6), options={"equal": True}),
    _case("two_classes", "D up to 2, A negative", (2, 16, 90), options={"classes": 2}),
    _case(
        "many_classes",
        "more shares than registers hold",
        (1, 8, 75),
        options={"classes": 10, "patches": 2},
    ),
    _case("cold", "exponents up to 100, running maxima", (1, 16, 200), temperature=0.02),
    _case("warm", "the temperature in 3-D", (1, 32, 300), temperature=0.5, options={"patches": 3}),
    _case(
        "release2d",
        "weights swapped",
        (2, 16, 100),
        options={"form": "release2d", "classes": 2, "patches": 2},
    ),
    _case(
        "release2d_cold",
        "exponents of both signs",
        (1, 16, 100),
        temperature=0.02,
        options={"form": "release2d", "classes": 3},
    ),
    _case("raw", "rows not normalised", (2, 8, 6, 9), normalize=False, options={"patches": 2}),
    _case("shifted", "a shift with a gradient", (2, 16, 210), options={"shift": 0.7, "patches": 2}),
    _case("bfloat16", "widened per tile", (2, 32, 9, 9), dtypes=(torch.bfloat16,)),
    _case("float16", "widened per tile", (2, 32, 9, 9), dtypes=(torch.float16,)),
)
_OTHER = {"ragged": (1, 24, 411), "image": (3, 16, 5, 13), "flat": (97, 16), "raw": (2, 8, 11)}
_OTHER |= {"volume": (2, 16, 2, 3, 4), "one_row": (1, 8, 3, 1), "shifted": (2, 16, 450)}
KEY = tuple(
    replace(case, name=f"key_{case.name}", key_shape=_OTHER.get(case.name, case.shape))
    for case in SELF
)
LOSS = (
    *(case for case in SELF if case.name in ("ragged", "volume", "flat", "cold", "release2d")),
    *(case for case in KEY if case.name in ("key_ragged", "key_image", "key_bfloat16")),
    _case("sum", "the 2-D release's reduction", (2, 16, 5, 6), options={"reduction": "sum"}),
    _case("none", "one value per anchor", (2, 16, 5, 6), options={"reduction": "none"}),
    _case("max", "shift by the batch maximum", (2, 9, 40), (2, 9, 50), options={"shift": "max"}),
    _case(
        "max_attached",
        "the maximum has a gradient",
        (2, 9, 40),
        (2, 9, 50),
        options={"shift": "max_attached", "patches": 2},
    ),
)


def _timed(n: int, c: int, patches: int = 1, key: bool = False) -> Case:
    return _case(
        f"{n}x{c}x{patches}" if patches > 1 else f"{n}x{c}",
        "cells of one image",
        (1, c, n),
        (1, c, n) if key else None,
        dtypes=F32,
        options={"patches": patches},
    )


TIMED = (
    _timed(1024, 64),
    _timed(1024, 64, 3),
    _timed(4096, 256),
    _timed(4096, 256, 3),
    replace(_timed(4096, 256, 3, key=True), name="key_4096x256x3"),
)


def _ratio(name: str, reason: str, shape: tuple[int, ...], **options: Any) -> Case:
    """shape: of the label map, `(B, *spatial)`; layout and options of the drawing."""
    dtypes = options.pop("dtypes", F32)
    return _case(name, reason, shape, options=options, dtypes=dtypes)


RATIO = (
    _ratio("ragged", "more windows than one thread takes", (2, 40, 37), centers=201),
    _ratio("one_row", "one window", (1, 9, 9), centers=1),
    _ratio("volume", "3-D, three classes, one length per axis", (2, 12, 17, 9), boxes=True),
    _ratio("volume_full", "the whole window divides", (1, 12, 17, 9), normalizer="full"),
    _ratio("dense", "every cell: area tables", (2, 45, 51), centers=0, num_classes=4),
    _ratio("dense_small", "fewer cells than a program takes", (2, 13, 11), centers=0),
    _ratio("dense_small_volume", "the same in 3-D", (1, 5, 6, 4), centers=0, num_classes=3),
    _ratio("dense_volume", "every cell of a volume", (1, 9, 17, 12), centers=0, num_classes=3),
    _ratio("batch", "many images", (9, 21, 20), centers=31, int_type=torch.uint8),
    _ratio("many_classes", "a vector of labels, class by class", (1, 40, 40), num_classes=12),
    _ratio("300_classes", "labels that are no bytes", (1, 40, 40), num_classes=300, centers=9),
    _ratio("grid", "windows side by side", (2, 20, 33, 70), centers=0, grid=11, num_classes=4),
    _ratio("overlapping", "a copy as bytes", (2, 20, 21, 70), centers=60, length=19, num_classes=4),
    _ratio("transposed", "rows not contiguous", (2, 30, 33), transposed=True, num_classes=3),
    _ratio("dense_transposed", "tables of such maps", (2, 30, 33), transposed=True, centers=0),
    _ratio("offset", "windows that are not centred", (2, 30, 33), early=True, int_type=torch.int16),
    _ratio("int32", "narrower labels", (2, 30, 33), int_type=torch.int32, num_classes=3),
    _ratio("mask", "bool labels", (2, 30, 33), int_type=torch.bool),
    _ratio("float64", "for losses in float64", (2, 30, 33), dtypes=(torch.float64,)),
)
# as the published 3-D code samples: of 4 x 4 x 4 cells the receptive field
_GRID: dict[str, Any] = {"centers": 0, "grid": 32, "length": 23, "num_classes": 4}
RATIO_TIMED = (
    _ratio("512x64", "64 cells of 4 maps of 512 x 512", (4, 512, 512), centers=64),
    _ratio("dense512", "every cell of a 512 x 512 map", (1, 512, 512), centers=0),
    _ratio("128x64", "cells 32 apart of 2 volumes of 128", (2, 128, 128, 128), **_GRID),
)

GATE = (
    _case("ragged", "last block of pixels incomplete", (2, 24, 787)),
    _case("two_rows", "two pixels", (1, 3, 2), options={"logits": 3}),
    _case("one_row", "one pixel", (1, 8, 1, 1)),
    _case("channels_1", "one feature", (2, 1, 5, 7)),
    _case("channels_last", "channel stride 1", (2, 40, 6, 9), layout="channels_last"),
    _case("transposed", "spatial strides do not merge", (2, 16, 6, 9), layout="transposed"),
    _case("sliced", "a window: offset, gaps, NaN around", (2, 16, 6, 9), layout="sliced"),
    _case("stepped", "channel stride doubled", (2, 16, 6, 9), layout="stepped"),
    _case("volume", "NCDHW", (2, 100, 3, 4, 5), options={"logits": 5}),
    _case("flat", "rows as (N, C)", (150, 16)),
    _case("many_logits", "M = 50", (2, 16, 9, 9), options={"logits": 50}),
    _case("certain", "logits up to 100: U = 0", (2, 16, 9, 9), options={"scale": 60.0}),
    _case("image", "several images", (3, 70, 30, 40), dtypes=F32),
    _case("bfloat16", "widened per block", (2, 32, 9, 9), dtypes=(torch.bfloat16,)),
    _case("float16", "widened per block", (2, 32, 9, 9), dtypes=(torch.float16,)),
)
GATE_TIMED = (
    _case("4x64x256", "behind the stem of a 2-D network", (4, 64, 256, 256), dtypes=F32),
    _case("2x32x64", "a 3-D decoder stage", (2, 32, 64, 64, 64), dtypes=F32),
)


def shares(draw: Draw, patches: int, classes: int, key: bool, equal: bool = False) -> Tensor:
    """`(P, B, K, N)` float32 shares of a 9 x 9 window, their sum over classes at most 1."""
    batch, length = draw.case.rows(key)
    shape = (patches, batch, classes, length)
    counts = torch.randint(0, 81 // classes + 1, shape, generator=draw.generator)
    if equal:
        counts = torch.full(shape, 81 // (2 * classes))
    return (counts.double() / 81).float().to(draw.device)


def _affinity(draw: Draw) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Leaves, ratios and the options of the call."""
    options = dict(draw.case.options)
    drawn = (options.pop("patches", 1), options.pop("classes", 1))
    equal = options.pop("equal", False)
    leaves = {"query": draw.features()}
    ratios = {"query_ratios": shares(draw, *drawn, False, equal)}
    if draw.case.key_shape is not None:
        leaves["key"] = draw.features(key=True)
        ratios["key_ratios"] = shares(draw, *drawn, True, equal)
    return leaves, ratios, options


def draw_affinity(draw: Draw) -> Sample:
    leaves, ratios, options = _affinity(draw)
    shift = options.pop("shift", None)
    if shift is not None:
        leaves["shift"] = draw.numbers(()) * 0 + shift
    options |= {"temperature": draw.case.temperature, "normalize": draw.case.normalize, **ratios}

    def build(leaves: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        key = leaves.get("key")
        args = rows(leaves["query"]), None if key is None else rows(key)
        return args, {**options, "shift": leaves.get("shift")}

    return bind(build, leaves)


def draw_contrast(draw: Draw) -> Sample:
    leaves, ratios, options = _affinity(draw)
    options |= {"temperature": draw.case.temperature, "normalize": draw.case.normalize}
    options["key_ratios"] = ratios.get("key_ratios")
    own = ratios["query_ratios"]
    return bind(
        lambda leaves: ((leaves["query"], own), {**options, "key": leaves.get("key")}), leaves
    )


def draw_ratio(draw: Draw) -> Sample:
    shape, options = draw.case.shape, dict(draw.case.options)
    spatial, classes = shape[1:], options.get("num_classes", 2)
    labels = torch.randint(0, classes, shape, generator=draw.generator)
    if options.get("transposed"):
        labels = labels.transpose(-1, -2).contiguous().transpose(-1, -2)
    labels = labels.to(options.get("int_type", torch.int64)).to(draw.device)
    number = options.get("centers", 64)
    step = options.get("grid", 1)
    if number == 0:
        centers = torch.cartesian_prod(*(torch.arange(0, size, step) for size in spatial))
    else:
        centers = torch.stack(
            [torch.randint(0, size, (number,), generator=draw.generator) for size in spatial], 1
        )
    lengths = (options["length"],) if "length" in options else (5, 7, 9)
    windows = [((-(length // 2), length // 2 + 1),) * len(spatial) for length in lengths]
    if options.get("boxes"):
        windows = [((-2, 3), (-4, 5), (-1, 2)), ((-5, 6), (-1, 2), (-3, 4))]
    if options.get("early"):
        windows = [((-3, 2), (-4, 3)), ((0, 5), (-9, -2))]
    kwargs = {
        "num_classes": classes,
        "normalizer": options.get("normalizer", "clipped"),
        "dtype": draw.dtype,
    }
    return bind(lambda leaves: ((labels, centers.to(draw.device), windows), kwargs), {})


def draw_gate(draw: Draw) -> Sample:
    case, options = draw.case, dict(draw.case.options)
    shape = (case.shape[0], options.get("logits", 2), *case.shape[2:])
    logits = replace(case, shape=shape, zero_rows=False)
    leaves = {"features": draw.features()}
    drawn = Draw(logits, draw.dtype, draw.device, 1).features()
    leaves["logits"] = (drawn * options.get("scale", 1.0)).detach() if "scale" in options else drawn
    return bind(lambda leaves: ((rows(leaves["features"]), rows(leaves["logits"])), {}), leaves)
