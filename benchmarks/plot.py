"""Curves from a result file: `python -m benchmarks.plot results.json --out curves.png`.

Process-CPU time and extra peak memory against the number of rows, one line per contender, both axes
logarithmic; a cross at the top marks a size at which a contender ran out of memory or time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.record import Row

LOSSES = {"supervised_contrastive": 'supervised contrast "out"', "info_nce": "InfoNCE"}
ORDER = ("cpu", "chunk", "lce", "compile", "class-sums", "eager", "pml")
NAMES = {"cpu": "medcl_kernels"}
COLORS = dict(
    zip(
        ORDER,
        ("#c1121f", "#1d3557", "#2a9d8f", "#8338ec", "#e9a03b", "#6c757d", "#b5838d"),
        strict=True,
    )
)


def draw(rows: list[Row], out: Path, channels: int = 64, threads: int = 1) -> None:
    """Writes one figure with a row per loss: time on the left, memory on the right.

    Args:
        rows: of a result file.
        out: PNG, SVG or PDF.
        channels: D of the inputs to show.
        threads: at which times were taken.

    Raises:
        ValueError: there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row.d == channels and row.dtype == "float32"]
    losses = [op for op in LOSSES if any(row.op == op for row in shown)]
    if not losses:
        raise ValueError(f"no float32 rows with D = {channels} of {' or '.join(LOSSES)}")
    figure, axes = plt.subplots(
        len(losses), 2, figsize=(10, 3.9 * len(losses)), squeeze=False, layout="constrained"
    )
    drawn = False
    for line, op in zip(axes, losses, strict=True):
        times = [
            row
            for row in shown
            if row.op == op and row.group in ("supcon", "info_nce") and row.threads == threads
        ]
        peaks = [row for row in shown if row.op == op and row.group == "memory"]
        which = "1 thread" if threads == 1 else f"{threads} threads"
        title = f"{LOSSES[op]}, D = {channels}"
        drawn |= _curves(line[0], times, "cpu_min_ms", f"{title}, {which}", "CPU time per step, ms")
        drawn |= _curves(line[1], peaks, "peak_mb", title, "extra peak memory, MB")
    if not drawn:
        plt.close(figure)
        raise ValueError(f"no measurement with D = {channels} and {threads} thread(s)")
    figure.savefig(out, dpi=150)
    plt.close(figure)


def _curves(axis: Any, rows: list[Row], what: str, title: str, unit: str) -> bool:
    """One panel; whether there was anything to draw."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("rows N")
    axis.set_ylabel(unit)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(True, which="major", alpha=0.3)
    labels = [label for label in ORDER if any(row.label == label for row in rows)]
    for label in labels:
        here = sorted((row for row in rows if row.label == label), key=lambda row: row.n)
        done = [row for row in here if row.status == "ok" and getattr(row, what) is not None]
        style = {"color": COLORS[label], "linewidth": 2.4 if label == "cpu" else 1.4}
        axis.plot(
            [row.n for row in done],
            [getattr(row, what) for row in done],
            marker="o",
            markersize=4,
            label=NAMES.get(label, label),
            zorder=3 if label == "cpu" else 2,
            **style,
        )
        stopped = [row.n for row in here if row.status in ("OOM", "timeout")]
        # side by side where several contenders stop at one size
        nudged = [n * 2 ** (0.12 * labels.index(label) - 0.3) for n in stopped]
        for n in nudged:
            axis.plot(
                n,
                0.96,
                "x",
                color=COLORS[label],
                markersize=8,
                markeredgewidth=2,
                transform=axis.get_xaxis_transform(),
            )
    if labels:
        sizes = sorted({row.n for row in rows})
        axis.set_xticks(sizes, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in sizes])
        axis.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
        axis.minorticks_off()
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return bool(labels)


def main(arguments: list[str] | None = None) -> int:
    """Draws a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, help="default: the results' name with .png")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    out = options.out or options.results.with_suffix(".png")
    try:
        draw(record.load(options.results)[1], out, options.channels, options.threads)
    except ValueError as error:
        record.die(str(error))
    except ImportError as error:
        record.die(f"{error}: pip install 'medcl_kernels[plot]'")
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
