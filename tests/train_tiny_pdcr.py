"""Very small runs of PDCR and UAFS, on drawn lesions in 2-D and on the tiny phantom in 3-D."""

import dataclasses
from pathlib import Path

import train_tiny

from medcl_train.data import lesions
from medcl_train.pdcr import PdcrConfig

_SHARED = {field.name for field in dataclasses.fields(PdcrConfig)}

FLAT = {k: v for k, v in train_tiny.SETTINGS.items() if k in _SHARED} | {
    "dataset": "lesions",
    "size": [32, 32],
    "labeled_num": 4,
    "batch_size": 4,
    "val_num": 2,
    "test_num": 3,
    "width": 2,
    "middle_blocks": 1,
    "rates": [1, 2],
    "encoder_samples": [16, 16],
    "decoder_samples": [16, 8],
    "cross_samples": 4,
    "max_iterations": 4,
    "val_every": 2,
    "checkpoint_every": 2,
}
VOLUMES = FLAT | {
    "dataset": "phantom",
    "size": [4, 32, 32],
    "labeled_num": 1,
    "val_num": 1,
    "test_num": 1,
    "batch_size": 2,
    "widths": [4, 8, 8],
    "dropout": [0.0, 0.0, 0.0],
    "encoder_layers": ["encoder.blocks.0", "encoder.blocks.1"],
    "encoder_samples": [16, 16],
    "cross_samples": 16,
    "cross_channels": 8,
    "patches": "hierarchical",
    "patch_sizes": [3],
    "augment": "light",
    "dice": True,
}


def write_lesions(folder: Path) -> Path:
    """Twelve images of 40 x 40 pixels."""
    lesions.ensure(folder, 12, seed=0, size=40)
    return folder
