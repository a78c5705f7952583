"""Every CUDA kernel, its body unchanged, on the host emulator.

The emulator fills shared memory and every result with NaN before a block runs, lets asynchronous
copies land only when they are waited for, runs threads in three orders, stops at a race, a
misaligned or outside access or a divergent barrier, and counts modelled bank conflicts.
"""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import emulator_cases as cases
import emulator_filter_cases as filter_cases
import emulator_mutants as mutants
import emulator_patch_cases as patches
import emulator_wgmma_cases as wgmma
import host_build
import pytest
import torch
from planted_bugs import CONTROL, MUTANTS

pytestmark = pytest.mark.skipif(
    host_build.missing_tools() is not None, reason=str(host_build.missing_tools())
)
SCHEDULES = (("forward", "late", 0), ("reverse", "eager", 0), ("random", "late", 7))
ALL = [
    (operation, product, shape)
    for operation in cases.OPERATIONS
    for product in cases.DTYPES
    for shape in cases.selected(product, operation)
]
PARAMETERS = [
    pytest.param(*case, SCHEDULES[i % 3], id=f"{case[0]}-{case[1]}-{case[2].name}")
    for i, case in enumerate(ALL)
]
# One of each kernel, with two tiles of every side, for what is repeated; of bf16 in each of the
# four tiles: rows of 64, 128 and 256 channels whole, wider ones in slabs. tf32 streams from 129 on.
CORE = [
    (operation, product, shape)
    for operation, product, shape in ALL
    if (operation.startswith("pair") and shape.dim in (64, 256) and product in ("bf16", "tf32"))
    or (operation in cases.PAIRS and shape.dim in (128, 300) and product == "bf16")
    or (operation == "pair_argmax" and shape.dim in (96, 300) and product == "bf16")
    or (operation == "pair_logsumexp" and shape.dim == 64 and product in ("fp16", "ieee"))
    or (operation.startswith("positive") and shape.dim == 3 and product == "ieee")
]


def run(call: cases.Call, schedule: tuple[str, str, int]) -> dict[str, torch.Tensor]:
    """Results of a call, by name; no modelled bank conflict may have come up."""
    host = host_build.host_module()

    def bits(x: torch.Tensor) -> object:
        return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()

    host.configure(*schedule)
    inputs = {name: bits(x) for name, x in call.inputs.items()}
    outputs = host.run(call.operation, inputs, call.options)
    statistics = host.statistics()
    assert statistics["blocks"] > 0
    assert statistics["bank_conflicts"] == 0
    engine = call.operation.startswith("pair") and "anchor" not in call.inputs  # not by a list
    tensor_cores = engine and call.options["product"] != "ieee"
    warpgroups = call.options.get("wgmma") == "1"
    assert (statistics["mma"] > 0) == (tensor_cores and not warpgroups)
    assert (statistics["wgmma"] > 0) == warpgroups
    results = {name: torch.from_numpy(x) for name, x in outputs.items()}
    results = {
        name: x.view(torch.bfloat16) if x.dtype == torch.uint16 else x
        for name, x in results.items()
    }
    for name, x in call.inputs.items():
        if f"d_{name}" in results:
            assert results[f"d_{name}"].stride() == x.stride(), "not in the layout of the input"
    return results


def check(call: cases.Call, results: dict[str, torch.Tensor]) -> None:
    """Every result within the tolerance of its call."""
    for name, want in call.expected.items():
        got, want = results[name].double(), want.double()
        assert got.shape == want.shape, name
        off = torch.where(got == want, 0.0, (got - want).abs()).nan_to_num(torch.inf)
        off = off.max().item() if off.numel() else 0.0
        assert off <= call.tolerance[name], f"{name}: off by {off}, {call.tolerance[name]} allowed"


@pytest.mark.parametrize(("operation", "product", "shape", "schedule"), PARAMETERS)
def test_kernel_agrees_with_the_reference(operation, product, shape, schedule):
    results: dict[str, torch.Tensor] = {}
    for call in cases.calls(operation, shape, product):
        if "lse" in call.inputs:
            call.inputs["lse"] = results["value"]  # the backward pass gets what the forward gave
        results = run(call, schedule)
        check(call, results)


@pytest.mark.parametrize(
    ("operation", "product", "shape"), CORE, ids=lambda x: getattr(x, "name", x)
)
def test_the_order_of_threads_changes_no_bit(operation, product, shape):
    """Nor does the order in which labels enter the hash table."""
    for call in cases.calls(operation, shape, product):
        first, *others = (run(call, schedule) for schedule in SCHEDULES)
        for other in others:
            for name, x in first.items():
                assert torch.equal(x.nan_to_num(), other[name].nan_to_num()), name


def test_every_instruction_wrapper_does_what_it_says():
    wrong = host_build.host_module().wrong_fragments()
    assert set(wrong) >= {"mma_bf16", "mma_fp16", "mma_tf32", "ldmatrix", "cp_async and ld.shared"}
    assert set(wrong) >= {"wgmma_bf16", "wgmma_fp16", "wgmma without swizzle"}
    assert not any(wrong.values()), wrong


