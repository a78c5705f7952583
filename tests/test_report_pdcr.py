"""Pictures and scores in the report of PDCR, in 2-D and 3-D."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import train_tiny
import train_tiny_pdcr

from medcl_train import pdcr
from medcl_train.engine.checkpoint import save_checkpoint
from medcl_train.engine.config import config_from_dict, config_to_dict
from medcl_train.metrics import score_image, summarize_images
from medcl_train.report import pdcr as report
from medcl_train.report import scenes, write_report

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return {
        2: train_tiny_pdcr.write_lesions(folder / "lesions"),
        3: train_tiny.write_phantom(folder / "phantom"),
    }


def settings(roots, dims, tmp_path, **changes):
    values = {2: train_tiny_pdcr.FLAT, 3: train_tiny_pdcr.VOLUMES}[dims]
    values = values | {"data_root": str(roots[dims]), "out": str(tmp_path), "method": "both"}
    return config_from_dict(pdcr.PdcrConfig, values | changes, source="test")


def stored_run(config, folder: Path, shift=0.0):
    """A run folder with a checkpoint of a network that was not trained but for its biases."""
    data = pdcr.load_data(config, lambda line: None)
    network = pdcr.build_network(config, data.num_classes, CPU)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter += shift
    state = {"modules": {"segmenter": network.state_dict()}, "config": config_to_dict(config)}
    (folder / "checkpoints").mkdir(parents=True)
    save_checkpoint(folder / "checkpoints" / "train.pt", state)
    return data, network


@pytest.mark.parametrize("dims", [2, 3])
def test_the_page_holds_scores_and_pictures(roots, dims, tmp_path):
    pytest.importorskip("matplotlib")
    config = settings(roots, dims, tmp_path)
    data, network = stored_run(config, tmp_path / "run", shift=0.1)
    names = {0: "background", 1: "lesion"} if dims == 2 else {0: "b", 1: "RV", 2: "m", 3: "LV"}
    summary, predictions = data.evaluate(
        network, data.test, tmp_path / "run", class_names=names, device=CPU, say=lambda line: None
    )
    page = write_report(config, tmp_path / "run", data, predictions, summary, pdcr.pictures)
    text = page.read_text()
    for name in ("overlays", "affinity", "features", "uncertainty"):
        assert f"figures/{name}.png" in text
        pixels = plt_image(tmp_path / "run" / "figures" / f"{name}.png")
        assert pixels.std() > 0.02 and min(pixels.shape[:2]) > 200, name
    assert ("Jaccard" in text and "mean with background" in text) == (dims == 2)
    assert ("HD95 mm" in text) == (dims == 3)
    found = summary["macro"]["jaccard"] if dims == 2 else summary["mean"]["assd"]
    digits = 3 if dims == 2 else 2
    shown = "–" if np.isnan(found["mean"]) else f"{found['mean']:.{digits}f} ± "
    assert shown in text


def plt_image(path):
    import matplotlib.image

    return matplotlib.image.imread(path)


def test_methods_without_a_part_lack_its_pictures(roots, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("affinities", "features"):
        monkeypatch.setattr(report, name, lambda *arguments: None)
    config = settings(roots, 2, tmp_path, method="backbone")
    data, _ = stored_run(config, tmp_path / "plain")
    shown = " ".join(pdcr.pictures(config, tmp_path / "plain", data, []))
    assert "affinity.png" in shown and "uncertainty.png" not in shown
    # layers that do not fit are no error for a method that does not use them
    odd = replace(config, encoder_samples=(10_000,))
    assert pdcr.pictures(odd, tmp_path / "plain", data, []) == []
    assert pdcr.pictures(config, tmp_path / "nothing", data, []) == []


def test_runs_are_compared_on_the_same_images(roots, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    folders = {}
    for method in ("backbone", "pdcr"):
        folders[method] = tmp_path / method
        stored_run(settings(roots, 2, tmp_path, method=method), folders[method])
    seen = {}
    monkeypatch.setattr(report, "features", lambda scenes, runs, path, names: seen.update(
        scenes=scenes, runs=runs, path=path, names=names))  # fmt: skip
    report.compare_features(folders, roots[2], tmp_path / "two.png")
    assert list(seen["runs"]) == ["backbone", "pdcr"] and seen["path"] == tmp_path / "two.png"
    assert len(seen["scenes"]) == 3  # the test images
    assert list(seen["names"].values()) == ["background", "lesion"]


@pytest.mark.parametrize("dims", [2, 3])
def test_a_scene_is_what_the_network_sees_and_what_is_drawn(roots, dims, tmp_path):
    config = settings(roots, dims, tmp_path)
    data = pdcr.load_data(config, lambda line: None)
    network = pdcr.build_network(config, data.num_classes, CPU).eval()
    scene = scenes.scene_of(data.test[0], config.input_size)
    assert scene.image.shape[2:] == config.input_size
    network(scene.image)
    assert scene.truth.shape == scene.drawn.shape[:2] and (scene.truth > 0).any()
    if dims == 3:  # the slice of the volume with most foreground is drawn
        assert np.array_equal(scene.image[0, 0, scene.index].numpy(), scene.drawn)
        one = data.test[0]
        most = int((one.label > 0).sum((1, 2)).argmax())
        assert (scene.truth > 0).sum() <= (one.label[most] > 0).sum()
        assert any(
            np.array_equal(scene.drawn, window)
            for window in np.lib.stride_tricks.sliding_window_view(
                one.image[most], (32, 32)
            ).reshape(-1, 32, 32)
        )


def test_affinity_is_the_one_that_the_loss_asks_for(roots, tmp_path):
    """The wanted matrix of a scene, averaged over the sizes of the patches, from the masks by
    hand."""
    config = settings(roots, 2, tmp_path, method="pdcr")
    data = pdcr.load_data(config, lambda line: None)
    network = pdcr.build_network(config, data.num_classes, CPU).eval()
    contrast = pdcr.Contrast(config, network, data.num_classes).eval()
    scene = scenes.scene_of(data.test[0], config.input_size)
    cells = scenes.sampled(scene, network, contrast)
    assert list(cells) == list(contrast.names)
    features, shares, places, kind = cells[contrast.names[0]]
    assert np.array_equal(kind, scene.truth[tuple(places.T)])
    assert features.shape[0] == shares.shape[0] == len(places) == 16 and shares.shape[1] == 1
    mask = np.pad(scene.truth.astype(float), 4, constant_values=np.nan)
    for share, (row, column) in zip(shares[:, 0], places, strict=True):
        windows = [
            mask[row + 4 - h : row + 5 + h, column + 4 - h : column + 5 + h] for h in (2, 3, 4)
        ]
        assert share == pytest.approx(np.mean([np.nanmean(w) for w in windows]), abs=1e-6)


def test_numbers_of_the_pictures_by_hand():
    shares = np.array([[0.9, 0.1], [0.0, 0.0], [0.2, 0.8], [0.3, 0.1], [0.4, 0.0]])
    # background: the pure patch, then the mixed one; class 1 towards purer; class 2
    assert scenes.by_class(shares, np.array([1, 0, 2, 0, 1])).tolist() == [1, 3, 4, 0, 2]
    unit = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    inside, between = scenes.mean_cosines(unit, np.array([0, 0, 1]))
    assert inside == pytest.approx(0.6) and between == pytest.approx((0.0 + 0.8) / 2)
    assert np.isnan(scenes.mean_cosines(unit, np.zeros(3))[1])
    wanted = np.array([[1, 0.5, 0], [0.5, 1, 0.25], [0, 0.25, 1.0]])
    assert scenes.correlation(wanted, 3 * wanted - 1) == pytest.approx(1)
    assert np.isnan(scenes.correlation(wanted, np.ones((3, 3))))
    line = np.outer(np.arange(-2.0, 3.0), [0.6, 0.0, 0.8]) + [1.0, 2.0, 3.0]
    flat, explained = scenes.principal(line)
    assert np.abs(flat[:, 0]) == pytest.approx([2, 1, 0, 1, 2]) and explained[0] == pytest.approx(1)


def test_pictures_of_volumes_and_photographs_share_the_overlay(tmp_path):
    """Both summaries of `summarize_images` are rows of the table."""
    from medcl_train.report.page import _scores

    truth = np.arange(16).reshape(4, 4) % 2
    rows = score_image(1 - truth, truth, num_classes=2, case="a")
    summary = summarize_images(rows, {0: "skin", 1: "spot"})
    summary |= {"settings": {"empty": "nan", "unit": "pixels"}, "collapse": {"collapsed": False}}
    text = _scores(summary)
    assert text.count("<tr>") == 4 and "0.000 ± 0.000" in text and "spot" in text
