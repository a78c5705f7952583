"""Settings of a run: defaults, YAML file, command line, SSL4MIS spellings; errors as one line."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import yaml

from medcl_train.engine.config import (
    ConfigError,
    TrainConfig,
    changed_settings,
    config_from_dict,
    config_to_dict,
    load_config,
    parse_config,
)
from medcl_train.gcl import GclConfig
from medcl_train.ideal import IdealConfig


def test_command_line_goes_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("base_lr: 3e-3\nlabeled_num: 4\nwidths: [4, 8]\ndropout: [0, 0]\namp: off\n")
    config = parse_config(IdealConfig, ["--config", str(path), "--labeled-num", "2"])
    assert config.base_lr == 0.003 and config.labeled_num == 2
    assert config.widths == (4, 8) and config.amp == "off"
    assert config.temperature == IdealConfig().temperature


def test_ssl4mis_command_lines_are_understood():
    words = (
        "--root_path ../data/ACDC --exp ACDC/Cross --model unet --max_iterations 30000 "
        "--batch_size 24 --deterministic 1 --base_lr 0.01 --patch_size 256 256 --seed 1337 "
        "--num_classes 4 --labeled_bs 12 --labeled_num 7 --ema_decay 0.99 --consistency 0.1 "
        "--consistency_rampup 200.0 --consistency_type mse"
    )
    config = parse_config(IdealConfig, words.split())
    assert str(config.data_root) == "../data/ACDC" and config.exp == "ACDC/Cross"
    assert config.size == (256, 256) and config.labeled_batch_size == 12
    assert config.labeled_num == 7 and config.momentum == 0.99
    assert config.consistency_rampup == 200.0 and config.consistency_type == "mse"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "unknown setting learning_rate"),
        ("widths: 16", "widths must be a list"),
        ("match: nearest", "match must be one of backbone"),
        ("labeled_num: many", "labeled_num must be int"),
        ("size: [1, 2, 3]", "size must be a list of 2"),
        ("- a\n- b", "must hold 'name: value' lines"),
        ("a: [1", "not valid YAML"),
    ],
)
def test_a_wrong_settings_file_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(IdealConfig, path)
    assert "wrong.yaml" in str(error.value)
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        load_config(IdealConfig, tmp_path / "nowhere.yaml")


def test_settings_survive_a_round_trip_through_plain_values():
    config = dataclasses.replace(IdealConfig(), size=(48, 48), widths=(4, 8), dropout=(0.0, 0.1))
    plain = yaml.safe_load(yaml.safe_dump(config_to_dict(config)))
    assert config_from_dict(IdealConfig, plain, source="test") == config
    other = dataclasses.replace(config, base_lr=1.0, exp="b")
    assert changed_settings(other, plain, ignore=("exp",)) == {"base_lr": (0.01, 1.0)}


def test_shipped_settings_files_load(repo):
    for trainer in (IdealConfig, GclConfig):
        paths = sorted((repo / "python" / "configs").glob(f"{trainer.trainer}_*.yaml"))
        assert len(paths) >= 3
        for path in paths:
            config = load_config(trainer, path)
            assert config.exp == path.stem
            plain = yaml.safe_load(yaml.safe_dump(config_to_dict(config)))
            assert config_from_dict(trainer, plain, source="test") == config


def test_one_value_or_several(tmp_path):
    path = tmp_path / "c.yaml"
    for text, expected in (("8", 8), ("[8, 16]", (8, 16))):
        path.write_text(f"feat_stride: {text}\n")
        config = load_config(IdealConfig, path)
        assert config.feat_stride == expected
        assert config_from_dict(IdealConfig, config_to_dict(config), source="test") == config
    path.write_text("feat_stride: deep\n")
    with pytest.raises(ConfigError, match="feat_stride must be int"):
        load_config(IdealConfig, path)
    assert parse_config(IdealConfig, ["--feat-stride", "16", "8"]).strides == (8, 16)
    assert parse_config(IdealConfig, ["--feat-stride", "4"]).strides == (4,)


def test_the_table_of_readings_names_every_setting_of_ideal(repo):
    """docs/ideal.md: each option exists, and no setting of the two stages is missing."""
    lines = (repo / "docs" / "ideal.md").read_text().splitlines()
    tables = "\n".join(line for line in lines if line.startswith("| ") and "---" not in line)
    named = {name.replace("-", "_") for name in re.findall(r"[` ]--([a-z0-9-]+)", tables)}
    settings = {field.name for field in dataclasses.fields(IdealConfig)}
    own = settings - {field.name for field in dataclasses.fields(TrainConfig)}
    # not readings of the paper: which runs to make, and how to evaluate
    own -= {"method", "pretrained", "select", "definition", "empty", "unit"}
    assert named - settings == set()
    assert own - named == set()


def _run(repo, script, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo)}
    command = [sys.executable, str(repo / "python" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_programs_say_what_is_wrong_in_one_line(repo, tmp_path):
    dry = _run(repo, "train_ideal.py", "--dry-run", "--labeled-num", "3")
    assert dry.returncode == 0
    assert yaml.safe_load(dry.stdout)["labeled_num"] == 3
    cases = [
        ("train_ideal.py", ["--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        ("train_ideal.py", ["--dataset", "acdc", "--out", str(tmp_path)], 2, "--data-root"),
        ("train_ideal.py", ["--temperature", "0"], 2, "temperature"),
        ("evaluate.py", ["--checkpoint", "no.pt", "--data-root", "x"], 1, "no checkpoint at no.pt"),
        ("compare.py", ["--config", "c.yaml", "--draws", "8"], 2, "COUNT@LABELED"),
    ]
    for script, arguments, code, words in cases:
        done = _run(repo, script, *arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert words in done.stderr and "Traceback" not in done.stderr, done.stderr
