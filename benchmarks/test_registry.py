"""Every timed case of every operation and loss of the registry, with pytest-benchmark.

    OMP_NUM_THREADS=1 python -m pytest benchmarks -k "info_nce and 1024x64" --benchmark-autosave

Guards one machine against regressions (`--benchmark-compare-fail=min:10%`). Contenders follow one
another here; comparisons between them are made in turns by `python -m benchmarks.run`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.contenders import Entry, rows_of, run_once
from benchmarks.gate import Gate
from benchmarks.peers import PEERS
from medcl_kernels import dispatch
from medcl_kernels.registry import SPECS

LARGEST_QUADRATIC = 1024  # rows; beyond, N x N contenders take seconds and belong into run.py


def _entries() -> list[Any]:
    found = []
    for spec in SPECS:
        for case in spec.benchmarks:
            names = [name for name in dispatch.available() if name not in ("triton", "cuda")]
            if spec.kind == "loss":
                names += [name for name, peer in PEERS.items() if spec.name in peer.functions]
            for name in names:
                entry = Entry(name, name, spec.name, case, case.dtypes[0])
                if entry.quadratic and rows_of(case)[0] > LARGEST_QUADRATIC:
                    continue
                if name == "monai" or (name == "pml" and spec.name == "info_nce"):
                    # no positives elsewhere; N x N x N numbers: run.py times both at a fitting size
                    continue
                mode = "" if case.key_shape is None else "key-"
                found.append(pytest.param(entry, id=f"{spec.name}-{mode}{case.name}-{name}"))
    return found


@pytest.fixture(scope="module")
def gate() -> Gate:
    """One for all entries, so that contenders of one input share its truth."""
    return Gate()


@pytest.mark.parametrize("entry", _entries())
def test_step(entry: Entry, gate: Gate, benchmark: Any) -> None:
    """A step is right, then timed."""
    reason = entry.unavailable()
    if reason is not None:
        pytest.skip(f"{entry.contender}: {reason}")
    try:
        verdict = gate.judge(entry)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        pytest.skip(f"out of memory: {error}")
    assert verdict.passed, f"FAIL: {verdict.reason}"
    benchmark.group = f"{entry.op} {entry.case.name} {entry.dtype}"
    benchmark.extra_info.update(
        impl=entry.contender,
        shape=entry.case.shape,
        threads=torch.get_num_threads(),
        flops_needed=entry.spec.flops(entry.case),
        error=verdict.error,
        judged_on=verdict.judged_on or entry.case.name,
    )
    function, sample = entry.function(), entry.sample()
    benchmark(run_once, function, sample)
