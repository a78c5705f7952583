"""MONAI: `MedCLLoss`, called and configured as MONAI's own losses are.

from medcl_kernels.integrations.monai import MedCLLoss
loss_function = MedCLLoss("supervised_contrastive", temperature=0.1)
loss = loss_function(features, batch["label"])
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.modules.loss import _Loss

from ..nn import FilteredContrastiveLoss, InfoNCELoss, SupervisedContrastiveLoss
from . import host, labels_at

LossReduction = host("monai", "monai.utils").LossReduction
LOSSES: dict[str, Any] = {
    "supervised_contrastive": SupervisedContrastiveLoss,
    "filtered_contrastive": FilteredContrastiveLoss,
    "info_nce": InfoNCELoss,
}


class MedCLLoss(_Loss):
    """A loss of this package in MONAI's form.

    Args:
        loss: "supervised_contrastive" or "filtered_contrastive", features against labels; or
            "info_nce", features against those of another view.
        reduction: "mean", "sum", "none", or MONAI's `LossReduction`.
        options: of the loss, see `medcl_kernels.nn`. "info_nce" on `(B, C)` rows with
            intra_view=True, symmetric=True and temperature=0.5 is MONAI's `ContrastiveLoss()`.

    Raises:
        TypeError, ValueError: an option is not as described.
    """

    def __init__(
        self, loss: str = "supervised_contrastive", reduction: str = "mean", **options: Any
    ) -> None:
        super().__init__(reduction=LossReduction(reduction).value)
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
        self.loss = LOSSES[loss](reduction=self.reduction, **options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """
        Args:
            input: features `(B, C, *spatial)` or `(N, C)`.
            target: labels `(B, 1, *spatial)` or `(B, *spatial)` of any resolution, floats as
                MONAI's transforms make them too; for "info_nce" features like `input`.

        Returns:
            0-d; for "none" `(B, *spatial)`, one value per pixel of `input`.
        """
        features = input.as_subclass(Tensor)  # a MetaTensor keeps what it knows out of the kernels
        if isinstance(self.loss, InfoNCELoss):
            return self.loss(features, target.as_subclass(Tensor))
        return self.loss(features, labels=labels_at(features, target))
