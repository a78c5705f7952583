"""Candidates from all ranks of a `torch.distributed` group, with gradients that find their owners.

With `gather_distributed=True` a loss keeps its anchors and takes the candidates of every rank, as
if the batches of all ranks stood one behind the other along axis 0, by rank. Backward, the gradient
of a row is the sum over the losses of all ranks. DistributedDataParallel takes the mean of the
parameters' gradients, so that training follows the mean of the ranks' losses: with equally many
anchors on every rank that is the loss of the whole batch in one process, value and gradient. With
unequal numbers the mean over anchors is each rank's own, as in any loss under DDP; reduction="sum"
is exact always.

Ranks may hold different numbers of images or rows. Before any tensor moves, the ranks tell each
other what they hold; what does not fit together, and any argument that one of them refuses, is an
error on all of them instead of a wait without an end. That costs one small exchange per call, which
a GPU waits for. As with every collective, all ranks must call the loss and run its backward.

Where no group is initialised, or it has one rank, a loss is what it is without the option.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks

Function = TypeVar("Function", bound=Callable[..., Any])
Gather = Any  # of a loss: bool, a ProcessGroup, or the `Ranks` that `with_ranks` made of them


def gather(features: Tensor, *, group: Any = None) -> Tensor:
    """The rows or images of all ranks, one behind the other by rank.

    For candidates of one's own: `key=` of a loss, or a queue that all ranks fill alike,
    `queue.enqueue(gather(key))`.

    Args:
        features: `(B, ...)`; B may differ between ranks, the rest must not.
        group: a ProcessGroup; None: the default one.

    Returns:
        `(sum of all B, ...)`, the same on every rank; its gradient comes back to the owners, summed
        over the ranks. Without an initialised group or with one rank: `features` itself.

    Raises:
        ValueError: on every rank, if the ranks hold tensors that do not fit together.
    """
    ranks = taking_part(Ranks(True if group is None else group))
    return features if ranks is None else ranks.gather(features=features)[0].everyone()


@dataclass(frozen=True)
class Gathered:
    """One tensor of every rank.

    Attributes:
        padded: `(ranks, largest B, ...)`.
        sizes: B of every rank.
        rank: the own one.
    """

    padded: Tensor
    sizes: tuple[int, ...]
    rank: int

    def everyone(self) -> Tensor:
        """`(sum of all B, ...)` by rank."""
        if min(self.sizes) == max(self.sizes):
            return self.padded.flatten(0, 1)
        return torch.cat(self._parts())

    def others(self) -> Tensor:
        """The same without the own rows."""
        parts = self._parts()
        return torch.cat(parts[: self.rank] + parts[self.rank + 1 :])

    @property
    def offset(self) -> int:
        """Where the own rows begin in `everyone`."""
        return sum(self.sizes[: self.rank])

    def _parts(self) -> list[Tensor]:
        return [part[:size] for part, size in zip(self.padded, self.sizes, strict=True)]


class Ranks:
    """The ranks that take part in one call of a loss.

    Args:
        chosen: True for the default group, or a ProcessGroup.
    """

    def __init__(self, chosen: Any) -> None:
        if not dist.is_available():
            raise ValueError(
                "gather_distributed needs torch.distributed, which this build of torch lacks: "
                "leave it out"
            )
        if chosen is not True and not isinstance(chosen, dist.ProcessGroup):
            raise TypeError(
                "gather_distributed must be True, False or a torch.distributed.ProcessGroup of "
                f"which this rank is a member; got {type(chosen).__name__}"
            )
        self.group = None if chosen is True else chosen
        self.size = dist.get_world_size(self.group) if dist.is_initialized() else 1
        self.met = False  # whether the others know of this call

    def gather(self, **tensors: Tensor) -> list[Gathered]:
        """The tensors of all ranks by name, `(B, ...)` each; once per call."""
        sent = torch.is_grad_enabled()
        kinds = self._meet(
            {
                name: (checks.shape_of(x), str(x.dtype), sent and x.requires_grad)
                for name, x in tensors.items()
            }
        )
        _check_kinds(kinds)
        rank = dist.get_rank(self.group)
        found = []
        for name, x in tensors.items():
            sizes = tuple(kind[name][0][0] for kind in kinds)
            room = x.new_zeros((max(sizes) - len(x), *x.shape[1:]))
            padded = (torch.cat([x, room]) if len(room) else x).contiguous()
            found.append(Gathered(_Gather.apply(padded, self.group), sizes, rank))
        return found

    def refuse(self, error: Exception) -> None:
        """Tells the others, if they still wait, that this rank has no part in the call."""
        if self.size > 1 and not self.met:
            self._meet(f"{type(error).__name__}: {error}")

    def _meet(self, message: Any) -> list[Any]:
        """What every rank has to say, by rank; an error where one of the others refuses."""
        self.met = True
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, message, group=self.group)
        refusals = [f"rank {r}: {one}" for r, one in enumerate(said) if isinstance(one, str)]
        if refusals and not isinstance(message, str):
            raise ValueError(
                "another rank refused its arguments, so this one cannot go on: "
                + "; ".join(refusals)
            )
        return said


def _check_kinds(kinds: list[dict[str, tuple[tuple[int, ...], str, bool]]]) -> None:
    """The same names on every rank, and per name everything but the first axis the same."""
    names = list(kinds[0])
    if any(list(kind) != names for kind in kinds):
        calls = "; ".join(f"rank {r}: {', '.join(kind)}" for r, kind in enumerate(kinds))
        raise ValueError(
            f"the ranks call different losses, or one with different options; they gather {calls}"
        )
    for name in names:
        shapes, dtypes, trained = zip(*(kind[name] for kind in kinds), strict=True)
        for what, values, fits, way in (
            ("shape behind the first axis", shapes, [shape[1:] for shape in shapes], "crop or pad"),
            ("dtype", dtypes, dtypes, "convert"),
            ("requires_grad", trained, trained, "detach it everywhere or nowhere"),
        ):
            if any(one != fits[0] for one in fits):
                listed = "; ".join(f"rank {r}: {value}" for r, value in enumerate(values))
                raise ValueError(
                    f"{name} must have the same {what} on every rank; got {listed}: {way}"
                )


def taking_part(chosen: Gather) -> Ranks | None:
    """The ranks of a call inside a function that `with_ranks` wraps; None where there is one."""
    return chosen if isinstance(chosen, Ranks) and chosen.size > 1 else None


def with_ranks(function: Function) -> Function:
    """For losses: `gather_distributed` arrives as False or as `Ranks`, and an error before the
    ranks have met reaches all of them. `torch.compile` leaves such a call out of its graph."""

    @wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        chosen = options.get("gather_distributed", False)
        return function(*args, **options) if chosen is False else _called(function, args, options)

    return called  # type: ignore[return-value]


@torch.compiler.disable(reason="gather_distributed exchanges sizes and tensors between processes")
def _called(function: Function, args: Any, options: dict[str, Any]) -> Any:
    ranks = Ranks(options["gather_distributed"])
    try:
        return function(*args, **{**options, "gather_distributed": ranks})
    except Exception as error:
        ranks.refuse(error)
        raise


class _Gather(torch.autograd.Function):
    """`(n, ...)` of every rank -> `(ranks, n, ...)`; the transpose of `_Return`."""

    @staticmethod
    def forward(x: Tensor, group: Any) -> Tensor:
        everyone = x.new_empty((dist.get_world_size(group), *x.shape))
        dist.all_gather(list(everyone.unbind(0)), x, group=group)
        return everyone

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Return.apply(g, ctx.group), None


class _Return(torch.autograd.Function):
    """`(ranks, n, ...)` -> `(n, ...)`: what all ranks hold for this one, summed, in float32 for
    16-bit rows."""

    @staticmethod
    def forward(g: Tensor, group: Any) -> Tensor:
        wide = g.to(torch.float64 if g.dtype == torch.float64 else torch.float32).contiguous()
        total = torch.empty_like(wide[0])
        dist.reduce_scatter(total, list(wide.unbind(0)), group=group)
        return total.to(g.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(g.contiguous(), ctx.group), None
