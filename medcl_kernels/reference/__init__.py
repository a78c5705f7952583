"""The specification: every operation in plain torch, one file each.

These functions store N x N matrices without regret. They are differentiable (any number of times),
run in float64, and define what the fused kernels must return. Nothing here imports anything but
torch, so that the specification cannot inherit a mistake from the code that it judges.
"""

from .info_nce_sum import info_nce_sum
from .mitigate_rows import mitigate_rows
from .pair_affinity import pair_affinity
from .pair_argmax import pair_argmax
from .pair_at import pair_at
from .pair_filtered_grad import pair_filtered_grad
from .pair_hinge import pair_hinge
from .pair_logsumexp import pair_logsumexp
from .pair_positive_log import pair_positive_log
from .pair_topk import pair_topk
from .patch_class_ratio import patch_class_ratio
from .positive_at import positive_at
from .positive_mean import positive_mean
from .supervised_sum import supervised_sum
from .uncertainty_reweight import uncertainty_reweight

__all__ = [
    "info_nce_sum",
    "mitigate_rows",
    "pair_affinity",
    "pair_argmax",
    "pair_at",
    "pair_filtered_grad",
    "pair_hinge",
    "pair_logsumexp",
    "pair_positive_log",
    "pair_topk",
    "patch_class_ratio",
    "positive_at",
    "positive_mean",
    "supervised_sum",
    "uncertainty_reweight",
]
