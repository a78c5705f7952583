"""Speed and memory of medcl_kernels beside its peers, interleaved: `python -m benchmarks.run`.

Correctness comes before any time. Progress goes to the terminal line by line, then tables and the
goals; everything is in the JSON file, also after Ctrl-C.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # python benchmarks/run.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "benchmarks"
from benchmarks import catalogue, contest, gpu_run, grid, probes, record, table
from benchmarks.contenders import Entry
from benchmarks.gate import Gate

RESULTS = Path(__file__).resolve().parent / "results"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    made.add_argument("--quick", action="store_true", help="fewer sizes and peers, under 2 minutes")
    made.add_argument(
        "--only",
        default="",
        help=f"comma-separated groups of {', '.join(catalogue.GROUPS)}; with --gpu of "
        f"{', '.join(grid.CONTESTS)}",
    )
    made.add_argument(
        "--case", default="", help="comma-separated inputs such as 8192x64: only contests with one"
    )
    made.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/latest.json")
    made.add_argument("--threads", default="", help="only these of 1,2")
    made.add_argument(
        "--scale", type=float, default=1.0, help="multiplies the time of every contest"
    )
    made.add_argument("--timeout", type=float, default=120.0, help="seconds for one step")
    made.add_argument("--without", default="", help="comma-separated peers to leave out")
    made.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    made.add_argument("--no-tables", action="store_true", help="the file is all that is wanted")
    made.add_argument("--strict", action="store_true", help="exit with 1 if a goal is missed")
    made.add_argument("--gpu", action="store_true", help="the contests of grid.py on a GPU")
    made.add_argument(
        "--dry-run", action="store_true", help="with --gpu: tiny, on the CPU; tries the harness"
    )
    made.add_argument(
        "--resume",
        action="store_true",
        help="with --gpu: go on with the file of a process cut short",
    )
    made.add_argument(
        "--seconds", type=float, default=math.inf, help="with --gpu: begin nothing after these"
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the suite; 0, or 1 where a contender failed the gate or raised, 130 after Ctrl-C, and 3
    where a GPU answers no more and `--resume` in a new process can go on.
    """
    options = parser().parse_args(arguments)
    refusal = gpu_run.no_gpu() if options.gpu and not options.dry_run else None
    if refusal:
        print(f"benchmarks --gpu: {refusal}", file=sys.stderr)
        return 1
    groups = tuple(grid.CONTESTS) if options.gpu else catalogue.GROUPS
    only = tuple(name.strip() for name in options.only.split(",") if name.strip()) or groups
    unknown = [name for name in only if name not in groups]
    if unknown:
        record.die(f"--only: no group {', '.join(unknown)}; have {', '.join(groups)}")
    out = options.out or RESULTS / "latest.json"
    rows: list[record.Row] = []
    started = time.monotonic()
    chosen = {name: value for name, value in vars(options).items() if value and name != "out"}
    command = [f"--{name}={value}" for name, value in chosen.items()]
    if options.resume and out.is_file():
        content, rows = record.load(out)
        command = content["command"]
    else:
        content = record.document(rows, command, False)  # the load before, not after
    before = content.get("seconds", 0.0)

    def keep(finished: bool = False) -> None:
        # `rows` is looked up at each call: the list that is filled, then the one that is left
        content["finished"] = finished
        content["seconds"] = round(before + time.monotonic() - started, 1)
        done = [record.filled(row) for row in rows if row.status != "running"]
        content["rows"] = record.six_digits(done)
        record.save(out, content)

    code = 0
    try:
        if options.gpu:
            measure_on_gpu(options, only, content, rows, started, keep)
        else:
            measure(options, only, rows, started, keep)
    except KeyboardInterrupt as stop:
        code = 130
        rows.extend(getattr(stop, "rows", []))
        content.pop("current", None)
        print("\nstopped: what was measured so far follows", flush=True)
    except contest.DeviceLost as lost:
        code = 3
        print(f"\nthe device answers no more ({lost}); a new process may --resume", flush=True)
    rows = [row for row in rows if row.status != "running"]
    if not options.gpu:
        table.derived_goals(rows)
    keep(code == 0)
    if not options.no_tables:
        print("\n" + table.render(content, rows, markdown=options.markdown))
    print(f"\n{len(rows)} rows in {content['seconds']:.0f} s -> {out}")
    wrong = [row for row in rows if row.status in ("FAIL", "error")]
    missed = [goal for row in rows for goal in row.goals if goal["met"] is False]
    return code or (1 if wrong or (options.strict and missed) else 0)


def progress(started: float) -> Callable[[str], None]:
    """Prints lines with the seconds since `started`."""

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s {line}", flush=True)

    return say


def left_out(options: argparse.Namespace) -> Callable[[Entry], str | None]:
    """Why an entry is left out by `--without`."""
    without = {name.strip() for name in options.without.split(",")}

    def skip(entry: Entry) -> str | None:
        return "left out by --without" if entry.contender in without else None

    return skip


def measure_on_gpu(
    options: argparse.Namespace,
    only: tuple[str, ...],
    content: dict[str, Any],
    rows: list[record.Row],
    started: float,
    keep: Callable[[], None],
) -> None:
    """What `--gpu` asks for."""
    site = grid.DRY_RUN if options.dry_run else grid.GPU
    gpu_run.measure(
        replace(site, seconds=site.seconds * options.scale * (0.35 if options.quick else 1.0)),
        only,
        content,
        rows,
        keep,
        progress(started),
        seconds=options.seconds,
        timeout=options.timeout,
        skip=left_out(options),
    )


def measure(
    options: argparse.Namespace,
    only: tuple[str, ...],
    rows: list[record.Row],
    started: float,
    keep: Callable[[], None],
) -> None:
    """Runs the chosen groups; rows are appended as they come and kept after every contest."""
    say, skip = progress(started), left_out(options)
    # first the children: they must not share the machine with this process's address-space limit
    if "memory" in only:
        say("extra peak memory of one step, one process each")
        probes.measure_memory(options.quick, say, rows.append, skip, options.timeout)
    growth = contest.limit_memory()
    say(f"this process may grow by {growth / 2**30:.1f} GB; who wants more gets a row OOM")
    gate = Gate()
    chosen_threads = options.threads.split(",")
    wanted = {name.strip() for name in options.case.split(",") if name.strip()}
    for one in catalogue.contests(only, options.quick):
        if wanted and not wanted & {entry.case.name for entry in one.entries}:
            continue
        if options.threads:
            one = replace(one, threads=tuple(n for n in one.threads if str(n) in chosen_threads))
            if not one.threads:
                continue
        say(f"{one.title}, threads {' and '.join(map(str, one.threads))}")
        scale = options.scale * (0.35 if options.quick else 1.0)
        rows.extend(
            contest.run_contest(
                one, gate=gate, say=say, scale=scale, timeout=options.timeout, skip=skip
            )
        )
        keep()
    if "bits" in only:
        say("bits with one and two threads")
        probes.compare_bits(say, rows.append)


if __name__ == "__main__":
    sys.exit(main())
