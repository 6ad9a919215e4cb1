"""Checkpoint files to tensors. The tensors are views of the memory-mapped file.

The mapping is private (copy on write): a weight costs memory when it is first read, its pages are
the page cache's and shared between processes, and writing to a tensor never changes the file.
Replace a file in use by renaming another to it; writing into it would change the weights in use.
"""

import zipfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import Tensor

_FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with 'git lfs pull'",
    b"<!doctype html": "a web page; the download did not give the file",
    b"<html": "a web page; the download did not give the file",
}


def read_state_dict(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file or of a .ckpt, .pt, .pth or .bin file of torch.

    Nothing but the header is read now. Of a training checkpoint (Lightning), the tensors under
    ``state_dict`` are given. Only tensors and plain values are unpickled, never code. Copied at
    once are tensors whose offset in the file does not suit their type, and files in torch's format
    from before version 1.6, which cannot be mapped.

    Args:
        path: the file; its suffix decides how it is read.

    Returns:
        The tensors on the CPU, by their names in the file and in the file's types.

    Raises:
        ValueError: there is no such file, its type is unknown, or it is damaged, cut short,
            something else than its name says, or without tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a checkpoint file, but {path} is {_absence(path)}")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"expected a checkpoint ending in {', '.join(_READERS)}, got {path}")
    try:
        tensors = {name: _aligned(tensor) for name, tensor in reader(path).items()}
    except Exception as error:  # damaged bytes make the parsers raise almost anything
        raise ValueError(f"{path} cannot be loaded: it is {_diagnosis(path, error)}") from error
    if not tensors:
        raise ValueError(f"{path} cannot be loaded: it holds no tensors")
    return tensors


def _absence(path: Path) -> str:
    return "a folder" if path.is_dir() else "not there"


def _read_torch(path: Path) -> dict[str, Tensor]:
    mappable = zipfile.is_zipfile(path)
    content = torch.load(path, map_location="cpu", mmap=mappable, weights_only=True)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    return {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _diagnosis(path: Path, error: Exception) -> str:
    """Say in words what the file is, given that reading it failed with ``error``."""
    if isinstance(error, PermissionError):
        return "not readable for this user"
    with path.open("rb") as file:
        start = file.read(64).lower()
    for magic, kind in _FOREIGN.items():
        if start.startswith(magic):
            return kind
    if isinstance(error, UnpicklingError):
        return (
            "damaged, or holds Python objects besides tensors; save its state dict again, best as "
            ".safetensors"
        )
    detail = f"{error}".partition("\n")[0] or type(error).__name__
    return f"damaged, cut short or not a {path.suffix} file; fetch it again ({detail})"


_READERS: dict[str, Callable[[Path], Mapping[str, Tensor]]] = {
    ".safetensors": load_file,
    ".ckpt": _read_torch,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_torch,
}
