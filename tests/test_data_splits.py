"""Splits by subject, slice datasets and the two-stream sampler."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from medcl_train.data import (
    IGNORE_INDEX,
    Case,
    DataError,
    Geometry,
    SliceDataset,
    Split,
    TwoStreamBatchSampler,
    Volume,
    label_counts,
    make_split,
    recipe_for,
)
from medcl_train.data.splits import ACDC_TEST, FRACTIONS


def cases_of(dataset, subjects, per_subject=2, labelled=True, **meta):
    return [
        Case(f"{s}_{i}", s, Path(f"{s}_{i}.nii.gz"), Path("gt") if labelled else None,
             meta={"dataset": dataset, **meta})
        for s in subjects for i in range(per_subject)
    ]  # fmt: skip


ACDC = cases_of("acdc", [f"patient{n:03d}" for n in range(1, 101)])


def test_label_fractions_of_the_tables():
    assert label_counts(80, FRACTIONS["acdc"]) == (1, 2, 8, 80)
    assert label_counts(10, FRACTIONS["mmwhs"]) == (1, 2, 4, 10)
    assert label_counts(100, (0.07,)) == (7,) and label_counts(95, (0.001, 0.011)) == (1, 2)


def test_acdc_protocol_has_a_pool_of_80_and_the_known_test_patients():
    split = make_split(ACDC, 8, seed=0)
    assert set(split.test) == set(ACDC_TEST) and len(ACDC_TEST) == 20
    assert {"patient007", "patient010", "patient090"} <= set(ACDC_TEST)
    assert len(split.unlabeled) == 80 and split.val == ()
    assert [len(make_split(ACDC, f).labeled) for f in FRACTIONS["acdc"]] == [1, 2, 8, 80]
    with_val = make_split(ACDC, 2, val=["patient011", "patient071"])
    assert with_val.val == ("patient011", "patient071") and len(with_val.unlabeled) == 78


@pytest.mark.parametrize("seed", range(6))
def test_subjects_are_in_one_part_and_draws_are_nested(seed):
    cases = cases_of("phantom", [f"patient{n:03d}" for n in range(1, 31)])
    splits = [make_split(cases, n, seed) for n in (1, 2, 4, 21)]
    for split in splits:
        parts = [set(split.unlabeled), set(split.val), set(split.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 30
        assert (len(split.test), len(split.val)) == (6, 3)
        assert set(split.labeled) <= set(split.unlabeled)
        chosen = split.select(cases, "labeled")
        assert len(chosen) == 2 * len(split.labeled)  # both phases stay together
        assert Counter(c.subject for c in chosen) == dict.fromkeys(split.labeled, 2)
    for small, large in zip(splits, splits[1:], strict=False):
        assert small.labeled == large.labeled[: len(small.labeled)]
        assert (small.test, small.val, small.unlabeled) == (large.test, large.val, large.unlabeled)


def test_seeds_change_the_draw_and_split_seeds_the_test_set():
    draws = {make_split(ACDC, 2, seed).labeled for seed in range(10)}
    assert len(draws) == 10
    assert make_split(ACDC, 2, 3) == make_split(ACDC, 2, 3)
    cases = cases_of("phantom", [f"p{n}" for n in range(30)])
    assert make_split(cases, 1, 0).test == make_split(cases, 1, 5).test
    assert make_split(cases, 1, 0).test != make_split(cases, 1, 0, split_seed=1).test
    assert make_split(cases, 1, 0) == make_split(cases[::-1], 1, 0)  # order of files is no matter


def test_seed_none_takes_the_list_order_as_ssl4mis_does():
    cases = [
        *cases_of("ssl4mis", ["p9", "p3", "p5"], split="train"),
        *cases_of("ssl4mis", ["p1"], split="val"),
        *cases_of("ssl4mis", ["p2", "p4"], split="test"),
    ]
    split = make_split(cases, 2, seed=None)
    assert split.labeled == ("p9", "p3") and set(split.unlabeled) == {"p9", "p3", "p5"}
    assert split.val == ("p1",) and set(split.test) == {"p2", "p4"}


def test_mmwhs_protocol_tests_on_the_second_ten():
    cases = cases_of("mmwhs", [f"mr_{n}" for n in range(1001, 1021)], 1)
    split = make_split(cases, 0.2, seed=1)
    assert set(split.test) == {f"mr_{n}" for n in range(1011, 1021)}
    assert len(split.unlabeled) == 10 and len(split.labeled) == 2


def test_subjects_without_label_join_the_unlabelled_pool_only():
    cases = cases_of("acdc", [f"a{n}" for n in range(10)])
    cases += cases_of("acdc", ["bare1", "bare2"], labelled=False)
    for seed in range(5):
        split = make_split(cases, 4, seed)
        assert {"bare1", "bare2"} <= set(split.unlabeled)
        assert not {"bare1", "bare2"} & {*split.labeled, *split.val, *split.test}
    with pytest.raises(DataError, match="test names bare1"):
        make_split(cases, 1, test=["bare1"])


def test_impossible_splits_are_refused():
    cases = cases_of("acdc", [f"a{n}" for n in range(10)])
    with pytest.raises(DataError, match="8 labelled subjects asked for, the pool has 7"):
        make_split(cases, 8)
    with pytest.raises(DataError, match="0 labelled"):
        make_split(cases, 0)
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        make_split(cases, 1.5)
    with pytest.raises(DataError, match="leaves no training subject"):
        make_split(cases, 1, test=10)
    with pytest.raises(DataError, match="names a3"):
        make_split(cases, 1, test=["a3"], val=["a3"])
    with pytest.raises(DataError, match="names nobody"):
        make_split(cases, 1, val=["nobody"])
    assert make_split(cases, 1, test=["a3"], val=2).test == ("a3",)
    for change in ({"val": ("a",)}, {"test": ("a",)}, {"unlabeled": ("b",)},
                   {"unlabeled": ("a", "a")}):  # fmt: skip
        fields = {"labeled": ("a",), "unlabeled": ("a", "b"), "val": ("c",), "test": ("d",)}
        with pytest.raises(DataError, match="split"):
            Split(**{**fields, **change})


def test_split_files_carry_their_hash(tmp_path):
    split = make_split(ACDC, 2, seed=7, val=3)
    path = split.save(tmp_path / "sub/split.json")
    assert Split.load(path) == split and Split.load(path).sha256 == split.sha256
    stored = json.loads(path.read_text())
    assert stored["sha256"] == split.sha256 and len(split.sha256) == 64
    changes = {"seed": 8, "val": [], "test": stored["test"][:-1], "name": "other",
               "labeled": stored["labeled"][::-1]}  # fmt: skip
    for field, value in changes.items():  # each a valid split, but not the one that was written
        path.write_text(json.dumps({**stored, field: value}))
        with pytest.raises(DataError, match="split.json.*was changed after it was written"):
            Split.load(path)
    path.write_text(json.dumps({**stored, "test": [*stored["test"], stored["labeled"][0]]}))
    with pytest.raises(DataError, match="split.json.*in both"):
        Split.load(path)


def test_select_refuses_data_that_lack_a_subject():
    split = make_split(ACDC, 2, seed=0)
    rest = [case for case in ACDC if case.subject != split.test[0]]
    with pytest.raises(DataError, match=split.test[0]):
        split.select(rest, "test")
    with pytest.raises(ValueError, match="part must be"):
        split.select(ACDC, "train")


# Slices


def volume(subject, depth=3, label=True, missing=(), seed=0):
    random = np.random.RandomState(seed)
    geometry = Geometry((8, 8, depth), tuple(map(tuple, np.eye(4))), (1.0,) * 3, None, (2, 1, 0),
                        (8, 8), (1.0,) * 3)  # fmt: skip
    meta = {"dataset": "acdc"} | ({"missing_classes": missing} if missing else {})
    case = Case(
        subject, subject, Path(f"{subject}.nii.gz"), Path("gt") if label else None, meta=meta
    )
    labels = random.randint(0, 4, (depth, 8, 8)).astype(np.uint8) if label else None
    image = random.rand(depth, 8, 8).astype(np.float32)
    return Volume(case, image, labels, geometry, recipe_for("acdc", size=8))


def test_slices_are_the_planes_of_the_volumes():
    volumes = [volume("a", 3), volume("b", 1, seed=1), volume("c", 5, seed=2)]
    data = SliceDataset(volumes)
    assert len(data) == 9
    items = [data[i] for i in range(len(data))]
    assert [(i["volume"], i["slice"]) for i in items] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4),
    ]  # fmt: skip
    assert [i["position"] for i in items] == [0, 0.5, 1, 0.5, 0, 0.25, 0.5, 0.75, 1]
    for item in items:
        source = volumes[item["volume"]]
        assert item["image"].shape == (1, 8, 8) and item["image"].dtype == torch.float32
        assert item["label"].dtype == torch.int64
        assert np.array_equal(item["image"][0], source.image[item["slice"]])
        assert np.array_equal(item["label"], source.label[item["slice"]])
    items[0]["image"].zero_()
    assert volumes[0].image[0].any()  # items are copies
    assert data.indices(["c", "a"]) == [0, 1, 2, 4, 5, 6, 7, 8]
    with pytest.raises(DataError, match="no volume of z"):
        data.indices(["z"])
    with pytest.raises(IndexError):
        data[9]
    assert "label" not in SliceDataset(volumes, labels=False)[0]


def test_pixels_of_classes_nobody_annotated_are_ignored():
    partial = volume("a", missing=(1,))
    assert partial.present == {2, 3} and volume("b").present == {1, 2, 3}
    source = torch.from_numpy(partial.label[1].astype(np.int64))
    label = SliceDataset([partial])[1]["label"]
    assert torch.equal(label == IGNORE_INDEX, (source == 0) | (source == 1))
    assert torch.equal(label[label != IGNORE_INDEX], source[source >= 2])
    kept = SliceDataset([partial], ambiguous="background")[1]["label"]
    assert torch.equal(kept == IGNORE_INDEX, source == 1) and torch.equal(kept == 0, source == 0)
    loss = torch.nn.functional.cross_entropy(torch.zeros(1, 4, 8, 8), label[None])
    assert loss.item() == pytest.approx(np.log(4))  # torch's own ignore index


def test_volumes_without_label_need_to_be_asked_for():
    volumes = [volume("a"), volume("bare", label=False)]
    with pytest.raises(DataError, match="no label for bare"):
        SliceDataset(volumes)
    data = SliceDataset(volumes, labels="optional")
    assert (data[4]["label"] == IGNORE_INDEX).all() and (data[0]["label"] >= 0).all()
    with pytest.raises(DataError, match="no volume"):
        SliceDataset([])
    with pytest.raises(DataError, match="several sizes"):
        other = volume("c")
        SliceDataset([volume("a"), Volume(other.case, other.image[:, :4], None, other.geometry,
                                          other.recipe)], labels=False)  # fmt: skip


# Sampler


def run(sampler, batches):
    taken = []
    while len(taken) < batches:
        for batch in sampler:
            taken.append(batch)
            if len(taken) == batches:
                break
    return taken


def test_labelled_indices_come_once_per_epoch_and_unlabelled_without_end():
    labeled, unlabeled = range(100, 112), range(7)
    sampler = TwoStreamBatchSampler(labeled, unlabeled, batch_size=5, labeled_batch_size=3, seed=1)
    assert len(sampler) == 4
    epochs = [list(sampler) for _ in range(7)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch[:3]) == list(labeled)
        assert all(len(batch) == 5 and max(batch[3:]) < 7 for batch in epoch)
    orders = {tuple(i for batch in epoch for i in batch[:3]) for epoch in epochs}
    assert len(orders) == 7
    stream = [i for epoch in epochs for batch in epoch for i in batch[3:]]
    assert len(stream) == 56
    for lap in range(8):  # each lap over the pool holds each index once
        assert sorted(stream[7 * lap : 7 * lap + 7]) == list(unlabeled)


def test_a_remainder_is_dropped_and_few_labelled_indices_are_repeated():
    sampler = TwoStreamBatchSampler(range(7), range(50, 60), 6, 3)
    assert len(sampler) == 2
    taken = [i for batch in sampler for i in batch[:3]]
    assert len(taken) == len(set(taken)) == 6
    few = TwoStreamBatchSampler([4, 5], range(50, 60), 8, 5)
    assert len(few) == 1
    for _ in range(4):
        (batch,) = list(few)
        assert Counter(batch[:4]) == {4: 2, 5: 2} and batch[4] in (4, 5) and min(batch[5:]) >= 50


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 9, 17])
def test_resume_at_any_batch_gives_the_same_batches(stop):
    def sampler():
        return TwoStreamBatchSampler(range(13), range(20, 31), 6, 3, seed=5)

    whole = run(sampler(), 20)
    first = sampler()
    run(first, stop)
    state = json.loads(json.dumps(first.state_dict()))  # plain numbers, fit for any checkpoint
    second = sampler()
    second.load_state_dict(state)
    assert run(second, 20 - stop) == whole[stop:]
    assert run(TwoStreamBatchSampler(range(13), range(20, 31), 6, 3, seed=6), 20) != whole


def test_resume_is_exact_with_workers_that_draw_ahead():
    data = SliceDataset([volume("a", 6), volume("b", 9, seed=1)])

    def make():
        return TwoStreamBatchSampler(data.indices(["a"]), data.indices(["b"]), 4, 2, seed=3)

    def key(batch):
        return batch["volume"].tolist(), batch["slice"].tolist()

    whole = [key(batch) for _ in range(3) for batch in DataLoader(data, batch_sampler=make())]
    sampler = make()
    whole = []
    for _ in range(3):
        whole += [key(batch) for batch in DataLoader(data, batch_sampler=sampler)]
    ahead = make()
    loader = iter(DataLoader(data, batch_sampler=ahead, num_workers=1, prefetch_factor=2))
    assert key(next(loader)) == whole[0]
    assert ahead.iteration > 1  # the worker has drawn ahead
    resumed = make()
    resumed.load_state_dict(ahead.state_dict(iteration=1))
    rest = [key(batch) for batch in DataLoader(data, batch_sampler=resumed)]
    assert rest == whole[1:3]


def test_sampler_refuses_wrong_sizes_and_foreign_states():
    for arguments in (([], [1], 4, 2), ([1], [], 4, 2), ([1], [1], 4, 5), ([1], [1], 4, 0)):
        with pytest.raises(ValueError, match="stream is empty|labeled_batch_size"):
            TwoStreamBatchSampler(*arguments)
    supervised = TwoStreamBatchSampler([1, 2, 3, 4], [], 2, 2)
    assert sorted(sum(supervised, [])) == [1, 2, 3, 4]
    state = TwoStreamBatchSampler(range(8), range(9), 4, 2, seed=1).state_dict()
    with pytest.raises(ValueError, match="another run"):
        TwoStreamBatchSampler(range(8), range(9), 4, 2, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="another run"):
        TwoStreamBatchSampler(range(7), range(9), 4, 2, seed=1).load_state_dict(state)
