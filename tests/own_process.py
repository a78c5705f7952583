"""pytest in a process of its own, for what a process decides once: which library it has, whether
Triton is interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def pytest_output(repo: Path, *arguments: str, **variables: str) -> str:
    """What `pytest -q` prints there; it must succeed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = os.pathsep.join((str(repo / "tests"), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=repo,
        env={**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10000:]
    return done.stdout
