"""Precision, device and launch: what every operation needs around its kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor


def precision(dtype: torch.dtype) -> str:
    """How products are made: "half" (float16 or bfloat16 rows), "tf32" or "ieee" (float32 rows, by
    `torch.get_float32_matmul_precision()`). Sums are float32 always."""
    if dtype != torch.float32:
        return "half"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def launch(
    kernel: Any,
    programs: int,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    warps: int = 4,
    stages: int = 2,
) -> None:
    """Starts a kernel on the current stream of the current device; every launch comes by here."""
    kernel[(programs,)](**arguments, **constants, num_warps=warps, num_stages=stages)


def operation(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs an operation on the device of its rows, whichever is the current one, and names the
    operation and the shapes where a kernel cannot be compiled or started, whoever says so: Triton,
    the assembler or the driver. Torch explains by itself that memory ran out."""

    @functools.wraps(function)
    def guarded(*arguments: Any) -> Any:
        tensors = [one for one in arguments if isinstance(one, Tensor)]
        try:
            with torch.cuda.device_of(tensors[0]):
                return function(*arguments)
        except torch.OutOfMemoryError:
            raise
        except (triton.TritonError, RuntimeError) as error:
            shapes = ", ".join(str(tuple(one.shape)) for one in tensors)
            raise RuntimeError(
                f"medcl_triton::{function.__name__} on {shapes}: {error}; "
                'impl="cuda" or impl="reference" may serve this shape'
            ) from error

    return guarded
