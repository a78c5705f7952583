"""Every complaint about arguments, before any kernel runs: expected, arrived, the way out.

Shapes, dtypes, devices and options are checked always. Values are looked at only where that costs
no synchronisation: on CPU tensors outside `torch.compile` and `torch.func` transforms, and on other
devices under `MEDCL_CHECK_FINITE=1`. Running out of memory is the one complaint that comes later.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import env
from .layout import num_rows, row_shape

FEATURE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IMPLS = ("auto", "reference", "cpu", "triton", "cuda")
REDUCTIONS = ("none", "mean", "sum")
Function = TypeVar("Function", bound=Callable[..., Any])
# How torch's allocators and the C++ library say it; through its stable interface torch says no more
# than which call failed.
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|bad_alloc"
    r"|aten(::|_)(new_empty|empty_like|clone|sort)\b.* API call failed"
)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple, for messages."""
    return tuple(tensor.shape)


def choice(name: str, value: Any, valid: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `valid`."""
    if value not in valid:
        expected = ", ".join(repr(option) for option in valid)
        raise ValueError(f"{name} must be one of {expected}; got {value!r}")


def options(reduction: str, impl: str) -> None:
    """The two options that every loss has."""
    choice("reduction", reduction, REDUCTIONS)
    choice("impl", impl, IMPLS)


def gathered_pairs(gather_distributed: Any, pairs: str) -> None:
    """Only candidates of the whole batch may come from other ranks."""
    if gather_distributed is False or pairs == "batch":
        return
    others = {
        "image": "the candidates are pixels of the anchor's own image",
        "queue": "the candidates are the positives and the queue, which "
        "queue.enqueue(medcl_kernels.distributed.gather(key)) fills from all ranks",
    }
    raise ValueError(
        f"gather_distributed needs pairs='batch': with pairs={pairs!r} {others[pairs]}, so there "
        "is nothing to gather"
    )


def temperature(value: float | Tensor, name: str = "temperature") -> None:
    """A positive number, or a tensor with one element (learnable)."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{name} must be a positive number or a floating-point tensor with one element; "
                f"got {value.dtype} of shape {shape_of(value)}"
            )
        if not readable(value):
            return
        value = value.item()
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name} must be a positive number or a 0-d tensor; got {type(value).__name__}"
        )
    if not 0 < value < float("inf"):
        raise ValueError(
            f"{name} must be positive and finite; got {value}. Usual values are 0.05 to 0.5; learn "
            "its logarithm (log_temperature.exp()) so that it cannot cross zero"
        )


def margin(value: float) -> None:
    """A similarity that is not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"margin must be a number; got {type(value).__name__}")
    if not 0 <= value < float("inf"):
        raise ValueError(
            f"margin must be finite and not negative; got {value}. Between unit rows it lies in "
            "0 to 1, usually 0.5"
        )


def traced(tensor: Tensor) -> bool:
    """Whether there are no values to look at: torch.compile, vmap, fake and meta tensors."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
        return True
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.device.type == "meta"


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, so that nothing may wait for the device."""
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def readable(tensor: Tensor) -> bool:
    """Whether values may be looked at here without a synchronisation or a graph break."""
    return not traced(tensor) and (tensor.device.type == "cpu" or env.check_finite())


def features(tensor: Tensor, name: str) -> None:
    """`(B, C, *spatial)` or `(N, C)` floats with at least one row and one channel."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype not in FEATURE_DTYPES:
        raise TypeError(
            f"{name} must be float64, float32, bfloat16 or float16; got {tensor.dtype}: "
            f"convert with {name}.float()"
        )
    if tensor.dim() < 2:
        raise ValueError(
            f"{name} must be (B, C, *spatial) or flat (N, C); got shape {shape_of(tensor)}"
        )
    if tensor.numel() == 0:
        raise ValueError(
            f"{name} is empty: shape {shape_of(tensor)}. Skip the loss for empty batches; a batch "
            "whose pixels are all ignored is fine and gives a zero"
        )


