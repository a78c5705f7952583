"""Tiny contenders, contests and rows for the tests of the benchmark suite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import catalogue, contest, record
from benchmarks.contenders import Entry
from benchmarks.contest import Contest, Goal, run_contest
from benchmarks.gate import Gate
from benchmarks.peers import eager
from medcl_kernels.registry import spec

SUPCON, INFO_NCE = catalogue.SUPCON, catalogue.INFO_NCE
TINY = {op: catalogue.flat(op, 64, 8) for op in (SUPCON, INFO_NCE)}
TINY["pair_logsumexp"] = TINY[SUPCON]
TINY["pair_topk"] = replace(TINY[SUPCON], options=(("scope", "global"),))
TINY["filtered_contrastive"] = replace(TINY[SUPCON], options=(("keep", 300),))
TINY["mitigate_rows"] = replace(TINY[SUPCON], maps=3)
TINY |= {
    op: next(case for case in spec(op).cases if case.name == "ragged")
    for op in ("patch_affinity_contrast", "patch_class_ratio", "uncertainty_reweight")
}


def entry(name: str, op: str = SUPCON, **changes: Any) -> Entry:
    """One contender on the tiny input of its loss."""
    return replace(Entry(name, name, op, TINY[op]), **changes)


def tiny_contest(*names: str, goals: tuple[Goal, ...] = ()) -> Contest:
    entries = tuple(entry(name) for name in names)
    return Contest("supcon", "tiny", entries, goals, threads=(1,), seconds=0.02)


def run_tiny(*names: str, **options: Any) -> dict[str, record.Row]:
    rows = run_contest(tiny_contest(*names), gate=Gate(), say=lambda line: None, **options)
    return {row.label: row for row in rows}


def raising(error: BaseException, after: int = 0) -> Any:
    """A contender that raises in one of its steps."""
    steps = iter(range(10**9))

    def loss(*args: Any, **options: Any) -> torch.Tensor:
        if next(steps) >= after:
            raise error
        return eager.class_sums(*args, **options)

    return loss


def timed_row(label: str, cpu_ms: float, flops: float = 1.0, **changes: Any) -> record.Row:
    row = contest.new_row("supcon", entry(label), 1)
    row.flops_needed = flops
    row.set_times([cpu_ms, 2 * cpu_ms], [cpu_ms, 2 * cpu_ms])
    for name, value in changes.items():
        setattr(row, name, value)
    return row


def write(path: Path, *rows: record.Row) -> str:
    record.save(path, record.document(list(rows), [], True))
    return str(path)
