"""What the Gradient Filter's and the Gradient Mitigator's operations are tried on."""

from __future__ import annotations

from dataclasses import replace

import torch

from .cases import Case, named, variant


def filtered(
    self_cases: tuple[Case, ...], key_cases: tuple[Case, ...], indexed: Case
) -> tuple[Case, ...]:
    """Cases of `pair_topk` and `pair_filtered_grad`.

    Args:
        self_cases, key_cases: shapes that all operations share.
        indexed: two maps of one shape, for positives by index.
    """
    # two blocks of rows are ragged enough, and the reference sorts all pairs
    self_cases, key_cases = _smaller(self_cases), _smaller(key_cases)
    by_name = {case.name: case for case in self_cases}
    ragged, batch, image = by_name["ragged"], by_name["batch"], by_name["image"]
    indexed = replace(indexed, options=(("indexed", True),))
    return (
        *named(
            self_cases, "aligned", "ragged", "two_rows", "batch", "flat", "channels_last", "sliced"
        ),
        *named(self_cases, "all_ignored", "no_positives", "single_class", "zero_rows", "cold"),
        *named(self_cases, "poisoned_batch", "bfloat16", "float16", "raw", "one_row"),
        # D = 1 has only ties, which rounding orders: a test of its own
        *named(self_cases, "channels_3", "channels_128", "channels_256"),
        *named(key_cases, "ragged", "batch", "poisoned", "no_anchors", "no_candidates"),
        variant(ragged, "ragged_in", "positives by their own softmax", form="in"),
        variant(ragged, "ragged_pixel", "three row constants", form="pixel"),
        variant(ragged, "global", "one selection of all pairs", scope="global"),
        variant(batch, "batch_anchor", "a selection per anchor", scope="anchor"),
        variant(image, "batch_global", "images compete", scope="global"),
        variant(ragged, "quotas", "positives and negatives apart", classes=2, scope="global"),
        variant(ragged, "sine", "score of representations", score="representation"),
        variant(indexed, "indexed", "positives by index", scope="global"),
        variant(replace(indexed, pairs="batch"), "indexed_batch", "of all images", form="pixel"),
        variant(indexed, "indexed_several", "ragged positives", positives=3, form="in"),
    )


def _smaller(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """The ragged case with fewer rows."""
    small = {"ragged": (1, 24, 331), "key_ragged": (1, 24, 331)}
    return tuple(replace(case, shape=small.get(case.name, case.shape)) for case in cases)


KEPT = (
    "ragged",
    "flat",
    "cold",
    "bfloat16",
    "all_ignored",
    "global",
    "sine",
    "batch_global",
    "indexed",
)


def losses(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """Cases of `filtered_contrastive`, from those of `filtered`."""
    ragged = next(case for case in cases if case.name == "ragged")
    return (
        *(case for case in cases if case.name in KEPT),
        variant(ragged, "recompute_in", "the selected pairs alone", form="in", use="recompute"),
        variant(ragged, "recompute", "the selected pairs alone", use="recompute"),
        variant(ragged, "renorm", "the gradient as large as the whole one", use="renorm"),
        variant(ragged, "undirected", "one pair of two directions", direction="undirected"),
        variant(ragged, "attract_only", "no repelled positives", pos_sign="attract_only"),
        variant(ragged, "full_denominator", "dense negatives", use="pos_full_den"),
        variant(ragged, "ragged_none", "one value per anchor", reduction="none", form="pixel"),
    )


def perspectives(self_cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """Cases of `mitigated_contrastive`."""
    three = tuple(
        replace(case, maps=3)
        for case in named(
            _smaller(self_cases), "ragged", "batch", "flat", "poisoned_batch", "bfloat16"
        )
    )
    distinct = replace(named(self_cases, "no_positives")[0], maps=2)
    return (*three, distinct, variant(three[0], "cagrad", "weights on a simplex", method="cagrad"))


_STACK = Case("three", "an NCHW map", (2, 16, 6, 9), maps=3, temperature=1.0)
MITIGATED = (
    _STACK,
    replace(_STACK, name="two_flat", reason="rows of (N, D)", shape=(150, 33), maps=2),
    replace(_STACK, name="eight", reason="the most there may be", shape=(90, 7), maps=8),
    replace(_STACK, name="one", reason="nothing to compare", maps=1),
    replace(_STACK, name="channels_last", reason="channels together", layout="channels_last"),
    replace(_STACK, name="bfloat16", reason="widened", dtypes=(torch.bfloat16, torch.float16)),
    variant(_STACK, "one_vector", "all rows as one", unit="flat"),
    variant(_STACK, "total", "not divided by M", reduction="sum"),
    *(variant(_STACK, method, method, method=method) for method in ("cagrad", "mean", "sum")),
    variant(_STACK, "consensus", "signs of single entries", method="consensus"),
    variant(replace(_STACK, shape=(60, 5)), "consensus_rows", "rows of (N, D)", method="consensus"),
    variant(_STACK, "cagrad_flat", "one small problem", method="cagrad", unit="flat"),
)
