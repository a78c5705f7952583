"""Checkpoints that survive a kill at any moment.

A file is written under a temporary name, flushed to the disk and renamed over the old one, so the
name always refers to a whole file. Contents are tensors, numbers, strings and containers of these:
`torch.load(weights_only=True)` reads them.
"""

import pickle
import zipfile
from pathlib import Path

import torch

from ..data.atomic import write_atomic
from ..data.errors import DataError

FORMAT = "medcl-checkpoint-1"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, broken, or does not belong to this run. The message names the file
    and the way out."""


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write `state` to `path` atomically. Raises CheckpointError when the folder cannot be
    written."""
    try:
        write_atomic(path, lambda file: torch.save({"format": FORMAT, **state}, file), "checkpoint")
    except DataError as error:
        raise CheckpointError(str(error)) from error


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU, with a checksum test of every part of the file.

    Raises CheckpointError: no such file, damaged file, or a file that is not one of our
        checkpoints.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged ({error}); delete it to start this stage again, "
            "or restore it from a copy"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a checkpoint of this trainer (expected format {FORMAT!r})"
        )
    return state


def remove_stale_temporaries(folder: str | Path) -> list[Path]:
    """Delete temporary files that a killed process left behind; returns them. They never hold the
    only copy."""
    stale = sorted(Path(folder).glob("*.tmp"))
    for path in stale:
        path.unlink(missing_ok=True)
    return stale
