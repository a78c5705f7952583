"""The losses under torch.compile(fullgraph=True): no graph break, the same values and gradients."""

from __future__ import annotations

import pytest
import torch

import medcl_kernels as medcl

LABELS = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(0))
INDEX = torch.randint(-1, 20, (2, 4, 5), generator=torch.Generator().manual_seed(1))
SEVERAL = torch.randint(-1, 20, (2, 4, 5, 3), generator=torch.Generator().manual_seed(2))
QUEUE = torch.randn(7, 6, generator=torch.Generator().manual_seed(3))
RATIOS = torch.rand(3, 2, 1, 20, generator=torch.Generator().manual_seed(4))
DRAGSAW = medcl.PatchDragsawLoss(
    {"q": medcl.PatchLayer(2, samples=6), "k": medcl.PatchLayer(2)}, num_classes=3, sizes=(3, 5)
)
PIXELS = LABELS.repeat_interleave(2, 1).repeat_interleave(2, 2)


def dragsaw(q, k, impl):
    DRAGSAW.impl = impl
    return DRAGSAW({"q": q, "k": k}, PIXELS)


# One call for every branch of the losses.
CALLS = {
    "identity": lambda q, k, impl: medcl.info_nce(q, k, impl=impl),
    "index": lambda q, k, impl: medcl.info_nce(q, k, INDEX, pairs="batch", impl=impl),
    "all_sets": lambda q, k, impl: medcl.info_nce(
        q, k, INDEX, queue=QUEUE, intra_view=True, impl=impl
    ),
    "queue_none": lambda q, k, impl: medcl.info_nce(
        q, k, INDEX, queue=QUEUE, pairs="queue", reduction="none", impl=impl
    ).sum(),
    "several": lambda q, k, impl: medcl.info_nce(
        q, k, SEVERAL, multi_positive="in", reduction="sum", impl=impl
    ),
    "symmetric": lambda q, k, impl: medcl.info_nce(q, k, symmetric=True, impl=impl),
    "matched": lambda q, k, impl: medcl.info_nce(
        q, k, medcl.dense_correspondence(q, k, mutual=True, impl=impl), impl=impl
    ),
    "hinge": lambda q, k, impl: medcl.dense_hinge(
        q, k, SEVERAL, queue=QUEUE, intra_view=True, margin=0.1, impl=impl
    ),
    "out": lambda q, k, impl: medcl.supervised_contrastive(q, LABELS, impl=impl),
    "in": lambda q, k, impl: medcl.supervised_contrastive(q, LABELS, form="in", impl=impl),
    "pixel_key": lambda q, k, impl: medcl.supervised_contrastive(
        q, LABELS, key=k, key_labels=LABELS, form="pixel", pairs="image", impl=impl
    ),
    "filtered": lambda q, k, impl: medcl.filtered_contrastive(
        q, labels=LABELS, keep=0.3, scope="global", impl=impl
    ),
    "filtered_matches": lambda q, k, impl: medcl.filtered_contrastive(
        q, k, positives=INDEX, keep=9, use="recompute", impl=impl
    ),
    "patch_affinity": lambda q, k, impl: medcl.patch_affinity_contrast(
        q, RATIOS, key=k, key_ratios=RATIOS, shift="max_attached", impl=impl
    ),
    "dragsaw": dragsaw,
    "gate": lambda q, k, impl: medcl.uncertainty_reweight(q, k[:, :2], impl=impl).square().sum(),
    "perspectives": lambda q, k, impl: medcl.supervised_contrastive(
        q, [LABELS, LABELS.flip(1)], impl=impl
    ).sum(),
}


def inputs():
    q, k = torch.randn(2, 2, 6, 4, 5).unbind(0)
    return q.clone().requires_grad_(), k.clone().requires_grad_()


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_fullgraph_equals_eager(name, impl):
    # aot_eager traces forward and backward as inductor does, without its C++ compilation.
    torch._dynamo.reset()
    call = CALLS[name]
    q, k = inputs()
    expected = call(q, k, impl)
    actual = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, impl)
    torch.testing.assert_close(actual, expected)
    wanted = torch.autograd.grad(expected, (q, k), allow_unused=True)
    given = torch.autograd.grad(actual, (q, k), allow_unused=True)
    torch.testing.assert_close(given, wanted)


@pytest.mark.slow
def test_inductor_compiles_a_training_step_with_a_learnable_temperature():
    torch._dynamo.reset()
    head = medcl.DenseProjectionHead(6, 8)
    loss = medcl.InfoNCELoss(temperature=torch.nn.Parameter(torch.tensor(0.2)), impl="cpu")
    labelled = medcl.SupervisedContrastiveLoss(impl="cpu")

    def step(q, k):
        z, y = head(q), head(k)
        return loss(z, y, INDEX) + labelled(z, LABELS)

    q, k = inputs()
    compiled = torch.compile(step, fullgraph=True)
    leaves = (q, k, loss.temperature, *head.parameters())
    expected = torch.autograd.grad(step(q, k), leaves)
    actual = torch.autograd.grad(compiled(q, k), leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_another_batch_size_needs_no_new_graph_break():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(q, k):
        return medcl.info_nce(q, k, pairs="batch", impl="cpu")

    for batch, side in ((2, 4), (3, 5), (4, 6)):
        q, k = torch.randn(2, batch, 6, side, side).unbind(0)
        torch.testing.assert_close(step(q, k), medcl.info_nce(q, k, pairs="batch"))


def test_shape_errors_are_raised_while_tracing():
    torch._dynamo.reset()
    step = torch.compile(lambda q, k: medcl.info_nce(q, k), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="6 channels"):
        step(torch.randn(2, 6, 3), torch.randn(2, 5, 3))
