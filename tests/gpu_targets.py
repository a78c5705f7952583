"""Where the tests of the GPU backends run: each backend on a CUDA device, marked gpu, and the CPU
backend in its place on every machine, so that CI shows the tests themselves to be right. In a
process where Triton is interpreted or CUDA C++ emulated, these backends run on the CPU as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from op_checks import backends
from torch import Tensor

TARGETS = tuple(one for one in backends() if one.id != "reference")
# name -> dtype of the features, what operands of products are rounded to, torch's matmul precision
ARITHMETIC = {
    "ieee": (torch.float32, "", "highest"),
    "tf32": (torch.float32, "tf32", "high"),
    "bf16": (torch.bfloat16, "bfloat16", "highest"),
    "fp16": (torch.float16, "float16", "highest"),
}


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """torch's float32 matmul precision inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def side_stream(device: str) -> Any:
    """A context with another current stream; on the CPU nothing."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()


def keep_busy(device: str) -> None:
    """Occupies the current stream for some tens of milliseconds."""
    if device == "cuda":
        torch.cuda._sleep(100_000_000)


class Captured:
    """A step captured in a CUDA graph; on the CPU the step itself.

    Args:
        step: reads `inputs`, returns tensors.
        device: "cuda" or "cpu".
    """

    def __init__(self, step: Callable[[], tuple[Tensor, ...]], device: str) -> None:
        self.step, self.graph = step, None
        if device == "cuda":
            with side_stream(device):
                for _ in range(3):  # kernels compile and libraries allocate before the capture
                    step()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = step()

    def replay(self) -> tuple[Tensor, ...]:
        """The outputs for what the inputs hold now, as copies."""
        if self.graph is None:
            return self.step()
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)


@contextmanager
def peak_memory(device: str) -> Iterator[list[int]]:
    """Puts the bytes into the list by which torch's allocations grew inside the block at their
    peak; 0 on the CPU, whose allocator does not count.
    """
    grown = [0]
    if device != "cuda":
        yield grown
        return
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield grown
    torch.cuda.synchronize()
    grown[0] = torch.cuda.max_memory_allocated() - before
