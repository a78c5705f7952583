"""What the published code of PDCR does differently, as options of `PatchDragsawLoss`."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class PatchCompat:
    """What the published code does differently from `PatchDragsawLoss`'s own reading. The defaults
    are that reading.

    Attributes:
        form, shift, reduction: as in `patch_affinity_contrast`.
        layer_reduction: as in `PatchDragsawLoss`.
        border: cells left out around within-layer grids; added to the cells of cross-layer terms
            when these are looked up in the labels. None: the largest of `sizes` (0 for receptive
            fields).
        drop_last: the sampler "released": "stride", but one sample fewer where its step is 1.
        transpose_labels: rows and columns swapped when patches are looked up.
        adapter_stride: whether cross-layer cells are looked up at the adapter's stride, or at the
            stride of the layer before it.
        window: offsets of a patch of length L: "centered"; "early" is centred one pixel before,
            "open" lacks its last pixel.
        last_plane: whether the last row, column and slice of the labels are counted.
        normalizer: as in `patch_class_ratio`.
        rank_classes: a class goes into the slot of its rank among the classes of its patch, and the
            smallest one counts as background.
    """

    form: str = "affinity"
    shift: str = "constant"
    reduction: str = "mean"
    layer_reduction: str = "sum"
    border: int | None = 0
    drop_last: bool = False
    transpose_labels: bool = False
    adapter_stride: bool = True
    window: str = "centered"
    last_plane: bool = True
    normalizer: str = "clipped"
    rank_classes: bool = False


RELEASE2D = PatchCompat(
    form="release2d",
    shift="max_attached",
    reduction="sum",
    border=None,
    drop_last=True,
    transpose_labels=True,
    adapter_stride=False,
    window="early",
)
COMPAT = {
    "release2d": RELEASE2D,
    # November 2021: large sums were divided by 1000. As means these are layer weights of 1.64 and
    # 0.41 (encoder), 0.041 and 2.56 (decoder) and a cross_weight of 0.041, at four images a batch.
    "nov2021": replace(RELEASE2D, reduction="mean"),
    # February 2021: patches are receptive fields, whole grid
    "receptive_field2d": PatchCompat(
        form="release2d",
        shift="max_attached",
        reduction="sum",
        drop_last=True,
        transpose_labels=True,
        window="open",
    ),
    "release3d": PatchCompat(
        shift="max_attached",
        layer_reduction="mean",
        last_plane=False,
        normalizer="full",
        rank_classes=True,
    ),
}
