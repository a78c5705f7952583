"""Networks of the reference trainers: a U-Net encoder with feature taps, decoders, and the pairs
built from them; a 3-D U-Net with deep supervision."""

from .decoders import DeepLabDecoder, FPNDecoder
from .pair import Embedding, Projector, QueryKeyPair, pooled_head
from .segmenter import DECODERS, TwinSegmenter, build_segmenter
from .unet import BilinearDecoder, ConvBlock, TransposedDecoder, UNetEncoder
from .unet3d import UNet3d, build_unet3d, deep_supervision_loss
from .xception import XceptionEncoder, build_deeplab

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
    "UNet3d",
    "UNetEncoder",
    "XceptionEncoder",
    "build_deeplab",
    "build_segmenter",
    "build_unet3d",
    "deep_supervision_loss",
    "pooled_head",
]
