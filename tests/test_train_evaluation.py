"""Evaluation of a network in 3-D on the source grid, and the check for collapse."""

import dataclasses

import numpy as np
import pytest
import torch
from train_tiny import SETTINGS, write_phantom

from medcl_train.data import load_native, prepare
from medcl_train.engine.config import config_from_dict
from medcl_train.evaluation import collapse_check, evaluate, predict_volume, quick_dice
from medcl_train.ideal import IdealConfig, build_network
from medcl_train.metrics import score_masks
from medcl_train.training_data import class_names, load_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("phantom"))


@pytest.fixture
def config(root, tmp_path):
    values = SETTINGS | {"data_root": str(root), "out": str(tmp_path)}
    values["cache_dir"] = str(root.parent / "cache")
    return config_from_dict(IdealConfig, values, source="test")


@pytest.fixture
def data(config):
    return load_data(config, lambda line: None)


def test_scores_are_those_of_the_prediction_on_the_source_grid(config, data, tmp_path):
    import nibabel

    net = build_network(config, data.num_classes, CPU)
    names = class_names("phantom", 4)
    summary, predictions = evaluate(
        net, data.test, tmp_path, class_names=names, say=lambda line: None
    )
    rows = (tmp_path / "cases.csv").read_text().splitlines()[1:]
    assert len(rows) == 3 * len(data.test)
    for volume in data.test:
        saved = nibabel.load(tmp_path / "predictions" / f"{volume.case.case_id}.nii.gz")
        _, truth, affine, spacing = load_native(volume.case)
        assert saved.shape == truth.shape and np.allclose(saved.affine, affine)
        prediction = np.asarray(saved.dataobj)
        assert np.array_equal(prediction, volume.restore(predictions[volume.case.case_id]))
        p, g = prediction == 3, truth == 3
        expected = 2 * (p & g).sum() / (p.sum() + g.sum())
        row = next(r for r in rows if r.startswith(f"{volume.case.case_id},") and ",3," in r)
        assert float(row.split(",")[3]) == pytest.approx(expected, abs=1e-5)
    assert set(summary["classes"]) == {"RV", "myocardium", "LV"}
    assert summary["settings"]["unit"] == "mm"

    said = []
    options = {"class_names": names, "unit": "voxel", "empty": "worst", "say": said.append}
    summary, _ = evaluate(net, data.test, tmp_path, **options)
    assert summary["settings"]["unit"] == "voxel"
    assert "HD95 voxel" in said[0] and "ASSD voxel" in said[0]
    rows = [r.split(",") for r in (tmp_path / "cases.csv").read_text().splitlines()]
    last = next(r for r in rows if r[0] == volume.case.case_id and r[2] == "3")
    assert float(last[4]) == pytest.approx(score_masks(p, g, empty="worst")["hd"], rel=1e-5)


def test_prediction_does_not_depend_on_the_batch_size_and_keeps_the_mode(config, data):
    net = build_network(config, data.num_classes, CPU).train()
    volume = data.test[0]
    one = predict_volume(net, volume, batch_size=1)
    assert np.array_equal(one, predict_volume(net, volume, batch_size=32))
    assert one.shape == volume.image.shape and one.dtype == np.uint8
    assert net.training
    truth_like = quick_dice(net, [volume], head="d1", device=CPU)
    assert 0 <= truth_like <= 1 and np.isnan(quick_dice(net, [], head="d1", device=CPU))


def test_collapse_is_seen_in_the_volumes():
    def row(label, predicted, true):
        return {"class": label, "predicted_ml": predicted, "true_ml": true}

    names = {1: "RV", 2: "LV"}
    fine = collapse_check([row(1, 90, 100), row(1, 50, 60), row(2, 11, 10)], names)
    assert not fine["collapsed"] and fine["volume_ratio"]["RV"] == pytest.approx(140 / 160)
    bad = collapse_check([row(1, 90, 100), row(2, 500, 10)], names)
    assert bad["collapsed"] and "LV predicted at 50.00" in bad["reason"]


def test_cases_without_label_are_predicted_only(config, data, tmp_path):
    bare = [dataclasses.replace(v.case, label=None) for v in data.test[:2]]
    volumes = prepare(bare, data.recipe)
    said = []
    net = build_network(config, 4, CPU)
    summary, predictions = evaluate(net, volumes, tmp_path, class_names={}, say=said.append)
    assert summary is None and len(predictions) == 2
    assert said == ["2 of 2 cases have no label: predicted, not scored"]
    assert len(list((tmp_path / "predictions").iterdir())) == 2
    assert not (tmp_path / "cases.csv").exists()
