"""Image-wise contrast: one loss per perspective between the projections of all views."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import medcl_kernels as mk

from .config import GclConfig
from .losses import mean_of, pair_gradients, row_losses
from .meta_labels import BatchLabels


class EmbeddingQueue(nn.Module):
    """Embeddings of earlier slices from a moving average of the network, with their meta labels.

    Args:
        embed: images -> (V, D); copied, then only averaged. size, dim, momentum: its own.
        names: perspectives.
    """

    def __init__(
        self, embed: nn.Module, size: int, dim: int, momentum: float, names: tuple[str, ...]
    ):
        super().__init__()
        self.embed = copy.deepcopy(embed).requires_grad_(False)
        self.size, self.momentum, self.names = size, momentum, names
        self.register_buffer("rows", torch.zeros(size, dim))
        self.register_buffer("meta", torch.zeros(len(names) + 1, size, dtype=torch.int64))
        self.register_buffer("positions", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, source: nn.Module, images: Tensor, labels: BatchLabels) -> None:
        """Average the network, then let its embeddings of a batch push out the oldest."""
        torch._foreach_lerp_(
            list(self.embed.parameters()), list(source.parameters()), 1.0 - self.momentum
        )
        rows = F.normalize(self.embed(images).to(self.rows.dtype), dim=1)
        meta = torch.stack([*(labels.codes[name] for name in self.names), labels.slices])
        for buffer, new in (
            (self.rows, rows),
            (self.meta.T, meta.T),
            (self.positions, labels.positions),
        ):
            buffer.copy_(torch.cat([new, buffer])[: self.size])
        self.filled.fill_(min(self.size, int(self.filled) + len(rows)))

    def entries(self, threshold: float | None) -> tuple[Tensor, BatchLabels]:
        """Unit rows (K, D) and their meta labels."""
        k = int(self.filled)
        codes = {name: self.meta[i, :k] for i, name in enumerate(self.names)}
        labels = BatchLabels(codes, self.positions[:k], self.meta[-1, :k], threshold)
        return self.rows[:k].clone(), labels


class ImageContrast:
    """L_img^m for every perspective m (specs/gcl.md §1)."""

    def __init__(self, config: GclConfig):
        self.config = config

    def losses(
        self,
        z: Tensor,
        labels: BatchLabels,
        queue: EmbeddingQueue | None = None,
        *,
        normalize: bool = True,
    ) -> list[Tensor]:
        """One 0-d loss per perspective.

        Args:
            z: (V, D) projections; unit rows where normalize is False.
            queue: further candidates.
        """
        config = self.config
        explicit = [n for n in labels.names if queue is not None or labels.by_threshold(n)]
        classes = [n for n in labels.names if n not in explicit]
        found = dict.fromkeys(labels.names)
        if classes:  # one pass over the pairs for all of them
            values = mk.supervised_contrastive(
                z,
                [labels.codes[name] for name in classes],
                temperature=config.image_temperature,
                base_temperature=config.base_temperature,
                form=config.image_form,
                normalize=normalize,
                impl=config.impl,
            )
            found |= dict(zip(classes, values, strict=True))
        for name in explicit:
            s, positive, allowed = self._matrices(z, labels, name, queue, normalize)
            value = mean_of(*row_losses(s, positive, allowed, config.image_form))
            if config.base_temperature is not None:
                value = value * (config.image_temperature / config.base_temperature)
            found[name] = value
        return list(found.values())

    def pair_gradients(
        self,
        z: Tensor,
        labels: BatchLabels,
        queue: EmbeddingQueue | None = None,
        *,
        normalize: bool = True,
    ) -> dict[str, Tensor]:
        """dL_img^m / d(cosine) of all pairs of views, (V, V) per perspective, no gradient."""
        found = {}
        for name in labels.names:
            matrices = self._matrices(z.detach(), labels, name, queue, normalize)
            gradient = pair_gradients(*matrices, self.config.image_form)[2]
            base = self.config.base_temperature or self.config.image_temperature
            found[name] = gradient[:, : len(z)] / base
        return found

    def _matrices(self, z, labels, name, queue, normalize) -> tuple[Tensor, Tensor, Tensor]:
        """s, positives and candidates, (V, V + K)."""
        unit = F.normalize(z, dim=1, eps=1e-12) if normalize else z
        positive = labels.same(name)
        allowed = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        keys = unit
        if queue is not None:
            rows, earlier = queue.entries(labels.threshold)
            keys = torch.cat([unit, rows.to(unit.dtype)])
            positive = torch.cat([positive, labels.same(name, earlier)], dim=1)
            allowed = F.pad(allowed, (0, len(rows)), value=True)
        return unit @ keys.T / self.config.image_temperature, positive, allowed
