"""One helper that judges any operation or loss on any backend: `check_op`.

Truth is the reference in float64 on exactly the values that were tested. A tensor may be off by
twice the error that the reference itself makes in the tested dtype, plus eps times the natural
scale of that tensor, so that an error is measured against what plain torch would have done, not
against a hand-picked number. Where a backend rounds the operands of its products (tensor cores),
the reference is run with the same rounding: `products`.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from selection_checks import check_rounded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from medcl_kernels import dispatch, reference, report
from medcl_kernels.registry import Case, OpSpec, Sample, spec

OUTPUTS = {
    "info_nce_sum": ("value", "anchors"),
    "supervised_sum": ("value", "anchors"),
    "positive_mean": ("mean", "count"),
    "pair_argmax": ("index", "value"),
    "pair_topk": ("anchor", "candidate", "gradient", "threshold", "cut"),
    "pair_affinity": ("log_z", "linear"),
    "dense_correspondence": ("index",),
}


class Calls(TorchDispatchMode):
    """Counts operations by name, those of backward passes too."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def backends() -> list[Any]:
    """`(impl, device)` parameters: every backend of the package, those for a GPU marked so. Triton
    under its interpreter and CUDA C++ on the emulator run on CPU tensors."""
    result = []
    for name, devices in ((backend.name, backend.devices) for backend in dispatch.BACKENDS):
        if "cuda" in devices:
            result.append(pytest.param(name, "cuda", id=name, marks=pytest.mark.gpu))
        else:
            result.append(pytest.param(name, "cpu", id=name))
    return result


def need(op: str, impl: str, device: str, dtype: torch.dtype) -> None:
    """Skip, with the reason, where a backend cannot run here."""
    reason = dispatch.available()[impl]
    if reason is not None:
        pytest.skip(f"{impl}: {reason}")
    if device != "cpu":
        for operation in report.operations_of(spec(op)):
            try:
                dispatch.select(operation, impl, device, dtype)
            except dispatch.BackendUnavailable as error:
                pytest.skip(f"{impl}: {error}")


def run(function: Callable[..., Any], sample: Sample, names: tuple[str, ...], **extra: Any) -> dict:
    """Outputs by name, and `d_<leaf>` for the upstream gradient of `upstream`."""
    outputs = function(*sample.args, **sample.kwargs, **extra)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if len(names) != len(outputs):
        names = tuple(f"{names[0]}[{position}]" for position in range(len(outputs)))
    named = dict(zip(names, outputs, strict=True))
    with_gradient = [value for value in outputs if value.requires_grad]
    if with_gradient:
        leaves = sample.differentiable
        gradients = torch.autograd.grad(
            with_gradient,
            list(leaves.values()),
            [upstream(value) for value in with_gradient],
            allow_unused=True,
        )
        for name, gradient in zip(leaves, gradients, strict=True):
            named[f"d_{name}"] = torch.zeros_like(leaves[name]) if gradient is None else gradient
    return {name: value.detach() for name, value in named.items()}


def upstream(value: Tensor) -> Tensor:
    """A fixed gradient of the loss with respect to an output, never all ones, exact in float32."""
    ramp = torch.arange(value.numel(), device=value.device, dtype=torch.float64)
    waves = 0.75 + 0.5 * torch.cos(ramp * 1.7) + 0.25 * torch.sin(ramp * 0.3)
    return waves.float().to(value.dtype).reshape(value.shape)


# bits of the mantissa that the operands of a product keep; a format's range is no matter here
MANTISSA = {"bfloat16": 7, "float16": 10, "tf32": 10}


def rounded(x: Tensor, products: str, generator: torch.Generator | None = None) -> Tensor:
    """float32 with the mantissa of another format, to nearest, ties to even; up or down at random
    (stochastic rounding) where a generator is given.
    """
    dropped = 23 - MANTISSA[products]
    bits = x.contiguous().view(torch.int32)
    if generator is None:
        added = (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
    else:
        added = torch.randint(0, 1 << dropped, bits.shape, generator=generator).to(bits)
    changed = ((bits + added) >> dropped << dropped).view(torch.float32)
    return torch.where(x.isfinite(), changed, x)


class _Rounded(torch.autograd.Function):
    """The value rounded, the gradient passed on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *how: Any) -> Tensor:
        return rounded(x, *how)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None, None]:
        return d_x, None, None


class _GradientRounded(torch.autograd.Function):
    """The value passed on, the gradient rounded: an operand of the products of the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *how: Any) -> Tensor:
        ctx.how = how
        return x.clone()

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None, None]:
        return rounded(d_x, *ctx.how), None, None


