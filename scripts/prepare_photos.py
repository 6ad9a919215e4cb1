"""Pack the photographs of a list into one small tensor file per split.

The list (``configs/data/photos.json``) names each picture, the public package that ships it, its
author, its licence and its split. Unpack each package to ``SOURCE/<package name>/`` first, e.g.
``apt-get download mate-backgrounds && dpkg-deb -x mate-backgrounds_*.deb SOURCE/mate-backgrounds``
(a Python wheel: ``unzip``), then::

    python scripts/prepare_photos.py SOURCE OUTPUT

A path like ``file.rcc!/member`` names a member of a Qt resource file.
"""

import argparse
import io
import json
import struct
import sys
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

PHOTO_LIST = Path(__file__).parents[1] / "configs" / "data" / "photos.json"
SPLITS = ("train", "heldout", "test")
DIRECTORY, DEFLATED = 2, 1


@cache
def read_resources(path: Path) -> dict[str, bytes]:
    """Return the uncompressed or deflated members of a Qt binary resource (``.rcc``) file.

    The file has three regions: a tree of fixed-size nodes, length-prefixed data, UTF-16 names.
    """
    blob = path.read_bytes()
    if blob[:4] != b"qres":
        raise ValueError(f"{path} is not a Qt resource file")
    version, tree, data, names = struct.unpack_from(">4I", blob, 4)
    node_size = 14 if version < 2 else 22
    members: dict[str, bytes] = {}

    def visit(index: int, folder: str) -> None:
        at = tree + index * node_size
        name_at, flags = struct.unpack_from(">IH", blob, at)
        path_here = folder
        if index > 0:
            (length,) = struct.unpack_from(">H", blob, names + name_at)
            start = names + name_at + 6
            path_here = f"{folder}/{blob[start : start + 2 * length].decode('utf-16-be')}"
        if flags & DIRECTORY:
            count, first = struct.unpack_from(">2I", blob, at + 6)
            for child in range(first, first + count):
                visit(child, path_here)
            return
        start = data + struct.unpack_from(">I", blob, at + 10)[0]
        (length,) = struct.unpack_from(">I", blob, start)
        content = blob[start + 4 : start + 4 + length]
        members[path_here] = zlib.decompress(content[4:]) if flags & DEFLATED else content

    visit(0, "")
    return members


def read_photo(package: Path, path: str, short_side: int) -> torch.Tensor:
    """Return the picture as uint8 (3, h, w), area-averaged to ``min(h, w) == short_side``."""
    name, _, member = path.partition("!")
    file = package / name
    with Image.open(io.BytesIO(read_resources(file)[member]) if member else file) as picture:
        picture.draft("RGB", (4 * short_side, 4 * short_side))
        rgb = picture.convert("RGB")
    scale = short_side / min(rgb.size)
    size = (round(rgb.width * scale), round(rgb.height * scale))
    pixels = np.array(rgb.resize(size, Image.Resampling.BOX))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def main() -> int:
    """Write one ``<split>.safetensors`` for each of ``SPLITS``; 1 if a photograph is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of unpacked packages")
    parser.add_argument("output", type=Path, help="folder for the tensor files")
    parser.add_argument("--list", type=Path, default=PHOTO_LIST, help="default: %(default)s")
    parser.add_argument("--short-side", type=int, default=160, help="pixels, default: %(default)s")
    args = parser.parse_args()
    if args.short_side < 1:
        parser.error(f"--short-side: expected a positive number of pixels, got {args.short_side}")
    if not args.source.is_dir():
        parser.error(f"no folder of unpacked packages at {args.source}")

    splits: dict[str, dict[str, torch.Tensor]] = {split: {} for split in SPLITS}
    missing = 0
    for entry in json.loads(args.list.read_text()):
        try:
            photo = read_photo(args.source / entry["package"], entry["path"], args.short_side)
        except (OSError, KeyError, ValueError) as error:
            print(f"missing: {entry['name']} ({entry['package']}): {error}")
            missing += 1
        else:
            splits[entry["split"]][entry["name"]] = photo
    args.output.mkdir(parents=True, exist_ok=True)
    for split, photos in splits.items():
        file = args.output / f"{split}.safetensors"
        save_file(photos, file)
        print(f"{file}: {len(photos)} photographs, {file.stat().st_size / 2**20:.1f} MiB")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
