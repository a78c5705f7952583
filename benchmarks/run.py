"""Speed and memory of medcl_kernels beside its peers, interleaved: `python -m benchmarks.run`.

Correctness comes before any time. Progress goes to the terminal line by line, then tables and the
goals; everything is in the JSON file, also after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # python benchmarks/run.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "benchmarks"
from benchmarks import catalogue, contest, probes, record, table
from benchmarks.contenders import Entry
from benchmarks.gate import Gate

RESULTS = Path(__file__).resolve().parent / "results"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    made.add_argument("--quick", action="store_true", help="fewer sizes and peers, under 2 minutes")
    made.add_argument(
        "--only",
        default=",".join(catalogue.GROUPS),
        help=f"comma-separated groups of {', '.join(catalogue.GROUPS)}",
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
    made.add_argument("--strict", action="store_true", help="exit with 1 if a goal is missed")
    made.add_argument("--gpu", action="store_true", help="benchmark the CUDA backends")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the suite; 0, or 1 where a contender failed the gate."""
    options = parser().parse_args(arguments)
    if options.gpu:
        return refuse_gpu()
    only = tuple(name.strip() for name in options.only.split(",") if name.strip())
    unknown = [name for name in only if name not in catalogue.GROUPS]
    if unknown:
        record.die(f"--only: no group {', '.join(unknown)}; have {', '.join(catalogue.GROUPS)}")
    out = options.out or RESULTS / "latest.json"
    rows: list[record.Row] = []
    stopped = False
    started = time.monotonic()
    chosen = {name: value for name, value in vars(options).items() if value and name != "out"}
    command = [f"--{name}={value}" for name, value in chosen.items()]
    content = record.document(rows, command, False)  # the load before, not after

    def keep(finished: bool = False) -> None:
        # `rows` is looked up at each call: the list that is filled, then the one that is left
        content["finished"], content["seconds"] = finished, round(time.monotonic() - started, 1)
        content["rows"] = [vars(row) for row in rows if row.status != "running"]
        record.save(out, content)

    try:
        measure(options, only, rows, started, keep)
    except KeyboardInterrupt as stop:
        stopped = True
        rows.extend(getattr(stop, "rows", []))
        print("\nstopped: what was measured so far follows", flush=True)
    rows = [row for row in rows if row.status != "running"]
    table.derived_goals(rows)
    keep(not stopped)
    print("\n" + table.render(content, rows, markdown=options.markdown))
    print(f"\n{len(rows)} rows in {content['seconds']:.0f} s -> {out}")
    failed = [row for row in rows if row.status == "FAIL"]
    missed = [goal for row in rows for goal in row.goals if goal["met"] is False]
    return 130 if stopped else 1 if failed or (options.strict and missed) else 0


def measure(
    options: argparse.Namespace,
    only: tuple[str, ...],
    rows: list[record.Row],
    started: float,
    keep: Callable[[], None],
) -> None:
    """Runs the chosen groups; rows are appended as they come and kept after every contest."""

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s {line}", flush=True)

    without = {name.strip() for name in options.without.split(",")}

    def skip(entry: Entry) -> str | None:
        if entry.contender in without:
            return "left out by --without"
        return None

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


def refuse_gpu() -> int:
    """There is no timing on GPUs yet; say what is there and end with an error."""
    import torch

    if not torch.cuda.is_available():
        print(
            f"benchmarks --gpu: no CUDA device: torch {torch.__version__} sees none; "
            "nothing was measured",
            file=sys.stderr,
        )
    else:
        print(
            "benchmarks --gpu: this version times CPU contests only: nothing was measured on "
            f"{torch.cuda.get_device_name()}",
            file=sys.stderr,
        )
    return 1


if __name__ == "__main__":
    sys.exit(main())
