"""Two result files: `python -m benchmarks.compare before.json after.json --threshold 10%`.

Exit code 1 if a row of the package became slower, needs more memory or fails where it did not.
Machines differ from day to day, so a time may be divided by that of a peer of the same contest
first: `--relative-to chunk,lce` compares speed-ups over the first of these that a row has.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import record
from benchmarks.contenders import OURS
from benchmarks.record import Row

MEMORY_NOISE_MB = 2.0  # page-granular accounting of a whole process


@dataclass(frozen=True)
class Change:
    """One row in both files.

    Attributes:
        name: what it is.
        what: "time", "memory" or "status".
        before, after: the numbers, or the statuses.
        ratio: after over before, None for statuses.
        worse: whether that is a regression.
    """

    name: str
    what: str
    before: str
    after: str
    ratio: float | None
    worse: bool


def key(row: Row) -> tuple[object, ...]:
    """What makes two rows the same measurement."""
    options = tuple(sorted((name, str(value)) for name, value in row.options.items()))
    return (row.group, row.op, row.label, row.case, row.dtype, row.threads, row.mode, options)


def changes(
    before: list[Row],
    after: list[Row],
    *,
    threshold: float,
    clock: str = "cpu",
    relative_to: tuple[str, ...] = (),
) -> list[Change]:
    """All rows of the package that are in both files.

    Args:
        before, after: rows.
        threshold: fraction by which a time or a peak may grow.
        clock: "cpu" or "wall".
        relative_to: labels of peers, or empty for plain times.
    """
    old = {key(row): row for row in before}
    found = []
    for row in after:
        was = old.get(key(row))
        if was is None or row.impl not in OURS:
            continue
        threads = "" if row.threads == 1 else f", {row.threads} threads"
        name = f"{row.group}: {row.op} {row.case} {row.dtype} {row.label}{threads}"
        if was.status != row.status:
            worse = was.status == "ok" and row.status != "skipped"
            found.append(Change(name, "status", was.status, row.status, None, worse))
            continue
        then, now = _cost(was, clock, relative_to), _cost(row, clock, relative_to)
        if then and now:
            worse = now > then * (1 + threshold)
            found.append(Change(name, "time", f"{then:.4g}", f"{now:.4g}", now / then, worse))
        if was.peak_mb and row.peak_mb:
            worse = row.peak_mb > was.peak_mb * (1 + threshold) + MEMORY_NOISE_MB
            ratio = row.peak_mb / was.peak_mb
            numbers = f"{was.peak_mb:.0f} MB", f"{row.peak_mb:.0f} MB"
            found.append(Change(name, "memory", *numbers, ratio, worse))
    return found


def _cost(row: Row, clock: str, relative_to: tuple[str, ...]) -> float | None:
    """Milliseconds, or time over the time of the first peer that is there."""
    if not relative_to:
        return getattr(row, f"{clock}_min_ms")
    for label in relative_to:
        if label in row.speedup_vs:
            return 1.0 / row.speedup_vs[label][f"{clock}_min"]
    return None


def fraction(text: str) -> float:
    """`10%` or `0.1`."""
    value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a fraction such as 10%, got {text}")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Prints the changes; 1 if there is a regression, 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=fraction, default=0.1, help="such as 10%%")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--relative-to", default="", help="comma-separated peers")
    options = parser.parse_args(arguments)
    try:
        before, after = record.load(options.before)[1], record.load(options.after)[1]
    except ValueError as error:
        record.die(str(error))
    relative_to = tuple(name for name in options.relative_to.split(",") if name)
    found = changes(
        before, after, threshold=options.threshold, clock=options.clock, relative_to=relative_to
    )
    if not found:
        record.die("the two files have no measurement in common")
    for change in sorted(found, key=lambda one: one.ratio or 0):
        ratio = "" if change.ratio is None else f"{change.ratio:6.2f}x"
        mark = "WORSE" if change.worse else "     "
        print(f"{mark} {ratio:>7} {change.before:>10} -> {change.after:<10} {change.name}")
    worse = sum(change.worse for change in found)
    print(f"{len(found)} compared, {worse} worse by more than {options.threshold:.0%}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
