"""Pictures of GCL: which perspectives contradict each other over time, and what the Gradient Filter
selects between two images."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch
from torch.nn import functional as F

from ..data.augment import view
from ..engine.checkpoint import load_checkpoint
from ..engine.seeding import generator
from ..gcl import Contrast, GclConfig, batches, build_contrast, meta_labels
from ..training_data import TrainingData
from .figures import COLORS, STYLE, gray, save
from .page import figure

_KINDS = (
    ("conflict_image", "image projections"),
    ("conflict_pixel", "pixel projections"),
    ("conflict_encoder_image", "encoder, image-wise"),
    ("conflict_encoder_pixel", "encoder, pixel-wise"),
)
_POSITIVE, _NEGATIVE = "#009E73", "#D55E00"


def pictures(
    config: GclConfig, folder: Path, data: TrainingData, records: Sequence[dict]
) -> list[str]:
    """Sections of the report page."""
    sections = []
    if conflict_rates(records, config.perspective_names, folder / "figures" / "conflicts.png"):
        note = (
            "Share of rows (of images, of pixels) whose gradients under two perspectives have a "
            "negative inner product, and how often the gradients of the encoder's parameters have "
            "one. The Gradient Mitigator acts "
            + ("on the latter." if config.mitigator.endswith("_param") else "on the former.")
            + " Means over the iterations between two log lines."
        )
        sections.append(figure("Conflicts between perspectives", "conflicts", note))
    checkpoint = folder / "checkpoints" / "pretrain.pt"
    if checkpoint.is_file() and config.pixel_weight > 0:
        selection(config, data, checkpoint, folder / "figures" / "selection.png")
        note = (
            "Two training slices that share a meta label, per perspective. Left: the anchor pixel "
            "with the most selected pairs. Right: cosine of its projection with every pixel of the "
            "partner; lines lead to the pixels that the Gradient Filter selected for it, their "
            f"width is |dL/ds|. Filter: {_filter_name(config)}; {config.score}."
        )
        sections.append(figure("What the Gradient Filter selects", "selection", note))
    return sections


def _filter_name(config: GclConfig) -> str:
    if config.filter_by == "threshold":
        return f"score of at least {config.filter_threshold}"
    kept = f"{config.keep:.0%} of the pairs"
    if config.quota is not None:
        kept = f"{config.quota[0]:.0%} of the positives and {config.quota[1]:.0%} of the negatives"
    return f"{kept}, by {config.filter_by}"


def conflict_rates(records: Sequence[dict], names: Sequence[str], path: Path) -> bool:
    """Panels per place where conflicts are counted, a line per pair of perspectives. False where
    there are none."""
    rows = [r for r in records if r["stage"] == "pretrain"]
    pairs = [(names[a], names[b]) for b in range(len(names)) for a in range(b)]
    panels = [
        (kind, title)
        for kind, title in _KINDS
        if any(r.get(f"{kind}_{a}_{b}") is not None for r in rows for a, b in pairs)
    ]
    if not panels:
        return False
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(
            1,
            len(panels),
            figsize=(3.3 * len(panels) + 0.6, 3.3),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, (kind, title) in zip(axes[0], panels, strict=True):
            for (a, b), color in zip(pairs, np.resize(COLORS, len(pairs)), strict=True):
                name = f"{kind}_{a}_{b}"
                points = [(r["iteration"], r[name]) for r in rows if r.get(name) is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), color=color, lw=1.6)
            axis.set_title(title)
            axis.set_xlabel("iteration")
            axis.set_xlim(left=0)
            axis.set_ylim(-0.02, 1.02)
        axes[0, 0].set_ylabel("share in conflict")
        handles = [
            Line2D([], [], color=color, lw=2, label=f"{a} – {b}")
            for (a, b), color in zip(pairs, np.resize(COLORS, len(pairs)), strict=True)
        ]
        fig.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
        save(fig, path)
    return True


def selection(config: GclConfig, data: TrainingData, checkpoint: Path, path: Path) -> None:
    """One row per perspective: anchor image, partner image with similarity and selected pairs."""
    device = torch.device("cpu")
    network = build_contrast(config, data.num_classes, device)
    contrast = Contrast(config, network)
    state = load_checkpoint(checkpoint)["modules"]
    network.load_state_dict(state["network"])
    contrast.load_state_dict(state["contrast"])
    network.eval()
    all_labels = meta_labels(
        data.pool, config.perspective_names, threshold=config.threshold, parts=config.slice_parts
    )
    batch = batches(config, all_labels).at(0)
    slices = data.images(batch, device)
    rng = generator(config.seed, "report-views")
    views, geometry = view(torch.cat([slices, slices]), config.view_augmentation, rng)
    labels = all_labels.batch(batch, device)
    with torch.no_grad():
        found = network(views)
    last = config.pretrain_iterations - 1  # the warm-up is over, keep has its final value
    pixel = next(b for b in contrast.branches(found, labels, geometry, last) if b.name == "pixel")
    height, width = found.pixels.shape[2:]
    n = height * width
    unit = F.normalize(found.pixels.flatten(2), dim=1)  # (V, D, n)

    chosen = pixel.pairs(pixel.features)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        fig, axes = plt.subplots(
            len(chosen), 2, figsize=(7.6, 3.5 * len(chosen) + 0.5), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for row, (name, one) in enumerate(zip(labels.names, chosen, strict=True)):
            # pairs of different slices show more than two views of one
            x, y = one.anchor // n, one.candidate // n
            other = labels.slices[x] != labels.slices[y]
            pool = other if other.any() else torch.ones_like(other)
            if not len(one.anchor):
                continue
            key = one.anchor[pool] * len(views) + y[pool]
            values, counts = key.unique(return_counts=True)
            best = int(values[counts.argmax()])
            anchor, partner = best // len(views), best % len(views)
            mine = (one.anchor == anchor) & (y == partner)
            cosine = unit[anchor // n, :, anchor % n] @ unit[partner]
            _draw_pair(
                fig, axes[row], name,
                views[anchor // n, 0].numpy(), views[partner, 0].numpy(),
                cosine.reshape(height, width).numpy(), anchor % n,
                (one.candidate[mine] % n).numpy(), one.gradient[mine].numpy(),
            )  # fmt: skip
        handles = [
            Line2D([], [], color=color, lw=2, marker="o", label=label)
            for color, label in (
                (_POSITIVE, "dL/ds < 0: pulled together"),
                (_NEGATIVE, "dL/ds > 0: pushed apart"),
            )
        ]
        fig.legend(handles=handles, loc="outside lower center", ncols=2)
        save(fig, path)


def _draw_pair(fig, axes, name, image_x, image_y, cosine, anchor, candidates, gradients) -> None:
    h, w = cosine.shape
    cell = np.array([image_x.shape[1] / w, image_x.shape[0] / h])
    extent = (-0.5, image_x.shape[1] - 0.5, image_x.shape[0] - 0.5, -0.5)

    def place(index):
        return (np.array([index % w, index // w]).T + 0.5) * cell - 0.5

    axes[0].imshow(gray(image_x), cmap="gray", vmin=0, vmax=1)
    axes[1].imshow(gray(image_y), cmap="gray", vmin=0, vmax=1)
    limit = float(np.abs(cosine).max())
    heat = axes[1].imshow(
        cosine, cmap="coolwarm", vmin=-limit, vmax=limit, alpha=0.5, extent=extent,
        interpolation="nearest",
    )  # fmt: skip
    fig.colorbar(heat, ax=axes[1], shrink=0.8, label="cosine with the anchor")
    start = place(anchor)
    axes[0].scatter(*start, s=70, color="#F0E442", edgecolors="black", zorder=3)
    largest = np.abs(gradients).max()
    for candidate, gradient in zip(candidates, gradients, strict=True):
        color = _POSITIVE if gradient < 0 else _NEGATIVE
        end = place(int(candidate))
        line = ConnectionPatch(
            start, end, "data", "data", axesA=axes[0], axesB=axes[1], color=color, alpha=0.8,
            lw=0.6 + 2.4 * abs(gradient) / largest,
        )  # fmt: skip
        fig.add_artist(line)
        axes[1].scatter(*end, s=30, color=color, edgecolors="white", zorder=3)
    axes[0].set_title(f"{name}: anchor image")
    axes[1].set_title("partner image")
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
