"""The trainer of PDCR and UAFS on tiny data, in 2-D and 3-D, in this process, and what surrounds
it."""

import csv
import dataclasses
import json
import re
import shutil
import sys
import typing

import compare
import evaluate
import numpy as np
import pytest
import torch
import train_pdcr
import yaml
from PIL import Image
from train_tiny import write_phantom
from train_tiny_pdcr import FLAT, VOLUMES, write_lesions

import medcl_kernels as mk
from benchmarks.pdcr_step import released
from medcl_kernels.losses.patch_affinity_contrast import SHIFTS
from medcl_kernels.patch_compat import COMPAT
from medcl_kernels.reference.pair_affinity import FORMS
from medcl_train import pdcr
from medcl_train.engine.checkpoint import load_checkpoint
from medcl_train.engine.config import ConfigError, TrainConfig, config_from_dict, parse_config
from medcl_train.engine.runlog import read_metrics
from medcl_train.engine.seeding import seed_everything
from medcl_train.pdcr import PdcrConfig

CPU = torch.device("cpu")
METHODS = ("backbone", "pdcr", "uafs", "both")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {
        "lesions": write_lesions(folder / "lesions"),
        "phantom": write_phantom(folder / "phantom"),
        "cache": folder / "cache",
    }


def tiny(roots, out, settings, **changes) -> PdcrConfig:
    values = settings | {"out": str(out), "cache_dir": str(roots["cache"])} | changes
    values["data_root"] = str(roots[values["dataset"]])
    return config_from_dict(PdcrConfig, values, source="test")


@pytest.fixture(params=[FLAT, VOLUMES], ids=["2d", "3d"])
def config(request, roots, tmp_path):
    return tiny(roots, tmp_path, request.param)


def stage_of(config, **changes):
    config = dataclasses.replace(config, **changes)
    return train_pdcr.Training(config, pdcr.load_data(config, lambda line: None), CPU)


def test_a_run_leaves_a_whole_folder_that_evaluation_takes(config, roots, monkeypatch, tmp_path):
    folder = config.out / config.exp
    summary = train_pdcr.train(config, folder)
    assert summary["mean"]["n_cases"] == (3 if config.spatial_dims == 2 else 2)
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    terms = {"encoder", "cross"} | ({"decoder"} if config.spatial_dims == 2 else set())
    assert len(records) == 4 and all(np.isfinite(r[f"loss_{t}"]) for r in records for t in terms)
    # the test scores again, from the checkpoint
    tested = json.loads((folder / "split.json").read_text())["test"]
    (tmp_path / "test.list").write_text("\n".join(tested))
    words = ["--checkpoint", folder / "checkpoints" / "train.pt", "--data-root", config.data_root]
    words += ["--cases", tmp_path / "test.list", "--out", tmp_path / "again"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    evaluate.main()
    scores = [(run / "cases.csv").read_text().splitlines() for run in (folder, tmp_path / "again")]
    assert sorted(scores[0]) == sorted(scores[1])
    # a run that was stopped half-way ends in the same weights
    half = dataclasses.replace(config, exp="half", resume="auto")
    stopped = train_pdcr.Loop(half, half.out / "half")
    stage = stage_of(half)
    stage.iterations = 2
    stopped.run(stage)
    stopped.log.close()
    state = load_checkpoint(half.out / "half" / "checkpoints" / "last.pt")
    assert state["iteration"] == 2
    train_pdcr.train(half, half.out / "half")
    one, other = (
        load_checkpoint(config.out / name / "checkpoints" / "train.pt")["modules"]
        for name in (config.exp, "half")
    )
    assert one.keys() == {"segmenter", "contrast"}
    for module, tensors in one.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other[module][name]), name


def test_all_methods_start_alike_and_see_the_same_batches(config):
    stages = {method: stage_of(config, method=method) for method in METHODS}
    start = {k: v.clone() for k, v in stages["backbone"].net.state_dict().items()}
    seen = {}
    for method, stage in stages.items():
        weights = stage.net.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in start.items())
        blocks = [m for m in stage.net.modules() if isinstance(m, mk.UncertaintyFeatureSelection)]
        assert bool(blocks) == (method in ("uafs", "both"))
        assert (stage.contrast is not None) == (method in ("pdcr", "both"))
        handle = stage.net.register_forward_pre_hook(
            lambda module, inputs, method=method: seen.setdefault(method, inputs[0])
        )
        seed_everything(config.seed, stage.name, 0)
        stage.train_mode()
        values = stage.step(0)
        handle.remove()
        values["loss"].backward()
        trained = [p for module in stage.modules.values() for p in module.parameters()]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        if method == "backbone":
            plain = values["loss"].item()
        elif method == "pdcr":
            assert values["loss_supervised"].item() == plain < values["loss"].item()
    assert all(torch.equal(images, seen["backbone"]) for images in seen.values())


