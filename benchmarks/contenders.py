"""Who runs what: an implementation of the package or a peer, on one case of the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from medcl_kernels import dispatch, env
from medcl_kernels.registry import Case, OpSpec, Sample, spec

from .peers import PEERS

OURS = ("cpu", "reference", "triton", "cuda")
# tests add deliberately wrong contenders here
EXTRA: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Entry:
    """One line of a contest.

    Attributes:
        label: unique in its contest; the contender's name unless that one enters twice.
        contender: an `impl` of the package or the name of a peer.
        op: name of an operation or loss in the registry.
        case: the input.
        dtype: of the features.
        device: "cpu" or "cuda".
        mode: "full" is forward and backward, "forward" the value alone, without a graph.
        products: "" (ieee products of what the dtype widens to); "tf32": float32 features, and
            torch may use tf32; "bfloat16", "float16": peers run under autocast to that dtype.
        wgmma: whether "cuda" takes the wgmma kernels where it has them.
    """

    label: str
    contender: str
    op: str
    case: Case
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    mode: str = "full"
    products: str = ""
    wgmma: bool = False

    @property
    def arithmetic(self) -> str:
        """The dtype by name, "tf32" where float32 may be multiplied so."""
        return "tf32" if self.products == "tf32" else str(self.dtype).removeprefix("torch.")

    @property
    def spec(self) -> OpSpec:
        """The registry's record."""
        return spec(self.op)

    @property
    def ours(self) -> bool:
        """Whether the package itself runs."""
        return self.contender in OURS

    @property
    def quadratic(self) -> bool:
        """Whether it may store an N x N matrix."""
        if self.contender in PEERS:
            return PEERS[self.contender].quadratic
        return self.contender == "reference"

    @property
    def compiles(self) -> bool:
        """Whether the first call is a long compilation."""
        return self.contender in PEERS and PEERS[self.contender].compiles

    @property
    def forward_only(self) -> bool:
        """Whether it computes no gradient where others do."""
        return self.contender in PEERS and PEERS[self.contender].forward_only

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.contender in EXTRA:
            return None
        if not self.ours:
            return PEERS[self.contender].cannot_run(self.device)
        reason = dispatch.available()[self.contender]
        if reason is None and self.spec.kind == "op":
            (backend,) = (one for one in dispatch.BACKENDS if one.name == self.contender)
            reason = backend.refuses(self.op, self.device, self.dtype)
        return reason

    def function(self) -> Callable[..., Any]:
        """What is called with the sample's arguments."""
        if self.contender in EXTRA:
            return EXTRA[self.contender]
        if self.ours:
            return partial(self.spec.resolve(), impl=self.contender)
        return PEERS[self.contender].resolve(self.op)

    def sample(self, seed: int = 0) -> Sample:
        """The input, the same values for every contender."""
        return self.spec.sample(self.case, self.dtype, self.device, seed)

    def flops(self) -> float:
        """FLOPs that a step needs; a forward pass is 2u of the 6u or 8u of both."""
        both = self.spec.flops(self.case)
        if self.mode == "full":
            return both
        per_pair = self.spec.cost[self.case.key_shape is not None]
        return both * 2 / per_pair if per_pair else both / 3

    def stepper(self, sample: Sample) -> Callable[[], tuple[tuple[Tensor, ...], dict]]:
        """A step without arguments, in the arithmetic that is asked for."""
        function = self.function()

        def step() -> tuple[tuple[Tensor, ...], dict]:
            with self._products(), self._kernels():
                return run_once(function, sample, self.mode)

        return step

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        if not self.wgmma:
            yield
            return
        before = env.use_wgmma(True)
        try:
            yield
        finally:
            env.use_wgmma(before)

    @contextmanager
    def _products(self) -> Iterator[None]:
        if not self.products:
            yield
        elif self.products != "tf32":
            # the package takes tensors in the dtype they have, with and without autocast
            with torch.autocast(self.device, getattr(torch, self.products), not self.ours):
                yield
        else:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)


def run_once(
    function: Callable[..., Any], sample: Sample, mode: str = "full"
) -> tuple[tuple[Tensor, ...], dict]:
    """One step: outputs, and the gradient of their sum by leaf (none where nothing is
    differentiable, or with mode "forward").
    """
    with torch.set_grad_enabled(mode == "full"):
        outputs = function(*sample.args, **sample.kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    with_gradient = [value for value in outputs if value.requires_grad]
    if not with_gradient:
        return outputs, {}
    leaves = sample.differentiable
    ones = [None if value.dim() == 0 else torch.ones_like(value) for value in with_gradient]
    # a leaf that an operation does not differentiate (temperatures, statistics) may be unused
    gradients = torch.autograd.grad(with_gradient, list(leaves.values()), ones, allow_unused=True)
    return outputs, dict(zip(leaves, gradients, strict=True))


def rows_of(case: Case) -> tuple[int, int]:
    """`(N, D)`: all rows of the features, and their channels."""
    batch, length = case.rows()
    return batch * length, case.channels
