"""What `impl="auto"` takes, and what is said where a GPU backend cannot run. Devices and their
drivers are played by monkeypatched probes: every reason must be told apart without the machine that
has it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from medcl_kernels import dispatch, env, gpu, measured, report

SMALL, LARGE = (0, 0, 0), (0, 1, 2)
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _fresh_caches() -> object:
    """Probes are remembered per process; what one test plays must not reach the next."""
    caches = (gpu.capability, dispatch._cuda_build)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


Devices = Callable[..., None]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    """Plays a CUDA torch with devices of these capabilities and a library built for these."""

    def play(*capabilities: tuple[int, int], archs: str = "80,90a,90+PTX", stream: str = "yes"):
        for name, value in {
            "is_initialized": lambda: False,
            "is_available": lambda: bool(capabilities),
            "device_count": lambda: len(capabilities),
            "get_device_capability": lambda index=0: capabilities[index],
            "get_device_name": lambda index=0: f"Card {index}",
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(env, "load_library", lambda: None)
        info = {"cuda_archs": archs, "torch_cuda_stream": stream}
        monkeypatch.setattr(env, "build_info", lambda: info)

    return play


def refuses_to_start(message: str) -> Callable[[], None]:
    def init() -> None:
        raise RuntimeError(message)

    return init


# what torch says -> words of ours
DRIVERS = [
    ("Found no NVIDIA driver on your system. Please check that ...", ["no NVIDIA driver", "CPU"]),
    (
        "The NVIDIA driver on your system is too old (found version 11040). Please update ...",
        ["driver is too old", "CUDA 13.0", "update the driver"],
    ),
    ("No CUDA GPUs are available", ["No CUDA GPUs", "CUDA_VISIBLE_DEVICES='7'"]),
]


@pytest.mark.parametrize(("said", "words"), DRIVERS, ids=["none", "too old", "hidden"])
def test_without_a_usable_driver_both_backends_say_why(
    said: str, words: list[str], devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(torch.cuda, "init", refuses_to_start(said))
    for reason in (dispatch._no_cuda(), dispatch._no_triton()):
        assert reason and all(word in reason for word in words), reason


def test_a_torch_without_cuda_is_named(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    devices()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA: install a CUDA build of torch" in str(gpu.no_device())
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in str(gpu.no_device())


@pytest.mark.parametrize(
    ("archs", "stream", "words"),
    [
        ("none", "no", ["built without CUDA kernels", "MEDCL_CUDA=1"]),
        ("80,90a", "no", ["current stream", "make build"]),
        ("100f,90a", "yes", ["built for 100f,90a", "cuda:0 is sm_80", "MEDCL_CUDA_ARCHS=80"]),
    ],
    ids=["no kernels", "no stream", "another architecture"],
)
def test_a_library_that_cannot_serve_the_device_says_how_to_build_it(
    archs: str, stream: str, words: list[str], devices: Devices
) -> None:
    devices((8, 0), archs=archs, stream=stream)
    reason = str(dispatch._no_cuda())
    assert all(word in reason for word in words), reason


def test_a_device_before_ampere_is_refused_by_name(devices: Devices) -> None:
    devices((7, 5))
    for reason in (dispatch._no_cuda(), dispatch._no_triton()):
        assert reason and "cuda:0 (Card 0) is sm_75" in reason
        assert "sm_80" in reason and 'impl="reference"' in reason
    with pytest.raises(RuntimeError, match="sm_75"):
        dispatch.select("pair_argmax", "cuda", "cuda", F32, SMALL)


def test_of_two_devices_only_the_old_one_is_refused(devices: Devices) -> None:
    devices((7, 5), (9, 0))
    assert dispatch._no_cuda() is None
    assert dispatch.select("pair_argmax", "cuda", "cuda", F32, (1, 0, 0)) == "cuda"
    with pytest.raises(RuntimeError, match="cuda:0 .* is sm_75"):
        dispatch.select("pair_argmax", "cuda", "cuda", F32, (0, 0, 0))


def test_triton_is_missing_or_interpreted(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices()
    monkeypatch.setattr(torch.cuda, "init", refuses_to_start("No CUDA GPUs are available"))
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch._no_triton() is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "No CUDA GPUs" in str(dispatch._no_triton())
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert "pip install 'medcl_kernels[triton]'" in str(dispatch._no_triton())


def test_the_report_gives_every_reason(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    devices((7, 5))
    monkeypatch.setattr(report, "_versions", lambda: [])
    backends = dict(report.environment()["backends"])
    assert backends["cuda"].startswith("unavailable: cuda:0 (Card 0) is sm_75")
    assert backends["cpu"] == backends["reference"] == "available"
    assert backends["triton"].startswith("unavailable: ")


@pytest.mark.parametrize(
    ("archs", "device", "runs"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("100f", (10, 3), True),
        ("120f", (12, 1), True),
        ("90+PTX", (12, 0), True),
        ("90+PTX", (8, 0), False),
        ("80,90a", (9, 0), True),
        ("none", (9, 0), False),
    ],
)
def test_which_code_runs_on_which_device(archs: str, device: tuple[int, int], runs: bool) -> None:
    assert gpu.covers(archs, device) is runs


@pytest.fixture
def both(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which Triton and CUDA C++ both have `pair_logsumexp`."""
    devices((9, 0))

    def usable(backend: dispatch.Backend) -> dispatch.Backend:
        if backend.name not in ("triton", "cuda"):
            return backend
        return replace(backend, kernels=("pair_logsumexp",), unavailable=lambda: None)

    monkeypatch.setattr(dispatch, "BACKENDS", tuple(map(usable, dispatch.BACKENDS)))
    monkeypatch.setattr(measured, "FASTEST", {})


