"""Settings of GCL. Only the idea of the method is known (specs/gcl.md §0): every default below that
bears on it is a reading, its alternatives are options."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from ..data.augment import Augmentation
from ..engine.config import ConfigError, TrainConfig, check_positive, check_ranges

PERSPECTIVES = {"acdc": ("slice", "patient", "phase"), "phantom": ("slice", "patient", "phase")}
SLICE_THRESHOLDS = {"acdc": 0.35, "phantom": 0.35}


@dataclass(frozen=True, kw_only=True)
class GclConfig(TrainConfig):
    """GCL: contrastive pre-training of a U-Net encoder from several meta labels, whose gradients
    are filtered and mitigated; then fine-tuning with few labels."""

    trainer: ClassVar[str] = "gcl"

    exp: str = "gcl"
    """Name of the run; its folder is OUT/EXP (OUT/EXP/seed_N with --seeds)."""
    method: Literal["gcl", "supervised"] = "gcl"
    """supervised: no pre-training of its own; same labelled batches, augmentation and initial
    weights as the GCL run of the same seed."""

    # --- stage 1: pre-training
    pretrain_iterations: int = 10_000
    """Iterations of contrastive pre-training; 0 = none."""
    pretrained: Path | None = None
    """Take the encoder from this checkpoint (checkpoints/pretrain.pt of another run) instead of
    pre-training."""
    pretrain_batch_size: int = 32
    """Slices per pre-training batch (each gives two views)."""
    pretrain_optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    pretrain_schedule: Literal["poly", "onecycle", "cosine", "constant"] = "cosine"
    pretrain_lr: float = 0.1
    pretrain_weight_decay: float = 1e-5
    crop: tuple[float, float] = (0.5, 1.0)
    """Area of a view's random crop, as a fraction of the slice."""
    view_flip: tuple[float, float] = (0.5, 0.5)
    """Probability of mirroring a view left-right and up-down."""
    view_rotate: float = 0.0
    """Largest rotation of a view, degrees."""
    view_intensity: bool = True
    """Random gamma, brightness, contrast, blur and noise of a view."""

    # --- meta labels
    perspectives: tuple[str, ...] = ()
    """Meta labels: slice, patient, phase (ED and ES), side (hippocampus), or an entry of the cases'
    meta data such as group or modality. Empty: slice, patient and, for ACDC, phase."""
    slice_label: Literal["threshold", "partition"] = "threshold"
    """Slices are positive when their positions differ by less than a threshold (PCL), or when they
    lie in the same of several parts of the volume (GLCL)."""
    slice_threshold: float | None = None
    """In depths of the volume; default 0.35 for ACDC and the phantom, else 0.1."""
    slice_parts: int = 4
    """Parts of a volume, for slice_label=partition."""
    sampler: Literal["grouped", "uniform"] = "grouped"
    """grouped: anchors, each with one positive per perspective in the batch; uniform: any
    slices."""

    # --- image branch
    image_weight: float = 1.0
    """Of the image-wise contrast; 0 = none."""
    image_dim: int = 128
    """Channels of the image projection (mean over pixels, linear, ReLU, linear)."""
    image_form: Literal["out", "in", "pixel"] = "out"
    """SupCon with the mean over positives outside or inside the logarithm; pixel: every positive
    against the negatives only."""
    image_temperature: float = 0.1
    base_temperature: float | None = None
    """Multiplies the image loss by image_temperature / base_temperature (0.07 in SupCon and
    PCL)."""
    queue_size: int = 0
    """Embeddings of earlier slices, by a moving average of encoder and head, as further candidates
    of the image branch (MoCo); 0 = none."""
    momentum: float = 0.99
    """Of that moving average."""

    # --- pixel branch
    pixel_weight: float = 1.0
    """Of the pixel-wise contrast; 0 = none."""
    pixel_dim: int = 128
    """Channels of the pixel projection (conv1x1, ReLU, conv1x1)."""
    pixel_grid: int | None = None
    """Average the map to G x G cells before that; none: every pixel of the map."""
    pixel_level: Literal["encoder", "decoder"] = "encoder"
    """Map that is contrasted: the deepest of the encoder, or one of a decoder that is pre-trained
    too."""
    decoder_stride: int = 4
    """Stride of the decoder's map, for pixel_level=decoder."""
    pixel_scope: Literal["pair", "batch"] = "pair"
    """Candidates: pixels of one other image with the same meta label, or all pixels of the
    batch."""
    pairs_per_image: int = 1
    """Partners that are drawn for an image and a meta label, for pixel_scope=pair."""
    symmetric: bool = True
    """Average both directions of a pair of images."""
    positives: Literal["match", "label", "aligned", "cam"] = "match"
    """Positive pixels: most similar encoder features, all pixels of images with the label, the same
    place before augmentation, or the largest shares in the image similarity."""
    match_top: int = 1
    """How many positives a pixel has, for positives=match or cam."""
    pixel_form: Literal["out", "in", "pixel"] = "out"
    pixel_temperature: float = 0.1
    pixel_warmup: float = 0.0
    """First part of the iterations without pixel-wise contrast; 0.1 is the alternative."""

    # --- Gradient Filter
    score: Literal["pix_sim", "pix_rep", "img_cam", "product"] = "pix_sim"
    """What ranks pairs: |dL/ds|; its share in the representation's gradient; share in the image
    similarity times |dL_img/ds|; |dL_img/ds| |dL/ds|."""
    keep: float = 0.1
    """Share of the pairs that is kept (rho); 1 = no filter."""
    filter_by: Literal["pair", "global", "anchor", "threshold", "quantile"] = "pair"
    """Where pairs compete: within a pair of images (within the anchor's image for
    pixel_scope=batch), all together, per anchor pixel; or all that reach filter_threshold, or the
    quantile 1 - keep of their pair of images."""
    filter_threshold: float = 0.5
    """For filter_by=threshold: of |p - 1/|P||, the score without weights, from 0 to 1."""
    quota: tuple[float, float] | None = None
    """Shares of positives and of negatives that are kept, instead of keep."""
    direction: Literal["directed", "undirected"] = "directed"
    """Whether a pair of pixels counts once from either side, or once with the sum of both
    gradients."""
    pos_sign: Literal["any", "attract_only"] = "any"
    """attract_only: positives that the loss pushes apart are not selected."""
    use: Literal["mask_grad", "renorm", "pos_full_den", "recompute"] = "mask_grad"
    """Selected pairs: mask the gradient; mask it and scale it to the size of the whole one; choose
    the positives only; or make up a loss of their own (needs --quota)."""
    keep_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How keep moves from keep_start to its value over the iterations."""
    keep_start: float = 1.0
    """First value of keep, for keep_schedule=linear and cosine."""

    # --- Gradient Mitigator
    mitigator: Literal[
        "pcgrad_param",
        "pcgrad_rep_row",
        "pcgrad_rep_flat",
        "pair_consensus",
        "cagrad_param",
        "cagrad_rep_flat",
        "mean",
        "sum",
    ] = "pcgrad_param"
    """Combines the gradients of the perspectives, by the encoder's parameters or by the
    representations (each row, or all as one vector); consensus: per pair, where all signs agree."""
    conflict: Literal["dot", "cosine", "sign"] = "dot"
    """pcgrad projects where the inner product is negative; where the cosine is below
    -conflict_margin; or, sign, drops single entries on whose sign perspectives differ."""
    conflict_margin: float = 0.1
    """For conflict=cosine."""
    cagrad_strength: float = 0.5
    """c of CAGrad: how far the gradient may leave the mean, relative to its length."""
    mitigate_order: Literal["random", "fixed"] = "random"
    mitigate_reduction: Literal["mean", "sum"] = "mean"
    """Over the perspectives."""
    branches: Literal["separate", "joint"] = "separate"
    """Mitigate within each branch, or all losses of both together (parameters only)."""
    mitigate_scope: Literal["encoder", "all"] = "encoder"
    """Parameters that are compared: of the encoder, heads taking the plain mean, or of the heads
    too."""
    mitigate_before_norm: bool = False
    """Mitigate at the projections before they are scaled to unit length (representations only)."""
    log_selection: bool = True
    """Log the selected share and mean |G| too, which costs another selection in every step."""

    # --- stage 2: fine-tuning
    max_iterations: int = 10_000
    """Iterations of fine-tuning; 0 = pre-training only."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["--labeled-batch-size", "--labeled-bs"])] = 10
    """Labelled slices per fine-tuning batch."""
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    schedule: Literal["poly", "onecycle", "cosine", "constant"] = "cosine"
    base_lr: float = 5e-5
    encoder_lr_scale: float = 1.0
    """Learning rate of the encoder, relative to the decoder's."""
    weight_decay: float = 1e-5
    background_weight: float = 1.0
    """Weight of class 0 in the cross-entropy; the others have 1."""
    dice: bool = False
    """Add soft Dice to the cross-entropy, half each; PCL has cross-entropy alone."""
    dice_background: bool = True
    """Whether the soft Dice term includes the background."""
    augment: Literal["none", "light", "strong"] = "strong"
    """Augmentation of labelled slices."""
    head: Literal["d1"] = "d1"
    """Output that is evaluated: the only decoder."""
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
        self._check_pixels()
        self._check_mitigator()
        if len(self.dropout) != len(self.widths):
            raise ConfigError(
                f"widths and dropout need one value per level, got {self.widths} and {self.dropout}"
            )
        if len(set(self.perspectives)) != len(self.perspectives):
            raise ConfigError(f"perspectives must differ, got {' '.join(self.perspectives)}")
        if self.image_weight == 0 and self.pixel_weight == 0:
            raise ConfigError("image_weight and pixel_weight are 0: nothing to learn from")

    def _check_ranges(self) -> None:
        """Numbers that have a range of their own."""
        within = {
            "image_weight": (0, math.inf),
            "pixel_weight": (0, math.inf),
            "momentum": (0, 1),
            "pixel_warmup": (0, 1),
            "filter_threshold": (0, 1),
            "conflict_margin": (0, 1),
            "cagrad_strength": (0, math.inf),
            "queue_size": (0, math.inf),
            "pretrain_iterations": (0, math.inf),
            "max_iterations": (0, math.inf),
            "view_rotate": (0, 180),
            "background_weight": (0, math.inf),
            "pretrain_batch_size": (2, math.inf),
            "slice_parts": (2, math.inf),
            "image_dim": (1, math.inf),
            "pixel_dim": (1, math.inf),
            "match_top": (1, math.inf),
            "pairs_per_image": (1, math.inf),
            "batch_size": (1, math.inf),
        }
        check_ranges(self, within)
        check_positive(
            self,
            "base_temperature",
            "image_temperature",
            "pixel_temperature",
            "base_lr",
            "pretrain_lr",
        )
        for name in ("keep", "keep_start"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(
                    f"{name} must lie in (0, 1], got {getattr(self, name)}: without any pair there "
                    "would be nothing to learn from"
                )
        if self.quota is not None and not (
            all(0 <= share <= 1 for share in self.quota) and any(self.quota)
        ):
            raise ConfigError(
                f"quota needs two shares in 0..1, one of them above 0, got {self.quota}"
            )
        if self.slice_threshold is not None and not 0 < self.slice_threshold <= 1:
            raise ConfigError(f"slice_threshold must lie in (0, 1], got {self.slice_threshold}")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ConfigError(f"crop needs 0 < smallest <= largest <= 1, got {self.crop}")
        if not all(0 <= chance <= 1 for chance in self.view_flip):
            raise ConfigError(f"view_flip holds two probabilities, got {self.view_flip}")

    def _check_pixels(self) -> None:
        """Combinations of the pixel branch that have no meaning."""
        if self.positives == "label" and self.pixel_scope == "pair":
            raise ConfigError(
                "positives=label makes every pixel of the other image a positive, so a pair of "
                "images has no negatives: set --pixel-scope batch"
            )
        if (
            self.positives == "label"
            and self.slice_label == "threshold"
            and "slice" in self.perspective_names
        ):
            raise ConfigError(
                "positives=label needs labels that divide the pixels into classes, which a "
                "threshold on positions does not: set --slice-label partition"
            )
        if self.pixel_grid is not None and self.pixel_grid < 2:
            raise ConfigError(f"pixel_grid must be at least 2, got {self.pixel_grid}")
        if self.pairs_per_image > 1 and self.pixel_scope == "batch":
            raise ConfigError(
                "pixel_scope=batch contrasts the pixels of all images: pairs_per_image is for "
                "--pixel-scope pair"
            )
        by_image = self.score in ("img_cam", "product") or self.positives == "cam"
        if by_image and self.pixel_scope == "batch":
            raise ConfigError(
                "img_cam, product and cam weigh pairs of images: set --pixel-scope pair"
            )
        if by_image and self.pixel_level == "decoder":
            raise ConfigError(
                "img_cam, product and cam use the map that the image branch pools: set "
                "--pixel-level encoder"
            )
        if self.score in ("img_cam", "product") and self.image_weight == 0:
            raise ConfigError(f"score={self.score} needs the image branch: raise --image-weight")
        if self.use == "recompute" and self.quota is None:
            raise ConfigError(
                "use=recompute gives anchors with one selected pair no gradient: give --quota, "
                "shares of positives and of negatives"
            )
        if self.use == "pos_full_den" and self.pixel_form == "pixel":
            raise ConfigError("use=pos_full_den needs pixel_form out or in")
        if self.quota is not None and self.filter_by in ("threshold", "quantile"):
            raise ConfigError(f"filter_by={self.filter_by} takes no quota")
        if self.filter_by == "threshold" and self.score != "pix_sim":
            raise ConfigError("filter_threshold is a value of score=pix_sim")
        if self.direction == "undirected":
            self._check_undirected()
        if self.pixel_level == "decoder" and self.decoder_stride not in self.strides[:-1]:
            raise ConfigError(
                f"decoder_stride={self.decoder_stride} is no map of the decoder, which has "
                f"{self.strides[:-1]}"
            )

    def _check_undirected(self) -> None:
        """What a pair without a direction needs."""
        if self.score != "pix_sim":
            raise ConfigError("direction=undirected ranks |G_ij + G_ji|: set --score pix_sim")
        if self.pixel_scope == "pair" and not self.symmetric:
            raise ConfigError("direction=undirected needs --symmetric")
        allowed = ("pair", "global") if self.pixel_scope == "pair" else ("global",)
        if self.filter_by not in allowed:
            raise ConfigError(
                f"direction=undirected with pixel_scope={self.pixel_scope}: a pair would belong to "
                f"two units of filter_by={self.filter_by}; choose {' or '.join(allowed)}"
            )

    def _check_mitigator(self) -> None:
        """Combinations of the Mitigator that have no meaning."""
        at = "representations" if self.at_representation else "parameters"
        if self.conflict != "dot" and not self.mitigator.startswith("pcgrad"):
            raise ConfigError(f"conflict={self.conflict} is about pcgrad, not {self.mitigator}")
        if self.branches == "joint" and not self.mitigator.endswith("_param"):
            raise ConfigError(
                "branches=joint compares gradients of the shared parameters: choose a mitigator "
                "that ends in _param"
            )
        if self.mitigate_scope == "all" and not self.mitigator.endswith("_param"):
            raise ConfigError("mitigate_scope=all is for mitigators that end in _param")
        if self.mitigate_before_norm and at == "parameters":
            raise ConfigError("mitigate_before_norm is for mitigators at representations (_rep_)")
        if self.score == "pix_rep" and at == "representations" and not self.mitigate_before_norm:
            raise ConfigError(
                "score=pix_rep weighs pairs by the projections before they are scaled: add "
                "--mitigate-before-norm"
            )
        if self.mitigator == "pair_consensus" and (
            self.use != "mask_grad" or self.mitigate_reduction != "mean"
        ):
            raise ConfigError(
                "pair_consensus is the mean of the pairs' masked gradients: it needs use=mask_grad "
                "and mitigate_reduction=mean"
            )

        if self.mitigator == "pair_consensus" and self.queue_size:
            raise ConfigError("pair_consensus works on pairs of the batch: leave out --queue-size")

    @property
    def perspective_names(self) -> tuple[str, ...]:
        """Meta labels of this run."""
        return self.perspectives or PERSPECTIVES.get(self.dataset, ("slice", "patient"))

    @property
    def threshold(self) -> float | None:
        """Of the slice position; None where slices are divided into parts."""
        if self.slice_label == "partition":
            return None
        default = SLICE_THRESHOLDS.get(self.dataset, 0.1)
        return default if self.slice_threshold is None else self.slice_threshold

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the encoder's maps."""
        return tuple(2**level for level in range(len(self.widths)))

    @property
    def at_representation(self) -> bool:
        return "_rep_" in self.mitigator

    @property
    def pretrains(self) -> bool:
        """Whether this run has a stage 1 of its own."""
        return self.method == "gcl" and self.pretrained is None and self.pretrain_iterations > 0

    @property
    def supervised_options(self) -> dict:
        """Options of `supervised_loss`."""
        return {
            "background_weight": self.background_weight,
            "dice": self.dice,
            "dice_background": self.dice_background,
        }

    @property
    def decoders(self) -> tuple[str, ...]:
        return ("transposed",)

    def keep_at(self, iteration: int) -> float | tuple[float, float]:
        """rho of an iteration, or the quota."""
        if self.quota is not None:
            return self.quota
        done = min(1.0, iteration / max(1, self.pretrain_iterations - 1))
        if self.keep_schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        elif self.keep_schedule == "constant":
            return self.keep
        return self.keep_start + (self.keep - self.keep_start) * done

    def uses_pixels(self, iteration: int) -> bool:
        """Whether the pixel-wise contrast takes part."""
        return self.pixel_weight > 0 and iteration >= self.pixel_warmup * self.pretrain_iterations

    @property
    def view_augmentation(self) -> Augmentation:
        """Random views of pre-training."""
        flip_x, flip_y = self.view_flip
        intensity = (
            {}
            if self.view_intensity
            else dict.fromkeys(("gamma", "brightness", "contrast", "blur", "noise"), 0.0)
        )
        return Augmentation(
            flip_x=flip_x,
            flip_y=flip_y,
            rotate=self.view_rotate,
            scale=0.0,
            shift=0.0,
            crop=self.crop,
            **intensity,
        )
