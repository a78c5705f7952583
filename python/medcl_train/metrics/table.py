"""From label maps to rows (one per case and class), and from rows to mean ± sd."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..data.atomic import write_atomic
from .surface import score_masks

METRICS = ("dice", "hd", "hd95", "asd", "assd")
UNITS = ("mm", "voxel")
COLUMNS = (
    "case",
    "subject",
    "class",
    *METRICS,
    "missed",
    "volume_ratio",
    "predicted_ml",
    "true_ml",
)


def score_case(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float],
    *,
    num_classes: int,
    case: str,
    subject: str | None = None,
    missing_classes: Iterable[int] = (),
    definition: str = "pooled",
    empty: str = "nan",
    unit: str = "mm",
) -> list[dict]:
    """One row per annotated foreground class of a volume.

    Args:
        prediction, truth: integer label maps of one shape, 0 = background.
        spacing: voxel size in mm per axis.
        num_classes: number of classes including the background.
        missing_classes: classes that nobody drew in this case. They are not scored (no row): the
            truth is unknown there.
        definition, empty: as in `score_masks`.
        unit: of the distances, "mm" by the spacing or "voxel".

    Returns rows with COLUMNS. volume_ratio = predicted / true volume, NaN without true volume.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {UNITS}, got {unit!r}")
    missing = set(missing_classes)
    steps = spacing if unit == "mm" else None
    voxel_ml = float(np.prod(spacing)) / 1000.0
    rows = []
    for label in range(1, num_classes):
        if label in missing:
            continue
        predicted, true = prediction == label, truth == label
        scores = score_masks(predicted, true, steps, definition=definition, empty=empty)
        n_predicted, n_true = int(predicted.sum()), int(true.sum())
        rows.append(
            {
                "case": case,
                "subject": subject if subject is not None else case,
                "class": label,
                **scores,
                "volume_ratio": n_predicted / n_true if n_true else float("nan"),
                "predicted_ml": n_predicted * voxel_ml,
                "true_ml": n_true * voxel_ml,
            }
        )
    return rows


def summarize(
    rows: Sequence[dict],
    class_names: dict[int, str] | None = None,
    metrics: Sequence[str] = METRICS,
) -> dict:
    """Mean and sd over cases, per class and over classes.

    Each metric is averaged over the cases where it is defined; `n` says how many, and `n_missed`
    how many cases have an empty mask on one side only (their distances are NaN and left out of the
    mean, their Dice 0 is in it). The entry "mean" averages the classes of a case first;
    "by_subject" averages the cases of a subject before that.

    Returns {"classes": {name: {metric: {"mean", "sd", "n"}, "n_missed", "n_cases"}}, "mean": {...},
    "by_subject": {...}}.
    """
    names = class_names or {}
    labels = sorted({row["class"] for row in rows})
    per_class = {
        names.get(label, str(label)): aggregate([r for r in rows if r["class"] == label], metrics)
        for label in labels
    }
    cases = group_mean(rows, "case", metrics)
    subjects = group_mean(cases, "subject", metrics)
    return {
        "classes": per_class,
        "mean": aggregate(cases, metrics),
        "by_subject": aggregate(subjects, metrics),
    }


def group_mean(rows: Sequence[dict], key: str, metrics: Sequence[str] = METRICS) -> list[dict]:
    """Average rows that share `key`; NaN entries are left out, a group of NaN only stays NaN.
    Missed counts add up."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    merged = []
    for members in groups.values():
        row = {m: _mean([r[m] for r in members]) for m in metrics}
        row |= {"case": members[0]["case"], "subject": members[0]["subject"]}
        row["missed"] = sum(r["missed"] for r in members)
        merged.append(row)
    return merged


def aggregate(rows: Sequence[dict], metrics: Sequence[str] = METRICS) -> dict:
    """{metric: mean and sd over the rows, "n_missed", "n_cases"}."""
    result: dict = {metric: mean_and_sd([r[metric] for r in rows]) for metric in metrics}
    return result | {"n_missed": int(sum(r["missed"] for r in rows)), "n_cases": len(rows)}


def mean_and_sd(values: Sequence[float]) -> dict:
    """{"mean", "sd" (n - 1 in the denominator, 0 for one value), "n"} of the values that are not
    NaN."""
    values = [v for v in values if not math.isnan(v)]
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 if values else float("nan")
    return {"mean": _mean(values), "sd": sd, "n": len(values)}


def _mean(values: Sequence[float]) -> float:
    values = [v for v in values if not math.isnan(v)]
    return float(np.mean(values)) if values else float("nan")


def format_mean_sd(entry: dict, digits: int = 3) -> str:
    """ "0.812 ± 0.034" of {"mean", "sd"}; "–" when undefined."""
    if math.isnan(entry["mean"]):
        return "–"
    return f"{entry['mean']:.{digits}f} ± {entry['sd']:.{digits}f}"


def write_csv(path: str | Path, rows: Sequence[dict], columns: Sequence[str] = COLUMNS) -> None:
    """Write rows to `path` atomically: a kill leaves the previous file whole."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_atomic(path, lambda file: file.write(text.getvalue().encode()), "table")
