"""Tables from rows: on the terminal, and as Markdown for README and docs.

`python -m benchmarks.table results.json --markdown --only supcon,info_nce`; with `--into FILE` the
tables replace what stands between the marks `<!-- performance:begin` and `<!-- performance:end -->`
(or `benchmarks:begin` and `benchmarks:end`, and `gpu:begin`, `gpu:end` for a run on a GPU) of that
file. `python -m benchmarks.table --gpu-page README.md` puts the newest run of every GPU in
benchmarks/results there.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import gpu_table, record
from benchmarks.layout import layout
from benchmarks.record import Row

TITLES = {
    "supcon": 'Supervised contrast "out"',
    "info_nce": "InfoNCE",
    "input": "Other dtypes and layouts",
    "small": "Few rows",
    "ragged": "Ragged sizes: time per needed FLOP (D < 48: FLOP and exponential) over 4096 x 64",
    "forms": "Other forms, several label maps",
    "image": "Candidates of the own image only",
    "match": "Correspondences",
    "nt_xent": "InfoNCE, symmetric with intra-view negatives (NT-Xent)",
    "select": "Gradient Filter: the pairs with the largest gradient",
    "filter": "Gradient Filter: the loss and its gradient",
    "switch": "Gradient Filter: a list or a rule, by the number of pairs per anchor",
    "mitigate": "Gradient Mitigator",
    "patches": "Patch-affinity contrast",
    "windows": "Class shares of windows",
    "gate": "Uncertainty gate",
    "ops": "Operations by themselves",
    "memory": "Extra peak memory of one step, gradients included (MB)",
    "bits": "Same bits with one and two threads",
}
SCALING_GOAL = 1.85  # two threads over one, wall
ERROR_GOAL, ERROR_STRETCH = 2e-6, 1e-6  # gradient error at N = 4096, float32
RESULTS = Path(__file__).resolve().parent / "results"
CPU_MARKS, GPU_MARKS = "performance|benchmarks", "gpu"


def derived_goals(rows: list[Row]) -> None:
    """Goals between rows of different contests: threads against threads, and exactness."""
    for row in rows:
        if row.group not in ("supcon", "info_nce") or row.impl != "cpu" or row.status != "ok":
            continue
        if row.n == 4096 and row.threads == 1:
            goal = record.judged_goal(
                "gradient error vs float64", row.error, ERROR_GOAL, "<=", ERROR_STRETCH
            )
            row.goals.append(goal)
        single = [
            other
            for other in rows
            if (other.group, other.case, other.label) == (row.group, row.case, row.label)
            and other.threads == 1
            and other.status == "ok"
        ]
        if row.threads == 2 and row.n >= 4096 and single:
            value = single[0].wall_min_ms / row.wall_min_ms
            row.goals.append(record.judged_goal("wall, 2 threads vs 1", value, SCALING_GOAL, ">="))


def render(
    content: dict[str, Any],
    rows: list[Row],
    *,
    markdown: bool = False,
    only: tuple[str, ...] = (),
    goals: bool = True,
) -> str:
    """The tables of some groups (default: all, of a GPU the most wanted), and the goals."""
    if "gpu" in content["machine"]:
        parts = [gpu_table.heading(content)]
        parts += gpu_table.tables(rows, markdown=markdown, only=only or gpu_table.SHORT)
        only = only or tuple(gpu_table.TITLES)
    else:
        parts, only = [_heading(content)], only or tuple(TITLES)
    for group in TITLES:
        here = [row for row in rows if row.group == group]
        if group not in only or not here:
            continue
        title = f"### {TITLES[group]}" if markdown else f"== {TITLES[group]} =="
        parts.append(f"{title}\n\n{layout(_cells(group, here), markdown)}")
    lines = _goals([row for row in rows if row.group in only])
    if goals and lines:
        title = "### Goals" if markdown else "== Goals =="
        parts.append(f"{title}\n\n{layout(lines, markdown)}\n\n{_count(rows, only)}")
    return "\n\n".join(parts)


def _heading(content: dict[str, Any]) -> str:
    machine, versions, commit = content["machine"], content["versions"], content["commit"]
    hash_ = (commit["hash"] or "no commit")[:12] + (", changed" if commit["changed"] else "")
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_capability']}; torch "
        f"{versions['torch']}, Python {versions['python']}; {hash_}; {content['created']}; "
        f"load {machine['load_average_at_start']:.1f} at start"
        + ("" if content.get("finished", True) else "; stopped early")
    )


def _cells(group: str, rows: list[Row]) -> list[list[str]]:
    if group == "memory":
        return _memory(rows)
    if group == "bits":
        head = [["loss", "input", "shape", "bits"]]
        return head + [
            [row.op, row.label, _shape(row), "same" if row.notes.get("bits_equal") else row.status]
            for row in rows
        ]
    if group in ("ragged", "input"):
        return _relative(group, rows)
    return _pivot(rows)


def _pivot(rows: list[Row]) -> list[list[str]]:
    """A line per input, threads and clock; a column per contender with its time and how many times
    ours that is.
    """
    labels = list(dict.fromkeys(row.label for row in rows))
    table = [["loss", "input", "threads", "ms, min", *labels]]
    lines = dict.fromkeys((row.op, _input(row), row.threads, _options(row)) for row in rows)
    for line in lines:
        here = {
            row.label: row
            for row in rows
            if (row.op, _input(row), row.threads, _options(row)) == line
        }
        first = next(iter(here.values()))
        own = next((row for row in here.values() if row.label.startswith("cpu")), first)
        for clock in ("cpu",) if line[2] == 1 else ("cpu", "wall"):
            cells = [_time(here.get(label), own, clock) for label in labels]
            table.append([f"{line[0]}{line[3]}", line[1], str(line[2]), clock, *cells])
    return table


def _time(row: Row | None, own: Row, clock: str) -> str:
    if row is None:
        return ""
    if row.status != "ok":
        return row.status
    value, ours = getattr(row, f"{clock}_min_ms"), getattr(own, f"{clock}_min_ms")
    text = f"{value:.3g}" if value < 100 else f"{value:.0f}"
    if row is own or not ours:
        return text
    return f"{text} ({value / ours:.2f}x)"


def _relative(group: str, rows: list[Row]) -> list[list[str]]:
    """A line per input: time, rate, and the number that its goal is about."""
    table = [["loss", "input", "threads", "cpu min ms", "median", "needed GFLOP/s", "relative", ""]]
    for row in rows:
        goal = row.goals[0] if row.goals else None
        value = "" if goal is None or goal["value"] is None else f"{goal['value']:.2f}x"
        verdict = "" if goal is None else _met(goal)
        if row.status != "ok":
            table.append([row.op, row.label, str(row.threads), row.status, "", "", "", row.reason])
            continue
        times = [f"{row.cpu_min_ms:.2f}", f"{row.cpu_median_ms:.2f}"]
        rate = f"{row.gflops_needed_per_s or 0:.0f}"
        table.append([row.op, row.label, str(row.threads), *times, rate, value, verdict])
    return table


def _memory(rows: list[Row]) -> list[list[str]]:
    labels = list(dict.fromkeys(row.label for row in rows))
    table = [["loss", "input", *labels]]
    for op, case in dict.fromkeys((row.op, row.case) for row in rows):
        here = {row.label: row for row in rows if (row.op, row.case) == (op, case)}
        cells = [_megabytes(here.get(label)) for label in labels]
        table.append([op, case, *cells])
    return table


def _megabytes(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row.peak_mb:.0f}" if row.status == "ok" and row.peak_mb is not None else row.status


def _goals(rows: list[Row]) -> list[list[str]]:
    """A line per goal."""
    table = [["", "loss", "input", "threads", "goal", "measured", "bound", "stretch"]]
    for row in rows:
        for goal in row.goals:
            name = f"{row.label}: {goal['name']}" if row.label != "cpu" else goal["name"]
            value = "-" if goal["value"] is None else f"{goal['value']:.3g}"
            stretch = ""
            if goal["stretch"] is not None:
                stretch = f"{goal['stretch']:.3g}" + (" met" if goal["stretch_met"] else "")
            table.append(
                [
                    _met(goal),
                    f"{row.op}{_options(row)}",
                    _input(row),
                    str(row.threads),
                    name,
                    value,
                    f"{goal['sense']} {goal['bound']:.3g}",
                    stretch,
                ]
            )
    return table if len(table) > 1 else []


def _count(rows: list[Row], only: tuple[str, ...]) -> str:
    goals = [goal for row in rows if row.group in only for goal in row.goals]
    met = sum(goal["met"] is True for goal in goals)
    missed = sum(goal["met"] is False for goal in goals)
    failed = sum(row.status == "FAIL" for row in rows)
    text = f"{met} goals met, {missed} missed, {len(goals) - met - missed} without a measurement"
    return text + (f"; {failed} rows FAILED the correctness gate" if failed else "")


def _met(goal: dict[str, Any]) -> str:
    return {True: "met", False: "MISSED", None: "?"}[goal["met"]]


def _shape(row: Row) -> str:
    return "x".join(map(str, row.shape))


def _input(row: Row) -> str:
    return row.case if row.dtype == "float32" else f"{row.case} {row.dtype}"


def _options(row: Row) -> str:
    shown = [f"{value}" for name, value in row.options.items() if name == "form" and value != "out"]
    return f" {' '.join(shown)}" if shown else ""


def insert(text: str, tables: str, marks: str = CPU_MARKS) -> str:
    """A document with the tables between its marks.

    Raises:
        ValueError: it has no marks.
    """
    pattern = rf"(<!-- ({marks}):begin[^\n]*\n).*?(<!-- \2:end -->)"
    found = re.search(pattern, text, re.DOTALL)
    if not found:
        name = marks.split("|")[0]
        raise ValueError(f"no line '<!-- {name}:begin ...' followed by a matching end mark")
    return text[: found.end(1)] + tables.strip() + "\n" + text[found.start(3) :]


def gpu_page(results: Path = RESULTS) -> str:
    """The short tables of every GPU run in a folder, or that there is none."""
    parts = []
    for path in sorted(results.glob("*.json")):
        content, rows = record.load(path)
        if content["machine"].get("gpu", {}).get("device") == "cuda":
            parts.append(render(content, rows, markdown=True, goals=False))
    return "\n\n".join(parts) or gpu_table.NOTHING_YET


def main(arguments: list[str] | None = None) -> int:
    """Prints or inserts the tables of a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?")
    parser.add_argument("--gpu-page", type=Path, help="a Markdown file with GPU marks")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--only", default="", help="comma-separated groups")
    parser.add_argument("--no-goals", action="store_true", help="tables only")
    parser.add_argument("--into", type=Path, help="a Markdown file with performance marks")
    options = parser.parse_args(arguments)
    if (options.results is None) == (options.gpu_page is None):
        parser.error("give either results or --gpu-page")
    try:
        if options.gpu_page is not None:
            page = insert(options.gpu_page.read_text(), gpu_page(), GPU_MARKS)
            options.gpu_page.write_text(page)
            return 0
        content, rows = record.load(options.results)
        only = tuple(name for name in options.only.split(",") if name)
        markdown = options.markdown or options.into is not None
        goals = not options.no_goals
        tables = render(content, rows, markdown=markdown, only=only, goals=goals)
        if options.into is None:
            print(tables)
        else:
            marks = GPU_MARKS if "gpu" in content["machine"] else CPU_MARKS
            options.into.write_text(insert(options.into.read_text(), tables, marks))
    except ValueError as error:
        record.die(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
