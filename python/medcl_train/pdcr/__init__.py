"""Parts of PDCR and UAFS: settings, data, networks with named layers, the contrast on them."""

from .config import PdcrConfig
from .contrast import Contrast
from .data import PdcrData, evaluator, find_all, load_data, num_classes_of, prepare_all
from .networks import build_network, build_training, uafs_layers
from .taps import Taps, uncertainty_maps

__all__ = [
    "Contrast",
    "PdcrConfig",
    "PdcrData",
    "Taps",
    "build_network",
    "build_training",
    "evaluator",
    "find_all",
    "load_data",
    "num_classes_of",
    "pictures",
    "prepare_all",
    "uafs_layers",
    "uncertainty_maps",
]


def pictures(*arguments):
    """Sections of the report page; matplotlib is needed only here."""
    from ..report.pdcr import pictures as draw

    return draw(*arguments)
