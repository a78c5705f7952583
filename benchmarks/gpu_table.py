"""The tables of a run on a GPU: medians of interleaved turns, TFLOP/s on needed FLOPs, share of the
roofline, and how many times the time of our fastest backend a peer takes.
"""

from __future__ import annotations

from typing import Any

from .contenders import OURS
from .layout import layout
from .record import Row

TITLES = {
    "peers": "Forward and backward beside peers, ms, median",
    "batches": "Images of 4096 pixels beside one large problem, ms, median",
    "sizes": "Forward and backward at all sizes, ms, median",
    "wgmma": "wgmma beside mma.sync (one selection, forward alone), ms, median",
    "forward": "Forward alone, ms, median",
    "limits": "With N x N matrices, ms, median",
    "operations": "Operations by themselves, ms, median",
    "patches": "Patch-affinity contrast, class shares of windows, uncertainty gate, ms, median",
    "selection": "Gradient Filter's selection and Gradient Mitigator, ms, median",
}
SHORT = ("peers", "batches", "wgmma", "limits")  # what README and the end of a run show
NOTHING_YET = (
    "None measured yet: no machine with a GPU has run `make gpu-check` so far, and no figure is "
    "estimated."
)


def heading(content: dict[str, Any]) -> str:
    """Device, versions, commit, date."""
    gpu, versions, commit = content["machine"]["gpu"], content["versions"], content["commit"]
    what = [gpu["name"]]
    if "driver" in gpu:
        what.append(f"driver {gpu['driver']}, CUDA {gpu['cuda']}")
    hash_ = (commit["hash"] or "no commit")[:12] + (", changed" if commit["changed"] else "")
    triton = f", triton {versions['triton']}" if "triton" in versions else ""
    what += [f"torch {versions['torch']}{triton}, Python {versions['python']}", hash_]
    rates = gpu.get("ceilings", {})
    shown = [name for name in ("bfloat16", "tf32") if name in rates]
    best = ", ".join(f"{name} {rates[name] / 1e3:.3g}" for name in shown)
    ceiling = f"; large matrix products: {best} TFLOP/s" if best else ""
    early = "" if content.get("finished", True) else "; stopped early"
    return f"{'; '.join(what)}; {content['created']}{ceiling}{early}"


def tables(rows: list[Row], *, markdown: bool, only: tuple[str, ...] = SHORT) -> list[str]:
    """A titled table per group that has rows."""
    parts = []
    for group, title in TITLES.items():
        here = [row for row in rows if row.group == group]
        if here and group in only:
            head = f"### {title}" if markdown else f"== {title} =="
            parts.append(f"{head}\n\n{layout(cells(here), markdown)}")
    return parts


def cells(rows: list[Row]) -> list[list[str]]:
    """A line per input, a column per contender that ran anywhere in the group."""
    shown = [row for row in rows if row.status != "skipped"]
    labels = list(dict.fromkeys(row.label for row in shown))
    table = [["loss", "input", *labels, "extra MB"]]
    for line in dict.fromkeys((row.op, _input(row)) for row in shown):
        here = {row.label: row for row in shown if (row.op, _input(row)) == line}
        own = [row for row in here.values() if row.impl in OURS and row.status == "ok"]
        best = min(own, key=lambda row: row.wall_median_ms or 0.0, default=None)
        extra = "" if best is None or best.peak_mb is None else f"{best.peak_mb:.0f}"
        table.append([*line, *(_cell(here.get(label), best) for label in labels), extra])
    return table


def _cell(row: Row | None, best: Row | None) -> str:
    if row is None:
        return ""
    if row.status != "ok" or row.wall_median_ms is None:
        return row.status
    text = f"{row.wall_median_ms:.3g}"
    if row.impl in OURS:
        if not row.gflops_needed_per_s:
            return text
        share = "" if row.roofline_share is None else f", {row.roofline_share:.0%}"
        return f"{text} ({row.gflops_needed_per_s / 1e3:.3g} TFLOP/s{share})"
    return f"{text} ({row.wall_median_ms / best.wall_median_ms:.2f}x)" if best else text


def _input(row: Row) -> str:
    # a batch and the large problem beside it are two inputs of one contest: one line each
    return f"{row.case} {row.dtype}{'' if row.mode == 'full' else f' {row.mode}'}"
