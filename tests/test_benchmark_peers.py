"""Peers compute the package's losses, and the gate lets nothing wrong through."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_contests import INFO_NCE, SUPCON, TINY, entry, run_tiny

from benchmarks import catalogue, contenders
from benchmarks.contenders import Entry
from benchmarks.gate import TOLERANCE, Gate, judged_case, truth
from benchmarks.peers import PEERS, eager


@pytest.mark.parametrize(
    ("name", "op"),
    [
        pytest.param(name, op, marks=[pytest.mark.slow] if peer.compiles else [], id=f"{name}-{op}")
        for name, peer in PEERS.items()
        for op in peer.functions
        if name != "monai"
    ],
)
def test_every_peer_computes_the_loss_of_the_package(name: str, op: str) -> None:
    one = entry(name, op) if op in TINY else Entry(name, name, op, catalogue.flat(op, 64, 8))
    if one.unavailable():
        pytest.skip(f"{name}: {one.unavailable()}")
    verdict = Gate().judge(one)
    assert verdict.passed, verdict.reason
    assert verdict.judged_on == ""


@pytest.mark.parametrize("name", ["cpu", "eager", "monai", "pml"])
def test_both_libraries_agree_on_symmetric_intra_view_info_nce(name: str) -> None:
    case = replace(TINY[INFO_NCE], labels="none")
    case = catalogue.with_options(case, "nt_xent", symmetric=True, intra_view=True)
    one = Entry(name, name, INFO_NCE, case)
    if one.unavailable():
        pytest.skip(f"{name}: {one.unavailable()}")
    verdict = Gate().judge(one)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize(
    ("name", "op", "changes"),
    [
        ("eager", SUPCON, {"form": "in"}),
        ("eager", SUPCON, {"form": "pixel"}),
        ("eager", SUPCON, {"maps": 3}),
        ("eager", SUPCON, {"pairs": "image"}),
        ("eager", INFO_NCE, {"pairs": "image"}),
        ("eager", INFO_NCE, {"pairs": "batch"}),
        ("chunk", SUPCON, {"pairs": "batch"}),
        ("lce", INFO_NCE, {"pairs": "batch"}),
        ("eager", "filtered_contrastive", {"keep": 0.1}),
    ],
)
def test_peers_compute_the_variants_they_are_timed_on(
    name: str, op: str, changes: dict[str, Any]
) -> None:
    case = replace(TINY[op], maps=changes.pop("maps", 1))
    if "pairs" in changes:
        shape = (3, 8, 4, 5)
        case = replace(case, shape=shape, key_shape=None if op == SUPCON else shape, **changes)
    elif changes:
        case = catalogue.with_options(case, "variant", **changes)
    one = Entry(name, name, op, case)
    if one.unavailable():
        pytest.skip(f"{name}: {one.unavailable()}")
    verdict = Gate().judge(one)
    assert verdict.passed, verdict.reason


def test_a_peer_refuses_a_loss_that_it_does_not_have() -> None:
    with pytest.raises(KeyError, match="lce does not compute supervised_contrastive"):
        PEERS["lce"].resolve(SUPCON)
    with pytest.raises(ValueError, match="one set of unit rows"):
        PEERS["chunk"].resolve(SUPCON)(
            torch.randn(4, 3), torch.zeros(4), temperature=1.0, form="in"
        )


@pytest.mark.parametrize("op", [SUPCON, INFO_NCE])
def test_the_truth_by_blocks_is_the_reference(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = entry("cpu", op, case=catalogue.flat(op, 700, 5))
    by_reference = truth(one)
    monkeypatch.setattr("benchmarks.gate.BLOCKS_FROM", 1)
    by_blocks = truth(one)
    assert torch.allclose(by_blocks[0][0], by_reference[0][0], rtol=1e-12)
    for name, gradient in by_reference[1].items():
        assert torch.allclose(by_blocks[1][name], gradient, rtol=1e-9, atol=1e-14), name


def test_a_wrong_contender_fails_and_has_no_time(wrong: str) -> None:
    rows = run_tiny("class-sums", wrong)
    assert rows["class-sums"].status == "ok" and rows["class-sums"].wall_min_ms > 0
    assert rows[wrong].status == "FAIL" and "off by" in rows[wrong].reason
    assert rows[wrong].wall_min_ms is None and rows[wrong].repeats == 0


def test_a_missing_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(features: Any, labels: Any, **options: Any) -> torch.Tensor:
        value = eager.class_sums(features.detach(), labels, **options)
        return value + 0 * features.sum()

    monkeypatch.setitem(contenders.EXTRA, "zero-gradient", loss)
    row = run_tiny("zero-gradient")["zero-gradient"]
    assert row.status == "FAIL" and row.value_error < 1e-5 and row.error == pytest.approx(1.0)


def test_a_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(features: Any, labels: Any, **options: Any) -> torch.Tensor:
        return eager.class_sums(features, labels, **options) * float("nan")

    monkeypatch.setitem(contenders.EXTRA, "nan", loss)
    assert run_tiny("nan")["nan"].status == "FAIL"


def test_large_operations_are_judged_on_fewer_rows() -> None:
    big = catalogue.timed(INFO_NCE, 8192, 64)
    assert judged_case(catalogue.spec(INFO_NCE), big) == big  # by blocks
    cut = judged_case(catalogue.spec("info_nce_sum"), big)
    assert cut.shape == (2048, 64) and cut.key_shape == (2048, 64)
    assert cut.name == "8192x64_cut"


def test_errors_are_relative_to_the_norm() -> None:
    from benchmarks.gate import compare as judge

    true = torch.tensor([3.0, 4.0], dtype=torch.float64)
    ours = torch.tensor([3.0, 4.05])
    verdict = judge((ours,), {"x": ours}, (true,), {"x": true}, TOLERANCE[torch.float32])
    assert not verdict.passed and math.isclose(verdict.error, 0.01, rel_tol=1e-4)
    infinite = torch.tensor([-math.inf, 4.0])
    assert judge((infinite,), {}, (infinite.double(),), {}, TOLERANCE[torch.float32]).passed
