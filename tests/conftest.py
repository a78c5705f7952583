"""Shared by all tests: the training package on the path, seeds, and where the data is."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
for folder in (REPO / "python", REPO / "tests", REPO):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# Files of minutes, longest first: of several processes that take whole files, none is left with
# one at the end.
LONG = (
    "test_emulator",
    "test_emulator_backend",
    "test_triton_launch",
    "test_train_runs",
    "test_triton_aot",
    "test_triton",
    "test_build",
    "test_train_resume",
    "test_ops",
    "test_compile",
    "test_benchmark_peers",
    "test_emulator_filter",
    "test_train_pdcr",
    "test_train_gcl",
)

# started by test_triton.py, in a process where Triton interprets its kernels
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, in whatever order they run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _device_survives(request: pytest.FixtureRequest) -> Iterator[None]:
    """Waits for the kernels of a test marked gpu, so that their errors are that test's; after one
    that leaves the device unusable nothing else can be learnt in this process.
    """
    yield
    if request.node.get_closest_marker("gpu") is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        request.session.shouldstop = f"the CUDA device was lost in {request.node.name}"
        raise


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> str:
    """A contender with another temperature: plausible, smooth, and wrong."""

    from benchmarks import contenders
    from benchmarks.peers import eager

    def loss(features: Any, labels: Any, **options: Any) -> torch.Tensor:
        return eager.class_sums(features, labels, **{**options, "temperature": 0.101})

    monkeypatch.setitem(contenders.EXTRA, "wrong", loss)
    return "wrong"


@pytest.fixture
def one_contest(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` with nothing but the tiny contest, and without a limit on this process."""
    from dataclasses import replace

    from tiny_contests import tiny_contest

    from benchmarks import catalogue, contest

    made = replace(tiny_contest("class-sums", "eager"), group="match")
    monkeypatch.setitem(catalogue.CONTESTS, "match", lambda quick: [made])
    monkeypatch.setattr(contest, "limit_memory", lambda: 0)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real data sets; tests that need it are skipped, saying so, where it is
    absent.
    """
    from medcl_kernels import env

    root = env.data_root() or REPO.parent / "shared" / "data"
    if not root.is_dir():
        pytest.skip(f"real data not found in {root}: set MEDCL_DATA to the folder that holds it")
    return root


@pytest.fixture(scope="module")
def kept_build() -> Iterator[None]:
    """The checkout's own build folder and its logs, which one test process at a time may use."""
    folder = REPO / "build"
    folder.mkdir(exist_ok=True)
    with (folder / ".tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first. Tests marked gpu are skipped, saying so, on a machine without one."""
    rank = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device: run by make gpu-check")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
