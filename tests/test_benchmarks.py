"""The benchmark suite's own logic: gate, turns, memory, file, comparison. No speed is asserted."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from benchmarks import (  # noqa: E402  # noqa: E402
    catalogue,
    compare,
    contenders,
    contest,
    memory,
    plot,
    probes,
    record,
    run,
    table,
)
from benchmarks.contenders import Entry  # noqa: E402
from benchmarks.contest import Contest, Goal, run_contest  # noqa: E402
from benchmarks.gate import Gate, judged_case, truth  # noqa: E402
from benchmarks.peers import PEERS, eager  # noqa: E402
from medcl_kernels.registry import spec  # noqa: E402

SUPCON, INFO_NCE = catalogue.SUPCON, catalogue.INFO_NCE
TINY = {op: catalogue.flat(op, 64, 8) for op in (SUPCON, INFO_NCE)}
TINY |= {
    op: next(case for case in spec(op).cases if case.name == "ragged")
    for op in ("patch_affinity_contrast", "patch_class_ratio", "uncertainty_reweight")
}


def entry(name: str, op: str = SUPCON, **changes: Any) -> Entry:
    """One contender on the tiny input of its loss."""
    return replace(Entry(name, name, op, TINY[op]), **changes)


def tiny_contest(*names: str, goals: tuple[Goal, ...] = ()) -> Contest:
    entries = tuple(entry(name) for name in names)
    return Contest("supcon", "tiny", entries, goals, threads=(1,), seconds=0.02)


def run_tiny(*names: str, **options: Any) -> dict[str, record.Row]:
    rows = run_contest(tiny_contest(*names), gate=Gate(), say=lambda line: None, **options)
    return {row.label: row for row in rows}


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> str:
    """A contender with another temperature: plausible, smooth, and wrong."""

    def loss(features: Any, labels: Any, **options: Any) -> torch.Tensor:
        return eager.class_sums(features, labels, **{**options, "temperature": 0.101})

    monkeypatch.setitem(contenders.EXTRA, "wrong", loss)
    return "wrong"


def raising(error: BaseException, after: int = 0) -> Any:
    """A contender that raises in one of its steps."""
    steps = iter(range(10**9))

    def loss(*args: Any, **options: Any) -> torch.Tensor:
        if next(steps) >= after:
            raise error
        return eager.class_sums(*args, **options)

    return loss


@pytest.mark.parametrize(
    ("name", "op"),
    [
        pytest.param(name, op, marks=[pytest.mark.slow] if peer.compiles else [], id=f"{name}-{op}")
        for name, peer in PEERS.items()
        for op in peer.functions
        if name != "monai"
    ],
)
def test_every_peer_computes_the_loss_of_the_package(name: str, op: str) -> None:
    one = entry(name, op) if op in TINY else Entry(name, name, op, catalogue.flat(op, 64, 8))
    if one.unavailable():
        pytest.skip(f"{name}: {one.unavailable()}")
    verdict = Gate().judge(one)
    assert verdict.passed, verdict.reason
    assert verdict.judged_on == ""


@pytest.mark.parametrize("name", ["cpu", "eager", "monai", "pml"])
def test_both_libraries_agree_on_symmetric_intra_view_info_nce(name: str) -> None:
    case = replace(TINY[INFO_NCE], labels="none")
    case = catalogue.with_options(case, "nt_xent", symmetric=True, intra_view=True)
    one = Entry(name, name, INFO_NCE, case)
    if one.unavailable():
        pytest.skip(f"{name}: {one.unavailable()}")
    verdict = Gate().judge(one)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize(
    ("name", "op", "changes"),
    [
        ("eager", SUPCON, {"form": "in"}),
        ("eager", SUPCON, {"form": "pixel"}),
        ("eager", SUPCON, {"maps": 3}),
        ("eager", SUPCON, {"pairs": "image"}),
        ("eager", INFO_NCE, {"pairs": "image"}),
        ("eager", INFO_NCE, {"pairs": "batch"}),
        ("chunk", SUPCON, {"pairs": "batch"}),
        ("lce", INFO_NCE, {"pairs": "batch"}),
    ],
)
def test_peers_compute_the_variants_they_are_timed_on(
    name: str, op: str, changes: dict[str, Any]
) -> None:
    case = replace(TINY[op], maps=changes.pop("maps", 1))
    if "pairs" in changes:
        shape = (3, 8, 4, 5)
        case = replace(case, shape=shape, key_shape=None if op == SUPCON else shape, **changes)
    elif changes:
        case = catalogue.with_options(case, "variant", **changes)
    one = Entry(name, name, op, case)
    if one.unavailable():
        pytest.skip(f"{name}: {one.unavailable()}")
    verdict = Gate().judge(one)
    assert verdict.passed, verdict.reason


def test_a_peer_refuses_a_loss_that_it_does_not_have() -> None:
    with pytest.raises(KeyError, match="lce does not compute supervised_contrastive"):
        PEERS["lce"].resolve(SUPCON)
    with pytest.raises(ValueError, match="one set of unit rows"):
        PEERS["chunk"].resolve(SUPCON)(
            torch.randn(4, 3), torch.zeros(4), temperature=1.0, form="in"
        )


@pytest.mark.parametrize("op", [SUPCON, INFO_NCE])
def test_the_truth_by_blocks_is_the_reference(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = entry("cpu", op, case=catalogue.flat(op, 700, 5))
    by_reference = truth(one)
    monkeypatch.setattr("benchmarks.gate.BLOCKS_FROM", 1)
    by_blocks = truth(one)
    assert torch.allclose(by_blocks[0][0], by_reference[0][0], rtol=1e-12)
    for name, gradient in by_reference[1].items():
        assert torch.allclose(by_blocks[1][name], gradient, rtol=1e-9, atol=1e-14), name


def test_a_wrong_contender_fails_and_has_no_time(wrong: str) -> None:
    rows = run_tiny("class-sums", wrong)
    assert rows["class-sums"].status == "ok" and rows["class-sums"].wall_min_ms > 0
    assert rows[wrong].status == "FAIL" and "off by" in rows[wrong].reason
    assert rows[wrong].wall_min_ms is None and rows[wrong].repeats == 0


def test_a_missing_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(features: Any, labels: Any, **options: Any) -> torch.Tensor:
        value = eager.class_sums(features.detach(), labels, **options)
        return value + 0 * features.sum()

    monkeypatch.setitem(contenders.EXTRA, "zero-gradient", loss)
    row = run_tiny("zero-gradient")["zero-gradient"]
    assert row.status == "FAIL" and row.value_error < 1e-5 and row.error == pytest.approx(1.0)


def test_a_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(features: Any, labels: Any, **options: Any) -> torch.Tensor:
        return eager.class_sums(features, labels, **options) * float("nan")

    monkeypatch.setitem(contenders.EXTRA, "nan", loss)
    assert run_tiny("nan")["nan"].status == "FAIL"


def test_large_operations_are_judged_on_fewer_rows() -> None:
    big = catalogue.timed(INFO_NCE, 8192, 64)
    assert judged_case(catalogue.spec(INFO_NCE), big) == big  # by blocks
    cut = judged_case(catalogue.spec("info_nce_sum"), big)
    assert cut.shape == (2048, 64) and cut.key_shape == (2048, 64)
    assert cut.name == "8192x64_cut"


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in ("a", "b", "c"):

        def loss(*args: Any, name: str = name, **options: Any) -> torch.Tensor:
            order.append(name)
            return eager.class_sums(*args, **options)

        monkeypatch.setitem(contenders.EXTRA, name, loss)
    monkeypatch.setattr(contest, "SHORTEST_TURN", 0.0)
    rows = run_tiny("a", "b", "c")
    assert [row.repeats >= 3 for row in rows.values()] == [True] * 3
    turns = order[6:]  # after gate and warm-up, which go one by one
    assert sorted(turns[:3]) == sorted(turns[3:6]) == ["a", "b", "c"]
    assert turns[:3] != turns[3:6]  # nobody always follows the same contender


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


def _row(label: str, cpu_ms: float, flops: float = 1.0, **changes: Any) -> record.Row:
    row = contest.new_row("supcon", entry(label), 1)
    row.flops_needed = flops
    row.set_times([cpu_ms, 2 * cpu_ms], [cpu_ms, 2 * cpu_ms])
    for name, value in changes.items():
        setattr(row, name, value)
    return row


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
    rows = [_row("cpu", 2.0, flops=2.0), _row("chunk", 8.0)]
    goal = Goal("cpu", "chunk", kind, bound, stretch=value)
    contest.compare_rows(rows, tiny_contest("cpu", "chunk", goals=(goal,)), 1)
    assert rows[0].goals[0]["value"] == pytest.approx(value)
    assert rows[0].goals[0]["met"] is met and rows[0].goals[0]["stretch_met"] is True
    assert rows[0].speedup_vs["chunk"]["cpu_min"] == pytest.approx(4.0)


def test_a_goal_without_a_measurement_is_neither_met_nor_missed() -> None:
    rows = [_row("cpu", 2.0), _row("chunk", 8.0, status="OOM")]
    goal = Goal("cpu", "chunk", "speedup", 1.0)
    contest.compare_rows(rows, tiny_contest("cpu", "chunk", goals=(goal,)), 1)
    assert rows[0].goals[0]["met"] is None and rows[0].speedup_vs == {}


def test_percentiles_and_median() -> None:
    row = _row("cpu", 1.0)
    row.set_times([5.0, 1.0, 4.0, 2.0, 3.0], [10.0, 20.0, 30.0, 40.0, 50.0])
    assert (row.cpu_min_ms, row.cpu_median_ms, row.repeats) == (1.0, 3.0, 5)
    assert (row.wall_p20_ms, row.wall_p80_ms) == (20.0, 50.0)


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


@pytest.fixture
def one_contest(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` with nothing but the tiny contest, and without a limit on this process."""
    made = replace(tiny_contest("class-sums", "eager"), group="match")
    monkeypatch.setitem(catalogue.CONTESTS, "match", lambda quick: [made])
    monkeypatch.setattr(contest, "limit_memory", lambda: 0)


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
    monkeypatch.setattr(contest, "SHORTEST_TURN", 0.0)
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


