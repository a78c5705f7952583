"""`python -m benchmarks.run --gpu`: the contests of grid.py on a CUDA device, or, with `--dry-run`,
their shadow on the CPU.

A kernel that has never run may write where it must not, and then every further call of the process
fails, or may never end, and then the process has to be killed. So the file names the contender that
is about to start; a second process with `--resume` books it as an error and goes on behind it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from . import contest, devices, grid
from .contenders import Entry
from .contest import Contest, DeviceLost, new_row
from .gate import Gate
from .record import Row

DIED = "the process ended or hung here"
Say = Callable[[str], None]


def no_gpu() -> str | None:
    """Why nothing can be measured on a GPU here, or None."""
    if torch.cuda.is_available():
        return None
    return f"no CUDA device: torch {torch.__version__} sees none; nothing was measured"


def key(row: Row) -> tuple[Any, ...]:
    """What makes a row the same contender on the same input."""
    return row.group, row.op, row.label, row.case, row.dtype, row.mode


def book_casualties(content: dict[str, Any], rows: list[Row], contests: list[Contest]) -> None:
    """Turns the note of a process that died into rows "error"."""
    note = content.pop("current", None)
    if note is None:
        return
    done = {key(row) for row in rows}
    for one in contests:
        if one.title != note["title"]:
            continue
        for entry in one.entries:
            row = new_row(one.group, entry, 1)
            if key(row) not in done and note["label"] in (None, entry.label):
                row.fail("error", DIED + (" while all took turns" if not note["label"] else ""))
                rows.append(row)


def rest_of(one: Contest, rows: list[Row]) -> Contest | None:
    """The contest without contenders that brought an earlier process down, None if it is done."""
    statuses = {key(row): row.status for row in rows if row.group == one.group}
    left = [e for e in one.entries if statuses.get(key(new_row(one.group, e, 1))) != "error"]
    if all(key(new_row(one.group, e, 1)) in statuses for e in one.entries):
        return None
    labels = {entry.label for entry in left}
    goals = tuple(goal for goal in one.goals if {goal.of, goal.against} <= labels)
    return replace(one, entries=tuple(left), goals=goals)


def measure(
    site: grid.Site,
    only: tuple[str, ...],
    content: dict[str, Any],
    rows: list[Row],
    keep: Callable[[], None],
    say: Say,
    *,
    seconds: float,
    timeout: float,
    skip: Callable[[Entry], str | None],
) -> None:
    """Runs what is left of the groups; rows are appended as they come, `keep` saves them.

    Args:
        site: the device and the sizes.
        only: groups of grid.py.
        content: of the file; gets what is known of the device, and its state after each contest.
        rows: of an earlier process that was cut short, or empty.
        keep: writes the file.
        say: gets lines of progress.
        seconds: after which no further contest begins; those left become rows "skipped".
        timeout: seconds for one step.
        skip: why an entry is left out, or None.

    Raises:
        DeviceLost: the rest needs a new process.
    """
    started = time.monotonic()
    chosen = grid.contests(only, site)
    book_casualties(content, rows, chosen)
    gpu = content["machine"].setdefault("gpu", devices.describe(site.device))
    say(f"{gpu['name']}")
    if "ceilings" not in gpu:
        gpu["state_at_start"] = devices.state()
        gpu["ceilings"] = devices.ceilings(site.device)
        keep()
    rates = {name: value for name, value in gpu["ceilings"].items() if "copy" not in name}
    say(", ".join(f"{name} {value / 1e3:.3g} TFLOP/s" for name, value in rates.items()))
    states = content.setdefault("device_states", [])
    gate = Gate()

    def starts(one: Contest, entry: Entry | None) -> None:
        content["current"] = {"title": one.title, "label": entry.label if entry else None}
        keep()

    for whole in chosen:
        one = rest_of(whole, rows)
        if one is None:
            continue
        if time.monotonic() - started > seconds:
            rows.extend(_unreached(one, rows))
            continue
        say(one.title)
        # an aborted contest starts again: only its casualties have rows
        try:
            rows.extend(
                contest.run_contest(
                    one,
                    gate=gate,
                    say=say,
                    scale=site.seconds,
                    timeout=timeout,
                    skip=skip,
                    errors="record",
                    ceilings=rates,
                    starts=starts,
                )
            )
        except DeviceLost as lost:
            # what waited for its turns has no times and starts again
            rows.extend(row for row in getattr(lost, "rows", []) if row.status == "error")
            content.pop("current", None)
            raise
        content.pop("current", None)
        states.append({"contest": one.title, **devices.state()})
        keep()


def _unreached(one: Contest, rows: list[Row]) -> list[Row]:
    done = {key(row) for row in rows}
    found = [new_row(one.group, entry, 1) for entry in one.entries]
    for row in found:
        row.fail("skipped", "no time was left")
    return [row for row in found if key(row) not in done]