def test_reference_kernels_train_alike(config):
    values = {}
    for impl in ("auto", "reference"):
        stage = stage_of(config, impl=impl)
        seed_everything(config.seed, stage.name, 0)  # dropout of the blocks
        values[impl] = stage.step(0)
    for name, value in values["auto"].items():
        torch.testing.assert_close(value, values["reference"][name], rtol=1e-5, atol=1e-6)


def test_the_published_way_of_a_step_gives_the_same_loss(config):
    """benchmarks/pdcr_step.py compares steps that compute the same."""
    values, gradients = {}, {}
    for name, change in (("fused", lambda stage: stage), ("released", released)):
        stage = change(stage_of(config))
        seed_everything(config.seed, stage.name, 0)
        values[name] = stage.step(0)
        values[name]["loss"].backward()
        gradients[name] = next(stage.net.parameters()).grad
    assert type(stage.contrast.loss).__name__ == "ReleasedLoss"
    for name, value in values["fused"].items():
        torch.testing.assert_close(value, values["released"][name], rtol=1e-5, atol=1e-6)
    # rounding of float32, through all layers
    difference = (gradients["fused"] - gradients["released"]).norm()
    assert difference < 1e-3 * gradients["fused"].norm()


def test_layers_of_deeplab_are_those_of_the_paper(roots, tmp_path):
    """specs/pdcr.md §1.2 and §2, with the published channels."""
    config = tiny(
        roots, tmp_path, FLAT, width=32, middle_blocks=0, size=[128, 128], rates=[6, 12, 18],
        uafs_places=["encoder", "aspp", "decoder"], encoder_samples=[], decoder_samples=[],
        cross_samples=None,
    )  # fmt: skip
    net = pdcr.build_network(config, 2, CPU)
    blocks = {
        name.removesuffix(".uafs"): module.logits[0].in_channels
        for name, module in net.named_modules()
        if isinstance(module, mk.UncertaintyFeatureSelection)
    }
    assert list(blocks.values()) == [32, 64, 1536, 1536, 2048, *[256] * 4, 1280, 48, 304]
    drops = pdcr.uafs_layers(config, net)
    assert {v for k, v in drops.items() if k.startswith("encoder")} == {0.0}
    assert {v for k, v in drops.items() if not k.startswith("encoder")} == {0.1}
    contrast = pdcr.Contrast(config, net, 2)
    layers = contrast.loss.layers
    assert [(v.stride, v.receptive_field, v.samples, v.weight) for v in layers.values()] == [
        ((2, 2), (7, 7), 64, 0.1), ((4, 4), (19, 19), 32, 0.1),
        ((4, 4), (19, 19), 32, 0.01), ((4, 4), (27, 27), 8, 0.01),
    ]  # fmt: skip
    assert contrast.cross_names == ("encoder.conv2.2", "encoder.block1")  # before the block
    adapters = [module[0] for module in contrast.loss.adapters.values()]
    assert [(a.in_channels, a.out_channels, a.stride) for a in adapters] == [
        (64, 32, (8, 8)), (128, 32, (4, 4)),
    ]  # fmt: skip


def test_unet_backbone_and_every_way_to_choose_cells(roots, tmp_path):
    changes = [
        {"sampler": "regular", "encoder_steps": [8, 4]},
        {"sampler": "dense", "terms": ["encoder"]},
        {"sampler": "stride", "border": 2},
        {"compat": "receptive_field2d", "patches": "receptive_field", "size": [64, 64]},
        {"average": "ratio", "size_weights": [1.0, 2.0, 3.0], "cross_before_uafs": False},
    ]
    for own in changes:
        config = tiny(roots, tmp_path, FLAT, model="unet", **own)
        values = stage_of(config).step(0)
        assert values["loss"].isfinite() and values["loss"] > values["loss_supervised"], own


def test_words_of_the_settings_are_those_of_the_loss():
    hints = typing.get_type_hints(PdcrConfig)

    def offered(name):
        parts = typing.get_args(hints[name])
        return {word for part in parts for word in typing.get_args(part) or (part,)} - {NONE}

    assert offered("form") == set(FORMS) and offered("shift") == set(SHIFTS)
    assert offered("compat") == {"none", *COMPAT}
    for name in ("reduction", "layer_reduction", "divergence", "average", "patches"):
        assert offered(name) == {BASE[name], *(own[name] for own in READINGS if name in own)}


