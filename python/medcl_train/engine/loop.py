"""The training loop: one class, used by every trainer and every stage.

A stage is an object with `step(iteration) -> {"loss": tensor, other numbers to log}`; the loop owns
everything around it: mixed precision, optimiser and schedule, log lines, validation, checkpoints,
    signals, resuming.
"""

import json
import os
import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.atomic import write_atomic
from .checkpoint import CheckpointError, load_checkpoint, remove_stale_temporaries, save_checkpoint
from .config import ConfigError, TrainConfig, changed_settings, config_to_dict, save_config
from .environment import choose_device, describe_environment
from .runlog import RunLog, Stopwatch
from .seeding import rng_state, seed_everything, set_rng_state
from .signals import Stopped, StopSignal

# Settings that may differ between a run and its continuation: they do not change the result, but
# for the last bits that device and threads may change (Loop warns).
RESUMABLE_SETTINGS = (
    "out",
    "device",
    "threads",
    "resume",
    "overwrite",
    "log_every",
    "checkpoint_every",
    "tensorboard",
    "report",
    "profile_steps",
    "profile_alone",
    "profile_warmup",
    "dry_run",
    "cache_dir",
    "data_root",
    "seeds",
    "exp",
)
_AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The precision of a forward pass."""
    dtype = _AMP_TYPES.get(config.amp)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


class Stage:
    """One phase of training. Subclasses set the attributes in __init__ and implement `step`."""

    config: TrainConfig
    name: str
    iterations: int
    modules: dict[str, nn.Module]  # everything with state: saved and restored by these names
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def step(self, iteration: int) -> dict[str, Tensor | float]:
        """Forward pass of one iteration; "loss" is a scalar tensor with gradient, the rest is
        logged."""
        raise NotImplementedError

    def validate(self) -> dict[str, float] | None:
        """Numbers of a validation; "val_mean_dice" decides which checkpoint is kept as best.pt.
        None: no validation."""
        return None

    def train_mode(self) -> None:
        for module in self.modules.values():
            module.train()


class Loop:
    """Runs stages one after another in one run folder.

    Folder: config.yaml, environment.json, log.txt, metrics.jsonl,
        checkpoints/{last,best,<stage>}.pt.

    Args:
        config: settings of the run; `config.resume` decides what an existing folder means.
        folder: run folder.
        log: where to write; default a RunLog in the folder.

    Raises: ConfigError when the folder holds a run and neither --resume nor --overwrite says what
        to do with it, or when the settings differ from those of the run to continue.
        CheckpointError when its checkpoint is damaged.
    """

    def __init__(self, config: TrainConfig, folder: str | Path, *, quiet: bool = False):
        self.config, self.folder = config, Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self.device = choose_device(config.device)
        self.best: dict = {"metric": float("-inf"), "iteration": -1}
        self.restored = self._open_folder()
        self.log = RunLog(self.folder, tensorboard=config.tensorboard, quiet=quiet)
        save_config(config, self.folder / "config.yaml")
        environment = json.dumps(describe_environment(), indent=2).encode()
        write_atomic(self.folder / "environment.json", lambda file: file.write(environment))
        if self.restored:
            self.best = self.restored["best"]
            self.log.rewind(self.restored["stage"], self.restored["iteration"])
            self.log.info(
                f"continuing after {self.restored['stage']} iteration {self.restored['iteration']}"
            )
        if config.threads:
            torch.set_num_threads(config.threads)
        self._warn_of_other_bits()
        if config.deterministic and self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at start
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
            torch.use_deterministic_algorithms(True, warn_only=True)

    def _ran_on(self) -> dict:
        """What the last bits of a sum depend on."""
        return {"device": self.device.type, "threads": torch.get_num_threads()}

    def _warn_of_other_bits(self) -> None:
        before = (self.restored or {}).get("ran_on", {})
        changed = [
            f"{name} {before[name]} -> {now}"
            for name, now in self._ran_on().items()
            if before.get(name, now) != now
        ]
        if changed:
            self.log.info(
                f"warning: continued with other settings of the machine ({', '.join(changed)}): "
                "sums of plain torch may differ in their last bits from an uninterrupted run"
            )

    def passed(self, stage_name: str) -> bool:
        """Whether the run being continued is already in a later stage."""
        state = self.restored
        return (
            state is not None and stage_name in state["finished"] and state["stage"] != stage_name
        )

    def run(self, stage: Stage) -> None:
        """Run a stage to its end, from its checkpoint if there is one.

        Raises: Stopped after SIGTERM or Ctrl-C (state is saved), FloatingPointError when the loss
            is not finite.
        """
        config = self.config
        scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        start = self._restore(stage, scaler)
        stage.train_mode()
        watch, window = Stopwatch(), []
        self.log.start_progress(stage.name, stage.iterations, start)
        try:
            with StopSignal() as stop:
                stop.armed = True
                for iteration in range(start, stage.iterations):
                    values = self._step(stage, scaler, iteration)
                    done = iteration + 1
                    watch.step()
                    window.append(values)
                    if done % config.log_every == 0 or done == stage.iterations:
                        self._log_window(stage, done, window, watch.read())
                        window = []
                    self.log.advance()
                    if config.val_every and _due(done, config.val_every, stage.iterations):
                        self._validate(stage, done)
                        watch.reset()
                    if stop.received is not None or _due(
                        done, config.checkpoint_every, stage.iterations
                    ):
                        self._save("last", stage, scaler, done)
                        watch.reset()
                    if stop.received is not None:
                        raise Stopped(
                            stop.received,
                            f"after {stage.name} iteration {done}, saved to {self.folder}",
                        )
        finally:
            self.log.stop_progress()
        if start < stage.iterations or not (self.checkpoints / f"{stage.name}.pt").is_file():
            save_checkpoint(
                self.checkpoints / f"{stage.name}.pt", self._weights(stage, stage.iterations)
            )

    def _step(self, stage: Stage, scaler, iteration: int) -> dict[str, float]:
        seed_everything(self.config.seed, stage.name, iteration)
        with autocast(self.config, self.device):
            values = stage.step(iteration)
        values |= {"lr": stage.optimizer.param_groups[0]["lr"]}
        loss = values["loss"]
        stage.optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if self.config.grad_clip is not None:
            scaler.unscale_(stage.optimizer)
            parameters = [p for group in stage.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
        scaler.step(stage.optimizer)
        scaler.update()
        with warnings.catch_warnings():
            # The scaler may skip a step that overflowed; the schedule goes by iterations all the
            # same.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            stage.schedule.step()
        return {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()}

    def _log_window(self, stage: Stage, done: int, window: list[dict], seconds: float) -> None:
        """Means since the last line. Reading the numbers here only keeps a GPU from waiting at
        every step."""
        means = {k: float(sum(float(v[k]) for v in window) / len(window)) for k in window[-1]}
        if not torch.isfinite(torch.tensor(means["loss"])):
            raise FloatingPointError(
                f"loss is {means['loss']} in {stage.name} near iteration {done}; the last "
                "checkpoint is in "
                f"{self.checkpoints}. Lower the learning rate, or use --amp off or bf16"
            )
        means |= {"lr": window[-1]["lr"], "step_ms": 1000.0 * seconds}
        self.log.record(stage.name, done, means)
        numbers = " ".join(f"{k} {v:.4g}" for k, v in means.items())
        self.log.info(f"{stage.name} {done}/{stage.iterations} {numbers}")
        self.log.note(f"loss {means['loss']:.4g}")

    def _validate(self, stage: Stage, done: int) -> None:
        values = stage.validate()
        stage.train_mode()
        if values is None:
            return
        self.log.record(stage.name, done, values)
        self.log.info(f"{stage.name} {done} " + " ".join(f"{k} {v:.4f}" for k, v in values.items()))
        if values["val_mean_dice"] > self.best["metric"]:
            self.best = {"metric": float(values["val_mean_dice"]), "iteration": done}
            save_checkpoint(self.checkpoints / "best.pt", self._weights(stage, done))

    def _weights(self, stage: Stage, done: int) -> dict:
        """What evaluation needs: weights and settings, no optimiser."""
        modules = {k: m.state_dict() for k, m in stage.modules.items()}
        base = {"stage": stage.name, "iteration": done, "modules": modules, "best": self.best}
        return base | {"trainer": self.config.trainer, "config": config_to_dict(self.config)}

    def _save(self, name: str, stage: Stage, scaler, done: int) -> None:
        """Everything that the next iteration depends on. Batches depend on (seed, iteration) alone,
        so the iteration is the position of every sampler."""
        finished = list(self.restored["finished"]) if self.restored else []
        if done == stage.iterations and stage.name not in finished:
            finished.append(stage.name)
        state = self._weights(stage, done) | {
            "optimizer": stage.optimizer.state_dict(),
            "schedule": stage.schedule.state_dict(),
            "scaler": scaler.state_dict(),
            "rng": rng_state(),
            "finished": finished,
            "ran_on": self._ran_on(),
        }
        save_checkpoint(self.checkpoints / f"{name}.pt", state)
        self.restored = {
            "stage": stage.name,
            "iteration": done,
            "finished": finished,
            "best": self.best,
        }

    def _restore(self, stage: Stage, scaler) -> int:
        """Load the stage's state from the checkpoint being continued; returns the first iteration
        to run."""
        state = self.restored
        if not state or state["stage"] != stage.name or "optimizer" not in state:
            return 0
        for name, module in stage.modules.items():
            module.load_state_dict(state["modules"][name])
        stage.optimizer.load_state_dict(state["optimizer"])
        stage.schedule.load_state_dict(state["schedule"])
        scaler.load_state_dict(state["scaler"])
        set_rng_state(state["rng"])
        return state["iteration"]

    def _open_folder(self) -> dict | None:
        """State to continue from, or None for a fresh start."""
        last = self.checkpoints / "last.pt"
        if self.config.overwrite and self.config.resume == "none" and self.folder.exists():
            if not (self.folder / "config.yaml").is_file():
                raise ConfigError(
                    f"{self.folder} is not a run folder (no config.yaml); --overwrite will not "
                    "delete it"
                )
            shutil.rmtree(self.folder)
        remove_stale_temporaries(self.checkpoints)
        if self.config.resume == "none":
            if last.is_file():
                raise ConfigError(
                    f"{self.folder} already holds a run; use --resume auto to continue it, "
                    "--overwrite to start "
                    "again, or another --exp"
                )
            return None
        if self.config.resume != "auto":
            last = Path(self.config.resume)
        elif not last.is_file():
            # A kill before the first checkpoint leaves records only; they will be written again.
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
            return None
        state = load_checkpoint(last)
        if "optimizer" not in state:
            raise CheckpointError(
                f"{last} holds weights only; continue from checkpoints/last.pt of a run folder"
            )
        changed = changed_settings(self.config, state["config"], ignore=RESUMABLE_SETTINGS)
        if changed:
            listed = ", ".join(f"{k}: {old!r} -> {new!r}" for k, (old, new) in changed.items())
            raise ConfigError(
                f"cannot continue {last}: settings differ ({listed}); use the same, or another "
                "--exp"
            )
        return state


def _due(done: int, every: int, total: int) -> bool:
    """True every `every` iterations (0: never) and at the end."""
    return done == total or (every > 0 and done % every == 0)
