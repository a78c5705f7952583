"""Pictures of PDCR and UAFS: wanted affinity beside cosine similarity, features by class, and where
the uncertainty blocks hesitate."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.lines import Line2D
from torch import nn
from torch.nn import functional as F

from .. import pdcr
from ..engine.checkpoint import load_checkpoint
from ..engine.config import ConfigError, config_from_dict
from ..pdcr import PdcrConfig, PdcrData
from ..training_data import class_names
from .figures import STYLE, class_colors, save, show
from .page import figure
from .scenes import (
    Cells,
    Scene,
    by_class,
    correlation,
    cosine,
    mean_cosines,
    principal,
    sampled,
    scenes_of,
    unit_rows,
    with_background,
)

_BACKGROUND = "#999999"
_PURE = 0.8  # share of one class in a patch from which on the patch is drawn as that class
_CPU = torch.device("cpu")


def pictures(
    config: PdcrConfig, folder: Path, data: PdcrData, records: Sequence[dict]
) -> list[str]:
    """Sections of the report page; none where no test or validation case has a label."""
    checkpoint = folder / "checkpoints" / "train.pt"
    cases = [case for case in (*data.test, *data.val) if case.label is not None]
    if not checkpoint.is_file() or not cases:
        return []
    start = pdcr.build_network(config, data.num_classes, _CPU).eval()
    trained = pdcr.build_network(config, data.num_classes, _CPU).eval()
    trained.load_state_dict(load_checkpoint(checkpoint)["modules"]["segmenter"])
    scenes = scenes_of(cases, config.input_size)
    names = class_names(config.dataset, data.num_classes, config.class_names)
    sections = []
    contrast = _contrast(config, trained, data.num_classes)
    if contrast is not None:
        both = {"before training": (start, contrast), "after training": (trained, contrast)}
        affinities(scenes[0], both, folder / "figures" / "affinity.png", names)
        window = "windows around them" if config.hierarchical else "their receptive field"
        note = (
            f"Cells of one test image ({scenes[0].name}) that PDCR compares, sorted by the class "
            f"shares of {window}. Affinity is what similarity is asked to be: 1 for equal shares. "
            "r is the correlation of the two over all pairs of cells."
        )
        sections.append(figure("Affinity and similarity of patches", "affinity", note))
        features(scenes, both, folder / "figures" / "features.png", names)
        note = (
            f"The same cells of {len(scenes)} test images by the two main axes of their unit "
            "features, coloured by the class in the middle of their patch; rings: patches with "
            f"less than {_PURE:.0%} of it. Cosines are means over pairs of cells of one class and "
            "of different classes."
        )
        sections.append(figure("Features by class", "features", note))
    if config.uses_uafs:
        uncertainties(scenes[:3], trained, folder / "figures" / "uncertainty.png")
        note = (
            "U of every UAFS block in test images: features are multiplied by 2 - U. Dark: "
            "certain. Each panel runs from its smallest to its largest value, written above; the "
            "line is the true border."
        )
        sections.append(figure("Uncertainty", "uncertainty", note))
    return sections


def compare_features(folders: dict[str, Path], data_root: Path | None, out: Path) -> None:
    """The same test images through the trained networks of several runs, side by side.

    Args:
        folders: run folders by name, for instance with and without PDCR. The images and the
            compared layers are those of the first.
        data_root: where its data are now; None: where they were. out: the picture to write.

    Raises: CheckpointError for a run without checkpoints/train.pt.
    """
    runs = {}
    for name, folder in folders.items():
        state = load_checkpoint(Path(folder) / "checkpoints" / "train.pt")
        config = config_from_dict(PdcrConfig, state["config"], source=str(folder))
        runs[name] = config, state["modules"]["segmenter"]
    first = next(iter(runs.values()))[0]
    data = pdcr.load_data(replace(first, data_root=data_root or first.data_root), lambda _: None)
    networks = {}
    for name, (config, weights) in runs.items():
        network = pdcr.build_network(config, data.num_classes, _CPU).eval()
        network.load_state_dict(weights)
        networks[name] = network, pdcr.Contrast(config, network, data.num_classes).eval()
    scenes = scenes_of([c for c in data.test if c.label is not None], first.input_size)
    names = class_names(first.dataset, data.num_classes, first.class_names)
    features(scenes, networks, Path(out), names)


def affinities(scene: Scene, networks: dict, path: Path, names: dict[int, str]) -> None:
    """A row per contrasted layer: the image with its cells, affinity, similarity per network."""
    found = {title: sampled(scene, *pair) for title, pair in networks.items()}
    layers = list(next(iter(found.values())))
    columns = 2 + len(networks)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        fig, axes = plt.subplots(
            len(layers), columns, figsize=(3.1 * columns + 0.6, 3.1 * len(layers) + 0.5),
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for row, layer in zip(axes, layers, strict=True):
            one = next(iter(found.values()))[layer]
            order = by_class(one.shares, one.kind)
            wanted = 1 - np.abs(one.shares[:, None] - one.shares[None]).sum(-1)
            _draw_cells(row[0], scene, one, names)
            row[0].set_ylabel(layer, fontsize=9)
            panels = [("affinity", wanted)]
            panels += [(title, cosine(cells[layer].features)) for title, cells in found.items()]
            for axis, (title, matrix) in zip(row[1:], panels, strict=True):
                if title != "affinity":
                    title = f"cosine {title}\nr = {correlation(wanted, matrix):.2f}"
                image = axis.imshow(
                    matrix[order][:, order], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest"
                )
                axis.set_title(title, fontsize=10)
                _mark_classes(axis, one.shares[order], scene)
                axis.set_xticks([])
                axis.set_yticks([])
                axis.spines[:].set_visible(False)
        fig.colorbar(image, ax=axes, shrink=0.5, aspect=30, pad=0.01)
        _class_legend(fig, scene, names)
        save(fig, path)


def features(scenes: Sequence[Scene], networks: dict, path: Path, names: dict[int, str]) -> None:
    """Rows: layers; columns: networks. Cells of all scenes on the main axes of their features."""
    found = {title: [sampled(scene, *pair) for scene in scenes] for title, pair in networks.items()}
    layers = list(next(iter(found.values()))[0])
    colors = [_BACKGROUND, *map(class_colors(scenes[0].drawn), list(names)[1:])]
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(
            len(layers), len(networks),
            figsize=(4.1 * len(networks), 3.1 * len(layers) + 0.5),
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for row, layer in zip(axes, layers, strict=True):
            for axis, (title, cells) in zip(row, found.items(), strict=True):
                unit = np.concatenate([unit_rows(one[layer].features) for one in cells])
                shares = with_background(np.concatenate([one[layer].shares for one in cells]))
                kind = np.concatenate([one[layer].kind for one in cells])
                pure = shares[np.arange(len(kind)), kind] >= _PURE
                flat, explained = principal(unit)
                for label, color in enumerate(colors):
                    for full in (False, True):
                        these = (kind == label) & (pure == full)
                        axis.scatter(
                            *flat[these].T, s=13, lw=0.8, edgecolors=color, alpha=0.75,
                            facecolors=color if full else "none",
                        )  # fmt: skip
                inside, between = mean_cosines(unit, kind)
                axis.set_title(
                    f"{layer}, {title}\ncosine: same class {_number(inside)}, different "
                    f"{_number(between)}",
                    fontsize=10,
                )
                axis.set_xticks([])
                axis.set_yticks([])
                axis.set_xlabel(f"axis 1 ({explained[0]:.0%} of variance)")
                axis.set_ylabel(f"axis 2 ({explained[1]:.0%})")
        _class_legend(fig, scenes[0], names)
        save(fig, path)


def uncertainties(scenes: Sequence[Scene], network: nn.Module, path: Path) -> None:
    """Rows: images; columns: the image, then U of every block."""
    maps = [pdcr.uncertainty_maps(network, scene.image) for scene in scenes]
    layers = list(maps[0])
    columns = 1 + len(layers)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        fig, axes = plt.subplots(
            len(scenes), columns, figsize=(2.2 * columns, 2.45 * len(scenes) + 0.3),
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for row, scene, found in zip(axes, scenes, maps, strict=True):
            show(row[0], scene.drawn, scene.aspect)
            truth = scene.truth > 0
            for axis, layer in zip(row[1:], layers, strict=True):
                size = scene.image.shape[2:]
                u = F.interpolate(found[layer][None].float(), size=size)[0, 0].numpy()
                u = u[scene.index]
                axis.imshow(u, cmap="magma", aspect=scene.aspect, interpolation="nearest")
                axis.set_title(f"{u.min():.2f} to {u.max():.2f}", fontsize=8)
            for axis in row:
                if truth.any():
                    axis.contour(truth, levels=[0.5], colors=["#56B4E9"], linewidths=1.1)
                axis.set_axis_off()
        for axis, layer in zip(axes[0, 1:], layers, strict=True):
            axis.set_title(f"{layer}\n{axis.get_title()}", fontsize=8)
        save(fig, path)


def _contrast(config: PdcrConfig, network: nn.Module, num_classes: int) -> pdcr.Contrast | None:
    """The contrast of the settings, also for a method without it, where they give one that fits."""
    try:
        contrast = pdcr.Contrast(config, network, num_classes).eval()
    except ConfigError:
        if config.uses_pdcr:
            raise
        return None
    return contrast if contrast.names else None


def _blend(shares: np.ndarray, scene: Scene) -> np.ndarray:
    """Colours (N, 3): those of the classes mixed by their shares."""
    color = class_colors(scene.drawn)
    names = [_BACKGROUND, *(color(k) for k in range(1, shares.shape[1] + 1))]
    return with_background(shares).clip(0, 1) @ [matplotlib.colors.to_rgb(n) for n in names]


def _draw_cells(axis, scene: Scene, cells: Cells, names) -> None:
    """The image with the compared cells; of a volume those of the nearest plane of cells."""
    show(axis, scene.drawn, scene.aspect)
    places, inside = cells.places, np.ones(len(cells.places), bool)
    if scene.drawn.ndim == 2:
        distance = np.abs(places[:, 0] - scene.index)
        inside, places = distance == distance.min(), places[:, 1:]
    for label in range(1, len(names)):
        mask = scene.truth == label
        if mask.any():
            color = class_colors(scene.drawn)(label)
            axis.contour(mask, levels=[0.5], colors=[color], linewidths=1.2)
    colors = _blend(cells.shares, scene)
    axis.scatter(
        *places[inside, ::-1].T,
        s=32,
        c=colors[inside],
        edgecolors="black",
        linewidths=0.6,
        zorder=3,
    )
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlim(-0.5, scene.drawn.shape[1] - 0.5)
    axis.set_ylim(scene.drawn.shape[0] - 0.5, -0.5)


def _mark_classes(axis, shares: np.ndarray, scene: Scene) -> None:
    """A strip of class colours along two edges of a matrix."""
    n = len(shares)
    colors = _blend(shares, scene)
    width = max(1.0, n / 24)
    for extent, image in (
        ((-0.5 - width, -0.5, n - 0.5, -0.5), colors[:, None]),
        ((-0.5, n - 0.5, n - 0.5 + width, n - 0.5), colors[None]),
    ):
        axis.imshow(image, extent=extent, interpolation="nearest")
    axis.set_xlim(-0.5 - width, n - 0.5)
    axis.set_ylim(n - 0.5 + width, -0.5)


def _class_legend(fig, scene: Scene, names: dict[int, str]) -> None:
    color = class_colors(scene.drawn)
    handles = [
        Line2D([], [], ls="", marker="o", color=color(i) if i else _BACKGROUND, label=name)
        for i, name in names.items()
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)))


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"
