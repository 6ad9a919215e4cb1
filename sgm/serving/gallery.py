"""The videos that were made: whose they are, their frames, and files of them in any format."""

import io
import json
import secrets
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from re import fullmatch
from tempfile import TemporaryDirectory
from threading import Lock

from sgm.data.mp4 import decode_mp4
from sgm.inference.flags import OUTPUT_FOLDER as COMMAND_LINE_FOLDER
from sgm.inference.options import SamplingOptions
from sgm.inference.record import Record, finished_runs
from sgm.inference.videos import Frames, write_video
from sgm.serving.limits import PATH_OPTIONS

FORMATS = {"mp4": "video/mp4", "gif": "image/gif", "webp": "image/webp", "png": "application/zip"}
KEPT_BYTES = 256 * 2**20  # of frames of the videos that were used last
FOLDER_DIGITS = 32  # of the name of a visitor's folder, hexadecimal
PICTURES = "pictures"  # folder of the uploaded ones, by their SHA-256


@dataclass(frozen=True, eq=False)
class Run:
    """A video that was made.

    Attributes:
        token: random, and of no meaning outside of this process.
        video: the mp4.
        record: what made it, as in the JSON beside it, but without paths.
    """

    token: str
    video: Path
    record: Record
    _load: Callable[[], Frames] = field(repr=False)
    _picture: Path | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """For a download, without its suffix: ``svd_xt_23``."""
        return f"{self.record['version']}_{self.record['options']['seed']}"

    @property
    def fps(self) -> int:
        """Frames per second."""
        return int(self.record["options"]["fps"])

    @property
    def picture(self) -> bytes | None:
        """The file that was uploaded; None for a video of the command line's."""
        return self._picture.read_bytes() if self._picture and self._picture.is_file() else None

    def frames(self) -> Frames:
        """The frames, uint8 (t, h, w, 3): as they were made, or of older videos as in the mp4.

        Raises:
            ValueError: the file is gone, or damaged.
        """
        return self._load()

    def file(self, format: str) -> bytes:
        """The video as a file: mp4, gif, webp, or a zip of png files.

        Raises:
            ValueError: another format, or the file is gone.
        """
        if format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
        if format == "mp4":
            return _read(self.video)
        with TemporaryDirectory() as folder:
            suffix = "" if format == "png" else f".{format}"
            path = write_video(self.frames(), Path(folder, f"video{suffix}"), self.fps)
            return _zipped(path) if format == "png" else path.read_bytes()


class Gallery:
    """The videos under a folder, those of each visitor in a folder of their own.

    Args:
        folder: of all.
        keep_runs: videos that a visitor keeps.
        keep_days: days that any video is kept; None for ever.
        shared: everybody is shown the videos of all, and those of the command line.
    """

    def __init__(
        self,
        folder: Path,
        keep_runs: int = 100,
        keep_days: float | None = None,
        shared: bool = False,
    ) -> None:
        self.folder, self._keep_runs, self._shared = folder, keep_runs, shared
        self._keep_days = keep_days
        self._known: dict[Path, Run] = {}
        self._frames: OrderedDict[Path, Frames] = OrderedDict()
        self._lock = Lock()

    def visitor_folder(self, visitor: str) -> Path:
        """Where a visitor's videos lie; the name does not tell the visitor's id.

        Raises:
            ValueError: no id, which is 32 hexadecimal digits.
        """
        if not fullmatch("[0-9a-f]{32}", visitor):
            raise ValueError("a visitor is known by 32 random hexadecimal digits")
        return self.folder / sha256(visitor.encode()).hexdigest()[:FOLDER_DIGITS]

    def store(self, visitor: str, picture: bytes) -> Path:
        """Keep an uploaded picture under the name of its content; gives its path."""
        folder = self.visitor_folder(visitor) / PICTURES
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / sha256(picture).hexdigest()
        path.write_bytes(picture)
        return path

    def runs(self, visitor: str) -> list[Run]:
        """The videos that a visitor may see, newest first."""
        folders = self._folders() if self._shared else [self.visitor_folder(visitor)]
        found = [each for folder in folders for each in finished_runs(folder)]
        videos = [(path, record) for path, record in found if path.suffix == ".mp4"]
        videos.sort(key=lambda each: _modified(each[0]), reverse=True)
        return [self._run(path, record) for path, record in videos]

    def add(self, path: Path, frames: Frames) -> Run:
        """Take in a video that has just been made, whose frames are at hand."""
        self._remember(path, frames)
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return self._run(path, record)

    def prune(self, visitor: str) -> None:
        """Remove a visitor's oldest videos above the number that is kept, and unused pictures.

        And the videos of all visitors that are too old.
        """
        folder = self.visitor_folder(visitor)
        videos = sorted(folder.glob("[0-9]*.mp4"), key=_modified, reverse=True)
        self._remove(folder, videos[self._keep_runs :])
        if self._keep_days is None:
            return
        oldest = (time.time() - 86400 * self._keep_days) * 1e9
        for each in self.folder.glob("[0-9a-f]" * FOLDER_DIGITS):
            old = [path for path in each.glob("[0-9]*.mp4") if _modified(path) < oldest]
            if old:
                self._remove(each, old)

    def _remove(self, folder: Path, videos: Iterable[Path]) -> None:
        """Remove videos of a folder, its unused pictures, and itself if it is empty then."""
        for path in videos:
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            with self._lock:
                self._known.pop(path, None)
                self._frames.pop(path, None)
        used = {Path(record["input"]["path"]).name for _, record in finished_runs(folder)}
        for picture in (folder / PICTURES).glob("*"):
            if picture.name not in used:
                picture.unlink(missing_ok=True)
        for each in (folder / PICTURES, folder):
            with suppress(OSError):  # it is not empty
                each.rmdir()

    def _folders(self) -> Iterator[Path]:
        for parent in (self.folder, COMMAND_LINE_FOLDER):
            yield from (path for path in parent.glob("*") if path.is_dir())

    def _run(self, path: Path, record: Record) -> Run:
        with self._lock:
            if path not in self._known:
                picture = path.parent / PICTURES / Path(str(record["input"]["path"])).name
                token = secrets.token_urlsafe(16)
                made = Run(token, path, _public(record), lambda: self._frames_of(path), picture)
                self._known[path] = made
            return self._known[path]

    def _frames_of(self, path: Path) -> Frames:
        with self._lock:
            kept = self._frames.get(path)
        if kept is None:
            kept = decode_mp4(_read(path))
        self._remember(path, kept)
        return kept

    def _remember(self, path: Path, frames: Frames) -> None:
        """Keep frames, and forget those that have not been used for longest."""
        with self._lock:
            self._frames[path] = frames
            self._frames.move_to_end(path)
            while len(self._frames) > 1 and _bytes(self._frames.values()) > KEPT_BYTES:
                self._frames.popitem(last=False)


def _public(record: Record) -> Record:
    """The record without paths, as where files of this machine lie is not for visitors.

    An option that a record of an older version lacks has its default.
    """
    places = [name for name, value in record.items() if isinstance(value, dict) and "path" in value]
    named = {each: record[each] | {"path": Path(record[each]["path"]).name} for each in places}
    options = SamplingOptions().to_dict() | record["options"] | dict.fromkeys(PATH_OPTIONS)
    return record | named | {"options": options}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        raise ValueError("this video is no longer there") from None


def _zipped(folder: Path) -> bytes:
    """The files of a folder in a zip; they are compressed already."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    return file.getvalue()


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # removed meanwhile
        return 0


def _bytes(arrays: Iterable[Frames]) -> int:
    return sum(array.nbytes for array in arrays)
