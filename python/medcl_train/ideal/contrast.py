"""Loss of stage 1 with the state that it has: queues of earlier keys and a learnt temperature."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import medcl_kernels as mk

from ..models import Embedding
from .config import IdealConfig

Positives = Tensor | tuple[Tensor, Tensor]


class ViewContrast(nn.Module):
    """(1 - lambda) * image-level InfoNCE + lambda * dense loss, the mean over contrasted levels.

    The dense loss is `medcl_kernels.info_nce` or `dense_hinge`. With lambda = 1, the default, there
    is no image-level term (specs/ideal.md §1.4).
    """

    def __init__(self, config: IdealConfig):
        super().__init__()
        self.config = config
        size, channels = config.queue_size, config.projection_dim
        levels = range(len(config.strides) if config.uses_queue else 0)
        self.queues = nn.ModuleList(mk.MemoryQueue(size, channels) for _ in levels)
        self.global_queue = None
        if config.uses_global and "queue" in config.global_negatives:
            self.global_queue = mk.MemoryQueue(size, channels)
        self.log_temperature = None
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))

    def temperature(self) -> float | Tensor:
        """A number, or exp of the parameter that is learnt."""
        return (
            self.config.temperature if self.log_temperature is None else self.log_temperature.exp()
        )

    def forward(
        self, query: Embedding, key: Embedding, positives: Sequence[Positives], iteration: int
    ) -> dict[str, Tensor | float]:
        """{"loss": ..., and its parts where it has any}.

        Args:
            query, key: of `QueryKeyPair`.
            positives: of `match_views`, per level.
            iteration: for lambda.
        """
        config = self.config
        terms = [
            self._dense(level, q, k, chosen)
            for level, ((_, q), (_, k), chosen) in enumerate(
                zip(query.levels, key.levels, positives, strict=True)
            )
        ]
        values: dict[str, Tensor | float] = {"loss": torch.stack(terms).mean()}
        if config.uses_global:
            weight, local = config.local_weight_at(iteration), values["loss"]
            whole = self._whole(query, key)
            values["loss"] = (1 - weight) * whole + weight * local
            values |= {"loss_local": local, "loss_global": whole, "local_weight": weight}
        if self.log_temperature is not None:
            values["temperature"] = self.temperature()
        return values

    def _dense(self, level: int, query: Tensor, key: Tensor, positives: Positives) -> Tensor:
        queue = self.queues[level].negatives() if self.queues else None
        options = self.config.contrast_options
        if self.config.contrast == "hinge":
            return mk.dense_hinge(query, key, positives, queue=queue, **options)
        return mk.info_nce(
            query, key, positives, queue=queue, temperature=self.temperature(), **options
        )

    def _whole(self, query: Embedding, key: Embedding) -> Tensor:
        """InfoNCE between images: the other view of the same image is the positive."""
        config, queue = self.config, None
        if self.global_queue is not None:
            queue = self.global_queue.negatives()
        return mk.info_nce(
            query.whole,
            key.whole,
            queue=queue,
            temperature=self.temperature(),
            pairs="queue" if config.global_negatives == "queue" else "batch",
            symmetric=config.symmetric,
            impl=config.impl,
        )

    def enqueue(self, key: Embedding) -> None:
        """Remember the keys of this step as negatives of later ones."""
        for queue, (_, projection) in zip(self.queues, key.levels, strict=False):
            queue.enqueue(projection)
        if self.global_queue is not None:
            self.global_queue.enqueue(key.whole)
