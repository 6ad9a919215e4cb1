"""Checkpoints written tensor by tensor, verified, and only then given their names.

One tensor is in memory at a time. A file is hashed while it is written; then its header is opened
again, the file is read and hashed again, and if all agrees it is renamed from a temporary name.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from sgm.checkpoint.digest import hash_file, remember_sha256
from sgm.checkpoint.mindspore_file import write_mindspore
from sgm.checkpoint.placing import require_free, temporary, write_errors_in_one_line
from sgm.checkpoint.reading import open_file
from sgm.checkpoint.room import require_room
from sgm.checkpoint.safetensors_file import write_safetensors
from sgm.checkpoint.source import Selection, Source

# What is told after each tensor: the stage, and the bytes that are done of how many.
Progress = Callable[[str, int, int], object]

SAFETENSORS, MINDSPORE = ".safetensors", ".ckpt"
FOLDER_FILES = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "image_encoder/model.safetensors",
)

_WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_SLACK = 64 << 20  # bytes of disk space to leave


@dataclass(frozen=True)
class Written:
    """A file of a finished checkpoint.

    Attributes:
        path: where it is.
        size: its bytes.
        sha256: its digest.
    """

    path: Path
    size: int
    sha256: str


def write_file(
    source: Source,
    path: str | PathLike[str],
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Written, ...]:
    """Write tensors into one file, with the source's metadata.

    Args:
        source: the tensors, under the names they are to have.
        path: ends in ``.safetensors``, or in ``.ckpt`` for MindSpore's format, which has no place
            for metadata.
        dtype: the type of floating-point tensors; None keeps each tensor's.
        force: replace a file that is there.
        progress: called after each tensor.

    Raises:
        ValueError: the file is there; a tensor has a type that is not converted, a value that is
            not finite or is too large for ``dtype``; the source changes meanwhile; the disk is
            full; the folder is not writable.
    """
    path = Path(path)
    if path.suffix not in (SAFETENSORS, MINDSPORE):
        raise ValueError(f"expected a name that ends in {SAFETENSORS} or {MINDSPORE}, got {path}")
    with write_errors_in_one_line(path):
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give the name of a file")
        with temporary(source, path, force) as part:
            written = _write({part: source}, dtype, progress)
            require_free(source, path, force)  # the above takes minutes
            part.replace(path)
    return _named(written, part, path)


def write_folder(
    source: Source,
    path: str | PathLike[str],
    texts: Mapping[str, str],
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Written, ...]:
    """Write the folder of a diffusers pipeline.

    Args:
        source: the tensors; their names begin with the part, as in ``unet/conv_in.weight``.
        path: the folder to make.
        texts: contents by name of the other files, such as ``unet/config.json``.
        dtype: as in `write_file`.
        force: replace a folder that is there, if it is a pipeline's.
        progress: as in `write_file`.

    Raises:
        ValueError: as in `write_file`.
    """
    path = Path(path)
    with write_errors_in_one_line(path):
        if force and path.exists() and not (path / "model_index.json").is_file():
            raise ValueError(f"{path} is not the folder of a diffusers pipeline: it is kept")
        with temporary(source, path, force) as part:
            for name, text in texts.items():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (part / name).write_text(text, encoding="utf-8")
            files = {part / name: _part(source, name) for name in FOLDER_FILES}
            written = _write(files, dtype, progress)
            require_free(source, path, force)
            replaced = part.with_name(f"{part.name}.old")
            if path.exists():
                path.rename(replaced)
            part.rename(path)
            shutil.rmtree(replaced, ignore_errors=True)
    return _named(written, part, path)


def _part(source: Source, name: str) -> Source:
    """The tensors of that part of a folder whose file is ``name``."""
    prefix = name.partition("/")[0] + "/"
    keys = [key for key in source.tensors if key.startswith(prefix)]
    chosen = {key.removeprefix(prefix): (source, key) for key in keys}
    return Selection(source.path, chosen, source.metadata)


def _write(
    files: Mapping[Path, Source], dtype: torch.dtype | None, progress: Progress | None
) -> list[Written]:
    """Write files and verify them."""
    blanks = {path: _blanks(source, dtype) for path, source in files.items()}
    total = sum(blank.nbytes for each in blanks.values() for blank in each.values())
    require_room(next(iter(files)).parent, total + _SLACK)
    count = _Counter("writing", total, progress)
    digests = {
        path: _write_one(path, blanks[path], _values(source, dtype, count), source.metadata)
        for path, source in files.items()
    }
    for source in files.values():
        source.require_unchanged()
    count = _Counter("verifying", total, progress)
    return [_verified(path, blanks[path], digest, count) for path, digest in digests.items()]


def _write_one(
    path: Path, blanks: Mapping[str, Tensor], values: Iterator[Tensor], metadata: Mapping[str, str]
) -> str:
    """Write a file and return its digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        hashed = _Hashed(file)
        if path.suffix == MINDSPORE:
            write_mindspore(hashed, blanks, values)
        else:  # transformers wants to be told the format
            write_safetensors(hashed, blanks, values, {**metadata, "format": "pt"})
        file.flush()
        os.fsync(file.fileno())
    return hashed.digest


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._state = file, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._state.update(data)
        self._file.write(data)

    @property
    def digest(self) -> str:
        return self._state.hexdigest()


