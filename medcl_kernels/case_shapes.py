"""Shapes, layouts and values that all operations are tried on."""

from __future__ import annotations

from dataclasses import replace

import torch

from .cases import Case

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
QUEUE = Case("key_queue", "one set of rows for all images", (3, 16, 5, 5), (37, 16), pairs="batch")
