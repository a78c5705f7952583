"""Losses of fine-tuning: supervised CE + soft Dice, and thresholded cross pseudo labels
(specs/ideal.md §2)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def supervised_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    missing: Tensor | None = None,
    background_weight: float = 1.0,
    dice_background: bool = True,
    dice_over: str = "batch",
    dice: bool = True,
) -> Tensor:
    """0.5 * (cross-entropy + soft Dice) of one head.

    Dice is 1 - (2 sum p g + 1e-5) / (sum p^2 + sum g^2 + 1e-5), summed over the batch per class,
    mean over classes; or per image and class, mean over both.

    Args:
        logits: (B, K, *spatial). labels: (B, *spatial) int64, 0 = background.
        missing: (B, K) bool, classes that nobody drew in this image. Their pixels carry label 0, so
            there the label only says "background or a missing class": those probabilities are added
            up before the logarithm, and neither the missing classes nor the background of such an
            image enter Dice.
        background_weight: weight of class 0 in the cross-entropy (weighted mean, as torch's).
        dice_background: include class 0 in Dice.
        dice_over: "batch" or "image".
        dice: False: the cross-entropy alone.
    """
    if dice_over not in ("batch", "image"):
        raise ValueError(f"dice_over must be 'batch' or 'image', got {dice_over!r}")
    log_p = torch.log_softmax(_full_precision(logits), dim=1)
    truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)  # (B, K, *spatial)
    weight = torch.ones(logits.shape[1], dtype=log_p.dtype, device=logits.device)
    weight[0] = background_weight
    scored = torch.ones(
        logits.shape[:2], dtype=torch.bool, device=logits.device
    )  # (B, K) classes in Dice
    if missing is None or not missing.any():
        cross_entropy = F.nll_loss(log_p, labels, weight=weight)
    else:
        merged = missing.clone()
        merged[:, 0] = True
        tail = (1,) * (logits.dim() - 2)
        background = torch.where(merged.view(*merged.shape, *tail), log_p, -torch.inf).logsumexp(1)
        picked = torch.where(labels == 0, background, (log_p * truth).sum(1))
        pixel_weight = weight[labels]
        cross_entropy = -(pixel_weight * picked).sum() / pixel_weight.sum()
        scored = ~missing
        scored[:, 0] = ~missing.any(dim=1)
    if not dice:
        return cross_entropy
    p = log_p.exp() * scored.view(*scored.shape, *(1,) * (logits.dim() - 2))
    g = truth * scored.view(*scored.shape, *(1,) * (logits.dim() - 2))
    per_image = dice_over == "image"
    axes = (*(() if per_image else (0,)), *range(2, logits.dim()))
    overlap = 1 - (2 * (p * g).sum(axes) + 1e-5) / (
        p.square().sum(axes) + g.square().sum(axes) + 1e-5
    )
    counted = scored.clone() if per_image else scored.any(dim=0)  # (B, K) or (K,), as dice
    if not dice_background:
        counted[..., 0] = False
    return 0.5 * (cross_entropy + overlap[counted].mean() if counted.any() else cross_entropy)


def cross_pseudo_loss(
    logits1: Tensor,
    logits2: Tensor,
    *,
    threshold: float = 0.5,
    norm: str = "kept",
    kind: str = "ce",
) -> tuple[Tensor, Tensor]:
    """Each head learns from the other's thresholded prediction: L = CE(p1, y2; keep2) + CE(p2, y1;
    keep1).

    y_r = argmax of p_r (ties to the smaller class), keep_r = [max p_r >= threshold]; both without
    gradient, so no path leads from one head's loss to the other decoder.

    Args:
        logits1, logits2: (B, K, *spatial).
        norm: "kept" divides each term by the pixels it keeps (0 when none), "all" by all pixels.
        kind: "ce"; "dice" soft Dice on hard labels over kept pixels; "mse" (p1 - p2)^2 summed over
            classes.

    Returns: (loss, fraction of pixels kept, averaged over the heads).
    """
    terms, kept = [], []
    for student, teacher in ((logits1, logits2), (logits2, logits1)):
        target = torch.softmax(_full_precision(teacher.detach()), dim=1)
        confidence, pseudo = target.max(dim=1)
        keep = (confidence >= threshold).to(target.dtype)
        terms.append(_agreement(_full_precision(student), target, pseudo, keep, norm, kind))
        kept.append(keep.mean())
    return terms[0] + terms[1], torch.stack(kept).mean()


def _agreement(
    student: Tensor, target: Tensor, pseudo: Tensor, keep: Tensor, norm: str, kind: str
) -> Tensor:
    if norm not in ("kept", "all"):
        raise ValueError(f"norm must be 'kept' or 'all', got {norm!r}")
    if kind == "dice":
        p = torch.softmax(student, dim=1) * keep[:, None]
        g = F.one_hot(pseudo, student.shape[1]).movedim(-1, 1) * keep[:, None]
        axes = (0, *range(2, student.dim()))
        dice = 1 - (2 * (p * g).sum(axes) + 1e-5) / (
            p.square().sum(axes) + g.square().sum(axes) + 1e-5
        )
        return dice.mean() * (keep.mean() if norm == "all" else 1.0)
    if kind == "ce":
        per_pixel = F.cross_entropy(student, pseudo, reduction="none")
    elif kind == "mse":
        per_pixel = (torch.softmax(student, dim=1) - target).square().sum(dim=1)
    else:
        raise ValueError(f"kind must be 'ce', 'dice' or 'mse', got {kind!r}")
    total = keep.sum().clamp(min=1.0) if norm == "kept" else keep.numel()
    return (per_pixel * keep).sum() / total


def _full_precision(x: Tensor) -> Tensor:
    """float32 for half-precision logits of autocast; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def ramp_up(iteration: int, length: float) -> float:
    """exp(-5 (1 - t)^2) with t = min(iteration, length) / length; 1 when length is 0."""
    if length <= 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(iteration, length) / length) ** 2)
