"""GCL's two stages on a tiny phantom, in this process, and what surrounds them."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import compare
import evaluate
import pytest
import torch
import train_gcl
import yaml
from train_tiny import write_phantom
from train_tiny_gcl import SETTINGS

from medcl_train import gcl
from medcl_train.engine.checkpoint import CheckpointError, load_checkpoint
from medcl_train.engine.config import ConfigError, config_from_dict, parse_config
from medcl_train.engine.loop import Loop
from medcl_train.engine.runlog import read_metrics
from medcl_train.engine.seeding import seed_everything
from medcl_train.gcl import GclConfig
from medcl_train.report import gcl as figures
from medcl_train.training_data import load_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("phantom"))


@pytest.fixture
def config(root, tmp_path):
    values = SETTINGS | {"data_root": str(root), "out": str(tmp_path)}
    values["cache_dir"] = str(root.parent / "cache")
    return config_from_dict(GclConfig, values, source="test")


@pytest.fixture
def data(config):
    return load_data(config, lambda line: None)


def test_both_stages_run_and_leave_a_whole_run_folder(config, monkeypatch):
    lines, draw_pair = {}, figures._draw_pair

    def counted(fig, axes, name, *rest):
        before = len(fig.artists)
        draw_pair(fig, axes, name, *rest)
        lines[name] = (len(fig.artists) - before, len(rest[-1]))

    monkeypatch.setattr(figures, "_draw_pair", counted)
    folder = config.out / config.exp
    summary = train_gcl.train(dataclasses.replace(config, report=True), folder)
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.yaml", "environment.json", "log.txt", "metrics.jsonl", "split.json", "cases.csv",
        "summary.json", "predictions", "checkpoints", "report.html",
    }  # fmt: skip
    assert summary["mean"]["n_cases"] == 4  # two subjects, two phases
    state = load_checkpoint(folder / "checkpoints" / "last.pt")
    assert state["trainer"] == "gcl" and state["finished"] == ["pretrain", "finetune"]
    page = (folder / "report.html").read_text()
    pictures = re.findall(r'<img src="([^"]+)"', page)
    assert pictures == [
        f"figures/{name}.png" for name in ("curves", "overlays", "conflicts", "selection")
    ]
    for name in pictures:
        content = (folder / name).read_bytes()
        assert content[:4] == b"\x89PNG" and len(content) > 10_000, name
    assert set(lines) == set(config.perspective_names)  # the strongest selected pairs are drawn
    for drawn, selected in lines.values():
        assert drawn == min(selected, figures._LINES) > 0

    records = [r for r in read_metrics(folder / "metrics.jsonl") if r["stage"] == "pretrain"]
    assert len(records) == 6
    for record in records:  # per pair of perspectives, branch and place
        rates = {k: v for k, v in record.items() if k.startswith("conflict_")}
        assert len(rates) == 12 and all(0 <= v <= 1 for v in rates.values())
        assert record["selected"] == pytest.approx(0.1, abs=0.01)
        assert record["mean_gradient"] > 0 and record["step_ms"] > 0


def test_evaluation_takes_a_checkpoint_of_gcl(config, root, monkeypatch, tmp_path):
    folder = config.out / config.exp
    train_gcl.train(dataclasses.replace(config, pretrain_iterations=1), folder)
    (tmp_path / "test.list").write_text("patient002\n")
    words = ["--checkpoint", folder / "checkpoints" / "finetune.pt", "--data-root", root]
    words += ["--cases", tmp_path / "test.list", "--out", tmp_path / "scores"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    evaluate.main()
    with open(tmp_path / "scores" / "cases.csv", newline="", encoding="utf-8") as file:
        assert {row["subject"] for row in csv.DictReader(file)} == {"patient002"}


@pytest.mark.parametrize("level", ["encoder", "decoder"])
def test_what_was_pretrained_is_what_fine_tuning_starts_from(config, level):
    config = dataclasses.replace(config, pixel_level=level, decoder_stride=2, max_iterations=0)
    folder = config.out / config.exp
    train_gcl.train(config, folder)
    saved = load_checkpoint(folder / "checkpoints" / "pretrain.pt")["modules"]["network"]
    other = dataclasses.replace(config, pretrained=folder / "checkpoints" / "pretrain.pt")
    net = gcl.build_network(other, 4, CPU)
    fresh = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    gcl.load_pretrained(other, net)
    for name, tensor in net.encoder.state_dict().items():
        assert torch.equal(tensor, saved[f"encoder.{name}"]), name
    changed = {
        name
        for name, tensor in net.decoders.state_dict().items()
        if not torch.equal(tensor, fresh[f"decoders.{name}"])
    }
    # the decoder's first step up leads to stride 2, the second to stride 1
    used = {name for name in changed if name.startswith(("0.up.0", "0.blocks.0"))}
    assert changed == used and bool(used) == (level == "decoder")
    wide = dataclasses.replace(other, widths=(8, 8, 8))
    with pytest.raises(CheckpointError, match=r"widths \(4, 8, 8\), this run \(8, 8, 8\)"):
        gcl.load_pretrained(wide, gcl.build_network(wide, 4, CPU))


def test_supervised_and_gcl_runs_are_paired(config, data):
    """Same labelled slices, same augmentation, same start: only the pre-trained weights differ."""
    outputs = []
    for method in ("supervised", "gcl"):
        one = dataclasses.replace(config, method=method)
        assert one.pretrains == (method == "gcl")
        stage = train_gcl.Finetuning(one, data, CPU)
        batches = [stage.batches.batch(i) for i in range(9)]
        assert set(sum(batches, [])) <= set(data.labeled_indices())
        seed_everything(config.seed, stage.name, 0)
        stage.train_mode()
        outputs.append((batches, stage.step(0)["loss"].detach()))
    assert outputs[0] == outputs[1]
    contrast = gcl.build_contrast(config, data.num_classes, CPU)
    start = train_gcl.Finetuning(config, data, CPU).net
    for name, tensor in start.encoder.state_dict().items():
        assert torch.equal(tensor, contrast.encoder.state_dict()[name]), name


def test_pre_training_reads_no_mask(config, data, monkeypatch):
    losses = []
    for change in (False, True):
        if change:
            monkeypatch.setattr(type(data.pool), "_label", lambda *a: torch.zeros(16, 16).long())
        stage = train_gcl.Pretraining(config, data, CPU)
        seed_everything(0)
        losses.append(float(stage.step(0)["loss"].detach()))
    assert losses[0] == losses[1]


CHANGES = [
    {"mitigator": "pcgrad_rep_row", "positives": "aligned", "pixel_form": "in"},
    {"mitigator": "pcgrad_rep_flat", "mitigate_before_norm": True, "score": "pix_rep"},
    {"mitigator": "pair_consensus", "slice_label": "partition"},
    {"mitigator": "pair_consensus", "score": "pix_rep"},
    {"mitigator": "cagrad_param", "branches": "joint", "image_form": "in"},
    {"mitigator": "cagrad_rep_flat", "base_temperature": 0.07, "image_form": "pixel"},
    {"mitigator": "mean", "keep": 1.0, "sampler": "uniform"},
    {"mitigator": "sum", "queue_size": 9, "perspectives": ("patient", "phase")},
    {"conflict": "cosine", "mitigate_order": "fixed", "mitigate_reduction": "sum"},
    {"conflict": "sign", "branches": "joint", "mitigate_scope": "all"},
    {"pixel_scope": "batch", "positives": "label", "slice_label": "partition"},
    {"pixel_scope": "batch", "filter_by": "quantile", "match_top": 2},
    {"score": "img_cam", "filter_by": "anchor", "queue_size": 8},
    {"score": "product", "filter_by": "global", "symmetric": False, "pairs_per_image": 2},
    {"positives": "cam", "use": "pos_full_den", "filter_by": "threshold"},
    {"use": "recompute", "quota": (0.5, 0.1), "pixel_form": "pixel"},
    {"use": "renorm", "direction": "undirected", "pos_sign": "attract_only"},
    {"pixel_level": "decoder", "decoder_stride": 2, "keep_schedule": "cosine", "pixel_grid": 3},
    {"image_weight": 0.0, "perspectives": ("patient",)},
    {"pixel_weight": 0.0, "view_intensity": False},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_every_option_trains_and_changes_weights(config, data, changes):
    config = dataclasses.replace(config, **changes)
    stage = train_gcl.Pretraining(config, data, CPU)
    before = {name: p.detach().clone() for name, p in stage.network.named_parameters()}
    for iteration in range(2):  # the queue is empty in the first step
        seed_everything(0, stage.name, iteration)
        values = stage.step(iteration)
        loss = values["loss"]
        assert torch.isfinite(loss) and loss.requires_grad
        parts = {k.removeprefix("loss_") for k in values if k.startswith("loss_")}
        assert parts == {k for k in ("image", "pixel") if getattr(config, f"{k}_weight") > 0}
        stage.optimizer.zero_grad()
        loss.backward()
        stage.optimizer.step()
    changed = [n for n, p in stage.network.named_parameters() if not torch.equal(p, before[n])]
    assert sum(n.startswith("encoder.") for n in changed) >= 10
    assert any(n.startswith("pixel_head") for n in changed) == (config.pixel_weight > 0)
    assert any(n.startswith("image_head") for n in changed) == (config.image_weight > 0)
    assert any(n.startswith("decoder") for n in changed) == (config.pixel_level == "decoder")
    if config.pixel_grid is not None:
        found = stage.network(torch.rand(2, 1, 16, 16))
        assert {x.shape[2:] for x in (found.maps, found.pixels)} == {(config.pixel_grid,) * 2}


def test_mitigation_harms_no_perspective(config, data):
    """Two perspectives: the combined gradient of the encoder has no negative inner product with
    either loss's own; the plain mean may have one."""
    config = dataclasses.replace(config, perspectives=("slice", "patient"), pixel_weight=0.0)
    stage = train_gcl.Pretraining(config, data, CPU)
    shared = stage.network.shared_parameters
    conflicts = 0
    for iteration in range(6):
        seed_everything(0, stage.name, iteration)
        values = stage.step(iteration)
        combined = _flat(values["loss"], shared)
        seed_everything(0, stage.name, iteration)
        for own in _losses(stage, iteration):
            gradient = _flat(own, shared)
            assert float(combined @ gradient) >= -1e-5 * float(gradient.norm() * combined.norm())
        conflicts += float(values["conflict_encoder_image_slice_patient"])
        stage.optimizer.zero_grad()
        values["loss"].backward()
        stage.optimizer.step()
    assert conflicts > 0


