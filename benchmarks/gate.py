"""Nobody is timed before value and gradients agree with float64.

Truth is the package's reference in float64 on exactly the values that the contender gets (rounded
to its dtype first). That takes seconds, then gigabytes: above `BLOCKS_FROM` pairs the single-set
losses use the chunked peer in float64, which the reference judges at smaller sizes; above
`LARGEST_REFERENCE` everything else is judged on the same case with fewer rows, and the row says so.

Where products are rounded (tf32, bfloat16, float16 on a GPU) the error grows with the size, for
everybody: twice the error of plain torch in the same arithmetic, the chunked peer's, is allowed
too, and five times for peers, which only have to compute the same loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from medcl_kernels.registry import Case, OpSpec

from .contenders import Entry, run_once
from .peers import PEERS

BLOCKS_FROM, LARGEST_REFERENCE = 1024 * 1024, 4096 * 4096  # pairs
# Rounding moves a pair or two of millions across the threshold of a selection, which changes
# gradients by a per cent: a selection is judged where no pair stands that close.
LARGEST_SELECTION = 1024 * 1024
# Relative to the norm of the truth. Wide enough for the float32 rounding of every peer, far below
# what another temperature, denominator or a missing pair would cause.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}
TF32_TOLERANCE = 5e-3  # the rounding of float16
OURS_OVER_PLAIN, PEERS_OVER_PLAIN = 2.0, 5.0
WORST_PLAIN = 0.2  # beyond, plain torch itself says nothing


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes:
        passed: whether it may be timed.
        error: largest relative error over gradients (norm of the difference over norm of the
            truth), or of the value where there is no gradient; None if it could not be computed.
        max_error: largest absolute difference of a gradient over its largest entry.
        value_error: relative error of the outputs.
        reason: what is wrong, if something is.
        judged_on: the name of the case that was compared, if it is not the timed one.
    """

    passed: bool
    error: float | None
    max_error: float | None
    value_error: float | None
    reason: str = ""
    judged_on: str = ""


class Gate:
    """Judges entries; remembers the truth of the last input.

    One truth at a time: at large sizes it is as big as the input.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._truth: Any = None
        self._plain: float | None = None

    def judge(self, entry: Entry) -> Verdict:
        """Runs the entry once.

        Raises:
            Whatever the contender raises; running out of memory is not a wrong result.
        """
        case = judged_case(entry.spec, entry.case)
        entry_judged = replace(entry, case=case)
        outputs, gradients = entry_judged.stepper(entry_judged.sample())()
        if entry.op in ("pair_argmax", "dense_correspondence"):
            verdict = judge_index(entry_judged, outputs[0])
        else:
            true_outputs, true_gradients = truth = self.truth(entry_judged)
            if entry.forward_only:
                true_gradients = {}
            allowed = self.allowed(entry_judged, truth)
            if entry.op == "pair_topk" and entry.products:
                # rounding makes pairs with almost equal scores change places: judge the sizes
                outputs, true_outputs = _sizes(outputs), _sizes(true_outputs)
            verdict = compare(outputs, gradients, true_outputs, true_gradients, allowed)
        return verdict if case == entry.case else replace(verdict, judged_on=case.name)

    def allowed(self, entry: Entry, truth: tuple[tuple[Tensor, ...], dict]) -> float:
        """The relative error that an entry may have."""
        fixed = TF32_TOLERANCE if entry.products == "tf32" else TOLERANCE[entry.dtype]
        if not entry.products or _by_blocks(entry.spec, entry.case) is None:
            return fixed
        if self._plain is None:
            plain = replace(entry, contender="chunk")
            verdict = compare(*plain.stepper(plain.sample())(), *truth, WORST_PLAIN)
            worst = max(verdict.error or 0.0, verdict.value_error or 0.0)
            self._plain = worst if verdict.passed else 0.0
        return max(fixed, (OURS_OVER_PLAIN if entry.ours else PEERS_OVER_PLAIN) * self._plain)

    def truth(self, entry: Entry) -> tuple[tuple[Tensor, ...], dict]:
        """Outputs and gradients in float64."""
        key = (entry.op, entry.case, entry.arithmetic, entry.products, entry.mode, entry.device)
        if key != self._key:
            self._key, self._truth, self._plain = None, None, None
            self._truth = truth(entry)
            self._key = key
        return self._truth


def truth(entry: Entry) -> tuple[tuple[Tensor, ...], dict]:
    """Outputs and gradients of an entry's input in float64."""
    exact = entry.sample().double()
    function = entry.spec.resolve_reference()
    if entry.case.num_pairs() > BLOCKS_FROM:
        function = _by_blocks(entry.spec, entry.case) or function
    outputs, gradients = run_once(function, exact, entry.mode)
    return tuple(value.detach() for value in outputs), gradients


