"""Settings of IDEAL. Where the paper's value is unknown the comment names the default reading and
its alternatives."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from ..data.augment import Augmentation
from ..engine.config import ConfigError, TrainConfig, check_positive, check_ranges
from .consistency import ramp_up


@dataclass(frozen=True, kw_only=True)
class IdealConfig(TrainConfig):
    """IDEAL: dense local contrastive pre-training of a U-Net encoder, then fine-tuning with cross
    pseudo labels."""

    trainer: ClassVar[str] = "ideal"

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
    """sgd has momentum 0.9."""
    pretrain_schedule: Literal["poly", "onecycle", "cosine", "constant"] = "constant"
    """Learning rate over the iterations; poly is (1 - t/T)^0.9."""
    pretrain_lr: float = 1e-3
    """Learning rate (peak of onecycle)."""
    pretrain_weight_decay: float = 0.0
    key: Literal["ema", "siamese", "two"] = "ema"
    """Key branch: moving average without gradient, shared weights, or a second trained network."""
    momentum: Annotated[float, tyro.conf.arg(aliases=["--ema-decay"])] = 0.999
    """Of the EMA key branch; 0.99 suits runs below 10 000 iterations."""
    init_from: Literal["q", "k"] = "q"
    """Which encoder is fine-tuned: that of the query or of the key branch."""
    feat_stride: int | tuple[int, ...] = 16
    """Stride of the encoder map that is contrasted (16, 8, 4, ...). Several: the mean of their
    losses, with a projection head and a queue each."""
    projection_dim: int = 128
    """Channels of the dense projection."""
    projection_hidden: int | None = None
    """None: one 1x1 convolution; a width: conv1x1 - ReLU - conv1x1."""
    projection_norm: bool = False
    """BatchNorm before that ReLU, convolutions without bias; needs --projection-hidden."""
    contrast: Literal["info_nce", "hinge"] = "info_nce"
    """Dense loss: InfoNCE, or metric learning with a hinge, mean (1 - cos) over matches plus mean
    max(0, cos - margin) over negatives."""
    margin: float = 0.5
    """Of the hinge: a cosine up to which a negative costs nothing."""
    match: Literal["backbone", "proj", "identity", "geom", "radius"] = "backbone"
    """Positives: argmax on encoder maps, argmax on projections, same position (views without
    geometry), nearest key pixel after the known geometry, or all key pixels within `radius` of that
    place."""
    radius: float = 1.0
    """In cells of the key grid, for match=radius; 1 is about PixPro's 0.7 diagonals."""
    multi_positive: Literal["out", "in"] = "out"
    """Mean over positives outside or inside the logarithm, for match=radius."""
    mutual: bool = False
    """Keep a query pixel only if its match points back to it."""
    negatives: Literal["image", "batch", "queue", "image+queue", "batch+queue"] = "image"
    """Where other key pixels come from."""
    queue_size: int = 4096
    """Entries of each queue: spatial means of earlier key projections, one per image."""
    intra: bool = False
    """Other query pixels of the image are negatives too."""
    symmetric: bool = False
    """Average the losses query to key and key to query."""
    temperature: float = 0.2
    """Of the softmax in InfoNCE."""
    learn_temperature: bool = False
    """Learn its logarithm, from --temperature."""
    n_query: int = 0
    """Random subset of query pixels per image; 0 = all. Key pixels stay complete."""
    local_weight: float = 1.0
    """lambda of (1 - lambda) * image-level InfoNCE + lambda * dense loss; DenseCL has 0.5. At 1
    there is no image-level term."""
    local_warmup: int = 0
    """Iterations with lambda = 0 at the start; DenseCL has 1000."""
    global_negatives: Literal["batch", "queue", "batch+queue"] = "batch"
    """Of the image-level term: other images of the batch (SimCLR) or of earlier ones (MoCo)."""
    crop: tuple[float, float] = (0.5, 1.0)
    """Area of a view's random crop, as a fraction of the slice."""
    view_flip: tuple[float, float] = (0.5, 0.0)
    """Probability of mirroring a view left-right and up-down. match=identity mirrors none."""
    view_rotate: float = 0.0
    """Largest rotation of a view, degrees."""
    view_gamma: float = 0.3
    """Largest change of the gamma of a view."""
    view_brightness: float = 0.2
    """Largest change of its brightness, in sd of the slice."""
    view_contrast: float = 0.2
    """Largest relative change of its contrast."""
    view_blur: float = 0.8
    """Largest sigma of its Gaussian blur, pixels; half of the views have none."""
    view_noise: float = 0.1
    """Largest sd of its Gaussian noise, in sd of the slice."""

    # --- stage 2: fine-tuning
    max_iterations: int = 30_000
    """Fine-tuning iterations."""
    batch_size: int = 24
    """Slices per fine-tuning batch: labelled plus unlabelled."""
    labeled_batch_size: Annotated[int, tyro.conf.arg(aliases=["--labeled-bs"])] = 12
    """Labelled slices among them."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """sgd has momentum 0.9."""
    schedule: Literal["poly", "onecycle", "cosine", "constant"] = "poly"
    """Learning rate over the iterations; poly is (1 - t/T)^0.9."""
    base_lr: float = 0.01
    """Learning rate (peak of onecycle)."""
    encoder_lr_scale: float = 1.0
    """Factor on the encoder's learning rate."""
    weight_decay: float = 1e-4
    background_weight: float = 1.0
    """Weight of class 0 in the cross-entropy; the others have 1."""
    dice_background: bool = True
    """Whether the soft Dice term includes the background."""
    dice_over: Literal["batch", "image"] = "batch"
    """Soft Dice summed over the batch (SSL4MIS), or per image and then averaged."""
    consistency: float = 0.1
    """Largest weight of the cross pseudo label loss."""
    consistency_rampup: float = 200.0
    """Length of the ramp-up exp(-5(1-t)^2), in units of `rampup_unit` iterations; 0 = a constant
    weight (CPS: --consistency 1.5)."""
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
    """Slices of the cross loss: those of the unlabelled stream, which is the whole pool with the
    labelled subjects' slices (their labels unused; SSL4MIS leaves them out), or the labelled batch
    too."""
    joint_batch: bool = False
    """One forward pass over labelled and unlabelled slices together. Collapsed in 8 of 13 few-label
    runs, most likely by
    mixed BatchNorm statistics: the default makes separate passes."""
    decoder1: Literal["transposed", "bilinear", "fpn", "deeplab"] = "transposed"
    """D1: U-Net decoder with transposed convolutions or with linear interpolation, feature pyramid,
    or DeepLabv3+ head. Supervised training has D1 alone."""
    decoder2: Literal["transposed", "bilinear", "fpn", "deeplab"] = "bilinear"
    """D2; the same as D1 leaves other initial weights and dropout as the only difference."""
    independent_dropout: bool = True
    """A pass through the encoder per branch, each with dropout of its own; without dropout in the
    network one pass serves both."""
    input_noise: float = 0.0
    """Gaussian noise of this sd, cut at 2 sd, on the images of branch 2 (0.1 in SSL4MIS)."""
    feature_noise: float = 0.0
    """Perturb D2's maps by f*(1+u), u uniform in +-this (0.3 in CCT)."""
    feature_drop: bool = False
    """Zero D2's maps where they are most active: from 0.7 to 0.9 of the largest mean activation
    (CCT's FeatureDrop)."""
    feature_dropout: float = 0.0
    """Probability of dropping a channel of D2's maps (0.5 in CCT)."""
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
    unit: Literal["mm", "voxel"] = "mm"
    """Of the distances; voxel as SSL4MIS."""

    def __post_init__(self):
        self._check_ranges()
        if not 0 < self.labeled_batch_size <= self.batch_size:
            raise ConfigError(
                f"labeled_batch_size ({self.labeled_batch_size}) must lie in 1..batch_size "
                f"({self.batch_size})"
            )
        if self.needs_unlabeled and self.batch_size == self.labeled_batch_size:
            raise ConfigError(
                "no room for unlabelled slices: raise --batch-size or set --consistency 0"
            )
        if len(self.dropout) != len(self.widths):
            raise ConfigError(
                f"widths and dropout need one value per level, got {self.widths} and {self.dropout}"
            )
        if not self.strides:
            raise ConfigError("feat_stride needs at least one stride")
        if self.projection_norm and self.projection_hidden is None:
            raise ConfigError("projection_norm sits before a ReLU: give --projection-hidden")
        if self.match == "radius" and self.mutual:
            raise ConfigError(
                "match=radius has several positives per pixel: mutual does not apply to it"
            )
        if self.match == "identity" and (tuple(self.crop) != (1.0, 1.0) or self.view_rotate):
            raise ConfigError(
                "match=identity needs views of the same geometry: set --crop 1 1 --view-rotate 0"
            )
        if self.negatives == "queue" and self.intra:
            raise ConfigError("negatives=queue means the queue only: leave out --intra")
        if self.contrast == "hinge" and self.learn_temperature and not self.uses_global:
            raise ConfigError("a hinge has no temperature that could be learnt")

    def _check_ranges(self) -> None:
        """Numbers that have a range of their own."""
        within = {
            "momentum": (0, 1),
            "threshold": (0, 1),
            "margin": (0, 1),
            "local_weight": (0, 1),
            "feature_noise": (0, 1),
            "feature_dropout": (0, 1),
            "background_weight": (0, math.inf),
            "consistency": (0, math.inf),
            "input_noise": (0, math.inf),
            "n_query": (0, math.inf),
            "local_warmup": (0, math.inf),
            "max_iterations": (0, math.inf),
            "pretrain_iterations": (0, math.inf),
            "queue_size": (1, math.inf),
            "projection_dim": (1, math.inf),
            "rampup_unit": (1, math.inf),
        }
        check_ranges(self, within)
        check_positive(self, "temperature", "radius", "base_lr", "pretrain_lr")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ConfigError(f"crop needs 0 < smallest <= largest <= 1, got {self.crop}")
        if not all(0 <= chance <= 1 for chance in self.view_flip):
            raise ConfigError(f"view_flip holds two probabilities, got {self.view_flip}")

    @property
    def needs_unlabeled(self) -> bool:
        """Whether fine-tuning looks at unlabelled slices."""
        return self.method == "ideal" and self.consistency > 0

    @property
    def uses_queue(self) -> bool:
        return "queue" in self.negatives

    @property
    def uses_global(self) -> bool:
        """Whether there is an image-level term at any time."""
        return self.local_weight < 1 or self.local_warmup > 0

    def local_weight_at(self, iteration: int) -> float:
        """lambda of pre-training."""
        return 0.0 if iteration < self.local_warmup else self.local_weight

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the encoder maps that are contrasted, ascending."""
        several = self.feat_stride
        return (several,) if isinstance(several, int) else tuple(sorted(set(several)))

    @property
    def contrast_options(self) -> dict:
        """Options of `medcl_kernels.info_nce` or `dense_hinge`, all but queue and temperature."""
        options = {
            "pairs": self.negatives.split("+")[0],
            "intra_view": self.intra,
            "symmetric": self.symmetric,
            "impl": self.impl,
        }
        if self.contrast == "hinge":
            return options | {"margin": self.margin}
        return options | {"multi_positive": self.multi_positive}

    @property
    def supervised_options(self) -> dict:
        """Options of `supervised_loss`."""
        return {
            "background_weight": self.background_weight,
            "dice_background": self.dice_background,
            "dice_over": self.dice_over,
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
        both = (self.decoder1, self.decoder2)
        return both[:1] if self.method == "supervised" else both

    @property
    def view_augmentation(self) -> Augmentation:
        """Random views of pre-training; without geometry when the positives are the same
        positions."""
        flip_x, flip_y = (0.0, 0.0) if self.match == "identity" else self.view_flip
        return Augmentation(
            flip_x=flip_x,
            flip_y=flip_y,
            rotate=self.view_rotate,
            scale=0.0,
            shift=0.0,
            gamma=self.view_gamma,
            brightness=self.view_brightness,
            contrast=self.view_contrast,
            blur=self.view_blur,
            noise=self.view_noise,
            crop=self.crop,
        )
