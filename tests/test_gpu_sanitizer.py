"""What only the device's own tools see: accesses out of bounds and races (compute-sanitizer), and
whether tensor-core fragments lie where kernels and emulator take them to lie.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_targets import TARGETS

import medcl_kernels
from medcl_kernels import dispatch
from medcl_kernels.registry import SPECS

TESTS = Path(__file__).resolve().parent
PTX = TESTS.parent / "csrc" / "cuda" / "ptx.cuh"
LIMIT = 170  # seconds for one program
CLEAN = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards"}
FRAGMENTS = ("mma_bf16", "mma_fp16", "mma_tf32", "ldmatrix", "cp_async")


def cuda_tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit: on PATH, or in the toolkit's usual places."""
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    places = [name, home / "bin" / name, home / name / name, home / "extras" / name / name]
    return next((path for place in places if (path := shutil.which(str(place)))), None)


def stepper(impl: str, device: str, cases: str, *before: str, **variables: str) -> tuple[int, str]:
    """Exit code and output of sanitized_step.py, under another program if one is given."""
    command = [*before, sys.executable, str(TESTS / "sanitized_step.py"), impl, device, cases]
    # one allocation per tensor: a cached block would hide what is read beyond its end
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1", **variables}
    # the package that is tested here, be it the checkout's or a wheel's
    package = str(Path(medcl_kernels.__file__).parents[1])
    variables["PYTHONPATH"] = os.pathsep.join(
        path for path in (package, os.environ.get("PYTHONPATH")) if path
    )
    done = subprocess.run(
        command,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("cases", ["several", "few"])
def test_the_steps_that_the_sanitizer_watches_run(cases: str) -> None:
    """Of every operation at least one."""
    code, output = stepper("cpu", "cpu", cases)
    assert code == 0, output
    for one in SPECS:
        if one.kind == "op":
            assert f"{one.name}: done" in output, f"{one.name} has no case"


def judge(tool: str, code: int, output: str) -> str:
    """What compute-sanitizer found: "clean", "cannot" where it could not watch, else "found"."""
    if code == 0 and re.search(rf"^=+ {CLEAN[tool]}\b", output, re.MULTILINE):
        return "clean"
    summary = re.search(r"^=+ \w+ SUMMARY:", output, re.MULTILINE)
    refused = re.search(r"^=+ .*(not supported|Unable to)", output, re.MULTILINE)
    return "cannot" if refused and not summary else "found"


RAN = "========= COMPUTE-SANITIZER\npair_logsumexp: done\n12 steps\n"
HAZARDS = "========= RACECHECK SUMMARY: {0} hazards displayed ({0} errors, 0 warnings)\n"
UNWATCHED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to\n"


@pytest.mark.parametrize(
    ("tool", "code", "output", "verdict"),
    [
        ("memcheck", 0, RAN + "========= ERROR SUMMARY: 0 errors\n", "clean"),
        ("memcheck", 9, RAN + "========= ERROR SUMMARY: 3 errors\n", "found"),
        ("memcheck", 9, RAN + "========= ERROR SUMMARY: 10 errors\n", "found"),
        ("memcheck", 3, "0 steps\n========= ERROR SUMMARY: 0 errors\n", "found"),
        ("memcheck", 0, RAN, "found"),
        ("racecheck", 0, RAN + HAZARDS.format(0), "clean"),
        ("racecheck", 0, RAN + HAZARDS.format(10), "found"),
        ("racecheck", 9, RAN + HAZARDS.format(10), "found"),
        ("racecheck", 9, RAN + HAZARDS.format(0), "found"),
        ("racecheck", 1, "Traceback: the operator is not supported\n" + HAZARDS.format(0), "found"),
        ("racecheck", 1, "RuntimeError: Unable to find a stream, not supported\n", "found"),
        ("racecheck", -11, "========= COMPUTE-SANITIZER\n", "found"),
        ("racecheck", 0, RAN + "========= ERROR SUMMARY: 0 errors\n", "found"),
        ("memcheck", 1, UNWATCHED, "cannot"),
        ("memcheck", 9, UNWATCHED + "========= ERROR SUMMARY: 1 error\n", "found"),
    ],
)
def test_the_output_of_the_sanitizer_is_judged_strictly(
    tool: str, code: int, output: str, verdict: str
) -> None:
    assert judge(tool, code, output) == verdict


@pytest.mark.parametrize("tool", CLEAN)
@pytest.mark.parametrize(("impl", "device"), TARGETS[1:])
def test_compute_sanitizer_finds_nothing(impl: str, device: str, tool: str) -> None:
    reason = dispatch.available()[impl]
    if reason is not None:
        pytest.skip(f"{impl}: {reason}")
    sanitizer = cuda_tool("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in the CUDA toolkit")
    cases = "few" if tool == "racecheck" else "several"  # it takes several times as long
    code, output = stepper(impl, device, cases, sanitizer, "--tool", tool, "--error-exitcode", "9")
    verdict = judge(tool, code, output)
    if verdict == "cannot":
        pytest.skip(f"compute-sanitizer cannot watch this device: {output[-300:]}")
    assert verdict == "clean", output[-3000:]


@pytest.fixture(scope="module")
def fragments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """device_fragments.cu, compiled."""
    nvcc = cuda_tool("nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    if not PTX.is_file():
        pytest.skip("there is no csrc/cuda/ptx.cuh in this version")
    program = tmp_path_factory.mktemp("fragments") / "fragments"
    # PTX: whatever the device is; wgmma is for one of them only
    command = [nvcc, "-std=c++17", "-gencode=arch=compute_80,code=compute_80"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", "-I"]
    command += [str(PTX.parents[1]), str(TESTS / "device_fragments.cu"), "-o", str(program)]
    command += ["--extended-lambda", "--expt-relaxed-constexpr"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def run_fragments(program: Path) -> tuple[int, str]:
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_the_program_for_fragments_says_so_where_it_cannot_run(fragments: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    code, output = run_fragments(fragments)
    assert code == 2 and output.strip()


@pytest.mark.gpu
def test_fragments_lie_on_the_device_where_the_kernels_take_them_to_lie(fragments: Path) -> None:
    code, output = run_fragments(fragments)
    assert code == 0, output
    hopper = torch.cuda.get_device_capability(0) == (9, 0)
    names = (*FRAGMENTS, "wgmma_bf16", "wgmma_fp16") if hopper else FRAGMENTS
    assert dict(line.split() for line in output.splitlines()) == dict.fromkeys(names, "0")