def auto(dtype: torch.dtype = BF16, load: dispatch.Workload | None = LARGE) -> str:
    return dispatch.select("pair_logsumexp", "auto", "cuda", dtype, load)


def test_unmeasured_auto_takes_triton_then_cuda_then_the_reference(
    both: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert auto() == "triton"
    backends = dispatch.BACKENDS
    without = [
        replace(b, unavailable=lambda: "gone") if b.name == "triton" else b for b in backends
    ]
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(without))
    assert auto() == "cuda"
    without = [replace(b, unavailable=lambda: "gone") if b.name == "cuda" else b for b in without]
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(without))
    monkeypatch.setattr(dispatch, "_warned", False)
    with pytest.warns(RuntimeWarning, match="triton: gone; cuda: gone"):
        assert auto() == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert auto() == "reference"  # said once


def test_measured_auto_takes_the_fastest_of_its_class(
    both: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("triton", None, "cuda")
    table = (("triton",) * 3, line, ("cuda",) * 3)
    monkeypatch.setattr(
        measured,
        "FASTEST",
        {
            ("sm_90", "pair_logsumexp", "bfloat16"): table,
            ("sm_90", "pair_logsumexp", "tf32"): (("cuda",) * 3,) * 3,
        },
    )
    for dtype in (BF16, torch.float16):  # which was not measured
        assert [auto(dtype, (0, 1, rows)) for rows in range(3)] == ["triton", "triton", "cuda"]
        assert auto(dtype, (0, 2, 0)) == "cuda"
    assert auto(load=None) == "triton"  # nothing is known of the call
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert auto(F32) == "triton"
        torch.set_float32_matmul_precision("high")
        assert auto(F32) == "cuda"
    finally:
        torch.set_float32_matmul_precision(before)
    # a measured winner that cannot run here is passed over, never forced
    gone = [
        replace(b, unavailable=lambda: "gone") if b.name == "cuda" else b for b in dispatch.BACKENDS
    ]
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(gone))
    assert auto(load=(0, 2, 0)) == "triton"


def test_measurements_of_another_architecture_do_not_count(
    both: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {("sm_80", "pair_logsumexp", "bfloat16"): (("cuda",) * 3,) * 3}
    monkeypatch.setattr(measured, "FASTEST", table)
    assert auto() == "triton"


@pytest.mark.parametrize("channels", range(3))
def test_a_class_that_was_not_measured_takes_the_nearest(
    both: None, monkeypatch: pytest.MonkeyPatch, channels: int
) -> None:
    """As operations that are timed with one number of channels."""
    none = (None,) * 3
    table = {("sm_90", "pair_logsumexp", "bfloat16"): (none, ("cuda", None, "triton"), none)}
    monkeypatch.setattr(measured, "FASTEST", table)
    assert auto(load=(0, channels, 0)) == "cuda"
    assert auto(load=(0, channels, 2)) == "triton"
    table["sm_90", "pair_logsumexp", "bfloat16"] = (none,) * 3
    assert auto(load=(0, channels, 0)) == "triton"  # as unmeasured ones


def test_the_committed_measurements_name_backends_and_operations_that_exist() -> None:
    shape = (len(dispatch.CHANNELS) + 1, len(dispatch.ROWS) + 1)
    for (arch, operation, dtype), table in measured.FASTEST.items():
        assert arch.startswith("sm_") and operation in dispatch.OPERATIONS
        assert dtype in ("bfloat16", "float16", "float32", "tf32")
        assert (len(table), *{len(line) for line in table}) == shape
        assert {name for line in table for name in line} <= {"triton", "cuda", None}


def test_an_explicit_backend_never_falls_back(both: None) -> None:
    with pytest.raises(RuntimeError, match='impl="cuda" cannot run positive_mean'):
        dispatch.select("positive_mean", "cuda", "cuda", F32, SMALL)
    with pytest.raises(RuntimeError, match="the tensors are on cpu"):
        dispatch.select("pair_logsumexp", "triton", "cpu", F32, SMALL)


def test_a_workload_is_constant_under_compilation_with_symbolic_shapes() -> None:
    """Classes become guards: one graph per class, no break, the sizes stay symbolic inside."""
    sizes: list[int] = []

    def step(x: torch.Tensor) -> torch.Tensor:
        return x * dispatch._class(x.shape[2], (40, 80))

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        sizes.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for length, factor in ((10, 0), (11, 0), (50, 1), (60, 1), (90, 2)):
        x = torch.ones(1, 3, length)
        assert torch.equal(compiled(x), x * factor)
    assert len(sizes) == 3
    assert dispatch.workload(torch.ones(2, 3, 4)) == (0, 0, 0)
