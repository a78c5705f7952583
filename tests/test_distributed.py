"""`gather_distributed`: two processes with a part of a batch each against one with all of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import two_ranks
from two_ranks import CASES, Pair, one_process, outcome, whole_data

import medcl_kernels as medcl

DTYPES = [torch.float64, torch.float32]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    two = Pair(str(tmp_path_factory.mktemp("group") / "meeting_point"))
    yield two
    two.close()


def together(answers: list[dict[str, Any]], by_row: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What the ranks hold as one process would: some tensors row by row, of the rest the sum."""
    whole = {}
    for name in answers[0]:
        parts = [torch.from_numpy(answer[name]) for answer in answers]
        whole[name] = torch.cat(parts) if name in by_row else torch.stack(parts).sum(0)
    return whole


def check(name: str, layout: str, dtype: torch.dtype, reduction: str, pair: Pair) -> None:
    """The tolerance rule of op_checks: twice the error of plain torch in this dtype, and rounding
    on the scale of the numbers."""
    by_row = ("d_x", "d_k", "value") if reduction == "none" else ("d_x", "d_k")
    ours = together(pair.run(two_ranks.step, name, layout, dtype, reduction), by_row)
    data = one_process(*whole_data(name, layout, dtype), CASES[name].flat)
    exact = {part: x.double() if x.is_floating_point() else x for part, x in data.items()}
    options = {"reduction": reduction, "impl": "reference"}
    plain, truth = outcome(name, data, **options), outcome(name, exact, **options)
    if reduction == "mean":  # DistributedDataParallel takes the mean of the ranks' gradients
        ours = {part: value / two_ranks.RANKS for part, value in ours.items()}
    assert ours.keys() == truth.keys() and len(truth) > 1
    for part, value in ours.items():
        true = truth[part]
        assert value.shape == true.shape and true.isfinite().all() and true.abs().max() > 0, part
        error = (plain[part].double() - true).abs().max()
        size = 16 * torch.finfo(dtype).eps * true.abs().max().clamp_min(10.0)
        worst = (value - true).abs().max()
        assert worst <= 2 * error + size, f"{part} is off by {worst:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", ["even", "ragged", "silent"])
@pytest.mark.parametrize("name", CASES)
def test_every_anchor_has_the_value_and_gradient_of_the_whole_batch(name, layout, dtype, pair):
    check(name, layout, dtype, "none", pair)


@pytest.mark.parametrize("name", ["info_nce", "info_nce_queue", "nt_xent", "patches"])
def test_mean_over_ranks_is_the_loss_of_the_whole_batch(name, pair):
    check(name, "even", torch.float64, "mean", pair)


@pytest.mark.parametrize("name", ["supervised_pixel", "info_nce_symmetric", "filtered_anchor"])
def test_sum_over_ranks_is_the_sum_of_the_whole_batch_however_it_is_shared(name, pair):
    for layout in ("ragged", "silent"):
        check(name, layout, torch.float64, "sum", pair)


@pytest.mark.parametrize("loss", ["info_nce", "supervised"])
def test_data_parallel_training_has_the_gradients_of_one_process(loss, pair):
    truth = two_ranks.gradients(two_ranks.Model(loss), two_ranks.images())
    ranks = pair.run(two_ranks.train_step, loss)
    assert "loss.temperature" in truth and "convolution.weight" in truth
    for name, true in truth.items():
        parts = [torch.from_numpy(one[name]) for one in ranks]
        if name != "loss":
            assert torch.equal(*parts)
        torch.testing.assert_close((parts[0] + parts[1]) / 2, true, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("fault", "own", "seen"),
    [
        ("labels", "ValueError: labels must be (4,)", "rank 1: ValueError: labels must be (4,)"),
        ("type", "TypeError: features must be float64", "rank 1: TypeError: features must be"),
        ("empty", "ValueError: features is empty", "rank 1: ValueError: features is empty"),
        ("form", "ValueError: form must be one of", "another rank refused its arguments"),
        ("finite", "ValueError: features must be finite", "rank 1: ValueError: features must be"),
        ("channels", "features must have the same shape", "rank 0: (4, 3); rank 1: (4, 2)"),
        ("maps", "features must have the same shape", "rank 0: (4, 3); rank 1: (4, 3, 2)"),
        ("dtype", "features must have the same dtype", "torch.float32; rank 1: torch.float64"),
        ("grad", "features must have the same requires_grad", "rank 0: False; rank 1: True"),
        ("loss", "the ranks call different losses", "features, labels; rank 1: key"),
    ],
)
def test_a_fault_of_one_rank_is_an_error_on_all(fault, own, seen, pair):
    first, second = pair.run(two_ranks.fault, fault)
    assert own in second
    assert first.startswith("ValueError: ") and seen in first


