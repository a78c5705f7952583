"""Runs the tests of tests/interpreted with Triton's interpreter, which has to be switched on before
Triton is imported: in a process of its own, so that no other test notices."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


def test_triton_is_installed():
    """`make venv` does it; skipped tests below must not look like success."""
    assert find_spec("triton") is not None or sys.platform != "linux"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_pass_under_the_interpreter(file, repo):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=repo,
        env={**kept, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 10
    assert "skipped" not in done.stdout, done.stdout[-2000:]
