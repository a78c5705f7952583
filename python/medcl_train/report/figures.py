"""Figures of a run, drawn with matplotlib without a display."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)
from matplotlib.lines import Line2D  # noqa: E402

# Okabe-Ito colours: distinguishable with colour-blind eyes, one per class
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")
STYLE = {
    "figure.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
    "legend.frameon": False,
}


_LOSSES = {
    "loss": "total",
    "loss_supervised": "supervised",
    "loss_cross": "cross pseudo labels",
    "loss_local": "dense",
    "loss_global": "image-level",
    "loss_image": "image-wise",
    "loss_pixel": "pixel-wise",
}
# logged without their weights and less log N, their value where all features are equal
_PDCR = {
    "loss_encoder": "within encoder layers",
    "loss_decoder": "within decoder layers",
    "loss_cross": "across layers",
}
_TITLES = {
    "pretrain": "Pre-training loss",
    "finetune": "Fine-tuning loss",
    "train": "Training loss",
}


def curves(records: Sequence[dict], path: Path) -> bool:
    """Loss and its parts and validation Dice of every stage over iterations. False without
    records."""
    panels = []  # title, rows, {name in the records: label}
    for stage in dict.fromkeys(r["stage"] for r in records):
        rows = [r for r in records if r["stage"] == stage]
        names = list(dict.fromkeys(name for row in rows for name in row))
        apart = _PDCR if stage == "train" else {}  # the one stage of PDCR
        parts = {k: _LOSSES.get(k, k) for k in names if k.startswith("loss") and k not in apart}
        panels.append((_TITLES.get(stage, stage), rows, parts))
        if terms := {k: label for k, label in apart.items() if k in names}:
            panels.append(("PDCR terms − log N, unweighted", rows, terms))
    if not panels:
        return False
    if any(r.get("val_mean_dice") is not None for r in records):
        title = "Validation Dice (prepared grid)"
        panels.append((title, panels[-1][1], {"val_mean_dice": ""}))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.2), squeeze=False)
        for axis, (title, rows, names) in zip(axes[0], panels, strict=True):
            of_dice = "val_mean_dice" in names
            colors = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
            for (name, label), color in zip(names.items(), colors, strict=False):
                points = [(r["iteration"], r[name]) for r in rows if r.get(name) is not None]
                axis.plot(
                    *zip(*points, strict=True),
                    color=color,
                    lw=1.6,
                    marker="o" if of_dice or len(points) < 3 else None,
                    ms=4,
                    label=label,
                )
            axis.set_title(title)
            axis.set_xlabel("iteration")
            axis.set_xlim(left=0)
            if of_dice:
                axis.set_ylim(0, 1)
            elif "loss" in names:
                axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
                if len(names) > 1:
                    axis.legend()
            elif len(names) > 1:  # lines far apart leave no room between them
                axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
        save(figure, path)
    return True


def overlay(
    cases: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]],
    path: Path,
    class_names: dict[int, str],
    aspects: Sequence[float] | None = None,
) -> None:
    """Rows of cases, columns image | truth | prediction, with class contours.

    Args:
        cases: (title, image (H, W) or (H, W, 3) in 0..1, truth (H, W), prediction (H, W)) per row.
        aspects: height of a pixel over its width, per row.
    """
    aspects = aspects or [1.0] * len(cases)
    colors = class_colors(cases[0][1])
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(
            len(cases),
            3,
            figsize=(8.4, 2.75 * len(cases) + 0.6),
            squeeze=False,
            layout="constrained",
        )
        for row, (title, image, truth, prediction) in enumerate(cases):
            for column, labels in enumerate((None, truth, prediction)):
                axis = axes[row, column]
                show(axis, image, aspects[row])
                if labels is not None:
                    _paint(axis, labels, len(class_names), aspects[row], colors)
                axis.set_axis_off()
                if row == 0:
                    axis.set_title(("image", "truth", "prediction")[column])
            axes[row, 0].text(
                -0.04,
                0.5,
                title,
                rotation=90,
                va="center",
                ha="right",
                transform=axes[row, 0].transAxes,
            )
        handles = [
            Line2D([], [], color=colors(i), lw=3, label=name)
            for i, name in class_names.items()
            if i
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)))
        save(figure, path)


def correspondences(
    view_q: np.ndarray,
    view_k: np.ndarray,
    positives: np.ndarray,
    path: Path,
    *,
    title: str,
    truth: np.ndarray | None = None,
    max_lines: int = 24,
) -> None:
    """Two views side by side, lines between the cells that were matched.

    Args:
        view_q, view_k: (H, W). positives: (h, w) flat index into the key grid, -1 = not matched.
        truth: (h, w) positives from the known geometry; matches within one cell of it are drawn
            solid, others dotted.
        max_lines: cells drawn, spread over the matched ones.
    """
    height, width = view_q.shape
    h, w = positives.shape
    gap = width * 0.12
    cell = np.array([width / w, height / h])
    matched = np.flatnonzero(positives.ravel() >= 0)
    shown = matched[np.linspace(0, len(matched) - 1, min(max_lines, len(matched))).astype(int)]
    start = (np.stack([shown % w, shown // w], 1) + 0.5) * cell - 0.5
    target = positives.ravel()[shown]
    end = (np.stack([target % w, target // w], 1) + 0.5) * cell - 0.5 + [width + gap, 0]
    # One colour per match, so that an eye can follow it; the line style says whether it is right.
    colors = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, max(1, len(shown))))
    right = np.ones(len(shown), dtype=bool)
    handles = []
    if truth is not None:
        known = truth.ravel()[shown]
        off = np.maximum(abs(target % w - known % w), abs(target // w - known // w))
        right = (known >= 0) & (off <= 1)
        handles = [
            Line2D(
                [], [], color="#444444", lw=1.6, marker="o", label="right place (within a cell)"
            ),
            Line2D([], [], color="#444444", lw=1.6, ls=":", marker="o", mfc="white", label="wrong"),
        ]
    canvas = np.full((height, int(width * 2 + gap)), np.nan)
    canvas[:, :width], canvas[:, canvas.shape[1] - width :] = gray(view_q), gray(view_k)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axis = plt.subplots(
            figsize=(9.6, 9.6 * height / canvas.shape[1] + 0.9), layout="constrained"
        )
        axis.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for i, (a, b) in enumerate(zip(start, end, strict=True)):
            # bowed lines: matches along one row would lie on top of each other
            bow = (-1) ** i * (0.03 + 0.05 * (i % 3)) * height
            t = np.linspace(0, 1, 40)[:, None]
            curve = (1 - t) ** 2 * a + 2 * t * (1 - t) * ((a + b) / 2 + [0, bow]) + t**2 * b
            style = "-" if right[i] else ":"
            axis.plot(*curve.T, color=colors[i], lw=1.5, ls=style, alpha=0.9)
            face = colors[i] if right[i] else "white"
            ends = np.stack([a, b]).T
            axis.scatter(
                *ends, color=[face], s=26, edgecolors=[colors[i]], linewidths=1.4, zorder=3
            )
        axis.text(width / 2, -0.03 * height, "query view", ha="center", va="bottom")
        axis.text(canvas.shape[1] - width / 2, -0.03 * height, "key view", ha="center", va="bottom")
        axis.set_axis_off()
        figure.suptitle(title, fontsize=11)
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=3)
        save(figure, path)


def show(axis, image: np.ndarray, aspect: float = 1.0) -> None:
    """An image (H, W) in grey between its percentiles, or (H, W, 3) in its colours."""
    if image.ndim == 2:
        axis.imshow(gray(image), cmap="gray", vmin=0, vmax=1, aspect=aspect)
    else:
        axis.imshow(image, aspect=aspect)


def _paint(axis, labels: np.ndarray, num_classes: int, aspect: float, colors) -> None:
    """Transparent fill and a contour line per class."""
    for label in range(1, num_classes):
        mask = labels == label
        if not mask.any():
            continue
        fill = np.zeros((*mask.shape, 4))
        fill[mask] = (*matplotlib.colors.to_rgb(colors(label)), 0.35)
        axis.imshow(fill, aspect=aspect)
        axis.contour(mask, levels=[0.5], colors=[colors(label)], linewidths=1.2)


def class_colors(image: np.ndarray) -> Callable[[int], str]:
    """Colour of a foreground class (1, 2, ...) on this image; skin asks for blue before orange."""
    order = COLORS if image.ndim == 2 else (*COLORS[1:], COLORS[0])
    return lambda label: order[(label - 1) % len(order)]


def gray(image: np.ndarray) -> np.ndarray:
    """0 to 1 between the 1st and the 99.5th percentile."""
    low, high = np.percentile(image, (1, 99.5))
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1)


def save(figure, path: Path) -> None:
    """Write and close a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