def same_kind(reference: Tensor, name: str, tensor: Tensor, other: str, dtype: bool = True) -> None:
    """`tensor` lives on the device (and has the dtype) of `reference`."""
    if tensor.device != reference.device:
        raise ValueError(
            f"{other} is on {tensor.device} but {name} is on {reference.device}: move it with "
            f"{other}.to({name}.device)"
        )
    if dtype and tensor.dtype != reference.dtype:
        raise TypeError(
            f"{other} is {tensor.dtype} but {name} is {reference.dtype}: convert one of them, for "
            f"example {other}.to({name}.dtype)"
        )


def key_features(
    query: Tensor,
    key: Tensor,
    *,
    names: tuple[str, str] = ("query", "key"),
    same_batch: bool = True,
) -> None:
    """A key that goes with a checked query."""
    name, other = names
    features(key, other)
    same_kind(query, name, key, other)
    if (key.dim() == 2) != (query.dim() == 2) or key.shape[1] != query.shape[1]:
        raise ValueError(
            f"{other} must have the form and the {query.shape[1]} channels of {name}, "
            f"{shape_of(query)}; got {shape_of(key)}"
        )
    if same_batch and num_rows(key)[0] != num_rows(query)[0]:
        raise ValueError(
            f"{other} must have as many images as {name} ({query.shape[0]}) when pairs are formed "
            f"inside an image; got {key.shape[0]}"
        )


def labels(tensor: Tensor, features: Tensor, name: str = "labels", other: str = "features") -> None:
    """`(B, *spatial)` or `(B, 1, *spatial)` integers that match the features."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    expected = row_shape(features)
    with_channel = (expected[0], 1, *expected[1:])
    shape = shape_of(tensor)
    if shape not in (expected, with_channel):
        raise ValueError(_label_shape_message(name, shape, other, features, expected))
    _integers(tensor, name, "integer labels")
    same_kind(features, other, tensor, name, dtype=False)


def _label_shape_message(
    name: str, shape: tuple[int, ...], other: str, features: Tensor, expected: tuple[int, ...]
) -> str:
    """Why labels of this shape cannot be used, with the way out for the two usual reasons."""
    text = (
        f"{name} must be {expected} (or with a channel axis of 1) to go with {other} of shape "
        f"{shape_of(features)}; got {shape}"
    )
    one_hot = len(shape) == len(expected) + 1 and shape[0] == expected[0] and shape[1] > 1
    if one_hot and shape[2:] == expected[1:]:
        return f"{text}. This looks one-hot: pass class numbers, {name}.argmax(1)"
    if one_hot or (len(shape) == len(expected) and shape[0] == expected[0]):
        return (
            f"{text}. Bring them to the resolution of the features, for example with "
            "torch.nn.functional.interpolate(labels[:, None].float(), size, mode='nearest').long()"
        )
    return text


def _integers(tensor: Tensor, name: str, what: str) -> None:
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} must hold {what}; got {tensor.dtype}: convert with {name}.long()")


def positives(tensor: Tensor, query: Tensor, key: Tensor, ignore_index: int, name: str) -> None:
    """`(B, *spatial)` or `(B, *spatial, R)` indices into the key pixels of the same image."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of indices; got {type(tensor).__name__}")
    _integers(tensor, name, "integer indices")
    if tensor.dtype == torch.bool:
        raise TypeError(f"{name} must hold indices, not a mask; got torch.bool")
    expected, shape = row_shape(query), shape_of(tensor)
    if shape != expected and shape[:-1] != expected or shape[-1] == 0:
        raise ValueError(
            f"{name} must be {expected}, or {(*expected, 'R')} with R positives each, to go with "
            f"query of shape {shape_of(query)}; got {shape}"
        )
    same_kind(query, "query", tensor, name, dtype=False)
    if not readable(tensor):
        return
    pixels = num_rows(key)[1]
    smallest, largest = (int(bound) for bound in tensor.aminmax())
    if smallest >= (-1 if ignore_index == -1 else 0) and largest < pixels:
        return
    wrong = (tensor != ignore_index) & ((tensor < 0) | (tensor >= pixels))
    if wrong.any():
        raise ValueError(
            f"{name} must be in [0, {pixels}), flat indices into the key pixels of the same image, "
            f"or ignore_index ({ignore_index}); got {tensor[wrong][0].item()}. For pairs='batch' "
            "too, an index counts from the first pixel of its own image"
        )


