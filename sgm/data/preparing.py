"""From one video to its clips: the part of a preparation that runs on many videos at once.

What becomes of a video depends on the video and the settings alone, so that it does not matter
which process or machine works on it, or when. Nothing here needs torch.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sgm.data.cuts import Footage, analyse
from sgm.data.motion import clip_speed, opencv
from sgm.data.mp4 import encode_mp4
from sgm.data.quality import MIN_SPEED, fault, fingerprint
from sgm.data.reading import TOLERANCE, Frames, cover, nearest, read_frames
from sgm.data.sizes import Size, choose_size

THUMBNAIL_SIDE = 72


@dataclass(frozen=True)
class Settings:
    """What decides about the clips of a video.

    Attributes:
        fps: the clips' rate; a video of fewer frames per second keeps its own.
        frames: of a clip.
        sizes: to choose from.
        max_upscale: largest magnification of a video.
        picture_fps: rate of folders of pictures.
        min_speed: clips below are static, in short sides per frame.
        max_text: clips of which text covers a larger part are left out; 1 to not look for it.
    """

    fps: float = 7.0
    frames: int = 14
    sizes: tuple[Size, ...] = ((576, 1024),)
    max_upscale: float = 1.0
    picture_fps: float = 7.0
    min_speed: float = MIN_SPEED
    max_text: float = 1.0

    def __post_init__(self) -> None:
        for name in ("fps", "max_upscale", "picture_fps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.frames < 2:
            raise ValueError(f"frames: a clip needs at least 2, got {self.frames}")


@dataclass(frozen=True)
class Found:
    """A clip of a video.

    Attributes:
        number: among the video's clips.
        start: time of its first frame in seconds.
        fps: its rate.
        size: its height and width.
        speed: in short sides per frame.
        hashes: see `sgm.data.quality.fingerprint`.
        fault: why it is left out, or None.
    """

    number: int
    start: float
    fps: float
    size: Size
    speed: float
    hashes: tuple[int, int]
    fault: str | None


@dataclass(frozen=True)
class Outcome:
    """What became of a video.

    Attributes:
        name: the video's path in its collection.
        error: why it could not be read, or None.
        clips: found in it.
        left_out: how many of its shots were too short for a clip, and whether the video is too
            small for all sizes.
    """

    name: str
    error: str | None = None
    clips: tuple[Found, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A name for files: of letters, digits, ``-`` and ``_``."""
        return key_of(self.name)

    def write(self, path: Path) -> None:
        """Write it as JSON; the file appears when it is complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(asdict(self)))
        unfinished.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Outcome":
        """Read what `write` wrote."""
        data: dict[str, Any] = json.loads(path.read_text())
        clips = tuple(
            Found(**clip | {"size": tuple(clip["size"]), "hashes": tuple(clip["hashes"])})
            for clip in data.pop("clips")
        )
        return cls(**data, clips=clips)


def key_of(name: str) -> str:
    """Make a name for files of a video's path: its stem, and digits that stand for all of it."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(name).stem).strip("-")[:40]
    return f"{stem or 'video'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def prepare_video(path: Path, name: str, settings: Settings, clips: Path, rejects: Path) -> Outcome:
    """Find the clips of a video and write those that are of use.

    Args:
        path: a file or a folder of numbered pictures.
        name: its path in the collection.
        settings: of the preparation.
        clips: folder for the clips, as ``0000.mp4``.
        rejects: folder for a small picture of each clip that is not, as ``0000.jpg``.

    Returns:
        What became of it; a video that cannot be read is no error here.

    Raises:
        OSError: something cannot be written.
    """
    try:
        footage = analyse(read_frames(path, settings.picture_fps))
        size = choose_size(footage.size, settings.sizes, settings.max_upscale)
        if size is None:
            return Outcome(name, left_out={"small": 1})
        rate = min(settings.fps, footage.fps)
        starts, short = _clip_starts(footage, rate, settings.frames)
        times = [start + k / rate for start in starts for k in range(settings.frames)]
        chosen = nearest(read_frames(path, settings.picture_fps), times)
        found = []
        for number, start in enumerate(starts):
            frames = [cover(frame, size) for frame in islice(chosen, settings.frames)]
            if len(frames) < settings.frames:
                raise ValueError("read again, it ends earlier")
            clip = _judge(np.stack(frames), number, start, rate, settings)
            _keep(clip, np.stack(frames), clips, rejects)
            found.append(clip)
    except ValueError as error:
        return Outcome(name, error=str(error))
    return Outcome(name, clips=tuple(found), left_out={"short": short} if short else {})


def _clip_starts(footage: Footage, rate: float, frames: int) -> tuple[list[float], int]:
    """Place clips one after the other in each shot; count the shots that have none."""
    starts: list[float] = []
    short = 0
    for first, last in footage.shots:
        begin, end = footage.times[first], footage.times[last]
        count = int((end - begin + TOLERANCE) * rate + 1) // frames
        starts += [float(begin + i * frames / rate) for i in range(count)]
        short += count == 0
    return starts, short


def _judge(frames: Frames, number: int, start: float, rate: float, settings: Settings) -> Found:
    speed = clip_speed(frames)
    return Found(
        number=number,
        start=round(start, 6),
        fps=round(rate, 6),
        size=(frames.shape[1], frames.shape[2]),
        speed=round(speed, 8),
        hashes=fingerprint(frames),
        fault=fault(frames, speed, settings.min_speed, settings.max_text),
    )


def _keep(clip: Found, frames: Frames, clips: Path, rejects: Path) -> None:
    if clip.fault is None:
        clips.mkdir(parents=True, exist_ok=True)
        (clips / f"{clip.number:04d}.mp4").write_bytes(encode_mp4(frames, clip.fps))
    else:
        rejects.mkdir(parents=True, exist_ok=True)
        (rejects / f"{clip.number:04d}.jpg").write_bytes(thumbnail(frames[len(frames) // 2]))


def thumbnail(frame: Frames) -> bytes:
    """Return a small picture of a frame (h, w, 3) as a JPEG file."""
    cv2 = opencv()
    scale = THUMBNAIL_SIDE / frame.shape[0]
    size = max(round(frame.shape[1] * scale), 1), THUMBNAIL_SIDE
    small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR))[1].tobytes()
