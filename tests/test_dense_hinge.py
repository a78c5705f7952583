"""`dense_hinge` against a pair-by-pair textbook and torch's own cosine embedding loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import medcl_kernels as medcl

IMPLS = ["reference", "cpu"]


def textbook_hinge(q, k, index, margin, pairs, queue=None, intra=False):
    """Per anchor, pair by pair; index `(B, L, R)`, -1 = none."""
    batch, _, *_ = q.shape
    z, y = (F.normalize(x.flatten(2), dim=1) for x in (q, k))
    values = torch.zeros(index.shape[:2], dtype=q.dtype)
    anchor = (index >= 0).any(2)
    for b in range(batch):
        for i in range(index.shape[1]):
            own = [j for j in index[b, i].tolist() if j >= 0]
            if not own:
                continue
            negatives = []
            for other in {"image": [b], "batch": range(batch), "queue": []}[pairs]:
                for j in range(y.shape[2]):
                    if other != b or j not in own:
                        negatives.append(y[other, :, j])
            if intra:
                negatives += [z[b, :, j] for j in range(z.shape[2]) if j != i]
            if queue is not None:
                negatives += list(F.normalize(queue, dim=1))
            values[b, i] = sum(1 - z[b, :, i] @ y[b, :, j] for j in own) / len(own)
            excess = sum((z[b, :, i] @ n - margin).clamp(min=0) for n in negatives)
            values[b, i] = values[b, i] + excess / max(1, len(negatives))
    return values, anchor


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pairs", ["image", "batch", "queue"])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("several", [1, 3])
def test_hinge_equals_the_textbook(impl, pairs, everything, several):
    q, k = torch.randn(2, 2, 3, 2, 4, dtype=torch.float64).unbind(0)
    q.requires_grad_(), k.requires_grad_()
    queue = torch.randn(5, 3, dtype=torch.float64) if everything or pairs == "queue" else None
    intra = everything and pairs != "queue"
    index = torch.rand(2, 8, 8).argsort(2)[:, :, :several]
    index[torch.rand(index.shape) < 0.3] = -1
    index[0, 5] = -1
    values, anchor = textbook_hinge(q, k, index, 0.3, pairs, queue, intra)
    positives = index.reshape(2, 2, 4, several)
    positives = positives[..., 0] if several == 1 else positives
    options = {"margin": 0.3, "pairs": pairs, "queue": queue, "intra_view": intra, "impl": impl}
    none = medcl.dense_hinge(q, k, positives, reduction="none", **options)
    torch.testing.assert_close(none.flatten(1), values)
    total = medcl.dense_hinge(q, k, positives, reduction="sum", **options)
    torch.testing.assert_close(total, values.sum())
    mean = medcl.dense_hinge(q, k, positives, **options)
    torch.testing.assert_close(mean, values.sum() / anchor.sum())
    actual = torch.autograd.grad(mean, (q, k))
    expected = torch.autograd.grad(values.sum() / anchor.sum(), (q, k))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_hinge_is_the_cosine_embedding_loss_of_torch(impl):
    q, k = torch.randn(2, 20, 6).unbind(0)
    i, j = torch.meshgrid(torch.arange(20), torch.arange(20), indexing="ij")
    target = torch.where(i == j, 1, -1)
    pairs = F.cosine_embedding_loss(
        q[i.flatten()], k[j.flatten()], target.flatten(), margin=0.2, reduction="none"
    ).reshape(20, 20)
    expected = pairs[i == j].mean() + pairs[i != j].mean()
    torch.testing.assert_close(medcl.dense_hinge(q, k, margin=0.2, impl=impl), expected)
    both = medcl.dense_hinge(q, k, margin=0.2, symmetric=True, impl=impl)
    back = medcl.dense_hinge(k, q, margin=0.2, impl=impl)
    torch.testing.assert_close(both, 0.5 * (expected + back))


def test_an_index_given_twice_excludes_one_candidate_only():
    q, k = torch.randn(2, 1, 3, 4).unbind(0)
    twice, once = torch.tensor([[[2, 2]] * 4]), torch.tensor([[[2, -1]] * 4])
    for impl in IMPLS:
        a, b = (medcl.dense_hinge(q, k, index, impl=impl) for index in (twice, once))
        torch.testing.assert_close(a, b)


def test_hinge_never_holds_all_pairs():
    """The largest tensor that its kernels make, of 3000 x 5000 pairs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from medcl_kernels.ops import pair_hinge as module

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for one in made if isinstance(made, (tuple, list)) else (made,):
                if isinstance(one, torch.Tensor):
                    self.numel = max(self.numel, one.numel())
            return made

    q, k = torch.randn(1, 4, 3000), torch.randn(1, 4, 5000)
    index = torch.randint(0, 5000, (1, 3000))
    with Largest() as seen:
        module._forward(q, k, index, 0.5, False)
        module._backward_kernel(torch.ones(1, 3000), q, k, index, 0.5, False, True, True)
    assert seen.numel == module.ROWS * module.COLUMNS
