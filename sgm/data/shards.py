"""Clips in tar archives by the convention of WebDataset, with the offsets of their files.

The files of a clip follow each other and share the name up to its first dot, which is the clip's
key: ``KEY.json``, ``KEY.mp4``, ``KEY.latents.safetensors``. Equal clips give equal archives.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sgm.data.index import Entry, Place


def write_shards(entries: Sequence[Entry], root: Path, limit: int) -> Iterator[Entry]:
    """Pack the files of clips into ``shard-000000.tar`` and so on, in order.

    Args:
        entries: with the places of their files.
        root: folder of the collection.
        limit: bytes of files in an archive; a clip that has more has one to itself.

    Yields:
        The entries with the places in the archives.
    """
    for number, part in enumerate(_split(entries, limit)):
        path = root / f"shard-{number:06d}.tar"
        unfinished = path.with_suffix(".part")
        with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as archive:
            for entry in part:
                _add(archive, f"{entry.key}.json", json.dumps(entry.facts()).encode())
                for suffix, place in entry.files.items():
                    _add(archive, f"{entry.key}.{suffix}", place.read(root))
        places = _places(unfinished, path.name)
        unfinished.replace(path)
        for entry in part:
            files = {suffix: places[f"{entry.key}.{suffix}"] for suffix in entry.files}
            yield replace(entry, files=files)


def _split(entries: Sequence[Entry], limit: int) -> Iterator[list[Entry]]:
    part: list[Entry] = []
    size = 0
    for entry in entries:
        more = sum(place.size for place in entry.files.values())
        if part and size + more > limit:
            yield part
            part, size = [], 0
        part.append(entry)
        size += more
    if part:
        yield part


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file that tells nothing of time, owner or machine."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _places(file: Path, name: str) -> dict[str, Place]:
    """Read back where the files of a finished archive are."""
    with tarfile.open(file) as archive:
        return {m.name: Place(name, m.size, m.offset_data) for m in archive}
