"""The index of prepared clips: a line of JSON for each, with the places of its files.

A collection is a folder with ``index.jsonl``, ``meta.json`` and the files that the index names:
single files, or parts of tar archives.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

INDEX, META = "index.jsonl", "meta.json"
VIDEO, LATENTS = "mp4", "latents.safetensors"


@dataclass(frozen=True)
class Place:
    """Where the bytes of a file are.

    Attributes:
        path: of the file or archive, relative to the collection.
        size: bytes.
        offset: of the first of them in the archive.
    """

    path: str
    size: int
    offset: int = 0

    def read(self, root: Path) -> bytes:
        """Read them.

        Raises:
            ValueError: they are not there.
        """
        path = root / self.path
        try:
            with path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        if len(data) < self.size:
            raise ValueError(f"{path} is shorter than the index says: prepare it anew")
        return data


@dataclass(frozen=True)
class Entry:
    """A clip of a collection.

    Attributes:
        key: its name.
        source: path of its video in the collection that it was taken from.
        start: time of its first frame there in seconds.
        fps: frames per second.
        frames: how many it has.
        height: in pixels.
        width: in pixels.
        speed: of its motion in short sides per frame.
        motion_bucket_id: what the collection's map makes of that.
        heldout: it is for validation.
        files: by suffix.
    """

    key: str
    source: str
    start: float
    fps: float
    frames: int
    height: int
    width: int
    speed: float
    motion_bucket_id: int
    heldout: bool = False
    files: Mapping[str, Place] = field(default_factory=dict)

    def with_file(self, suffix: str, place: Place) -> "Entry":
        """Return it with one more file."""
        return replace(self, files={**self.files, suffix: place})

    def facts(self) -> dict[str, Any]:
        """All but the places of the files, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "files"}


def write_index(root: Path, entries: Iterable[Entry]) -> None:
    """Write the index of a collection; it appears when it is complete."""
    write_whole(root / INDEX, "".join(json.dumps(asdict(entry)) + "\n" for entry in entries))


def read_index(root: Path) -> list[Entry]:
    """Read the index of a collection.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    file = root / INDEX
    if not file.is_file():
        raise ValueError(f"no prepared clips at {root}: make them by scripts/prepare_videos.py")
    try:
        return [_entry(json.loads(line)) for line in file.read_text().splitlines()]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _entry(data: dict[str, Any]) -> Entry:
    files = {suffix: Place(**place) for suffix, place in data.pop("files").items()}
    return Entry(**data, files=files)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears when it is complete."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text)
    unfinished.replace(path)
