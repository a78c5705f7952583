"""Both branches of one pre-training step."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.augment import ViewGeometry
from ..engine.seeding import IndexStream
from .config import GclConfig
from .image_contrast import EmbeddingQueue, ImageContrast
from .meta_labels import BatchLabels, GroupedBatches, MetaLabels
from .mitigation import Branch
from .networks import ContrastNetwork, ImageEmbedding, Projections
from .pixel_contrast import PixelContrast, Selected


class Contrast(nn.Module):
    """The two losses of a step as branches for the Mitigator; state: the queue, if there is one."""

    def __init__(self, config: GclConfig, network: ContrastNetwork):
        super().__init__()
        self.config = config
        self.image, self.pixel = ImageContrast(config), PixelContrast(config)
        self.queue = None
        if config.queue_size and config.image_weight:
            self.queue = EmbeddingQueue(
                ImageEmbedding(network),
                config.queue_size,
                config.image_dim,
                config.momentum,
                config.perspective_names,
            )
        # where gradients are compared: at unit rows, or before
        self.unit = not (config.mitigate_before_norm or config.score == "pix_rep")

    def branches(
        self, found: Projections, labels: BatchLabels, geometry: ViewGeometry, iteration: int
    ) -> list[Branch]:
        """Image branch, and pixel branch after its warm-up; those of weight 0 are left out."""
        config, branches = self.config, []
        options = {"normalize": not self.unit}
        images, pixels = (self._features(z) for z in (found.images, found.pixels))
        if config.image_weight > 0:
            branches.append(
                Branch(
                    "image",
                    config.image_weight,
                    images,
                    lambda z: self.image.losses(z, labels, self.queue, **options),
                    lambda z: self._image_pairs(z, labels),
                )
            )
        if config.uses_pixels(iteration):
            gradients = None
            if config.score in ("img_cam", "product"):
                gradients = self.image.pair_gradients(images, labels, self.queue, **options)
            pairs = self.pixel.pairs(found.maps.float(), labels, geometry, iteration, gradients)
            keep = config.keep_at(iteration)
            branches.append(
                Branch(
                    "pixel",
                    config.pixel_weight,
                    pixels,
                    lambda z: self.pixel.losses(z, pairs, keep, **options),
                    lambda z: self.pixel.selected(z, pairs, keep, **options),
                )
            )
        return branches

    def remember(self, network: ContrastNetwork, views: Tensor, labels: BatchLabels) -> None:
        """Further candidates of later steps."""
        if self.queue is not None:
            self.queue.update(ImageEmbedding(network), views, labels)

    def _features(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1, eps=1e-12) if self.unit else z

    def _image_pairs(self, z: Tensor, labels: BatchLabels) -> list[Selected]:
        """All pairs of views with their gradients."""
        listed = []
        for gradient in self.image.pair_gradients(z, labels, normalize=not self.unit).values():
            anchor, candidate = gradient.nonzero(as_tuple=True)
            pairs = len(z) * (len(z) - 1)
            listed.append(Selected(anchor, candidate, gradient[anchor, candidate], pairs))
        return listed


def selection_log(branches: Sequence[Branch]) -> dict[str, float | Tensor]:
    """Selected share of all pixel pairs and mean |G| of the selected ones, means over perspectives;
    NaN while the pixel branch warms up."""
    chosen = [b.pairs(b.features.detach()) for b in branches if b.name == "pixel"]
    if not chosen:
        return {"selected": float("nan"), "mean_gradient": float("nan")}
    (chosen,) = chosen
    share = [len(one.anchor) / one.pairs for one in chosen]
    size = [one.gradient.abs().sum() / max(1, len(one.gradient)) for one in chosen]
    return {"selected": sum(share) / len(share), "mean_gradient": torch.stack(size).mean()}


def log_names(config: GclConfig) -> list[str]:
    """Numbers that a step logs whatever its branches are."""
    names = config.perspective_names
    pairs = [f"{names[a]}_{names[b]}" for b in range(len(names)) for a in range(b)]
    kinds = [name for name in ("image", "pixel") if getattr(config, f"{name}_weight") > 0]
    found = [f"loss_{kind}" for kind in kinds]
    places = ["conflict", "conflict_encoder"] if config.mitigator.endswith("_param") else []
    for place in places or ["conflict"]:
        found += [f"{place}_{kind}_{pair}" for kind in kinds for pair in pairs]
    return found


def batches(config: GclConfig, labels: MetaLabels) -> GroupedBatches | IndexStream:
    """Slices of every iteration: `.at(iteration)`."""
    size, seed = config.pretrain_batch_size, config.seed
    if config.sampler == "grouped":
        return GroupedBatches(labels, size, seed)
    return IndexStream(len(labels.positions), size, seed)
