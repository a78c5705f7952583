"""Which backend runs an operation: the only place that chooses.

A backend is a record: what it is called, where it runs, which operations it has, and why it may be
missing. An explicit `impl` never falls back; "auto" takes the first backend that has the operation
on the tensor's device, and ends at the reference, which has everything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import env

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
    "pair_affinity",
    "patch_class_ratio",
    "uncertainty_reweight",
)


# What medcl_kernels.ops puts together from other operations where a backend has no kernel for it.
COMPOSED = {
    "info_nce_sum": ("pair_logsumexp", "positive_at"),
    "supervised_sum": ("pair_logsumexp", "positive_mean"),
    "pair_hinge": (),  # tiles of plain torch everywhere
}


@dataclass(frozen=True)
class Backend:
    """One implementation of some operations.

    Attributes:
        name: the value of `impl` that asks for it.
        devices: device types it runs on; empty for any.
        dtypes: feature dtypes it takes.
        kernels: the operations that it has a kernel for.
        unavailable: why it cannot run in this process, or None.
    """

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    kernels: tuple[str, ...]
    unavailable: Callable[[], str | None]

    @property
    def operations(self) -> tuple[str, ...]:
        """What it can run."""
        return tuple(name for name in OPERATIONS if self.runs(name))

    def runs(self, operation: str) -> bool:
        """Whether it has a kernel for the operation, or for all parts that compose it."""
        parts = COMPOSED.get(operation, (operation,))
        return operation in self.kernels or all(part in self.kernels for part in parts)

    def refuses(self, operation: str, device: str, dtype: torch.dtype) -> str | None:
        """Why this backend cannot run the operation on such a tensor, or None."""
        if not self.runs(operation):
            have = ", ".join(self.operations) or "no operation"
            return f"it has {have} in this version"
        if self.devices and device not in self.devices:
            return f"it runs on {' or '.join(self.devices)}, the tensors are on {device}"
        if dtype not in self.dtypes:
            return f"it takes {', '.join(map(str, self.dtypes))}, the features are {dtype}"
        return self.unavailable()


def _no_cuda() -> str | None:
    reason = env.load_library()
    if reason is not None:
        return reason
    if env.build_info().get("cuda_archs", "none") == "none":
        return "the library was built without CUDA kernels: build it with nvcc and MEDCL_CUDA=1"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


BACKENDS = (
    Backend("cpu", ("cpu",), FLOATS, OPERATIONS, env.load_library),
    Backend(
        "triton",
        ("cuda",),
        FLOATS[1:],
        (),
        lambda: "there are no Triton kernels in this version",
    ),
    Backend("cuda", ("cuda",), FLOATS[1:], ("pair_argmax",), _no_cuda),
    Backend("reference", (), FLOATS, OPERATIONS, lambda: None),
)
_warned = False


def has_kernel(backend: str, operation: str) -> bool:
    """Whether a backend has a kernel of its own, so that nothing needs to be composed."""
    return any(one.name == backend and operation in one.kernels for one in BACKENDS)


def available() -> dict[str, str | None]:
    """For every backend why it cannot be used in this process, None where it can."""
    return {backend.name: backend.unavailable() for backend in BACKENDS}


@torch.compiler.assume_constant_result
def select(operation: str, impl: str, device: str, dtype: torch.dtype) -> str:
    """Name of the backend that runs `operation`.

    Args:
        operation: one of `OPERATIONS`.
        impl: "auto" (then the environment variable MEDCL_IMPL, if set, decides) or a backend.
        device: device type of the features, such as "cpu".
        dtype: dtype of the features.

    Raises:
        ValueError: no backend of that name.
        RuntimeError: the backend asked for cannot run it; the message says why.
    """
    if impl == "auto":
        impl = env.default_impl()
    if impl != "auto":
        for backend in BACKENDS:
            if backend.name == impl:
                reason = backend.refuses(operation, device, dtype)
                if reason is None:
                    return impl
                raise RuntimeError(
                    f'impl="{impl}" cannot run {operation}: {reason}; '
                    'impl="auto" chooses a backend that can'
                )
        names = ", ".join(backend.name for backend in BACKENDS)
        raise ValueError(f'impl must be "auto" or one of {names}; got "{impl}"')
    for backend in BACKENDS:
        reason = backend.refuses(operation, device, dtype)
        if reason is None:
            return backend.name
        if backend.name == "cpu" and device == "cpu":
            _warn_once(reason)
    raise RuntimeError(f"no backend runs {operation} on {device} with {dtype}")


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
