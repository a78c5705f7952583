"""IDEAL's two stages on a tiny phantom, in this process."""

import dataclasses
import json
import sys

import evaluate
import numpy as np
import pytest
import torch
import train_ideal
from train_tiny import SETTINGS, write_phantom

from medcl_train.engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from medcl_train.engine.config import ConfigError, config_from_dict
from medcl_train.engine.loop import Loop
from medcl_train.engine.profiling import peak_memory, profile, profile_lines, profile_stages
from medcl_train.engine.seeding import seed_everything
from medcl_train.ideal import IdealConfig, build_network, load_pretrained
from medcl_train.training_data import (
    cases_of,
    class_names,
    load_data,
    recipe_of,
    split_of,
    with_task,
)

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


def test_both_stages_run_and_leave_a_whole_run_folder(config):
    folder = config.out / config.exp
    summary = train_ideal.train(config, folder)
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.yaml", "environment.json", "log.txt", "metrics.jsonl", "split.json", "cases.csv",
        "summary.json", "predictions", "checkpoints",
    }  # fmt: skip
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {
        "last.pt", "best.pt", "pretrain.pt", "finetune.pt",
    }  # fmt: skip
    assert summary["mean"]["n_cases"] == 4  # two subjects, two phases
    written = json.loads((folder / "summary.json").read_text())
    assert written["mean"]["dice"]["mean"] == pytest.approx(summary["mean"]["dice"]["mean"])
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__ and "git" in environment
    state = load_checkpoint(folder / "checkpoints" / "last.pt")
    assert state["stage"] == "finetune" and state["iteration"] == config.max_iterations
    assert state["finished"] == ["pretrain", "finetune"]
    assert {"optimizer", "schedule", "scaler", "rng", "best", "config"} <= set(state)

    assert state["ran_on"] == {"device": "cpu", "threads": 1}
    state["ran_on"]["threads"] = 7
    save_checkpoint(folder / "checkpoints" / "last.pt", state)
    Loop(dataclasses.replace(config, resume="auto"), folder, quiet=True).log.close()
    assert "(threads 7 -> 1): sums of plain torch may differ" in (folder / "log.txt").read_text()


def test_the_pretrained_encoder_is_what_fine_tuning_starts_from(config):
    folder = config.out / config.exp
    train_ideal.train(dataclasses.replace(config, max_iterations=0), folder)
    pair = load_checkpoint(folder / "checkpoints" / "pretrain.pt")["modules"]["pair"]
    other = dataclasses.replace(config, pretrained=folder / "checkpoints" / "pretrain.pt")
    net = build_network(other, 4, CPU)
    before = net.encoder.blocks[0][0].weight.clone()
    load_pretrained(other, net)
    for name, tensor in net.encoder.state_dict().items():
        assert torch.equal(tensor, pair[f"encoder_q.{name}"]), name
    assert not torch.equal(before, net.encoder.blocks[0][0].weight)
    load_pretrained(dataclasses.replace(other, init_from="k"), net)
    name = "blocks.0.0.weight"
    assert torch.equal(net.encoder.state_dict()[name], pair[f"encoder_k.{name}"])
    wide = dataclasses.replace(other, widths=(8, 8, 8))
    with pytest.raises(CheckpointError, match=r"widths \(4, 8, 8\), this run \(8, 8, 8\)"):
        load_pretrained(wide, build_network(wide, 4, CPU))


def test_supervised_and_ideal_runs_are_paired(config, data):
    """Same labelled slices, same augmentation, same dropout, same start: the labelled outputs of D1
    in the first iteration are equal bit for bit."""
    outputs = []
    for method in ("supervised", "ideal"):
        stage = train_ideal.Finetuning(dataclasses.replace(config, method=method), data, CPU)
        labeled = [stage.batches.batch(i)[: config.labeled_batch_size] for i in range(9)]
        seed_everything(config.seed, stage.name, 0)
        x, y = stage.augmented(labeled[0], data.labels(labeled[0], CPU)[0], "labeled", 0)
        stage.train_mode()
        outputs.append((labeled, x, y, stage.net(x)[0]))
    assert outputs[0][0] == outputs[1][0]
    for a, b in zip(outputs[0][1:], outputs[1][1:], strict=True):
        assert torch.equal(a, b)


def test_supervised_training_sees_no_unlabelled_slice_and_has_no_second_decoder(config, data):
    stage = train_ideal.Finetuning(dataclasses.replace(config, method="supervised"), data, CPU)
    allowed = set(data.labeled_indices())
    seen = {i for iteration in range(20) for i in stage.batches.batch(iteration)}
    assert seen <= allowed and len(seen) == len(allowed)
    assert len(stage.net.decoders) == 1
    assert set(stage.step(0)) == {"loss"}


