"""A very small IDEAL run on a very small phantom, for tests of the trainer."""

from pathlib import Path

from medcl_train.data import phantom

SETTINGS = {
    "exp": "run",
    "dataset": "phantom",
    "size": [32, 32],
    "labeled_num": 1,
    "val_num": 1,
    "test_num": 2,
    "widths": [4, 8, 8],
    "dropout": [0.1, 0.1, 0.2],
    "pretrain_iterations": 6,
    "pretrain_batch_size": 4,
    "pretrain_optimizer": "adamw",
    "pretrain_schedule": "onecycle",
    "feat_stride": 4,
    "projection_dim": 8,
    "momentum": 0.9,
    "match": "geom",
    "negatives": "image+queue",
    "queue_size": 16,
    "max_iterations": 6,
    "batch_size": 6,
    "labeled_batch_size": 3,
    "optimizer": "adamw",
    "schedule": "onecycle",
    "base_lr": 3.0e-3,
    "consistency_rampup": 4,
    "rampup_unit": 1,
    "threshold": 0.3,
    "val_every": 3,
    "checkpoint_every": 3,
    "log_every": 1,
    "threads": 1,
    "tensorboard": False,
    "report": False,
}


def write_phantom(folder: Path) -> Path:
    """Six patients with a few small slices each."""
    phantom.write(folder, 6, seed=0, size=(72, 80), slices=(3, 4), spacings=(1.785714, 2.0))
    return folder