NONE = type(None)
BASE = {
    "reduction": "mean",
    "layer_reduction": "sum",
    "divergence": "sum",
    "average": "loss",
    "patches": "hierarchical",
}
ONE_FIELD = {"patches": "receptive_field", "average": "ratio", "size_weights": (2.0,)}
READINGS = [  # each of them changes the loss
    {"form": "release2d"},
    {"divergence": "half"},
    {"shift": "max"},
    {"shift": "max_attached"},
    {"reduction": "sum"},
    {"layer_reduction": "mean"},
    {"average": "ratio"},
    {"average": "ratio", "size_weights": (1.0, 2.0, 3.0)},
    {"patches": "receptive_field"},
    ONE_FIELD,
    {"compat": "release2d"},
    {"compat": "nov2021"},
    {"compat": "receptive_field2d", "patches": "receptive_field"},
]
RELEASED_3D = [
    {"layer_reduction": "sum"},
    {"compat": "release3d", "patches": "receptive_field"},
]


@pytest.mark.parametrize("dims", [2, 3])
def test_every_reading_trains(roots, tmp_path, dims):
    room = {"size": [80, 80], "encoder_samples": [16, 4], "decoder_samples": [4, 4]}
    settings = {2: FLAT | room, 3: VOLUMES | {"size": [16, 32, 32], "sampler": "regular"}}[dims]
    config = tiny(roots, tmp_path, settings)
    stage = stage_of(config)
    images, labels, _ = stage.data.batch([0, 1], torch.Generator().manual_seed(0), CPU)
    with pdcr.Taps(stage.net, stage.contrast.taps) as taps:
        stage.net(images)
    found = {}
    for own in ({}, *(READINGS if dims == 2 else RELEASED_3D)):
        contrast = pdcr.Contrast(
            dataclasses.replace(config, **own), stage.net, stage.data.num_classes
        )
        values = contrast(taps.features, labels)
        leaves = [taps.features[name] for name in contrast.taps] + list(contrast.parameters())
        gradients = torch.autograd.grad(values["loss_pdcr"], leaves, retain_graph=True)
        assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients), own
        norm = torch.stack([g.norm() for g in gradients]).sum()
        found[str(own)] = values["loss_pdcr"].item(), norm.item()
        # logged is what the term is more than for features that are all equal
        terms, offsets = (
            contrast.loss.terms(taps.features, labels),
            contrast.loss.offsets(taps.features),
        )
        logged = [terms[name] - offsets[name] for name in contrast.encoder_names]
        torch.testing.assert_close(values["loss_encoder"], torch.stack(logged).mean())
    if dims == 2:  # one receptive field: its weight is no matter
        assert found.pop(str(ONE_FIELD)) == found[str({"patches": "receptive_field"})]
        assert found["{'shift': 'max'}"][0] == found["{'shift': 'max_attached'}"][0]
    assert len({f"{value:.5g} {norm:.5g}" for value, norm in found.values()}) == len(found), found


def test_the_weights_of_november_2021(roots, tmp_path):
    config = tiny(roots, tmp_path, FLAT, compat="nov2021")
    weights = [config.setting(f"{name}") for name in ("encoder_weights", "decoder_weights")]
    assert weights == [(1.64, 0.41), (0.041, 2.56)] and config.setting("cross_weight") == 0.041
    own = dataclasses.replace(config, encoder_weights=(1.0,), cross_weight=0.0)
    assert own.setting("encoder_weights") == (1.0,) and own.setting("cross_weight") == 0.0


def test_real_photographs_train_and_are_scored(shared_data, tmp_path):
    """Ten lesions of ISIC 2017."""
    source, root = shared_data / "isic2017_256", tmp_path / "isic"
    names = sorted(path.stem for path in (source / "images").glob("*.jpg"))[:10]
    for folder, ending in (("images", ".jpg"), ("masks", "_segmentation.png")):
        (root / folder).mkdir(parents=True)
        for name in names:
            shutil.copy(source / folder / f"{name}{ending}", root / folder)
    values = FLAT | {"dataset": "isic", "data_root": str(root), "out": str(tmp_path)}
    config = config_from_dict(PdcrConfig, values, source="test")
    summary = train_pdcr.train(config, tmp_path / "run")
    assert summary["mean"]["n_cases"] == 3
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert len(records) == 4 and all(np.isfinite(r["loss_encoder"]) for r in records)
    for path in (tmp_path / "run" / "predictions").glob("*.png"):
        mask = np.array(Image.open(root / "masks" / f"{path.stem}_segmentation.png"))
        assert np.array(Image.open(path)).shape == mask.shape and mask.any() and not mask.all()


