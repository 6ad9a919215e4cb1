"""What is random in training, as functions of (seed, step, rank).

So nothing random has to be saved to continue a run.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """Return the CPU generator of one training step; equal arguments give equal draws.

    Args:
        seed: the run's seed.
        step: number of the step, from 0.
        rank: number of the process, from 0.
    """
    words = np.random.SeedSequence((seed, step, rank)).generate_state(2, np.uint32)
    # 63 bits: manual_seed takes a signed number.
    return torch.Generator().manual_seed((int(words[0]) << 31) ^ int(words[1]))


class StepBatches(Sampler[list[int]]):
    """Endless batches of item numbers, each a function of its step; each epoch a new order.

    Args:
        length: items in the dataset.
        batch_size: items of one batch.
        seed: the run's seed.
        step: the first step to give.
        rank: number of this process among ``world``.
        world: number of processes; together they take each item once an epoch.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, step: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        if length < 1 or batch_size < 1:
            raise ValueError(f"expected items and a batch size >= 1, got {length} and {batch_size}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.step, self.rank, self.world = step, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        step, epoch, order = self.step, -1, np.empty(0, np.int64)
        while True:
            batch = []
            first = (step * self.world + self.rank) * self.batch_size
            for position in range(first, first + self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
                batch.append(int(order[position % self.length]))
            yield batch
            step += 1
