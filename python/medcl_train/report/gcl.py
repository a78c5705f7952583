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
_POSITIVE, _NEGATIVE, _ANCHOR = "#009E73", "#D55E00", "#F0E442"
_LINES = 8


def pictures(
    config: GclConfig, folder: Path, data: TrainingData, records: Sequence[dict]
) -> list[str]:
    """Sections of the report page."""
    sections = []
    if conflict_rates(records, config.perspective_names, folder / "figures" / "conflicts.png"):
        sections.append(
            figure("Conflicts between perspectives", "conflicts", _conflict_note(config))
        )
    checkpoint = folder / "checkpoints" / "pretrain.pt"
    if checkpoint.is_file() and config.pixel_weight > 0:
        selection(config, data, checkpoint, folder / "figures" / "selection.png")
        note = (
            "Two training slices that share a meta label, per perspective. Left: of the anchor "
            "pixels with a selected positive the one nearest to the middle. Middle: the pixels of "
            "the partner that the Gradient Filter selected for it, as dots; lines lead to the "
            f"{_LINES} of the largest |dL/ds|, which is their width. Right: cosine of the anchor's "
            f"projection with every pixel. Filter: {_filter_name(config)}; {config.score}."
        )
        sections.append(figure("What the Gradient Filter selects", "selection", note))
    return sections


def _conflict_note(config: GclConfig) -> str:
    what, unit = "share of rows (images, pixels)", "have a negative inner product"
    if config.conflict == "cosine":
        unit = f"have a cosine below {-config.conflict_margin:g}"
    elif config.conflict == "sign":
        what, unit = "share of single entries", "have opposite signs"
    acts = {
        "param": "acts on those of the encoder",
        "consensus": "acts on single pairs instead",
        "mean": "is off",
        "sum": "is off",
    }
    mitigator = acts.get(config.mitigator.rpartition("_")[2], "acts on those of the projections")
    return (
        f"Gradients under two perspectives that {unit}: {what} for those at the projections, and, "
        "where they are compared, for those of the encoder's parameters. The Gradient Mitigator "
        f"{mitigator}. Means over the iterations between two log lines."
    )


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
            len(chosen), 3, figsize=(10.4, 3.5 * len(chosen) + 0.5), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for row, (name, one) in enumerate(zip(labels.names, chosen, strict=True)):
            if not len(one.anchor):
                continue
            anchor, partner = _telling_anchor(one, labels.slices, height, width)
            mine = (one.anchor == anchor) & (one.candidate // n == partner)
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


def _telling_anchor(one, slices, height: int, width: int) -> tuple[int, int]:
    """Of the anchors with a selected positive, in another slice if there are any, the one nearest
    to the middle of its image; and the view in which its positive lies."""
    n = height * width
    x, y = one.anchor // n, one.candidate // n
    pool = torch.ones_like(x, dtype=torch.bool)
    for wish in (slices[x] != slices[y], one.gradient < 0):
        if (pool & wish).any():
            pool &= wish
    place = one.anchor % n
    away = (place // width - (height - 1) / 2).square() + (place % width - (width - 1) / 2).square()
    best = int(away.where(pool, torch.inf).argmin())
    return int(one.anchor[best]), int(y[best])


def _draw_pair(fig, axes, name, image_x, image_y, cosine, anchor, candidates, gradients) -> None:
    h, w = cosine.shape
    cell = np.array([image_x.shape[1] / w, image_x.shape[0] / h])
    extent = (-0.5, image_x.shape[1] - 0.5, image_x.shape[0] - 0.5, -0.5)

    def place(index):
        return (np.array([index % w, index // w]).T + 0.5) * cell - 0.5

    for axis, image in zip(axes, (image_x, image_y), strict=False):
        axis.imshow(gray(image), cmap="gray", vmin=0, vmax=1)
    heat = axes[2].imshow(cosine, cmap="viridis", extent=extent, interpolation="nearest")
    fig.colorbar(heat, ax=axes[2], shrink=0.8)
    start = place(anchor)
    axes[0].scatter(*start, s=70, color=_ANCHOR, edgecolors="black", zorder=3)
    strongest = np.abs(gradients).argsort()[::-1]
    largest = np.abs(gradients[strongest[0]])
    for rank, at in enumerate(strongest):
        color = _POSITIVE if gradients[at] < 0 else _NEGATIVE
        end = place(int(candidates[at]))
        drawn = rank < _LINES
        for axis in axes[1:]:
            axis.scatter(*end, s=30 if drawn else 9, color=color, edgecolors="white", zorder=3)
        if drawn:
            line = ConnectionPatch(
                start, end, "data", "data", axesA=axes[0], axesB=axes[1], color=color, alpha=0.8,
                lw=0.6 + 2.4 * abs(gradients[at]) / largest,
            )  # fmt: skip
            fig.add_artist(line)
    for axis, title in zip(
        axes, (f"{name}: anchor image", "partner image", "cosine with the anchor"), strict=True
    ):
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