def test_pictures_of_uncertainty_and_of_what_is_compared(roots, tmp_path):
    stage = stage_of(tiny(roots, tmp_path, FLAT))
    x, y, _ = stage.data.batch([0, 1], torch.Generator().manual_seed(0), CPU)
    maps = pdcr.uncertainty_maps(stage.net, x)
    assert set(maps) == set(pdcr.uafs_layers(stage.config, stage.net))
    assert all(0 <= u.min() and u.max() <= 1 and u.shape[0] == 2 for u in maps.values())
    with pdcr.Taps(stage.net, stage.contrast.taps) as taps:
        stage.net(x)
    rows, ratios, places = stage.contrast.sampled("encoder.conv2", taps.features, y)
    assert rows.shape == (2, 4, 16) and ratios.shape == (3, 2, 1, 16)
    row, column = places[5].tolist()  # an inner cell: windows of 5, 7 and 9
    for share, half in zip(ratios[:, 0, 0, 5], (2, 3, 4), strict=True):
        window = y[0, row - half : row + half + 1, column - half : column + half + 1]
        assert share == pytest.approx(window.float().mean().item())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch_sizes": [5, 33]}, "a window of 33 is larger than the image"),
        ({"encoder_samples": [300, 16]}, "300 samples of a 16 x 16 grid"),
        ({"encoder_layers": ["encoder.conv9"]}, "no layer 'encoder.conv9'"),
        ({"size": [40, 40]}, "divisible by 16"),
        ({"size": [32, 32, 32]}, "2-D: size needs 2"),
        ({"uafs_layers": ["encoder.conv9"]}, "no layer 'encoder.conv9'"),
        ({"patches": "receptive_field", "size": [16, 16]}, "receptive field"),
        ({"labeled_fraction": 1.5}, "labeled_fraction"),
    ],
)
def test_settings_that_do_not_fit_say_what_and_where(roots, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        stage_of(tiny(roots, tmp_path, FLAT, **changes))


def test_the_paired_study_of_pdcr(roots, tmp_path, monkeypatch):
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(FLAT | {"max_iterations": 1}))
    words = ["--trainer", "pdcr", "--config", tmp_path / "settings.yaml", "--out", tmp_path / "s"]
    words += ["--data-root", roots["lesions"], "--draws", "1@50%", "2@2", "--jobs", "1"]
    words += ["--arms", "backbone", "both"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
    used = {}

    def here(job):
        folder, finished, command = job
        train_pdcr.train(parse_config(PdcrConfig, command[2:]), folder)
        used[folder.name] = json.loads((folder / "split.json").read_text())["labeled"]
        assert finished.is_file()

    monkeypatch.setattr(compare, "execute", here)
    compare.main()
    assert {name: len(labeled) for name, labeled in used.items()} == {
        f"{arm}-{draw}": count
        for arm in ("backbone", "both")
        for draw, count in (("n50pc-draw0", 4), ("n2-draw0", 2), ("n2-draw1", 2))
    }
    assert used["backbone-n2-draw1"] == used["both-n2-draw1"] != used["both-n2-draw0"]
    page = (tmp_path / "s" / "results.md").read_text()
    assert "| 50% | both − backbone |" in page and "pre-training" not in page
    assert "| macro JA |" in page and "HD95" not in page
    assert (tmp_path / "s" / "features-n2-draw0.png").is_file()


def test_the_table_of_readings_names_every_setting_of_pdcr(repo):
    """docs/pdcr.md: each option exists, and no reading is missing."""
    lines = (repo / "docs" / "pdcr.md").read_text().splitlines()
    tables = "\n".join(line for line in lines if line.startswith("| ") and "---" not in line)
    named = {name.replace("-", "_") for name in re.findall(r"[` ]--([a-z0-9-]+)", tables)}
    settings = {field.name for field in dataclasses.fields(PdcrConfig)}
    own = settings - {field.name for field in dataclasses.fields(TrainConfig)}
    own -= {"lesion_images", "head", "definition", "unit"}  # not readings of the paper
    assert named - settings == set()
    assert own - named == set()


def test_a_prediction_is_written_at_the_size_of_its_file(roots, tmp_path):
    config = tiny(roots, tmp_path, FLAT, method="backbone", max_iterations=1)
    train_pdcr.train(config, tmp_path / "run")
    with open(tmp_path / "run" / "cases.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        found = np.array(Image.open(tmp_path / "run" / "predictions" / f"{row['case']}.png"))
        mask = roots["lesions"] / "masks" / f"{row['case']}_segmentation.png"
        truth = np.array(Image.open(mask))
        assert found.shape == (40, 40) and set(np.unique(found)) <= {0, 255}
        assert float(row["accuracy"]) == pytest.approx((found == truth).mean())
