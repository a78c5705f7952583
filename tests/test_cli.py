"""`python -m medcl_kernels`: what it prints, and its exit codes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from medcl_kernels import cli, dispatch, env, selfcheck
from medcl_kernels.reference import pair_logsumexp
from medcl_kernels.registry import SPECS, spec

ROOT = Path(__file__).resolve().parents[1]


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m medcl_kernels` as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "medcl_kernels", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
    )


def sections(text: str) -> dict[str, dict[str, str]]:
    """The printed report as title -> name -> text."""
    found: dict[str, dict[str, str]] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("  "):
            name, _, rest = line.strip().partition("  ")
            found[title][name] = rest.strip()
        else:
            title = line.rstrip(":")
            found[title] = {}
    return found


def test_env_reports_versions_library_backends_and_variables() -> None:
    done = command("env", MEDCL_GEMM="portable")
    assert done.returncode == 0, done.stderr
    report = sections(done.stdout)
    assert report["versions"]["torch"].startswith(torch.__version__)
    assert report["versions"]["numpy"] == version("numpy")
    assert report["library"]["state"] == "loaded"
    assert report["library"]["target_torch"] == "2.10"
    assert report["library"]["gemm"] == "portable"
    assert report["variables"]["MEDCL_GEMM"] == "portable"
    assert set(report["variables"]) == {one.name for one in env.VARIABLES}
    expected = {
        name: "available" if reason is None else f"unavailable: {reason}"
        for name, reason in dispatch.available().items()
    }
    assert report["backends"] == expected
    assert report["optional packages"]["scipy"] == version("scipy")


def test_env_says_why_the_library_is_not_there(tmp_path: Path) -> None:
    """A report is most needed where something is broken, so it must not fail itself."""
    done = command("env", MEDCL_LIBRARY=str(tmp_path / "none.so"), MEDCL_IMPL="fastest")
    assert done.returncode == 0, done.stderr
    report = sections(done.stdout)
    assert "make build" in report["library"]["state"]
    assert report["backends"]["cpu"].startswith("unavailable: the compiled library is missing")
    assert report["backends"]["reference"] == "available"
    assert "expected one of auto, reference" in report["variables"]["MEDCL_IMPL"]


def test_list_shows_every_operation_and_loss(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    names, backends, text = (header.index(word) for word in ("name", "backends", "what"))
    table = {
        line[names:backends].strip(): line for line in lines if line.startswith(("op", "loss"))
    }
    assert set(table) == {one.name for one in SPECS}
    for one in SPECS:
        line = table[one.name]
        assert line.split()[0] == one.kind and line[text:] == one.summary
        listed = line[backends:text].strip().split(", ")
        if one.kind == "op":
            reasons = dispatch.available()
            assert listed == [
                backend.name if reasons[backend.name] is None else f"({backend.name})"
                for backend in dispatch.BACKENDS
                if one.name in backend.operations
            ]
        assert {"cpu", "reference"} <= set(listed)


def test_check_passes_here_within_its_time() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command("check")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("all checks passed")
    for one in SPECS:
        for impl in ("cpu", "reference"):
            (line,) = (s for s in done.stdout.splitlines() if s.split()[:2] == [one.name, impl])
            assert " ok " in line and int(line.split()[2]) >= 4
    # processor time: the ten seconds are promised for a machine that is not busy with other work
    assert after.ru_utime - before.ru_utime < 10


def _wrong_value(query: Any, *args: Any, impl: str, **options: Any) -> Any:
    return pair_logsumexp(query, *args, **options) * 1.001


def _wrong_gradient(query: Any, *args: Any, impl: str, **options: Any) -> Any:
    return pair_logsumexp(0.5 * query + 0.5 * query.detach(), *args, **options)


def _not_a_number(query: Any, *args: Any, impl: str, **options: Any) -> Any:
    return pair_logsumexp(query, *args, **options) * float("nan")


def _raises(query: Any, *args: Any, impl: str, **options: Any) -> Any:
    raise RuntimeError("kernel launch failed")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (_wrong_value, "output 0"),
        (_wrong_gradient, "d_query"),
        (_not_a_number, "output 0"),
        (_raises, "RuntimeError: kernel launch failed"),
    ],
)
def test_check_finds_what_is_broken(
    broken: Callable[..., Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = types.ModuleType("broken_operation")
    module.pair_logsumexp = broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "broken_operation", module)
    record = replace(spec("pair_logsumexp"), function="broken_operation:pair_logsumexp")
    monkeypatch.setattr(selfcheck, "SPECS", (record,))
    assert cli.main(["check"]) == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out and "all checks passed" not in printed.out
    assert "pair_logsumexp, cpu, aligned: " in printed.err and said in printed.err


def test_check_fails_without_the_library(tmp_path: Path) -> None:
    done = command("check", MEDCL_LIBRARY=str(tmp_path / "none.so"))
    assert done.returncode == 1
    assert "cpu: the compiled library is missing" in done.stderr
    assert "pair_logsumexp          reference" in done.stdout  # what can be checked still is


def test_bench_forwards_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, seen = tmp_path / "run.py", tmp_path / "seen"
    script.write_text(
        f"import sys; open({str(seen)!r}, 'w').write(' '.join(sys.argv[1:])); exit(3)"
    )
    monkeypatch.setattr(cli, "BENCHMARKS", script)
    assert cli.main(["bench", "--op", "info_nce", "--help"]) == 3
    assert seen.read_text() == "--op info_nce --help"


def test_bench_reaches_the_suite_of_this_checkout() -> None:
    done = command("bench", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_bench_outside_of_a_checkout_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "BENCHMARKS", tmp_path / "run.py")
    assert cli.main(["bench"]) == 2
    assert "run `make bench` in a checkout" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["benchmark"], ["env", "--verbose"]])
def test_wrong_calls_end_with_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m medcl_kernels" in capsys.readouterr().err
