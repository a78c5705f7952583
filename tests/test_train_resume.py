"""A run that is killed and continued ends with the same bits as one that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train_ideal
import yaml
from train_tiny import SETTINGS, write_phantom

from medcl_train.engine import loop as loop_module
from medcl_train.engine.checkpoint import load_checkpoint
from medcl_train.engine.config import config_from_dict, parse_config
from medcl_train.engine.runlog import read_metrics
from medcl_train.ideal import IdealConfig

pytestmark = pytest.mark.slow

# options that keep state of their own, or draw random numbers in a step
OPTIONS = {
    "local_weight": 0.5,
    "local_warmup": 10,
    "global_negatives": "batch+queue",
    "learn_temperature": True,
    "feat_stride": [2, 4],
    "feature_dropout": 0.3,
    "input_noise": 0.1,
}
LENGTH = 60  # iterations per stage; checkpoints every 7


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Settings file and the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("resume")
    values = SETTINGS | OPTIONS | {
        "data_root": str(write_phantom(folder / "phantom")), "out": str(folder / "runs"),
        "pretrain_iterations": LENGTH, "max_iterations": LENGTH, "checkpoint_every": 7,
        "val_every": 20, "resume": "auto", "amp": "off",
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    _finish(folder, "whole")
    return folder


def _finish(folder, exp):
    """Run, or what is left of it, in this process: only what is killed needs one of its own."""
    words = ["--config", str(folder / "config.yaml"), "--exp", exp]
    train_ideal.train(parse_config(IdealConfig, words), folder / "runs" / exp)


def _start(repo, folder, exp):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo)}
    command = [sys.executable, str(repo / "python" / "train_ideal.py")]
    command += ["--config", str(folder / "config.yaml"), "--exp", exp]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _stop_at(repo, folder, exp, stage, iteration, signum):
    """Start or continue a run and send a signal once it has logged this iteration."""
    process = _start(repo, folder, exp)
    path = folder / "runs" / exp / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        reached = path.is_file() and any(
            r["stage"] == stage and r["iteration"] >= iteration for r in _records(path)
        )
        if reached or process.poll() is not None:
            break
        time.sleep(0.002)
    process.send_signal(signum)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def _records(path):
    """Like read_metrics, but the writer may be in the middle of any line."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _last(folder, exp):
    state = load_checkpoint(folder / "runs" / exp / "checkpoints" / "last.pt")
    return state["stage"], state["iteration"]


def _differences(a, b, name=""):
    """Names of the entries in which two nested states differ; tensors are compared bit by bit."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        return [d for k in a for d in _differences(a[k], b[k], f"{name}/{k}")]
    if isinstance(a, list | tuple):
        assert len(a) == len(b), name
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in _differences(x, y, f"{name}/{i}")]
    return [] if a == b else [name]


def _assert_same_run(folder: Path, exp: str):
    whole, other = folder / "runs" / "whole", folder / "runs" / exp
    for name in ("last.pt", "best.pt", "pretrain.pt", "finetune.pt"):
        states = [load_checkpoint(run / "checkpoints" / name) for run in (whole, other)]
        for state in states:
            del state["config"]["exp"]
        assert _differences(*states) == [], name
    numbers = []
    for run in (whole, other):
        records = read_metrics(run / "metrics.jsonl")
        numbers.append([{k: v for k, v in r.items() if k != "step_ms"} for r in records])
    assert numbers[0] == numbers[1]
    assert (whole / "cases.csv").read_bytes() == (other / "cases.csv").read_bytes()


def test_kill_9_in_both_stages_gives_the_same_bits(repo, study):
    code, _, _ = _stop_at(repo, study, "killed", "pretrain", 25, signal.SIGKILL)
    assert code == -signal.SIGKILL
    stage, iteration = _last(study, "killed")
    assert stage == "pretrain" and 21 <= iteration < LENGTH  # killed between two checkpoints
    # what a kill in the middle of writing leaves behind
    checkpoints = study / "runs" / "killed" / "checkpoints"
    (checkpoints / ".last.pt.1.tmp").write_bytes((checkpoints / "last.pt").read_bytes()[:999])

    code, _, _ = _stop_at(repo, study, "killed", "finetune", 33, signal.SIGKILL)
    assert code == -signal.SIGKILL
    stage, iteration = _last(study, "killed")
    assert stage == "finetune" and 28 <= iteration < LENGTH
    assert not list(checkpoints.glob("*.1.tmp"))

    _finish(study, "killed")
    _assert_same_run(study, "killed")


def test_sigterm_and_ctrl_c_save_and_leave_with_one_line(repo, study):
    code, _, errors = _stop_at(repo, study, "stopped", "pretrain", 10, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert errors.count("\n") == 1 and "SIGTERM after pretrain iteration" in errors, errors
    stage, iteration = _last(study, "stopped")
    assert stage == "pretrain" and f"iteration {iteration}," in errors

    code, _, errors = _stop_at(repo, study, "stopped", "finetune", 10, signal.SIGINT)
    assert code == 128 + signal.SIGINT
    assert errors.count("\n") == 1 and "Ctrl-C after finetune iteration" in errors, errors

    _finish(study, "stopped")
    _assert_same_run(study, "stopped")


def test_a_broken_checkpoint_is_named(repo, study):
    checkpoints = study / "runs" / "broken" / "checkpoints"
    checkpoints.mkdir(parents=True)
    content = (study / "runs" / "whole" / "checkpoints" / "last.pt").read_bytes()
    (checkpoints / "last.pt").write_bytes(content[: len(content) // 2])
    process = _start(repo, study, "broken")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "last.pt is damaged" in errors and "Traceback" not in errors


class _Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


def test_a_kill_before_or_after_any_checkpoint_write_loses_nothing(tmp_path, monkeypatch):
    values = SETTINGS | OPTIONS | {"data_root": str(write_phantom(tmp_path / "phantom"))}
    values |= {"out": str(tmp_path), "resume": "auto", "test_num": 1}
    config = config_from_dict(IdealConfig, values, source="test")
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