@contextmanager
def rounded_products(products: str, seed: int | None = None) -> Iterator[None]:
    """Plain torch as on tensor cores: inside, the reference rounds its rows once, and the weights
    of the pairs before they are multiplied with rows. "" changes nothing; a seed asks for
    stochastic rounding.
    """
    how = products, None if seed is None else torch.Generator().manual_seed(seed)
    pairs = import_module(f"{reference.__name__}.pairs")
    at = import_module(f"{reference.__name__}.positive_at")
    listed = import_module(f"{reference.__name__}.pair_at")
    unit, rows, scores, gather = pairs.unit, pairs.clean_rows, pairs.similarities, at.positive_at
    picked = listed._picked

    def of_raw_rows(query: Tensor, key: Tensor, *args: Any, **options: Any) -> Tensor:
        if not options.get("normalize", True):
            query, key = (_Rounded.apply(x.float(), *how) for x in (query, key))
        return gather(query, key, *args, **options)

    changed = {
        "unit": lambda *args: _Rounded.apply(unit(*args), *how),
        "clean_rows": lambda *args: _Rounded.apply(rows(*args), *how),
        "similarities": lambda *args, **names: _GradientRounded.apply(scores(*args, **names), *how),
        "positive_at": of_raw_rows,
        "_picked": lambda *args: _Rounded.apply(picked(*args), *how),
    }
    plain = dict(zip(changed, (unit, rows, scores, gather, picked), strict=True))
    package = reference.__name__.split(".")[0]
    modules = [one for name, one in sys.modules.items() if name.split(".")[0] == package]
    with pytest.MonkeyPatch.context() as patch:
        for module, name in itertools.product(modules if products else (), changed):
            if vars(module).get(name) is plain[name]:  # wherever it was imported to
                patch.setattr(module, name, changed[name])
        yield


def check_op(
    one: OpSpec,
    case: Case,
    dtype: torch.dtype,
    impl: str,
    device: str = "cpu",
    seed: int = 0,
    products: str = "",
) -> None:
    """Fails, naming the tensor, unless outputs and gradients are within the tolerance.

    Args:
        one, case, dtype, device, seed: the sample.
        impl: the backend that is judged.
        products: "" or the key of `MANTISSA` that the backend rounds the operands of products to.
    """
    sample = one.sample(case, dtype, device, seed)
    ours = run(one.resolve(), sample, OUTPUTS.get(one.name, ("value",)), impl=impl)
    plain, truth, exact = plain_and_truth(one, sample, products)
    assert ours.keys() == truth.keys()
    judged: set[str] = set()
    if one.name == "pair_topk" and dtype != torch.float64:
        check_rounded(ours, sample, exact, rounded_products(products))
        # the last pair is one of those with its score; rounded products rank others as well
        judged = set(ours) if products else {"cut"}
    for name, value in ours.items():
        assert value.shape == truth[name].shape, f"{name}: {value.shape} != {truth[name].shape}"
        assert value.dtype == plain[name].dtype, f"{name}: {value.dtype} != {plain[name].dtype}"
        if name in judged:
            continue
        if name == "index":
            check_index(value, truth[name], exact, case, dtype, products)
        elif not value.is_floating_point():
            assert torch.equal(value, truth[name]), f"{name} differs"
        else:
            scale = natural_scale(name, one, case, exact)
            slack = one.tolerance
            if products and truth[name].abs().max() < 1e-12 * scale:
                # What cancels wholly cancelled before plain torch rounded it, and after we did.
                slack += 2.0 ** -(MANTISSA[products] + 1) / torch.finfo(value.dtype).eps
            compare(name, value, plain[name], truth[name], scale, slack, case)


def plain_and_truth(
    one: OpSpec, sample: Sample, products: str = ""
) -> tuple[dict[str, Tensor], dict[str, Tensor], Sample]:
    """What plain torch makes of a sample in its own dtype, what is true, and the float64 sample."""
    names = OUTPUTS.get(one.name, ("value",))
    one.resolve_reference()  # a module that is imported inside would keep what is rounded there

    def of(values: Sample) -> dict[str, Tensor]:
        return run(one.resolve_reference(), values, names)

    with rounded_products(products):
        plain = of(sample.copy())
    exact = sample.double()
    truth = of(exact)
    if products:
        _worst_of_several(plain, truth, lambda: of(sample.copy()), products)
    return plain, truth, exact


FEW = 256  # numbers, of which none may be far off by luck


def _worst_of_several(
    plain: dict[str, Tensor], truth: dict[str, Tensor], again: Callable[[], dict], products: str
) -> None:
    """A few numbers may be right by luck: of those, `plain` gets the worst of several roundings,
    what plain torch can be off by. A stochastic rounding's error has twice the variance of one to
    the nearest; of more than a single number it is scaled to that.
    """

    def off(values: dict[str, Tensor], name: str) -> float:
        difference = (values[name].double() - truth[name]).abs()[truth[name].isfinite()]
        return difference.max().item() if difference.numel() else 0.0

    few = [name for name, x in plain.items() if x.is_floating_point() and x.numel() <= FEW]
    for seed in range(4 if few else 0):
        with rounded_products(products, seed):
            other = again()
        for name in few:
            if plain[name].numel() > 1:
                error = (other[name].double() - truth[name]).nan_to_num(0.0, 0.0, 0.0)
                other[name] = (truth[name] + error / 2**0.5).to(plain[name].dtype)
            if off(other, name) > off(plain, name):
                plain[name] = other[name]


