"""Optimisers and learning-rate schedules by name."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw")
SCHEDULES = ("poly", "onecycle", "cosine", "warmup_cosine", "constant")
WARM_UP, FLOOR = 2 / 300, 0.01  # share of the iterations, and of the rate, in "warmup_cosine"


def build_optimizer(
    groups: Iterable[nn.Parameter] | list[dict], name: str, *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """ "sgd" (momentum 0.9), "nesterov" (momentum 0.99), "adam" or "adamw" over parameters or
    parameter groups."""
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=weight_decay)
    if name == "nesterov":
        return torch.optim.SGD(
            groups, lr=lr, momentum=0.99, nesterov=True, weight_decay=weight_decay
        )
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    raise ValueError(f"unknown optimizer {name!r}; choose from {OPTIMIZERS}")


def build_schedule(optimizer: torch.optim.Optimizer, name: str, iterations: int) -> LRScheduler:
    """Learning rate per iteration of T: "poly" lr*(1 - t/T)^0.9, "onecycle" (peak = lr), "cosine"
    to 0, "warmup_cosine" (linear for 2 of 300 parts, then cosine to 1 % of lr), "constant"."""
    iterations = max(1, iterations)  # a stage of no iterations still has an optimiser
    if name == "poly":
        return LambdaLR(optimizer, lambda step: max(0.0, 1.0 - step / iterations) ** 0.9)
    if name == "onecycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, peaks, total_steps=iterations)
    if name == "cosine":
        return CosineAnnealingLR(optimizer, iterations)
    if name == "warmup_cosine":
        warm_up = max(1, round(WARM_UP * iterations))

        def factor(step: int) -> float:
            if step < warm_up:
                return (step + 1) / (warm_up + 1)
            done = min(1.0, (step - warm_up) / max(1, iterations - warm_up))
            return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2

        return LambdaLR(optimizer, factor)
    if name == "constant":
        return LambdaLR(optimizer, lambda step: 1.0)
    raise ValueError(f"unknown schedule {name!r}; choose from {SCHEDULES}")
