"""A very small GCL run on a very small phantom, for tests of the trainer."""

import dataclasses

import train_tiny

from medcl_train.gcl import GclConfig

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
