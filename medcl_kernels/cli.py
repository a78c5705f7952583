"""`python -m medcl_kernels env | list | bench | check`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks" / "run.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: without the program's name; None = those of the process.

    Returns:
        The exit code: 0; 1 where a check failed; 2 for a wrong call.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["bench"]:  # before argparse, so that `bench --help` is the suite's own
        return bench(given[1:])
    commands = {"env": show_environment, "list": show_list, "check": check}
    return commands[_parser().parse_args(given).command]()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m medcl_kernels", description=__doc__)
    sub = parser.add_subparsers(dest="command", required=True)
    sub.add_parser("env", help="versions, build, and backends with the reason for each missing one")
    sub.add_parser("list", help="operations and losses with their backends")
    sub.add_parser("check", help="a self test of a few seconds; exit code 1 if anything fails")
    sub.add_parser("bench", help="the benchmark suite of a checkout; further arguments are its own")
    return parser


def show_environment() -> int:
    """Prints everything that a bug report needs."""
    from . import report

    sections = report.environment()
    width = max(len(name) for lines in sections.values() for name, _ in lines)
    for title, lines in sections.items():
        print(f"{title}:")
        for name, text in lines:
            print(f"  {name:<{width}}  {text}")
    return 0


def show_list() -> int:
    """Prints the registry."""
    from . import dispatch, report

    header = ("kind", "name", "backends", "what it computes")
    print(report.aligned([header, *report.backend_table()]))
    if any(reason is not None for reason in dispatch.available().values()):
        print("\n(in parentheses: implemented, but not usable here; `env` says why)")
    return 0


def check() -> int:
    """Prints a line per operation, loss and backend; what failed comes once more at the end."""
    from . import dispatch, selfcheck

    failures: list[str] = []
    for name, reason in dispatch.available().items():
        if reason is not None:
            print(f"{name}: not checked, {reason}")
    # the one backend that every machine should have
    broken = dispatch.available()["cpu"]
    if broken is not None:
        failures.append(f"cpu: {broken}")
    for result in selfcheck.check_all():
        state = "FAILED" if result.failures else "ok"
        error = f"largest error {result.worst:.2g} of the allowed"
        print(f"{result.name:<24}{result.impl:<11}{result.cases:>3} cases  {state:<8}{error}")
        failures += [f"{result.name}, {result.impl}, {line}" for line in result.failures]
    if not failures:
        print(selfcheck.speed_line())
        print("all checks passed")
        return 0
    shown = [textwrap.shorten(line, 240) for line in failures[:20]]
    if len(failures) > len(shown):
        shown.append(f"and {len(failures) - len(shown)} more")
    print(f"\n{len(failures)} failed:", *shown, sep="\n  ", file=sys.stderr)
    return 1


def bench(arguments: Sequence[str]) -> int:
    """Runs the benchmark suite, which is part of a checkout and not of the wheel."""
    if not BENCHMARKS.is_file():
        print(
            f"The benchmark suite is not part of the installed package ({BENCHMARKS} does not "
            "exist). It is in the source repository: run `make bench` in a checkout.",
            file=sys.stderr,
        )
        return 2
    return subprocess.run([sys.executable, str(BENCHMARKS), *arguments]).returncode
