"""MindSpore's .ckpt format: a protobuf message, read and written without that library.

    message Checkpoint { repeated Value value = 1; }
    message Value { string tag = 1; TensorProto tensor = 2; }
    message TensorProto {
        repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3;
    }

Of a tensor that is too large for one value, the parts follow each other under the same tag. A
scalar has no dimension or, in older files, the dimension 0. https://protobuf.dev/programming-guides/encoding/
"""

import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sgm.checkpoint.safetensors_file import Sink, contents
from sgm.checkpoint.source import Source, Stored, StoredTensors

_TYPES = {
    "Bool": torch.bool,
    "UInt8": torch.uint8,
    "Int8": torch.int8,
    "Int16": torch.int16,
    "Int32": torch.int32,
    "Int64": torch.int64,
    "Float16": torch.float16,
    "BFloat16": torch.bfloat16,
    "Float32": torch.float32,
    "Float64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_TEXT = "str"  # a type of MindSpore's own: a text in UTF-32
_LARGEST = 512 << 20  # bytes of one value, as MindSpore writes them
_CHECKSUM = b"crc_num"  # may stand at the end, with ten digits of a CRC-32
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types

Span = tuple[int, int]  # begin and end in bytes


class _Value(NamedTuple):
    tag: str
    dims: tuple[int, ...]
    type: str
    content: Span


def is_mindspore(start: bytes) -> bool:
    """Whether a file begins as this format does: with the first field, whose bytes follow."""
    return start[:1] == _key(1, _BYTES)


def open_mindspore(path: Path) -> Source:
    """Open a file.

    Raises:
        ValueError: it is no such message, is encrypted, or holds a type that torch lacks.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = len(data)
        if data[-len(_CHECKSUM) - 10 : -10] == _CHECKSUM:
            end -= len(_CHECKSUM) + 10
        stored, metadata = {}, {}
        for tag, group in groupby(_values(data, end), key=lambda value: value.tag):
            values = list(group)
            if values[0].type == _TEXT:
                text = b"".join(data[slice(*value.content)] for value in values)
                metadata[tag] = text.decode("utf-32-le")
            else:
                stored[tag] = _stored(values)
        return StoredTensors(path, file, stored, metadata)


def _values(data: mmap.mmap, end: int) -> Iterator[_Value]:
    for number, span in _fields(data, (0, end)):
        if number != 1:
            raise ValueError(f"expected values alone, got field {number}")
        value = dict(_fields(data, span))
        dims: list[int] = []
        of_tensor: dict[int, Span] = {}
        for field, inner in _fields(data, value[2]):
            if field == 1:
                dims += _integers(data, inner)
            else:
                of_tensor[field] = inner
        tag, kind = (data[slice(*span)].decode() for span in (value[1], of_tensor[2]))
        yield _Value(tag, tuple(dims), kind, of_tensor[3])


def _stored(values: Sequence[_Value]) -> Stored:
    tag, dims, kind, _ = values[0]
    if kind not in _TYPES:
        raise ValueError(f"{tag} has the type {kind}, which cannot be read")
    pieces = tuple((begin, end - begin) for *_, (begin, end) in values)
    shape = () if dims == (0,) and any(size for _, size in pieces) else dims
    return Stored(shape, _TYPES[kind], pieces)


def _fields(data: mmap.mmap, span: Span) -> Iterator[tuple[int, Span]]:
    """Number and place of each field of a message."""
    position, end = span
    while position < end:
        key, position = _varint(data, position)
        match key & 7:
            case wire if wire == _VARINT:
                begin, position = position, _varint(data, position)[1]
            case wire if wire == _BYTES:
                length, begin = _varint(data, position)
                position = begin + length
            case wire if wire in (_FIXED64, _FIXED32):
                begin, position = position, position + (8 if wire == _FIXED64 else 4)
            case wire:
                raise ValueError(f"no protobuf message: wire type {wire}")
        if position > end:
            raise ValueError("a field ends beyond its message")
        yield key >> 3, (begin, position)


def _integers(data: mmap.mmap, span: Span) -> Iterator[int]:
    """Integers in a field, which holds one or, packed, several."""
    position, end = span
    while position < end:
        value, position = _varint(data, position)
        yield value


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """An integer, and where it ends."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
        if shift > 63:
            raise ValueError("no protobuf message: an integer of more than 64 bits")


def write_mindspore(sink: Sink, blanks: Mapping[str, Tensor], tensors: Iterable[Tensor]) -> None:
    """Write tensors one after the other, as MindSpore's ``save_checkpoint`` does.

    Args:
        sink: where to.
        blanks: by name, tensors on the meta device that have the shapes and types.
        tensors: the values on the CPU, in the order of ``blanks``; each is used up before the next.
    """
    for (name, blank), tensor in zip(blanks.items(), tensors, strict=True):
        about = b"".join(_number(1, size) for size in blank.shape)
        about += _length(2, len(_NAMES[blank.dtype])) + _NAMES[blank.dtype].encode()
        values = contents(tensor)
        for begin in range(0, max(len(values), 1), _LARGEST):
            part = values[begin : begin + _LARGEST]
            sink.write(_heading(name.encode(), about + _length(3, len(part)), len(part)))
            sink.write(part)


def _heading(tag: bytes, about: bytes, size: int) -> bytes:
    """A value up to the contents of its tensor, which are ``size`` bytes."""
    value = _length(1, len(tag)) + tag + _length(2, len(about) + size) + about
    return _length(1, len(value) + size) + value


def _key(field: int, wire: int) -> bytes:
    return bytes([field << 3 | wire])


def _number(field: int, value: int) -> bytes:
    return _key(field, _VARINT) + _encoded(value)


def _length(field: int, size: int) -> bytes:
    return _key(field, _BYTES) + _encoded(size)


def _encoded(value: int) -> bytes:
    rest, low = divmod(value, 128)
    return bytes([low | 128]) + _encoded(rest) if rest else bytes([low])
