"""The modules: losses that only hold options, the projection head, the queue of negatives."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F

import medcl_kernels as medcl


def test_modules_call_the_functions_with_their_options():
    q, k = torch.randn(2, 2, 8, 5, 5).unbind(0)
    labels = torch.randint(0, 3, (2, 5, 5))
    queue = torch.randn(7, 8)
    options = {"temperature": 0.2, "pairs": "batch", "intra_view": True}
    loss = medcl.InfoNCELoss(**options)
    assert torch.equal(loss(q, k, queue=queue), medcl.info_nce(q, k, queue=queue, **options))
    assert "temperature=0.2" in repr(loss) and "pairs='batch'" in repr(loss)
    options = {"margin": 0.2, "pairs": "batch", "reduction": "sum"}
    loss = medcl.DenseHingeLoss(**options)
    assert torch.equal(loss(q, k, queue=queue), medcl.dense_hinge(q, k, queue=queue, **options))
    assert "margin=0.2" in repr(loss)
    options = {"temperature": 0.2, "form": "pixel", "reduction": "sum"}
    loss = medcl.SupervisedContrastiveLoss(**options)
    expected = medcl.supervised_contrastive(q, labels, **options)
    assert torch.equal(loss(q, labels), expected)
    assert torch.equal(
        loss(q, labels, k, labels),
        medcl.supervised_contrastive(q, labels, key=k, key_labels=labels, **options),
    )
    assert not list(loss.parameters())


def test_a_parameter_as_temperature_belongs_to_the_module():
    loss = medcl.InfoNCELoss(temperature=torch.nn.Parameter(torch.tensor(0.1)))
    assert len(list(loss.parameters())) == 1 and "learnable" in repr(loss)
    loss(torch.randn(9, 4), torch.randn(9, 4)).backward()
    assert loss.temperature.grad.isfinite()


@pytest.mark.parametrize("dims", [2, 3])
def test_projection_head_shapes_and_variants(dims):
    x = torch.randn(2, 6, *(4, 5, 3)[:dims])
    plain = medcl.DenseProjectionHead(6, 10, spatial_dims=dims)
    assert [type(layer).__name__ for layer in plain] == [f"Conv{dims}d"]
    assert plain(x).shape == (2, 10, *x.shape[2:]) and plain[0].bias is not None
    hidden = medcl.DenseProjectionHead(6, 10, hidden_channels=7, spatial_dims=dims)
    names = [type(layer).__name__ for layer in hidden]
    assert names == [f"Conv{dims}d", "ReLU", f"Conv{dims}d"]
    assert hidden(x).shape == (2, 10, *x.shape[2:])
    norm = medcl.DenseProjectionHead(6, 10, hidden_channels=7, batch_norm=True, spatial_dims=dims)
    names = [type(layer).__name__ for layer in norm]
    assert names == [f"Conv{dims}d", f"BatchNorm{dims}d", "ReLU", f"Conv{dims}d"]
    assert norm[0].bias is None and norm[3].bias is None
    # A 1x1 convolution is the same matrix at every pixel.
    weight = plain[0].weight.flatten(1)
    expected = torch.einsum("oc,bc...->bo...", weight, x) + plain[0].bias.reshape(-1, *[1] * dims)
    torch.testing.assert_close(plain(x), expected)


def numbered(first, last, channels=2):
    """Rows whose direction tells their number."""
    angle = torch.arange(first, last) * 0.05
    return torch.stack([angle.cos(), angle.sin()], 1)[:, :channels]


def numbers(rows):
    return (torch.atan2(rows[:, 1], rows[:, 0]) / 0.05).round().long().tolist()


def test_queue_replaces_the_oldest_rows_first():
    queue = medcl.MemoryQueue(5, 2)
    assert len(queue) == 0 and queue.negatives().shape == (0, 2)
    queue.enqueue(numbered(0, 3) * 7)
    assert numbers(queue.negatives()) == [0, 1, 2]  # no zeros of an unfilled queue
    torch.testing.assert_close(queue.negatives().norm(dim=1), torch.ones(3))
    queue.enqueue(numbered(3, 7))
    assert len(queue) == 5 and sorted(numbers(queue.negatives())) == [2, 3, 4, 5, 6]
    queue.enqueue(numbered(7, 8))
    assert sorted(numbers(queue.negatives())) == [3, 4, 5, 6, 7]
    queue.enqueue(numbered(8, 20))  # more than it holds: the last ones stay
    assert sorted(numbers(queue.negatives())) == [15, 16, 17, 18, 19]
    queue.enqueue(numbered(20, 22))
    assert sorted(numbers(queue.negatives())) == [17, 18, 19, 20, 21]
    queue.enqueue(numbered(22, 27))  # exactly as many as it holds
    assert sorted(numbers(queue.negatives())) == [22, 23, 24, 25, 26]


def test_queue_state_survives_saving_copying_and_conversion():
    queue = medcl.MemoryQueue(5, 2)
    queue.enqueue(numbered(0, 7))
    stored = io.BytesIO()
    torch.save(queue.state_dict(), stored)
    stored.seek(0)
    other = medcl.MemoryQueue(5, 2)
    other.load_state_dict(torch.load(stored))
    twins = [queue, other, copy.deepcopy(queue)]
    for twin in twins:
        twin.enqueue(numbered(7, 9))
        assert len(twin) == 5
        assert torch.equal(twin.negatives(), queue.negatives())
    assert int(queue.pointer) == 4 and int(queue.count) == 5
    assert queue.double().negatives().dtype == torch.float64
    with pytest.raises(RuntimeError, match="size mismatch"):
        medcl.MemoryQueue(6, 2).load_state_dict(other.state_dict())


def test_queue_pools_dense_maps_and_its_rows_are_safe_negatives():
    queue = medcl.MemoryQueue(4, 3)
    dense = torch.randn(2, 3, 4, 5, requires_grad=True)
    queue.enqueue(dense)
    torch.testing.assert_close(queue.negatives(), F.normalize(dense.detach().mean((2, 3)), dim=1))
    assert not queue.negatives().requires_grad
    q = torch.randn(2, 3, 6, requires_grad=True)
    loss = medcl.info_nce(q, torch.randn(2, 3, 6), queue=queue.negatives())
    queue.enqueue(torch.randn(9, 3))  # before backward: the loss keeps its own copy
    loss.backward()
    assert q.grad.isfinite().all()
    empty = medcl.MemoryQueue(4, 3).negatives()
    a, b = torch.randn(2, 2, 3, 6).unbind(0)
    assert torch.equal(medcl.info_nce(a, b, queue=empty), medcl.info_nce(a, b))
    alone = medcl.info_nce(a, b, queue=empty, pairs="queue")
    assert alone == 0  # nothing but the positive itself in the denominator