def test_ties_go_to_the_smallest_index():
    """Equal keys in different tiles, warps and lanes."""
    for product, dtype in cases.DTYPES.items():
        key = torch.randn(1, 200, 24).to(dtype)
        query = key[:, torch.arange(70) % 50] + 0
        key[:, 50:100], key[:, 100:150], key[:, 150:] = key[:, :50], key[:, :50], key[:, :50]
        sides = {"query": query.transpose(1, 2), "key": key.transpose(1, 2)}
        call = cases.Call("ties", "pair_argmax", sides, {"product": product}, {}, {})
        index = run(call, SCHEDULES[2])["index"]
        assert index.flatten().tolist() == [i % 50 for i in range(70)]


@pytest.mark.parametrize("product", ["bf16", "ieee"])
def test_the_log_sum_exp_is_never_below_a_positive(product):
    """Both see rows that are rounded alike, else the loss could fall below zero."""
    query = torch.randn(1, 33, 48).to(cases.DTYPES[product])
    index = torch.arange(33).reshape(1, 33)
    options = {"product": product, "temperature": "0.05"}
    sides = {"query": query.transpose(1, 2)[:, :, :33], "key": query.transpose(1, 2)[:, :, :33]}
    lse = cases.Call("", "pair_logsumexp", sides, {**options, "kinds": "all"}, {}, {})
    at = cases.Call("", "positive_at", {**sides, "positives": index}, options, {}, {})
    value = run(lse, SCHEDULES[0])["value"].flatten() - run(at, SCHEDULES[0])["value"].flatten()
    assert value.min() > -2e-6


def test_an_index_past_the_end_reads_nothing_and_does_not_look_like_a_result():
    (call, backward) = cases.calls("positive_at", cases.SHAPES["positive_at"][0], "ieee")
    for one in (call, backward):
        one.inputs["positives"][0, 0] = 10**12
    assert run(call, SCHEDULES[0])["value"][0, 0].isnan()
    assert run(backward, SCHEDULES[0])["d_query"][0, :, 0].isnan().all()


def replay(folder, path, *arguments, **environment):
    """Return code and output of the stand-alone driver."""
    done = subprocess.run(
        [str(folder / "replay"), str(path), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Files of calls for the driver: one of each kernel, fewer for TSan, and those of a mutant."""
    folder = tmp_path_factory.mktemp("calls")
    core = [call for case in CORE for call in cases.calls(case[0], case[2], case[1])]
    few = [call for call in core if "D64" in call.name or "D3-" in call.name]
    few = [call for call in few if "key" not in call.name or "bf16" in call.name]
    others = [call for one in patches.REPEATED if one[2] != "fp16" for call in patches.calls(*one)]
    others += filter_cases.few_calls() + [wgmma.call(*one) for one in wgmma.REPEATED]
    cases.write(folder / "core", [*core, *others])
    cases.write(folder / "few", [*few, *(c for c in others if "tf32" not in c.name)])
    cases.write(folder / "trimmed", mutants.trimmed_calls())
    return folder


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers_find_nothing(recorded):
    folder = host_build.build(("replay",), "address")
    for order in (("forward", "late", "0"), ("random", "eager", "3")):
        code, output = replay(folder, recorded / "core", *order, ASAN_OPTIONS="detect_leaks=0")
        assert code == 0 and " 0 wrong" in output, output[-3000:]


@pytest.mark.slow
def test_thread_sanitizer_finds_no_race_and_sees_planted_ones(recorded):
    folder = host_build.build(("replay", "race"), "thread")
    options = {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    for order in (("reverse", "late", "0"), ("random", "late", "1")):
        code, output = replay(folder, recorded / "few", *order, **options)
        assert code == 0 and " 0 wrong" in output, output[-3000:]
    for kind in ("none", "warp", "block", "shuffle", "reuse", "global"):
        done = subprocess.run(
            [str(folder / "race"), kind, "reverse"],
            env={**os.environ, **options},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode == 66) == (kind != "none"), (kind, done.stdout + done.stderr)


def test_every_planted_bug_still_fits_the_sources(tmp_path):
    """Those too that only `make mutants` tries."""
    copy = mutants.sources(tmp_path)
    for one in MUTANTS:
        original = (copy / one.file).read_text()
        assert mutants.planted(one, original) != original, one.name


@pytest.mark.slow
def test_planted_bugs_are_noticed(recorded, tmp_path):
    """A part of the table; `make mutants` runs all of it in every mode."""
    chosen = [one for one in MUTANTS if one.quick]
    assert len(chosen) >= 10

    def noticed(mutant):
        return mutant, mutants.judge(mutant, recorded / "trimmed", tmp_path, mutants.QUICK_MODES)

    with ThreadPoolExecutor(2) as pool:
        for mutant, verdicts in pool.map(noticed, (CONTROL, *chosen)):
            assert any(verdicts.values()) == (mutant is not CONTROL), (mutant, verdicts)


def test_the_sources_that_the_emulator_cannot_see_are_few():
    """What only a GPU runs: the device query, and the glue to torch."""
    compiled = (host_build.ROOT / "csrc/host/CMakeLists.txt").read_text()
    listed = re.search(r"set\(kernels ([\w\s]+)\)", compiled)
    assert listed is not None
    every = {path.stem for path in (host_build.ROOT / "csrc/cuda").glob("*.cu")}
    assert every - set(listed[1].split()) == {"device"}
