"""Calls of the wgmma kernels: row statistics of 16-bit rows up to 128 channels wide, with two tiles
of 128 rows and of 128 columns where they are cheap enough."""

from __future__ import annotations

from dataclasses import replace

import emulator_cases as cases
from emulator_cases import Shape

LSE, LOG, MATCH = "pair_logsumexp", "pair_positive_log", "pair_argmax"
ALL: tuple[tuple[str, str, Shape], ...] = (
    (LSE, "bf16", Shape(40, 150, kinds=("all", "same"), layout="maps")),
    (LSE, "bf16", Shape(64, 40, 300, kinds=("same", "different"))),  # a stage is filled again
    (LSE, "fp16", Shape(128, 70, 200, batch=2, kinds=("different", "all"))),
    (LSE, "bf16", Shape(128, 20, 260, temperature=0.01)),  # the maximum rises from tile to tile
    (LSE, "fp16", Shape(16, 1, 1)),
    (LSE, "fp16", Shape(16, 70, batch=2, kinds=("all", "same", "different", "same"), across=True)),
    (LOG, "fp16", Shape(40, 135, kinds=("same", "same"))),
    (LOG, "bf16", Shape(128, 30, 70, batch=2, across=True, layout="steps")),
    (MATCH, "bf16", Shape(64, 20, 150, ignored=0)),
    (MATCH, "fp16", Shape(128, 140, 70, ignored=0, layout="maps")),
    (MATCH, "bf16", Shape(16, 9, 65, ignored=0, opposed=True)),
)
REPEATED = (ALL[0], ALL[2], ALL[6], ALL[8])


def call(operation: str, product: str, shape: Shape) -> cases.Call:
    """The forward call; it has no other."""
    one = cases.calls(operation, shape, product)[0]
    return replace(one, name=f"{one.name}-wgmma", options=one.options | {"wgmma": "1"})
