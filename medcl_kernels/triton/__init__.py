"""Triton kernels of `medcl_triton::*`; imported by `medcl_kernels.ops` when this backend is chosen.

Layers, top down: one file per operation (its epilogues and its host code), engine.py (the two
kernels over pairs), rows.py (packing), launch.py, and configs.py, the table of tile sizes.
"""

from __future__ import annotations

from ..dispatch import BACKENDS
from ..ops.registration import LIBRARIES
from .mitigate_rows import mitigate_rows
from .pair_affinity import pair_affinity, pair_affinity_backward
from .pair_argmax import pair_argmax
from .pair_at import pair_at, pair_at_backward
from .pair_filtered_grad import pair_filtered_grad, pair_filtered_grad_backward
from .pair_logsumexp import pair_logsumexp, pair_logsumexp_backward
from .pair_positive_log import pair_positive_log, pair_positive_log_backward
from .pair_topk import pair_topk
from .patch_class_ratio import patch_class_ratio
from .positives import positive_at, positive_at_backward, positive_mean, positive_mean_backward
from .uncertainty_reweight import uncertainty_reweight, uncertainty_reweight_backward

KERNELS = (
    mitigate_rows,
    pair_affinity,
    pair_affinity_backward,
    pair_argmax,
    pair_at,
    pair_at_backward,
    pair_filtered_grad,
    pair_filtered_grad_backward,
    pair_logsumexp,
    pair_logsumexp_backward,
    pair_positive_log,
    pair_positive_log_backward,
    pair_topk,
    patch_class_ratio,
    positive_at,
    positive_at_backward,
    positive_mean,
    positive_mean_backward,
    uncertainty_reweight,
    uncertainty_reweight_backward,
)

(_devices,) = (backend.devices for backend in BACKENDS if backend.name == "triton")
for _kernel in KERNELS:
    for _device in _devices:
        LIBRARIES["medcl_triton"].impl(_kernel.__name__, _kernel, _device.upper())