def test_groups_and_gather(pair):
    answers = pair.run(two_ranks.groups)
    everyone = torch.cat([torch.from_numpy(one["own"]) for one in answers])
    for one in answers:
        assert torch.equal(torch.from_numpy(one["gathered"]), everyone)


def test_16_bit_rows_and_their_gradients(pair):
    for one in pair.run(two_ranks.mixed_precision):
        assert (torch.from_numpy(one["d_x"]) == 1.5).all()


def test_reference_can_be_differentiated_twice(pair):
    data = whole_data("supervised_out", "ragged", torch.float64)[0]
    ours = together(pair.run(two_ranks.twice), ("d_x",))
    truth = two_ranks.penalty(data)
    torch.testing.assert_close(ours["d_x"], truth["d_x"], rtol=1e-9, atol=1e-10)


def test_compile_leaves_the_loss_out_of_its_graph_and_says_so(pair):
    for message in pair.run(two_ranks.compiled):
        assert "gather_distributed exchanges sizes and tensors between processes" in message


# ---- one process

x, k = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind(0)
LABELS = torch.arange(18).reshape(2, 3, 3) % 3
RATIOS = torch.rand(1, 1, 2, 18, generator=torch.Generator().manual_seed(1))
FLAT = x.movedim(1, 3).reshape(18, 4)


def test_without_a_group_nothing_changes():
    on = {"gather_distributed": True}
    for plain, same in [
        (
            medcl.supervised_contrastive(x, LABELS),
            medcl.SupervisedContrastiveLoss(**on)(x, LABELS),
        ),
        (medcl.info_nce(x, k, pairs="batch"), medcl.InfoNCELoss(pairs="batch", **on)(x, k)),
        (
            medcl.filtered_contrastive(x, k, pairs="batch"),
            medcl.FilteredContrastiveLoss(pairs="batch", **on)(x, k),
        ),
        (
            medcl.patch_affinity_contrast(FLAT, RATIOS),
            medcl.patch_affinity_contrast(FLAT, RATIOS, **on),
        ),
        (x, medcl.distributed.gather(x)),
    ]:
        assert torch.equal(plain, same)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda on: medcl.supervised_contrastive(x, LABELS, pairs="image", **on), "own image"),
        (lambda on: medcl.SupervisedContrastiveLoss(pairs="image", **on), "own image"),
        (lambda on: medcl.info_nce(x, k, **on), "own image"),
        (lambda on: medcl.InfoNCELoss(**on), "own image"),
        (lambda on: medcl.info_nce(x, k, pairs="queue", queue=FLAT, **on), "distributed.gather"),
        (lambda on: medcl.FilteredContrastiveLoss(**on), "own image"),
        (lambda on: filtered(labels=LABELS, **on), "needs key="),
        (lambda on: filtered(k, scope="global", **on), "scope='anchor' or 'image'"),
        (lambda on: medcl.filtered_contrastive(FLAT, FLAT, pairs="batch", **on), "flat rows"),
        (lambda on: filtered(k, use="renorm", **on), "use='mask_grad'"),
        (lambda on: filtered(k, positives=LABELS.unsqueeze(3).repeat(1, 1, 1, 2), **on), "labels"),
        (lambda on: medcl.patch_affinity_contrast(x, RATIOS.reshape(1, 2, 2, 9), **on), "flat"),
        (lambda on: medcl.patch_affinity_contrast(FLAT, RATIOS, shift="max", **on), "constant"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_reason(call, reason):
    with pytest.raises(ValueError, match=reason):
        call({"gather_distributed": True})


def filtered(*key, **options):
    return medcl.filtered_contrastive(x, *key, pairs="batch", **options)


def test_only_a_bool_or_a_group_can_be_given():
    with pytest.raises(TypeError, match="ProcessGroup"):
        medcl.supervised_contrastive(x, LABELS, gather_distributed="nccl")
