"""Data of a run: labelled photographs or patches of volumes, validation and test cases."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor

from ..data import PatchDataset, TwoStreamBatchSampler, prepare
from ..data.augment import STRENGTHS, augment
from ..data.patches import augment3d
from ..data.splits import Split
from ..evaluation import evaluate
from ..patch_prediction import predict_patches
from ..training_data import cases_of, data_root, recipe_of, split_of, with_task
from .config import PICTURES, PdcrConfig


@dataclass(frozen=True)
class PdcrData:
    """Attributes: train: a PictureDataset or PatchDataset of the labelled subjects. val, test:
    Pictures or Volumes."""

    config: PdcrConfig
    split: Split
    num_classes: int
    train: "PictureDataset | PatchDataset"
    val: list
    test: list

    def sampler(self, batch_size: int, seed: int) -> TwoStreamBatchSampler:
        """Batches of indices of `train`; fewer cases than that are repeated."""
        return TwoStreamBatchSampler(range(len(self.train)), [], batch_size, batch_size, seed)

    def batch(
        self, indices: Sequence[int], rng: Generator, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Augmented images (B, C, *spatial), labels (B, *spatial), and classes that nobody
        annotated (B, K) or None."""
        images, labels, missing = self.train.batch(indices, rng)
        change = augment if self.config.spatial_dims == 2 else augment3d
        images, labels = change(
            images.to(device), labels.to(device), STRENGTHS[self.config.augment], rng
        )
        return images, labels, None if missing is None else missing.to(device)

    @property
    def predict(self) -> Callable:
        """Prediction of one case on its prepared grid, as `quick_dice` takes it."""
        return predictor(self.config)

    @property
    def evaluate(self) -> Callable:
        """Evaluation of the test cases, as `conclude` takes it."""
        return evaluator(self.config)


class PictureDataset:
    """Pictures in memory, all with a mask."""

    def __init__(self, pictures: Sequence):
        self.images = torch.stack([torch.from_numpy(p.image) for p in pictures])
        self.labels = torch.stack([torch.from_numpy(p.label) for p in pictures])

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int], rng: Generator) -> tuple[Tensor, Tensor, None]:
        """Images (B, 3, H, W) and labels (B, H, W) int64; nothing is drawn."""
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen].long(), None


def predictor(config: PdcrConfig) -> Callable:
    if config.spatial_dims == 2:
        from ..picture_evaluation import predict_picture

        return predict_picture
    patch = config.input_size if config.prediction == "windows" else None
    return partial(predict_patches, patch=patch, overlap=config.overlap)


def evaluator(config: PdcrConfig) -> Callable:
    if config.spatial_dims == 2:
        from ..picture_evaluation import evaluate_pictures

        return evaluate_pictures
    return partial(evaluate, predict=predictor(config))


def find_all(config: PdcrConfig, root: Path) -> list:
    """Every case of a folder."""
    if config.dataset not in PICTURES:
        return cases_of(config, root)
    from ..data import isic  # Pillow is needed only for photographs

    return isic.find(
        root, images=config.image_folder, masks=config.mask_folder, dataset=config.dataset
    )


def prepare_all(config: PdcrConfig, cases: Sequence) -> list:
    """Cases as the network sees them: Pictures or Volumes."""
    if config.spatial_dims == 2:
        from ..data import isic

        return isic.load(cases, picture_recipe(config))
    return prepare(cases, recipe_of(config), cache_dir=config.cache_dir or config.out / "cache")


def picture_recipe(config: PdcrConfig):
    """How photographs are read."""
    from ..data.isic import PictureRecipe

    return PictureRecipe(
        size=config.input_size,
        num_classes=config.num_classes or 2,
        mask_values=config.mask_values,
        mask_resize=config.mask_resize,
        unit_range=config.unit_range,
    )


def num_classes_of(config: PdcrConfig) -> int:
    return (picture_recipe if config.spatial_dims == 2 else recipe_of)(config).num_classes


def load_data(config: PdcrConfig, say: Callable[[str], None] = print) -> PdcrData:
    """Find, split and read everything that training and evaluation need; unlabelled images are not
    read.

    Raises: DataError for broken files, ConfigError when a data root is needed and not given.
    """
    config = with_task(config)
    cases = find_all(config, data_root(config, say))
    split = split_of(config, cases, config.labeled)
    used = {*split.labeled, *split.val, *split.test}
    found = prepare_all(config, [case for case in cases if case.subject in used])
    labeled = split.select(found, "labeled")
    if config.spatial_dims == 2:
        train = PictureDataset(labeled)
    else:
        train = PatchDataset(labeled, config.input_size, foreground=config.foreground)
    data = PdcrData(
        config,
        split,
        num_classes_of(config),
        train,
        split.select(found, "val"),
        split.select(found, "test"),
    )
    what = "images" if config.spatial_dims == 2 else "subjects"
    size = "x".join(map(str, config.input_size))
    say(
        f"{config.dataset}: {len(split.labeled)} labelled of {len(split.unlabeled)} training "
        f"{what}, {len(split.val)} validation, {len(split.test)} test; "
        f"{'' if config.spatial_dims == 2 else 'patches '}{size}; split {split.sha256[:12]}"
    )
    return data
