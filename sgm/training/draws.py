"""What is random in training, as functions of (seed, position of a clip).

So nothing random has to be saved to continue a run. A clip's position is its number among all that
a run takes, on all processes: a run continues alike on another number of processes.
"""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from sgm.modules.draws import ClipGenerators


def clip_generators(seed: int, first: int, count: int) -> ClipGenerators:
    """Return the generators of a batch; equal seeds and positions give equal draws.

    Args:
        seed: the run's seed.
        first: position of the batch's first clip, from 0.
        count: clips of the batch.
    """
    return ClipGenerators([_mixed(seed, first + i) for i in range(count)])


def _mixed(seed: int, position: int) -> int:
    words = np.random.SeedSequence((seed, position)).generate_state(2, np.uint32)
    # 63 bits: manual_seed takes a signed number.
    return (int(words[0]) << 31) ^ int(words[1])


class StepBatches(Sampler[list[int]]):
    """Endless batches of item numbers, each a function of its step; each epoch a new order.

    All items of a step, on all processes, are of one group. In every ``length`` steps each group
    has as many as it has items, in an order drawn anew, so that no item comes more often than
    another.

    Args:
        length: items in the dataset.
        batch_size: items of one batch.
        seed: the run's seed.
        step: the first step to give.
        rank: number of this process among ``world``.
        world: number of processes; together they take each item of a group once an epoch.
        groups: item numbers that can make a batch together, each in one group; None: all items.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        step: int = 0,
        rank: int = 0,
        world: int = 1,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if length < 1 or batch_size < 1:
            raise ValueError(
                "data: expected 1 item or more in the dataset and a batch_size of 1 or more, "
                f"got {length} and {batch_size}"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.step, self.rank, self.world = step, rank, world
        self.groups = [np.arange(length)] if groups is None else [np.array(g) for g in groups]
        if sorted(np.concatenate(self.groups).tolist()) != list(range(length)):
            raise ValueError(f"groups: expected each of {length} items in one of them")

    def __iter__(self) -> Iterator[list[int]]:
        turns = _Turns([len(group) for group in self.groups], self.seed)
        streams = [_Stream(group, self.seed, i) for i, group in enumerate(self.groups)]
        for step in count(self.step):
            group, turn = turns[step]
            first = (turn * self.world + self.rank) * self.batch_size
            yield [streams[group][first + i] for i in range(self.batch_size)]


class _Turns:
    """Which group has a step, and how many it had before."""

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        self.sizes, self.seed, self.round = sizes, seed, -1
        self.order = np.empty(0, np.int64)

    def __getitem__(self, step: int) -> tuple[int, int]:
        if len(self.sizes) == 1:
            return 0, step
        number, place = divmod(step, sum(self.sizes))
        if number != self.round:
            self.round = number
            generator = np.random.default_rng((self.seed, number, len(self.sizes)))
            self.order = generator.permutation(np.repeat(np.arange(len(self.sizes)), self.sizes))
        group = int(self.order[place])
        earlier = np.count_nonzero(self.order[:place] == group)
        return group, number * self.sizes[group] + int(earlier)


class _Stream:
    """The items of a group without end: all of them in one order, then in another."""

    def __init__(self, items: npt.NDArray[np.int64], seed: int, number: int) -> None:
        self.items, self.seed, self.number, self.epoch = items, seed, number, -1
        self.order = items

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, len(self.items))
        if epoch != self.epoch:
            self.epoch = epoch
            generator = np.random.default_rng((self.seed, epoch, self.number))
            self.order = self.items[generator.permutation(len(self.items))]
        return int(self.order[place])
