"""The other ways through the C++ kernels: narrower instruction sets, the portable matrix product.

Which one runs is fixed when the library is loaded, so each forced path runs a part of the suite in
a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROBE = """
from medcl_kernels import env
reason = env.load_library()
info = {} if reason else env.build_info()
print(reason or f"loaded {info['cpu']} {info['gemm']}")
"""
# Ragged tiles, many channels, every layout's packing, both temperatures' shifts, 16-bit rows.
PART = "ragged or channels_256 or sliced or key_transposed or cold or bfloat16 or poisoned_batch"


def process(arguments, repo, **settings):
    environment = {**os.environ, **settings, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=repo,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "gemm"),
    # every instruction set and both products; what the machine chooses is what all other tests run
    [("base", "portable"), ("avx2", "blas"), ("avx512", "the other")],
)
def test_a_forced_path_passes_the_same_tests(capability, gemm, repo):
    settings = {"MEDCL_CPU_CAPABILITY": capability}
    if gemm == "the other":
        usual = process(["-c", PROBE], repo, **settings).stdout
        gemm = "blas" if usual.split()[-1:] == ["portable"] else "portable"
    settings["MEDCL_GEMM"] = gemm
    probe = process(["-c", PROBE], repo, **settings)
    assert probe.returncode == 0, probe.stderr
    if not probe.stdout.startswith("loaded"):
        assert f"MEDCL_CPU_CAPABILITY={capability}" in probe.stdout  # the reason names the request
        pytest.skip(probe.stdout.strip())
    assert probe.stdout.split() == ["loaded", capability, gemm]
    arguments = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    arguments += ["tests/test_ops.py", "tests/test_kept_tiles.py"]
    arguments += ["-k", f"exact_as_plain_torch and cpu and float and ({PART}) or kept_tiles"]
    result = process(arguments, repo, **settings)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


def test_an_unknown_value_is_refused_with_the_choices(repo):
    result = process(["-c", PROBE], repo, MEDCL_CPU_CAPABILITY="mmx")
    assert "mmx" in result.stdout
    assert "avx512" in result.stdout
