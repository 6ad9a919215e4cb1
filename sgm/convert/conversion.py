"""Conversions: what becomes of every tensor of a checkpoint, from names and shapes alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Entry:
    """One tensor of the target layout.

    Attributes:
        key: its name in the target layout.
        shape: its shape.
        sources: names of the source tensors that it is made from.
        make: gives it, from the source tensors in that order and in their type. What is only
            renamed is given as it is, so that views stay views; parts of a tensor are views of it.
    """

    key: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    make: Callable[..., Tensor]


@dataclass(frozen=True)
class Conversion:
    """The way from one layout to another for one checkpoint.

    Every tensor of the source is a source of an entry or stands in ``dropped``.

    Attributes:
        entries: tensors of the target layout.
        dropped: source tensors that the target layout has no place for.
        absent: what a file in the target layout also has but the source cannot give, as prefixes of
            keys of the target layout: ``conditioner.embedders.3.encoder.decoder.``
    """

    entries: tuple[Entry, ...]
    dropped: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the result by key."""
        return {entry.key: entry.shape for entry in self.entries}

    def then(self, following: "Conversion") -> "Conversion":
        """Do ``following``, whose source is this conversion's target, afterwards."""
        made = {entry.key: entry for entry in self.entries}
        entries = tuple(_chained(entry, made) for entry in following.entries)
        used = {key for entry in entries for key in entry.sources}
        lost = (key for entry in self.entries for key in entry.sources if key not in used)
        return Conversion(entries, (*self.dropped, *dict.fromkeys(lost)), following.absent)

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make all tensors of the target layout at once."""
        return {e.key: e.make(*(tensors[key] for key in e.sources)) for e in self.entries}


def _chained(entry: Entry, made: Mapping[str, Entry]) -> Entry:
    steps = [made[key] for key in entry.sources]
    sources = tuple(key for step in steps for key in step.sources)

    def make(*tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        return entry.make(*(step.make(*(next(rest) for _ in step.sources)) for step in steps))

    return Entry(entry.key, entry.shape, sources, make)
