"""How the Gradient Filter's kernels find the k-th score and what they do about equal ones."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from op_checks import OUTPUTS, check_op

from medcl_kernels.cases import Case
from medcl_kernels.losses.gradient_mitigator import meeting_order
from medcl_kernels.ops.pair_filtered_grad import pair_filtered_grad
from medcl_kernels.ops.pair_topk import pair_topk
from medcl_kernels.registry import spec

COUNTING = import_module("medcl_kernels.triton.pair_threshold")
MITIGATING = import_module("medcl_kernels.triton.mitigate_rows")


def equal_rows(key=False):
    """Rows that are all alike: every negative has one score, every positive another."""
    labels = torch.tensor([[[0, 1, 0, -1, 1, 1, 0, 1] * 5 + [1]]])
    query = torch.ones(1, 4, 41)
    statistics = torch.tensor([5.0, 0.01, 5.0])[:, None, None].expand(3, 1, 41).contiguous()
    statistics[:, labels[0] == -1] = torch.tensor([torch.inf, 0.0, torch.inf])[:, None]
    tensors = {"query_labels": labels, "statistics": statistics, "ignore_index": -1}
    if key:
        tensors |= {"key": query.clone(), "key_labels": labels}
    return {"query": query, "temperature": 0.3, **tensors}


@pytest.mark.parametrize(
    ("scope", "k", "key"),
    [
        ("global", [[500]], True),
        ("global", [[7], [301]], False),
        ("anchor", [[3] * 20 + [11] * 21], False),
        ("image", [[10**6]], False),
    ],
    ids=["global, key", "quotas", "anchor", "all"],
)
def test_equal_scores_are_taken_in_the_order_of_their_place(scope, k, key):
    arguments = equal_rows(key) | {"scope": scope, "k": torch.tensor(k)}
    arguments["capacity"] = min(2000, int(arguments["k"].sum()))
    found, wanted = (pair_topk(**arguments, impl=impl) for impl in ("triton", "reference"))
    for name, ours, theirs in zip(OUTPUTS["pair_topk"], found, wanted, strict=True):
        if ours.is_floating_point():
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0, msg=name)
        else:
            assert torch.equal(ours, theirs), name


def test_the_rule_and_the_list_have_the_same_gradient():
    """Among equal scores, too: the rule cuts where the list ends."""
    arguments = equal_rows() | {"scope": "global", "normalize": False, "impl": "triton"}
    arguments["query"] = query = torch.full((1, 4, 41), 0.5, requires_grad=True)
    found = pair_topk(**arguments, k=torch.tensor([[333]]), capacity=333)
    listed = dict(zip(("anchor", "candidate", "gradient"), found[:3], strict=True))
    rule = dict(zip(("threshold", "cut"), found[3:], strict=True))
    up = torch.linspace(-1, 2, 41).unsqueeze(0)
    gradients = []
    for selection in (listed, rule):
        value = pair_filtered_grad(up, **arguments, **selection)
        gradients.append(torch.autograd.grad(value, query, up)[0])
    assert gradients[0].abs().max() > 1
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


GLOBAL = Case("global", "", (1, 8, 70), ignored=0.2, options=(("scope", "global"),))
IMAGES = Case("images", "", (2, 8, 66), pairs="batch")
KEY = Case("key", "", (1, 8, 64), (1, 8, 70), options=(("indexed", True), ("positives", 2)))


@pytest.mark.parametrize(
    ("case", "window"),
    [(IMAGES, "as drawn"), (KEY, "as drawn"), (GLOBAL, "too high"), (GLOBAL, "too low")],
    ids=lambda one: getattr(one, "name", one),
)
def test_a_sample_only_saves_time(case, window, monkeypatch):
    """A window that does not hold the k-th score is noticed."""
    monkeypatch.setattr(COUNTING, "SAMPLED", 16)
    monkeypatch.setattr(COUNTING, "MORE_BITS", 11)
    drawn = COUNTING._sample
    windows = []

    def sample(*arguments):
        interval = drawn(*arguments)
        if window != "as drawn":
            edge = COUNTING.TOP - 1 if window == "too high" else COUNTING.SMALLEST
            interval = interval._replace(
                low=torch.full_like(interval.low, edge),
                high=torch.full_like(interval.low, edge + 1),
            )
        windows.append(interval)
        return interval

    monkeypatch.setattr(COUNTING, "_sample", sample)
    check_op(spec("pair_topk"), case, torch.float32, "triton")
    (one,) = windows
    assert (one.low > COUNTING.SMALLEST).any() or window == "too low"


@pytest.mark.parametrize("perspectives", range(1, 9))
def test_an_order_drawn_on_the_host_reaches_the_device(perspectives):
    """Where `mitigate_gradients` draws it; kernels cannot read the host's memory."""
    order = meeting_order(perspectives, "random", torch.Generator().manual_seed(perspectives))
    assert torch.equal(MITIGATING.order_on(torch.device("cpu"), order), order)
