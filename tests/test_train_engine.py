"""The engine: settings, random streams, checkpoints, logs, schedules, errors as one line."""

import io
import json
import os
import pickle
import random
import signal
import sys
import zipfile

import numpy as np
import pytest
import torch

from medcl_train.engine.checkpoint import (
    CheckpointError,
    load_checkpoint,
    remove_stale_temporaries,
    save_checkpoint,
)
from medcl_train.engine.config import (
    ConfigError,
)
from medcl_train.engine.environment import choose_device
from medcl_train.engine.optim import SCHEDULES, build_optimizer, build_schedule
from medcl_train.engine.runlog import RunLog, read_metrics
from medcl_train.engine.runs import seed_table
from medcl_train.engine.seeding import (
    IndexStream,
    generator,
    rng_state,
    seed_everything,
    set_rng_state,
)
from medcl_train.engine.signals import Stopped, StopSignal


def test_a_missing_gpu_is_said_plainly():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="unknown device"):
        choose_device("graphics")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device cpu"):
            choose_device("cuda")


# --- random streams


def test_batches_are_epochs_and_depend_on_the_iteration_only():
    stream = IndexStream(10, 4, seed=3, name="s")
    epoch = np.concatenate([stream.at(i) for i in range(5)])  # two epochs of 10
    assert sorted(epoch[:10]) == list(range(10)) and sorted(epoch[10:]) == list(range(10))
    assert not np.array_equal(epoch[:10], epoch[10:])
    again = IndexStream(10, 4, seed=3, name="s")
    assert np.array_equal(again.at(3), epoch[12:16])  # without having drawn 0, 1, 2
    assert not np.array_equal(IndexStream(10, 4, seed=3, name="t").at(0), epoch[:4])
    with pytest.raises(ValueError, match="'s'"):
        IndexStream(0, 4, seed=3, name="s")


def test_random_state_of_every_generator_is_restored():
    seed_everything(5, "x", 2)
    state = torch.load(_as_file(rng_state()), weights_only=True)
    first = (random.random(), np.random.rand(), torch.rand(3).tolist())
    seed_everything(6)
    set_rng_state(state)
    assert first == (random.random(), np.random.rand(), torch.rand(3).tolist())
    assert (
        torch.rand(2, generator=generator(1, "a")).tolist()
        != torch.rand(2, generator=generator(1, "b")).tolist()
    )


def _as_file(value):
    import io

    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


# --- checkpoints


def test_checkpoints_are_replaced_whole(tmp_path):
    path = tmp_path / "a" / "last.pt"
    save_checkpoint(path, {"x": torch.arange(3)})
    save_checkpoint(path, {"x": torch.arange(4)})
    assert load_checkpoint(path)["x"].tolist() == [0, 1, 2, 3]
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_a_half_written_temporary_file_does_no_harm(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"x": 1})
    (tmp_path / ".last.pt.123.tmp").write_bytes(path.read_bytes()[:100])
    assert load_checkpoint(path)["x"] == 1
    assert [p.name for p in remove_stale_temporaries(tmp_path)] == [".last.pt.123.tmp"]
    assert load_checkpoint(path)["x"] == 1


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"x": 1})
    with pytest.raises((AttributeError, pickle.PicklingError), match="(?i)pickle"):
        save_checkpoint(path, {"x": lambda: 0})
    assert load_checkpoint(path)["x"] == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut", "flip", "text", "foreign"])
def test_damaged_checkpoints_are_named(tmp_path, damage):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"x": torch.ones(1000)})
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        content[largest.header_offset + 400] ^= 0x40
        path.write_bytes(content)
    elif damage == "text":
        path.write_text("not a checkpoint")
    else:
        torch.save({"x": 1}, path)
    with pytest.raises(CheckpointError, match="last.pt"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no checkpoint at .*none.pt"):
        load_checkpoint(tmp_path / "none.pt")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="writable"):
        save_checkpoint(tmp_path / "last.pt", {"x": 1})


# --- logs


