"""Which key pixel is the positive of which query pixel (specs/ideal.md §1.3).

Positives are flat row-major indices into the key grid of the same image; -1 = this query pixel is
not an anchor.
"""

import math

import torch
from torch import Tensor

import medcl_kernels as mk

from ..data.augment import ViewGeometry
from .config import IdealConfig

IGNORE = -1


def match_views(
    config: IdealConfig,
    query: tuple[Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    geometry_q: ViewGeometry,
    geometry_k: ViewGeometry,
    generator: torch.Generator,
) -> Tensor | tuple[Tensor, Tensor]:
    """Positives for `info_nce` by the settings match, mutual, n_query, symmetric.

    Args:
        query, key: (encoder map, projection) of each view, (B, C, h, w) and (B, D, h, w).
        geometry_q, geometry_k: where the views were cut.
        generator: chooses the subset of query pixels.

    Returns: positives query to key, and also key to query when symmetric.
    """

    def one_way(a, b, geometry_a, geometry_b):
        places = None
        if config.match in ("geom", "radius"):
            places = geometry_a.places(geometry_b, a[0].shape[2:], b[0].shape[2:])
        return find_positives(config.match, a, b, places, radius=config.radius, impl=config.impl)

    forth = one_way(query, key, geometry_q, geometry_k)
    back = (
        one_way(key, query, geometry_k, geometry_q) if config.mutual or config.symmetric else None
    )
    if config.mutual:
        forth, back = mutual_only(forth, back), mutual_only(back, forth)
    if config.n_query:
        forth = subset_queries(forth, config.n_query, generator)
        back = None if back is None else subset_queries(back, config.n_query, generator)
    return (forth, back) if config.symmetric else forth


def find_positives(
    match: str,
    query: tuple[Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    places: Tensor | None = None,
    *,
    radius: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Positives (B, h, w) int64, or (B, h, w, R) padded with -1 for match="radius".

    Args:
        match: "backbone" | "proj" argmax of the cosine on encoder maps | projections, ties to the
            smallest index; "identity" same position; "geom" nearest key pixel to the warped query
            pixel; "radius" all within `radius`.
        query, key: (encoder map (B, C, h, w), dense projection (B, D, h, w)) of the two views; no
            gradient flows here.
        places: (B, h, w, 2) where each query pixel's centre lies in the key grid, in cells (row,
            column), NaN outside; `ViewGeometry.places` makes them. Needed for "geom" and "radius".
    """
    if match in ("backbone", "proj"):
        which = 0 if match == "backbone" else 1
        return mk.dense_correspondence(query[which].detach(), key[which].detach(), impl=impl)
    b, _, height, width = query[0].shape
    if match == "identity":
        same = torch.arange(height * width, device=query[0].device)
        return same.view(1, height, width).expand(b, -1, -1)
    if match not in ("geom", "radius"):
        raise ValueError(
            f"unknown match {match!r}; choose from backbone, proj, identity, geom, radius"
        )
    if places is None:
        raise ValueError(f"match={match!r} needs the geometry of the views (places)")
    key_shape = tuple(key[0].shape[2:])
    return (
        nearest_cell(places, key_shape)
        if match == "geom"
        else cells_within(places, key_shape, radius)
    )


def nearest_cell(places: Tensor, key_shape: tuple[int, int]) -> Tensor:
    """Flat index of the key cell that contains each place (B, h, w, 2); -1 where it lies outside
    the key view."""
    height, width = key_shape
    # Cell r spans [r - 0.5, r + 0.5); NaN fails every comparison and becomes -1.
    cell = torch.floor(places + 0.5)
    inside = (cell >= 0).all(-1) & (cell[..., 0] < height) & (cell[..., 1] < width)
    cell = torch.where(inside[..., None], cell, 0).long()
    return torch.where(inside, cell[..., 0] * width + cell[..., 1], IGNORE)


def cells_within(places: Tensor, key_shape: tuple[int, int], radius: float) -> Tensor:
    """All key cells whose centre lies within `radius` cells of each place; (B, h, w, R), padded
    with -1 at the end."""
    height, width = key_shape
    reach = math.ceil(radius)
    steps = torch.arange(-reach, reach + 1, device=places.device)
    window = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).view(-1, 2)  # (R, 2)
    known = ~places.isnan().any(-1, keepdim=True)
    places = torch.where(known, places, 0.0)
    cells = torch.floor(places + 0.5).long()[..., None, :] + window  # (B, h, w, R, 2)
    near = (cells - places[..., None, :]).square().sum(-1) <= radius**2 + 1e-9
    row, column = cells.unbind(-1)
    valid = near & known & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    positives = torch.where(valid, row * width + column, IGNORE)
    order = (~valid).to(torch.uint8).sort(dim=-1, stable=True).indices  # valid ones first
    return positives.gather(-1, order)


def mutual_only(forward: Tensor, backward: Tensor) -> Tensor:
    """`forward` (B, h, w) with -1 wherever backward(forward(i)) != i: both views must choose each
    other."""
    flat, back = forward.flatten(1), backward.flatten(1)
    returned = back.gather(1, flat.clamp(min=0))
    own = torch.arange(flat.shape[1], device=flat.device)
    kept = (flat >= 0) & (returned == own)
    return torch.where(kept, flat, IGNORE).view_as(forward)


def subset_queries(positives: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Keep `count` random anchors per image, fewer if fewer are valid; the others become -1.

    positives (B, h, w) or (B, h, w, R). The choice is uniform over valid anchors and changes no
    candidate of those kept, so the mean over anchors stays unbiased.
    """
    several = positives.dim() == 4
    valid = ((positives >= 0).any(-1) if several else positives >= 0).flatten(1)
    chance = torch.rand(valid.shape, generator=generator).to(valid.device)
    chance = torch.where(valid, chance, -1.0)
    rank = chance.argsort(dim=1, descending=True).argsort(dim=1)
    kept = ((rank < count) & valid).view(positives.shape[:3])
    return torch.where(kept[..., None] if several else kept, positives, IGNORE)
