"""Networks of the reference trainers: a U-Net encoder with feature taps, two decoders, and the
pairs built from them."""

from .pair import QueryKeyPair
from .segmenter import DECODERS, TwinSegmenter, build_segmenter
from .unet import BilinearDecoder, ConvBlock, TransposedDecoder, UNetEncoder

__all__ = [
    "DECODERS",
    "BilinearDecoder",
    "ConvBlock",
    "QueryKeyPair",
    "TransposedDecoder",
    "TwinSegmenter",
    "UNetEncoder",
    "build_segmenter",
]
