"""Patch-affinity contrast and the uncertainty gate on the Triton kernels, under the interpreter:
the specification's worked examples, and what users build of the operations (see test_triton.py).
"""

from __future__ import annotations

import copy

import pytest
import test_operations as operations
import test_pdcr_examples as examples
import torch
from op_checks import upstream
from test_patch_dragsaw import blobs

import medcl_kernels as medcl
from medcl_kernels import dispatch
from medcl_kernels.ops import patch_class_ratio, uncertainty_reweight  # noqa: F401
from medcl_kernels.ops.pair_affinity import pair_affinity
from medcl_kernels.ops.registration import kernels
from medcl_kernels.patch_dragsaw import CrossLayer, PatchDragsawLoss, PatchLayer

F32 = torch.float32


@pytest.mark.parametrize("name", examples.SELF)
def test_examples_of_one_layer(name):
    examples.test_one_layer_against_itself(name, "triton", F32)


def test_example_1_pair_by_pair_and_4():
    examples.test_rows_and_pairs_of_example_1("triton", F32)
    examples.test_gradient_of_every_pair_of_example_1("triton", F32)
    for temperature, value in examples.NO_SHIFT:
        examples.test_example_4_the_shift_is_part_of_the_loss("triton", temperature, value, F32)


@pytest.mark.parametrize("shift", ["constant", "max", "max_attached"])
def test_example_7_across_layers(shift):
    examples.test_example_7_across_layers("triton", F32, shift)


def test_examples_8_and_9():
    examples.test_the_gradient_of_the_shift_is_minus_the_sum_over_pairs("triton", F32)
    examples.test_example_8_layers_with_different_numbers_of_samples("triton", F32)
    examples.test_example_9_uncertainty("triton", F32)


@pytest.mark.parametrize("form", ["affinity", "release2d"])
def test_degenerate_examples(form):
    examples.test_equal_ratios_leave_pure_attraction("triton", form, F32)
    # identical features: t = 0, the sums are N; their logarithm is rounded
    axis = torch.eye(8)[3].mul(2).view(1, 8, 1)
    for direction, bound in ((axis, 0.0), (torch.randn(1, 8, 1), 1e-8)):
        x = direction.expand(1, 8, 33).clone().requires_grad_()
        ratios = torch.rand(3, 1, 1, 33)
        loss = medcl.patch_affinity_contrast(x, ratios, form=form, reduction="none", impl="triton")
        wanted = torch.tensor(33.0).log().expand(1, 33)
        torch.testing.assert_close(loss.detach(), wanted, rtol=2 * 2**-23, atol=0)
        (gradient,) = torch.autograd.grad(loss.mean(), x)
        assert gradient.abs().max() <= bound


@pytest.mark.parametrize("against", ["itself", "a key"])
def test_float16_is_as_exact_as_plain_torch_on_rounded_rows(against):
    operations.test_float16_is_as_exact_as_plain_torch_on_rounded_rows(
        "pair_affinity", against, operations.HALF[1]
    )


def test_no_temperature_is_too_cold_for_a_layer_against_itself():
    """Sums without a running maximum: only far pairs vanish, next to a pair whose term is 1."""
    x, r = torch.randn(1, 4, 40), torch.rand(2, 1, 1, 40)
    for temperature in (1e-3, 1e-6):
        log_z, linear = (
            pair_affinity(x, query_ratios=r, temperature=temperature, impl=impl)
            for impl in ("triton", "reference")
        )
        for ours, plain in zip(log_z, linear, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5 / temperature)


def test_gradients_that_are_not_asked_for_change_nothing():
    values = {"query": torch.randn(1, 4, 20), "key": torch.randn(1, 4, 30)}
    values["shift"] = torch.tensor(0.7)
    ratios = {"query_ratios": torch.rand(2, 1, 1, 20), "key_ratios": torch.rand(2, 1, 1, 30)}

    def gradients(*names):
        leaves = {n: value.clone().requires_grad_(n in names) for n, value in values.items()}
        outputs = pair_affinity(**leaves, **ratios, temperature=0.5, impl="triton")
        wanted = [leaves[name] for name in names]
        return torch.autograd.grad(outputs, wanted, [upstream(value) for value in outputs])

    for name, expected in zip(values, gradients(*values), strict=True):
        assert torch.equal(*gradients(name), expected), name


