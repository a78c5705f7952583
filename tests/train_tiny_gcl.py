"""A very small GCL run on a very small phantom, and the worked example of its specification, for
tests of the trainer."""

import dataclasses

import torch
import train_tiny

from medcl_train.gcl import BatchLabels, GclConfig

_SHARED = {field.name for field in dataclasses.fields(GclConfig)}

SETTINGS = {k: v for k, v in train_tiny.SETTINGS.items() if k in _SHARED} | {
    "size": [16, 16],
    "pretrain_batch_size": 6,
    "pretrain_lr": 3.0e-3,
    "image_dim": 8,
    "pixel_dim": 8,
    "batch_size": 4,
    "dice": True,
    "queue_size": 0,
}

# The worked example of the GCL specification: six pixels, four channels, two perspectives.
H = [[1, 0.5, 0, 0.2], [0.8, 0.9, 0.1, 0], [0.3, 0.4, 1, 0.1], [0, 0.2, 0.9, 0.7],
     [0.5, 0.1, 0.3, 1], [1, 0, 0.6, 0.4]]  # fmt: skip
H = torch.tensor(H, dtype=torch.float64)
EXAMPLE = BatchLabels(
    codes={"a": torch.tensor([0, 0, 0, 1, 1, 1]), "b": torch.tensor([0, 1, 0, 1, 0, 1])},
    positions=torch.arange(6.0),
    slices=torch.arange(6),
    threshold=None,
)
BASE = GclConfig(perspectives=("a", "b"))
