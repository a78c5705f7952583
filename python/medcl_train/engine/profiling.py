"""Step time and peak memory of the same training with two backends of the contrastive kernels,
measured side by side."""

import ctypes
import dataclasses
import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..training_data import load_data
from .config import TrainConfig
from .environment import choose_device
from .loop import Stage, autocast
from .seeding import seed_everything


def profile(
    config: TrainConfig, stage_classes: Sequence[type[Stage]], load: Callable = load_data
) -> None:
    """Print step time and peak memory of every stage with config.impl and, unless
    config.profile_alone, with the plain-torch reference. `load` gives the stages' data from the
    settings."""
    device = choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    data = load(config)
    for stage_class in stage_classes:
        impls = dict.fromkeys((config.impl, *(() if config.profile_alone else ("reference",))))
        stages = {i: stage_class(dataclasses.replace(config, impl=i), data, device) for i in impls}
        steps, warm_up = config.profile_steps, config.profile_warmup
        times = profile_stages(stages, steps, device, warm_up)
        print(f"{stage_class.name}, median of {steps} steps on {device}")
        memory = {name: peak_memory(stage, device) for name, stage in stages.items()}
        print("\n".join(profile_lines(times, memory)))


def profile_stages(
    stages: dict[str, Stage], steps: int, device: torch.device, warm_up: int = 3
) -> dict[str, float]:
    """Median milliseconds of a whole training step (forward, backward, optimiser) per named stage.

    The stages take turns step by step, so that other load on the machine hits all alike. The
    first `warm_up` are not counted.
    """
    times = {name: [] for name in stages}
    for iteration in range(warm_up + steps):
        for name, stage in stages.items():
            _wait(device)
            start = time.perf_counter()
            _train_step(stage, iteration, device)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[warm_up:]) for name, values in times.items()}


def peak_memory(stage: Stage, device: torch.device) -> float:
    """Largest memory of one training step on top of what was in use before it, in MiB: of torch's
    allocator on a GPU, resident memory elsewhere; NaN where the system does not tell it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _train_step(stage, 0, device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    stage.optimizer.zero_grad(set_to_none=True)
    status, mark = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed goes back to the system
        mark.write_text("5")  # VmHWM, the high-water mark, starts again from now
    except (OSError, AttributeError):
        return math.nan
    before = _resident(status, "VmRSS")
    _train_step(stage, 0, device)
    return _resident(status, "VmHWM") - before


def _resident(status: Path, name: str) -> float:
    """MiB."""
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text())
    return int(found[1]) / 1024 if found else math.nan


def profile_lines(times: dict[str, float], memory: dict[str, float] | None = None) -> list[str]:
    """Aligned text: milliseconds, how many times faster than the slowest, peak memory."""
    slowest = max(times.values())
    lines = [f"{name:<24}{ms:10.1f} ms/step{slowest / ms:8.2f}x" for name, ms in times.items()]
    if memory is None:
        return lines
    return [f"{line}{memory[name]:10.0f} MiB" for line, name in zip(lines, times, strict=True)]


def _train_step(stage: Stage, iteration: int, device: torch.device) -> None:
    """Forward, backward, optimiser."""
    seed_everything(0, stage.name, iteration)
    with autocast(stage.config, device):
        loss = stage.step(iteration)["loss"]
    stage.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    stage.optimizer.step()
    _wait(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
