#!/usr/bin/env python3
"""Predict and score cases with a checkpoint of a training run: volumes in 3-D on the source grid,
photographs at the size of their files.

    python python/evaluate.py --checkpoint runs/ideal/checkpoints/finetune.pt --data-root DIR
    python python/evaluate.py --checkpoint CKPT --data-root DIR --cases test.list --out results
    python python/evaluate.py --checkpoint CKPT --dataset folder --data-root DIR --labels-root DIR2

Writes predictions/*.nii.gz on the grid and with the affine of each image (predictions/*.png of
photographs), and, where there are labels, cases.csv (one row per case and class) and summary.json.
Cases without label are predicted only. --dataset folder takes any folder of NIfTI images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from medcl_train import pdcr
from medcl_train.data import Case, prepare
from medcl_train.data.errors import DataError, require_folder
from medcl_train.data.nifti import is_nifti, stem
from medcl_train.engine.checkpoint import CheckpointError, load_checkpoint
from medcl_train.engine.config import ConfigError, config_from_dict
from medcl_train.engine.environment import choose_device
from medcl_train.engine.runs import exit_with_one_line
from medcl_train.evaluation import evaluate
from medcl_train.gcl import GclConfig
from medcl_train.ideal import IdealConfig, build_network
from medcl_train.training_data import cases_of, class_names, recipe_of

TRAINERS = {config.trainer: config for config in (IdealConfig, GclConfig, pdcr.PdcrConfig)}


@dataclass(frozen=True)
class Settings:
    """What to evaluate."""

    checkpoint: Path
    """A checkpoint with a segmenter: last.pt, best.pt, finetune.pt or train.pt of a run."""
    data_root: Path
    """Folder of the cases."""
    dataset: Literal["same", "acdc", "mmwhs", "msd", "ssl4mis", "phantom", "folder"] = "same"
    """Layout of data_root: that of the training run, another one, or any folder of NIfTI images.
    Photographs: same."""
    labels_root: Path | None = None
    """For --dataset folder: labels of the same file names."""
    cases: Path | None = None
    """Text file with one case or subject per line; default: every case of the folder."""
    out: Path | None = None
    """Default: evaluation beside the checkpoint's folder."""
    head: Literal["d1", "d2", "mean"] | None = None
    """Default: as in the training run."""
    definition: Literal["pooled", "directed"] | None = None
    """Of HD95; default: as in the training run."""
    empty: Literal["nan", "worst", "ssl4mis"] | None = None
    """Rule for empty masks; default: as in the training run."""
    unit: Literal["mm", "voxel"] | None = None
    """Of the distances; default: as in the training run."""
    device: str = "auto"


def main():
    settings = tyro.cli(Settings, description=__doc__)
    device = choose_device(settings.device)
    state = load_checkpoint(settings.checkpoint)
    if "segmenter" not in state["modules"]:
        raise CheckpointError(
            f"{settings.checkpoint} is of the {state['stage']} stage and has no decoder; give "
            "finetune.pt, train.pt, best.pt or a last.pt of supervised training"
        )
    config_class = TRAINERS[state.get("trainer", "ideal")]
    config = config_from_dict(config_class, state["config"], source=str(settings.checkpoint))
    is_pdcr = isinstance(config, pdcr.PdcrConfig)
    photographs = is_pdcr and config.spatial_dims == 2
    num_classes = pdcr.num_classes_of(config) if is_pdcr else recipe_of(config).num_classes
    build = pdcr.build_network if is_pdcr else build_network
    network = build(config, num_classes, device)
    network.load_state_dict(state["modules"]["segmenter"])
    print(
        f"{settings.checkpoint}: {state['stage']} iteration {state['iteration']}, {config.method}"
    )

    dataset = config.dataset if settings.dataset == "same" else settings.dataset
    if photographs:
        if settings.dataset != "same":
            raise ConfigError("a network of photographs evaluates photographs: leave out --dataset")
        cases = pdcr.find_all(config, settings.data_root)
    elif dataset == "folder":
        cases = folder_cases(settings.data_root, settings.labels_root)
    else:
        cases = cases_of(config, settings.data_root, dataset)
        check_classes(cases, num_classes)
    if settings.cases is not None:
        cases = select_cases(cases, settings.cases)
    out = settings.out or settings.checkpoint.resolve().parent.parent / "evaluation"
    score = pdcr.evaluator(config) if is_pdcr else evaluate
    summary, _ = score(
        network,
        pdcr.prepare_all(config, cases) if photographs else prepare(cases, recipe_of(config)),
        out,
        class_names=class_names(config.dataset, num_classes, config.class_names),
        head=settings.head or config.head,
        device=device,
        definition=settings.definition or config.definition,
        empty=settings.empty or config.empty,
        unit=settings.unit or config.unit,
    )
    print(f"{len(cases)} predictions in {out / 'predictions'}")
    if summary is not None:
        print(f"scores in {out / 'cases.csv'} and {out / 'summary.json'}")


def check_classes(cases, num_classes):
    """Refuse a folder whose dataset.json names another number of classes than the network has."""
    for case in cases:
        if case.meta.get("num_classes", num_classes) != num_classes:
            raise ConfigError(
                f"the network has {num_classes} classes, but dataset.json of {case.case_id} has "
                f"{case.meta['num_classes']}: give the folder of the task it was trained on"
            )


def folder_cases(root, labels_root):
    """Every NIfTI image of a folder as a case; labels by the same file name, all or none."""
    require_folder(root, "NIfTI images")
    images = sorted(path for path in root.iterdir() if is_nifti(path))
    if not images:
        raise DataError.at(
            root, expected="*.nii or *.nii.gz files", found="none", fix="give the images' folder"
        )
    cases = []
    for image in images:
        label = labels_root / image.name if labels_root is not None else None
        if label is not None and not label.is_file():
            raise DataError.at(
                label,
                expected=f"the label of {image.name}",
                found="no such file",
                fix="add it, or leave out --labels-root to predict only",
            )
        cases.append(Case(stem(image), stem(image), image, label, meta={"dataset": "folder"}))
    return cases


def select_cases(cases, listing):
    """The cases named in a text file (case or subject per line, # comments), in its order."""
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError.at(
            listing, expected="a list of cases", found=f"{error.strerror}", fix="check the path"
        ) from error
    names = [line.split("#")[0].strip() for line in lines]
    chosen = []
    for name in filter(None, names):
        found = [c for c in cases if name in (c.case_id, c.subject)]
        if not found:
            raise DataError.at(
                listing,
                expected="names of cases or subjects in the folder",
                found=f"{name!r}",
                fix=f"names look like {cases[0].case_id!r} or {cases[0].subject!r}",
            )
        chosen += [case for case in found if case not in chosen]
    if not chosen:
        raise DataError.at(
            listing, expected="at least one case", found="none", fix="write one name per line"
        )
    return chosen


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    exit_with_one_line(main)
