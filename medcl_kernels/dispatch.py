"""Which backend runs an operation: the only place that chooses.

A backend is a record: what it is called, where it runs, which operations it has, and why it may be
missing. An explicit `impl` never falls back; "auto" takes the backend that was measured to be the
fastest for such a call (`measured.py`), else the first that has the operation on the tensor's
device, and ends at the reference, which has everything.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from . import env, gpu, measured

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPERATIONS = (
    "pair_logsumexp",
    "pair_positive_log",
    "pair_argmax",
    "pair_hinge",
    "positive_mean",
    "positive_at",
    "info_nce_sum",
    "supervised_sum",
    "pair_topk",
    "pair_filtered_grad",
    "pair_at",
    "mitigate_rows",
    "pair_affinity",
    "patch_class_ratio",
    "uncertainty_reweight",
)
# What decides between backends on a GPU: a class reaches up to its bound, the last one is open.
CHANNELS = (64, 128)
ROWS = (8192, 32768)
Workload = tuple[int, int, int]  # device index, class of channels, class of rows
# What medcl_kernels.ops puts together from other operations where a backend has no kernel for it.
COMPOSED = {
    "info_nce_sum": ("pair_logsumexp", "positive_at"),
    "supervised_sum": ("pair_logsumexp", "positive_mean"),
    "pair_hinge": (),  # tiles of plain torch everywhere
}


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run the call; the message says why."""


@dataclass(frozen=True)
class Backend:
    """One implementation of some operations.

    Attributes:
        name: the value of `impl` that asks for it.
        devices: device types it runs on; empty for any.
        dtypes: feature dtypes it takes.
        kernels: the operations that it has a kernel for.
        unavailable: why it cannot run in this process, or None.
        device_problem: why it cannot run on the CUDA device of this index, or None.
    """

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    kernels: tuple[str, ...]
    unavailable: Callable[[], str | None]
    device_problem: Callable[[int], str | None] = lambda index: None

    @property
    def operations(self) -> tuple[str, ...]:
        """What it can run."""
        return tuple(name for name in OPERATIONS if self.runs(name))

    def runs(self, operation: str) -> bool:
        """Whether it has a kernel for the operation, or for all parts that compose it."""
        parts = COMPOSED.get(operation, (operation,))
        return operation in self.kernels or all(part in self.kernels for part in parts)

    def refuses(
        self, operation: str, device: str, dtype: torch.dtype, index: int | None = None
    ) -> str | None:
        """Why this backend cannot run the operation on such a tensor, or None.

        Args:
            operation: one of `OPERATIONS`.
            device: device type.
            dtype: of the features.
            index: of the CUDA device; None for any.
        """
        if not self.runs(operation):
            have = ", ".join(self.operations) or "no operation"
            return f"it has {have} in this version"
        if self.devices and device not in self.devices:
            return f"it runs on {' or '.join(self.devices)}, the tensors are on {device}"
        if dtype not in self.dtypes:
            return f"it takes {', '.join(map(str, self.dtypes))}, the features are {dtype}"
        reason = self.unavailable()
        if reason is None and device == "cuda" and index is not None:
            reason = self.device_problem(index)
        return reason


def _no_cuda() -> str | None:
    reason = env.load_library()
    if reason is not None:
        return reason
    archs, stream = _cuda_build()
    if archs == "none":
        return "the library was built without CUDA kernels: build it with nvcc and MEDCL_CUDA=1"
    reason = gpu.no_device()
    if reason is None and not stream:
        reason = (
            f"the library does not find the current stream of torch {torch.__version__}: "
            f"{env.HOW_TO_BUILD}"
        )
    return reason or gpu.too_old() or gpu.not_built_for(archs)


def _cuda_device(index: int) -> str | None:
    return gpu.too_old(index) or gpu.not_built_for(_cuda_build()[0], index)


@cache
def _cuda_build() -> tuple[str, bool]:
    """Architectures of the loaded library, and whether it is bound to torch's CUDA stream."""
    info = env.build_info()
    return info.get("cuda_archs", "none"), info.get("torch_cuda_stream") == "yes"


def _no_triton() -> str | None:
    # a search of the path costs more than a kernel launch, so not once Triton is there
    if "triton" not in sys.modules and find_spec("triton") is None:
        return "Triton is not installed: pip install 'medcl_kernels[triton]'"
    if env.triton_interpreted():
        return None
    reason = gpu.no_device()
    if reason is not None:
        return (
            f"{reason} (TRITON_INTERPRET=1 from the start of the process runs the kernels on the "
            "CPU, slowly, to try them)"
        )
    return gpu.too_old()


