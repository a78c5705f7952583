"""The page that a run leaves behind: loss curves, overlays, matched pixels, scores."""

from .page import write_report

__all__ = ["write_report"]
