"""The state of a run in one file that a kill at any moment, or a full disk, leaves whole."""

import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, cast

import torch

from sgm.checkpoint.placing import write_errors_in_one_line


def save_atomically(state: Mapping[str, Any], path: Path) -> None:
    """Write ``state`` under a temporary name, flush it to the disk, and rename it to ``path``.

    Raises:
        ValueError: the disk is full or refuses; what stood at ``path`` still does.
    """
    temporary = path.with_name(path.name + ".part")
    with write_errors_in_one_line(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                _write(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # gives the room back
            raise


def load(path: Path, mapped: bool = False) -> dict[str, Any]:
    """Read what `save_atomically` wrote, on the CPU; tensors and plain values alone are accepted.

    Args:
        path: the file.
        mapped: leave the tensors in the file, to be read where they are used.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise ValueError(f"expected the state of a training run at {path}: run that stage first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (RuntimeError, UnpicklingError, EOFError, KeyError, ValueError) as exc:
        raise ValueError(
            f"{path} is damaged or not the state of a run: remove it to start anew, or put a copy "
            "in its place"
        ) from exc
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not the state of a run: it holds a {type(state).__name__}")
    return state


def _write(state: dict[str, Any], file: BinaryIO) -> None:
    """Serialise to a file; what the disk says is raised, not what torch makes of it."""
    noting = _Noting(file)
    try:
        torch.save(state, cast(BinaryIO, noting))
    except RuntimeError as exc:
        raise noting.refusal or exc from exc


class _Noting:
    """A file that keeps the error of a write."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.refusal: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as exc:
            self.refusal = exc
            raise

    def flush(self) -> None:
        self._file.flush()
