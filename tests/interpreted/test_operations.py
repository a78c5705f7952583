"""The Triton kernels under the interpreter, against the reference in float64 (see test_triton.py).

float32 rows are judged as every backend's are. float16 rows go to the tensor cores rounded after
the normalisation, so there "plain torch" is the reference run on rows that were rounded likewise.
The interpreter multiplies bfloat16 wrongly: only a GPU can judge that.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_checks import OUTPUTS, check_op, compare, natural_scale, run, upstream

from medcl_kernels.case_shapes import against_key
from medcl_kernels.cases import Case
from medcl_kernels.reference.pairs import unit
from medcl_kernels.registry import spec
from medcl_kernels.triton import engine, launch

# What each is for stands in the registry. 64 x 32 tiles: 200 rows are several of both, ragged.
CASES = {
    "pair_logsumexp": "one_row two_rows channels_1 channels_3 volume batch channels_last "
    "transposed sliced all_ignored duplicates zero_rows cold raw poisoned warm key_batch key_cold "
    "key_no_anchors key_no_candidates key_queue key_poisoned_batch single_class_different "
    "no_positives_same image_all_same cold_all_same three_maps_all_same_different "
    "key_two_maps_all_same_different",
    "pair_positive_log": "two_rows batch all_ignored no_positives single_class zero_rows cold "
    "poisoned key_batch key_cold three_maps key_two_maps",
    "positive_mean": "one_row channels_3 batch flat all_ignored no_positives single_class "
    "zero_rows poisoned key_batch key_poisoned_batch three_maps key_two_maps",
    "positive_at": "key_one_row key_channels_3 key_batch key_sliced key_all_ignored "
    "key_zero_rows key_cold key_poisoned several",
    "pair_argmax": "key_one_row key_batch key_duplicates key_zero_rows key_raw key_sliced",
    "pair_topk": "one_row batch all_ignored zero_rows poisoned_batch key_batch key_no_candidates "
    "batch_anchor indexed_batch indexed_several sine ragged",
    "pair_filtered_grad": "two_rows all_ignored zero_rows cold poisoned_batch key_batch "
    "key_no_anchors batch_anchor indexed_batch indexed_several quotas indexed_listed "
    "poisoned_batch_listed",
    "pair_at": "two_rows zero_rows key_batch",
    "mitigate_rows": "three two_flat eight one channels_last one_vector total consensus "
    "cagrad_flat",
    "info_nce_sum": "key_batch key_poisoned",
    "supervised_sum": "batch poisoned",
    "pair_affinity": "flat zero_rows release2d release2d_cold raw many_classes key_channels_256 "
    "key_volume key_cold",
    "patch_class_ratio": "ragged one_row volume volume_full transposed offset many_classes mask "
    "dense_small dense_small_volume",
    "uncertainty_reweight": "two_rows channels_last sliced volume flat many_logits certain",
}
REGISTRY = [
    pytest.param(name, case, id=f"{name}-{case.name}")
    for name, wanted in CASES.items()
    for case in spec(name).cases
    if case.name in wanted.split()
]
CHANNELS = [Case(f"channels_{d}", "", (1, d, 75), ignored=0.2) for d in (64, 96, 128, 256, 300)]
# more than one launch takes: three and one, three and two, three, three and one
SEVERAL = [
    Case("four", "", (2, 8, 40), maps=4, ignored=0.2),
    Case("key_five", "", (2, 8, 40), (2, 8, 33), maps=5, ignored=0.2, temperature=0.5),
    Case("seven_cold", "", (1, 8, 40), maps=7, ignored=0.2, temperature=0.02),
]
HALF = [Case("float16", "", (2, 20, 75), temperature=t, ignored=0.2) for t in (0.01, 0.07, 0.5)]
DIFFERENTIABLE = ("pair_logsumexp", "pair_positive_log", "positive_mean", "positive_at")


def test_the_list_names_cases_of_the_registry():
    assert len(REGISTRY) == sum(len(wanted.split()) for wanted in CASES.values())


@pytest.mark.parametrize(("name", "case"), REGISTRY)
def test_float32_is_as_exact_as_plain_torch(name, case):
    check_op(spec(name), case, torch.float32, "triton")


@pytest.mark.parametrize("case", CHANNELS, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["pair_logsumexp", "positive_at", "pair_argmax"])
def test_any_number_of_channels(name, case):
    case = case if name == "pair_logsumexp" else against_key(case)
    check_op(spec(name), case, torch.float32, "triton")


@pytest.mark.parametrize("case", SEVERAL, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["pair_logsumexp", "pair_positive_log", "pair_affinity"])
def test_any_number_of_selections_goes_in_launches_of_three(name, case, monkeypatch):
    launched = []

    def counted(kernel, programs, arguments, constants, *rest):
        asked = constants["OPTIONS"][0]
        launched.append(len(asked) if isinstance(asked, tuple) else asked)
        launch.launch(kernel, programs, arguments, constants, *rest)

    monkeypatch.setattr(engine, "launch", counted)
    kinds = ("different", "same", "all", "same", "different", "different", "all")
    shift = ("shift", 0.7) if case.key_shape else ("classes", 2)
    options = {
        "pair_logsumexp": (("kinds", kinds[: case.maps]),),
        "pair_positive_log": (),
        "pair_affinity": (("patches", case.maps), shift),
    }
    case = replace(case, options=options[name])
    check_op(spec(name), case, torch.float32, "triton")
    shares = {4: [3, 1], 5: [3, 2], 7: [3, 3, 1]}[case.maps]
    assert len(launched) >= 2 * len(shares)  # there and back
    assert launched == len(launched) // len(shares) * shares


def rounded(x):
    """Unit rows as the kernels hold them; the rounding has the gradient of the identity."""
    z = unit(x.float(), 1)
    return z + (z.to(x.dtype).float() - z).detach()


@pytest.mark.parametrize("case", HALF, ids=lambda case: f"t{case.temperature}")
@pytest.mark.parametrize("against", ["itself", "a key"])
@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "pair_argmax"])
def test_float16_is_as_exact_as_plain_torch_on_rounded_rows(name, against, case):
    if name in ("positive_at", "pair_argmax") or against == "a key":
        if name in ("positive_at", "pair_argmax") and against == "itself":
            return  # they always have a key
        case = against_key(case)
    one = spec(name)
    names = OUTPUTS.get(name, ("value",))
    sample = one.sample(case, torch.float16)
    ours = run(one.resolve(), sample, names, impl="triton")
    exact = sample.double()
    truth = run(one.resolve_reference(), exact, names)

    def plain_torch(query, key=None, *rest, normalize=True, **options):
        key = None if key is None else rounded(key)
        return one.resolve_reference()(rounded(query), key, *rest, normalize=False, **options)

    plain = run(plain_torch, sample.copy(), names)
    for name, value in ours.items():
        if name == "index":  # the best by the rounded rows, whatever the exact ones say
            scores = rounded(sample.args[0]).transpose(1, 2) @ rounded(sample.args[1])
            reached = scores.gather(2, value.unsqueeze(2))
            assert (scores.amax(2) - reached.squeeze(2)).max() <= 1e-6
        elif value.is_floating_point():
            scale = natural_scale(name, one, case, exact)
            compare(name, value, plain[name], truth[name], scale, one.tolerance, case)
        else:
            assert torch.equal(value, truth[name])


def test_ties_go_to_the_smallest_index():
    """Integers make the similarities exact, so equal ones are equal in every arithmetic."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-2, 3, (2, 4, 71), generator=generator).float()
    key = torch.randint(-2, 3, (2, 4, 203), generator=generator).float()
    index, value = spec("pair_argmax").resolve()(query, key, normalize=False, impl="triton")
    scores = query.transpose(1, 2) @ key
    assert torch.equal(value, scores.amax(2))
    assert torch.equal(index, (scores == scores.amax(2, keepdim=True)).int().argmax(2))


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "pair_affinity", "uncertainty_reweight"])
def test_repeated_runs_give_the_same_bits(name):
    options = (("patches", 4),) if name == "pair_affinity" else ()
    case = Case("ragged", "", (2, 8, 70), (2, 8, 90), ignored=0.2, options=options)
    sample = spec(name).sample(case, torch.float32)
    names = OUTPUTS.get(name, ("value",))
    first = run(spec(name).resolve(), sample, names, impl="triton")
    again = run(spec(name).resolve(), sample.copy(), names, impl="triton")
    for tensor, value in first.items():
        assert torch.equal(value, again[tensor]), tensor


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_that_are_not_asked_for_change_nothing(name):
    case = Case("ragged", "", (1, 8, 40), (1, 8, 70), ignored=0.2)
    sample = spec(name).sample(case, torch.float32)
    together = run(spec(name).resolve(), sample, ("value", "count"), impl="triton")
    for alone in sample.differentiable:
        again = sample.copy()
        for leaf_name, leaf in again.differentiable.items():
            leaf.requires_grad_(leaf_name == alone)
        outputs = spec(name).resolve()(*again.args, **again.kwargs, impl="triton")
        value = outputs[0] if isinstance(outputs, tuple) else outputs
        (gradient,) = torch.autograd.grad(value, again.differentiable[alone], upstream(value))
        assert torch.equal(gradient, together[f"d_{alone}"]), alone
