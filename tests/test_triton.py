"""Runs the tests of tests/interpreted with Triton's interpreter, which has to be switched on before
Triton is imported: in a process of its own, so that no other test notices."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from own_process import pytest_output

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


def test_triton_is_installed():
    """`make venv` does it; skipped tests below must not look like success."""
    assert find_spec("triton") is not None or sys.platform != "linux"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_pass_under_the_interpreter(file, repo):
    output = pytest_output(repo, str(file), TRITON_INTERPRET="1")
    assert int(re.search(r"(\d+) passed", output)[1]) > 10
    assert "skipped" not in output, output[-2000:]