class _Counter:
    """Counts the bytes of a stage."""

    def __init__(self, stage: str, total: int, progress: Progress | None) -> None:
        self._stage, self._total, self._progress = stage, total, progress
        self._done = 0

    def add(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            self._progress(self._stage, self._done, self._total)


def _blanks(source: Source, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors on the meta device with the shapes and types that will be written."""
    for name, tensor in source.tensors.items():
        _require_convertible(source, name, tensor.dtype, dtype)
    return {name: _cast(tensor, dtype) for name, tensor in source.tensors.items()}


def _require_convertible(
    source: Source, name: str, stored: torch.dtype, dtype: torch.dtype | None
) -> None:
    if stored in _WEIGHT_TYPES or stored in (torch.int32, torch.int64, torch.bool):
        return
    if stored != torch.float64:
        raise ValueError(
            f"{source.path}: {name} has the type {stored}; quantised weights cannot be converted: "
            "fetch the file in half or single precision"
        )
    if dtype is None:
        raise ValueError(f"{source.path}: {name} has the type {stored}; say --dtype fp32 or fp16")


def _values(source: Source, dtype: torch.dtype | None, count: _Counter) -> Iterator[Tensor]:
    """The tensors as they are to be written."""
    for name in source.tensors:
        tensor = source.read(name)
        result = _cast(tensor, dtype)
        if tensor.is_floating_point() and not torch.isfinite(result).all():
            raise ValueError(f"{source.path}: {name} {_fault(tensor, result.dtype)}")
        yield result
        count.add(result.nbytes)
        del tensor, result  # before the next is read


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _fault(tensor: Tensor, dtype: torch.dtype) -> str:
    if torch.isfinite(tensor).all():
        return f"reaches {tensor.abs().max():.3g}, too large for {dtype}: take --dtype bf16 or fp32"
    return "has values that are not finite (NaN or infinity): no video can be made with it"


def _verified(path: Path, blanks: Mapping[str, Tensor], digest: str, count: _Counter) -> Written:
    """Read a file again, header and contents."""
    found = open_file(path).tensors
    same = {name: (blank.shape, blank.dtype) for name, blank in blanks.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in found.items()
    }
    if not same or hash_file(path) != digest:
        raise ValueError(f"{path} does not hold what was written to it: is the disk damaged?")
    count.add(sum(blank.nbytes for blank in blanks.values()))
    return Written(path, path.stat().st_size, digest)


def _named(written: list[Written], part: Path, path: Path) -> tuple[Written, ...]:
    """The files under their names, with their digests remembered."""
    final = [
        Written(path / each.path.relative_to(part), each.size, each.sha256) for each in written
    ]
    for each in final:
        remember_sha256(each.path, each.sha256)
    return tuple(final)
