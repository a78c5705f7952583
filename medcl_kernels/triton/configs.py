"""Tile sizes: one small table, read by the launcher and by the ahead-of-time compilation test.

Every cell was chosen by compiling it, without a GPU: no spills, within shared memory (see
docs/gpu-notes.md). `MEDCL_TRITON_AUTOTUNE=1` times the cells of a row, and `FASTER`, instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

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
INTERPRETED = Config(64, 32, 4, 1)

# (kernel, precision, packed channels up to) -> from the fewest programs to the most
TABLE: dict[tuple[str, str, int], tuple[Config, ...]] = {
    ("statistics", "half", 128): (Config(256, 64, 8, 3), Config(64, 64, 4, 3)),
    ("statistics", "half", 256): (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    ("statistics", "half", WIDE): (Config(128, 64, 8, 3, channels=128),),
    ("statistics", "tf32", 64): (Config(256, 64, 8, 3), Config(64, 64, 4, 3)),
    ("statistics", "tf32", 128): (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    ("statistics", "tf32", 256): (Config(64, 64, 4, 2),),
    ("statistics", "tf32", WIDE): (Config(64, 64, 4, 3, channels=64),),
    ("statistics", "ieee", WIDE): (Config(64, 64, 8, 2, channels=32),),
    ("argmax", "half", 128): (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    ("argmax", "half", 256): (Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
    ("argmax", "half", WIDE): (Config(128, 64, 8, 3, channels=128),),
    ("argmax", "tf32", 128): (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    ("argmax", "tf32", 256): (Config(64, 64, 4, 2),),
    ("argmax", "tf32", WIDE): (Config(64, 64, 4, 3, channels=64),),
    ("argmax", "ieee", WIDE): (Config(64, 64, 8, 2, channels=32),),
    ("gradient", "half", 128): (Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
    ("gradient", "half", 256): (Config(128, 64, 8, 2),),
    ("gradient", "half", WIDE): (Config(128, 64, 8, 2, channels=128, output=128),),
    ("gradient", "tf32", 128): (Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
    ("gradient", "tf32", 256): (Config(64, 32, 4, 2, output=128),),
    ("gradient", "tf32", WIDE): (Config(64, 32, 4, 2, channels=64, output=128),),
    ("gradient", "ieee", WIDE): (Config(64, 64, 8, 2, channels=32, output=64),),
}


def candidates(name: str, precision: str, width: int) -> tuple[Config, ...]:
    """The row of the table for a kernel."""
    limit = min(one[2] for one in TABLE if one[:2] == (name, precision) and one[2] >= width)
    return TABLE[name, precision, limit]


def choose(
    name: str,
    precision: str,
    width: int,
    problems: int,
    rows: int,
    device: torch.device,
    start: Callable[[Config], None],
) -> None:
    """Starts a kernel with the largest tiles that leave no multiprocessor idle."""
    if env.triton_interpreted():
        start(INTERPRETED)
        return
    several = candidates(name, precision, width)
    start(pick(several, problems, rows, device))


def pick(several: tuple[Config, ...], problems: int, rows: int, device: torch.device) -> Config:
    """The first configuration with a program for every multiprocessor, else the last."""
    for config in several:
        if problems * -(-rows // config.rows) >= multiprocessors(device):
            return config
    return several[-1]


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU that holds the rows."""
    return torch.cuda.get_device_properties(device).multi_processor_count
