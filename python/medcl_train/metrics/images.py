"""Metrics of 2-D images: Dice (DI), Jaccard index (JA) and pixel accuracy (AC) per image and class.

Two summaries are in use and differ much (specs/pdcr.md §3), so both are made: over the foreground
classes only, and "macro", where the background counts as a class like the others.

Empty masks follow the rule that Dice has in 3-D (`surface`): a class that neither mask has scores
1; one that only one mask has scores 0 and counts as missed; with "ssl4mis" an empty prediction
scores 0 in any case. Accuracy is defined for all masks.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .surface import EMPTY_RULES
from .table import aggregate, format_mean_sd, group_mean, summarize, write_csv

IMAGE_METRICS = ("dice", "jaccard", "accuracy")
IMAGE_COLUMNS = (
    "case",
    "subject",
    "class",
    *IMAGE_METRICS,
    "missed",
    "predicted_share",
    "true_share",
)


def score_image(
    prediction: np.ndarray,
    truth: np.ndarray,
    *,
    num_classes: int,
    case: str,
    subject: str | None = None,
    empty: str = "nan",
) -> list[dict]:
    """One row, with IMAGE_COLUMNS, per class of an image, background (class 0) too.

    Args:
        prediction, truth: integer class ids of one shape.
        num_classes: K, background counted.
        empty: rule for empty masks, see the module's text; "nan" and "worst" differ in distances
            only, of which there are none here.

    Returns rows whose accuracy is that of the class against the rest: with two classes, the share
    of right pixels. Shares are of the image's pixels.

    Raises: ValueError for shapes that differ, ids outside the classes, an unknown rule.
    """
    if empty not in EMPTY_RULES:
        raise ValueError(f"empty must be one of {EMPTY_RULES}, got {empty!r}")
    counts = _confusion(np.asarray(prediction), np.asarray(truth), num_classes, case)
    total = int(counts.sum())
    rows = []
    for label in range(num_classes):
        both = int(counts[label, label])
        true, predicted = int(counts[label].sum()), int(counts[:, label].sum())
        union = true + predicted - both
        if union and not (empty == "ssl4mis" and not predicted):
            dice, jaccard = 2 * both / (true + predicted), both / union
        else:
            dice = jaccard = 0.0 if empty == "ssl4mis" else 1.0
        rows.append(
            {
                "case": case,
                "subject": subject if subject is not None else case,
                "class": label,
                "dice": dice,
                "jaccard": jaccard,
                "accuracy": (total - union + both) / total,
                "missed": float((true == 0) != (predicted == 0)),
                "predicted_share": predicted / total,
                "true_share": true / total,
            }
        )
    return rows


def _confusion(
    prediction: np.ndarray, truth: np.ndarray, num_classes: int, case: str
) -> np.ndarray:
    """Pixels (K, K) by true and predicted class."""
    if prediction.shape != truth.shape or not truth.size:
        raise ValueError(
            f"{case}: prediction has shape {prediction.shape}, truth has {truth.shape}; they must "
            "be equal and not empty"
        )
    for name, ids in (("prediction", prediction), ("truth", truth)):
        if ids.dtype.kind not in "iub" or ids.min() < 0 or ids.max() >= num_classes:
            raise ValueError(
                f"{case}: {name} must hold integers 0..{num_classes - 1}, got {ids.dtype} "
                f"{ids.min()}..{ids.max()}"
            )
    index = truth.ravel().astype(np.int64) * num_classes + prediction.ravel()
    return np.bincount(index, minlength=num_classes**2).reshape(num_classes, num_classes)


def summarize_images(rows: Sequence[dict], class_names: dict[int, str] | None = None) -> dict:
    """Mean and sd over images.

    Returns {"classes", "mean", "by_subject"} of the foreground classes, as `summarize` makes them
    ("mean" averages the classes of an image first), and "macro": the same as "mean" with the
    background as a class.
    """
    foreground = [row for row in rows if row["class"]]
    summary = summarize(foreground, class_names, IMAGE_METRICS)
    return summary | {"macro": aggregate(group_mean(rows, "case", IMAGE_METRICS), IMAGE_METRICS)}


def write_image_csv(path: str | Path, rows: Sequence[dict]) -> None:
    """Write the rows of `score_image` atomically."""
    write_csv(path, rows, IMAGE_COLUMNS)


def image_table_lines(summary: dict) -> list[str]:
    """The summary as aligned text lines."""
    lines = [f"{'class':<22}{'DI':>16}{'JA':>16}{'AC':>16}{'images':>8}{'missed':>8}"]
    for name, entry in named_entries(summary):
        cells = "".join(f"{format_mean_sd(entry[metric]):>16}" for metric in IMAGE_METRICS)
        lines.append(f"{name:<22}{cells}{entry['n_cases']:>8}{entry['n_missed']:>8}")
    return lines


def named_entries(summary: dict) -> list[tuple[str, dict]]:
    """Rows of a table: the classes, then the two means."""
    means = [("foreground", summary["mean"]), ("with background", summary["macro"])]
    return [*summary["classes"].items(), *means]
