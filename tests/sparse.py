"""Checkpoints of any size that take no room: a true header, and then a hole in the file."""

import gzip
import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

KEYS = Path(__file__).parent / "data" / "keys"


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published file: svd, svd_image_decoder, sv3d_u or sv3d_p."""
    shapes = json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes()))
    return {key: tuple(shape) for key, shape in shapes.items()}


def write_sparse(path: Path, shapes: Mapping[str, Sequence[int]]) -> Path:
    """Write a half-precision safetensors file whose values are all zero; returns its path."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path
