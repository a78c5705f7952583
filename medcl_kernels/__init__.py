"""Dense contrastive learning over pixel pairs in O(N D) memory: fused kernels for PyTorch.

    import medcl_kernels as medcl
    loss = medcl.info_nce(query, key, medcl.dense_correspondence(query, key), temperature=0.2)

Importing this package loads nothing but torch: the names below, the compiled library and the
backends are found at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import distributed, functional, nn
    from .functional import (
        PairSelection,
        dense_correspondence,
        dense_hinge,
        filtered_contrastive,
        info_nce,
        mitigate_gradients,
        mitigate_parameters,
        mitigated_contrastive,
        patch_affinity_contrast,
        patch_class_ratio,
        select_pairs,
        supervised_contrastive,
        uncertainty_reweight,
    )
    from .nn import (
        CrossLayer,
        DenseHingeLoss,
        DenseProjectionHead,
        FilteredContrastiveLoss,
        GradientMitigator,
        InfoNCELoss,
        MemoryQueue,
        PatchCompat,
        PatchDragsawLoss,
        PatchLayer,
        SupervisedContrastiveLoss,
        UncertaintyFeatureSelection,
        insert_uafs,
        receptive_fields,
    )

    __version__: str

_FUNCTIONS = (
    "PairSelection",
    "dense_correspondence",
    "dense_hinge",
    "filtered_contrastive",
    "info_nce",
    "mitigate_gradients",
    "mitigate_parameters",
    "mitigated_contrastive",
    "patch_affinity_contrast",
    "patch_class_ratio",
    "select_pairs",
    "supervised_contrastive",
    "uncertainty_reweight",
)
_MODULES = (
    "CrossLayer",
    "DenseHingeLoss",
    "DenseProjectionHead",
    "FilteredContrastiveLoss",
    "GradientMitigator",
    "InfoNCELoss",
    "MemoryQueue",
    "PatchCompat",
    "PatchDragsawLoss",
    "PatchLayer",
    "SupervisedContrastiveLoss",
    "UncertaintyFeatureSelection",
    "insert_uafs",
    "receptive_fields",
)
_SUBMODULES = ("distributed", "functional", "nn")

__all__ = [
    "CrossLayer",
    "DenseHingeLoss",
    "DenseProjectionHead",
    "FilteredContrastiveLoss",
    "GradientMitigator",
    "InfoNCELoss",
    "MemoryQueue",
    "PairSelection",
    "PatchCompat",
    "PatchDragsawLoss",
    "PatchLayer",
    "SupervisedContrastiveLoss",
    "UncertaintyFeatureSelection",
    "__version__",
    "dense_correspondence",
    "dense_hinge",
    "distributed",
    "filtered_contrastive",
    "functional",
    "info_nce",
    "insert_uafs",
    "mitigate_gradients",
    "mitigate_parameters",
    "mitigated_contrastive",
    "nn",
    "patch_affinity_contrast",
    "patch_class_ratio",
    "receptive_fields",
    "select_pairs",
    "supervised_contrastive",
    "uncertainty_reweight",
]


def __getattr__(name: str) -> Any:
    """PEP 562: import a public name when it is first asked for."""
    from importlib import import_module

    if name in _FUNCTIONS:
        value = getattr(import_module(".functional", __name__), name)
    elif name in _MODULES:
        value = getattr(import_module(".nn", __name__), name)
    elif name in _SUBMODULES:
        value = import_module(f".{name}", __name__)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    """The installed distribution's version; a checkout that is not installed has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError:
        return "0+not.installed"


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
