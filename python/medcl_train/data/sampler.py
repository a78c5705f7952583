"""Two-stream batches: labelled indices shuffled once per epoch, unlabelled ones without end."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

_LABELED, _UNLABELED = 0, 1


class TwoStreamBatchSampler(Sampler[list[int]]):
    """Batches of `labeled_batch_size` labelled indices followed by unlabelled ones.

    An epoch is one pass over the labelled indices (a remainder smaller than the labelled part of
    a batch is dropped, as in SSL4MIS; fewer labelled indices than that part are repeated, each
    repetition shuffled anew). The unlabelled stream runs on across epochs.

    Batch k is a pure function of (seed, k): the state is one number, so a run resumed at iteration
    k sees the batches of an uninterrupted one. Worker processes of a DataLoader draw batches ahead;
    then save `state_dict(iteration)` with the number of batches really used.

    Args:
        labeled, unlabeled: indices of the two streams; `unlabeled` may be empty if
            labeled_batch_size == batch_size.
        batch_size: labelled + unlabelled indices per batch.
        labeled_batch_size: of which labelled.
        seed: of both shuffles.
    """

    def __init__(
        self,
        labeled: Sequence[int],
        unlabeled: Sequence[int],
        batch_size: int,
        labeled_batch_size: int,
        seed: int = 0,
    ):
        self.labeled = np.asarray(labeled, dtype=np.int64)
        self.unlabeled = np.asarray(unlabeled, dtype=np.int64)
        self.labeled_batch_size = int(labeled_batch_size)
        self.unlabeled_batch_size = int(batch_size) - self.labeled_batch_size
        self.seed = int(seed)
        self.iteration = 0
        self._orders = {}
        if self.labeled_batch_size < 1 or self.unlabeled_batch_size < 0:
            raise ValueError(
                f"expected 1 <= labeled_batch_size <= batch_size, got {labeled_batch_size} "
                f"and {batch_size}"
            )
        if not len(self.labeled):
            raise ValueError("the labelled stream is empty")
        if self.unlabeled_batch_size and not len(self.unlabeled):
            raise ValueError(
                "the unlabelled stream is empty; use labeled_batch_size == batch_size without it"
            )

    def __len__(self) -> int:
        """Batches per epoch."""
        return max(1, len(self.labeled) // self.labeled_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """The rest of the current epoch."""
        for _ in range(len(self) - self.iteration % len(self)):
            batch = self.batch(self.iteration)
            self.iteration += 1
            yield batch

    def batch(self, iteration: int) -> list[int]:
        """Batch number `iteration` of the run."""
        epoch, position = divmod(iteration, len(self))
        size = self.labeled_batch_size
        repeats = -(-size // len(self.labeled))
        order = [self._order(_LABELED, len(self.labeled), epoch, r) for r in range(repeats)]
        labeled = self.labeled[np.concatenate(order)[position * size : (position + 1) * size]]
        unlabeled = []
        for place in range(
            iteration * self.unlabeled_batch_size, (iteration + 1) * self.unlabeled_batch_size
        ):
            lap, offset = divmod(place, len(self.unlabeled))
            unlabeled.append(
                self.unlabeled[self._order(_UNLABELED, len(self.unlabeled), lap)[offset]]
            )
        return [int(i) for i in (*labeled, *unlabeled)]

    def _order(self, stream: int, size: int, lap: int, repeat: int = 0) -> np.ndarray:
        if self._orders.get((stream, repeat), (None,))[0] != lap:  # the last lap's order is kept
            random = np.random.RandomState([self.seed % 2**32, stream, lap, repeat])
            self._orders[stream, repeat] = lap, random.permutation(size)
        return self._orders[stream, repeat][1]

    def state_dict(self, iteration: int | None = None) -> dict:
        """State after `iteration` used batches (default: all batches handed out so far)."""
        return {
            "iteration": self.iteration if iteration is None else int(iteration),
            **self._identity(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a saved state; refuses one of other streams, sizes or seed."""
        ours = self._identity()
        theirs = {key: state.get(key) for key in ours}
        if ours != theirs:
            raise ValueError(f"sampler state of another run: expected {ours}, got {theirs}")
        self.iteration = int(state["iteration"])

    def _identity(self) -> dict:
        return {
            "seed": self.seed,
            "labeled": len(self.labeled),
            "unlabeled": len(self.unlabeled),
            "labeled_batch_size": self.labeled_batch_size,
            "unlabeled_batch_size": self.unlabeled_batch_size,
        }
