"""pytorch-metric-learning: `MedCLLoss`, for `(N, C)` embeddings where its own losses run out of
memory.

    from medcl_kernels.integrations.metric_learning import MedCLLoss
    loss = MedCLLoss(temperature=0.1)(embeddings, labels)  # as losses.SupConLoss(temperature=0.1)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..nn import SupervisedContrastiveLoss
from . import host

_losses = host("pytorch-metric-learning", "pytorch_metric_learning.losses")
_distances = host("pytorch-metric-learning", "pytorch_metric_learning.distances")
_reducers = host("pytorch-metric-learning", "pytorch_metric_learning.reducers")


class MedCLLoss(_losses.BaseMetricLossFunction):
    """Supervised contrast as a loss of pytorch-metric-learning: the values of its `SupConLoss` from
    O(N C) memory, with its reducers and embedding regularisers.

    Args:
        temperature, form, gather_distributed, impl: see `medcl_kernels.supervised_contrastive`.
            form="pixel" is NT-Xent with the mean over the positives of an anchor.
        kwargs: reducer, embedding_regularizer and so on, of `BaseMetricLossFunction`.

    Raises:
        ValueError: called with an `indices_tuple`: all pairs count here, none is listed.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        form: str = "out",
        gather_distributed: Any = False,
        impl: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.contrast = SupervisedContrastiveLoss(
            temperature=temperature,
            form=form,
            gather_distributed=gather_distributed,
            impl=impl,
            reduction="none",
        )

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Any,
        ref_emb: Tensor,
        ref_labels: Tensor,
    ) -> dict[str, Any]:
        """One value per embedding, `(N,)`; `ref_emb` `(N2, C)` are the candidates."""
        if indices_tuple is not None:
            raise ValueError(
                "indices_tuple lists pairs, and this loss never lists them: leave the miner out, "
                "or choose medcl_kernels.filtered_contrastive, which selects pairs by gradient"
            )
        alone = ref_emb is embeddings
        values = self.contrast(
            embeddings, labels, None if alone else ref_emb, None if alone else ref_labels
        )
        return {
            "loss": {
                "losses": values,
                "indices": torch.arange(len(values), device=values.device),
                "reduction_type": "element",
            }
        }

    def get_default_reducer(self) -> Any:
        """As `SupConLoss`: anchors without a positive have loss 0 and are left out."""
        return _reducers.AvgNonZeroReducer()

    def get_default_distance(self) -> Any:
        """What the kernels compute; it is not called."""
        return _distances.CosineSimilarity()