def queue(tensor: Tensor, query: Tensor) -> None:
    """`(K, C)` further negatives."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"queue must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype not in FEATURE_DTYPES:
        raise TypeError(
            f"queue must be floating point; got {tensor.dtype}: convert with queue.float()"
        )
    if tensor.dim() != 2 or tensor.shape[1] != query.shape[1]:
        raise ValueError(
            f"queue must be (K, {query.shape[1]}), one row per negative with the channels of "
            f"query; got {shape_of(tensor)}"
        )
    same_kind(query, "query", tensor, "queue", dtype=False)


def finite(tensor: Tensor, name: str, counted: Tensor | None = None) -> None:
    """Under MEDCL_CHECK_FINITE=1: no NaN or Inf in rows that count.

    Args:
        tensor: row form `(B, D, L)`.
        name: for the message.
        counted: `(B, L)` bool; rows outside may hold anything. None = all rows count.
    """
    if torch.compiler.is_compiling() or not env.check_finite() or not readable(tensor):
        return
    bad = ~torch.isfinite(tensor).all(1)
    if counted is not None:
        bad = bad & counted
    number = int(bad.sum())
    if number:
        image, pixel = (int(position) for position in bad.nonzero()[0])
        raise ValueError(
            f"{name} must be finite where it counts (MEDCL_CHECK_FINITE=1); got NaN or Inf in "
            f"{number} of {bad.numel()} rows, first in image {image}, pixel {pixel}. Mark such "
            "pixels with ignore_index, or look for the overflow upstream (a lower learning rate, "
            "bfloat16 instead of float16)"
        )


def explains_memory(function: Function) -> Function:
    """Adds to an out-of-memory error of a loss what its size was and what makes it smaller."""

    @wraps(function)
    def explained(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **options)
        try:
            return function(*args, **options)
        except (RuntimeError, MemoryError) as error:
            query = args[0] if args else options.get("query", options.get("features"))
            if not isinstance(query, Tensor) or not memory_ran_out(error, query):
                raise
            message = f"{str(error).rstrip()}\n{function.__name__}: {_smaller(query, options)}"
        raise memory_error(message, query)  # not inside the handler: its frames hold the tensors

    return explained  # type: ignore[return-value]


def memory_ran_out(error: BaseException, tensor: Tensor) -> bool:
    """Whether an error of work on the tensor's device says that memory ran out."""
    text = str(error)
    if not OUT_OF_MEMORY.search(text):
        return False
    if "API call failed" in text and tensor.is_cuda:
        try:  # an allocation also meets the errors of kernels that ran before
            torch.cuda.synchronize(tensor.device)
        except RuntimeError:
            return False
    return True


def memory_error(message: str, tensor: Tensor) -> RuntimeError:
    """What torch raises for work on the tensor's device."""
    return torch.OutOfMemoryError(message) if tensor.is_cuda else RuntimeError(message)


def _smaller(query: Tensor, options: dict[str, Any]) -> str:
    batch, length = num_rows(query)
    size = f"{batch * length} rows x {query.shape[1]} channels on {query.device}"
    if options.get("impl", "auto") == "reference" or env.default_impl() == "reference":
        matrix = 4 * (batch * length) ** 2 / 2**30
        return (
            f"{size} with impl='reference', which stores N x N matrices (up to {matrix:.3g} GB "
            "each): take impl='auto' with a backend that `python -m medcl_kernels env` lists as "
            "available"
        )
    return (
        f"{size}: the kernels need a few times N x D numbers, so what else is alive matters most. "
        "Smaller batches or crops, features at a lower resolution, bfloat16 features, or fewer "
        "channels make it smaller; impl='reference' stores N x N matrices (see "
        "`python -m medcl_kernels env` for what is available)"
    )
