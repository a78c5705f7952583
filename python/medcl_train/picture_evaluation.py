"""Evaluation of photographs: logits are resized to the mask on disk, scores are per image."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from .data.atomic import write_atomic
from .data.isic import Picture
from .evaluation import collapse_check, report_summary
from .metrics.images import image_table_lines, score_image, summarize_images, write_image_csv


@torch.inference_mode()
def predict_logits(model: nn.Module, picture: Picture, device: torch.device | str) -> Tensor:
    """Logits (1, K, H, W) at the picture's size. The model is put into eval mode and back."""
    training = model.training
    model.eval()
    logits = model(torch.from_numpy(picture.image)[None].to(device))[0].float()
    model.train(training)
    return logits


def predict_picture(
    model: nn.Module, picture: Picture, *, head: str = "d1", device: torch.device | str = "cpu"
) -> np.ndarray:
    """Class ids (H, W) uint8 at the picture's size; "d1" is the only head."""
    return _classes(predict_logits(model, picture, device))


def evaluate_pictures(
    model: nn.Module,
    pictures: Sequence[Picture],
    folder: str | Path,
    *,
    class_names: dict[int, str],
    head: str = "d1",
    device: torch.device | str = "cpu",
    definition: str = "pooled",
    empty: str = "nan",
    unit: str = "mm",
    say=print,
) -> tuple[dict | None, dict[str, np.ndarray]]:
    """Predict and score pictures; write <folder>/predictions/*.png at the size of each file,
    cases.csv, summary.json. `head`, `definition` and `unit` are for volumes.

    Returns: (summary or None when nothing was scored, predictions at the pictures' size by case).
    """
    folder = Path(folder)
    rows, predictions = [], {}
    num_classes = len(class_names)
    for picture in pictures:
        case = picture.case
        logits = predict_logits(model, picture, device)
        predictions[case.case_id] = _classes(logits)
        native = _classes(
            F.interpolate(logits, size=picture.native_size, mode="bilinear", align_corners=False)
        )
        _save(native, num_classes, folder / "predictions" / f"{case.case_id}.png")
        if case.label is not None:
            rows += score_image(
                native,
                picture.native_label(),
                num_classes=num_classes,
                case=case.case_id,
                subject=case.subject,
                empty=empty,
            )
    if unlabelled := sum(picture.case.label is None for picture in pictures):
        say(f"{unlabelled} of {len(pictures)} images have no mask: predicted, not scored")
    if not rows:
        return None, predictions
    write_image_csv(folder / "cases.csv", rows)
    summary = summarize_images(rows, class_names)
    foreground = [row for row in rows if row["class"]]
    shares = {"true": "true_share", "predicted": "predicted_share"}
    collapse = collapse_check(foreground, class_names, **shares)
    summary |= {"settings": {"empty": empty, "unit": "pixels"}, "collapse": collapse}
    report_summary(summary, folder, image_table_lines(summary), say)
    return summary, predictions


def _classes(logits: Tensor) -> np.ndarray:
    return logits[0].argmax(0).to(torch.uint8).cpu().numpy()


def _save(classes: np.ndarray, num_classes: int, path: Path) -> None:
    """PNG as the masks are: 0 and 255 for two classes, else class ids."""
    image = Image.fromarray(classes * np.uint8(255) if num_classes == 2 else classes)
    write_atomic(path, lambda file: image.save(file, "PNG"), "prediction")
