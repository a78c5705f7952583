"""Meta labels and batches of GCL, and its settings."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from train_tiny_gcl import BASE

from medcl_train.data import Case
from medcl_train.engine.config import ConfigError, TrainConfig
from medcl_train.gcl import (
    GclConfig,
    GroupedBatches,
    meta_labels,
)


def volume(case_id, subject, depth, **meta):
    case = Case(case_id, subject, None, meta=meta)
    return SimpleNamespace(case=case, image=np.zeros((depth, 4, 4)))


def pool(*volumes):
    return SimpleNamespace(volumes=list(volumes))


CINE = pool(
    volume("p1_ed", "p1", 4, phase="ED"),
    volume("p1_es", "p1", 4, phase="ES"),
    volume("p2_ed", "p2", 5, phase="ED"),
    volume("p2_x", "p2", 5, phase=""),
)


def test_meta_labels_come_from_the_cases():
    labels = meta_labels(CINE, ("slice", "patient", "phase"), threshold=None, parts=4)
    assert labels.codes["patient"].tolist() == [0] * 8 + [1] * 10
    assert labels.codes["phase"].tolist() == [0] * 4 + [1] * 4 + [0] * 5 + [-1] * 5
    # GLCL: parts of round(S / 4) slices, the last takes the rest
    assert labels.codes["slice"].tolist() == [0, 1, 2, 3] * 2 + [0, 1, 2, 3, 3] * 2
    assert labels.positions[:4].tolist() == [0.25, 0.5, 0.75, 1.0]
    brain = pool(
        *(volume(f"hippocampus_{n:03d}", f"s{(n + 1) // 2}", 2) for n in (1, 2, 7)),
        volume("other", "s9", 1),
    )
    side = meta_labels(brain, ("side",), threshold=None).codes["side"]
    assert side.tolist() == [1, 1, 0, 0, 1, 1, -1]
    group = pool(volume("a", "a", 1, group="DCM"), volume("b", "b", 1, group="HCM"))
    assert meta_labels(group, ("group",), threshold=None).codes["group"].tolist() == [0, 1]


def test_positions_are_positive_below_the_threshold_strictly():
    labels = meta_labels(CINE, ("slice",), threshold=0.25)
    assert labels.positives("slice", 0).tolist() == [4, 8, 9, 13, 14]  # not 0.25 and 0.5
    labels = meta_labels(CINE, ("slice",), threshold=0.26)
    assert labels.positives("slice", 0).tolist() == [1, 4, 5, 8, 9, 13, 14]


def test_a_missing_meta_label_leaves_only_the_other_view():
    labels = meta_labels(CINE, ("patient", "phase"), threshold=None)
    assert len(labels.positives("phase", 13)) == 0
    batch = labels.batch([0, 13, 14], torch.device("cpu"))
    assert batch.same("phase").int().tolist() == [
        [1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 1],
    ] * 2  # fmt: skip
    assert -100 not in batch.codes["phase"]
    partners = batch.partners("phase", 0, 0)
    assert partners.tolist() == [3, 4, 5, 0, 1, 2]


@pytest.mark.parametrize(
    ("names", "threshold", "message"),
    [
        (("vendor",), None, "perspective vendor: no case.*slice, patient, one, phase"),
        (("one",), None, "perspective one: all training slices have the one label '7'"),
        (("slice",), 0.9, "no two training slices are 0.9"),
    ],
)
def test_perspectives_that_cannot_tell_slices_apart_are_refused(names, threshold, message):
    data = pool(volume("a", "a", 4, phase="ED", one=7), volume("b", "b", 4, phase="ES", one=7))
    with pytest.raises(ConfigError, match=message):
        meta_labels(data, names, threshold=threshold)


def test_every_anchor_of_a_batch_has_a_positive_of_every_perspective():
    labels = meta_labels(CINE, ("slice", "patient", "phase"), threshold=0.3)
    batches = GroupedBatches(labels, 8, seed=3)
    seen = set()
    for iteration in range(12):
        batch = batches.at(iteration)
        assert len(batch) == 8 == len(set(batch.tolist()))
        assert batch.tolist() == GroupedBatches(labels, 8, seed=3).at(iteration).tolist()
        for anchor in batch[::4]:
            seen.add(int(anchor))
            for name in labels.names:
                if len(labels.positives(name, anchor)):
                    assert set(labels.positives(name, anchor)) & set(batch.tolist()), name
    assert seen == set(range(18))  # anchors run through all slices


def test_partners_share_the_meta_label_and_are_another_slice():
    labels = meta_labels(CINE, ("slice", "patient"), threshold=0.3).batch(
        [0, 1, 4, 9, 17], torch.device("cpu")
    )
    found = {name: set() for name in labels.names}
    for name in labels.names:
        for iteration in range(20):
            partners = labels.partners(name, 1, iteration // 2, draw=iteration % 2)
            assert labels.same(name)[torch.arange(10), partners].all()
            own = labels.slices == labels.slices[partners]
            alone = labels.same(name).sum(1) == 2
            assert torch.equal(own, alone) and (partners != torch.arange(10)).all()
            found[name].add(tuple(partners.tolist()))
    assert all(len(draws) > 10 for draws in found.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positives": "label"}, "pixel-scope batch"),
        ({"positives": "label", "pixel_scope": "batch", "perspectives": ()}, "slice-label part"),
        ({"positives": "cam", "pixel_scope": "batch"}, "pixel-scope pair"),
        ({"pairs_per_image": 2, "pixel_scope": "batch"}, "pixel-scope pair"),
        ({"pixel_grid": 1}, "at least 2"),
        ({"score": "img_cam", "image_weight": 0.0}, "image-weight"),
        ({"score": "product", "pixel_level": "decoder"}, "pixel-level encoder"),
        ({"use": "recompute"}, "--quota"),
        ({"use": "pos_full_den", "pixel_form": "pixel"}, "pixel_form"),
        ({"quota": (0.0, 0.0)}, "quota needs two shares"),
        ({"quota": (0.1, 0.1), "filter_by": "quantile"}, "takes no quota"),
        ({"filter_by": "threshold", "score": "pix_rep"}, "score=pix_sim"),
        ({"pixel_level": "decoder", "decoder_stride": 16}, "decoder_stride=16"),
        ({"conflict": "cosine", "mitigator": "mean"}, "is about pcgrad"),
        ({"branches": "joint", "mitigator": "pcgrad_rep_row"}, "ends in _param"),
        ({"mitigate_scope": "all", "mitigator": "mean"}, "end in _param"),
        ({"mitigate_before_norm": True}, "_rep_"),
        ({"score": "pix_rep", "mitigator": "pcgrad_rep_row"}, "mitigate-before-norm"),
        ({"mitigator": "pair_consensus", "use": "pos_full_den"}, "mask_grad"),
        ({"mitigator": "pair_consensus", "queue_size": 8}, "queue-size"),
        ({"keep": 0.0}, "nothing to learn from"),
        ({"image_weight": 0.0, "pixel_weight": 0.0}, "nothing to learn from"),
        ({"perspectives": ("patient", "patient")}, "must differ"),
        ({"slice_threshold": 0.0}, "slice_threshold"),
        ({"pixel_temperature": 0.0}, "pixel_temperature must be positive"),
        ({"base_temperature": -1.0}, "base_temperature must be positive"),
        ({"view_flip": (0.5, 2.0)}, "two probabilities"),
        ({"crop": (0.9, 0.5)}, "crop needs"),
        ({"dropout": (0.1,)}, "one value per level"),
        ({"pretrain_batch_size": 1}, "at least 2"),
        ({"direction": "undirected", "score": "pix_rep"}, "--score pix_sim"),
        ({"direction": "undirected", "symmetric": False}, "--symmetric"),
        ({"direction": "undirected", "filter_by": "anchor"}, "two units of filter_by=anchor"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BASE, **changes)


def test_defaults_depend_on_the_data_set():
    assert GclConfig(dataset="acdc").perspective_names == ("slice", "patient", "phase")
    assert GclConfig(dataset="mmwhs").perspective_names == ("slice", "patient")
    assert GclConfig(dataset="acdc").threshold == 0.35
    assert GclConfig(dataset="msd").threshold == 0.1
    assert GclConfig(slice_label="partition").threshold is None


def test_the_table_of_readings_names_every_setting_of_gcl(repo):
    """docs/gcl.md: each option exists, and no setting of pre-training is missing."""
    lines = (repo / "docs" / "gcl.md").read_text().splitlines()
    tables = "\n".join(line for line in lines if line.startswith("| ") and "---" not in line)
    named = {name.replace("-", "_") for name in re.findall(r"[` ]--([a-z0-9-]+)", tables)}
    settings = {field.name for field in dataclasses.fields(GclConfig)}
    own = settings - {field.name for field in dataclasses.fields(TrainConfig)}
    # not readings of the paper: which runs to make, what to log, how to evaluate
    own -= {
        "method",
        "pretrained",
        "log_selection",
        "head",
        "select",
        "definition",
        "empty",
        "unit",
    }
    assert named - settings == set()
    assert own - named == set()
