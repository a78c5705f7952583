"""The harness of GPU runs, tried without a GPU: what nobody can run before it must work at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contests import INFO_NCE, SUPCON, entry, raising, timed_row, tiny_contest

from benchmarks import (
    choose,
    contenders,
    contest,
    devices,
    gate,
    gpu_check,
    gpu_run,
    gpu_table,
    grid,
    record,
    run,
    table,
    turns,
)
from benchmarks.contest import DeviceLost
from benchmarks.peers import PEERS, eager, flex_attention
from medcl_kernels import dispatch, measured

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Children take Ctrl-C also where this process was started with it ignored, as background jobs
    are."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("site", [grid.GPU, grid.DRY_RUN], ids=["gpu", "dry run"])
def test_the_grid_is_consistent(site: grid.Site) -> None:
    found = grid.contests(tuple(grid.CONTESTS), site)
    assert {one.group for one in found} == set(grid.CONTESTS) == set(gpu_table.TITLES)
    titles = [one.title for one in found]
    assert len(titles) == len(set(titles))
    rows = [gpu_run.key(contest.new_row(c.group, e, 1)) for c in found for e in c.entries]
    assert len(rows) == len(set(rows)), "two entries would share one row"
    for one in found:
        labels = {item.label for item in one.entries}
        assert all({goal.of, goal.against} <= labels for goal in one.goals), one.title
        for item in one.entries:
            assert item.contender in (*contenders.OURS, *PEERS) and item.device == site.device
            if item.contender in PEERS:
                assert item.op in PEERS[item.contender].functions
    sizes = {(e.case.shape[0] * site.rows, e.case.shape[1] * site.channels, e.arithmetic)
             for c in found if c.group in ("sizes", "peers") for e in c.entries}  # fmt: skip
    assert sizes == {(n, d, a) for n in grid.ROWS for d in grid.CHANNELS
                     for a in ("bfloat16", "tf32")}  # fmt: skip


def test_a_forward_pass_needs_a_third_or_a_quarter_of_the_flops() -> None:
    for op, share in ((SUPCON, 3), (INFO_NCE, 4)):
        full = entry("cpu", op)
        assert replace(full, mode="forward").flops() == pytest.approx(full.flops() / share)


@pytest.fixture
def two_contests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The grid is two tiny contests; the list names who ran."""
    ran: list[str] = []
    first = replace(tiny_contest("class-sums", "broken"), group="peers", title="first")
    second = replace(tiny_contest("eager"), group="peers", title="second")
    monkeypatch.setattr(grid, "CONTESTS", {"peers": lambda site: [first, second]})
    monkeypatch.setattr(devices, "ceilings", lambda device: {"float32": 100.0, "bfloat16": 200.0})

    def fine(*args: Any, **options: Any) -> torch.Tensor:
        ran.append("broken")
        return eager.class_sums(*args, **options)

    monkeypatch.setitem(contenders.EXTRA, "broken", fine)
    return ran


def gpu(out: Path, *more: str) -> tuple[int, dict[str, Any], dict[str, record.Row]]:
    code = run.main(["--gpu", "--dry-run", "--out", str(out), *more])
    content, rows = record.load(out)
    return code, content, {row.label: row for row in rows}


