"""The fastest backend where it was measured, for `impl="auto"`. Written by
`python -m benchmarks.choose benchmarks/results/*.json`; do not edit.

Keys are (architecture, operation, dtype), dtype being "float32" for ieee products and "tf32" for
those that torch.get_float32_matmul_precision() allows. Values have a line per class of channels
(`dispatch.CHANNELS`) with an entry per class of rows (`dispatch.ROWS`); None was not measured.
"""

from __future__ import annotations

FASTEST: dict[tuple[str, str, str], tuple[tuple[str | None, ...], ...]] = {}
