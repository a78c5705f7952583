"""Cells into text: aligned columns, or a Markdown table."""

from __future__ import annotations


def layout(cells: list[list[str]], markdown: bool) -> str:
    """The first line of `cells` is the head."""
    if markdown:
        lines = ["| " + " | ".join(line) + " |" for line in cells]
        return "\n".join([lines[0], "|" + " --- |" * len(cells[0]), *lines[1:]])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
