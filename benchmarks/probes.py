"""What turns cannot measure: peak memory, each in a process of its own, and bits for two numbers of
threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from medcl_kernels.registry import Case, spec

from . import memory
from .catalogue import BF16, INFO_NCE, MATCH, SUPCON, flat, with_options
from .catalogue_gcl import FILTERED, kept
from .contenders import Entry, rows_of, run_once
from .contest import describe, free_memory, new_row
from .gate import TOLERANCE, Gate, compare, judged_case, truth
from .patch_catalogue import CONTRAST
from .record import Row, judged_goal

MEMORY_GOAL = {SUPCON: 64.0, INFO_NCE: 112.0}  # extra MB at N = 65536, D = 64
GROWTH_GOAL = 1.05
PATCHES_CASE = next(case for case in spec(CONTRAST).benchmarks if case.name == "4096x256x3")
LARGEST = 65536
LARGEST_TRUTH = 16384  # rows; beyond, a float64 run takes minutes


@dataclass(frozen=True)
class Plan:
    """Which memory is measured.

    Attributes:
        op: the loss.
        n: rows, with D = 64.
        names: contenders.
        case: another input than flat rows.
    """

    op: str
    n: int
    names: tuple[str, ...]
    case: Case | None = None


def plans(quick: bool) -> list[Plan]:
    """Peers at a size where all fit and at the largest; the package at sizes in between."""
    if quick:
        return [Plan(SUPCON, 8192, ("cpu", "chunk")), Plan(INFO_NCE, 8192, ("cpu", "lce"))]
    found = [
        Plan(SUPCON, 8192, ("cpu", "chunk", "class-sums", "eager", "compile", "pml")),
        Plan(INFO_NCE, 8192, ("cpu", "lce", "chunk", "eager", "compile", "pml")),
    ]
    found.append(Plan(CONTRAST, 4096, ("cpu", "gemm"), PATCHES_CASE))
    for n in (4096, 16384):
        found += [Plan(SUPCON, n, ("cpu",)), Plan(INFO_NCE, n, ("cpu",))]
    for n in (8192, 16384, 32768):  # a list of pairs; at the largest also a tenth of all, by rule
        for keep in (2**18,) if n < 32768 else (2**18, 0.1):
            case = kept(flat(SUPCON, n, 64), keep)
            found.append(Plan(FILTERED, n, ("cpu", "eager"), case))
    return found + [
        Plan(SUPCON, LARGEST, ("cpu", "chunk", "eager")),
        Plan(INFO_NCE, LARGEST, ("cpu", "lce", "eager")),
    ]


def measure_memory(
    quick: bool,
    say: Callable[[str], None],
    add: Callable[[Row], None],
    skip: Callable[[Entry], str | None],
    timeout: float,
) -> None:
    """Adds one row per plan and contender, judged against a chunked float64 run of the same size,
    or, above `LARGEST_TRUTH` rows, the package and its peer against each other; where no such run
    exists, on fewer rows.

    Args:
        quick: smaller sizes, fewer peers.
        say: gets one line per row.
        add: gets every row before it is measured; rows are filled in as results come.
        skip: why an entry is left out, or None.
        timeout: seconds for one step; a child has three times as long for everything.
    """
    rows: list[Row] = []
    by_input: dict[Entry, list[tuple[Entry, Row, Any]]] = {}
    for plan in plans(quick):
        for name in plan.names:
            entry = Entry(name, name, plan.op, plan.case or flat(plan.op, plan.n, 64))
            row = new_row("memory", entry, 2)
            add(row)  # "running" until it is judged
            reason = entry.unavailable() or skip(entry)
            if reason is None:
                tensors = _measure_one(entry, row, 3 * timeout)
                if tensors is not None:
                    # the truth of one input costs as much as the slowest contender: once for all
                    key = replace(entry, label="", contender="")
                    by_input.setdefault(key, []).append((entry, row, tensors))
            else:
                row.fail("skipped", reason)
            say(f"  {describe(row)}: {_outcome(row)}")
            rows.append(row)
    for found in by_input.values():
        _judge(found, say)
    _memory_goals(rows)


def _measure_one(entry: Entry, row: Row, timeout: float) -> Any:
    """Fills in a row; the results, if there are any."""
    limit = int(0.6 * free_memory())
    peak = memory.measure(entry, row.threads, limit=limit, timeout=timeout, tensors=True)
    if peak.status != "ok":
        row.fail(peak.status, peak.reason)
        row.notes["limit_mb"] = limit / 2**20
        return None
    row.peak_mb, row.repeats = peak.extra_mb, 1
    row.notes |= {"gradients_mb": peak.gradients_mb, "method": peak.method}
    row.notes |= {"one_step_cpu_ms": peak.cpu_ms, "one_step_wall_ms": peak.wall_ms}
    return peak.tensors


def _judge(found: list[tuple[Entry, Row, Any]], say: Callable[[str], None]) -> None:
    """Correctness of all contenders of one input."""
    first = found[0][0]
    exact, gate = None, None
    if judged_case(first.spec, first.case) != first.case:
        gate = Gate()
    elif len(found) < 2 or rows_of(first.case)[0] <= LARGEST_TRUTH:
        say(f"  {first.op} {first.case.name}: float64 truth by blocks ...")
        exact = truth(first)
    for entry, row, tensors in found:
        if gate is not None:
            verdict = gate.judge(entry)
        elif exact is not None:
            verdict = compare(*tensors, *exact, TOLERANCE[entry.dtype])
        else:
            other, _, others = next(one for one in found if one[0] != entry)
            verdict = compare(*tensors, *others, TOLERANCE[entry.dtype])
            verdict = replace(verdict, judged_on=f"agreement with {other.label}")
        row.set_verdict(verdict)
        row.status = "ok"
        if not verdict.passed:
            row.peak_mb = None
            row.fail("FAIL", verdict.reason)
        error = math.nan if verdict.error is None else verdict.error
        say(f"  {describe(row)}: gradient off by {error:.1e} {row.judged_on}")


def _memory_goals(rows: list[Row]) -> None:
    """The goal at the largest size, and the growth over all sizes, of the package's own rows."""
    for row in rows:
        if row.op == CONTRAST and row.impl == "cpu" and row.peak_mb is not None:
            name = "extra MB, at most twice the input and 32"
            inputs = PATCHES_CASE.shape[1] * PATCHES_CASE.shape[2] * 4 / 2**20
            row.goals.append(judged_goal(name, row.peak_mb, 2 * inputs + 32, "<="))
    for op, bound in MEMORY_GOAL.items():
        own = [row for row in rows if row.op == op and row.impl == "cpu"]
        own = [row for row in own if row.peak_mb is not None]
        if not own:
            continue
        last = max(own, key=lambda row: row.n)
        if last.n == LARGEST:
            name = f"extra MB with gradients at {LARGEST} x 64"
            last.goals.append(judged_goal(name, last.peak_mb, bound, "<="))
        if len(own) > 2 and last.n == LARGEST:
            exponent = fitted_exponent([row.n for row in own], [row.peak_mb or 0 for row in own])
            last.notes["growth_exponent"] = exponent
            last.goals.append(judged_goal("exponent of extra MB in N", exponent, GROWTH_GOAL, "<="))