def test_fake_kernels_tell_the_truth():
    ops = kernels("triton")
    x = torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last).flatten(2).requires_grad_()
    maps, ratios = torch.randint(0, 3, (2, 4, 5)), torch.rand(2, 2, 1, 20)
    calls = {
        ops.pair_affinity: (x, None, ratios, None, None, "affinity", 1.0, True),
        ops.patch_class_ratio: (maps, maps.new_zeros(1, 2), [-1, 2, -1, 2], 3, False, False),
        ops.uncertainty_reweight: (x, x[:, :2].detach()),
    }
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operation, arguments in calls.items():
        result = torch.library.opcheck(operation, arguments, test_utils=checks)
        assert set(result.values()) == {"SUCCESS"}


def networks(volume):
    """A loss over two layers and across them, the features it reads, and labels."""
    if volume:  # every option of the published 3-D code
        layers = {
            "a": PatchLayer(2, step=4, receptive_field=7),
            "b": PatchLayer(4, step=2, receptive_field=11),
        }
        options = {"sizes": "receptive_field", "compat": "release3d", "num_classes": 3}
        shape, temperature = (16, 16, 16), 0.5
    else:
        layers = {"a": PatchLayer(2, samples=12, border=1), "b": PatchLayer(4, weight=0.1)}
        options, shape = {"num_classes": 2}, (24, 24)
        temperature = torch.nn.Parameter(torch.tensor(0.8))
    cross = {
        "a": CrossLayer(2, samples=6, channels=5, kernel=2, receptive_field=7),
        "b": CrossLayer(4, samples=6, channels=6, receptive_field=7),
    }
    loss = PatchDragsawLoss(
        layers,
        cross=cross,
        cross_channels=4,
        spatial_dims=len(shape),
        temperature=temperature,
        impl="triton",
        **options,
    )
    features = {
        name: torch.randn(2, channels, *(size // stride for size in shape), requires_grad=True)
        for name, channels, stride in (("a", 5, 2), ("b", 6, 4))
    }
    return loss, features, blobs(2, *shape, classes=options["num_classes"])


@pytest.mark.parametrize("volume", [False, True], ids=["2-D", "3-D"])
def test_patch_dragsaw_trains(volume):
    loss, features, labels = networks(volume)
    plain = copy.deepcopy(loss)
    plain.impl = "reference"
    found = []
    for module in (loss, plain):
        value = module(features, labels)
        leaves = (*features.values(), *module.parameters())
        found.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for ours, expected in zip(*found, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("dims", [2, 3])
def test_inserted_gates_train(dims):
    convolution = torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d
    network = torch.nn.Sequential(convolution(1, 6, 3), torch.nn.ReLU(), convolution(6, 2, 1))
    network = medcl.insert_uafs(network, ["0"], num_logits=3, impl="triton")
    plain = copy.deepcopy(network)
    plain[0].uafs.impl = "reference"
    x = torch.randn(2, 1, *(9, 8, 6)[:dims])
    found = []
    for module in (network, plain):
        y = module(x)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), module.parameters())))
    # a bias in front of a normalisation has no gradient but rounding
    scale = max(expected.abs().max().item() for expected in found[1])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6 * scale)


def test_what_does_not_fit_is_refused_before_a_kernel_reads_it():
    x, r = torch.randn(2, 4, 5), torch.rand(1, 2, 1, 5)
    ops = kernels("triton")
    assert dispatch.select("pair_affinity", "triton", "cpu", F32) == "triton"
    with pytest.raises(ValueError, match=r"ratios must be float32 \(1, 2, 1, 5\)"):
        ops.pair_affinity(x, x, r, r[..., :4], None, "affinity", 1.0, True)
    with pytest.raises(ValueError, match="'affinity', 'release2d'"):
        ops.pair_affinity(x, None, r, None, None, "swapped", 1.0, True)
    with pytest.raises(ValueError, match="come together"):
        ops.pair_affinity(x, x, r, None, None, "affinity", 1.0, True)
    with pytest.raises(ValueError, match="need logits"):
        ops.uncertainty_reweight(x, x[:, :1])
    with pytest.raises(ValueError, match="labels must be"):
        ops.patch_class_ratio(x[0].long(), torch.zeros(1, 2).long(), [0, 1], 2, False, False)
    with pytest.raises(ValueError, match="window is empty"):
        maps = torch.zeros(1, 5, 5).long()
        ops.patch_class_ratio(maps, maps[0, :1, :2], [0, 0, 0, 1], 2, False, False)
    with pytest.raises(RuntimeError, match="float64"):
        medcl.uncertainty_reweight(x.double(), x.double(), impl="triton")