def test_unlabelled_labels_never_reach_the_loss(config, data, monkeypatch):
    """Scrambling the labels of all volumes but the labelled ones changes nothing."""
    stage = train_ideal.Finetuning(config, data, CPU)
    seed_everything(0)
    first = float(stage.step(0)["loss"].detach())
    labeled = set(data.labeled_indices())
    original = type(data.pool).__getitem__

    def scrambled(pool, index):
        item = original(pool, index)
        if index not in labeled:
            item["label"] = torch.zeros_like(item["label"])
        return item

    monkeypatch.setattr(type(data.pool), "__getitem__", scrambled)
    stage = train_ideal.Finetuning(config, data, CPU)
    seed_everything(0)
    assert float(stage.step(0)["loss"].detach()) == first


def test_separate_passes_keep_labelled_statistics_clean(config, data):
    """The labelled outputs do not depend on the unlabelled slices, unless joint_batch asks for
    it."""
    seen = {}
    for joint in (False, True):
        for scale in (1.0, 5.0):
            stage = train_ideal.Finetuning(
                dataclasses.replace(config, joint_batch=joint), data, CPU
            )
            original = stage.augmented

            def augmented(indices, labels, stream, it, original=original, scale=scale):
                x, y = original(indices, labels, stream, it)
                return (x * scale if stream == "unlabeled" else x), y

            stage.augmented = augmented
            seed_everything(0)
            stage.train_mode()
            seen[joint, scale] = float(stage.step(0)["loss_supervised"].detach())
    assert seen[False, 1.0] == seen[False, 5.0]
    assert seen[True, 1.0] != seen[True, 5.0]


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "siamese", "match": "proj", "negatives": "batch", "symmetric": True},
        {"key": "two", "match": "backbone", "mutual": True, "negatives": "batch+queue"},
        {"match": "identity", "crop": (1.0, 1.0), "negatives": "image", "intra": True},
        {"match": "radius", "multi_positive": "in", "n_query": 20},
        {"negatives": "queue", "feat_stride": 4, "projection_hidden": 8},
        {"contrast": "hinge", "negatives": "batch+queue", "match": "radius", "symmetric": True},
        {"feat_stride": (2, 4), "projection_hidden": 8, "projection_norm": True},
        {"local_weight": 0.5, "local_warmup": 1, "global_negatives": "queue"},
        {"learn_temperature": True, "view_flip": (0.5, 0.5), "view_blur": 0.0},
        {"decoder2": "fpn", "feature_drop": True, "input_noise": 0.1},
        {"decoder1": "deeplab", "decoder2": "deeplab", "feature_dropout": 0.5},
        {"dice_over": "image", "independent_dropout": False, "threshold": 0.0},
        {"cross_on": "both", "consistency_type": "mse", "feature_noise": 0.3},
        {"cross_norm": "all", "consistency_type": "dice", "joint_batch": True},
        {"optimizer": "sgd", "schedule": "poly", "encoder_lr_scale": 0.1, "augment": "light"},
    ],
    ids=lambda changes: "-".join(str(v) for v in changes.values()),
)
def test_every_option_trains_and_changes_weights(config, data, changes):
    config = dataclasses.replace(config, **changes)
    for stage_class in (train_ideal.Pretraining, train_ideal.Finetuning):
        stage = stage_class(config, data, CPU)
        module = next(iter(stage.modules.values()))
        before = [p.detach().clone() for p in module.parameters() if p.requires_grad]
        for iteration in range(2):  # the queue is empty in the first step
            seed_everything(0, stage.name, iteration)
            loss = stage.step(iteration)["loss"]
            assert torch.isfinite(loss) and loss.requires_grad
            stage.optimizer.zero_grad()
            loss.backward()
            stage.optimizer.step()
        after = [p for p in module.parameters() if p.requires_grad]
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert sum(changed) >= len(changed) // 2


def test_the_reference_implementation_trains_the_same(config, data):
    losses = {}
    for impl in ("auto", "reference"):
        stage = train_ideal.Pretraining(dataclasses.replace(config, impl=impl), data, CPU)
        values = []
        for iteration in range(3):
            seed_everything(0, stage.name, iteration)
            loss = stage.step(iteration)["loss"]
            stage.optimizer.zero_grad()
            loss.backward()
            stage.optimizer.step()
            values.append(float(loss.detach()))
        losses[impl] = values
    assert losses["auto"] == pytest.approx(losses["reference"], rel=1e-4)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_runs_and_learns(config, amp):
    config = dataclasses.replace(config, amp=amp, val_every=0, max_iterations=3)
    loop = Loop(config, config.out / amp, quiet=True)
    data = load_data(config, lambda line: None)
    for stage_class in (train_ideal.Pretraining, train_ideal.Finetuning):
        stage = stage_class(config, data, CPU)
        loop.run(stage)
        for parameter in stage.modules[next(iter(stage.modules))].parameters():
            assert parameter.dtype == torch.float32 and torch.isfinite(parameter).all()
    loop.log.close()


