"""One contender while a contest runs: its steps, and how they are timed.

On the CPU a turn is one step, or several where one would be too short for the timer, in wall and in
process time. On a GPU it is one step between two CUDA events, after a write that empties the L2
cache; "wall" then is the time between the events, and "cpu" what the host spent on issuing the step
(with the wait for its end, in which torch may spin).
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .record import Row

SHORTEST_TURN = 0.004  # seconds; below it a turn is several steps, timer and loop cost would show
FLUSH_BYTES = 256 * 2**20  # several times the largest L2


@dataclass
class Turns:
    """One contender on the CPU."""

    row: Row
    step: Callable[[], Any]
    steps_per_turn: int = 1
    every: int = 1
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def turn(self) -> None:
        """Takes one turn; its milliseconds per step are appended."""
        start, start_cpu = time.perf_counter(), time.process_time()
        for _ in range(self.steps_per_turn):
            self.step()
        used = time.process_time() - start_cpu
        self.cpu.append(used / self.steps_per_turn * 1e3)
        self.wall.append((time.perf_counter() - start) / self.steps_per_turn * 1e3)

    def warm_up(self) -> float:
        """Takes a step or two that do not count, and chooses how many steps make a turn.

        Returns:
            Wall milliseconds of the first step.
        """
        self.turn()
        first = self.wall[0]
        if first < 1e3 * SHORTEST_TURN:
            self.turn()
            best = max(min(self.wall), 1e-3)
            self.steps_per_turn = math.ceil(1e3 * SHORTEST_TURN / best)
        self.wall.clear()
        self.cpu.clear()
        return first


class CudaTurns(Turns):
    """One contender on the current CUDA device."""

    _flush: torch.Tensor | None = None  # shared by all: its size is not anyone's peak memory

    def turn(self) -> None:
        if CudaTurns._flush is None:
            CudaTurns._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        CudaTurns._flush.zero_()
        start_cpu = time.process_time()
        start.record()
        self.step()
        end.record()
        end.synchronize()
        self.cpu.append((time.process_time() - start_cpu) * 1e3)
        self.wall.append(start.elapsed_time(end))

    def warm_up(self) -> float:
        """Two steps that do not count; the second fills `row.peak_mb`."""
        self.turn()
        first = self.wall[0]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.turn()
        self.row.peak_mb = (torch.cuda.max_memory_allocated() - before) / 2**20
        self.wall.clear()
        self.cpu.clear()
        return first


def turns_on(device: str) -> type[Turns]:
    """The class for a device type."""
    return CudaTurns if device == "cuda" else Turns


def take_turns(running: list[Turns], seconds: float) -> None:
    """Rounds of turns until the time is used; slow contenders sit out some rounds, but have at
    least three turns.
    """
    if not running:
        return
    for turns in running:
        turns.turn()
    cost = [turns.wall[0] * turns.steps_per_turn / 1e3 for turns in running]
    # an equal share of the time for everyone, between 3 and 60 turns each
    share = seconds / len(running)
    wanted = [min(60, max(3 if one < 1 else 2, round(share / max(one, 1e-6)))) for one in cost]
    rounds = max(wanted)
    for turns, number in zip(running, wanted, strict=True):
        turns.every = rounds // number
    gc.collect()
    gc.disable()
    try:
        for number in range(1, rounds):
            first = number % len(running)  # nobody always follows the same contender
            for turns in running[first:] + running[:first]:
                if number % turns.every == 0:
                    turns.turn()
    finally:
        gc.enable()
