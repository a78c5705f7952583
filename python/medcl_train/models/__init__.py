"""Networks of the reference trainers: a U-Net encoder with feature taps, decoders, and the pairs
built from them."""

from .decoders import DeepLabDecoder, FPNDecoder
from .pair import Embedding, Projector, QueryKeyPair, pooled_head
from .segmenter import DECODERS, TwinSegmenter, build_segmenter
from .unet import BilinearDecoder, ConvBlock, TransposedDecoder, UNetEncoder

__all__ = [
    "DECODERS",
    "BilinearDecoder",
    "ConvBlock",
    "DeepLabDecoder",
    "Embedding",
    "FPNDecoder",
    "Projector",
    "QueryKeyPair",
    "TransposedDecoder",
    "TwinSegmenter",
    "UNetEncoder",
    "build_segmenter",
    "pooled_head",
]
