"""Building blocks of IDEAL: settings, correspondences between views, cross pseudo labels."""

from .config import IdealConfig
from .consistency import cross_pseudo_loss, ramp_up, supervised_loss
from .correspondence import find_positives, match_views, mutual_only, subset_queries
from .networks import (
    build_network,
    build_pair,
    finetuning_optimizer,
    load_pretrained,
    perturb_maps,
    pretraining_optimizer,
)

__all__ = [
    "build_network",
    "build_pair",
    "finetuning_optimizer",
    "load_pretrained",
    "perturb_maps",
    "pretraining_optimizer",
    "IdealConfig",
    "cross_pseudo_loss",
    "find_positives",
    "match_views",
    "mutual_only",
    "ramp_up",
    "subset_queries",
    "supervised_loss",
]
