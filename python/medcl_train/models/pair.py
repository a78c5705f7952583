"""Query and key branches of dense contrastive pre-training: encoder E_Q with head G_Q, encoder E_K
with head G_K."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .unet import UNetEncoder

KEY_BRANCHES = ("ema", "siamese", "two")


class QueryKeyPair(nn.Module):
    """Two views go through two branches; the branches are tied in one of three ways.

    Args:
        encoder, head: functions that build E and G (called twice for key="two"). G maps (B, C, *sp)
            to (B, D, *sp).
        stride: stride of the encoder map that is contrasted; deeper levels are not computed.
        key: "ema" - the key branch is a moving average of the query branch and gets no gradient
            (MoCo, the default reading); "siamese" - one branch, gradient through both views; "two"
            - independent branches, both trained.
    """

    def __init__(
        self,
        encoder: Callable[[], UNetEncoder],
        head: Callable[[], nn.Module],
        *,
        stride: int,
        key: str = "ema",
    ):
        super().__init__()
        if key not in KEY_BRANCHES:
            raise ValueError(f"unknown key branch {key!r}; choose from {KEY_BRANCHES}")
        self.key_branch = key
        self.encoder_q, self.head_q = encoder(), head()
        self.level = self.encoder_q.level_of(stride)
        if key == "siamese":
            self.encoder_k, self.head_k = self.encoder_q, self.head_q
        elif key == "two":
            self.encoder_k, self.head_k = encoder(), head()
        else:
            self.encoder_k, self.head_k = copy.deepcopy(self.encoder_q), copy.deepcopy(self.head_q)
            self._key_modules().requires_grad_(False)

    def _key_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.encoder_k, self.head_k])

    def query(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """(backbone map (B, C, h, w), dense projection (B, D, h, w)) of the query view."""
        features = self.encoder_q(view, self.level)[-1]
        return features, self.head_q(features)

    def key(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the key view; without gradient when the key branch is a moving average."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.key_branch != "ema"):
            features = self.encoder_k(view, self.level)[-1]
            return features, self.head_k(features)

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
