"""The functions that users call, `torch.nn.functional` style: tensors first, everything else by
keyword.

They are defined in `medcl_kernels.losses`, one file each, and re-exported at the top of the
package.
"""

from .losses.dense_correspondence import dense_correspondence
from .losses.dense_hinge import dense_hinge
from .losses.gradient_filter import PairSelection, filtered_contrastive, select_pairs
from .losses.gradient_mitigator import mitigate_gradients, mitigated_contrastive
from .losses.info_nce import info_nce
from .losses.parameter_mitigation import mitigate_parameters
from .losses.patch_affinity_contrast import patch_affinity_contrast
from .losses.patch_class_ratio import patch_class_ratio
from .losses.supervised_contrastive import supervised_contrastive
from .losses.uncertainty_reweight import uncertainty_reweight

__all__ = [
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
]
