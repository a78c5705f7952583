"""Rows, result files, their comparison, tables and curves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_contests import timed_row, tiny_contest, write

from benchmarks import compare, contest, plot, record, table
from benchmarks.contest import Goal


def test_percentiles_and_median() -> None:
    row = timed_row("cpu", 1.0)
    row.set_times([5.0, 1.0, 4.0, 2.0, 3.0], [10.0, 20.0, 30.0, 40.0, 50.0])
    assert (row.cpu_min_ms, row.cpu_median_ms, row.repeats) == (1.0, 3.0, 5)
    assert (row.wall_p20_ms, row.wall_p80_ms) == (20.0, 50.0)


def test_compare_ends_with_1_on_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write(tmp_path / "a.json", timed_row("cpu", 10.0), timed_row("chunk", 40.0))
    slower = write(tmp_path / "b.json", timed_row("cpu", 11.5), timed_row("chunk", 10.0))
    assert compare.main([before, slower, "--threshold", "10%"]) == 1
    assert "WORSE" in capsys.readouterr().out
    assert compare.main([before, slower, "--threshold", "20%"]) == 0
    assert compare.main([slower, before]) == 0  # a slower peer is no regression


def test_compare_sees_memory_and_failures(tmp_path: Path) -> None:
    before = write(tmp_path / "a.json", timed_row("cpu", 10.0, peak_mb=100.0))
    more = write(tmp_path / "b.json", timed_row("cpu", 10.0, peak_mb=120.0))
    failed = write(tmp_path / "c.json", timed_row("cpu", 10.0, status="FAIL"))
    assert compare.main([before, more]) == 1
    assert compare.main([before, failed]) == 1
    assert compare.main([failed, before]) == 0


def test_compare_can_divide_by_a_peer(tmp_path: Path) -> None:
    """A machine that is half as fast makes everybody slower."""

    def pair(path: Path, ours: float, theirs: float) -> str:
        rows = [timed_row("cpu", ours), timed_row("chunk", theirs)]
        contest.compare_rows(rows, tiny_contest("cpu", "chunk"), 1)
        return write(path, *rows)

    fast, slow = pair(tmp_path / "a.json", 10.0, 40.0), pair(tmp_path / "b.json", 20.0, 80.0)
    assert compare.main([fast, slow]) == 1
    assert compare.main([fast, slow, "--relative-to", "lce,chunk"]) == 0


def test_compare_of_nothing_in_common_is_an_error(tmp_path: Path) -> None:
    before = write(tmp_path / "a.json", timed_row("cpu", 10.0))
    other = write(tmp_path / "b.json", timed_row("cpu", 10.0, case="another"))
    with pytest.raises(SystemExit) as stop:
        compare.main([before, other])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.update(schema=99),
        lambda content: content.pop("machine"),
        lambda content: content["rows"][0].pop("threads"),
        lambda content: content["rows"][0].update(status="fine"),
        lambda content: content["rows"][0].update(surprise=1),
        lambda content: content["rows"][0].update(wall_min_ms=None),
    ],
    ids=["schema", "machine", "field", "status", "unknown", "untimed"],
)
def test_a_spoilt_file_is_refused(spoil: Any, tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.json", timed_row("cpu", 10.0)))
    assert record.load(path)[1][0] == timed_row("cpu", 10.0)
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"a\.json"):
        record.load(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.json", timed_row("cpu", 10.0)))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="not a readable JSON file"):
        record.load(path)


def test_tables_show_times_ratios_and_failures(tmp_path: Path) -> None:
    rows = [
        timed_row("cpu", 10.0),
        timed_row("chunk", 42.0),
        timed_row("eager", 1.0, status="OOM"),
        replace(timed_row("cpu", 1.0), group="memory", case="65536x64", peak_mb=61.4),
    ]
    goal = Goal("cpu", "chunk", "speedup", 5.0)
    contest.compare_rows(rows[:2], tiny_contest("cpu", "chunk", goals=(goal,)), 1)
    text = table.render(record.document(rows, [], True), rows, markdown=True)
    assert "42 (4.20x)" in text and "OOM" in text and "| 61 |" in text
    assert "| MISSED | supervised_contrastive |" in text and "1 missed" in text
    short = table.render(record.document(rows, [], True), rows, only=("memory",), goals=False)
    assert "4.20x" not in short and "MISSED" not in short and "61" in short
    target = tmp_path / "page.md"
    target.write_text("# Page\n<!-- performance:begin x -->\nold\n<!-- performance:end -->\nend\n")
    source = write(tmp_path / "a.json", *rows)
    assert table.main([source, "--into", str(target), "--only", "supcon"]) == 0
    page = target.read_text()
    assert (
        "old" not in page and "4.20x" in page and page.endswith("<!-- performance:end -->\nend\n")
    )
    assert table.main([source, "--into", str(target), "--only", "supcon"]) == 0
    assert target.read_text().count("4.20x") == page.count("4.20x")
    with pytest.raises(ValueError, match="performance:begin"):
        table.insert("no marks", "text")


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = []
    for n in (1024, 4096):
        for label, factor in (("cpu", 1.0), ("chunk", 4.0)):
            rows.append(timed_row(label, factor * n * n / 1e6, n=n, d=64))
            rows.append(timed_row(label, 1.0, n=n, d=64, group="memory", peak_mb=n / 1e3))
    rows.append(timed_row("eager", 1.0, n=4096, d=64, group="memory", status="OOM"))
    out = tmp_path / "curves.png"
    assert plot.main([write(tmp_path / "a.json", *rows), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 20_000
    with pytest.raises(ValueError, match="D = 7"):
        plot.draw(rows, out, channels=7)
