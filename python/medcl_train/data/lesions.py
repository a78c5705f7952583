"""Photographs of skin with one spot each, drawn, in the layout of the ISIC challenges: for
demonstrations and tests. The files depend on the arguments only.

    images/lesion_000.jpg   masks/lesion_000_segmentation.png
"""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from .atomic import write_atomic
from .errors import require_manifest

MANIFEST = "lesions.json"


def ensure(root: Path | str, images: int = 40, seed: int = 0, size: int = 96) -> bool:
    """Write the set unless exactly this one is there; returns True when it was written. An
    interrupted writing is done again by the next call.

    Raises DataError when the folder holds another set.
    """
    root = Path(root)
    wanted = {"generator": __name__, "images": images, "seed": seed, "size": size}
    path = root / MANIFEST
    if path.is_file():
        require_manifest(path, wanted)
        return False
    for number in range(images):
        image, mask = draw(np.random.default_rng([seed, number]), size)
        name = f"lesion_{number:03d}"
        _save(image, root / "images" / f"{name}.jpg", quality=90)
        _save(mask * np.uint8(255), root / "masks" / f"{name}_segmentation.png")
    text = json.dumps(wanted).encode()
    write_atomic(path, lambda file: file.write(text))
    return True


def draw(random: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(image (H, W, 3) uint8, mask (H, W) uint8 of 0 and 1): an uneven brown spot with a soft edge
    on skin with a shading, a few hairs and noise."""
    rows, columns = np.mgrid[:size, :size] / size - 0.5
    center = random.uniform(-0.12, 0.12, 2)
    y, x = rows - center[0], columns - center[1]
    angle = np.arctan2(y, x)
    lobes = sum(
        random.uniform(0, 0.12) * np.cos(k * angle + random.uniform(0, 2 * np.pi))
        for k in range(2, 6)
    )
    radius = random.uniform(0.12, 0.3) * (1 + lobes)
    depth = radius - np.hypot(y, x * random.uniform(0.7, 1.3))
    mask = (depth > 0).astype(np.uint8)
    spot = 1 / (1 + np.exp(-depth * random.uniform(30, 90)))
    skin = np.array([224.0, 180, 158]) + random.normal(0, 12, 3)
    brown = np.array([116.0, 74, 56]) + random.normal(0, 18, 3)
    image = skin + spot[..., None] * (brown - skin) * random.uniform(0.5, 1)
    image *= 1 + (rows * random.normal(0, 0.3) + columns * random.normal(0, 0.3))[..., None]
    for _ in range(random.integers(0, 4)):
        across = rows * np.cos(t := random.uniform(0, np.pi)) + columns * np.sin(t)
        image[abs(across - random.uniform(-0.4, 0.4)) < 0.006] *= 0.45
    image += random.normal(0, 6, image.shape)
    return image.clip(0, 255).astype(np.uint8), mask


def _save(array: np.ndarray, path: Path, **options) -> None:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG" if path.suffix == ".jpg" else "PNG", **options)
    write_atomic(path, lambda file: file.write(buffer.getbuffer()), "image")
