"""nnU-Net v2: `nnUNetTrainerMedCL`, its loss plus supervised contrast of the last decoder stage.

nnU-Net finds a trainer by name in the folders of `nnUNet_extTrainer`. One file there is enough:

    echo 'from medcl_kernels.integrations.nnunet import nnUNetTrainerMedCL' > trainers/medcl.py
    nnUNet_extTrainer=$PWD/trainers nnUNetv2_train DATASET 2d 0 -tr nnUNetTrainerMedCL
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import supervised_contrastive
from . import host, labels_at

_base = host("nnunetv2", "nnunetv2.training.nnUNetTrainer.nnUNetTrainer").nnUNetTrainer


class nnUNetTrainerMedCL(_base):
    """nnU-Net's trainer with a contrastive term; for another setting, derive from it.

    There is no projection head: nnU-Net builds its network from the plans, for prediction too, and
    a head would be a parameter that these do not know. torch.compile is off, because the features
    are caught by a hook.

    Attributes:
        contrastive_weight: of the contrastive term.
        contrastive_temperature: of its similarities.
        contrastive_pixels: how many pixels of a batch it contrasts, equally many per class where
            there are enough.
    """

    contrastive_weight = 0.1
    contrastive_temperature = 0.1
    contrastive_pixels = 4096

    def _build_loss(self) -> nn.Module:
        if self.label_manager.has_regions or self.is_cascaded:
            raise NotImplementedError(
                f"{type(self).__name__} contrasts pixels by one label each: region-based training "
                "and cascades are not supported"
            )
        network = self.network.module if self.is_ddp else self.network
        return ContrastedLoss(
            super()._build_loss(),
            network.decoder.stages[-1],
            weight=self.contrastive_weight,
            temperature=self.contrastive_temperature,
            pixels=self.contrastive_pixels,
            ignore_label=self.label_manager.ignore_label,
        )

    def _do_i_compile(self) -> bool:
        return False


class ContrastedLoss(nn.Module):
    """A loss of `(net_output, target)` plus supervised contrast of what a layer put out; the
    former alone where no gradient is wanted (validation).

    Args:
        loss: of logits and target, either of which may be a list (deep supervision).
        layer: its output `(B, C, *spatial)`, at the resolution of the first target, is contrasted.
        weight, temperature, pixels: see `nnUNetTrainerMedCL`.
        ignore_label: of pixels that do not count, or None.
    """

    def __init__(
        self,
        loss: nn.Module,
        layer: nn.Module,
        *,
        weight: float,
        temperature: float,
        pixels: int,
        ignore_label: int | None,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.weight, self.temperature, self.pixels = weight, temperature, pixels
        self.ignore_label = -100 if ignore_label is None else ignore_label
        self._features: Tensor | None = None
        layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self._features = output if torch.is_grad_enabled() else None

    def forward(self, net_output: Any, target: Any) -> Tensor:
        loss = self.loss(net_output, target)
        features, self._features = self._features, None
        if features is None:
            return loss
        labels = labels_at(features, target[0] if isinstance(target, (list, tuple)) else target)
        labels = labels.flatten()
        chosen = balanced(labels, self.pixels, self.ignore_label)
        rows = features.movedim(1, -1).flatten(0, -2)[chosen]
        contrast = supervised_contrastive(
            rows,
            labels[chosen],
            temperature=self.temperature,
            ignore_index=self.ignore_label,
            gather_distributed=True,
        )
        return loss + self.weight * contrast


def balanced(labels: Tensor, number: int, ignore_label: int) -> Tensor:
    """Indices of at most `number` random pixels, equally many of every class where there are
    enough; an ignored one where nothing else is there.

    Args:
        labels: `(N,)`.
        number: at least the number of classes.
        ignore_label: of pixels that are not chosen.

    Returns:
        `(K,)` int64, in order.
    """
    order = torch.randperm(len(labels), device=labels.device)
    classes = [c for c in labels.unique().tolist() if c != ignore_label]
    parts = [order[labels[order] == c][: number // len(classes)] for c in classes]
    return torch.cat(parts).sort().values if parts else order[:1]
