"""From an operation to the driver: what a launch of a Triton kernel carries."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

COMPILER = os.environ.get("CC", "gcc")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="Triton builds its launcher with $CC")
def test_every_kernel_is_started_with_what_its_operation_gave(repo):
    """pretended_driver.py, in a process of its own, whose libcuda.so.1 is no driver."""
    path = [str(repo / "tests"), str(repo), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(repo / "tests" / "pretended_driver.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert int(re.search(r"(\d+) kernels, \d+ launches with Triton", done.stdout)[1]) >= 15
