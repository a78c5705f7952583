"""The CUDA part of the build, as far as a machine without a GPU can judge it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import cuda_resources as resources
import pytest
import torch

from medcl_kernels import dispatch, env
from medcl_kernels.ops import registration

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("kept_build")
BUILD = Path(os.environ.get("MEDCL_BUILD_DIR") or ROOT / "build" / "cmake")


# Spills that stay, stores and loads together, in bytes. Here ptxas stops at 80 and 128 registers by
# itself; kernels without tensor cores, bound by their multiply-adds.
SPILLS = {("sm_80", "PositiveLog ieee 128"): 8}
for _arch in ("sm_100f", "sm_120f"):
    SPILLS[_arch, "BoundedSoftmaxGradient ieee 64 streamed"] = 60
# Rows that stream in slabs keep their limits and counts beside the whole product of a tile; two
# blocks, one of which multiplies while the other one counts, are worth a few bytes.
for _product in ("bf16 128", "fp16 128", "tf32 64", "ieee 64"):
    SPILLS["sm_80", f"PairSelect {_product} streamed"] = 48
    SPILLS["sm_90a", f"PairSelect {_product} streamed"] = 88
    SPILLS["sm_120f", f"PairSelect {_product} streamed"] = 52  # of 255 registers
# Warpgroups that own 64 rows hold 64 scores a thread, and two blocks leave 128 registers: one
# multiplies while the other counts. Labels of columns are read ahead, once per tile.
for _product in ("bf16", "fp16"):
    SPILLS["sm_90a", f"LogSumExp {_product} 128 wgmma"] = 32
    for _width in (64, 128):
        SPILLS["sm_90a", f"PositiveLog {_product} {_width} wgmma"] = 336


def archs() -> str:
    assert env.load_library() is None
    return env.build_info().get("cuda_archs", "none")


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


@needs_nvcc
def test_the_library_of_this_machine_has_cuda_kernels():
    """Where nvcc is found, the build must have used it."""
    assert archs() != "none", "nvcc is here, but the library was built without CUDA kernels"


@pytest.fixture
def built() -> None:
    if archs() == "none":
        pytest.skip("the library was built without nvcc")


def test_every_gpu_operation_has_a_cuda_kernel(built):
    """Registered without a device and under a CPU build of torch, too: one wheel serves both."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    record = next(one for one in dispatch.BACKENDS if one.name == "cuda")
    assert record.dtypes == dispatch.FLOATS[1:]
    for name in record.kernels:
        assert has(f"medcl::{name}", "CUDA"), name
        if f"medcl::{name}_backward" in registration.NAMES:
            assert has(f"medcl::{name}_backward", "CUDA"), name


def test_torch_symbols_are_those_of_the_stable_interface(built):
    """Undefined symbols of torch are plain C; the one of libtorch_cuda is weak."""
    command = ["nm", "-D", "--undefined-only", str(env.library_path())]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = dict(re.findall(r"([Uw]) (\S+)", line)[0][::-1] for line in out.splitlines())
    torch_symbols = {name for name in symbols if "torch" in name or "c10" in name}
    assert torch_symbols and not {name for name in torch_symbols if name.startswith("_Z")}
    assert symbols["aoti_torch_get_current_cuda_stream"] == "w"
    assert not [name for name in symbols if name.startswith("cuda")], "the runtime is static"


def test_float32_products_follow_torch(built):
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert torch.ops.medcl.float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def measured(built) -> dict:
    found = resources.collect(BUILD)
    if not found:
        pytest.skip(f"{BUILD} holds no compiler logs: the library was built elsewhere")
    return found


def test_registers_and_spills_are_those_of_the_committed_table(measured):
    table = json.loads(resources.TABLE.read_text())
    common = measured.keys() & table["kernels"].keys()
    if not common:
        pytest.skip(f"built for {', '.join(measured)}, the table has {', '.join(table['kernels'])}")
    same_compiler = resources.nvcc_release() == table["nvcc"]
    for arch in common:
        want, got = table["kernels"][arch], measured[arch]
        assert got.keys() == want.keys(), f"{arch}: other kernels than in {resources.TABLE.name}"
        for name, use in got.items():
            assert use["spill_bytes"] <= want[name]["spill_bytes"], f"{arch} {name} spills"
            if same_compiler:
                assert use == want[name], f"{arch} {name}: see tests/cuda_resources.py"


def test_wgmma_products_stay_asynchronous(measured):
    """ptxas says so where it had to put a wait behind each of them."""
    for log in BUILD.rglob("*.cu.o.log"):
        assert "serialized" not in log.read_text(), log


def test_no_other_kernel_spills_and_shared_memory_fits_every_chip():
    table = json.loads(resources.TABLE.read_text())["kernels"]
    assert table.keys() == set(resources.COMMITTED)
    sides = (ROOT / "csrc/cuda/sides.cuh").read_text()
    assert f"kSelectionsAtOnce = {resources.SELECTIONS};" in sides
    for arch, kernels in table.items():
        for name, use in kernels.items():
            assert use["spill_bytes"] <= SPILLS.get((arch, name), 0), f"{arch} {name}"
            assert use["registers"] <= 255
            chips = [arch] if name.endswith(" wgmma") else resources.LIMITS
            most = min(resources.LIMITS[chip] for chip in chips)
            assert use["shared_bytes"] <= most, f"{arch} {name}"
