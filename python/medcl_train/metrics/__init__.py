"""Segmentation metrics in 3-D with voxel spacing, an explicit rule for empty masks, and tables of
cases."""

from .surface import EMPTY_RULES, dice, score_masks, surface_distances
from .table import METRICS, format_mean_sd, score_case, summarize, write_csv

__all__ = [
    "EMPTY_RULES",
    "METRICS",
    "dice",
    "format_mean_sd",
    "score_case",
    "score_masks",
    "summarize",
    "surface_distances",
    "write_csv",
]
