"""Environment variables, and what is said when the compiled library is not there."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medcl_kernels import env

ROOT = Path(__file__).resolve().parents[1]


def in_fresh_process(code: str, **variables: str) -> str:
    """The library is opened once per process, so each of these cases needs its own."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_variables_are_read_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDCL_CHECK_FINITE", raising=False)
    assert env.check_finite() is False
    monkeypatch.setenv("MEDCL_CHECK_FINITE", "1")
    assert env.check_finite() is True
    monkeypatch.setenv("MEDCL_IMPL", "Reference")
    assert env.default_impl() == "reference"
    monkeypatch.setenv("MEDCL_IMPL", "")
    assert env.default_impl() == "auto"
    monkeypatch.setenv("MEDCL_DATA", "~/sets")
    assert env.data_root() == Path("~/sets").expanduser()
    monkeypatch.delenv("MEDCL_DATA")
    assert env.data_root() is None


@pytest.mark.parametrize("variable", [v for v in env.VARIABLES if v.choices], ids=lambda v: v.name)
def test_unknown_value_names_the_variable_and_the_choices(
    variable: env.Variable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable.name, "fastest")
    with pytest.raises(ValueError, match=f"{variable.name}='fastest': expected one of") as error:
        variable.get()
    assert all(choice in str(error.value) for choice in variable.choices)


def test_readme_lists_every_variable() -> None:
    readme = (ROOT / "README.md").read_text()
    for variable in env.VARIABLES:
        default = f"`{variable.default}`" if variable.default else "–"
        assert f"| `{variable.name}` | {default} | {variable.meaning}" in readme


def test_only_env_reads_the_environment() -> None:
    readers = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "medcl_kernels").rglob("*.py")
        if "os.environ" in path.read_text() or "getenv" in path.read_text()
    ]
    assert readers == ["medcl_kernels/env.py"]


def test_missing_library_says_how_to_build_it(tmp_path: Path) -> None:
    missing = str(tmp_path / "libmedcl_kernels.so")
    code = "import medcl_kernels; from medcl_kernels import env; print(env.load_library())"
    reason = in_fresh_process(code, MEDCL_LIBRARY=missing)
    assert missing in reason
    assert "make build" in reason and "pip install -e . --no-build-isolation" in reason


def test_first_use_without_the_library(tmp_path: Path) -> None:
    """impl="cpu" raises with the reason; impl="auto" still computes, by the reference."""
    code = (
        "import torch, medcl_kernels as m\n"
        "x = torch.eye(4)\n"
        "print(float(m.info_nce(x, x)))\n"
        "try: m.info_nce(x, x, impl='cpu')\n"
        "except (RuntimeError, ValueError) as error: print(error)"
    )
    value, message = in_fresh_process(code, MEDCL_LIBRARY=str(tmp_path / "no.so")).split("\n", 1)
    assert float(value) == pytest.approx(math.log1p(3 * math.exp(-10)), abs=2e-6)
    assert "make build" in message


def test_broken_library_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    broken = tmp_path / "libmedcl_kernels.so"
    broken.write_bytes(b"not a shared library")
    code = "from medcl_kernels import env; print(env.load_library())"
    reason = in_fresh_process(code, MEDCL_LIBRARY=str(broken))
    assert f"{broken} does not load into torch" in reason and "make build" in reason


def test_torch_that_is_too_old_is_named(tmp_path: Path) -> None:
    code = (
        "import torch; torch.__version__ = '2.9.1+cpu'\n"
        "from medcl_kernels import env; print(env.load_library())"
    )
    reason = in_fresh_process(code)
    assert reason.startswith("torch 2.9.1+cpu is too old") and "torch >= 2.10" in reason


def test_settings_reach_the_library() -> None:
    code = "from medcl_kernels import env; i = env.build_info(); print(i['cpu'], i['gemm'])"
    forced = in_fresh_process(code, MEDCL_CPU_CAPABILITY="base", MEDCL_GEMM="portable")
    assert forced == "base portable"


def test_wgmma_is_off_unless_asked_for() -> None:
    """And a library without CUDA kernels has none."""
    code = (
        "from medcl_kernels import env; i = env.build_info()\n"
        "print(i['cuda_archs'] != 'none', i.get('cuda_wgmma'), env.use_wgmma(False))"
    )
    for wanted in ("0", "1"):
        has, state, before = in_fresh_process(code, MEDCL_CUDA_WGMMA=wanted).split()
        on = has == "True" and wanted == "1"
        assert before == str(on)
        assert state == (("on" if on else "off") if has == "True" else "None")


def test_wrong_setting_disables_the_library_with_a_reason() -> None:
    code = "from medcl_kernels import env; print(env.load_library())"
    reason = in_fresh_process(code, MEDCL_GEMM="mkl")
    assert reason == "MEDCL_GEMM='mkl': expected one of blas, portable, or unset"