def write(path: Path, *rows: record.Row) -> str:
    record.save(path, record.document(list(rows), [], True))
    return str(path)


def test_compare_ends_with_1_on_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write(tmp_path / "a.json", _row("cpu", 10.0), _row("chunk", 40.0))
    slower = write(tmp_path / "b.json", _row("cpu", 11.5), _row("chunk", 10.0))
    assert compare.main([before, slower, "--threshold", "10%"]) == 1
    assert "WORSE" in capsys.readouterr().out
    assert compare.main([before, slower, "--threshold", "20%"]) == 0
    assert compare.main([slower, before]) == 0  # a slower peer is no regression


def test_compare_sees_memory_and_failures(tmp_path: Path) -> None:
    before = write(tmp_path / "a.json", _row("cpu", 10.0, peak_mb=100.0))
    more = write(tmp_path / "b.json", _row("cpu", 10.0, peak_mb=120.0))
    failed = write(tmp_path / "c.json", _row("cpu", 10.0, status="FAIL"))
    assert compare.main([before, more]) == 1
    assert compare.main([before, failed]) == 1
    assert compare.main([failed, before]) == 0


def test_compare_can_divide_by_a_peer(tmp_path: Path) -> None:
    """A machine that is half as fast makes everybody slower."""

    def pair(path: Path, ours: float, theirs: float) -> str:
        rows = [_row("cpu", ours), _row("chunk", theirs)]
        contest.compare_rows(rows, tiny_contest("cpu", "chunk"), 1)
        return write(path, *rows)

    fast, slow = pair(tmp_path / "a.json", 10.0, 40.0), pair(tmp_path / "b.json", 20.0, 80.0)
    assert compare.main([fast, slow]) == 1
    assert compare.main([fast, slow, "--relative-to", "lce,chunk"]) == 0


