"""Writes what `impl="auto"` takes on a GPU, from result files:
`python -m benchmarks.choose benchmarks/results/*.json`.

Reads the rows of GPU runs that passed the correctness gate. A class of `medcl_kernels.dispatch`
gets the backend with the smallest sum of medians over the inputs that all backends with any result
in this class have been timed on; with one such backend that one, with none None: then
`medcl_kernels.dispatch` takes the nearest class.
"""

from __future__ import annotations

import argparse
import pprint
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.record import Row
from medcl_kernels import dispatch, measured

BACKENDS = ("triton", "cuda")
# a loss that is nothing but one operation and O(N D) work measures that operation too
ALSO = {
    "supervised_contrastive": ("supervised_sum",),
    "info_nce": ("info_nce_sum",),
}
# these go where the log-sum-exp goes, which takes nearly all of a loss's time: row for row the same
# rounding, else a loss slightly below 0 could appear
FOLLOW = ("positive_mean", "positive_at", "pair_positive_log")
LEADER = "pair_logsumexp"
Table = dict[tuple[str, str, str], tuple[tuple[str | None, ...], ...]]


def fastest(files: list[tuple[dict[str, Any], list[Row]]]) -> Table:
    """`FASTEST` of medcl_kernels/measured.py from the contents and rows of result files."""
    # (architecture, operation, dtype) -> (class of channels, of rows) -> input -> backend -> ms
    times: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for content, rows in files:
        architecture = content["machine"].get("gpu", {}).get("architecture")
        if architecture is None:
            continue
        for row in rows:
            if row.device != "cuda" or row.impl not in BACKENDS or row.mode != "full":
                continue
            for operation in (row.op, *ALSO.get(row.op, ())):
                if operation not in dispatch.OPERATIONS or row.options:
                    continue
                key = architecture, operation, row.dtype
                classes = _class(row.d, dispatch.CHANNELS), _class(row.n, dispatch.ROWS)
                ok = row.status == "ok" and row.wall_median_ms
                times[key][classes][row.group, row.case][row.impl] = (
                    row.wall_median_ms if ok else float("inf")
                )
    tables = {key: _table(times[key]) for key in sorted(times)}
    for architecture, operation, dtype in tables:
        led = tables.get((architecture, LEADER, dtype))
        if led is not None and operation in FOLLOW:
            tables[architecture, operation, dtype] = led
    return tables


def _class(size: int, bounds: tuple[int, ...]) -> int:
    return sum(size > bound for bound in bounds)


def _table(by_class: Any) -> tuple[tuple[str | None, ...], ...]:
    return tuple(
        tuple(_winner(by_class.get((channels, rows), {})) for rows in range(len(dispatch.ROWS) + 1))
        for channels in range(len(dispatch.CHANNELS) + 1)
    )


def _winner(by_input: dict[Any, dict[str, float]]) -> str | None:
    """A backend that failed anywhere in a class cannot win it: its sum is infinite."""
    names = {name for times in by_input.values() for name in times}
    shared = [times for times in by_input.values() if times.keys() == names]
    sums = {name: sum(times[name] for times in shared) for name in sorted(names)}
    finite = {name: total for name, total in sums.items() if 0 < total < float("inf")}
    return min(finite, key=finite.__getitem__) if finite else None


def source(table: Table, old: str) -> str:
    """measured.py with another table."""
    head = old[: old.index("FASTEST")]
    body = pprint.pformat(table, width=98) if table else "{}"
    return (
        f"{head}FASTEST: dict[tuple[str, str, str], tuple[tuple[str | None, ...], ...]] = {body}\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Writes or prints the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choose", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path(measured.__file__))
    options = parser.parse_args(arguments)
    try:
        table = fastest([record.load(path) for path in options.results])
    except ValueError as error:
        record.die(str(error))
    text = source(table, Path(measured.__file__).read_text())
    options.out.write_text(text)
    print(f"{len(table)} tables -> {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
