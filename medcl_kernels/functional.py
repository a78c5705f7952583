"""The functions that users call, `torch.nn.functional` style: tensors first, everything else by
keyword.

They are defined in `medcl_kernels.losses`, one file each, and re-exported at the top of the
package.
"""

from .losses.dense_correspondence import dense_correspondence
from .losses.dense_hinge import dense_hinge
from .losses.info_nce import info_nce
from .losses.patch_affinity_contrast import patch_affinity_contrast
from .losses.patch_class_ratio import patch_class_ratio
from .losses.supervised_contrastive import supervised_contrastive
from .losses.uncertainty_reweight import uncertainty_reweight

__all__ = [
    "dense_correspondence",
    "dense_hinge",
    "info_nce",
    "patch_affinity_contrast",
    "patch_class_ratio",
    "supervised_contrastive",
    "uncertainty_reweight",
]
