"""Optimisers and learning-rate schedules by name."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("poly", "onecycle", "cosine", "constant")


def build_optimizer(
    groups: Iterable[nn.Parameter] | list[dict], name: str, *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """ "sgd" (momentum 0.9), "adam" or "adamw" over parameters or parameter groups."""
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=weight_decay)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    raise ValueError(f"unknown optimizer {name!r}; choose from {OPTIMIZERS}")


def build_schedule(optimizer: torch.optim.Optimizer, name: str, iterations: int) -> LRScheduler:
    """Learning rate per iteration of T: "poly" lr*(1 - t/T)^0.9, "onecycle" (peak = lr), "cosine"
    to 0, "constant"."""
    iterations = max(1, iterations)  # a stage of no iterations still has an optimiser
    if name == "poly":
        return LambdaLR(optimizer, lambda step: max(0.0, 1.0 - step / iterations) ** 0.9)
    if name == "onecycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, peaks, total_steps=iterations)
    if name == "cosine":
        return CosineAnnealingLR(optimizer, iterations)
    if name == "constant":
        return LambdaLR(optimizer, lambda step: 1.0)
    raise ValueError(f"unknown schedule {name!r}; choose from {SCHEDULES}")