def test_a_run_writes_device_ceilings_states_and_shares(
    two_contests: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, content, rows = gpu(tmp_path / "a.json")
    assert code == 0 and content["finished"] and "current" not in content
    assert content["machine"]["gpu"]["ceilings"]["float32"] == 100.0
    assert [state["contest"] for state in content["device_states"]] == ["first", "second"]
    assert all("error" in state or "clocks.sm" in state for state in content["device_states"])
    row = rows["eager"]
    needed = row.flops_needed / row.wall_min_ms / 1e6
    assert row.gflops_needed_per_s == pytest.approx(needed, rel=2e-5)  # the file has six digits
    assert row.roofline_share == pytest.approx(needed / 100.0, rel=2e-5)
    assert "a dry run" in capsys.readouterr().out


def test_an_error_of_one_contender_is_a_row_and_the_rest_goes_on(
    two_contests: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("CUDA error: misaligned address")
    monkeypatch.setitem(contenders.EXTRA, "broken", raising(error))
    code, content, rows = gpu(tmp_path / "a.json")
    assert code == 1 and content["finished"]
    assert rows["broken"].status == "error" and "misaligned" in rows["broken"].reason
    assert rows["class-sums"].status == rows["eager"].status == "ok"


def test_a_lost_device_ends_the_process_and_a_second_one_goes_on_behind_it(
    two_contests: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(device: str) -> None:
        raise DeviceLost("an illegal memory access was encountered")

    monkeypatch.setitem(contenders.EXTRA, "broken", raising(RuntimeError("illegal access")))
    monkeypatch.setattr(contest, "_give_memory_back", lost)
    code, content, rows = gpu(tmp_path / "a.json")
    assert code == 3 and not content["finished"]
    assert {label: row.status for label, row in rows.items()} == {"broken": "error"}
    code, content, rows = gpu(tmp_path / "a.json", "--resume")
    assert code == 1 and content["finished"]  # the error is still one
    assert {row.status for row in rows.values()} == {"ok", "error"} and len(rows) == 3


@pytest.mark.parametrize("label", ["broken", None], ids=["first step", "turns"])
def test_a_process_that_died_leaves_a_note_and_is_not_repeated(
    label: str | None, two_contests: list[str], tmp_path: Path
) -> None:
    """As after a hang or a segmentation fault: nothing could be written any more."""
    out = tmp_path / "a.json"
    content = record.document([], ["--gpu"], False)
    content["current"] = {"title": "first", "label": label}
    record.save(out, content)
    code, content, rows = gpu(out, "--resume")
    assert code == 1 and rows["broken"].reason.startswith(gpu_run.DIED)
    assert two_contests == []  # it was not tried again
    assert rows["class-sums"].status == ("ok" if label else "error")
    assert rows["eager"].status == "ok"


def test_what_time_does_not_reach_is_named(two_contests: list[str], tmp_path: Path) -> None:
    code, content, rows = gpu(tmp_path / "a.json", "--seconds", "0")
    assert code == 0 and len(rows) == 3
    assert {row.reason for row in rows.values()} == {"no time was left"}


def test_out_of_memory_on_a_device_is_a_row(
    two_contests: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB. GPU 0 has ...")
    monkeypatch.setitem(contenders.EXTRA, "broken", raising(error))
    code, _, rows = gpu(tmp_path / "a.json")
    assert code == 0 and rows["broken"].status == "OOM" and "64.00 GiB" in rows["broken"].reason


def test_a_backend_without_the_operation_is_skipped_not_an_error(
    two_contests: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(*args: Any, **options: Any) -> torch.Tensor:
        raise dispatch.BackendUnavailable('impl="cuda" cannot run supervised_sum: it has nothing')

    monkeypatch.setitem(contenders.EXTRA, "broken", loss)
    code, _, rows = gpu(tmp_path / "a.json")
    assert code == 0 and rows["broken"].status == "skipped"


def test_rounded_products_are_judged_by_what_plain_torch_does() -> None:
    one = entry("chunk", dtype=torch.bfloat16, products="bfloat16")
    judge = gate.Gate()
    assert judge.judge(one).passed
    strict, lax = (
        judge.allowed(replace(one, contender=name), judge.truth(one)) for name in ("cpu", "eager")
    )
    assert gate.TOLERANCE[torch.bfloat16] <= strict <= lax < gate.WORST_PLAIN
    assert judge.judge(replace(one, contender="cpu")).passed


def unfused(query, key, value, *, score_mod, scale, return_lse):
    """What FlexAttention computes, with the matrix of scores."""
    scores = query @ key.mT * scale
    if score_mod is not None:
        rows, columns = (torch.arange(x.shape[2]) for x in (query, key))
        scores = score_mod(scores, 0, 0, rows[:, None], columns[None])
    assert return_lse
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


@pytest.mark.parametrize("op", [SUPCON, INFO_NCE])
def test_the_flex_peer_computes_the_loss(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention, "_flex", lambda: unfused)
    monkeypatch.setitem(PEERS, "flex", replace(PEERS["flex"], devices=()))
    verdict = gate.Gate().judge(entry("flex", op))
    assert verdict.passed, verdict.reason


def test_the_inf_cl_peer_computes_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def cal_flash_loss(q, k, labels, scale, head_dim):
        assert q.shape[1] % head_dim == 0
        return torch.nn.functional.cross_entropy(scale * q @ k.T, labels, reduction="none")

    module = types.ModuleType("inf_cl")
    module.cal_flash_loss = cal_flash_loss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "inf_cl", module)
    verdict = gate.Gate().judge(entry("inf-cl", INFO_NCE))
    assert verdict.passed, verdict.reason


def gpu_row(impl: str, ms: float, **changes: Any) -> record.Row:
    values = {"op": "pair_logsumexp", "impl": impl, "device": "cuda", "dtype": "bfloat16"}
    values |= {"group": "operations", "n": 32768, "d": 128, "options": {}, **changes}
    return timed_row(impl, ms, **values)


def gpu_file(*rows: record.Row, **machine: Any) -> tuple[dict[str, Any], list[record.Row]]:
    content = record.document(list(rows), ["--gpu"], True)
    content["machine"]["gpu"] = {"name": "Card", "device": "cuda", "architecture": "sm_90"}
    content["machine"]["gpu"] |= {"driver": "1", "cuda": "13.0", **machine}
    return content, list(rows)


def test_auto_is_chosen_from_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    file = gpu_file(
        gpu_row("triton", 2.0),
        gpu_row("cuda", 1.0),
        gpu_row("triton", 2.0, case="key"),  # 4 against 5 over both inputs of the class
        gpu_row("cuda", 4.0, case="key"),
        gpu_row("cuda", 9.0, n=131072),  # alone in its class
        gpu_row("triton", 1.0, d=64, status="FAIL", wall_median_ms=None),
        gpu_row("cuda", 5.0, d=64),
        gpu_row("cuda", 1.0, op="info_nce", n=4096, d=256),
        gpu_row("triton", 1.0, op="pair_argmax", device="cpu"),
        gpu_row("triton", 9.0, op="positive_mean"),
        gpu_row("cuda", 1.0, op="positive_mean"),
        gpu_row("cuda", 1.0, op="positive_mean", n=4096),
    )
    found = choose.fastest([file, ({"machine": {}}, [gpu_row("cuda", 1.0)])])
    assert set(found) == {
        ("sm_90", "pair_logsumexp", "bfloat16"),
        ("sm_90", "info_nce_sum", "bfloat16"),
        ("sm_90", "positive_mean", "bfloat16"),
    }
    lse = found["sm_90", "pair_logsumexp", "bfloat16"]
    assert lse == ((None, "cuda", None), (None, "triton", "cuda"), (None, None, None))
    assert found["sm_90", "info_nce_sum", "bfloat16"][2][0] == "cuda"
    # with the log-sum-exp, whose rows must be rounded alike, in classes without a result too
    assert found["sm_90", "positive_mean", "bfloat16"] == lse


def test_the_written_table_is_a_module(tmp_path: Path) -> None:
    content, rows = gpu_file(gpu_row("triton", 2.0), gpu_row("cuda", 1.0))
    source = tmp_path / "a.json"
    record.save(source, {**content, "rows": [vars(row) for row in rows]})
    out = tmp_path / "measured.py"
    assert choose.main([str(source), "--out", str(out)]) == 0
    scope: dict[str, Any] = {}
    exec(out.read_text(), scope)
    assert scope["FASTEST"]["sm_90", "pair_logsumexp", "bfloat16"][1][1] == "cuda"
    assert scope["__doc__"] == measured.__doc__
    empty = choose.source({}, out.read_text())
    exec(empty, scope)
    assert scope["FASTEST"] == {}


def test_the_page_shows_runs_on_gpus_only_and_says_when_there_is_none(tmp_path: Path) -> None:
    assert table.gpu_page(tmp_path) == gpu_table.NOTHING_YET
    common = {"group": "peers", "op": SUPCON, "case": "32768x128", "peak_mb": 40.0}
    rows = [
        gpu_row("triton", 4.0, **common, roofline_share=0.5, gflops_needed_per_s=4e5),
        gpu_row("eager", 10.0, **common),
        gpu_row("pml", 1.0, **common, status="OOM"),
    ]
    content, _ = gpu_file(*rows)
    content["rows"] = [vars(row) for row in rows]
    record.save(tmp_path / "card.json", content)
    content["machine"]["gpu"]["device"] = "cpu"
    record.save(tmp_path / "dry.json", content)
    page = table.gpu_page(tmp_path)
    assert page.count("Card") == 1 and content["created"] in page
    assert "6 (400 TFLOP/s, 50%)" in page and "15 (2.50x)" in page and "| OOM | 40 |" in page
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- gpu:begin x -->\nold\n<!-- gpu:end -->\nb\n")
    readme.write_text(table.insert(readme.read_text(), page, table.GPU_MARKS))
    assert "old" not in readme.read_text() and readme.read_text().endswith("<!-- gpu:end -->\nb\n")


def test_readme_shows_what_is_in_results() -> None:
    readme = (ROOT / "README.md").read_text()
    assert table.insert(readme, table.gpu_page(), table.GPU_MARKS) == readme


def test_nvidia_smi_is_read_in_both_spellings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *clocks_event*) echo "not a valid field" >&2; exit 6;; esac\n'
        'echo "1980, 3201, 650.1, 700.0, 61, P0, 0x0000000000000004"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    state = devices.state()
    assert state["clocks.sm"] == "1980" and state["clocks_throttle_reasons.active"].endswith("4")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "not found" in devices.state()["error"]


class PlayedEvent:
    """A CUDA event on the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        assert self.at

    def elapsed_time(self, end: PlayedEvent) -> float:
        return (end.at - self.at) * 1e3


def test_turns_on_a_device_are_timed_between_events_after_a_flush(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flush = torch.ones(8)
    memory = {"memory_allocated": 5 * 2**20, "max_memory_allocated": 12 * 2**20}
    monkeypatch.setattr(turns.CudaTurns, "_flush", flush)
    monkeypatch.setattr(torch.cuda, "Event", PlayedEvent)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    seen: list[float] = []

    def step() -> None:
        seen.append(float(flush.sum()))
        flush.fill_(1.0)
        time.sleep(0.003)

    row = timed_row("triton", 1.0, device="cuda")
    one = turns.turns_on("cuda")(row, step)
    assert one.warm_up() >= 3.0 and row.peak_mb == 7.0 and one.wall == []
    turns.take_turns([one], seconds=0.02)
    assert set(seen) == {0.0} and len(one.wall) == len(one.cpu) >= 3
    assert 3.0 <= min(one.wall) and max(one.cpu) < min(one.wall) + 3.0
    row.ceiling_gflops_per_s, row.flops_needed = 1.0, 4e6
    row.set_times(one.cpu, [4.0, 2.0, 8.0])
    assert row.gflops_needed_per_s == pytest.approx(1.0)  # at the median
    assert row.roofline_share == pytest.approx(1.0)


def test_ceilings_are_rates_of_every_arithmetic() -> None:
    found = devices.ceilings("cpu")
    assert set(found) == {"bfloat16", "float16", "tf32", "float32", "copy_gb_per_s"}
    assert all(value > 0 for value in found.values())


# ---- gpu_check


def check_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> gpu_check.Check:
    monkeypatch.setattr(gpu_check, "FOLDER", tmp_path)
    out = str(tmp_path / "out.json")
    return gpu_check.Check(gpu_check.parser().parse_args(["--dry-run", "--out", out, *more]))


def test_failed_and_skipped_tests_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "test_one.py"
    file.write_text(
        "import pytest\n"
        "def test_fine(): pass\n"
        "def test_wrong_triton(): assert 1 == 2, 'off by one'\n"
        "def test_left_out(): pytest.skip('no second device')\n"
    )
    check = check_for(tmp_path, monkeypatch, "--tests", str(file))
    check.tests()
    steps = {step.name: step for step in check.steps}
    other, triton = steps["test_one.py -k 'not triton'"], steps["test_one.py -k 'triton'"]
    assert (other.status, other.counts) == ("ok", {"passed": 1, "failed": 0, "skipped": 1})
    assert list(other.skipped) == ["no second device"]
    assert triton.status == "failed" and "test_wrong_triton: " in triton.detail[0]
    assert json.loads((tmp_path / "partial.json").read_text())["steps"][0]["name"] in steps


def test_a_hanging_child_is_ended_and_its_output_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = check_for(tmp_path, monkeypatch)
    code = "import time; print('got here', flush=True); time.sleep(60)"
    start = time.monotonic()
    step, _ = check.run("sleeper", [sys.executable, "-c", code], 6.0)
    assert step.status == "timeout" and "got here" in step.detail[0]
    monkeypatch.setattr(gpu_check, "STALL", 6.0)
    assert check.follow([sys.executable, "-c", code], 60.0) == "stall"
    assert check.follow([sys.executable, "-c", code], 1.0) == "timeout"
    assert time.monotonic() - start < 55 and not check.children  # the child sleeps 60


def test_benchmarks_start_again_while_they_get_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = check_for(tmp_path, monkeypatch)
    calls: list[list[str]] = []
    written = iter([1, 2, 2])

    def follow(command: list[str], seconds: float) -> int | str:
        calls.append(command)
        check.rows_file.write_text(json.dumps({"rows": [{}] * next(written)}))
        return [3, "stall", -11][len(calls) - 1]

    monkeypatch.setattr(check, "follow", follow)
    monkeypatch.setattr(check, "save", lambda final=False: check.rows_file)
    check.benchmarks()
    assert ["--resume" in command for command in calls] == [False, True, True]
    assert check.steps[0].status == "failed" and "no progress" in check.steps[0].detail[-1]


@pytest.mark.slow
def test_the_whole_check_runs_dry(tmp_path: Path) -> None:
    """Every step in its own process, as on a GPU machine."""
    file, out = tmp_path / "test_one.py", tmp_path / "out.json"
    file.write_text("def test_fine(): pass\n")
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry-run", "--skip=env"]
    command += ["--out", str(out), "--tests", str(file), "--", "--only=batches"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content, rows = record.load(out)
    assert {row.status for row in rows} == {"ok"} and content["finished"]
    assert [step["status"] for step in content["steps"]] == ["ok", "ok"]
    assert done.stdout.rstrip().splitlines()[-1].startswith("gpu-check: all steps passed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_check_writes_what_it_has(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "FOLDER", tmp_path)
    saved = tmp_path / "child"
    # a child that saves something when it is interrupted, as benchmarks.run does
    code = (
        "import pathlib, time\n"
        "try: print('started', flush=True); time.sleep(60)\n"
        f"except KeyboardInterrupt: pathlib.Path({str(saved)!r}).write_text('saved')"
    )

    def benchmarks(check: gpu_check.Check) -> None:
        child = check.start([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline() == "started\n"
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(gpu_check.Check, "benchmarks", benchmarks)
    out = tmp_path / "out.json"
    assert gpu_check.main(["--dry-run", "--skip=env,tests", "--out", str(out)]) == 130
    assert json.loads(out.read_text())["steps"][-1]["status"] == "stopped"
    assert saved.read_text() == "saved"
