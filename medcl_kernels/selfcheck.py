"""A self test that ships with the package: every operation and loss, on every backend that can run
here, against the reference in float64. The full grid of cases is the test suite's; this takes a
few of each, well-conditioned ones, and finishes in seconds.

A tensor may be off by four times the error that the reference itself makes in float32, plus 32
roundings of the numbers that it is made of: a broken kernel is off by orders of magnitude more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch, report
from .layout import rows
from .reference import positive_at
from .registry import SPECS, Case, OpSpec, Sample

# small and large, with and without gaps; equal and zero rows are for the test suite, where the rule
# for ties and for gradients of tiny rows is spelled out
CASES_PER_SPEC = 6
SKIPPED = ("duplicates", "zero_rows", "channels_1")


@dataclass(frozen=True)
class Result:
    """Outcome for one operation or loss on one backend.

    Attributes:
        name, impl: what ran where.
        cases: how many inputs were tried.
        worst: largest error as a fraction of the allowed one.
        failures: one line per input that failed; empty = passed.
    """

    name: str
    impl: str
    cases: int
    worst: float
    failures: tuple[str, ...]


def check_all() -> Iterator[Result]:
    """Results as they come, one per operation or loss and usable backend."""
    for backend in dispatch.BACKENDS:
        if backend.unavailable() is not None:
            continue
        device = backend.devices[0] if backend.devices else "cpu"
        for spec in SPECS:
            if report.serves(backend, spec):
                yield check_spec(spec, backend.name, device)


def check_spec(spec: OpSpec, impl: str, device: str) -> Result:
    """A few cases of one operation or loss on one backend."""
    worst, failures = 0.0, []
    cases = chosen_cases(spec)
    for case in cases:
        try:
            error, tensor = check_case(spec, case, impl, device)
        except Exception as problem:  # whatever a backend throws is a failed check, not our crash
            failures.append(f"{case.name}: {type(problem).__name__}: {problem}")
            continue
        worst = max(worst, error)
        if error > 1:
            failures.append(f"{case.name}: {tensor}: error is {error:.3g} times the allowed one")
    return Result(spec.name, impl, len(cases), worst, tuple(failures))


def chosen_cases(spec: OpSpec) -> list[Case]:
    """Spread evenly over the float32 cases of the registry."""
    usable = [
        case
        for case in spec.cases
        if torch.float32 in case.dtypes and not any(word in case.name for word in SKIPPED)
    ]
    step = max(1, len(usable) // CASES_PER_SPEC)
    return usable[::step][:CASES_PER_SPEC]


def check_case(spec: OpSpec, case: Case, impl: str, device: str) -> tuple[float, str]:
    """`(error / allowed, tensor)` of the worst tensor among outputs and gradients."""
    sample = spec.sample(case, torch.float32, device)
    ours = evaluate(spec.resolve(), sample, impl=impl)
    plain = evaluate(spec.resolve_reference(), sample.copy())
    exact = sample.double()
    truth = evaluate(spec.resolve_reference(), exact)
    worst = (0.0, "")
    for name, value in ours.items():
        if spec.name in ("pair_argmax", "dense_correspondence") and name == "output 0":
            error = index_error(value, truth[name], exact)
        else:
            # similarities cancel: a small result is still a difference of numbers of this size
            error = relative_error(value, plain[name], truth[name], 1 / case.temperature)
        if error > worst[0]:
            worst = (error, name)
    return worst


def evaluate(function: Callable[..., Any], sample: Sample, **extra: Any) -> dict[str, Tensor]:
    """Outputs and, for the sum of cos(position) * output, gradients."""
    outputs = function(*sample.args, **sample.kwargs, **extra)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = {f"output {place}": value.detach() for place, value in enumerate(outputs)}
    smooth = [value for value in outputs if value.requires_grad]
    if smooth:
        upstream = [
            torch.arange(value.numel(), device=value.device, dtype=value.dtype)
            .cos()
            .reshape(value.shape)
            for value in smooth
        ]
        leaves = sample.differentiable
        found = torch.autograd.grad(smooth, list(leaves.values()), upstream, allow_unused=True)
        for name, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                named[f"d_{name}"] = gradient
    return named


def relative_error(ours: Tensor, plain: Tensor, truth: Tensor, scale: float) -> float:
    """Largest deviation from the truth over the allowed one; infinities must agree exactly."""
    if not ours.is_floating_point():
        return 0.0 if torch.equal(ours, truth) else float("inf")
    finite = truth.isfinite()
    if ours.shape != truth.shape or not torch.equal(ours[~finite].double(), truth[~finite]):
        return float("inf")
    if not ours[finite].isfinite().all():
        return float("inf")
    if not finite.any():
        return 0.0
    target = truth[finite]
    error = (ours[finite].double() - target).abs().max().item()
    allowed = 4 * (plain[finite].double() - target).abs().max().item()
    allowed += 32 * torch.finfo(torch.float32).eps * max(target.abs().max().item(), scale)
    return error / allowed


def index_error(ours: Tensor, truth: Tensor, exact: Sample) -> float:
    """0 for equal indices; else how far the similarity reached lies below the best one."""
    if torch.equal(ours, truth):
        return 0.0
    query, key = (rows(value.detach()) for value in exact.args[:2])
    shape = (query.shape[0], query.shape[2])
    options = {"temperature": 1.0, "normalize": exact.kwargs.get("normalize", True)}
    reached, best = (
        positive_at(query, key, index.reshape(shape), **options) for index in (ours, truth)
    )
    allowed = 32 * torch.finfo(torch.float32).eps * max(best.abs().max().item(), 1e-30)
    return (best - reached).abs().max().item() / allowed


def speed_line(pixels: int = 2048, channels: int = 64) -> str:
    """One forward and backward of supervised contrast, the default backend and the reference."""
    from .functional import supervised_contrastive

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(pixels, channels, generator=generator, requires_grad=True)
    labels = torch.randint(0, 4, (pixels,), generator=generator)

    def step(impl: str) -> float:
        start = time.perf_counter()
        supervised_contrastive(features, labels, impl=impl).backward()
        return time.perf_counter() - start

    # interleaved, and the best of a few: other work on the machine only ever adds time
    runs = [(step("auto"), step("reference")) for _ in range(4)]
    auto, reference = (1000 * min(times) for times in zip(*runs, strict=True))
    threads = torch.get_num_threads()
    return (
        f"supervised_contrastive, {pixels} pixels x {channels} channels, forward and backward, "
        f"{threads} threads: {auto:.1f} ms; plain torch reference {reference:.1f} ms"
    )
