"""Lightning: `ContrastiveMixin`, one more term for a training step.

class Model(ContrastiveMixin, LightningModule):
    def __init__(self):
        super().__init__()
        self.contrastive_loss = medcl.SupervisedContrastiveLoss(gather_distributed=True)

    def training_step(self, batch, batch_idx):
        features, logits = self.network(batch["image"])
        contrast = self.contrastive_step(features, batch["label"])
        return self.segmentation_loss(logits, batch["label"]) + 0.1 * contrast
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import host, labels_at

host("lightning", "lightning.pytorch", "pytorch_lightning")


class ContrastiveMixin:
    """Stands before `LightningModule`, of `lightning` or `pytorch_lightning`, among the bases.

    Attributes:
        contrastive_loss: `SupervisedContrastiveLoss` or `FilteredContrastiveLoss`, set in
            `__init__`. With gather_distributed=True its candidates come from all devices; on one
            device that changes nothing.
    """

    contrastive_loss: nn.Module

    def contrastive_step(
        self, features: Tensor, labels: Tensor, name: str = "contrastive_loss", **log: Any
    ) -> Tensor:
        """The loss, and its entry in the log.

        Args:
            features: `(B, C, *spatial)` or `(N, C)`.
            labels: `(B, 1, *spatial)` or `(B, *spatial)` of any resolution, or `(N,)`.
            name: in the log.
            log: further arguments of `self.log`, for example sync_dist=True.

        Returns:
            0-d tensor.
        """
        loss = self.contrastive_loss(features, labels=labels_at(features, labels))
        self.log(name, loss.detach(), **{"batch_size": len(features), **log})  # type: ignore[attr-defined]
        return loss
