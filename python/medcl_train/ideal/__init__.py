"""Building blocks of IDEAL: settings, correspondences between views, cross pseudo labels."""

from .config import IdealConfig
from .consistency import cross_pseudo_loss, ramp_up, supervised_loss
from .contrast import ViewContrast
from .correspondence import find_positives, match_views, mutual_only, subset_queries
from .networks import (
    build_network,
    build_pair,
    finetuning_optimizer,
    load_pretrained,
    pretraining_optimizer,
)
from .perturbation import feature_drop, feature_noise, second_branch

__all__ = [
    "build_network",
    "build_pair",
    "finetuning_optimizer",
    "load_pretrained",
    "pretraining_optimizer",
    "IdealConfig",
    "ViewContrast",
    "cross_pseudo_loss",
    "feature_drop",
    "feature_noise",
    "find_positives",
    "match_views",
    "mutual_only",
    "ramp_up",
    "second_branch",
    "subset_queries",
    "supervised_loss",
]
