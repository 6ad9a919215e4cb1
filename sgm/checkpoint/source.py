"""The tensors of a checkpoint: known from its headers alone, read when they are asked for."""

import mmap
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import torch
from torch import Tensor

_THREADS = 4  # at most: more do not copy faster


def each(make: Callable[[str], Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """``make`` of every name, in several threads: those that copy leave Python to the others.

    Args:
        make: such as a source's ``view``.
        names: what to call it with, in the order that the result is to have.
    """
    rest = iter(names)  # of all threads: each takes the next name when it is done with one

    def work(_: int) -> dict[str, Tensor]:
        return {name: make(name) for name in rest}

    count = min(_THREADS, torch.get_num_threads())
    made: dict[str, Tensor] = {}
    with ThreadPoolExecutor(count) as pool:
        for part in pool.map(work, range(count)):
            made |= part
    return {name: made[name] for name in names}


class Source(ABC):
    """A checkpoint that is open. Several threads may view and read tensors.

    Args:
        path: the file or folder.
        tensors: by name, tensors on the meta device that have the shapes and types.
        metadata: what else the headers say.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self.tensors = tensors
        self.metadata = dict(metadata or {})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return (self.path,)

    @abstractmethod
    def view(self, name: str) -> Tensor:
        """A tensor of the mapped file, whose values are read when they are first used.

        Copied at once is a tensor whose place in the file does not suit its type, and one that lies
        in pieces. The mapping is private: writing to the tensor does not change the file.
        """

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A tensor for one use, after which nothing of it is kept in memory.

        Raises:
            ValueError: the file has become shorter since it was opened.
        """

    @abstractmethod
    def require_unchanged(self) -> None:
        """Make sure that what was read belongs together.

        Raises:
            ValueError: a file has been written to since it was opened.
        """


class Selection(Source):
    """Tensors of other sources, under names of its own.

    Args:
        path: the file or folder that the user named.
        chosen: source, and name in it, by new name.
        metadata: what else the headers say.
    """

    def __init__(
        self,
        path: Path,
        chosen: Mapping[str, tuple[Source, str]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        tensors = {new: source.tensors[old] for new, (source, old) in chosen.items()}
        super().__init__(path, tensors, metadata)
        self._chosen = chosen
        self._sources = tuple({id(source): source for source, _ in chosen.values()}.values())

    @property
    def files(self) -> tuple[Path, ...]:  # noqa: D102 - as in the base class
        return tuple(file for source in self._sources for file in source.files)

    def view(self, name: str) -> Tensor:  # noqa: D102
        source, old = self._chosen[name]
        return source.view(old)

    def read(self, name: str) -> Tensor:  # noqa: D102
        source, old = self._chosen[name]
        return source.read(old)

    def require_unchanged(self) -> None:  # noqa: D102
        for source in self._sources:
            source.require_unchanged()


class InMemory(Source):
    """Tensors that are there already.

    Args:
        path: the file that they are meant for, for errors.
        values: by name.
        metadata: what a header is to say.
    """

    def __init__(
        self, path: Path, values: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        self._values = {name: value.detach() for name, value in values.items()}
        super().__init__(path, {n: v.to("meta") for n, v in self._values.items()}, metadata)

    @property
    def files(self) -> tuple[Path, ...]:  # noqa: D102 - as in the base class
        return ()

    def view(self, name: str) -> Tensor:  # noqa: D102
        return self._values[name]

    def read(self, name: str) -> Tensor:  # noqa: D102
        return self._values[name].cpu()

    def require_unchanged(self) -> None:
        """Nobody else writes to them."""


def _within(piece: tuple[int, int], size: int) -> bool:
    start, length = piece
    return 0 <= start <= start + length <= size


@dataclass(frozen=True)
class Stored:
    """Where the values of a tensor lie in a file, little-endian and in row-major order.

    Attributes:
        shape: its shape.
        dtype: its type.
        pieces: (offset, size) in bytes of its parts, one after the other.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[int, int], ...]


class StoredTensors(Source):
    """A file in which the place of each tensor is known.

    Replacing the file by renaming another to it does no harm: the old one stays open.

    Args:
        path: the file.
        file: the same, open for reading; it may be closed afterwards.
        stored: places by name.
        metadata: what else its header says.

    Raises:
        ValueError: a place that is not in the file, or not as large as its tensor.
    """

    def __init__(
        self,
        path: Path,
        file: BinaryIO,
        stored: Mapping[str, Stored],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        tensors = {
            name: torch.empty(place.shape, dtype=place.dtype, device="meta")
            for name, place in stored.items()
        }
        super().__init__(path, tensors, metadata)
        self._stored = stored
        descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, descriptor)
        self._file = open(descriptor, "rb", buffering=0, closefd=False)  # noqa: SIM115
        self._seeking = Lock()
        self._opened = os.fstat(descriptor)
        for name, place in stored.items():
            if any(not _within(piece, self._opened.st_size) for piece in place.pieces):
                raise ValueError(f"{name} lies beyond its end")
            if sum(size for _, size in place.pieces) != tensors[name].nbytes:
                raise ValueError(f"{name} is not as large as its shape and type say")

    def view(self, name: str) -> Tensor:  # noqa: D102
        stored = self._stored[name]
        (start, size), *others = stored.pieces
        if others or not size or start % stored.dtype.itemsize:
            return self.read(name)
        values = torch.frombuffer(self._mapping, dtype=torch.uint8, count=size, offset=start)
        return values.view(stored.dtype).view(stored.shape)

    def read(self, name: str) -> Tensor:  # noqa: D102
        stored = self._stored[name]
        values = torch.empty(self.tensors[name].nbytes, dtype=torch.uint8)
        rest = values.numpy().data
        for start, size in stored.pieces:
            self._fill(rest[:size], start)
            rest = rest[size:]
        return values.view(stored.dtype).view(stored.shape)

    def _fill(self, buffer: memoryview, start: int) -> None:
        while buffer:
            count = self._read_at(start, buffer)
            if not count:
                raise ValueError(f"{self.path} became shorter while it was being read")
            buffer, start = buffer[count:], start + count

    def _read_at(self, start: int, buffer: memoryview) -> int | None:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], start)
        with self._seeking:  # Windows: a file has one position for all threads
            self._file.seek(start)
            return self._file.readinto(buffer)

    def require_unchanged(self) -> None:  # noqa: D102
        now = os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            raise ValueError(f"{self.path} was written to while it was being read; try again")

    @cached_property
    def _mapping(self) -> mmap.mmap:
        return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
