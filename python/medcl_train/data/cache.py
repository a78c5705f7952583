"""Prepared arrays on disk, one file per (file bytes, recipe).

The key is a hash of the contents of the case's files and of the recipe: a changed file or setting
makes a new entry, a moved file finds its old one. Entries are written atomically; a damaged entry
(npz members carry a CRC) is rebuilt, with a warning in the log.
"""

import hashlib
import io
import json
import logging
import zipfile
import zlib
from pathlib import Path

import numpy as np

from .atomic import write_atomic
from .cases import Case
from .nifti import read_bytes
from .recipe import Recipe
from .volume import Geometry

log = logging.getLogger(__name__)
_DAMAGED = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)
FORMAT = 1  # raise when the pre-processing code changes its result


def entry_key(case: Case, recipe: Recipe) -> str:
    """sha256 over the bytes of the case's files (and which of them is the label) and the recipe."""
    digest = hashlib.sha256()
    kind = "pair" if case.label is not None else "image"
    digest.update(f"{FORMAT} {kind} {recipe.digest()}".encode())
    for path in case.files():
        digest.update(hashlib.sha256(read_bytes(path)).digest())
    return digest.hexdigest()


def load(folder: Path, key: str):
    """(image, label or None, Geometry) of an entry, or None when absent or damaged."""
    path = Path(folder) / f"{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as entry:
            info = json.loads(entry["info"].item())
            if info["key"] != key:
                raise ValueError(f"the entry says it is {info['key']}")
            image = entry["image"]
            label = entry["label"] if "label" in entry.files else None
            return image, label, Geometry.from_json(info["geometry"])
    except FileNotFoundError:
        return None
    except _DAMAGED as error:
        log.warning("%s: damaged cache entry (%r), rebuilding it", path, error)
        return None


def store(folder: Path, key: str, image, label, geometry: Geometry) -> Path:
    """Write an entry; raises DataError when the folder cannot be written."""
    arrays = {"image": image} | ({} if label is None else {"label": label})
    info = json.dumps({"key": key, "geometry": geometry.to_json()})
    buffer = io.BytesIO()
    np.savez(buffer, info=np.array(info), **arrays)
    path = Path(folder) / f"{key}.npz"
    return write_atomic(path, lambda stream: stream.write(buffer.getbuffer()), what="cache entry")
