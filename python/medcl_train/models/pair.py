"""Query and key branches of dense contrastive pre-training: encoder E_Q with head G_Q, encoder E_K
with head G_K."""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .unet import UNetEncoder

KEY_BRANCHES = ("ema", "siamese", "two")


class Embedding(NamedTuple):
    """What a branch makes of a view.

    levels: (encoder map (B, C, h, w), dense projection (B, D, h, w)) per contrasted stride.
    whole: one projection (B, D) per image, or None without an image-level head.
    """

    levels: list[tuple[Tensor, Tensor]]
    whole: Tensor | None


class Projector(nn.Module):
    """Dense heads G, one per contrasted encoder map, and perhaps an image-level head on the last.

    Args:
        dense: modules (B, C, *sp) -> (B, D, *sp). whole: module (B, C, *sp) -> (B, D), or None.
    """

    def __init__(self, dense: Sequence[nn.Module], whole: nn.Module | None = None):
        super().__init__()
        self.dense = nn.ModuleList(dense)
        self.whole = whole

    def forward(self, maps: Sequence[Tensor]) -> Embedding:
        levels = [(m, head(m)) for head, m in zip(self.dense, maps, strict=True)]
        return Embedding(levels, None if self.whole is None else self.whole(maps[-1]))


def pooled_head(in_channels: int, out_channels: int, *, spatial_dims: int = 2) -> nn.Sequential:
    """Image-level head of MoCo v2 and DenseCL: mean over pixels, linear, ReLU, linear."""
    pool = nn.AdaptiveAvgPool2d if spatial_dims == 2 else nn.AdaptiveAvgPool3d
    return nn.Sequential(
        pool(1),
        nn.Flatten(),
        nn.Linear(in_channels, in_channels),
        nn.ReLU(inplace=True),
        nn.Linear(in_channels, out_channels),
    )


class QueryKeyPair(nn.Module):
    """Two views go through two branches; the branches are tied in one of three ways.

    Args:
        encoder, head: functions that build E and its projector G (called twice for key="two").
        strides: of the encoder maps that are contrasted, ascending; deeper levels are not computed.
        key: "ema" - the key branch is a moving average of the query branch and gets no gradient
            (MoCo, the default reading); "siamese" - one branch, gradient through both views; "two"
            - independent branches, both trained.
    """

    def __init__(
        self,
        encoder: Callable[[], UNetEncoder],
        head: Callable[[], Projector],
        *,
        strides: Sequence[int],
        key: str = "ema",
    ):
        super().__init__()
        if key not in KEY_BRANCHES:
            raise ValueError(f"unknown key branch {key!r}; choose from {KEY_BRANCHES}")
        self.key_branch = key
        self.encoder_q, self.head_q = encoder(), head()
        self.levels = [self.encoder_q.level_of(stride) for stride in strides]
        if key == "siamese":
            self.encoder_k, self.head_k = self.encoder_q, self.head_q
        elif key == "two":
            self.encoder_k, self.head_k = encoder(), head()
        else:
            self.encoder_k, self.head_k = copy.deepcopy(self.encoder_q), copy.deepcopy(self.head_q)
            self._key_modules().requires_grad_(False)

    def _key_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.encoder_k, self.head_k])

    def query(self, view: Tensor) -> Embedding:
        """Encoder maps and projections of the query view (B, 1, H, W)."""
        return self._embed(self.encoder_q, self.head_q, view)

    def key(self, view: Tensor) -> Embedding:
        """The same for the key view; without gradient when the key branch is a moving average."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.key_branch != "ema"):
            return self._embed(self.encoder_k, self.head_k, view)

    def _embed(self, encoder: UNetEncoder, head: Projector, view: Tensor) -> Embedding:
        maps = encoder(view, max(self.levels))
        return head([maps[level] for level in self.levels])

    @torch.no_grad()
    def update_key(self, momentum: float) -> None:
        """xi_k <- m*xi_k + (1-m)*xi_q on parameters; BatchNorm statistics are not averaged, the key
        branch makes its own."""
        if self.key_branch != "ema":
            return
        for target, source in ((self.encoder_k, self.encoder_q), (self.head_k, self.head_q)):
            torch._foreach_lerp_(
                list(target.parameters()), list(source.parameters()), 1.0 - momentum
            )

    def encoder(self, branch: str) -> UNetEncoder:
        """The encoder of branch "q" or "k"."""
        return {"q": self.encoder_q, "k": self.encoder_k}[branch]

    def trained_parameters(self) -> list[nn.Parameter]:
        """Parameters that the optimiser updates (each one once)."""
        return [p for p in self.parameters() if p.requires_grad]
