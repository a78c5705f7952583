"""Pixel-wise contrast with the Gradient Filter: one loss per perspective between the pixels of
images that share its meta label (specs/gcl.md §3).

`medcl_kernels.filtered_contrastive` computes what it has a form for; the rest (candidates of the
whole batch for matched positives, scores that look at the image branch, thresholds instead of a
number of pairs) is computed on explicit matrices, O(N^2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import medcl_kernels as mk

from ..data.augment import ViewGeometry
from ..ideal.correspondence import nearest_cell
from .config import GclConfig
from .losses import largest, mean_of, pair_gradients, row_losses
from .meta_labels import BatchLabels

Keep = float | tuple[float, float]


@dataclass(frozen=True)
class PixelPairs:
    """What one perspective contrasts.

    Attributes:
        x, y: (P,) views; anchors are the pixels of x[b], positives lie in y[b].
        positives: (P, h, w, R) flat index into the pixels of y[b], -1 = none; or (P, n, n) bool; or
            (V, h, w) classes of all pixels of the batch.
        shares: (P, n, n) share of every pair in the image similarity, |a_pq|; None if unused.
        image_gradient: (P,) |dL_img^m / d(similarity of x and y)|; None if unused.
    """

    name: str
    x: Tensor
    y: Tensor
    positives: Tensor
    shares: Tensor | None = None
    image_gradient: Tensor | None = None


class Selected(NamedTuple):
    """Selected pairs: pixels `view * n + place`, dL^m / d(cosine), of how many pairs."""

    anchor: Tensor
    candidate: Tensor
    gradient: Tensor
    pairs: int


class PixelContrast:
    """L_pix^m for every perspective m."""

    def __init__(self, config: GclConfig):
        self.config = config
        self.by_class = config.positives == "label"
        self.fused = (
            config.score in ("pix_sim", "pix_rep")
            and config.filter_by in ("pair", "global", "anchor")
            and config.positives != "cam"
            and (config.pixel_scope == "pair" or self.by_class)
            and (config.direction == "directed" or self.by_class)
        )
        scope = {"pair": "image", "global": "global", "anchor": "anchor"}.get(config.filter_by)
        self.options = {
            "scope": scope,
            "score": "pair" if config.score == "pix_sim" else "representation",
            "form": config.pixel_form,
            "temperature": config.pixel_temperature,
            "pairs": "batch" if self.by_class else "image",
            "direction": config.direction,
            "pos_sign": config.pos_sign,
            "impl": config.impl,
        }

    def pairs(
        self,
        maps: Tensor,
        labels: BatchLabels,
        geometry: ViewGeometry,
        iteration: int,
        image_gradients: dict[str, Tensor] | None = None,
    ) -> list[PixelPairs]:
        """Partners and positives of a batch, per perspective.

        Args:
            maps: (V, C, h, w), the features that the pixel head projects.
            geometry: of the V views.
            image_gradients: of `ImageContrast.pair_gradients`, for scores that use them.
        """
        config, found, maps = self.config, [], maps.detach()
        for name in labels.names:
            x = torch.arange(len(maps), device=maps.device)
            if self.by_class:
                classes = labels.codes[name][:, None, None].expand(-1, *maps.shape[2:])
                found.append(PixelPairs(name, x, x, classes))
                continue
            draws = range(config.pairs_per_image)
            y = torch.cat([labels.partners(name, config.seed, iteration, draw) for draw in draws])
            x = x.repeat(len(draws))
            if config.pixel_scope == "pair" and config.symmetric:
                x, y = torch.cat([x, y]), torch.cat([y, x])
            shares = None
            if config.score == "img_cam" or config.positives == "cam":
                shares = similarity_shares(maps[x], maps[y]).abs()
            gradient = None
            if config.score in ("img_cam", "product") and image_gradients is not None:
                gradient = image_gradients[name][x, y].abs()
            positives = self._positives(maps, geometry, x, y, shares)
            found.append(PixelPairs(name, x, y, positives, shares, gradient))
        return found

    def _positives(self, maps, geometry, x, y, shares) -> Tensor:
        config, grid = self.config, maps.shape[2:]
        if config.positives == "cam":
            flat = shares.flatten(1)
            count = torch.full((len(flat),), config.match_top * shares.shape[1])
            return largest(flat, count.to(flat.device)).view_as(shares)
        if config.positives == "aligned":
            places = ViewGeometry(geometry.matrix[x]).places(
                ViewGeometry(geometry.matrix[y]), grid, grid
            )
            return nearest_cell(places, grid)[..., None]
        if config.match_top == 1:
            return mk.dense_correspondence(maps[x], maps[y], impl=config.impl)[..., None]
        cosine = _unit(maps[x]).transpose(1, 2) @ _unit(maps[y])
        top = min(config.match_top, cosine.shape[2])
        return cosine.topk(top, dim=2).indices.view(len(x), *grid, top)

    def losses(
        self, z: Tensor, pairs: Sequence[PixelPairs], keep: Keep, *, normalize: bool = True
    ) -> list[Tensor]:
        """One 0-d loss per perspective: value of all pairs, gradient through the selected ones.

        Args:
            z: (V, D, h, w) projections; of unit length where normalize is False.
        """
        if not self.fused:
            return [self._explicit(z, one, keep, normalize)[0] for one in pairs]
        options = self.options | {"use": self.config.use, "keep": keep, "normalize": normalize}
        if self.by_class:  # one pass over the pairs for all perspectives
            classes = [one.positives for one in pairs]
            return list(mk.filtered_contrastive(z, labels=classes, **options))
        return [
            mk.filtered_contrastive(z[one.x], z[one.y], positives=one.positives, **options)
            for one in pairs
        ]

    @torch.no_grad()
    def selected(
        self, z: Tensor, pairs: Sequence[PixelPairs], keep: Keep, *, normalize: bool = True
    ) -> list[Selected]:
        """The pairs that `losses` learns from, per perspective."""
        if not self.fused:
            return [self._explicit(z, one, keep, normalize)[1] for one in pairs]
        options = self.options | {"keep": keep, "normalize": normalize}
        return [self._selected(z, one, options) for one in pairs]

    def _selected(self, z: Tensor, one: PixelPairs, options: dict) -> Selected:
        n = z.shape[2] * z.shape[3]
        if self.by_class:
            chosen = mk.select_pairs(z, labels=one.positives, **options)
            pixels = len(z) * n
            both = 1 if self.config.direction == "directed" else 2  # directions in one pair
            return Selected(*chosen[:3], pixels * (pixels - 1) // both)
        chosen = mk.select_pairs(z[one.x], z[one.y], positives=one.positives, **options)
        return Selected(
            one.x[chosen.anchor // n] * n + chosen.anchor % n,
            one.y[chosen.candidate // n] * n + chosen.candidate % n,
            chosen.gradient,
            len(one.x) * n * n,
        )

    def _explicit(
        self, z: Tensor, one: PixelPairs, keep: Keep, normalize: bool
    ) -> tuple[Tensor, Selected]:
        """Loss and selection on matrices (problems, anchors, candidates)."""
        config, rows = self.config, z.flatten(2).transpose(1, 2)  # (V, n, D)
        views, n = rows.shape[:2]
        unit = F.normalize(rows, dim=2, eps=1e-12) if normalize else rows
        whole = config.pixel_scope == "batch"
        if whole:
            query = key = unit.reshape(1, views * n, -1)
            allowed = ~torch.eye(views * n, dtype=torch.bool, device=z.device)[None]
        else:
            query, key = unit[one.x], unit[one.y]
            allowed = torch.ones(len(query), n, n, dtype=torch.bool, device=z.device)
        positive = self._positive_matrix(one, views, n)
        s = query @ key.transpose(1, 2) / config.pixel_temperature
        values, valid, gradient = pair_gradients(s, positive, allowed, config.pixel_form)

        score = gradient.abs()
        if config.score == "pix_rep":
            length = rows.norm(dim=2).reshape(1, -1) if whole else rows.norm(dim=2)[one.x]
            cosine = s.detach() * config.pixel_temperature
            tangent = (1 - cosine.square()).clamp_min(0).sqrt()
            score = score * tangent / length.detach().clamp_min(1e-12)[..., None]
        elif config.score == "img_cam":
            score = one.image_gradient[:, None, None] * one.shares
        elif config.score == "product":
            score = one.image_gradient[:, None, None] * score
        elif config.filter_by == "threshold":
            score = score * valid.sum()  # without the weight 1 / anchors
        candidates = allowed & valid[..., None]
        if config.direction == "undirected":
            chosen, ratio = self._undirected(gradient, candidates, positive, keep, views)
        else:
            weight = self._attracted(gradient, positive)
            chosen = self._choose(score * weight, candidates, positive & candidates, keep, views)
            ratio = ratio_of((gradient * weight)[candidates], gradient[chosen])

        place = chosen.nonzero()
        if whole:
            anchor, candidate = place[:, 1], place[:, 2]
        else:
            anchor = one.x[place[:, 0]] * n + place[:, 1]
            candidate = one.y[place[:, 0]] * n + place[:, 2]
        listed = Selected(
            anchor, candidate, gradient[chosen] / config.pixel_temperature, int(allowed.sum())
        )
        if config.use == "recompute":
            return mean_of(*row_losses(s, positive & chosen, chosen, config.pixel_form)), listed
        if config.use == "pos_full_den":
            kept = positive & chosen
            some = kept.any(-1)
            everything = torch.where(allowed, s, -torch.inf).logsumexp(-1)
            mine = torch.where(kept, s, 0).sum(-1) / kept.sum(-1).clamp_min(1)
            if config.pixel_form == "in":
                mine = torch.where(kept | ~some[..., None], s, -torch.inf).logsumexp(-1)
                mine = mine - kept.sum(-1).clamp_min(1).log()
            return mean_of(torch.where(some, everything - mine, 0), some), listed
        through = (gradient * chosen * s).sum()
        if config.use == "renorm":
            through = through * ratio
        return mean_of(values, valid) + through - through.detach(), listed

    def _attracted(self, gradient: Tensor, positive: Tensor) -> Tensor:
        """0 for pairs that are never selected because of their sign, else 1."""
        if self.config.pos_sign == "any":
            return torch.ones((), dtype=gradient.dtype, device=gradient.device)
        return (~(positive & (gradient > 0))).to(gradient.dtype)

    def _undirected(
        self, gradient: Tensor, candidates: Tensor, positive: Tensor, keep: Keep, views: int
    ) -> tuple[Tensor, Tensor]:
        """Selected pairs in both directions, ranked by |G_ij + G_ji|, and sum |.| over all by that
        over the selected. The second half of a batch of pairs of images is the first one's other
        direction."""
        whole = self.config.pixel_scope == "batch"
        half = len(gradient) if whole else len(gradient) // 2

        def other(matrix: Tensor) -> Tensor:
            return (matrix if whole else matrix[half:]).transpose(1, 2)

        total = gradient[:half] + other(gradient)
        positive = positive[:half] | other(positive)
        candidates = candidates[:half] | other(candidates)
        if whole:
            candidates = candidates.triu(1)
        total = total * self._attracted(total, positive)
        chosen = self._choose(total.abs(), candidates, positive & candidates, keep, views)
        ratio = ratio_of(total[candidates], total[chosen])
        both = (chosen, chosen.transpose(1, 2))
        return (both[0] | both[1]) if whole else torch.cat(both), ratio

    def _positive_matrix(self, one: PixelPairs, views: int, n: int) -> Tensor:
        """Bool (P, n, n), for candidates of the whole batch (1, V n, V n)."""
        if one.positives.dtype == torch.bool:
            return one.positives
        if self.by_class:
            classes = one.positives.flatten()
            return (classes[:, None] == classes)[None]
        index = one.positives.flatten(1, 2)  # (P, n, R)
        named, width = index >= 0, n
        index = index.clamp_min(0)
        if self.config.pixel_scope == "batch":
            index = (index + one.y[:, None, None] * n).reshape(1, views * n, -1)
            named, width = named.reshape(index.shape), views * n
        mask = torch.zeros(*index.shape[:2], width, dtype=torch.int32, device=index.device)
        return mask.scatter_add_(2, index, named.int()) > 0

    def _choose(
        self, score: Tensor, candidates: Tensor, positive: Tensor, keep: Keep, views: int
    ) -> Tensor:
        """Selected pairs, bool like `score`."""
        config = self.config
        score = torch.where(candidates, score, 0)
        if config.filter_by == "threshold":
            return candidates & (score >= config.filter_threshold) & (score > 0)
        units = {"global": 1, "anchor": score.shape[0] * score.shape[1]}.get(config.filter_by)
        if units is None:  # per pair of images, or per image of the anchor
            units = views if config.pixel_scope == "batch" else len(score)
        parts = [(candidates, keep)]
        if isinstance(keep, tuple):
            parts = [(positive, keep[0]), (candidates & ~positive, keep[1])]
        chosen = torch.zeros_like(candidates)
        for members, share in parts:
            ranked = torch.where(members, score, 0).reshape(units, -1)
            total = members.reshape(units, -1).sum(1)
            # ceil of the product as it would be without rounding, as the library does
            count = (total.double() * (share * (1 - 1e-12))).ceil().long().clamp_min(1)
            count = torch.minimum(count, total) if share > 0 else torch.zeros_like(total)
            if config.filter_by == "quantile":
                at = ranked.sort(1, descending=True).values
                limit = at.gather(1, (count - 1).clamp_min(0)[:, None])
                found = (ranked >= limit) & (ranked > 0) & (count > 0)[:, None]
            else:
                found = largest(ranked, count)
            chosen |= found.view_as(chosen)
        return chosen


def ratio_of(everything: Tensor, selected: Tensor) -> Tensor:
    """sum |everything| / sum |selected|; 1 where nothing is selected."""
    size = selected.abs().sum()
    return torch.where(size > 0, everything.abs().sum() / size, 1.0)


def similarity_shares(x: Tensor, y: Tensor) -> Tensor:
    """a_pq of all pairs of pixels, (P, n, n): the cosine of the pooled maps of two images is their
    sum (specs/gcl.md §3.4, img_cam, at the map that is pooled)."""
    x, y = x.flatten(2), y.flatten(2)  # (P, C, n)
    size = x.mean(2).norm(dim=1) * y.mean(2).norm(dim=1)
    n = x.shape[2]
    return (x.transpose(1, 2) @ y) / (n * n * size.clamp_min(1e-12))[:, None, None]


def _unit(maps: Tensor) -> Tensor:
    """(P, C, n) unit columns."""
    return F.normalize(maps.flatten(2), dim=1, eps=1e-12)
