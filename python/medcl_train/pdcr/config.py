"""Settings of PDCR and UAFS. Defaults are the recommended readings of specs/pdcr.md §5; the ways of
the released code are options."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import tyro

from ..engine.config import ConfigError, TrainConfig, check_positive, check_ranges

TERMS = ("encoder", "decoder", "cross")
PICTURES = ("isic", "lesions")  # data sets of photographs; the others are volumes
# of settings that are not given, by the number of spatial axes
DEFAULTS = {
    2: {
        "size": (384, 384),
        "terms": TERMS,
        "encoder_samples": (64, 32),
        "encoder_weights": (0.1,),
        "decoder_samples": (32, 8),
        "decoder_weights": (0.01,),
        "cross_weight": 0.01,
        "layer_reduction": "sum",
        "cross_samples": 32,
        "cross_channels": 32,
        "cross_stride": 16,
        "patches": "hierarchical",
        "temperature": 1.0,
    },
    3: {
        "size": (),
        "terms": ("encoder", "cross"),
        "encoder_samples": (64,),
        "encoder_weights": (0.01,),
        "decoder_samples": (32, 8),
        "decoder_weights": (0.01,),
        "cross_weight": 0.01,
        "layer_reduction": "mean",
        "cross_samples": 64,
        "cross_channels": 128,
        "cross_stride": 0,
        "patches": "receptive_field",
        "temperature": 0.5,
    },
}
# of the build of November 2021: its sums, divided by 1000 where they were large, as means over the
# pairs of four images
NOV2021 = {
    "encoder_weights": (1.64, 0.41),
    "decoder_weights": (0.041, 2.56),
    "cross_weight": 0.041,
}


@dataclass(frozen=True, kw_only=True)
class PdcrConfig(TrainConfig):
    """PDCR and UAFS: supervised segmentation in 2-D or 3-D with patch-affinity contrast inside the
    network and blocks that turn uncertain features down."""

    trainer: ClassVar[str] = "pdcr"

    exp: str = "pdcr"
    """Name of the run; its folder is OUT/EXP (OUT/EXP/seed_N with --seeds)."""
    method: Literal["backbone", "pdcr", "uafs", "both"] = "both"
    """Which parts are added to the backbone. All four start from the same weights and see the same
    batches with the same augmentation."""

    # --- data
    dataset: Literal["isic", "lesions", "msd", "acdc", "mmwhs", "phantom"] = "isic"
    """isic: folders of photographs and masks, 2-D. lesions: a generated folder of that kind. The
    others are volumes, 3-D."""
    size: Annotated[tuple[int, ...] | None, tyro.conf.arg(aliases=["--patch-size"])] = None
    """Height and width that photographs are resized to (default 384 384), or depth, height and
    width of the patches of volumes."""
    labeled_fraction: float | None = None
    """Share of the training subjects (in 2-D: images) that is used, such as 0.25; replaces
    labeled_num."""
    image_folder: str | None = None
    """Name of the folder of photographs inside data_root; default: images, *_Data or *_Input."""
    mask_folder: str | None = None
    """Name of the folder of masks inside data_root; default: masks or *GroundTruth."""
    mask_values: Literal["binary", "ids"] | None = None
    """What photographs' masks hold: 0 and 255, or class ids; default: by the number of classes."""
    mask_resize: Literal["nearest", "lanczos"] = "nearest"
    """lanczos: grey values, everything above 0 is foreground (released)."""
    unit_range: bool = True
    """Divide photographs by 255 before ImageNet's mean and deviation are applied; the released code
    does not."""
    lesion_images: int = 40
    """Number of images of a generated set of lesions."""
    foreground: float = 1 / 3
    """Share of 3-D patches that are placed on a labelled voxel."""
    prediction: Literal["windows", "whole"] = "windows"
    """Predict volumes in windows of the patch size, or whole, which is faster for small ones."""
    overlap: float = 0.5
    """Of neighbouring windows."""

    # --- network
    model: Literal["deeplab", "unet"] = "deeplab"
    """2-D: DeepLabV3+ on an Xception, or a U-Net. Volumes always take the 3-D U-Net."""
    width: int = 32
    """Channels of DeepLab's first convolution; all others grow with it. 32 is published."""
    middle_blocks: int = 16
    """Blocks of the Xception's middle flow."""
    rates: tuple[int, ...] = (6, 12, 18)
    """Dilations of DeepLab's pyramid."""
    deep_supervision: bool = True
    """3-D: losses at coarser decoder stages too."""

    # --- PDCR: which cells are compared
    terms: tuple[Literal["encoder", "decoder", "cross"], ...] = ()
    """Terms of the contrast; default: all three in 2-D, encoder and cross in 3-D."""
    encoder_layers: tuple[str, ...] = ()
    """Module names; default: stride 2 and 4 in 2-D, levels 2 and 3 of the 3-D U-Net."""
    encoder_samples: tuple[int, ...] = ()
    """Cells per encoder layer; default: 64 32 in 2-D, 64 each in 3-D."""
    encoder_weights: tuple[float, ...] = ()
    """Weight per encoder layer; default: 0.1 in 2-D, 0.01 in 3-D."""
    decoder_layers: tuple[str, ...] = ()
    """Module names; default: DeepLab's low-level projection and first decoder convolution, the
    U-Net's decoder stages of stride 4 and 2."""
    decoder_samples: tuple[int, ...] = ()
    """Cells per decoder layer; default: 32 8, the last number for further layers."""
    decoder_weights: tuple[float, ...] = ()
    """Weight per decoder layer; default: 0.01."""
    cross_layers: tuple[str, ...] = ()
    """Module names of the term across layers; default: the encoder layers."""
    cross_samples: int | None = None
    """Cells per layer across layers; default: 32 in 2-D, 64 in 3-D."""
    cross_weight: float | None = None
    """Of the term across layers; default: 0.01."""
    cross_channels: int | None = None
    """Of the adapters; default: 32 in 2-D, 128 in 3-D."""
    cross_stride: int | None = None
    """Stride that the adapters bring all layers to; 0: 1x1 convolutions. Default: 16 in 2-D, 0 in
    3-D."""
    cross_before_uafs: bool = True
    """Take the term across layers from before the uncertainty block (released) or from behind
    it."""
    sampler: Literal["even", "stride", "regular", "dense"] = "even"
    """Which cells: an even grid; the released flat-index rule; every n-th cell of each axis
    (encoder_steps, the released rule in 3-D); all."""
    encoder_steps: tuple[int, ...] = (8, 4)
    """Steps per encoder layer, for sampler=regular."""
    border: int = 0
    """Cells left out around a layer's grid before sampling; 9 is the released code's in 2-D."""

    # --- PDCR: the loss
    patches: Literal["hierarchical", "receptive_field"] | None = None
    """Windows of fixed sizes (H-PDCR, default in 2-D) or the layer's receptive field (default in
    3-D), measured on the network."""
    patch_sizes: tuple[int, ...] = (5, 7, 9)
    """Odd window lengths in input pixels, for patches=hierarchical."""
    average: Literal["loss", "ratio"] = "loss"
    """Average the losses of all window sizes, or first their class shares."""
    size_weights: tuple[float, ...] = ()
    """Weights of the window sizes, for average=ratio."""
    temperature: float | None = None
    """Default: 1.0 in 2-D, 0.5 in 3-D."""
    form: Literal["affinity", "release2d"] | None = None
    """Affinity in the numerator (default), or swapped as in the released 2-D code."""
    divergence: Literal["sum", "half"] = "sum"
    """Of the class shares: the sum of absolute differences, or half of it, which keeps affinities
    of several classes positive."""
    shift: Literal["constant", "max", "max_attached"] | None = None
    """Subtract 1/temperature (default) or the batch's largest similarity, without or with its
    gradient."""
    reduction: Literal["mean", "sum"] | None = None
    """Over pairs of cells; default mean."""
    layer_reduction: Literal["sum", "mean"] | None = None
    """Add the terms of the layers, or divide them by the number of layers; default: sum in 2-D,
    mean in 3-D."""
    compat: Literal["none", "release2d", "nov2021", "receptive_field2d", "release3d"] = "none"
    """Everything that the published code does differently, its mistakes included; nov2021 with the
    weights of that build."""

    # --- UAFS
    uafs_places: tuple[Literal["encoder", "aspp", "decoder"], ...] = ()
    """Where blocks go; default: encoder and decoder of DeepLab, all decoder stages of a U-Net."""
    uafs_layers: tuple[str, ...] = ()
    """Module names instead of places."""
    uafs_logits: int = 2
    """M of the block's own classifier."""
    uafs_kernel: int = 3
    uafs_hidden: int | None = None
    """Channels between its convolutions; default: 16 in 2-D, a quarter in 3-D."""
    uafs_dropout: float = 0.1
    """In blocks of 2-D pyramid and decoder; those of the encoder and of volumes have none."""

    # --- training
    max_iterations: int = 10_000
    batch_size: Annotated[int, tyro.conf.arg(aliases=["--labeled-batch-size", "--labeled-bs"])] = 4
    optimizer: Literal["sgd", "nesterov", "adam", "adamw"] = "adam"
    """nesterov: SGD with momentum 0.99 (nnU-Net)."""
    schedule: Literal["poly", "onecycle", "cosine", "warmup_cosine", "constant"] = "warmup_cosine"
    base_lr: float = 1e-3
    weight_decay: float = 1e-5
    background_weight: float = 1.0
    """Weight of class 0 in the cross-entropy; the others have 1."""
    dice: bool = False
    """Add soft Dice to the cross-entropy (nnU-Net)."""
    dice_background: bool = False
    """Whether the soft Dice term includes the background."""
    augment: Literal["none", "light", "strong", "photo"] = "photo"
    """photo: the 2-D paper's flips, any quarter turn, scale, shift, shear, hue and saturation."""
    head: Literal["d1"] = "d1"
    """Output that is evaluated: the only one."""
    select: Literal["last", "best"] = "last"
    """Evaluate the last weights, or the best by validation Dice."""
    definition: Literal["pooled", "directed"] = "pooled"
    """HD95 of volumes: percentile of pooled distances (medpy) or largest directed percentile
    (MONAI)."""
    empty: Literal["nan", "worst", "ssl4mis"] = "nan"
    """Rule for an empty mask on one side."""
    unit: Literal["mm", "voxel"] = "mm"
    """Of the distances of volumes; voxel as SSL4MIS."""

    def __post_init__(self):
        self._check_ranges()
        self._check_shapes()
        self._check_contrast()

    def _check_ranges(self) -> None:
        """Numbers that have a range of their own."""
        within = {
            "width": (1, math.inf),
            "middle_blocks": (0, math.inf),
            "batch_size": (1, math.inf),
            "max_iterations": (0, math.inf),
            "lesion_images": (5, math.inf),
            "foreground": (0, 1),
            "overlap": (0, 0.95),
            "border": (0, math.inf),
            "uafs_logits": (2, math.inf),
            "uafs_dropout": (0, 1),
            "background_weight": (0, math.inf),
        }
        check_ranges(self, within)
        check_positive(self, "base_lr", "temperature", "grad_clip")
        if self.cross_weight is not None and self.cross_weight < 0:
            raise ConfigError(f"cross_weight must be at least 0, got {self.cross_weight}")
        if self.labeled_fraction is not None and not 0 < self.labeled_fraction <= 1:
            raise ConfigError(f"labeled_fraction must lie in (0, 1], got {self.labeled_fraction}")
        if self.uafs_kernel < 1 or self.uafs_kernel % 2 == 0:
            raise ConfigError(f"uafs_kernel must be odd, got {self.uafs_kernel}")

    def _check_shapes(self) -> None:
        """Sizes that do not fit the data set or the network."""
        dims = self.spatial_dims
        if not self.input_size:
            raise ConfigError("volumes need --size: depth, height and width of the patches")
        if len(self.input_size) != dims:
            raise ConfigError(
                f"{self.dataset} is {dims}-D: size needs {dims} numbers, got {self.input_size}"
            )
        if dims == 3 and self.augment == "photo":
            raise ConfigError("augment=photo is for photographs: choose none, light or strong")
        if len(self.dropout) != len(self.widths):
            raise ConfigError(
                f"widths and dropout need one value per level, got {self.widths} and {self.dropout}"
            )
        if dims == 2 and any(length % self.deepest_stride for length in self.input_size):
            raise ConfigError(
                f"size {self.input_size} must be divisible by {self.deepest_stride}, the stride of "
                f"the deepest map of {self.model}"
            )

    def _check_contrast(self) -> None:
        """Settings of PDCR and UAFS that contradict each other."""
        if not self.patch_sizes or any(n < 1 or n % 2 == 0 for n in self.patch_sizes):
            raise ConfigError(f"patch_sizes must be odd numbers, got {self.patch_sizes}")
        if self.hierarchical and max(self.patch_sizes) > min(self.input_size):
            raise ConfigError(
                f"patch_sizes: a window of {max(self.patch_sizes)} is larger than the image, "
                f"{' x '.join(map(str, self.input_size))}"
            )
        if self.size_weights and self.average != "ratio":
            raise ConfigError("size_weights are for average=ratio")
        sizes = len(self.patch_sizes) if self.hierarchical else 1
        if self.size_weights and len(self.size_weights) != sizes:
            raise ConfigError(
                f"size_weights must be one per window size ({sizes}), got {len(self.size_weights)}"
            )
        if len(set(self.terms)) != len(self.terms):
            raise ConfigError(f"terms must differ, got {' '.join(self.terms)}")
        if self.uafs_layers and self.uafs_places:
            raise ConfigError("give uafs_layers or uafs_places, not both")
        if "aspp" in self.uafs_places and not self.is_deeplab:
            raise ConfigError("only DeepLab has an aspp: choose encoder or decoder")

    @property
    def spatial_dims(self) -> int:
        return 2 if self.dataset in PICTURES else 3

    @property
    def in_channels(self) -> int:
        """Of the images: RGB, or one intensity."""
        return 3 if self.spatial_dims == 2 else 1

    @property
    def is_deeplab(self) -> bool:
        return self.spatial_dims == 2 and self.model == "deeplab"

    @property
    def uses_pdcr(self) -> bool:
        return self.method in ("pdcr", "both")

    @property
    def uses_uafs(self) -> bool:
        return self.method in ("uafs", "both")

    @property
    def input_size(self) -> tuple[int, ...]:
        """What the network sees in training."""
        return self.setting("size")

    @property
    def deepest_stride(self) -> int:
        return 16 if self.is_deeplab else 2 ** (len(self.widths) - 1)

    @property
    def hierarchical(self) -> bool:
        """H-PDCR or RF-PDCR."""
        return self.setting("patches") == "hierarchical"

    def setting(self, name: str):
        """A setting of DEFAULTS: as given, or the default for images or volumes."""
        value = getattr(self, name)
        if value not in (None, ()):
            return value
        preset = NOV2021 if self.compat == "nov2021" else {}
        return preset.get(name, DEFAULTS[self.spatial_dims][name])

    @property
    def labeled(self) -> int | float:
        """Labelled subjects: a number, or a share of the pool."""
        return self.labeled_num if self.labeled_fraction is None else float(self.labeled_fraction)

    @property
    def supervised_options(self) -> dict:
        """Options of `supervised_loss`."""
        return {
            "background_weight": self.background_weight,
            "dice": self.dice,
            "dice_background": self.dice_background,
        }