def _losses(stage, iteration):
    """The losses behind one step, before mitigation."""
    found = []
    keep = stage.mitigator
    stage.mitigator = lambda branches, *_: (found.append(branches) or torch.zeros(()), {})
    stage.step(iteration)
    stage.mitigator = keep
    (branch,) = found[0]
    return branch.losses(branch.features)


def _flat(loss, parameters):
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


@pytest.mark.parametrize("changes", [{"keep": 1.0}, {}, {"use": "renorm"}], ids=str)
def test_pre_training_lowers_both_losses(config, data, changes):
    """Measured on the same views and pairs before and after, without the Filter and with it."""
    config = dataclasses.replace(config, pretrain_iterations=30, positives="aligned", **changes)
    assert config.keep == changes.get("keep", 0.1)
    stage = train_gcl.Pretraining(config, data, CPU)

    def losses():
        found = []
        for iteration in range(4):
            seed_everything(0, stage.name, iteration)
            values = stage.step(iteration)
            found.append([float(values[f"loss_{name}"]) for name in ("image", "pixel")])
        return torch.tensor(found).mean(0)

    before = losses()
    for iteration in range(30):
        seed_everything(0, stage.name, iteration)
        stage.optimizer.zero_grad()
        stage.step(iteration)["loss"].backward()
        stage.optimizer.step()
        stage.schedule.step()
    after = losses()
    assert (after < before - 0.02).all(), (before, after)