def fitted_exponent(sizes: list[int], values: list[float]) -> float:
    """Slope of the least-squares line through (log size, log value)."""
    xs = [math.log(size) for size in sizes]
    ys = [math.log(max(value, 1e-9)) for value in values]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - mean_x) ** 2 for x in xs)


def _outcome(row: Row) -> str:
    if row.peak_mb is None:
        return f"{row.status}, {row.reason}"
    return f"{row.peak_mb:.0f} MB extra, {row.notes['gradients_mb']:.0f} of them gradients"


def bit_entries() -> list[Entry]:
    """Inputs whose results must not depend on the number of threads: ragged on purpose."""
    supcon, info_nce = flat(SUPCON, 4097, 65), flat(INFO_NCE, 4097, 65)
    few = flat(SUPCON, 1501, 33)
    maps = Case("3x40x41x48", "NCHW", (3, 48, 40, 41), (3, 48, 40, 41), pairs="image")
    return [
        Entry("out", "cpu", SUPCON, supcon),
        Entry("in", "cpu", SUPCON, with_options(supcon, "in", form="in")),
        Entry("pixel", "cpu", SUPCON, with_options(supcon, "pixel", form="pixel")),
        Entry("out bf16", "cpu", SUPCON, supcon, BF16),
        Entry("per image", "cpu", SUPCON, replace(maps, key_shape=None)),
        Entry("flat", "cpu", INFO_NCE, info_nce),
        Entry("per anchor", "cpu", INFO_NCE, with_options(info_nce, "none", reduction="none")),
        Entry("flat fp64", "cpu", INFO_NCE, info_nce, torch.float64),
        Entry("per image", "cpu", INFO_NCE, maps),
        Entry("match", "cpu", MATCH, flat(MATCH, 4097, 65)),
        Entry("list of pairs", "cpu", FILTERED, kept(few, 5000, scope="global")),
        Entry("rule for pairs", "cpu", FILTERED, kept(few, 0.2)),
        Entry("pairs by anchor", "cpu", FILTERED, kept(few, 9, scope="anchor")),
        Entry(
            "loss of the pairs",
            "cpu",
            FILTERED,
            kept(few, (2000, 40000), use="recompute", form="pixel"),
        ),
        Entry("renormed pairs", "cpu", FILTERED, kept(few, 0.02, use="renorm")),
        Entry("three, mitigated", "cpu", "mitigated_contrastive", replace(few, maps=3)),
        Entry("three rows", "cpu", "mitigate_rows", replace(supcon, maps=3)),
        Entry("patches", "cpu", CONTRAST, ragged_patches(None)),
        Entry("patches of two layers", "cpu", CONTRAST, ragged_patches((2, 65, 1500))),
    ]


