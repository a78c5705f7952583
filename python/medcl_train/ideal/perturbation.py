"""What makes the two branches of fine-tuning see different things, besides their decoders
(specs/ideal.md §2): dropout of their own, noise on the input, and CCT's perturbations of maps.

Random numbers come from torch's global generators, which the loop seeds at every iteration.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import IdealConfig

Perturb = Callable[[list[Tensor]], list[Tensor]]


def second_branch(config: IdealConfig, images: Tensor) -> tuple[Tensor | None, Perturb | None]:
    """What D2's branch gets instead of D1's maps: `TwinSegmenter(images, *second_branch(...))`.

    Returns: its image, None where D1's pass through the encoder serves both (same input and no
        dropout to differ by); and a function on its maps, None without perturbation.
    """
    image = None
    if config.input_noise:
        noise = torch.randn_like(images) * config.input_noise
        image = images + noise.clamp(-2 * config.input_noise, 2 * config.input_noise)
    elif config.independent_dropout and any(config.dropout):
        image = images

    steps: list[Callable[[Tensor], Tensor]] = []
    if config.feature_noise:
        steps.append(lambda f: feature_noise(f, config.feature_noise))
    if config.feature_drop:
        steps.append(feature_drop)
    if config.feature_dropout:
        steps.append(lambda f: _channel_dropout(f, config.feature_dropout))

    def perturb(maps: list[Tensor]) -> list[Tensor]:
        for step in steps:
            maps = [step(f) for f in maps]
        return maps

    return image, perturb if steps else None


def feature_noise(features: Tensor, strength: float) -> Tensor:
    """FeatureNoise of CCT: f * (1 + u), u ~ U(-strength, strength) per element, shared by the
    batch; (B, C, *sp)."""
    return features * (1 + torch.empty_like(features[:1]).uniform_(-strength, strength))


def feature_drop(features: Tensor, low: float = 0.7, high: float = 0.9) -> Tensor:
    """FeatureDrop of CCT: zero at places whose activation, averaged over channels, reaches gamma
    times the image's largest, gamma ~ U(low, high); (B, C, *sp)."""
    attention = features.detach().mean(1, keepdim=True)
    largest = attention.amax(tuple(range(1, attention.dim())), keepdim=True)
    gamma = torch.empty((), device=features.device).uniform_(low, high).to(features.dtype)
    return features * (attention < gamma * largest)


def _channel_dropout(features: Tensor, p: float) -> Tensor:
    """Whole channels of an image become 0 with probability p, the others grow by 1 / (1 - p)."""
    return F.dropout2d(features, p) if features.dim() == 4 else F.dropout3d(features, p)
