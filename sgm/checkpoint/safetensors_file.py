"""The safetensors format: a JSON header with the place of each tensor, then the values.

https://github.com/huggingface/safetensors#format
"""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sgm.checkpoint.source import Source, Stored, StoredTensors

_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8  # bytes, of the first tensor


class Sink(Protocol):
    """What bytes are written to, from its beginning."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Write all of ``data``."""


def is_safetensors(start: bytes) -> bool:
    """Whether a file begins as this format does, given its first 64 bytes."""
    return start[8:9] == b"{"


def open_safetensors(path: Path) -> Source:
    """Open a file.

    Raises:
        ValueError: no such header, or a type that torch lacks. Damage gives other errors too.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        start = _LENGTH.size + length
        if start > size:
            raise ValueError("the header ends beyond the file")
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        stored = {name: _stored(name, entry, start) for name, entry in header.items()}
        return StoredTensors(path, file, stored, metadata)


def _stored(name: str, entry: Mapping[str, object], start: int) -> Stored:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            if dtype not in _TYPES:
                raise ValueError(f"{name} has the type {dtype}, which cannot be read")
            return Stored(tuple(shape), _TYPES[dtype], ((start + begin, end - begin),))
    raise ValueError(f"{name} has no type, shape or place in the header")


def write_safetensors(
    sink: Sink,
    blanks: Mapping[str, Tensor],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors one after the other.

    Args:
        sink: where to.
        blanks: by name, tensors on the meta device that have the shapes and types.
        tensors: the values on the CPU, in the order of ``blanks``; each is used up before the next.
        metadata: goes into the header.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, blank in blanks.items():
        start, end = end, end + blank.nbytes
        header[name] = {
            "dtype": _NAMES[blank.dtype],
            "shape": list(blank.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    sink.write(_LENGTH.pack(len(text)) + text)
    for tensor in tensors:
        sink.write(contents(tensor))


def contents(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in row-major order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
