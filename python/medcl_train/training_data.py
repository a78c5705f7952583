"""From settings to the data of a run: cases on disk, split by subject, prepared volumes, batches of
slices."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .data import (
    Case,
    SliceDataset,
    Split,
    TwoStreamBatchSampler,
    Volume,
    find_cases,
    make_split,
    msd,
    prepare,
    recipe_for,
)
from .data.recipe import CLASS_NAMES, Recipe
from .engine.config import Config, ConfigError, TrainConfig


@dataclass(frozen=True)
class TrainingData:
    """Prepared data of a run. `pool` holds every training slice, labelled or not."""

    split: Split
    recipe: Recipe
    pool: SliceDataset
    val: list[Volume]
    test: list[Volume]

    @property
    def num_classes(self) -> int:
        return self.recipe.num_classes

    def labeled_indices(self) -> list[int]:
        """Slices of the labelled subjects."""
        return self.pool.indices(self.split.labeled)

    def images(self, indices: Sequence[int], device: torch.device) -> Tensor:
        """Slices (B, 1, H, W) float32."""
        return torch.stack([self.pool[i]["image"] for i in indices]).to(device)

    def labels(self, indices: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Labels (B, H, W) int64, and (B, K) bool: classes that nobody annotated in the volume of
        this slice, where the label 0 may hide them; None when there are none."""
        items = [self.pool[i] for i in indices]
        labels = torch.stack([item["label"] for item in items]).to(device)
        cases = [self.pool.volumes[item["volume"]].case for item in items]
        if not any(case.missing_classes for case in cases):
            return labels, None
        missing = torch.zeros(len(cases), self.num_classes, dtype=torch.bool)
        for row, case in zip(missing, cases, strict=True):
            row[list(case.missing_classes)] = True
        return labels, missing.to(device)

    def sampler(
        self, labeled_batch_size: int, unlabeled_batch_size: int, seed: int
    ) -> TwoStreamBatchSampler:
        """Labelled and unlabelled slices; the labelled part does not depend on the unlabelled
        one."""
        return TwoStreamBatchSampler(
            self.labeled_indices(),
            range(len(self.pool)),
            labeled_batch_size + unlabeled_batch_size,
            labeled_batch_size,
            seed,
        )


def class_names(dataset: str, num_classes: int, given: Sequence[str] = ()) -> dict[int, str]:
    """{class id: name}: the names given, else those of the data set, else numbers."""
    known = given or CLASS_NAMES.get(dataset, ())
    return {i: known[i] if len(known) == num_classes else str(i) for i in range(num_classes)}


def recipe_of(config: TrainConfig) -> Recipe:
    """Pre-processing of a run; the same settings give the same recipe at evaluation."""
    planar = config.size is not None and len(config.size) == 2
    size = config.size if planar else None  # the size of patches is none of slices
    options: dict = {"modality": config.modality, "stray_421": config.stray_421}
    options |= {name: True for name in ("n4", "clip") if getattr(config, name)}
    if config.dataset == "msd":
        options["task"] = config.task or "hippocampus"
        if config.num_classes is not None:
            options["num_classes"] = config.num_classes
        elif config.task == "other":
            raise ConfigError("--task other needs --num-classes, or dataset.json in --data-root")
    recipe = recipe_for(config.dataset, variant=config.variant, size=size, **options)
    if config.num_classes not in (None, recipe.num_classes):
        raise ConfigError(
            f"{config.dataset} has {recipe.num_classes} classes, not "
            f"num_classes={config.num_classes}"
        )
    return recipe


