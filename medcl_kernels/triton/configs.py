"""Tile sizes: one small table, read by the launcher and by the ahead-of-time compilation test.

Every cell was chosen by compiling it, without a GPU: no spills, within shared memory (see
docs/gpu-notes.md). With `MEDCL_TRITON_AUTOTUNE=1` the cells of a row, and those of `FASTER`, are
timed at the first call of every size instead: some seconds to compile each of them (kept on disk by
Triton) and six runs; the choice is kept as long as the process lives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from .. import env


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled for one size of problem.

    Attributes:
        rows, columns: BM and BN, the tile of the pair matrix.
        warps, stages: as Triton means them.
        channels: contracted per step; 0 = all at once, the owned rows kept in registers.
        output: channels of the gradient that one program makes; 0 = all of them.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    channels: int = 0
    output: int = 0


WIDE = 1 << 30
INTERPRETED = Config(64, 32, 4, 1, channels=128, output=128)

# (kernel, precision, packed channels up to) -> from the fewest programs to the most. The last of a
# row fits into the 99 KB of shared memory that sm_86, sm_89 and sm_120 have.
TABLE: dict[tuple[str, str, int], tuple[Config, ...]] = {
    ("statistics", "half", 128): (Config(256, 64, 8, 3), Config(64, 64, 4, 3)),
    ("statistics", "half", 256): (Config(128, 64, 8, 3), Config(64, 64, 4, 2)),
    ("statistics", "half", WIDE): (Config(128, 64, 8, 2, channels=128),),
    ("statistics", "tf32", 64): (Config(256, 64, 8, 3), Config(64, 64, 4, 2)),
    ("statistics", "tf32", 128): (Config(128, 64, 8, 3), Config(64, 64, 4, 2)),
    # whole rows where a chip has the shared memory
    ("statistics", "tf32", 256): (Config(64, 64, 8, 2), Config(64, 64, 8, 2, channels=64)),
    ("statistics", "tf32", WIDE): (
        Config(128, 64, 8, 2, channels=64),
        Config(64, 64, 8, 2, channels=64),
    ),
    ("statistics", "ieee", WIDE): (Config(64, 64, 8, 2, channels=32),),
    # epilogues that hold more per pair: several selections, logarithms
    ("heavy", "half", 128): (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    ("heavy", "half", 256): (Config(128, 64, 8, 3), Config(64, 64, 8, 2)),
    ("heavy", "half", WIDE): (Config(64, 64, 8, 2, channels=128),),
    ("heavy", "tf32", 128): (Config(128, 64, 8, 3), Config(64, 64, 8, 2)),
    ("heavy", "tf32", WIDE): (Config(64, 64, 8, 2, channels=64),),
    ("argmax", "half", 256): (Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
    ("argmax", "half", WIDE): (Config(128, 64, 8, 2, channels=128),),
    ("argmax", "tf32", 128): (Config(64, 64, 4, 2),),
    ("argmax", "tf32", 256): (Config(64, 64, 8, 2), Config(64, 64, 4, 2, channels=64)),
    ("argmax", "tf32", WIDE): (Config(64, 64, 4, 2, channels=64),),
    ("argmax", "ieee", WIDE): (Config(64, 64, 8, 2, channels=32),),
    ("gradient", "half", 128): (Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
    ("gradient", "half", 256): (Config(128, 64, 8, 2), Config(64, 32, 4, 2)),
    ("gradient", "half", WIDE): (Config(128, 64, 8, 2, channels=64, output=128),),
    ("gradient", "tf32", 128): (Config(128, 64, 8, 2), Config(64, 32, 4, 2)),
    ("gradient", "tf32", WIDE): (Config(64, 32, 4, 2, channels=64, output=128),),
    ("gradient", "ieee", WIDE): (Config(64, 32, 8, 2, channels=32, output=64),),
    # gradients whose weights hold more per pair: several selections or patch sizes, logarithms
    ("heavy_gradient", "half", 128): (Config(128, 64, 8, 2), Config(64, 64, 8, 2)),
    ("heavy_gradient", "half", 256): (Config(128, 32, 8, 2),),
    ("heavy_gradient", "half", WIDE): (Config(64, 64, 8, 2, channels=64, output=128),),
    ("heavy_gradient", "tf32", 128): (Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
    ("heavy_gradient", "tf32", WIDE): (Config(64, 32, 8, 2, channels=64, output=128),),
    # counting scores, writing lists of pairs; one cell each: what counts must not be timed, which
    # would count again
    ("filter", "half", 128): (Config(64, 64, 8, 2),),
    ("filter", "half", WIDE): (Config(64, 64, 8, 2, channels=64),),
    ("filter", "tf32", WIDE): (Config(64, 64, 8, 2, channels=64),),
    ("filter", "ieee", WIDE): (Config(64, 64, 8, 2, channels=32),),
    # gradients of selected pairs, in both directions
    ("filtered", "half", 128): (Config(128, 32, 8, 2), Config(64, 32, 8, 2)),
    ("filtered", "half", WIDE): (Config(64, 64, 8, 2, channels=64, output=128),),
    ("filtered", "tf32", WIDE): (Config(64, 32, 8, 2, channels=64, output=128),),
    ("filtered", "ieee", WIDE): (Config(64, 32, 8, 2, channels=32, output=64),),
}

# Compute capability 8: mma.sync keeps both operands of the second product in registers.
OLDER: dict[tuple[str, str, int], tuple[Config, ...]] = {
    ("gradient", "tf32", 128): (Config(64, 64, 4, 2), Config(64, 32, 4, 2)),
    ("heavy_gradient", "half", 256): (Config(64, 64, 8, 2),),
}

# Triton before 3.7 (torch 2.10 and 2.11 bring 3.6) spills kilobytes in the larger tiles there: by
# the major part of the compute capability.
EARLIER: dict[int, dict[tuple[str, str, int], tuple[Config, ...]]] = {
    8: {("heavy_gradient", "half", 128): (Config(64, 64, 8, 2),)},
    10: {
        ("heavy_gradient", "half", 128): (Config(64, 32, 8, 2),),
        ("heavy_gradient", "half", 256): (Config(64, 32, 8, 2),),
        ("filtered", "half", 128): (Config(64, 32, 8, 2),),
    },
}
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
    EARLIER = {}

# Not in the table because an architecture spills or nothing says that they are faster: candidates
# for MEDCL_TRITON_AUTOTUNE=1.
FASTER: dict[tuple[str, str, int], tuple[Config, ...]] = {
    ("statistics", "half", 128): (Config(256, 128, 8, 2), Config(128, 128, 8, 3)),
    ("gradient", "half", 128): (Config(128, 128, 8, 2),),
    ("heavy_gradient", "half", 256): (Config(128, 64, 8, 2),),
}

# Where a kernel needs no row of its own: the one whose cells serve it.
SIMPLER = {"heavy": "statistics", "heavy_gradient": "gradient"}

_timed: dict[tuple[Any, ...], Config] = {}
_too_large: set[tuple[Any, ...]] = set()


def row(name: str, precision: str, width: int) -> tuple[str, str, int]:
    """The key of the row of the tables that serves a kernel and packed rows of `width`."""
    limits = [key[2] for key in TABLE if key[:2] == (name, precision) and key[2] >= width]
    if not limits:
        return row(SIMPLER[name], precision, width)
    return name, precision, min(limits)


def candidates(name: str, precision: str, width: int, capability: int) -> tuple[Config, ...]:
    """What the table offers on an architecture, by the major part of its compute capability."""
    key = row(name, precision, width)
    older = OLDER if capability < 9 else {}
    return EARLIER.get(capability, {}).get(key) or older.get(key) or TABLE[key]


def choose(
    name: str,
    precision: str,
    width: int,
    problems: int,
    rows: int,
    streamed: int,
    constants: dict[str, Any],
    device: torch.device,
    start: Callable[[Config], None],
) -> None:
    """Starts a kernel: the largest tiles that leave no multiprocessor idle and fit into the chip.

    Args:
        name, precision, width: see `TABLE`.
        problems, rows: how many rows there are to own.
        streamed: how many rows go past each of them.
        constants: what else the kernel is compiled with: its epilogue and options.
        device: where they are.
        start: launches with a configuration; what it writes may be written again.

    Raises:
        triton.OutOfResources: not even the smallest tiles fit.
    """
    if env.triton_interpreted():
        start(INTERPRETED)
        return
    several = candidates(name, precision, width, capability(device))
    faster = FASTER.get(row(name, precision, width), ())
    choice = len(several + faster) > 1
    if choice and env.triton_autotune() and not torch.cuda.is_current_stream_capturing():
        several += faster
        sizes = problems, rows.bit_length(), streamed.bit_length()
        key = (name, precision, width, *sizes, repr(sorted(constants.items())), device)
        if key not in _timed:
            _timed[key] = fastest(several, start)
        start(_timed[key])
        return
    for config in several[pick(several, problems, rows, multiprocessors(device)) :]:
        key = (name, precision, width, config, device)
        if key in _too_large:
            continue
        try:
            start(config)
            return
        except triton.OutOfResources:
            if config == several[-1]:
                raise
            _too_large.add(key)


def pick(several: tuple[Config, ...], problems: int, rows: int, processors: int) -> int:
    """The first configuration with a program for every multiprocessor, else the last."""
    for place, config in enumerate(several):
        if problems * triton.cdiv(rows, config.rows) >= processors:
            return place
    return len(several) - 1


def fastest(several: tuple[Config, ...], start: Callable[[Config], None]) -> Config:
    """The configuration with the shortest of a few runs; compiles all of them first."""
    times: dict[Config, float] = {}
    for config in several:
        try:
            start(config)
        except triton.OutOfResources:
            continue
        runs = []
        for _ in range(5):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            start(config)
            end.record()
            end.synchronize()
            runs.append(begin.elapsed_time(end))
        times[config] = min(runs)
    if not times:
        start(several[-1])  # says what does not fit
    return min(times, key=lambda config: times[config])


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU that holds the rows."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def capability(device: torch.device) -> int:
    """The major part of its compute capability."""
    return torch.cuda.get_device_capability(device)[0]
