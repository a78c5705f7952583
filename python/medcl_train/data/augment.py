"""Augmentation of batches on the device: one affine resampling per batch, then intensity changes.

Everything is drawn from the given generator on the CPU, so a batch depends on (seed, stream,
iteration) only, whatever the device. Geometry is kept as matrices in the normalised coordinates of
`torch.nn.functional.affine_grid` (align_corners=False): x, y in [-1, 1] between the outer edges of
the image, and a matrix maps places of the *result* to places of the *source*. Two views of one
slice can therefore be related exactly, cell by cell.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augmentation:
    """Ranges of a random augmentation; 0 switches a part off. Strengths of intensity are in units
    of the slice's sd.

    flip_x, flip_y: probability of mirroring left-right, up-down. rotate: degrees. scale: relative.
    shift: fraction of half the width. gamma, brightness, contrast: half-widths. blur: largest sigma
        in pixels (applied to half of the slices).
    noise: largest sd. crop: area range of a random crop that is resized to the full slice, None =
        no crop.
    shear: degrees. hue: degrees of rotation of the colours. saturation: half-width. stretch: scale
        height and width by factors of their own.
    """

    flip_x: float = 0.5
    flip_y: float = 0.0
    rotate: float = 15.0
    scale: float = 0.15
    shift: float = 0.12
    gamma: float = 0.3
    brightness: float = 0.2
    contrast: float = 0.2
    blur: float = 0.8
    noise: float = 0.1
    crop: tuple[float, float] | None = None
    shear: float = 0.0
    stretch: bool = False
    hue: float = 0.0
    saturation: float = 0.0


NONE = Augmentation(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
LIGHT = Augmentation(
    rotate=15.0, scale=0.05, shift=0.0, gamma=0.0, brightness=0.1, contrast=0.2, blur=0.0, noise=0.0
)
STRONG = Augmentation()
# of the 2-D code of PDCR: its +-50 of 255 in hue are 71 degrees
PHOTO = Augmentation(
    flip_x=0.5, flip_y=0.5, rotate=90.0, scale=0.2, stretch=True, shift=0.2, shear=20.0, gamma=0.0,
    brightness=0.0, contrast=0.0, blur=0.0, noise=0.0, hue=71.0, saturation=0.2,
)  # fmt: skip
STRENGTHS = {"none": NONE, "light": LIGHT, "strong": STRONG, "photo": PHOTO}


@dataclass(frozen=True)
class ViewGeometry:
    """Where a batch of augmented slices came from: result -> source matrices (B, 2, 3) float64."""

    matrix: Tensor

    def places(
        self, key: "ViewGeometry", query_shape: tuple[int, int], key_shape: tuple[int, int]
    ) -> Tensor:
        """Centre of every cell of this view's grid, in cells (row, column) of the key view's grid.

        Args:
            key: geometry of the other view of the same slices.
            query_shape, key_shape: (h, w) of the two feature grids; each grid covers its whole
                view.

        Returns: (B, h, w, 2) float64; NaN where the place shows no source image or lies outside the
            key view.
        """
        source = apply_affine(
            self.matrix, cell_centers(*query_shape, device=self.matrix.device)
        )  # (B, h*w, 2) x, y
        in_key = apply_affine(invert_affine(key.matrix), source)
        inside = (source.abs() <= 1).all(-1) & (in_key.abs() <= 1).all(-1)
        extent = torch.tensor(key_shape[::-1], dtype=torch.float64, device=in_key.device)
        cells = ((in_key + 1) / 2 * extent - 0.5).flip(-1)  # x, y -> row, column
        cells = torch.where(inside[..., None], cells, torch.nan)
        return cells.view(-1, *query_shape, 2)


def augment(
    images: Tensor, labels: Tensor | None, settings: Augmentation, generator: Generator
) -> tuple[Tensor, Tensor | None]:
    """Randomly augmented copies of images (B, C, H, W) and their labels (B, H, W) int64 (None stays
    None)."""
    geometry = random_geometry(
        images.shape[0], images.shape[2:], settings, generator, device=images.device
    )
    images, labels = warp(images, labels, geometry)
    return jitter_intensity(images, settings, generator), labels


def view(
    images: Tensor, settings: Augmentation, generator: Generator
) -> tuple[Tensor, ViewGeometry]:
    """One random view of images (B, 1, H, W) for contrastive pre-training, with its geometry."""
    geometry = random_geometry(
        images.shape[0], images.shape[2:], settings, generator, device=images.device
    )
    return jitter_intensity(warp(images, None, geometry)[0], settings, generator), geometry


def random_geometry(
    batch: int, size: tuple[int, int], settings: Augmentation, generator: Generator, device=None
) -> ViewGeometry:
    """Random crop, flip, rotation, scale and shift, composed to one matrix per slice."""
    height, width = size

    def uniform(low, high):
        return low + (high - low) * torch.rand(batch, generator=generator, dtype=torch.float64)

    angle = uniform(-1, 1) * math.radians(settings.rotate)
    zoom = scale = 1 + uniform(-1, 1) * settings.scale
    center = torch.stack([uniform(-1, 1), uniform(-1, 1)], dim=1) * settings.shift
    flip_x = torch.where(uniform(0, 1) < settings.flip_x, -1.0, 1.0)
    flip_y = torch.where(uniform(0, 1) < settings.flip_y, -1.0, 1.0)
    if settings.crop is not None:
        side = uniform(*settings.crop).sqrt()  # same for height and width
        zoom = zoom * side
        center = center + torch.stack([uniform(-1, 1), uniform(-1, 1)], dim=1) * (1 - side)[:, None]
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    # Rotation acts on pixels; in normalised coordinates an oblong image needs the aspect ratio.
    rows = [cos * flip_x, -sin * flip_y * (height / width), center[:, 0]]
    columns = [sin * flip_x * (width / height), cos * flip_y, center[:, 1]]
    matrix = torch.stack([torch.stack(rows, dim=1), torch.stack(columns, dim=1)], dim=1)
    if settings.stretch:  # along the height of the result a factor of its own
        own = (1 + uniform(-1, 1) * settings.scale) / scale
        matrix[:, :, 1] *= own[:, None]
    if settings.shear:
        slope = (uniform(-1, 1) * math.radians(settings.shear)).tan() * (height / width)
        matrix[:, :, 1] += matrix[:, :, 0] * slope[:, None]
    return ViewGeometry(matrix.to(device))


def warp(
    images: Tensor, labels: Tensor | None, geometry: ViewGeometry
) -> tuple[Tensor, Tensor | None]:
    """Resample images (B, C, H, W) linearly and labels (B, H, W) or (B, C, H, W) by nearest
    neighbour on the same grid; zero (background) outside."""
    grid = F.affine_grid(geometry.matrix.to(images.dtype), list(images.shape), align_corners=False)
    warped = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if labels is None:
        return warped, None
    channels = labels if labels.dim() == 4 else labels[:, None]
    nearest = F.grid_sample(channels.to(images.dtype), grid, mode="nearest", align_corners=False)
    return warped, nearest.view(labels.shape).to(labels.dtype)


def jitter_intensity(images: Tensor, settings: Augmentation, generator: Generator) -> Tensor:
    """Random gamma, contrast, brightness, blur and noise per image (B, 1, *spatial). Works for any
    intensity range."""
    batch, device = images.shape[0], images.device
    whole = tuple(range(1, images.dim()))
    per_image = (-1, *(1 for _ in whole))

    def draw(half_width):
        value = (2 * torch.rand(batch, generator=generator) - 1) * half_width
        return value.view(per_image).to(device)

    mean = images.mean(dim=whole, keepdim=True)
    sd = images.std(dim=whole, keepdim=True).clamp(min=1e-6)
    gamma, contrast, brightness = (
        draw(settings.gamma),
        draw(settings.contrast),
        draw(settings.brightness),
    )
    if settings.gamma:
        low, high = images.amin(whole, keepdim=True), images.amax(whole, keepdim=True)
        span = (high - low).clamp(min=1e-6)
        images = low + span * ((images - low) / span).clamp(0, 1) ** (1 + gamma)
    images = mean + (images - mean) * (1 + contrast) + brightness * sd
    if settings.hue or settings.saturation:
        images = _jitter_colour(images, settings, draw)
    if settings.blur:
        sigma = (2 * torch.rand(batch, generator=generator) - 1).clamp(min=0) * settings.blur
        images = blur(images, sigma.to(device))
    if settings.noise:
        strength = torch.rand(batch, generator=generator).view(per_image) * settings.noise
        noise = torch.randn(images.shape, generator=generator) * strength
        images = images + noise.to(device) * sd
    return images


def _jitter_colour(images: Tensor, settings: Augmentation, draw) -> Tensor:
    """Random turn of the colours (B, 3, H, W) about the grey axis, and stretch away from it."""
    if images.shape[1] != 3:
        raise ValueError(f"hue and saturation are for RGB images, got {images.shape[1]} channels")
    angle = draw(math.radians(settings.hue)).view(-1, 1, 1)
    factor = 1 + draw(settings.saturation).view(-1, 1, 1)
    grey = torch.full((3, 3), 1 / 3, dtype=images.dtype, device=images.device)
    turn = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=images.dtype) / math.sqrt(3)
    away = torch.eye(3, dtype=images.dtype, device=images.device) - grey
    matrix = grey + factor * (angle.cos() * away + angle.sin() * turn.to(images.device))
    return torch.einsum("bij,bjhw->bihw", matrix, images)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with its own sigma (B,) in pixels per image; sigma 0 leaves an image as it is.
    images (B, 1, *spatial)."""
    reach = max(1, math.ceil(3 * float(sigma.max())))
    offset = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(images.dtype)  # (B, 2*reach + 1)
    # Images become channels of one, so that one grouped convolution applies B different kernels.
    stack = images.transpose(0, 1)
    dims = images.dim() - 2
    convolve = F.conv2d if dims == 2 else F.conv3d
    for axis in reversed(range(dims)):
        shape = [1] * dims
        shape[axis] = 2 * reach + 1
        # F.pad counts axes from the last
        padding = [reach if axis == dims - 1 - i // 2 else 0 for i in range(2 * dims)]
        stack = convolve(
            F.pad(stack, padding, mode="replicate"),
            kernel.view(-1, 1, *shape),
            groups=images.shape[0],
        )
    return stack.transpose(0, 1)


def apply_affine(matrix: Tensor, points: Tensor) -> Tensor:
    """matrix (B, 2, 3) applied to points (N, 2) or (B, N, 2), in x, y."""
    return points @ matrix[:, :, :2].transpose(1, 2) + matrix[:, None, :, 2]


def invert_affine(matrix: Tensor) -> Tensor:
    """Inverse of affine maps (B, 2, 3)."""
    linear = torch.linalg.inv(matrix[:, :, :2])
    return torch.cat([linear, -linear @ matrix[:, :, 2:]], dim=2)


def cell_centers(height: int, width: int, device=None) -> Tensor:
    """Centres of an h x w grid over [-1, 1]^2, row-major, (h*w, 2) as x, y, float64."""
    y = (torch.arange(height, device=device, dtype=torch.float64) + 0.5) / height * 2 - 1
    x = (torch.arange(width, device=device, dtype=torch.float64) + 0.5) / width * 2 - 1
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flip(-1).view(-1, 2)