# What both GPU backends have kernels for.
GPU_KERNELS = tuple(one for one in OPERATIONS if one not in COMPOSED)
BACKENDS = (
    Backend("cpu", ("cpu",), FLOATS, OPERATIONS, env.load_library),
    Backend(
        "triton",
        ("cpu",) if env.triton_interpreted() else ("cuda",),
        FLOATS[1:],
        GPU_KERNELS,
        _no_triton,
        gpu.too_old,
    ),
    Backend("cuda", ("cuda",), FLOATS[1:], GPU_KERNELS, _no_cuda, _cuda_device),
    Backend("reference", (), FLOATS, OPERATIONS, lambda: None),
)
_warned = False


def has_kernel(backend: str, operation: str) -> bool:
    """Whether a backend has a kernel of its own, so that nothing needs to be composed."""
    return any(one.name == backend and operation in one.kernels for one in BACKENDS)


def available() -> dict[str, str | None]:
    """For every backend why it cannot be used in this process, None where it can."""
    return {backend.name: backend.unavailable() for backend in BACKENDS}


def choose(operation: str, impl: str, query: Tensor, dtype: torch.dtype | None = None) -> str:
    """Name of the backend that runs `operation` on a query `(B, D, L)`: `select` with everything
    that the tensor says. `dtype` is that of the result where the query is a label map.
    """
    return select(operation, impl, query.device.type, dtype or query.dtype, workload(query))


def workload(query: Tensor) -> Workload:
    """What `select` has to know of a query `(B, D, L)` besides device type and dtype, as plain
    integers also while torch.compile traces with symbolic shapes.
    """
    if query.device.type != "cuda" or query.dim() != 3:
        return query.device.index or 0, 0, 0
    batch, channels, length = query.shape
    return query.device.index or 0, _class(channels, CHANNELS), _class(batch * length, ROWS)


def _class(size: int, bounds: tuple[int, ...]) -> int:
    for position, bound in enumerate(bounds):
        if size <= bound:
            return position
    return len(bounds)


@torch.compiler.assume_constant_result
def select(
    operation: str, impl: str, device: str, dtype: torch.dtype, load: Workload | None = None
) -> str:
    """Name of the backend that runs `operation`.

    Args:
        operation: one of `OPERATIONS`.
        impl: "auto" (then the environment variable MEDCL_IMPL, if set, decides) or a backend.
        device: device type of the features, such as "cpu".
        dtype: dtype of the features.
        load: `workload(query)`; without it neither measurements nor the device's own architecture
            take part in the choice.

    Raises:
        ValueError: no backend of that name.
        BackendUnavailable: the backend asked for cannot run it; the message says why.
    """
    index = None if load is None else load[0]
    if impl == "auto":
        impl = env.default_impl()
    if impl != "auto":
        for backend in BACKENDS:
            if backend.name == impl:
                reason = backend.refuses(operation, device, dtype, index)
                if reason is None:
                    return impl
                raise BackendUnavailable(
                    f'impl="{impl}" cannot run {operation}: {reason}; '
                    'impl="auto" chooses a backend that can'
                )
        names = ", ".join(backend.name for backend in BACKENDS)
        raise ValueError(f'impl must be "auto" or one of {names}; got "{impl}"')
    fastest = None if load is None or device != "cuda" else _fastest(operation, dtype, load)
    reasons: list[str] = []
    # False sorts first: the measured one, then the order of the records
    for backend in sorted(BACKENDS, key=lambda backend: backend.name != fastest):
        reason = backend.refuses(operation, device, dtype, index)
        if reason is None:
            if backend.name == "reference" and reasons:
                _warn_once("; ".join(reasons))
            return backend.name
        if device in backend.devices and operation in backend.operations:
            reasons.append(f"{backend.name}: {reason}")
    raise BackendUnavailable(f"no backend runs {operation} on {device} with {dtype}")


def _fastest(operation: str, dtype: torch.dtype, load: Workload) -> str | None:
    """The measured winner for such a call, or None where nothing was measured: that of the nearest
    class that was, and of bfloat16 for float16, whose kernels differ in the format only."""
    if not measured.FASTEST:
        return None
    index, channels, rows = load
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        name = "tf32"
    table = measured.FASTEST.get((gpu.architecture(index), operation, name))
    if table is None and dtype == torch.float16:
        table = measured.FASTEST.get((gpu.architecture(index), operation, "bfloat16"))
    return _nearest(table or (), channels, rows)


@cache
def _nearest(table: tuple[tuple[str | None, ...], ...], channels: int, rows: int) -> str | None:
    """The winner of a class or of the nearest one that was measured; called for every operation."""
    near = [
        (abs(channels - c) + abs(rows - r), abs(rows - r), c, r, winner)
        for c, line in enumerate(table)
        for r, winner in enumerate(line)
        if winner is not None
    ]
    return min(near)[-1] if near else None


def _warn_once(reason: str) -> None:
    """Says once that the slow path is taken."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"medcl_kernels runs its plain torch reference, which stores N x N matrices: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
