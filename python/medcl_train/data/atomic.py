"""Files that are either whole or absent: temporary name, fsync, rename."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .errors import DataError


def write_atomic(path: Path | str, write: Callable[[BinaryIO], None], what: str = "file") -> Path:
    """Call `write` on a temporary file beside `path`, sync it and rename it to `path`.

    A kill at any moment leaves the previous file whole (and perhaps a `.tmp` beside it).
    The parent folder is made when missing. Raises DataError when the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the rename itself durable
        finally:
            os.close(folder)
    except OSError as error:
        raise DataError.at(
            path,
            expected=f"to write this {what}",
            found=f"{type(error).__name__}: {error}",
            fix=f"make {path.parent} writable with free space, or choose another folder",
        ) from error
    return path
