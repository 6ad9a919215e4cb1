"""Files that torch.save wrote, read by torch's own reader, which unpickles no code."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgm.checkpoint.source import Source

_KEPT = 256 << 20  # bytes that one mapping may have read before a new one takes its place


def is_torch(start: bytes) -> bool:
    """Whether a file begins as a zip archive or, before version 1.6 of torch, as a pickle does."""
    return start.startswith((b"PK", b"\x80"))


class TorchFile(Source):
    """A file in torch's format; of a training checkpoint, the tensors under ``state_dict``.

    A file from before version 1.6, which cannot be mapped, is read into memory as a whole.

    Args:
        path: the file.

    Raises:
        pickle.UnpicklingError: it holds Python objects besides tensors. Damage gives other errors.
    """

    def __init__(self, path: Path) -> None:
        self._opened = _state(path)
        self._mappable = zipfile.is_zipfile(path)
        content = self._load(path)
        self._views = _tensors(content)
        self._read_since = 0
        blanks = {name: value.to("meta") for name, value in self._views.items()}
        super().__init__(path, blanks, _metadata(content))

    def view(self, name: str) -> Tensor:  # noqa: D102 - as in the base class
        tensor = self._views[name]
        return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor

    def read(self, name: str) -> Tensor:  # noqa: D102
        self._read_since += self._views[name].nbytes
        if self._mappable and self._read_since > _KEPT:
            # The pages of a mapping count as memory until it is gone: map the file anew.
            self.require_unchanged()
            self._views = _tensors(self._load(self.path))
            self._read_since = 0
        return self.view(name)

    def require_unchanged(self) -> None:  # noqa: D102
        if not self.path.exists() or _state(self.path) != self._opened:
            raise ValueError(f"{self.path} was replaced while it was being read; try again")

    def _load(self, path: Path) -> Any:
        return torch.load(path, map_location="cpu", mmap=self._mappable, weights_only=True)


def _state(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _tensors(content: Any) -> dict[str, Tensor]:
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if value.layout is not torch.strided or value.is_quantized:
            raise ValueError(f"{name} is sparse or quantised, which cannot be read")
    return {name: value.detach() for name, value in tensors.items()}


def _metadata(content: Any) -> dict[str, str]:
    """The plain values beside the tensors, such as a training checkpoint's step."""
    entries = content.items() if isinstance(content, Mapping) else ()
    return {str(key): str(value) for key, value in entries if isinstance(value, str | int | float)}
