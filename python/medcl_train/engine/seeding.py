"""Random numbers as a function of (seed, stream, iteration), and the state of every generator for
checkpoints.

Each consumer of randomness has a named stream. Nothing drawn for one stream shifts another, so a
supervised run and an IDEAL run of one seed see the same labelled batches with the same
augmentation, and a resumed run sees what the uninterrupted one would have seen.
"""

import hashlib
import random

import numpy as np
import torch


def derive(seed: int, stream: str, iteration: int = 0) -> int:
    """A 63-bit seed for one stream at one iteration."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{iteration}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, stream: str, iteration: int = 0) -> torch.Generator:
    """A fresh CPU torch.Generator for the stream at this iteration."""
    return torch.Generator().manual_seed(derive(seed, stream, iteration))


def seed_everything(seed: int, stream: str = "start", iteration: int = 0) -> None:
    """Seed python's, numpy's and torch's global generators (dropout reads torch's)."""
    value = derive(seed, stream, iteration)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def rng_state() -> dict:
    """State of every global generator, as tensors and plain numbers only (loads with
    weights_only=True)."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    """Restore what `rng_state` returned. CUDA states are restored for as many devices as are
    present."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, device)


class IndexStream:
    """Endless batches of indices 0..size-1 in shuffled epochs; batch i depends on (seed, name, i)
    only.

    Every index appears once per epoch; a batch may cross the border between two epochs. Holding no
    state, the stream needs nothing but the iteration number to resume.
    """

    def __init__(self, size: int, batch_size: int, seed: int, name: str = "batches"):
        if size < 1 or batch_size < 1:
            raise ValueError(
                f"stream {name!r}: needs at least one item and one per batch, got {size} and "
                f"{batch_size}"
            )
        self.size, self.batch_size, self.seed, self.name = size, batch_size, seed, name
        self._epochs: dict[int, np.ndarray] = {}

    def at(self, iteration: int) -> np.ndarray:
        """Indices (batch_size,) int64 of batch `iteration`."""
        positions = np.arange(iteration * self.batch_size, (iteration + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, self.size)
        needed = {int(e): self._permutation(int(e)) for e in np.unique(epochs)}
        self._epochs = needed  # only the epochs of the current batch stay cached
        return np.array([needed[int(e)][o] for e, o in zip(epochs, offsets, strict=True)])

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch in self._epochs:
            return self._epochs[epoch]
        return np.random.default_rng(derive(self.seed, self.name, epoch)).permutation(self.size)