def judged_case(spec: OpSpec, case: Case) -> Case:
    """The case itself, or the same with fewer rows where no truth of its size is at hand."""
    selects = spec.name == "filtered_contrastive"
    largest, rows = (LARGEST_SELECTION, 1024) if selects else (LARGEST_REFERENCE, 2048)
    if case.num_pairs() <= largest or _by_blocks(spec, case) is not None:
        return case

    def cut(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if shape is None:
            return None
        return (rows, shape[1]) if len(shape) == 2 else (2, *shape[1:])

    return replace(
        case, name=f"{case.name}_cut", shape=cut(case.shape), key_shape=cut(case.key_shape)
    )


def _by_blocks(spec: OpSpec, case: Case) -> Callable[..., Any] | None:
    """The chunked peer, if it has this loss and this case."""
    one_set = case.pairs == "batch" or case.rows()[0] == 1
    plain = dict(case.options).get("form", "out") == "out" and not set(dict(case.options)) - {
        "form"
    }
    if spec.name in PEERS["chunk"].functions and one_set and plain and case.maps == 1:
        return PEERS["chunk"].resolve(spec.name)
    return None


def compare(
    outputs: tuple[Tensor, ...],
    gradients: dict[str, Tensor | None],
    true_outputs: tuple[Tensor, ...],
    true_gradients: dict[str, Tensor | None],
    allowed: float,
) -> Verdict:
    """Judges tensors against tensors; `allowed` is relative to the norm of the truth."""
    value_error = max(
        _relative(ours, true)[0] for ours, true in zip(outputs, true_outputs, strict=True)
    )
    errors, largest = [], []
    for name, true in true_gradients.items():
        ours = gradients.get(name)
        if true is None and ours is None:
            continue
        if true is None or ours is None:
            return Verdict(False, None, None, value_error, f"gradient of {name}: only one has it")
        relative, worst = _relative(ours, true)
        errors.append(relative)
        largest.append(worst)
    error = max(errors) if errors else value_error
    max_error = max(largest) if largest else None
    wrong = [
        f"{what} off by {size:.2g}, allowed {allowed:.2g}"
        for what, size in (("value", value_error), ("gradient", error))
        if not size <= allowed  # catches NaN
    ]
    return Verdict(not wrong, error, max_error, value_error, "; ".join(wrong))


def _sizes(selection: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a list of pairs is worth as a whole, and its thresholds."""
    gradient, threshold = selection[2], selection[3]
    return gradient.double().abs().sum().reshape(1), threshold


def _relative(ours: Tensor, true: Tensor) -> tuple[float, float]:
    """Error relative to the norm, and largest error relative to the largest entry."""
    if ours.shape != true.shape:
        return float("inf"), float("inf")
    difference = ours.detach().double() - true.double()
    # infinities that agree (an anchor without candidates) differ by NaN
    agree = ours.detach().double() == true.double()
    difference = difference.masked_fill(agree, 0.0)
    if ours.is_floating_point():
        # half the distance of subnormal numbers is rounding of the dtype, not of the contender:
        # float16 gradients of a mean over thousands of rows are that small
        finest = torch.finfo(ours.dtype)
        rounding = finest.smallest_normal * finest.eps / 2
        difference = (difference.abs() - rounding).clamp_min(0.0)
    finite = true.double().masked_fill(~true.isfinite(), 0.0) if true.is_floating_point() else true
    norm, top = finite.double().norm().item(), finite.double().abs().max().item()
    return difference.norm().item() / (norm or 1.0), difference.abs().max().item() / (top or 1.0)


def judge_index(entry: Entry, index: Tensor) -> Verdict:
    """An argmax may pick another key only where the true similarities are equal to rounding."""
    from medcl_kernels.layout import rows
    from medcl_kernels.reference.pairs import similarities

    exact = entry.sample().double()
    query, key = (x.detach() for x in exact.args[:2])
    if entry.spec.kind == "loss":
        query, key = rows(query), rows(key)
    s = similarities(query, key, None, None, 1.0, entry.case.normalize, False)
    index = index.reshape(s.shape[:2])
    gap = s.max(2).values - s.gather(2, index.unsqueeze(2)).squeeze(2)
    error = gap.max().item()
    allowed = TF32_TOLERANCE if entry.products == "tf32" else TOLERANCE[entry.dtype]
    reason = "" if error <= allowed else f"a match is {error:.2g} less similar than the best"
    return Verdict(not reason, error, None, error, reason)
