"""The pytest-benchmark suite: `python -m pytest benchmarks`."""

from __future__ import annotations

import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

import benchmarks  # noqa: E402, F401  sets how threads wait, before torch is loaded
