"""Settings of IDEAL. Where the paper's value is unknown the comment names the default reading and
its alternatives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..data.augment import Augmentation
from ..engine.config import ConfigError, TrainConfig
from .consistency import ramp_up


@dataclass(frozen=True, kw_only=True)
class IdealConfig(TrainConfig):
    """IDEAL: dense local contrastive pre-training of a U-Net encoder, then fine-tuning with cross
    pseudo labels."""

    method: Literal["ideal", "supervised"] = "ideal"
    """supervised: no pre-training of its own, no unlabelled image, decoder D1 only; same labelled
    batches, augmentation and initial weights as the IDEAL run of the same seed."""

    # --- stage 1: pre-training
    pretrain_iterations: int = 10_000
    """Iterations of dense contrastive pre-training; 0 = none."""
    pretrained: Path | None = None
    """Take the encoder from this checkpoint (checkpoints/pretrain.pt of another run) instead of
    pre-training."""
    pretrain_batch_size: int = 12
    """Slices per pre-training batch (each gives two views)."""
    pretrain_optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    pretrain_schedule: Literal["poly", "onecycle", "cosine", "constant"] = "constant"
    pretrain_lr: float = 1e-3
    pretrain_weight_decay: float = 0.0
    key: Literal["ema", "siamese", "two"] = "ema"
    """Key branch: moving average without gradient, shared weights, or a second trained network."""
    momentum: Annotated[float, tyro.conf.arg(aliases=["--ema-decay"])] = 0.999
    """Of the EMA key branch; 0.99 suits runs below 10 000 iterations."""
    init_from: Literal["q", "k"] = "q"
    """Which encoder is fine-tuned: that of the query or of the key branch."""
    feat_stride: Literal[16, 8, 4] = 16
    """Stride of the encoder map that is contrasted."""
    projection_dim: int = 128
    """Channels of the dense projection."""
    projection_hidden: int | None = None
    """None: one 1x1 convolution; a width: conv1x1 - ReLU - conv1x1."""
    match: Literal["backbone", "proj", "identity", "geom", "radius"] = "backbone"
    """Positives: argmax on encoder maps, argmax on projections, same position (views without
    geometry), nearest key pixel after the known geometry, or all key pixels within `radius` of that
    place."""
    radius: float = 1.0
    """In cells of the key grid, for match=radius."""
    multi_positive: Literal["out", "in"] = "out"
    """Mean over positives outside or inside the logarithm, for match=radius."""
    mutual: bool = False
    """Keep a query pixel only if its match points back to it."""
    negatives: Literal["image", "batch", "queue", "image+queue", "batch+queue"] = "image"
    """Where other key pixels come from."""
    queue_size: int = 4096
    """Entries of the queue: spatial means of earlier key projections."""
    intra: bool = False
    """Other query pixels of the image are negatives too."""
    symmetric: bool = False
    """Average the losses query to key and key to query."""
    temperature: float = 0.2
    n_query: int = 0
    """Random subset of query pixels per image; 0 = all. Key pixels stay complete."""
    crop: tuple[float, float] = (0.5, 1.0)
    """Area of a view's random crop, as a fraction of the slice."""
    view_rotate: float = 0.0
    """Largest rotation of a view, degrees."""

    # --- stage 2: fine-tuning
    max_iterations: int = 30_000
    """Fine-tuning iterations."""
    batch_size: int = 24
    """Slices per fine-tuning batch: labelled plus unlabelled."""
    labeled_batch_size: Annotated[int, tyro.conf.arg(aliases=["--labeled-bs"])] = 12
    """Labelled slices among them."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    schedule: Literal["poly", "onecycle", "cosine", "constant"] = "poly"
    base_lr: float = 0.01
    """Learning rate (peak of onecycle)."""
    encoder_lr_scale: float = 1.0
    """Factor on the encoder's learning rate."""
    weight_decay: float = 1e-4
    background_weight: float = 1.0
    """Weight of class 0 in the cross-entropy; the others have 1."""
    dice_background: bool = True
    """Whether the soft Dice term includes the background."""
    consistency: float = 0.1
    """Largest weight of the cross pseudo label loss."""
    consistency_rampup: float = 200.0
    """Length of the ramp-up exp(-5(1-t)^2), in units of `rampup_unit` iterations."""
    rampup_unit: int = 150
    """SSL4MIS counts the ramp-up in units of 150 iterations."""
    consistency_type: Literal["ce", "dice", "mse"] = "ce"
    """Cross-entropy or Dice against hard pseudo labels, or mean squared error against the other
    head's softmax."""
    threshold: float = 0.5
    """A pixel teaches the other head only if its largest probability reaches this; 0 = every
    pixel."""
    cross_norm: Literal["kept", "all"] = "kept"
    """Divide the cross loss by the pixels kept, or by all pixels."""
    cross_on: Literal["unlabeled", "both"] = "unlabeled"
    joint_batch: bool = False
    """One forward pass over labelled and unlabelled slices together. Collapsed in 8 of 13 few-label
    runs, most likely by
    mixed BatchNorm statistics: the default makes separate passes."""
    feature_noise: float = 0.0
    """Perturb D2's maps by f*(1+u), u uniform in +-this (0.3 in CCT)."""
    augment: Literal["none", "light", "strong"] = "strong"
    """Augmentation of labelled and unlabelled slices."""
    head: Literal["d1", "d2", "mean"] = "d1"
    """Output that is evaluated."""
    select: Literal["last", "best"] = "last"
    """Evaluate the last weights, or the best by validation Dice."""
    definition: Literal["pooled", "directed"] = "pooled"
    """HD95: percentile of pooled distances (medpy) or largest directed percentile (MONAI)."""
    empty: Literal["nan", "worst", "ssl4mis"] = "nan"
    """Rule for an empty mask on one side."""

    def __post_init__(self):
        if not 0 < self.labeled_batch_size <= self.batch_size:
            raise ConfigError(
                f"labeled_batch_size ({self.labeled_batch_size}) must lie in 1..batch_size "
                f"({self.batch_size})"
            )
        if self.needs_unlabeled and self.batch_size == self.labeled_batch_size:
            raise ConfigError(
                "no room for unlabelled slices: raise --batch-size or set --consistency 0"
            )
        if self.temperature <= 0:
            raise ConfigError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.momentum <= 1:
            raise ConfigError(f"momentum must lie in 0..1, got {self.momentum}")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold must lie in 0..1, got {self.threshold}")
        if len(self.dropout) != len(self.widths):
            raise ConfigError(
                f"widths and dropout need one value per level, got {self.widths} and {self.dropout}"
            )
        if self.max_iterations < 0 or self.pretrain_iterations < 0:
            raise ConfigError("iterations must not be negative")
        if self.match == "radius" and (self.mutual or self.symmetric):
            raise ConfigError(
                "match=radius has several positives per pixel: mutual and symmetric do not apply"
            )
        if self.match == "identity" and (tuple(self.crop) != (1.0, 1.0) or self.view_rotate):
            raise ConfigError(
                "match=identity needs views of the same geometry: set --crop 1 1 --view-rotate 0"
            )

    @property
    def needs_unlabeled(self) -> bool:
        """Whether fine-tuning looks at unlabelled slices."""
        return self.method == "ideal" and self.consistency > 0

    @property
    def uses_queue(self) -> bool:
        return "queue" in self.negatives

    @property
    def contrast_options(self) -> dict:
        """Options of `medcl_kernels.info_nce`."""
        return {
            "temperature": self.temperature,
            "pairs": self.negatives.split("+")[0],
            "intra_view": self.intra,
            "symmetric": self.symmetric,
            "multi_positive": self.multi_positive,
            "impl": self.impl,
        }

    @property
    def supervised_options(self) -> dict:
        """Options of `supervised_loss`."""
        return {
            "background_weight": self.background_weight,
            "dice_background": self.dice_background,
        }

    @property
    def cross_options(self) -> dict:
        """Options of `cross_pseudo_loss`."""
        return {"threshold": self.threshold, "norm": self.cross_norm, "kind": self.consistency_type}

    def consistency_weight(self, iteration: int) -> float:
        """lambda(t) of the cross loss."""
        return self.consistency * ramp_up(iteration // self.rampup_unit, self.consistency_rampup)

    @property
    def unlabeled_batch_size(self) -> int:
        """Unlabelled slices per fine-tuning batch."""
        return self.batch_size - self.labeled_batch_size if self.needs_unlabeled else 0

    @property
    def pretrains(self) -> bool:
        """Whether this run has a stage 1 of its own."""
        return self.method == "ideal" and self.pretrained is None and self.pretrain_iterations > 0

    @property
    def decoders(self) -> tuple[str, ...]:
        """Decoders to build: D1 alone for supervised training."""
        return ("transposed",) if self.method == "supervised" else ("transposed", "bilinear")

    @property
    def view_augmentation(self) -> Augmentation:
        """Random views of pre-training; without geometry when the positives are the same
        positions."""
        flip = 0.0 if self.match == "identity" else 0.5
        return Augmentation(
            flip_x=flip, rotate=self.view_rotate, scale=0.0, shift=0.0, crop=self.crop
        )
