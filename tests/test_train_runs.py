"""The programs as their command lines run them: phantom, seeds, report, evaluation, paired study,
real data. One in a process of its own; the others in this one, which has imported torch."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import compare
import nibabel
import numpy as np
import pytest
import train_ideal
import yaml
from train_tiny import SETTINGS, write_phantom

from medcl_train.engine.config import parse_config
from medcl_train.ideal import IdealConfig
from medcl_train.metrics import score_masks
from medcl_train.report.study import paired_difference


def test_paired_difference_by_hand():
    """Differences .1 .2 .3 .2: mean .2, sd .0816, half-width 3.1824 * sd / 2."""
    result = paired_difference([0.6, 0.7, 0.8, 0.7], [0.5, 0.5, 0.5, 0.5])
    assert result["mean"] == pytest.approx(0.2) and result["wins"] == 4
    assert result["sd"] == pytest.approx(math.sqrt(0.02 / 3))
    assert result["high"] - result["mean"] == pytest.approx(3.182446 * result["sd"] / 2, rel=1e-5)
    assert result["p"] == pytest.approx(0.0163, abs=2e-4)  # t = 4.899 with 3 degrees of freedom
    assert math.isnan(paired_difference([0.6], [0.5])["low"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder with a phantom and a settings file for it."""
    folder = tmp_path_factory.mktemp("runs")
    root = write_phantom(folder / "phantom")
    values = SETTINGS | {"data_root": str(root), "out": str(folder / "runs"), "report": True}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a program with its arguments and returns what it prints."""

    def program(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        import_module(script.removesuffix(".py")).main()
        return capsys.readouterr().out

    return program


@pytest.mark.slow
def test_training_leaves_a_report_whose_pictures_exist(repo, tiny):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo)}
    command = [sys.executable, repo / "python" / "train_ideal.py"]
    command += ["--config", tiny / "config.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout
    folder = tiny / "runs" / "run"
    page = (folder / "report.html").read_text()
    pictures = re.findall(r'<img src="([^"]+)"', page)
    names = ["figures/curves.png", "figures/overlays.png", "figures/correspondences.png"]
    assert pictures == names
    for name in pictures:
        content = (folder / name).read_bytes()
        assert content[:4] == b"\x89PNG" and len(content) > 10_000, name
    assert "http" not in page  # self-contained
    summary = json.loads((folder / "summary.json").read_text())
    dice = f"{summary['mean']['dice']['mean']:.3f}"
    assert dice in page and dice in output
    assert "finetune 6/6" in (folder / "log.txt").read_text()


@pytest.mark.slow
def test_several_seeds_give_a_table(run, tiny):
    output = run(
        "train_ideal.py", "--config", tiny / "config.yaml", "--exp", "many",
        "--seeds", 1, 2, "--no-report", "--method", "supervised",
    )  # fmt: skip
    folder = tiny / "runs" / "many"
    dices = [
        json.loads((folder / f"seed_{seed}" / "summary.json").read_text())["mean"]["dice"]["mean"]
        for seed in (1, 2)
    ]
    assert dices[0] != dices[1]
    row = f"| mean ± sd, 2 seeds | {np.mean(dices):.3f} ± {np.std(dices, ddof=1):.3f} |"
    assert row in output and row in (folder / "seeds.md").read_text()


@pytest.mark.slow
def test_evaluate_scores_a_list_and_predicts_a_bare_folder(run, tiny):
    run("train_ideal.py", "--config", tiny / "config.yaml", "--exp", "net", "--no-report")
    checkpoint = tiny / "runs" / "net" / "checkpoints" / "best.pt"
    root, out = tiny / "phantom", tiny / "evaluated"
    (tiny / "test.list").write_text("patient002  # both phases\npatient005_frame01\n")
    run(
        "evaluate.py", "--checkpoint", checkpoint, "--data-root", root,
        "--cases", tiny / "test.list", "--out", out,
    )  # fmt: skip
    with open(out / "cases.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cases = list(dict.fromkeys(r["case"] for r in rows))
    assert len(cases) == 3 and cases[2] == "patient005_frame01" and len(rows) == 9
    for row in rows:  # recompute every score from the written file and the source label
        folder = root / row["subject"]
        truth = nibabel.load(folder / f"{row['case']}_gt.nii.gz")
        saved = nibabel.load(out / "predictions" / f"{row['case']}.nii.gz")
        assert np.allclose(saved.affine, truth.affine) and saved.shape == truth.shape
        masks = [np.asarray(image.dataobj) == int(row["class"]) for image in (saved, truth)]
        expected = score_masks(*masks, truth.header.get_zooms()[:3])
        for metric, value in expected.items():
            assert float(row[metric]) == pytest.approx(value, rel=1e-4, nan_ok=True), row

    images = tiny / "images"
    images.mkdir()
    source = root / "patient003" / "patient003_frame01.nii.gz"
    shutil.copy(source, images / "scan.nii.gz")
    output = run(
        "evaluate.py", "--checkpoint", checkpoint, "--data-root", images,
        "--dataset", "folder", "--out", tiny / "bare",
    )  # fmt: skip
    assert "1 of 1 cases have no label" in output
    saved = nibabel.load(tiny / "bare" / "predictions" / "scan.nii.gz")
    assert np.allclose(saved.affine, nibabel.load(source).affine)
    assert not (tiny / "bare" / "cases.csv").exists()


@pytest.mark.slow
def test_the_paired_study_runs_resumes_and_writes_its_page(run, tiny, monkeypatch):
    def here(command, **_):
        one = parse_config(IdealConfig, command[2:])
        train_ideal.train(one, one.out / one.exp)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=here, STDOUT=subprocess.STDOUT))
    arguments = [
        "--config", tiny / "config.yaml", "--data-root", tiny / "phantom", "--out",
        tiny / "study", "--draws", "2@1", "1@2", "--pretrain-seeds", 2, "--arms", "supervised",
        "ideal", "--jobs", 1,
    ]  # fmt: skip
    first = run("compare.py", *arguments)
    runs = json.loads((tiny / "study" / "runs.json").read_text())
    assert len(runs) == 6
    for one in runs:
        folder = tiny / "study" / f"{one['arm']}-n{one['labeled']}-draw{one['draw']}"
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        assert settings["draw"] == one["draw"] and settings["labeled_num"] == one["labeled"]
        assert settings["method"] == one["arm"]
        if one["arm"] == "ideal":
            assert f"pretraining-{one['draw'] % 2}" in settings["pretrained"]
    splits = {
        arm: json.loads((tiny / "study" / f"{arm}-n1-draw1" / "split.json").read_text())
        for arm in ("supervised", "ideal")
    }
    assert splits["supervised"] == splits["ideal"]
    page = (tiny / "study" / "results.md").read_text()
    dice = {(r["arm"], r["labeled"], r["draw"]): r["dice"] for r in runs}
    difference = np.mean([dice["ideal", 1, d] - dice["supervised", 1, d] for d in (0, 1)])
    assert f"| 1 | ideal − supervised | {difference:+.4f}" in page
    assert str(tiny) not in page  # no folder of this machine
    second = run("compare.py", *arguments)
    assert second.count("finished before") == 8 and "finished before" not in first
    assert (tiny / "study" / "results.md").read_text() == page


@pytest.mark.slow
def test_the_demo_settings_learn_the_phantom(run, repo, tmp_path):
    """Shortened: the whole demo is what `make demo` runs."""
    run(
        "train_ideal.py", "--config", repo / "python" / "configs" / "ideal_demo.yaml",
        "--out", tmp_path, "--pretrain-iterations", 20, "--max-iterations", 60,
        "--consistency-rampup", 24, "--phantom-patients", 8, "--size", 64, 64,
    )  # fmt: skip
    summary = json.loads((tmp_path / "ideal_demo" / "summary.json").read_text())
    assert summary["classes"]["LV"]["dice"]["mean"] > 0.5
    assert summary["mean"]["dice"]["mean"] > 0.4


@pytest.mark.slow
def test_real_hippocampus_volumes_train_and_do_not_collapse(run, repo, shared_data, tmp_path):
    """60 supervised steps on one labelled subject reach a Dice far above chance (about 0.6)."""
    settings = repo / "python" / "configs" / "ideal_hippocampus.yaml"
    run(
        "train_ideal.py", "--config", settings, "--data-root",
        shared_data / "msd_hippocampus", "--out", tmp_path, "--method", "supervised",
        "--max-iterations", 80, "--val-every", 0, "--no-report", "--threads", 1,
    )  # fmt: skip
    summary = json.loads((tmp_path / "ideal_hippocampus" / "summary.json").read_text())
    assert summary["by_subject"]["n_cases"] == 20 and summary["mean"]["n_cases"] == 31
    assert summary["mean"]["dice"]["mean"] > 0.45
    assert set(summary["collapse"]["volume_ratio"]) == {"anterior", "posterior"}


@pytest.mark.slow
def test_real_cardiac_cases_train_without_the_classes_nobody_drew(run, shared_data, tmp_path):
    """Sunnybrook has no RV label, and no myocardium at ES: neither is trained on nor scored."""
    run(
        "train_ideal.py", "--dataset", "acdc", "--data-root",
        shared_data / "sunnybrook_acdc", "--out", tmp_path, "--exp", "cardiac", "--size", 64, 64,
        "--widths", 8, 16, 32, "--dropout", 0, 0, 0, "--labeled-num", 2, "--val-num", 1,
        "--test-num", 1, "--feat-stride", 4, "--projection-dim", 16, "--pretrain-iterations", 4,
        "--max-iterations", 12, "--batch-size", 8, "--labeled-bs", 4, "--optimizer", "adamw",
        "--base-lr", 3e-3, "--no-report",
    )  # fmt: skip
    with open(tmp_path / "cardiac" / "cases.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    scored = {(r["case"], r["class"]) for r in rows}
    assert scored and all(label != "1" for _, label in scored)
    assert sum(label == "3" for _, label in scored) == 2  # ED and ES of the test subject
    assert sum(label == "2" for _, label in scored) <= 1  # at most ED
