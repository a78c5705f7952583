"""The one exception of the data package."""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

log = logging.getLogger(__name__)


class DataError(ValueError):
    """A file or folder that cannot be used as it is.

    The message names the file, what was expected, what was found and the fix. When several cases
    of a folder are broken they are collected in one error; `problems` holds one text per problem.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()):
        super().__init__(message)
        self.problems = tuple(problems) or (message,)

    @classmethod
    def at(cls, path: Path | str, *, expected: str, found: str, fix: str) -> "DataError":
        return cls(f"{path}: expected {expected}, found {found}. Fix: {fix}")

    @classmethod
    def collected(cls, where: Path | str, problems: Iterable[str]) -> "DataError":
        """One error for all broken cases of `where`."""
        problems = tuple(problems)
        if len(problems) == 1:
            return cls(problems[0], problems)
        listed = "\n".join(f"  {i}. {text}" for i, text in enumerate(problems, 1))
        return cls(f"{where}: {len(problems)} problems, nothing was loaded:\n{listed}", problems)


def require_manifest(path: Path, wanted: dict) -> None:
    """Raises DataError unless the JSON file of a generated data set says `wanted`."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
    if found != wanted:
        raise DataError.at(
            path,
            expected=f"the generated set {wanted}",
            found=f"{found}",
            fix="choose another folder, or remove this one",
        )


def require_folder(root: Path | str, what: str) -> Path:
    """`root` as a Path that is a readable folder with something in it, or DataError."""
    root = Path(root).expanduser()
    if not root.exists():
        raise DataError.at(
            root,
            expected=f"a folder with {what}",
            found="no such folder",
            fix="check the path given as --data-root (or the MEDCL_DATA variable)",
        )
    if not root.is_dir():
        raise DataError.at(
            root,
            expected=f"a folder with {what}",
            found="a file",
            fix="give the folder that contains the data",
        )
    try:
        empty = next(root.iterdir(), None) is None
    except OSError as error:
        raise DataError.at(
            root,
            expected=f"a readable folder with {what}",
            found=f"{error}",
            fix="give this user read permission on the folder",
        ) from error
    if empty:
        raise DataError.at(
            root,
            expected=f"a folder with {what}",
            found="an empty folder",
            fix="unpack the dataset there or give another folder",
        )
    return root


def report_unused(folder: Path, paths: Iterable[Path], expected: str) -> None:
    """Log the entries of a folder that a loader does not understand and leaves alone."""
    names = sorted(str(path.relative_to(folder)) for path in paths)
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        log.warning("%s: %d entries are not %s, unused: %s", folder, len(names), expected, shown)
