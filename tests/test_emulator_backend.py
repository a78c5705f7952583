"""impl="cuda" from the losses down to the kernels, without a device: what `make gpu-check` asks of
the backend, on the emulator (emulator_backend.py), in a process of its own. Between Python and the
kernels lies the glue to torch, which the calls of test_emulator.py do not pass.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import host_build
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        host_build.missing_tools() is not None, reason=str(host_build.missing_tools())
    ),
]


def run_emulated(repo, *arguments: str) -> str:
    """pytest's output in a process whose backend "cuda" runs on CPU tensors."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    path = [str(repo / "tests"), os.environ.get("PYTHONPATH", "")]
    command += ["-p", "emulator_backend", "-m", "not gpu", *arguments]
    done = subprocess.run(
        command,
        cwd=repo,
        env={**kept, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10000:]
    return done.stdout


FILES = {"test_gpu_ops.py": 80, "test_gpu_behaviour.py": 60}


@pytest.mark.parametrize(("file", "least"), FILES.items())
def test_the_tests_for_a_device_pass_on_the_emulator(file, least, repo):
    output = run_emulated(repo, f"tests/{file}", "-k", "cuda")
    assert int(re.search(r"(\d+) passed", output)[1]) >= least
    reasons = re.findall(r"SKIPPED .*?: (.*)", output)
    assert all("there are no features to round" in reason for reason in reasons), reasons
