"""Step time of the same training with two backends of the contrastive kernels, measured side by
side."""

import dataclasses
import statistics
import time
from collections.abc import Sequence

import torch

from ..training_data import load_data
from .config import TrainConfig
from .environment import choose_device
from .loop import Stage
from .seeding import seed_everything

WARM_UP = 3


def profile(config: TrainConfig, stage_classes: Sequence[type[Stage]]) -> None:
    """Print the step time of every stage with config.impl and with the plain-torch reference."""
    device = choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    data = load_data(config)
    for stage_class in stage_classes:
        impls = dict.fromkeys((config.impl, "reference"))
        stages = {i: stage_class(dataclasses.replace(config, impl=i), data, device) for i in impls}
        times = profile_stages(stages, config.profile_steps, device)
        print(f"{stage_class.name}, median of {config.profile_steps} steps on {device}")
        print("\n".join(profile_lines(times)))


def profile_stages(stages: dict[str, Stage], steps: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of a whole training step (forward, backward, optimiser) per named stage.

    The stages take turns step by step, so that other load on the machine hits all alike. WARM_UP
    steps are not counted.
    """
    times = {name: [] for name in stages}
    for iteration in range(WARM_UP + steps):
        for name, stage in stages.items():
            seed_everything(0, stage.name, iteration)
            _wait(device)
            start = time.perf_counter()
            loss = stage.step(iteration)["loss"]
            stage.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            stage.optimizer.step()
            _wait(device)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[WARM_UP:]) for name, values in times.items()}


def profile_lines(times: dict[str, float]) -> list[str]:
    """Aligned text: milliseconds, and how many times faster than the slowest."""
    slowest = max(times.values())
    return [f"{name:<24}{ms:10.1f} ms/step{slowest / ms:8.2f}x" for name, ms in times.items()]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