def test_an_existing_run_is_neither_mixed_nor_overwritten_silently(config):
    folder = config.out / config.exp
    train_ideal.train(config, folder)
    with pytest.raises(ConfigError, match="--resume auto.*--overwrite"):
        train_ideal.train(config, folder)
    changed = dataclasses.replace(config, resume="auto", base_lr=0.5)
    with pytest.raises(ConfigError, match=r"base_lr: 0.003 -> 0.5"):
        train_ideal.train(changed, folder)
    (folder / "checkpoints" / "last.pt").write_bytes(b"PK broken")
    with pytest.raises(CheckpointError, match="last.pt is damaged"):
        train_ideal.train(dataclasses.replace(config, resume="auto"), folder)
    again = dataclasses.replace(config, overwrite=True, pretrain_iterations=0, max_iterations=1)
    train_ideal.train(again, folder)
    assert not (folder / "checkpoints" / "pretrain.pt").exists()
    precious = config.out / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not a run folder"):
        train_ideal.train(dataclasses.replace(config, overwrite=True), precious)
    assert (precious / "thesis.txt").exists()


def test_slices_that_do_not_fit_the_network_are_refused(config, data):
    with pytest.raises(ConfigError, match=r"\(30, 32\) must be divisible by 4"):
        load_data(dataclasses.replace(config, size=(30, 32)))
    with pytest.raises(ConfigError, match="feat_stride=16.*1, 2, 4"):
        train_ideal.Pretraining(dataclasses.replace(config, feat_stride=16), data, CPU)
    with pytest.raises(ConfigError, match="4 classes, not num_classes=8"):
        load_data(dataclasses.replace(config, num_classes=8))
    with pytest.raises(ConfigError, match="--data-root"):
        load_data(dataclasses.replace(config, dataset="acdc", data_root=None))


def test_a_loss_that_is_not_finite_stops_with_advice(config, data):
    config = dataclasses.replace(config, base_lr=1e30, optimizer="sgd", schedule="constant")
    loop = Loop(config, config.out / "x", quiet=True)
    with pytest.raises(FloatingPointError, match="finetune near iteration.*learning rate"):
        loop.run(train_ideal.Finetuning(config, data, CPU))
    loop.log.close()


def test_step_times_are_measured_for_each_implementation(config, data):
    stages = {
        impl: train_ideal.Pretraining(dataclasses.replace(config, impl=impl), data, CPU)
        for impl in ("auto", "reference")
    }
    times = profile_stages(stages, 2, CPU, warm_up=1)
    assert set(times) == {"auto", "reference"} and min(times.values()) > 0
    peak = peak_memory(stages["reference"], CPU)
    assert 0.1 < peak < 500 or peak != peak
    assert profile_lines({"a": 1.0}, {"a": 3.0})[0].endswith(" 3 MiB")
    assert profile_lines({"a": 1.0, "b": 2.0})[0].split() == ["a", "1.0", "ms/step", "2.00x"]


@pytest.mark.parametrize("alone", [False, True])
def test_a_profile_compares_with_the_reference_unless_told_not_to(alone, config, data, capsys):
    config = dataclasses.replace(config, profile_steps=1, profile_alone=alone, amp="bf16")
    profile(config, [train_ideal.Pretraining], load=lambda _: data)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "ms/step" in line]
    assert [line[0] for line in lines] == (["auto"] if alone else ["auto", "reference"])


@pytest.mark.parametrize("dataset", ["mmwhs", "ssl4mis", "msd"])
def test_every_layout_trains_from_the_files_to_the_scores(config, tmp_path, monkeypatch, dataset):
    import test_data_loaders as writers

    if dataset == "ssl4mis":
        pytest.importorskip("h5py")
    root = tmp_path / dataset
    if dataset == "msd":
        writers.write_msd(root, [f"hippocampus_{n:03d}" for n in (1, 2, 3, 5, 7, 9)])
    else:
        getattr(writers, f"write_{dataset}")(root)
    changes = {"dataset": dataset, "data_root": root, "labeled_num": 1}
    if dataset == "mmwhs":
        changes |= {"val_num": 0, "test_num": 1}
    if dataset == "ssl4mis":
        changes |= {"val_num": None, "test_num": None}
    summary = train_ideal.train(dataclasses.replace(config, **changes), tmp_path / "run")
    assert summary["mean"]["n_cases"] > 0
    names = class_names(dataset, len(summary["classes"]) + 1)
    assert list(summary["classes"]) == list(names.values())[1:]
    if dataset == "ssl4mis":  # whose cases are h5 files: its network takes NIfTI folders too
        image, label = np.random.rand(20, 24, 3), np.random.randint(0, 4, (20, 24, 3))
        writers.save(tmp_path / "images/scan.nii.gz", image.astype(np.float32))
        writers.save(tmp_path / "labels/scan.nii.gz", label.astype(np.uint8))
        folder = ["--dataset", "folder", "--labels-root", str(tmp_path / "labels")]
        scored = scored_by_program(monkeypatch, tmp_path, tmp_path / "images", *folder)
        assert list(scored["classes"]) == list(summary["classes"])
        assert (tmp_path / "scored/predictions/scan.nii.gz").is_file()