def test_records_after_a_checkpoint_are_dropped_on_resume(tmp_path):
    log = RunLog(tmp_path, quiet=True)
    for stage, iteration in (
        ("pretrain", 10),
        ("pretrain", 20),
        ("finetune", 10),
        ("finetune", 20),
    ):
        log.record(stage, iteration, {"loss": float("nan") if iteration == 20 else 1.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "finetune", "iter')  # a kill in the middle of a line
    log.rewind("finetune", 10)
    kept = [(r["stage"], r["iteration"]) for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert kept == [("pretrain", 10), ("pretrain", 20), ("finetune", 10)]
    log.rewind("pretrain", 10)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["stage"], r["iteration"]) for r in records] == [("pretrain", 10)]
    assert records[0]["loss"] == 1.5
    log.info("hello")
    log.close()
    assert "hello" in (tmp_path / "log.txt").read_text()


def test_not_a_number_is_written_as_null_and_broken_lines_are_named(tmp_path):
    log = RunLog(tmp_path, quiet=True)
    log.record("pretrain", 1, {"loss": float("inf")})
    log.close()
    path = tmp_path / "metrics.jsonl"
    assert json.loads(path.read_text()) == {"stage": "pretrain", "iteration": 1, "loss": None}
    path.write_text("broken\n" + path.read_text())
    with pytest.raises(ValueError, match="metrics.jsonl, line 1"):
        read_metrics(path)


def test_tensorboard_uses_the_tags_of_ssl4mis(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, tensorboard=True, quiet=True)
    log.record("finetune", 1, {"loss": 1.0, "lr": 0.1, "val_mean_dice": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "finetune"))
    events.Reload()
    tags = {"info/total_loss", "info/lr", "info/val_mean_dice"}
    assert set(events.Tags()["scalars"]) == tags
    assert events.Scalars("info/val_mean_dice")[0].value == 0.5


# --- optimisers, signals, programs


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_run_their_length_and_end_low(name):
    optimizer = build_optimizer([torch.nn.Parameter(torch.ones(1))], "sgd", lr=0.1, weight_decay=0)
    schedule = build_schedule(optimizer, name, 50)
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(0.1, rel=1e-3)
    if name == "poly":
        assert rates[10] == pytest.approx(0.1 * (1 - 10 / 50) ** 0.9)
    if name != "constant":
        assert rates[-1] < 0.01


def test_unknown_optimizers_and_schedules_are_refused():
    parameters = [torch.nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match="sgd"):
        build_optimizer(parameters, "lion", lr=1, weight_decay=0)
    optimizer = build_optimizer(parameters, "adamw", lr=1, weight_decay=0)
    with pytest.raises(ValueError, match="poly"):
        build_schedule(optimizer, "step", 5)


def test_the_first_signal_sets_a_flag_the_second_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        stop.armed = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(Stopped, match="--resume auto"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    assert Stopped(signal.SIGINT, "after 3").exit_code == 130


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_bar_and_the_log_file_plain_lines(tmp_path, monkeypatch):
    pytest.importorskip("rich")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    log = RunLog(tmp_path)
    log.info("before")
    log.start_progress("finetune", 10, 4)
    log.advance()
    log.note("loss 0.25")
    log.info("finetune 5/10 step")
    log.stop_progress()
    log.info("after")
    log.close()
    shown = screen.getvalue()
    assert all(word in shown for word in ("before\n", "finetune", "5/10", "loss 0.25", "after\n"))
    assert "5/10 step" not in shown  # while there is a bar, it shows the numbers
    written = (tmp_path / "log.txt").read_text()
    assert "\x1b" not in written
    assert [line.split(" ", 2)[2] for line in written.splitlines()] == [
        "before",
        "finetune 5/10 step",
        "after",
    ]


def test_table_over_seeds():
    def summary(dice):
        entry = {"mean": dice, "sd": 0.0, "n": 1}
        means = {"dice": entry, "hd95": entry, "assd": entry, "n_missed": 1}
        return {"mean": means, "settings": {"unit": "voxel"}}

    lines = seed_table({1: summary(0.5), 2: summary(0.7), 3: None})
    assert lines[0] == "| seed | Dice | HD95 voxel | ASSD voxel | missed |"
    assert lines[2] == "| 1 | 0.500 | 0.500 | 0.500 | 1 |"
    assert lines[-1].startswith("| mean ± sd, 2 seeds | 0.600 ± 0.141 |")
    assert lines[-1].endswith("| 2 |")
