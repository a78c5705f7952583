"""impl="cuda" from the losses down to the kernels, without a device: what `make gpu-check` asks of
the backend, on the emulator (emulator_backend.py), in a process of its own. Between Python and the
kernels lies the glue to torch, which the calls of test_emulator.py do not pass.
"""

from __future__ import annotations

import re

import host_build
import pytest
from own_process import pytest_output

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        host_build.missing_tools() is not None, reason=str(host_build.missing_tools())
    ),
]


FILES = {"test_gpu_ops.py": 80, "test_gpu_behaviour.py": 60}


@pytest.mark.parametrize(("file", "least"), FILES.items())
def test_the_tests_for_a_device_pass_on_the_emulator(file, least, repo):
    plugin = ("-p", "emulator_backend", "-m", "not gpu")
    output = pytest_output(repo, *plugin, f"tests/{file}", "-k", "cuda")
    assert int(re.search(r"(\d+) passed", output)[1]) >= least
    reasons = re.findall(r"SKIPPED .*?: (.*)", output)
    assert all("there are no features to round" in reason for reason in reasons), reasons
