"""Evaluation in 3-D on the source grid: predict every slice of a volume, go back to the file's
grid, score there."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .data import Volume, load_native, save_prediction
from .data.atomic import write_atomic
from .metrics import format_mean_sd, score_case, summarize, write_csv
from .models import TwinSegmenter


@torch.inference_mode()
def predict_volume(
    model: TwinSegmenter,
    volume: Volume,
    *,
    head: str = "d1",
    device: torch.device | str = "cpu",
    batch_size: int = 32,
) -> np.ndarray:
    """Class ids (Z, H, W) uint8 on the prepared grid. The model is put into eval mode and back."""
    training = model.training
    model.eval()
    slices = torch.from_numpy(volume.image[:, None])
    parts = []
    for batch in slices.split(batch_size):
        parts.append(
            model.probabilities(batch.to(device), head).argmax(dim=1).to(torch.uint8).cpu()
        )
    model.train(training)
    return torch.cat(parts).numpy()


def quick_dice(
    model: nn.Module,
    volumes: Sequence[Volume],
    *,
    head: str,
    device,
    predict: Callable[..., np.ndarray] = predict_volume,
) -> float:
    """Mean Dice over classes and volumes (3-D) or pictures on the prepared grid: cheap enough for
    validation during training. `predict` is called as predict_volume is."""
    values = []
    for volume in volumes:
        prediction = predict(model, volume, head=head, device=device)
        for label in sorted(volume.present):
            p, g = prediction == label, volume.label == label
            total = int(p.sum()) + int(g.sum())
            values.append(2.0 * int((p & g).sum()) / total if total else 1.0)
    return float(np.mean(values)) if values else float("nan")


def evaluate(
    model: nn.Module,
    volumes: Sequence[Volume],
    folder: str | Path,
    *,
    class_names: dict[int, str],
    head: str = "d1",
    device: torch.device | str = "cpu",
    definition: str = "pooled",
    empty: str = "nan",
    unit: str = "mm",
    save_nifti: bool = True,
    predict: Callable[..., np.ndarray] = predict_volume,
    say=print,
) -> tuple[dict | None, dict[str, np.ndarray]]:
    """Predict and score volumes; write <folder>/predictions/*.nii.gz, cases.csv, summary.json.

    Scores use the label as it lies on disk, on its own grid and spacing. Classes that nobody
    annotated in a case are not scored; cases without label are predicted only. `predict` is called
    as predict_volume is; `definition`, `empty` and `unit` are those of `score_case`.

    Returns: (summary or None when nothing was scored, predictions on the prepared grid by case id).
    """
    folder = Path(folder)
    rows, predictions, unlabelled = [], {}, 0
    for volume in volumes:
        case = volume.case
        prediction = predict(model, volume, head=head, device=device)
        predictions[case.case_id] = prediction
        if save_nifti:
            save_prediction(volume, prediction, folder / "predictions" / f"{case.case_id}.nii.gz")
        if volume.label is None:
            unlabelled += 1
            continue
        _, truth, _, spacing = load_native(case, volume.recipe)
        rows += score_case(
            volume.restore(prediction),
            truth,
            spacing,
            num_classes=volume.recipe.num_classes,
            case=case.case_id,
            subject=case.subject,
            missing_classes=case.missing_classes,
            definition=definition,
            empty=empty,
            unit=unit,
        )
    if unlabelled:
        say(f"{unlabelled} of {len(volumes)} cases have no label: predicted, not scored")
    if not rows:
        return None, predictions
    write_csv(folder / "cases.csv", rows)
    summary = summarize(rows, class_names)
    settings = {"head": head, "definition": definition, "empty": empty, "unit": unit}
    summary |= {"settings": settings, "collapse": collapse_check(rows, class_names)}
    report_summary(summary, folder, table_lines(summary), say)
    return summary, predictions


def report_summary(summary: dict, folder: Path, lines: Sequence[str], say=print) -> None:
    """<folder>/summary.json, written atomically with null for NaN; the table, and a warning of a
    collapse."""
    text = json.dumps(_no_nan(summary), indent=2).encode()
    write_atomic(folder / "summary.json", lambda file: file.write(text))
    for line in lines:
        say(line)
    if summary["collapse"]["collapsed"]:
        say(f"COLLAPSE: {summary['collapse']['reason']}")


def collapse_check(
    rows: Sequence[dict],
    class_names: dict[int, str],
    *,
    true: str = "true_ml",
    predicted: str = "predicted_ml",
    low: float = 0.5,
    high: float = 2.0,
) -> dict:
    """Whether a class is grossly over- or under-predicted: total predicted / total true volume
    outside [low, high].

    Args:
        true, predicted: keys of the volumes or areas in the rows.

    Semi-supervised training can collapse while its loss looks fine; a class that swallows another
    shows here first.
    """
    ratios, reasons = {}, []
    for label in sorted({r["class"] for r in rows}):
        drawn, found = (
            sum(r[key] for r in rows if r["class"] == label) for key in (true, predicted)
        )
        name = class_names.get(label, str(label))
        ratios[name] = found / drawn if drawn else float("nan")
        if drawn and not low <= ratios[name] <= high:
            reasons.append(f"{name} predicted at {ratios[name]:.2f} of its true volume")
    return {"collapsed": bool(reasons), "volume_ratio": ratios, "reason": "; ".join(reasons)}


def table_lines(summary: dict) -> list[str]:
    """The summary as aligned text lines."""
    hd95, assd = (f"{name} {summary['settings']['unit']}" for name in ("HD95", "ASSD"))
    width = max(14, *(len(name) + 1 for name in summary["classes"]))
    lines = [f"{'class':<{width}}{'Dice':>16}{hd95:>18}{assd:>18}{'cases':>7}{'missed':>8}"]
    for name, entry in [*summary["classes"].items(), ("mean", summary["mean"])]:
        cells = [
            format_mean_sd(entry["dice"]),
            format_mean_sd(entry["hd95"], 2),
            format_mean_sd(entry["assd"], 2),
        ]
        lines.append(
            f"{name:<{width}}{cells[0]:>16}{cells[1]:>18}{cells[2]:>18}{entry['n_cases']:>7}{entry['n_missed']:>8}"
        )
    return lines


def _no_nan(value):
    """NaN as null, for JSON."""
    if isinstance(value, dict):
        return {k: _no_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and value != value else value
