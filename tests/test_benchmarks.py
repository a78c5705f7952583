"""The benchmark suite's own logic: turns, memory, runs. No speed is asserted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contests import (
    SUPCON,
    entry,
    raising,
    run_tiny,
    timed_row,
    tiny_contest,
)

from benchmarks import (
    catalogue,
    catalogue_gcl,
    contenders,
    contest,
    memory,
    probes,
    record,
    run,
    table,
    turns,
)
from benchmarks.contenders import Entry
from benchmarks.contest import Goal
from benchmarks.gate import Gate
from benchmarks.peers import PEERS, eager


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in ("a", "b", "c"):

        def loss(*args: Any, name: str = name, **options: Any) -> torch.Tensor:
            order.append(name)
            return eager.class_sums(*args, **options)

        monkeypatch.setitem(contenders.EXTRA, name, loss)
    monkeypatch.setattr(turns, "SHORTEST_TURN", 0.0)
    # so long that all have the most turns, however slow this machine is at the moment
    long = replace(tiny_contest("a", "b", "c"), seconds=60.0)
    rows = contest.run_contest(long, gate=Gate(), say=lambda line: None)
    assert [row.repeats >= 3 for row in rows] == [True] * 3
    taken = order[6:]  # after gate and warm-up, which go one by one
    assert sorted(taken[:3]) == sorted(taken[3:6]) == ["a", "b", "c"]
    assert taken[:3] != taken[3:6]  # nobody always follows the same contender


def test_running_out_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    monkeypatch.setitem(contenders.EXTRA, "greedy", raising(error))
    rows = run_tiny("greedy", "class-sums")
    assert rows["greedy"].status == "OOM" and "allocate" in rows["greedy"].reason
    assert rows["class-sums"].status == "ok"


def test_another_error_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders.EXTRA, "broken", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run_tiny("broken")


def test_taking_too_long_is_a_row() -> None:
    row = run_tiny("class-sums", timeout=0.0)["class-sums"]
    assert row.status == "timeout" and row.wall_min_ms is None


def test_a_missing_peer_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = replace(PEERS["pml"], unavailable=lambda: "pytorch-metric-learning is not installed")
    monkeypatch.setitem(PEERS, "pml", missing)
    row = run_tiny("pml")["pml"]
    assert (row.status, row.reason) == ("skipped", "pytorch-metric-learning is not installed")


def test_the_number_of_threads_is_restored() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_tiny("class-sums")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("kind", "bound", "value", "met"),
    [
        ("speedup", 3.0, 4.0, True),
        ("speedup", 5.0, 4.0, False),
        ("overhead", 0.3, 0.25, True),
        ("overhead_per_flop", 0.1, 0.125, False),
    ],
)
def test_goals_compare_times(kind: str, bound: float, value: float, met: bool) -> None:
    rows = [timed_row("cpu", 2.0, flops=2.0), timed_row("chunk", 8.0)]
    goal = Goal("cpu", "chunk", kind, bound, stretch=value)
    contest.compare_rows(rows, tiny_contest("cpu", "chunk", goals=(goal,)), 1)
    assert rows[0].goals[0]["value"] == pytest.approx(value)
    assert rows[0].goals[0]["met"] is met and rows[0].goals[0]["stretch_met"] is True
    assert rows[0].speedup_vs["chunk"]["cpu_min"] == pytest.approx(4.0)


def test_few_channels_are_judged_by_their_exponentials_too(monkeypatch) -> None:
    """1e6 pairs at 1 ns each, 7 ms for one FLOP: half a FLOP should take 1 + 3.5 ms."""
    monkeypatch.setattr(contest, "exponential_ns", lambda: 1.0)
    rows = [timed_row("cpu", 9.0, flops=0.5, n=1000), timed_row("chunk", 8.0, flops=1.0, n=1000)]
    goal = Goal("cpu", "chunk", "overhead_per_work", 1.15)
    contest.compare_rows(rows, tiny_contest("cpu", "chunk", goals=(goal,)), 1)
    assert rows[0].goals[0]["value"] == pytest.approx(2.0)
    assert rows[0].goals[0]["met"] is False and rows[0].notes["exponential_ns"] == 1.0


def test_the_price_of_an_exponential_is_measured() -> None:
    threads = torch.get_num_threads()
    assert 0.01 < contest.exponential_ns() < 100
    assert torch.get_num_threads() == threads


def test_a_goal_without_a_measurement_is_neither_met_nor_missed() -> None:
    rows = [timed_row("cpu", 2.0), timed_row("chunk", 8.0, status="OOM")]
    goal = Goal("cpu", "chunk", "speedup", 1.0)
    contest.compare_rows(rows, tiny_contest("cpu", "chunk", goals=(goal,)), 1)
    assert rows[0].goals[0]["met"] is None and rows[0].speedup_vs == {}


def test_the_growth_exponent_is_that_of_a_power_law() -> None:
    sizes = [1024, 2048, 8192]
    assert probes.fitted_exponent(sizes, [3.0 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert probes.fitted_exponent(sizes, [7.0] * 3) == pytest.approx(0.0, abs=1e-12)


def test_same_bits_sees_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probes.same_bits(entry("class-sums"), (1,))

    def loss(*args: Any, **options: Any) -> torch.Tensor:
        return eager.class_sums(*args, **options) * (1 + 1e-3 * torch.rand(()))

    monkeypatch.setitem(contenders.EXTRA, "noisy", loss)
    assert not probes.same_bits(entry("noisy"), (1,))


@pytest.mark.parametrize(
    ("largest_truth", "status", "judged_on"),
    [(16384, ("ok", "FAIL"), ""), (1, ("FAIL", "FAIL"), "agreement with wrong")],
    ids=["against float64", "against each other"],
)
def test_memory_rows_pass_the_gate_too(
    largest_truth: int,
    status: tuple[str, str],
    judged_on: str,
    wrong: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(one: Entry, *args: Any, **options: Any) -> memory.Peak:
        outputs, gradients = contenders.run_once(one.function(), one.sample())
        return memory.Peak("ok", extra_mb=5.0, gradients_mb=1.0, tensors=(outputs, gradients))

    monkeypatch.setattr(memory, "measure", measure)
    monkeypatch.setattr(probes, "LARGEST_TRUTH", largest_truth)
    plan = probes.Plan(SUPCON, 64, ("class-sums", wrong))
    monkeypatch.setattr(probes, "plans", lambda quick: [plan])
    rows: list[record.Row] = []
    probes.measure_memory(False, lambda line: None, rows.append, lambda one: None, 60.0)
    assert tuple(row.status for row in rows) == status
    assert rows[0].judged_on == judged_on
    assert [row.peak_mb for row in rows] == [5.0 if one == "ok" else None for one in status]


def test_memory_rows_without_a_truth_of_their_size_are_judged_on_fewer_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = memory.Peak("ok", extra_mb=5.0, gradients_mb=1.0, tensors=((), {}))
    monkeypatch.setattr(memory, "measure", lambda *args, **options: found)
    monkeypatch.setattr("benchmarks.gate.LARGEST_REFERENCE", 1)
    case = catalogue_gcl.kept(catalogue.flat(SUPCON, 4096, 3), 0.02)
    plan = probes.Plan(catalogue_gcl.FILTERED, 4096, ("cpu", "eager"), case)
    monkeypatch.setattr(probes, "plans", lambda quick: [plan])
    rows: list[record.Row] = []
    probes.measure_memory(False, lambda line: None, rows.append, lambda one: None, 60.0)
    assert [row.status for row in rows] == ["ok", "ok"]
    assert {row.judged_on for row in rows} == {"4096x3_0.02_cut"}


@pytest.mark.slow
def test_memory_is_measured_in_a_child() -> None:
    n, d = 4096, 64
    one = entry("class-sums", case=catalogue.flat(SUPCON, n, d))
    peak = memory.measure(one, 1, limit=4 * 2**30, timeout=120, tensors=True)
    assert peak.status == "ok" and peak.gradients_mb == pytest.approx(n * d * 4 / 2**20)
    matrix = n * n * 4 / 2**20
    assert 1.5 * matrix < peak.extra_mb < 8 * matrix
    assert peak.tensors[1]["features"].shape == (n, d)
    little = memory.measure(one, 1, limit=int(matrix * 2**20), timeout=120)
    assert little.status == "OOM" and little.extra_mb is None
    assert memory.measure(one, 1, limit=2**30, timeout=0.01).status == "timeout"


@pytest.mark.parametrize("quick", [True, False])
def test_catalogue_is_consistent(quick: bool) -> None:
    found = catalogue.contests(tuple(catalogue.CONTESTS), quick=False)
    assert (
        {one.group for one in found}
        == set(catalogue.CONTESTS)
        == set(table.TITLES) - set(catalogue.PROBES)
    )
    for one in found:
        labels = [item.label for item in one.entries]
        assert len(set(labels)) == len(labels), one.title
        for goal in one.goals:
            assert {goal.of, goal.against} <= set(labels), one.title
        for item in one.entries:
            assert callable(item.function()), one.title


def test_a_run_writes_its_file(
    one_contest: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "results.json"
    assert run.main(["--only", "match", "--out", str(out)]) == 0
    content, rows = record.load(out)
    assert content["finished"] and content["machine"]["cores"] >= 1
    assert content["versions"]["torch"] == str(torch.__version__)
    assert [(row.label, row.status) for row in rows] == [("class-sums", "ok"), ("eager", "ok")]
    for row in rows:
        assert 0 < row.wall_min_ms <= row.wall_median_ms <= row.wall_p80_ms
        assert row.n == 64 and row.d == 8 and row.error < 1e-5 and row.repeats >= 3
    printed = capsys.readouterr().out
    assert "gate passed" in printed and "2 rows in" in printed


def test_a_wrong_contender_makes_the_run_fail(
    one_contest: None, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = replace(tiny_contest("class-sums", wrong), group="match")
    monkeypatch.setitem(catalogue.CONTESTS, "match", lambda quick: [made])
    out = tmp_path / "results.json"
    assert run.main(["--only", "match", "--out", str(out)]) == 1
    assert [row.status for row in record.load(out)[1]] == ["ok", "FAIL"]


def test_ctrl_c_keeps_what_was_measured(
    one_contest: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = replace(tiny_contest("class-sums"), group="match")
    second = replace(tiny_contest("eager", "stopped"), group="match")
    monkeypatch.setitem(catalogue.CONTESTS, "match", lambda quick: [first, second])
    # gate, two warm-up steps, then the first turn counts and the second is interrupted
    monkeypatch.setattr(turns, "SHORTEST_TURN", 0.0)
    monkeypatch.setitem(contenders.EXTRA, "stopped", raising(KeyboardInterrupt(), after=3))
    out = tmp_path / "results.json"
    assert run.main(["--only", "match", "--out", str(out)]) == 130
    content, rows = record.load(out)
    assert content["finished"] is False
    assert [(row.label, row.repeats > 0) for row in rows] == [
        ("class-sums", True),
        ("eager", True),
        ("stopped", True),
    ]


def test_gpu_says_that_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--gpu"]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_an_unknown_group_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["--only", "supcon,nonsense"])
    assert stop.value.code == 2 and "no group nonsense" in capsys.readouterr().err


def test_the_pytest_benchmark_suite_still_runs(repo: Path) -> None:
    """Collected from the registry and right before it is timed; a few of its cases, once each."""
    pytest.importorskip("pytest_benchmark")
    words = ["-m", "pytest", "benchmarks", "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    words += ["-k", "1024x64-cpu and (pair_argmax or pair_logsumexp or contrastive)"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo)}
    done = subprocess.run(
        [sys.executable, *words], cwd=repo, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 4, done.stdout
