"""Contests of patch-affinity contrast (PDCR) and the uncertainty gate (UAFS), for catalogue.py."""

from __future__ import annotations

from dataclasses import replace

import torch

from medcl_kernels.registry import Case, spec

from .contenders import Entry
from .contest import Contest, Goal

CONTRAST, AFFINITY = "patch_affinity_contrast", "pair_affinity"
RATIO, GATE = "patch_class_ratio", "uncertainty_reweight"


def _timed(op: str, name: str) -> Case:
    return next(case for case in spec(op).benchmarks if case.name == name)


def _entries(op: str, case: Case, *names: str) -> tuple[Entry, ...]:
    return tuple(Entry(name, name, op, case) for name in names)


def patches(quick: bool) -> list[Contest]:
    """PDCR at the sizes of the goals, and where the published way still fits."""
    at_least_4 = (Goal("cpu", "gemm", "speedup", 4.0),)
    small = _timed(CONTRAST, "1024x64x3")
    authors = replace(small, name="4x64x64x3", shape=(4, 64, 64))
    # the largest at which the published way's (B, C, N, N) products still take less than seconds
    fitting = replace(small, name="512x64x3", shape=(1, 64, 512))
    contests = [
        Contest(
            "patches",
            "patch_affinity_contrast, 64 cells of 4 images (the 2-D paper's layer), 3 patch sizes",
            _entries(CONTRAST, authors, "cpu", "gemm", "released"),
            (Goal("cpu", "gemm", "speedup", 1.0), Goal("cpu", "released", "speedup", 1.0)),
            seconds=2.0,
        ),
        Contest(
            "patches",
            "patch_affinity_contrast, 512 x 64, 3 patch sizes",
            _entries(CONTRAST, fitting, "cpu", "gemm", "released"),
            (Goal("cpu", "gemm", "speedup", 1.0), Goal("cpu", "released", "speedup", 1.0)),
            threads=(1,),
            seconds=6.0,
        ),
        Contest(
            "patches",
            "patch_affinity_contrast, 1024 x 64, 3 patch sizes",
            _entries(CONTRAST, small, "cpu", "gemm"),
            at_least_4,
            threads=(1,),
            seconds=3.0,
        ),
    ]
    if quick:
        return contests
    large, across = _timed(CONTRAST, "4096x256x3"), _timed(CONTRAST, "key_4096x256x3")
    contests += [
        Contest(
            "patches",
            "patch_affinity_contrast, 4096 x 256, 3 patch sizes",
            _entries(CONTRAST, large, "cpu", "gemm"),
            at_least_4,
            seconds=8.0,
        ),
        Contest(
            "patches",
            "patch_affinity_contrast across two layers, 4096 x 256, 3 patch sizes",
            _entries(CONTRAST, across, "cpu", "gemm"),
            (Goal("cpu", "gemm", "speedup", 1.0),),
            threads=(1,),
            seconds=6.0,
        ),
        Contest(
            "patches",
            "one patch size against a plain log-sum-exp, 4096 x 256",
            (
                Entry("affinity", "cpu", AFFINITY, _timed(AFFINITY, "4096x256")),
                Entry("logsumexp", "cpu", "pair_logsumexp", _plain(4096, 256)),
            ),
            (Goal("affinity", "logsumexp", "overhead", 1.5),),
            threads=(1,),
            seconds=4.0,
        ),
        Contest(
            "patches",
            "one patch size against a plain log-sum-exp, 1024 x 64",
            (
                Entry("affinity", "cpu", AFFINITY, _timed(AFFINITY, "1024x64")),
                Entry("logsumexp", "cpu", "pair_logsumexp", _plain(1024, 64)),
            ),
            (Goal("affinity", "logsumexp", "overhead", 1.5),),
            threads=(1,),
            seconds=2.0,
        ),
    ]
    return contests


def _plain(n: int, d: int) -> Case:
    return Case(f"{n}x{d}", "cells of one image", (1, d, n), labels="none", temperature=1.0)


def windows(quick: bool) -> list[Contest]:
    """Class shares of windows at the published sizes, and of every cell."""
    bound = (Goal("cpu", "released", "speedup", 50.0),)
    volume = _timed(RATIO, "128x64")
    wide = replace(volume, name="128x64_rf47", options=_changed(volume, length=47))
    contests = [
        Contest(
            "windows",
            "patch_class_ratio, 64 cells of 4 maps of 512 x 512, windows of 5, 7 and 9",
            _entries(RATIO, _timed(RATIO, "512x64"), "cpu", "released"),
            bound,
            seconds=3.0,
        ),
        Contest(
            "windows",
            "patch_class_ratio, cells 32 apart of 2 volumes of 128, 4 classes, field 23",
            _entries(RATIO, volume, "cpu", "released"),
            bound,
            seconds=4.0,
        ),
        Contest(
            "windows",
            "patch_class_ratio, every cell of a 512 x 512 map, windows of 5, 7 and 9",
            _entries(RATIO, _timed(RATIO, "dense512"), "cpu", "reference"),
            (Goal("cpu", "reference", "speedup", 1.0),),
            seconds=3.0,
        ),
    ]
    if not quick:
        contests.append(
            Contest(
                "windows",
                "patch_class_ratio, cells 32 apart of 2 volumes of 128, 4 classes, field 47",
                _entries(RATIO, wide, "cpu", "released"),
                bound,
                threads=(1,),
                seconds=6.0,
            )
        )
    return contests


def _changed(case: Case, **options: object) -> tuple[tuple[str, object], ...]:
    return tuple(sorted({**dict(case.options), **options}.items()))


def gates(quick: bool) -> list[Contest]:
    """The uncertainty gate, forward and backward, beside softmax, logarithm and products."""
    contests = []
    for case in spec(GATE).benchmarks[: 1 if quick else None]:
        contests.append(
            Contest(
                "gate",
                f"uncertainty_reweight, {' x '.join(map(str, case.shape))}",
                _entries(GATE, case, "cpu", "released"),
                (Goal("cpu", "released", "speedup", 1.0),),
                seconds=4.0,
            )
        )
    last = replace(spec(GATE).benchmarks[0], name="4x64x256_channels_last", layout="channels_last")
    half = Entry("cpu bf16", "cpu", GATE, spec(GATE).benchmarks[0], torch.bfloat16)
    plain = Entry("cpu", "cpu", GATE, spec(GATE).benchmarks[0])
    contests.append(
        Contest(
            "gate",
            "uncertainty_reweight in other layouts and dtypes",
            (plain, Entry("cpu channels_last", "cpu", GATE, last), half),
            threads=(1,),
            seconds=3.0,
        )
    )
    return contests