def compare(
    name: str, ours: Tensor, plain: Tensor, truth: Tensor, scale: float, slack: float, case: Case
) -> None:
    """The tolerance rule for one tensor."""
    assert not truth.isnan().any(), f"{name}: NaN in the truth, a fault of the test"
    finite = truth.isfinite()
    assert torch.equal(ours[~finite].double(), truth[~finite]), f"{name}: infinities differ"
    assert ours[finite].isfinite().all(), f"{name}: {(~ours[finite].isfinite()).sum()} not finite"
    if not finite.any():
        return
    error = (ours[finite].double() - truth[finite]).abs().max().item()
    most = allowed(plain, truth, ours.dtype, scale, slack, case)
    size = max(truth[finite].abs().max().item(), scale)
    assert error <= most, f"{name}: off by {error:.3g}, allowed {most:.3g} (size {size:.3g})"


def allowed(
    plain: Tensor, truth: Tensor, dtype: torch.dtype, scale: float, slack: float, case: Case
) -> float:
    """How far a tensor of this dtype may be off."""
    finite = truth.isfinite()
    if dtype == torch.float64:
        # The truth rounds here too: exp(s) is off by eps * |s|, and |s| goes up to 1/temperature.
        slack *= max(4.0, 1.0 / case.temperature)
    error = (plain[finite].double() - truth[finite]).abs().max().item()
    size = max(truth[finite].abs().max().item(), scale)
    return 2 * error + slack * torch.finfo(dtype).eps * size


def natural_scale(name: str, one: OpSpec, case: Case, exact: Sample) -> float:
    """The size of the numbers that a tensor is made of, where these cancel.

    1/temperature for similarities, and what (P4) and (P5) of reference/pairs.py make of it for
    gradients of rows, once for every softmax or mean whose gradients meet in one row.
    """
    scale = 1.0 / case.temperature
    if name in ("d_lse_negative", "d_shift"):
        return 1.0
    if not name.startswith("d_"):
        return scale
    if case.normalize:
        leaf = exact.differentiable[name[2:]]
        flat = leaf.t() if leaf.dim() == 2 else leaf.flatten(2).movedim(1, 0).flatten(1)
        norms = flat.detach().norm(dim=0)
        norms = norms[norms.isfinite() & (norms > 0)]
        if norms.numel():
            scale /= norms.min().item()
    options = dict(case.options)
    scale *= 2 if one.kind == "loss" else len(options.get("kinds", ("all",)))
    averaged = one.kind == "loss" and options.get("reduction", "mean") == "mean"
    batch, length = case.rows()
    return scale / (batch * length) if averaged else scale


def check_index(
    ours: Tensor,
    truth: Tensor,
    exact: Sample,
    case: Case,
    dtype: torch.dtype,
    products: str = "",
) -> None:
    """Indices agree, but for candidates whose true similarities are equal to rounding."""
    if torch.equal(ours, truth):
        return
    from medcl_kernels.layout import rows
    from medcl_kernels.reference.pairs import similarities

    query, key = rows(exact.args[0]), rows(exact.args[1])
    scores = similarities(query, key, None, None, 1.0, case.normalize, False).detach()
    ours, truth = ours.reshape(scores.shape[:2]), truth.reshape(scores.shape[:2])
    size = scores.abs().max().item()
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    if products:
        # both operands of both similarities are off by half a unit; by Cauchy and Schwarz the
        # similarities are off by no more, of the product of the longest rows
        lengths = [rows(x).detach().double().norm(dim=1).max().item() for x in exact.args[:2]]
        size = 1.0 if case.normalize else lengths[0] * lengths[1]
        eps = max(eps, 2.0 ** -(MANTISSA[products] + 1) / 2)
    slack = 8 * eps * size
    best, column_best = (scores.amax(dim, keepdim=True) - slack for dim in (2, 1))
    possible = scores >= best  # candidates of a row; with a mutual match, also the other way
    if dict(case.options).get("mutual"):
        possible &= scores >= column_best
        alone = (scores >= best).sum(2) == 1
        alone &= (
            ((scores >= column_best).sum(1, keepdim=True) == 1)
            .expand_as(scores)
            .gather(2, scores.argmax(2, keepdim=True))[..., 0]
        )
        unsure = ~alone if products else torch.zeros_like(alone)
        assert ((ours >= 0).eq(truth >= 0) | unsure).all(), "index: matched pixels differ"
    else:
        assert (ours >= 0).eq(truth >= 0).all(), "index: matched and unmatched pixels differ"
    chosen = possible.gather(2, ours.clamp_min(0).unsqueeze(2))[..., 0] | (ours < 0)
    assert chosen.all(), f"index: a candidate more than {slack:.3g} below the best was chosen"