def test_a_batch_smaller_than_one_group_is_warned_of(config):
    config = dataclasses.replace(
        config, perspectives=("slice", "patient"), pretrain_iterations=1, max_iterations=0
    )
    for size, warned in ((3, False), (2, True)):
        folder = config.out / f"batch{size}"
        train_gcl.train(dataclasses.replace(config, pretrain_batch_size=size), folder)
        assert ("holds no whole group" in (folder / "log.txt").read_text()) == warned


def test_the_pixel_branch_joins_after_its_warm_up(config):
    config = dataclasses.replace(config, pixel_warmup=0.5, max_iterations=0, log_every=2)
    train_gcl.train(config, config.out / "warm")
    records = read_metrics(config.out / "warm" / "metrics.jsonl")
    assert [r["loss_pixel"] is None for r in records] == [True, True, False]
    assert all(r["loss_image"] > 0 for r in records)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_runs_and_learns(config, data, amp):
    config = dataclasses.replace(config, amp=amp, pretrain_iterations=3)
    loop = Loop(config, config.out / amp, quiet=True)
    stage = train_gcl.Pretraining(config, data, CPU)
    before = stage.network.encoder.blocks[0][0].weight.detach().clone()
    loop.run(stage)
    loop.log.close()
    assert not torch.equal(before, stage.network.encoder.blocks[0][0].weight)
    for parameter in stage.network.parameters():
        assert parameter.dtype == torch.float32 and torch.isfinite(parameter).all()