def scored_by_program(monkeypatch, folder, root, *words):
    """summary.json of evaluate.py with the last checkpoint of folder/run."""
    checkpoint = folder / "run" / "checkpoints" / "finetune.pt"
    words = ["--checkpoint", checkpoint, "--data-root", root, "--out", folder / "scored", *words]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    evaluate.main()
    return json.loads((folder / "scored" / "summary.json").read_text())


@pytest.mark.parametrize("labels", [1, 6])
def test_any_msd_task_is_trained_scored_and_named(config, tmp_path, monkeypatch, labels):
    """Also by its checkpoint alone; a network of another task is refused."""
    import test_data_loaders as writers

    names = ["background", *(f"organ {i}" for i in range(labels))]
    root, other = tmp_path / "task", tmp_path / "other"
    writers.write_msd_task(root, [f"la_{n}" for n in range(6)], names)
    config = dataclasses.replace(config, dataset="msd", data_root=root)
    run = with_task(config)
    assert (run.task, run.num_classes, run.class_names) == ("other", labels + 1, tuple(names))
    summary = train_ideal.train(run, tmp_path / "run")
    assert list(summary["classes"]) == names[1:]
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    (tmp_path / "test.list").write_text("\n".join(split["test"]))
    words = ["--cases", tmp_path / "test.list"]
    again = scored_by_program(monkeypatch, tmp_path, root, *words)
    assert list(again["classes"]) == names[1:]
    assert again["mean"]["dice"] == pytest.approx(summary["mean"]["dice"])
    writers.write_msd_task(other, ["la_0"], [*names, "one more"])
    with pytest.raises(ConfigError, match=f"has {labels + 1} classes.*has {labels + 2}"):
        scored_by_program(monkeypatch, tmp_path, other)


def test_an_msd_task_must_say_its_classes_once(config, tmp_path):
    import test_data_loaders as writers

    writers.write_msd_task(tmp_path / "a", ["la_0"], ["background", "left atrium"])
    config = dataclasses.replace(config, dataset="msd", data_root=tmp_path / "a")
    with pytest.raises(ConfigError, match="num_classes=3.*background, left atrium"):
        with_task(dataclasses.replace(config, num_classes=3))
    (tmp_path / "a" / "dataset.json").unlink()
    with pytest.raises(ConfigError, match="give --num-classes"):
        with_task(config)
    assert recipe_of(with_task(dataclasses.replace(config, num_classes=5))).num_classes == 5
    writers.write_msd(tmp_path / "b", ["hippocampus_001"])
    hippocampus = dataclasses.replace(config, data_root=tmp_path / "b")
    assert with_task(hippocampus) == hippocampus and recipe_of(hippocampus).slice_axis == 1


def test_settings_of_loaders_and_pre_processing_reach_them(config, tmp_path):
    import test_data_loaders as writers

    writers.write_mmwhs(tmp_path)
    ct = {"dataset": "mmwhs", "modality": "ct", "variant": "C", "stray_421": "atrium"}
    ct = dataclasses.replace(config, **ct)
    assert [case.case_id for case in cases_of(ct, tmp_path)] == ["ct_train_1001"]
    assert recipe_of(ct).clip and dict(recipe_of(ct).label_map)[421] == 2
    assert not recipe_of(config).n4 and not recipe_of(config).clip
    chosen = recipe_of(dataclasses.replace(config, n4=True, clip=True))
    assert chosen.n4 and chosen.clip
    early = cases_of(dataclasses.replace(config, phases="ED"), config.data_root)
    assert {case.meta["phase"] for case in early} == {"ED"}
    cases = cases_of(config, config.data_root)
    first = split_of(dataclasses.replace(config, draw=-1, val_num=0, test_num=1), cases, 1)
    left = [case.subject for case in cases if case.subject not in first.test]
    assert first.labeled == (left[0],)