def ragged_patches(key_shape: tuple[int, ...] | None) -> Case:
    """Three patch sizes, row counts that fill no tile."""
    return replace(PATCHES_CASE, name="2x65x2049x3", shape=(2, 65, 2049), key_shape=key_shape)


def compare_bits(
    say: Callable[[str], None], add: Callable[[Row], None], threads: tuple[int, ...] = (1, 2)
) -> None:
    """Adds a row per entry that says whether all numbers of threads gave the same bits, twice."""
    for entry in bit_entries():
        row = new_row("bits", entry, max(threads))
        reason = entry.unavailable()
        if reason is not None:
            row.fail("skipped", reason)
        else:
            equal = same_bits(entry, threads)
            row.status = "ok" if equal else "FAIL"
            row.reason = "" if equal else f"results differ between {threads} threads"
            row.notes["bits_equal"] = equal
            name = f"same bits with {' and '.join(map(str, threads))} threads"
            row.goals.append(judged_goal(name, float(equal), 1.0, ">="))
        say(f"  {entry.op} {entry.label}: {row.reason or 'same bits'}")
        add(row)


def same_bits(entry: Entry, threads: tuple[int, ...]) -> bool:
    """Whether outputs and gradients have the same bits at every number of threads, repeatedly."""
    function, sample = entry.function(), entry.sample()
    before, first = torch.get_num_threads(), None
    try:
        for number in threads * 2:
            torch.set_num_threads(number)
            outputs, gradients = run_once(function, sample)
            now = [*(value.detach() for value in outputs), *gradients.values()]
            if first is None:
                first = now
            elif not all(torch.equal(a, b) for a, b in zip(first, now, strict=True)):
                return False
    finally:
        torch.set_num_threads(before)
    return True
