"""Plain torch, as one writes it first: similarities as a matrix, losses by masks and reductions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Labels = Tensor | Sequence[Tensor]


def unit_rows(features: Tensor, pairs: str) -> Tensor:
    """Unit rows of each set of pairs: `(N, D)` for one set, `(B, L, D)` for one per image.

    Args:
        features: `(N, C)` or `(B, C, *spatial)`; bfloat16 and float16 are widened, as the package
            accumulates in float32.
        pairs: "image" or "batch".
    """
    if features.dtype in (torch.bfloat16, torch.float16):
        features = features.float()
    if features.dim() == 2:
        return F.normalize(features, dim=1)
    rows = F.normalize(features, dim=1).flatten(2).transpose(1, 2)  # (B, L, C)
    return rows if pairs == "image" and rows.shape[0] > 1 else rows.reshape(-1, rows.shape[2])


def one_set(
    peer: str, pairs: str, *features: Tensor, form: str = "out", normalize: bool = True
) -> tuple[Tensor, ...]:
    """`unit_rows` for a peer that has form "out" of one set of pairs only.

    Raises:
        ValueError: the call asks for something else.
    """
    rows = tuple(unit_rows(one, pairs) for one in features)
    if rows[0].dim() != 2 or form != "out" or not normalize:
        raise ValueError(
            f'{peer} has form "out" of one set of unit rows; got {form}, {rows[0].dim()}-d, '
            f"normalize={normalize}"
        )
    return rows


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.mT`, in the dtype of autocast where that is on, answered in the dtype of `a`."""
    return (a @ b.mT).to(a.dtype)


def narrow(x: Tensor) -> Tensor:
    """`x` in the dtype of autocast where that is on, for products that autocast does not see."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def textbook(
    features: Tensor,
    labels: Labels,
    *,
    temperature: float,
    pairs: str = "batch",
    form: str = "out",
    normalize: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    """Supervised contrast from the matrix of similarities and a mask of positives."""
    _only_normalised(normalize)
    z = unit_rows(features, pairs)
    s = product(z, z) / temperature
    itself = torch.eye(s.shape[-1], dtype=torch.bool, device=s.device)
    if not isinstance(labels, Tensor):
        maps = [one.reshape(z.shape[:-1]) for one in labels]
        return torch.stack([by_matrix(s, itself, y, form) for y in maps])
    return by_matrix(s, itself, labels.reshape(z.shape[:-1]), form)


def by_matrix(s: Tensor, itself: Tensor, y: Tensor, form: str) -> Tensor:
    """Mean over anchors of one label map; `s` `(..., N, N)`, `y` `(..., N)`."""
    same = (y.unsqueeze(-1) == y.unsqueeze(-2)) & ~itself
    count = same.sum(-1)
    shifted = s - s.amax(-1, keepdim=True).detach()
    exps = shifted.exp() * ~itself
    if form == "out":
        log_prob = shifted - exps.sum(-1, keepdim=True).log()
        value = -(log_prob * same).sum(-1) / count.clamp_min(1)
    elif form == "in":
        value = exps.sum(-1).log() - (exps * same).sum(-1).log() + count.to(s.dtype).log()
    else:
        negatives = (exps * ~same).sum(-1, keepdim=True)
        log_prob = shifted - (shifted.exp() + negatives).log()
        value = -(log_prob * same).sum(-1) / count.clamp_min(1)
    return value[count > 0].mean()


def class_sums(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    pairs: str = "batch",
    form: str = "out",
    normalize: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    """Supervised contrast "out", the positives through sums over classes; one set of pairs."""
    _only_normalised(normalize)
    z = unit_rows(features, pairs)
    if z.dim() != 2 or form != "out":
        raise ValueError(f'class_sums has form "out" of one set of pairs; got {form}, {z.dim()}-d')
    y = labels.reshape(-1)
    s = product(z, z) / temperature
    lse = s.fill_diagonal_(float("-inf")).logsumexp(1)
    mean, count = positive_mean(z, y, temperature)
    return (lse - mean)[count > 0].mean()


def positive_mean(z: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean similarity to the other rows of the same label, and their number; both `(N,)`."""
    classes, member = y.unique(return_inverse=True)
    sums = z.new_zeros(len(classes), z.shape[1]).index_add(0, member, z)
    count = member.bincount(minlength=len(classes))[member] - 1
    others = sums[member] - z
    # not count * temperature: an integer times a Python number is float32, also in a float64 run
    return (z * others).sum(1) / temperature / count.clamp_min(1), count


def info_nce(
    query: Tensor,
    key: Tensor,
    positives: Tensor | None,
    *,
    temperature: float,
    pairs: str = "image",
    symmetric: bool = False,
    intra_view: bool = False,
    normalize: bool = True,
) -> Tensor:
    """Cross entropy over the matrix of similarities."""
    _only_normalised(normalize)
    q, k = unit_rows(query, pairs), unit_rows(key, pairs)
    logits = product(q, k) / temperature
    target = target_rows(positives, query, pairs)
    if symmetric or intra_view:
        return _two_views(q, k, logits, temperature)
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def _two_views(q: Tensor, k: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Both directions with intra-view negatives, positives at the same position."""
    itself = torch.eye(q.shape[0], dtype=torch.bool, device=q.device)
    target = torch.arange(q.shape[0], device=q.device)
    total = q.new_zeros(())
    for rows, across in ((q, logits), (k, logits.T)):
        within = (product(rows, rows) / temperature).masked_fill(itself, float("-inf"))
        total = total + F.cross_entropy(torch.cat((across, within), 1), target)
    return total / 2


def target_rows(positives: Tensor | None, query: Tensor, pairs: str) -> Tensor:
    """Index of the positive within its candidates: `(B, L)` for one set per image, else `(N,)`."""
    batch, length = (1, query.shape[0]) if query.dim() == 2 else (query.shape[0], -1)
    if positives is None:
        per_image = query.shape[0] if query.dim() == 2 else query[0, 0].numel()
        index = torch.arange(per_image, device=query.device).expand(batch, -1)
    else:
        index = positives.reshape(batch, length)
    if batch == 1:
        return index[0]
    if pairs == "image":
        return index
    first = index.shape[1] * torch.arange(batch, device=index.device)
    return (index + first.unsqueeze(1)).flatten()


def dense_correspondence(
    query: Tensor, key: Tensor, *, normalize: bool = True, mutual: bool = False
) -> Tensor:
    """Argmax over the matrix of similarities; `(N,)` or `(B, *spatial)`."""
    q, k = unit_rows(query, "image"), unit_rows(key, "image")
    s = product(q, k)
    index = s.argmax(-1)
    if mutual:
        itself = torch.arange(s.shape[-2], device=s.device)
        index = index.where(s.argmax(-2).gather(-1, index) == itself, -1)
    return index.reshape(query.shape[:1] + query.shape[2:])


def _only_normalised(normalize: bool) -> None:
    if not normalize:
        raise ValueError("the peers are compared on normalised rows")
