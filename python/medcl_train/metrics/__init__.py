"""Segmentation metrics, in 3-D with voxel spacing and in 2-D per image, an explicit rule for empty
masks, and tables of cases."""

from .images import (
    IMAGE_METRICS,
    image_table_lines,
    score_image,
    summarize_images,
    write_image_csv,
)
from .surface import EMPTY_RULES, dice, score_masks, surface_distances
from .table import METRICS, format_mean_sd, score_case, summarize, write_csv

__all__ = [
    "EMPTY_RULES",
    "IMAGE_METRICS",
    "METRICS",
    "dice",
    "format_mean_sd",
    "image_table_lines",
    "score_case",
    "score_image",
    "score_masks",
    "summarize",
    "summarize_images",
    "surface_distances",
    "write_csv",
    "write_image_csv",
]