def test_compare_of_nothing_in_common_is_an_error(tmp_path: Path) -> None:
    before = write(tmp_path / "a.json", _row("cpu", 10.0))
    other = write(tmp_path / "b.json", _row("cpu", 10.0, case="another"))
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
    path = Path(write(tmp_path / "a.json", _row("cpu", 10.0)))
    assert record.load(path)[1][0] == _row("cpu", 10.0)
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"a\.json"):
        record.load(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.json", _row("cpu", 10.0)))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="not a readable JSON file"):
        record.load(path)


def test_tables_show_times_ratios_and_failures(tmp_path: Path) -> None:
    rows = [
        _row("cpu", 10.0),
        _row("chunk", 42.0),
        _row("eager", 1.0, status="OOM"),
        replace(_row("cpu", 1.0), group="memory", case="65536x64", peak_mb=61.4),
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
            rows.append(_row(label, factor * n * n / 1e6, n=n, d=64))
            rows.append(_row(label, 1.0, n=n, d=64, group="memory", peak_mb=n / 1e3))
    rows.append(_row("eager", 1.0, n=4096, d=64, group="memory", status="OOM"))
    out = tmp_path / "curves.png"
    assert plot.main([write(tmp_path / "a.json", *rows), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 20_000
    with pytest.raises(ValueError, match="D = 7"):
        plot.draw(rows, out, channels=7)


def test_errors_are_relative_to_the_norm() -> None:
    from benchmarks.gate import compare as judge

    true = torch.tensor([3.0, 4.0], dtype=torch.float64)
    ours = torch.tensor([3.0, 4.05])
    verdict = judge((ours,), {"x": ours}, (true,), {"x": true}, torch.float32)
    assert not verdict.passed and math.isclose(verdict.error, 0.01, rel_tol=1e-4)
    infinite = torch.tensor([-math.inf, 4.0])
    assert judge((infinite,), {}, (infinite.double(),), {}, torch.float32).passed
