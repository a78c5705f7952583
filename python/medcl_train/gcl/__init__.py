"""Parts of GCL: meta labels, image- and pixel-wise contrast, mitigation, networks, settings."""

from .config import GclConfig
from .contrast import Contrast, batches, log_names, selection_log
from .image_contrast import EmbeddingQueue, ImageContrast
from .meta_labels import BatchLabels, GroupedBatches, MetaLabels, meta_labels
from .mitigation import Branch, Mitigator
from .networks import (
    ContrastNetwork,
    ImageEmbedding,
    build_contrast,
    build_network,
    finetuning_optimizer,
    load_pretrained,
    pretraining_optimizer,
    take_weights,
)
from .pixel_contrast import PixelContrast, PixelPairs, Selected

__all__ = [
    "BatchLabels",
    "Branch",
    "Contrast",
    "ContrastNetwork",
    "EmbeddingQueue",
    "GclConfig",
    "GroupedBatches",
    "ImageContrast",
    "ImageEmbedding",
    "MetaLabels",
    "Mitigator",
    "PixelContrast",
    "PixelPairs",
    "Selected",
    "batches",
    "build_contrast",
    "build_network",
    "finetuning_optimizer",
    "load_pretrained",
    "log_names",
    "meta_labels",
    "pictures",
    "pretraining_optimizer",
    "selection_log",
    "take_weights",
]


def pictures(*arguments):
    """Sections of the report page; matplotlib is needed only here."""
    from ..report.gcl import pictures as draw

    return draw(*arguments)