def with_task(config: Config) -> Config:
    """The settings with what the folder of an MSD task says about itself: whether it is the
    hippocampus, number and names of its classes. A run does this first, so that its checkpoints
    carry it. Other data sets, and the hippocampus with its usual classes, change nothing.

    Raises: ConfigError when the number of classes is nowhere said or said differently.
    """
    root = config.data_root
    if config.dataset != "msd" or root is None or not root.is_dir():
        return config
    hippocampus, found = msd.describe(root)
    task = config.task or ("hippocampus" if hippocampus else "other")
    usual = len(CLASS_NAMES["msd"])
    if task == "hippocampus" and {config.num_classes or usual, len(found) or usual} == {usual}:
        return config
    names = config.class_names or found
    count = config.num_classes or len(names)
    if not count:
        raise ConfigError(
            f"{root} has no dataset.json with the names of its labels: give --num-classes"
        )
    if names and len(names) != count:
        raise ConfigError(f"num_classes={count}, but {root} has the classes {', '.join(names)}")
    return dataclasses.replace(config, task=task, num_classes=count, class_names=tuple(names))


def cases_of(config: TrainConfig, root: Path, dataset: str | None = None) -> list[Case]:
    """Cases of the run's data set, or of another layout, with the settings of its loader."""
    dataset = dataset or config.dataset
    options = {"mmwhs": {"modality": config.modality}}
    options |= dict.fromkeys(("acdc", "phantom"), {"phases": config.phases})
    return find_cases(dataset, root, **options.get(dataset, {}))


def load_data(config: TrainConfig, say: Callable[[str], None] = print) -> TrainingData:
    """Find, split and prepare everything that training and evaluation need.

    Raises: DataError for broken files, ConfigError when a data root is needed and not given.
    """
    config = with_task(config)
    recipe = recipe_of(config)
    deepest = 2 ** (len(config.widths) - 1)
    if any(length % deepest for length in recipe.size):
        raise ConfigError(
            f"size {recipe.size} must be divisible by {deepest}, the stride of the deepest of "
            f"{len(config.widths)} levels: choose another size or fewer widths"
        )
    cases = cases_of(config, data_root(config, say))
    split = split_of(config, cases, config.labeled_num)
    cache = config.cache_dir or config.out / "cache"
    volumes = prepare([c for c in cases if _is_used(c, split)], recipe, cache_dir=cache)
    pool = SliceDataset(
        split.select(volumes, "unlabeled"), labels="optional", ambiguous="background"
    )
    data = TrainingData(
        split, recipe, pool, split.select(volumes, "val"), split.select(volumes, "test")
    )
    say(
        f"{config.dataset}: {len(split.labeled)} labelled of {len(split.unlabeled)} training "
        "subjects "
        f"({len(data.labeled_indices())} of {len(pool)} slices), {len(split.val)} validation, "
        f"{len(split.test)} test; "
        f"slices {recipe.size[0]}x{recipe.size[1]}, {recipe.name}; split {split.sha256[:12]}"
    )
    return data


def split_of(config: TrainConfig, cases: Sequence[Case], labeled: int | float) -> Split:
    """The split of the settings, with a number or a share of labelled subjects."""
    if config.split_file is not None:
        return Split.load(config.split_file)
    return make_split(
        cases,
        labeled,
        None if config.draw < 0 else config.draw,
        val=config.val_num,
        test=config.test_num,
        split_seed=config.split_seed,
    )


def _is_used(case, split: Split) -> bool:
    return any(case.subject in part for part in (split.unlabeled, split.val, split.test))


def data_root(config: TrainConfig, say: Callable[[str], None]) -> Path:
    """The folder of the data; generated sets are written on first use."""
    if config.data_root is not None:
        return config.data_root
    if config.dataset == "lesions":
        from .data import lesions

        root = config.out / f"lesions-{config.lesion_images}-{config.split_seed}"
        if lesions.ensure(root, config.lesion_images, seed=config.split_seed):
            say(f"drew {config.lesion_images} images of lesions into {root}")
        return root
    if config.dataset != "phantom":
        raise ConfigError(f"--dataset {config.dataset} needs --data-root, the folder of its files")
    from .data import phantom

    root = config.out / f"phantom-{config.phantom_patients}-{config.split_seed}"
    if phantom.ensure(root, config.phantom_patients, seed=config.split_seed):
        say(f"wrote a phantom of {config.phantom_patients} patients to {root}")
    return root
