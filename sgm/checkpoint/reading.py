"""Files and folders to open checkpoints, whatever their format.

The mapping of a file is private (copy on write): a weight costs memory when it is first read, its
pages are the page cache's and shared between processes, and writing to a tensor never changes the
file. Replace a file in use by renaming another to it; writing into it would change the weights in
use, and cutting it short would end the process (SIGBUS).
"""

import re
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError

from torch import Tensor

from sgm.checkpoint.mindspore_file import is_mindspore, open_mindspore
from sgm.checkpoint.safetensors_file import is_safetensors, open_safetensors
from sgm.checkpoint.source import Source
from sgm.checkpoint.torch_file import TorchFile, is_torch

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

_START = 64  # bytes that tell the format
_FORMATS: tuple[tuple[Callable[[bytes], bool], Callable[[Path], Source]], ...] = (
    (is_safetensors, open_safetensors),
    (is_torch, TorchFile),
    (is_mindspore, open_mindspore),
)
_FOREIGN = {
    rb"version https://git-lfs": "a Git LFS pointer; fetch the file itself with 'git lfs pull'",
    rb"\s*(<!doctype html|<html|<\?xml)": "a web page; the download did not give the file",
}


def read_state_dict(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of one file, as views of the mapped file where they can be.

    Args:
        path: a file for `open_file`.

    Returns:
        The tensors on the CPU, by their names in the file and in the file's types.

    Raises:
        ValueError: as in `open_file`.
    """
    source = open_file(path)
    return {name: source.view(name) for name in source.tensors}


def open_file(path: str | PathLike[str]) -> Source:
    """Open a file of safetensors, torch (.ckpt, .pt, .pth, .bin) or MindSpore (.ckpt).

    Nothing but the header is read now, and its content tells the format. Of a training checkpoint
    (Lightning), the tensors under ``state_dict`` are given. Only tensors and plain values are
    unpickled, never code. Read as a whole are files in torch's format from before version 1.6.

    Args:
        path: the file.

    Returns:
        The tensors by their names in the file.

    Raises:
        ValueError: there is no such file, its type is unknown, or it is damaged, cut short,
            something else than its name says, or without tensors.
    """
    path = Path(path)
    if not is_file(path):
        raise ValueError(f"expected a checkpoint file, but {path} is {_absence(path)}")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"expected a checkpoint ending in {', '.join(SUFFIXES)}, got {path}")
    try:
        source = _opener(path)(path)
    except Exception as error:  # damaged bytes make the parsers raise almost anything
        raise ValueError(f"{path} cannot be loaded: it is {_diagnosis(path, error)}") from error
    if not source.tensors:
        raise ValueError(f"{path} cannot be loaded: it holds no tensors")
    return source


def is_file(path: Path) -> bool:
    """Whether there is such a file.

    Raises:
        ValueError: it is in a folder that this user may not enter, or its name is too long.
    """
    try:
        return path.is_file()
    except PermissionError:
        raise ValueError(f"{path} is in a folder that this user may not enter") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def _opener(path: Path) -> Callable[[Path], Source]:
    with path.open("rb") as file:
        start = file.read(_START)
    for matches, opener in _FORMATS:
        if matches(start):
            return opener
    raise ValueError("its beginning is of no known format")


def _absence(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    return "no regular file" if path.exists() else "not there"


def _diagnosis(path: Path, error: Exception) -> str:
    """Say in words what the file is, given that reading it failed with ``error``."""
    if isinstance(error, PermissionError):
        return "not readable for this user"
    if isinstance(error, FileNotFoundError):
        return "no longer there"
    with path.open("rb") as file:
        start = file.read(_START).lower()
    for pattern, kind in _FOREIGN.items():
        if re.match(pattern, start):
            return kind
    if isinstance(error, UnpicklingError):
        return (
            "damaged, or holds Python objects besides tensors; save its state dict again, best as "
            ".safetensors"
        )
    detail = f"{error}".partition("\n")[0] or type(error).__name__
    return f"damaged, cut short or not a {path.suffix} file; fetch it again ({detail})"
