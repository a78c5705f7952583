"""IDEAL's two stages on a tiny phantom, in this process."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import train_ideal
from medcl_train.data import load_native, prepare
from medcl_train.engine.checkpoint import CheckpointError, load_checkpoint
from medcl_train.engine.config import ConfigError, config_from_dict
from medcl_train.engine.loop import Loop
from medcl_train.engine.profiling import profile_lines, profile_stages
from medcl_train.engine.seeding import seed_everything
from medcl_train.evaluation import collapse_check, evaluate, predict_volume, quick_dice
from medcl_train.ideal import IdealConfig, build_network, load_pretrained
from medcl_train.training_data import class_names, load_data
from train_tiny import SETTINGS, write_phantom

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
    """The labelled outputs do not depend on the unlabelled slices, unless joint_batch asks for it."""
    seen = {}
    for joint in (False, True):
        for scale in (1.0, 5.0):
            stage = train_ideal.Finetuning(dataclasses.replace(config, joint_batch=joint), data, CPU)
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


def test_a_loss_that_is_not_finite_stops_with_advice(config, data):
    config = dataclasses.replace(config, base_lr=1e30, optimizer="sgd", schedule="constant")
    loop = Loop(config, config.out / "x", quiet=True)
    with pytest.raises(FloatingPointError, match="finetune near iteration.*learning rate"):
        loop.run(train_ideal.Finetuning(config, data, CPU))
    loop.log.close()


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


def test_step_times_are_measured_for_each_implementation(config, data):
    stages = {
        impl: train_ideal.Pretraining(dataclasses.replace(config, impl=impl), data, CPU)
        for impl in ("auto", "reference")
    }
    times = profile_stages(stages, 2, CPU)
    assert set(times) == {"auto", "reference"} and min(times.values()) > 0
    assert profile_lines({"a": 1.0, "b": 2.0})[0].split() == ["a", "1.0", "ms/step", "2.00x"]


class _Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


def test_a_kill_before_or_after_any_checkpoint_write_loses_nothing(config, monkeypatch):
    from medcl_train.engine import loop as loop_module

    config = dataclasses.replace(config, resume="auto", test_num=1)
    whole = config.out / "whole"
    writes = []
    save = loop_module.save_checkpoint

    def counting(path, state):
        writes.append(path.name)
        save(path, state)

    monkeypatch.setattr(loop_module, "save_checkpoint", counting)
    train_ideal.train(config, whole)
    assert writes.count("last.pt") == 4 and {"pretrain.pt", "best.pt", "finetune.pt"} < set(writes)
    expected = load_checkpoint(whole / "checkpoints" / "finetune.pt")["modules"]["segmenter"]

    for moment in range(len(writes)):
        for written in (False, True):
            calls = []

            def deadly(path, state, calls=calls, moment=moment, written=written):
                calls.append(path.name)
                if len(calls) == moment + 1:
                    if written:
                        save(path, state)
                    raise _Killed
                save(path, state)

            folder = config.out / f"{moment}-{written}"
            monkeypatch.setattr(loop_module, "save_checkpoint", deadly)
            with pytest.raises(_Killed):
                train_ideal.train(config, folder)
            monkeypatch.setattr(loop_module, "save_checkpoint", save)
            train_ideal.train(config, folder)
            got = load_checkpoint(folder / "checkpoints" / "finetune.pt")["modules"]["segmenter"]
            for name, tensor in expected.items():
                assert torch.equal(tensor, got[name]), (writes[moment], written, name)
