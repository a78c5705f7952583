"""Contenders take turns in one process: A B C A B C ..., so that a disturbance hits all of them.

Two times are taken of each turn (turns.py says which); on the CPU the minimum is quoted, on a GPU
the median, and all of minimum, median, 20th and 80th percentile are recorded. A step is forward and
backward from raw features to their gradients, or forward alone, without building the inputs.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from medcl_kernels.dispatch import BackendUnavailable

from .contenders import Entry, rows_of
from .gate import Gate, Verdict
from .record import Row
from .turns import Turns, take_turns, turns_on


@dataclass(frozen=True)
class Goal:
    """One number that a row should reach, from its own times and those of another entry.

    Attributes:
        of: label of the entry that is judged.
        against: label of the entry that it is compared with.
        kind: "speedup" (time of `against` over time of `of`, at least `bound`), "overhead" (the
            inverse, at most `bound`), "overhead_per_flop" (both times divided by the FLOPs that
            their inputs need first, at most `bound`) or "overhead_per_work" (time over
            `expected_ms`, at most `bound`); or, of `of` alone, "roofline" (share, at least `bound`)
            and "extra MB" (peak memory of a step, at most `bound`).
        bound: the goal.
        stretch: a further goal, or None.
        threads: at which number of threads; None for all.
        clock: "cpu" or "wall".
        stat: "min" or "median" of the turns.
    """

    of: str
    against: str
    kind: str
    bound: float
    stretch: float | None = None
    threads: int | None = None
    clock: str = "cpu"
    stat: str = "min"


@dataclass(frozen=True)
class Contest:
    """Entries that take turns.

    Attributes:
        group: the table it belongs to, what `--only` selects.
        title: of its block in the table.
        entries: the contenders; those of one input should stand together.
        goals: what is asked of them.
        threads: numbers of threads, one round of turns for each.
        seconds: about how long the turns may take, per number of threads.
    """

    group: str
    title: str
    entries: tuple[Entry, ...]
    goals: tuple[Goal, ...] = ()
    threads: tuple[int, ...] = (1, 2)
    seconds: float = 6.0


def run_contest(
    contest: Contest,
    *,
    gate: Gate,
    say: Callable[[str], None],
    scale: float = 1.0,
    timeout: float = 60.0,
    skip: Callable[[Entry], str | None] = lambda entry: None,
    errors: str = "raise",
    ceilings: Mapping[str, float] = MappingProxyType({}),
    starts: Callable[[Contest, Entry | None], None] = lambda contest, entry: None,
) -> list[Row]:
    """Judges, times and compares the entries of one contest.

    Args:
        contest: what to run.
        gate: remembers truths between contests of one input.
        say: gets one line of progress per entry.
        scale: multiplies the seconds of the turns.
        timeout: seconds for one step; a contender that needs more becomes a row "timeout".
        skip: why an entry is left out in this run, or None.
        errors: "raise" what a contender raises, or "record" it as a row "error" (on a GPU, where
            one kernel that does not launch must not cost the other results).
        ceilings: GFLOP/s of a large matrix product by arithmetic, for shares of the roofline.
        starts: called before each first step, the one that may take the process with it, and
            with None before the turns.

    Raises:
        DeviceLost: after an error the device answers no more; `rows` as for KeyboardInterrupt.

    Returns:
        One row per number of threads and entry, in that order; also for entries that failed. On
        Ctrl-C the rows measured so far are attached to the KeyboardInterrupt as `rows`.
    """
    rows: list[Row] = []
    running: list[Turns] = []
    verdicts: dict[str, Verdict | Row] = {}
    threads_before = torch.get_num_threads()
    try:
        for threads in contest.threads:
            torch.set_num_threads(threads)
            running, here = [], []
            for entry in contest.entries:
                row = new_row(contest.group, entry, threads)
                row.ceiling_gflops_per_s = ceilings.get(row.dtype)
                here.append(row)
                rows.append(row)
                starts(contest, entry)
                _admit(entry, row, running, verdicts, gate, say, timeout, skip, errors)
            starts(contest, None)
            take_turns(running, contest.seconds * scale)
            for turns in running:
                turns.row.set_times(turns.cpu, turns.wall)
            compare_rows(here, contest, threads)
    except (KeyboardInterrupt, DeviceLost) as stop:
        for turns in running:
            if turns.wall:
                turns.row.set_times(turns.cpu, turns.wall)
        stop.rows = [row for row in rows if row.status != "running"]  # type: ignore[attr-defined]
        raise
    finally:
        torch.set_num_threads(threads_before)
    return rows


def new_row(group: str, entry: Entry, threads: int) -> Row:
    """A row with everything that is known before the run."""
    n, d = rows_of(entry.case)
    return Row(
        group=group,
        op=entry.op,
        impl=entry.contender,
        label=entry.label,
        case=entry.case.name,
        shape=list(entry.case.shape),
        n=n,
        d=d,
        dtype=entry.arithmetic,
        threads=threads,
        options={key: _plain(value) for key, value in entry.case.options},
        flops_needed=entry.flops(),
        device=entry.device,
        mode=entry.mode,
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _admit(
    entry: Entry,
    row: Row,
    running: list[Turns],
    verdicts: dict[str, Verdict | Row],
    gate: Gate,
    say: Callable[[str], None],
    timeout: float,
    skip: Callable[[Entry], str | None],
    errors: str,
) -> None:
    """Gate and first step of one entry; what passes joins `running`."""
    reason = entry.unavailable() or skip(entry)
    if reason is not None:
        row.fail("skipped", reason)
        say(f"  {describe(row)}: skipped, {reason}")
        return
    try:
        if entry.label not in verdicts:
            start = time.perf_counter()
            verdicts[entry.label] = gate.judge(entry)
            took = time.perf_counter() - start
            if took > timeout and not entry.compiles:
                verdicts[entry.label] = row
                row.fail("timeout", f"the first step took {took:.0f} s, allowed {timeout:.0f} s")
        verdict = verdicts[entry.label]
        if isinstance(verdict, Row):  # out of memory or time at another number of threads
            row.fail(verdict.status, verdict.reason)
            return
        row.set_verdict(verdict)
        if not verdict.passed:
            row.fail("FAIL", verdict.reason)
            say(f"  {describe(row)}: FAIL, {verdict.reason}")
            return
        turns = turns_on(entry.device)(row, entry.stepper(entry.sample()))
        if entry.compiles:
            turns.step()  # compiles for this number of threads
        first = turns.warm_up()
        running.append(turns)
        off = "" if verdict.error is None else f" (off by {verdict.error:.1e})"
        say(f"  {describe(row)}: gate passed{off}, first step {first:.2f} ms")
    except Exception as error:
        if out_of_memory(error):
            row.fail("OOM", first_line(error))
        elif isinstance(error, BackendUnavailable):
            row.fail("skipped", first_line(error))
        elif errors == "record":
            row.fail("error", f"{type(error).__name__}: {first_line(error)}")
        else:
            raise
        verdicts[entry.label] = row
        say(f"  {describe(row)}: {row.status}, {row.reason}")
        error.__traceback__ = None  # its frames hold the tensors of the step
        _give_memory_back(entry.device)


class DeviceLost(Exception):
    """A failed kernel has left a context in which every further call fails."""


def _give_memory_back(device: str) -> None:
    """Frees what a failed step has cached.

    Raises:
        DeviceLost: the device does not answer.
    """
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        raise DeviceLost(first_line(error)) from None


def compare_rows(rows: list[Row], contest: Contest, threads: int) -> None:
    """Speed-ups and goals of the rows of one number of threads."""
    by_label = {row.label: row for row in rows}
    for goal in contest.goals:
        if goal.threads not in (None, threads):
            continue
        row, other = by_label[goal.of], by_label[goal.against]
        row.add_goal(_measured(goal, row, other), goal)
    for row in rows:
        entry = next(entry for entry in contest.entries if entry.label == row.label)
        if not entry.ours or row.status != "ok":
            continue
        for other in rows:
            if other is not row and other.status == "ok":
                row.speedup_vs[other.label] = {
                    f"{clock}_min": getattr(other, f"{clock}_min_ms")
                    / getattr(row, f"{clock}_min_ms")
                    for clock in ("cpu", "wall")
                }


def _measured(goal: Goal, row: Row, other: Row) -> float | None:
    if row.status != "ok" or other.status != "ok":
        return None
    if goal.kind == "roofline":
        return row.roofline_share
    if goal.kind == "extra MB":
        return row.peak_mb
    ours = getattr(row, f"{goal.clock}_{goal.stat}_ms")
    theirs = getattr(other, f"{goal.clock}_{goal.stat}_ms")
    if goal.kind == "speedup":
        return theirs / ours
    if goal.kind == "overhead_per_flop":
        return ours / row.flops_needed / (theirs / other.flops_needed)
    if goal.kind == "overhead_per_work":
        row.notes["exponential_ns"] = each = exponential_ns()
        return ours / expected_ms(row, other, theirs, each)
    return ours / theirs


def expected_ms(row: Row, other: Row, theirs: float, exponential: float) -> float:
    """Time of one exponential per pair, and of the FLOPs that `row` needs at the price that `other`
    paid for its own beyond its exponentials.

    Args:
        row: flat rows against as many.
        other: likewise, with so many channels that its FLOPs dominate.
        theirs: milliseconds of `other`.
        exponential: nanoseconds, see `exponential_ns`.
    """
    per_flop = (theirs - other.n**2 * exponential * 1e-6) / other.flops_needed
    return row.n**2 * exponential * 1e-6 + row.flops_needed * per_flop


def exponential_ns() -> float:
    """What torch's own exp needs for an element in cache, on one thread: a price that no kernel of
    the package has a part in."""
    x = torch.linspace(-20.0, 0.0, 16384)
    out, threads = torch.empty_like(x), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        turns = []
        for _ in range(100):
            start = time.process_time_ns()
            for _ in range(10):
                torch.exp(x, out=out)
            turns.append((time.process_time_ns() - start) / 10 / x.numel())
    finally:
        torch.set_num_threads(threads)
    return min(turns)


def describe(row: Row) -> str:
    """One row in a line of progress."""
    threads = "1 thread" if row.threads == 1 else f"{row.threads} threads"
    where = threads if row.device == "cpu" else row.device
    mode = "" if row.mode == "full" else f" {row.mode}"
    return f"{row.op} {row.case} {row.dtype} {row.label}{mode}, {where}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory could not be had."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return any(
        part in text for part in ("can't allocate memory", "bad_alloc", "CUDA out of memory")
    )


def first_line(error: BaseException) -> str:
    """The part of a message that fits a table."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text[max(text.find("DefaultCPUAllocator"), 0) :][:160]


def limit_memory(fraction: float = 0.6) -> int:
    """Lets this process grow by a fraction of the free memory; a contender that wants more gets an
    allocation error instead of killing the machine.

    Returns:
        The bytes by which it may grow.
    """
    free, size = free_memory(), address_space()
    growth = int(free * fraction)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = size + growth
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    return growth


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable: this needs Linux 3.14 or newer")


def address_space() -> int:
    """Bytes of address space of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
