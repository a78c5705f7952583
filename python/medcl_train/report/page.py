"""report.html of a run: a self-contained page beside its figures."""

import html
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.atomic import write_atomic
from ..data.augment import view
from ..engine.checkpoint import load_checkpoint
from ..engine.config import format_config
from ..engine.runlog import read_metrics
from ..engine.seeding import generator
from ..metrics import format_mean_sd
from ..training_data import TrainingData, class_names

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem;
color: #222; } h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .9rem; border-bottom: 1px solid #ddd;
text-align: right; } th:first-child, td:first-child { text-align: left; } img { max-width: 100%; }
.warn { color: #b3261e; font-weight: 600; } pre { background: #f6f6f6; padding: .8rem; overflow-x:
auto; font-size: 13px; } .note { color: #555; }
"""


def write_report(
    config,
    folder: Path,
    data: TrainingData,
    predictions: dict[str, np.ndarray],
    summary: dict | None,
    pictures: Callable[..., list[str]] | None = None,
) -> Path | None:
    """Draw the figures into <folder>/figures and write <folder>/report.html. None without
    matplotlib.

    Args:
        predictions: class ids (Z, H, W), of photographs (H, W), on the prepared grid by case id.
        summary: of `evaluate`; None when no test case has a label.
        pictures: sections of the method's own, from (config, folder, data, metric records);
            default: IDEAL's correspondences.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from . import figures

    names = class_names(config.dataset, data.num_classes, config.class_names)
    sections = []
    if summary is not None:
        sections.append(_scores(summary))
    records = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    if figures.curves(records, folder / "figures" / "curves.png"):
        sections.append(
            figure("Training", "curves", "Means over the iterations between two log lines.")
        )
    shown = _best_median_worst(data.test, predictions)
    if shown:
        drawn = [_overlay_row(title, item, predictions) for title, item in shown]
        rows, aspects = zip(*drawn, strict=True)
        figures.overlay(rows, folder / "figures" / "overlays.png", names, aspects)
        if hasattr(data.test[0], "rgb"):
            note = (
                "Best, median and worst test image by mean Dice at the network's size. The scores "
                "above are computed at the size of the files."
            )
        else:
            note = (
                "Best, median and worst test case by mean Dice, each at its slice with most "
                "annotated pixels, on the prepared grid. The scores above are computed on the "
                "source grid."
            )
        sections.append(figure("Prediction and truth", "overlays", note))
    sections += (pictures or _matches)(config, folder, data, records)
    settings = html.escape(format_config(config))
    sections.append(
        f"<h2>Settings</h2><details><summary>config.yaml</summary><pre>{settings}</pre></details>"
    )
    title = f"{html.escape(config.exp)}: {config.method} on {config.dataset}"
    split = data.split
    what = "images" if data.test and hasattr(data.test[0], "rgb") else "subjects"
    intro = (
        f"{len(split.labeled)} labelled of {len(split.unlabeled)} training {what}, "
        f"{len(split.test)} test {what}; "
        f"seed {config.seed}, draw {config.draw}."
    )
    text = (
        f'<!doctype html><html lang="en"><meta '
        f'charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>{intro}</p>{''.join(sections)}</html>\n"
    )
    return write_atomic(folder / "report.html", lambda file: file.write(text.encode()), "report")


# metric in a summary: column, digits; distances are in the unit of the summary
_COLUMNS = {
    "dice": ("Dice", 3),
    "jaccard": ("Jaccard", 3),
    "accuracy": ("accuracy", 3),
    "hd95": ("HD95 {unit}", 2),
    "assd": ("ASSD {unit}", 2),
}


def _scores(summary: dict) -> str:
    """Table of the metrics that the summary has: distances of volumes, overlaps of images."""
    shown = {k: v for k, v in _COLUMNS.items() if k in summary["mean"]}
    what = "images" if "macro" in summary else "cases"
    unit = summary["settings"]["unit"]
    titles = ("class", *(title.format(unit=unit) for title, _ in shown.values()), what, "missed")
    head = "".join(f"<th>{title}</th>" for title in titles)
    entries = [*summary["classes"].items(), ("mean of classes", summary["mean"])]
    if "macro" in summary:
        entries.append(("mean with background", summary["macro"]))
    rows = []
    for name, entry in entries:
        cells = [format_mean_sd(entry[metric], digits) for metric, (_, digits) in shown.items()]
        cells += [str(entry["n_cases"]), str(entry["n_missed"])]
        rows.append(
            f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
        )
    settings = summary["settings"]
    rule = f"empty masks: rule “{settings['empty']}”; missed = one side empty."
    if "macro" in summary:
        note = (
            "Per image at the size of its file; mean ± sd over images. Accuracy: of the class "
            f"against the rest; {rule}"
        )
    else:
        note = (
            f"3-D, on the source grid{' with its spacing' if unit == 'mm' else ''}; mean ± sd over "
            f"cases. HD95: {settings['definition']}; {rule} Head: {settings['head']}."
        )
    collapse = summary["collapse"]
    warning = (
        f'<p class="warn">Collapse: {html.escape(collapse["reason"])}</p>'
        if collapse["collapsed"]
        else ""
    )
    table = f"<table><tr>{head}</tr>{''.join(rows)}</table>"
    return f'<h2>Test scores</h2>{warning}{table}<p class="note">{note}</p>'


def figure(title: str, name: str, note: str) -> str:
    """Section with figures/<name>.png and a note below it."""
    return (
        f'<h2>{title}</h2><img src="figures/{name}.png" alt="{html.escape(title)}">'
        f'<p class="note">{html.escape(note)}</p>'
    )


def _best_median_worst(items, predictions) -> list:
    """[(title, Volume or Picture)] of up to three scored cases."""
    scored = []
    for item in items:
        if item.label is None or item.case.case_id not in predictions:
            continue
        prediction, truth = predictions[item.case.case_id], item.label
        dices = []
        for label in sorted(item.present):
            p, g = prediction == label, truth == label
            dices.append(2 * (p & g).sum() / max(1, p.sum() + g.sum()))
        scored.append((float(np.mean(dices)), item))
    scored.sort(key=lambda item: -item[0])
    places = {"best": 0, "median": len(scored) // 2, "worst": len(scored) - 1}
    chosen = {index: word for word, index in reversed(places.items())} if scored else {}
    return [
        (f"{chosen[i]}: Dice {scored[i][0]:.3f}\n{scored[i][1].case.case_id}", scored[i][1])
        for i in sorted(chosen)
    ]


def picture_of(item) -> tuple[np.ndarray, Any, float]:
    """(image, index, aspect) to draw a case: the colours of a photograph, the slice of a volume
    with most annotated pixels, without padding. `index` takes that part of a label or prediction.
    """
    if hasattr(item, "rgb"):
        return item.rgb(), ..., 1.0
    z = int((item.label > 0).sum(axis=(1, 2)).argmax())
    index = (z, *item.content[1:])
    return item.image[index], index, item.spacing[1] / item.spacing[2]


def _overlay_row(title: str, item, predictions):
    image, index, aspect = picture_of(item)
    return (title, image, item.label[index], predictions[item.case.case_id][index]), aspect


def _matches(config, folder: Path, data: TrainingData, records) -> list[str]:
    """Section with the correspondences that the pre-trained encoder finds between two views of a
    training slice."""
    checkpoint = folder / "checkpoints" / "pretrain.pt"
    if not checkpoint.is_file():
        return []
    from ..ideal import build_pair, find_positives
    from . import figures

    pair = build_pair(config, torch.device("cpu"))
    pair.load_state_dict(load_checkpoint(checkpoint)["modules"]["pair"])
    pair.eval()
    images = data.images([_richest_slice(data)], torch.device("cpu"))
    view_q, geometry_q = view(images, config.view_augmentation, generator(config.seed, "report-q"))
    view_k, geometry_k = view(images, config.view_augmentation, generator(config.seed, "report-k"))
    with torch.inference_mode():
        query, key = pair.query(view_q).levels[-1], pair.key(view_k).levels[-1]
    grid = query[0].shape[2:]
    places = geometry_q.places(geometry_k, grid, key[0].shape[2:])
    truth = find_positives("geom", query, key, places)
    found = find_positives("backbone", query, key, impl="auto")
    # Cells that the key view does not show have no right match; they are left out of picture and
    # count.
    found = torch.where(truth >= 0, found, -1)
    figures.correspondences(
        view_q[0, 0].numpy(),
        view_k[0, 0].numpy(),
        found[0].numpy(),
        folder / "figures" / "correspondences.png",
        title=f"Cosine argmax on encoder maps, stride {config.strides[-1]}",
        truth=truth[0].numpy(),
    )
    visible = truth >= 0
    off = torch.maximum(
        (found % grid[1] - truth % grid[1]).abs(), (found // grid[1] - truth // grid[1]).abs()
    )
    share = float((off[visible] <= 1).float().mean()) if visible.any() else float("nan")
    note = (
        f"Two random views of one training slice. Every dot is a cell of the query view's "
        "feature grid, its line leads to "
        f"the cell of the key view with the most similar encoder feature. {share:.0%} of the "
        f"{int(visible.sum())} cells that "
        f"both views show land within one cell of their true place. Training used "
        f"match={config.match}."
    )
    return [figure("Correspondences between two views", "correspondences", note)]


def _richest_slice(data: TrainingData) -> int:
    """The training slice with the largest intensity spread in the middle third of the first
    volume."""
    first = len(data.pool.volumes[0].image)
    middle = range(first // 3, max(first // 3 + 1, 2 * first // 3))
    return max(middle, key=lambda i: float(data.pool[i]["image"].std()))