def test_a_perspective_that_the_data_lacks_is_refused(config, data):
    for names, message in (
        (("patient", "side"), "perspective side: no case has this meta label"),
        (("dataset",), "perspective dataset: all training slices have the one label 'phantom'"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_gcl.Pretraining(dataclasses.replace(config, perspectives=names), data, CPU)


def test_kill_9_and_resume_gives_the_same_bits(config, repo):
    """Killed in pre-training between two checkpoints; the queue is part of the state."""
    config = dataclasses.replace(
        config, resume="auto", pretrain_iterations=24, checkpoint_every=4, queue_size=8, seed=3
    )
    whole = config.out / "whole"
    train_gcl.train(config, whole)
    values = {k: v for k, v in yaml.safe_load((whole / "config.yaml").read_text()).items()}
    (config.out / "settings.yaml").write_text(yaml.safe_dump(values | {"exp": "killed"}))
    process = subprocess.Popen(
        [
            sys.executable,
            str(repo / "python" / "train_gcl.py"),
            "--config",
            str(config.out / "settings.yaml"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo)},
        stdout=subprocess.DEVNULL,
    )
    folder = config.out / "killed"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        log = folder / "metrics.jsonl"
        if log.is_file() and log.read_text().count("\n") >= 6:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    state = load_checkpoint(folder / "checkpoints" / "last.pt")
    assert state["stage"] == "pretrain" and 4 <= state["iteration"] < 24
    train_gcl.train(dataclasses.replace(config, exp="killed"), folder)
    for name in ("pretrain.pt", "finetune.pt"):
        a, b = (load_checkpoint(run / "checkpoints" / name)["modules"] for run in (whole, folder))
        for module in a:
            assert a[module].keys() == b[module].keys()
            for key, tensor in a[module].items():
                assert torch.equal(tensor, b[module][key]), (name, key)
    assert (whole / "cases.csv").read_bytes() == (folder / "cases.csv").read_bytes()


def test_the_paired_study_of_gcl(config, tmp_path, monkeypatch):
    """Each arm without a part of GCL has a pre-training without it; all arms share the rest."""
    settings = SETTINGS | {"pretrain_iterations": 2, "max_iterations": 2, "val_every": 0}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    words = ["--trainer", "gcl", "--config", tmp_path / "settings.yaml", "--out", tmp_path / "s"]
    words += ["--data-root", config.data_root, "--draws", "1@1", "--jobs", "1"]
    words += ["--arms", "supervised", "gcl", "gcl_unfiltered", "gcl_mean", "--against", "gcl_mean"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])

    def here(job):
        folder, finished, command = job
        assert command[1].endswith("train_gcl.py")
        one = parse_config(GclConfig, command[2:])
        train_gcl.train(one, folder)
        assert finished.is_file()

    monkeypatch.setattr(compare, "execute", here)
    compare.main()
    runs = json.loads((tmp_path / "s" / "runs.json").read_text())
    assert [run["arm"] for run in runs] == ["supervised", "gcl", "gcl_unfiltered", "gcl_mean"]
    own = {}
    for name in ("0", "gcl_unfiltered-0", "gcl_mean-0"):
        path = tmp_path / "s" / f"pretraining-{name}" / "config.yaml"
        saved = yaml.safe_load(path.read_text())
        own[name] = saved["keep"], saved["mitigator"], saved["max_iterations"], saved["seed"]
    assert own == {
        "0": (0.1, "pcgrad_param", 0, 0),
        "gcl_unfiltered-0": (1.0, "pcgrad_param", 0, 0),
        "gcl_mean-0": (0.1, "mean", 0, 0),
    }
    for arm, source in (("gcl", "0"), ("gcl_mean", "gcl_mean-0")):
        saved = yaml.safe_load((tmp_path / "s" / f"{arm}-n1-draw0" / "config.yaml").read_text())
        assert f"pretraining-{source}/" in saved["pretrained"] and saved["seed"] == 1000
    page = (tmp_path / "s" / "results.md").read_text()
    differences = [line.split(" | ")[1] for line in page.splitlines() if " − " in line]
    assert differences == [
        "gcl − supervised", "gcl_unfiltered − supervised", "gcl_mean − supervised",
        "gcl − gcl_mean", "gcl_unfiltered − gcl_mean",
    ]  # fmt: skip
    assert "--trainer gcl" in page and "--against gcl_mean" in page
    assert str(tmp_path) not in page


@pytest.mark.slow
def test_real_cardiac_cases_train_without_the_classes_nobody_drew(config, shared_data, tmp_path):
    """Sunnybrook has no RV label, and no myocardium at ES: neither is trained on nor scored."""
    changes = {
        "dataset": "acdc", "data_root": shared_data / "sunnybrook_acdc", "size": (64, 64),
        "widths": (8, 16, 32), "dropout": (0.0, 0.0, 0.0), "labeled_num": 2, "val_num": 1,
        "test_num": 1, "pretrain_iterations": 2, "max_iterations": 4, "val_every": 0,
        "batch_size": 4,
        "cache_dir": tmp_path / "cache",
    }  # fmt: skip
    config = dataclasses.replace(config, **changes)
    assert config.perspective_names == ("slice", "patient", "phase")
    train_gcl.train(config, tmp_path / "cardiac")
    with open(tmp_path / "cardiac" / "cases.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    scored = {(r["case"], r["class"]) for r in rows}
    assert scored and all(label != "1" for _, label in scored)
    assert sum(label == "3" for _, label in scored) == 2  # ED and ES of the test subject
    assert sum(label == "2" for _, label in scored) <= 1  # at most ED


@pytest.mark.slow
def test_real_hippocampus_volumes_have_their_three_meta_labels(repo, shared_data, tmp_path):
    settings = repo / "python" / "configs" / "gcl_hippocampus.yaml"
    words = ["--config", settings, "--data-root", shared_data / "msd_hippocampus"]
    words += ["--out", tmp_path, "--threads", 1, "--pretrain-batch-size", 12]
    data = load_data(config := parse_config(GclConfig, [str(word) for word in words]))
    stage = train_gcl.Pretraining(config, data, CPU)
    codes = stage.labels.codes
    assert set(codes["side"].tolist()) == {0, 1} and len(set(codes["patient"].tolist())) == 95
    pairs = {(int(p), int(s)) for p, s in zip(codes["patient"], codes["side"], strict=True)}
    assert len(pairs) == len(data.pool.volumes) == 143  # no volume has two, no side two volumes
    values = stage.step(0)
    assert torch.isfinite(values["loss"])
    assert {"conflict_pixel_patient_side", "conflict_encoder_image_slice_side"} <= set(values)
