"""Where the shared real data lie on this machine."""

from pathlib import Path

from .errors import DataError


def shared_data_root() -> Path | None:
    """Folder of the shared real data sets, or None when there is none on this machine.

    `MEDCL_DATA` if set (it must exist: DataError), else `<repository>/../shared/data`.
    """
    from medcl_kernels import env  # the one reader of MEDCL_ variables

    root = env.data_root()
    if root is not None:
        if not root.is_dir():
            raise DataError.at(
                root,
                expected="the folder named by MEDCL_DATA",
                found="no such folder",
                fix="correct MEDCL_DATA or unset it",
            )
        return root
    root = Path(__file__).resolve().parents[3].parent / "shared" / "data"
    return root if root.is_dir() else None
