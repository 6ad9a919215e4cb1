"""A folder of real videos as training clips, with their measured motion."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sgm.data.motion import LINEAR, clip_speed, opencv
from sgm.data.reading import TOLERANCE, VIDEOS, Frames, cover, nearest, open_video, timed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """Where a clip lies: its file, its first frame's time in seconds, its frames per second."""

    path: Path
    start: float
    fps: float

    def times(self, frames: int) -> list[float]:
        """Return the time of each frame in seconds."""
        return [self.start + k / self.fps for k in range(frames)]


class VideoFolder(Dataset[dict[str, Tensor]]):
    """The clips of all videos in a folder and its subfolders.

    Clips follow each other without overlap, in the order of the files' names: the index is the
    same wherever it is made. Frames are taken at the clip's rate by their timestamps, and cover
    the size with their middle. Files that can't be read are logged by name and left out.

    An item is {"frames": (t, 3, h, w) float32 in [-1, 1], "fps_id": int, "motion_bucket_id": int},
    with fps_id = fps - 1 and the bucket of the measured flow (see :mod:`sgm.data.motion`).

    Args:
        folder: holds mp4, mkv, webm, mov, avi or gif files.
        frames: the number of frames t.
        size: (h, w) of the frames.
        fps: the clips' rate; a video of fewer frames per second keeps its own, and so do all where
            it is None.

    Raises:
        ValueError: the folder has no clip, or OpenCV is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        frames: int = 14,
        size: tuple[int, int] = (64, 64),
        fps: float | None = 7,
    ) -> None:
        opencv()
        if not Path(folder).is_dir():
            raise ValueError(f"no folder at {folder}")
        self.frames = frames
        self.size = (int(size[0]), int(size[1]))
        files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in VIDEOS)
        self.clips = [clip for file in files for clip in self._index(file, fps)]
        if not self.clips:
            raise ValueError(f"{folder}: none of its {len(files)} videos has {frames} frames")

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return clip ``index``, or the next one that can be decoded."""
        for clip in self.clips[index:] + self.clips[:index]:
            try:
                frames = read_clip(clip, self.frames, self.size)
            except ValueError as error:
                logger.warning("skipping a clip at %.1f s of %s: %s", clip.start, clip.path, error)
            else:
                return self._item(clip, frames)
        raise ValueError("none of the clips can be decoded any more")

    def _item(self, clip: Clip, frames: Frames) -> dict[str, Tensor]:
        bucket = LINEAR.bucket(clip_speed(frames))
        return {
            "frames": torch.from_numpy(frames).movedim(-1, 1).float() / 127.5 - 1,
            "fps_id": torch.tensor(max(round(clip.fps) - 1, 0)),
            "motion_bucket_id": torch.tensor(bucket),
        }

    def _index(self, file: Path, fps: float | None) -> Iterator[Clip]:
        try:
            times = timestamps(file)
        except ValueError as error:
            logger.warning("skipping %s: %s", file, error)
            return
        own = (len(times) - 1) / max(times[-1] - times[0], TOLERANCE)
        rate = own if fps is None else min(fps, own)
        count = int((times[-1] - times[0] + TOLERANCE) * rate + 1) // self.frames
        if count == 0:
            logger.info("leaving out %s: shorter than %d frames", file, self.frames)
        for number in range(count):
            yield Clip(file, times[0] + number * self.frames / rate, rate)


def timestamps(file: Path) -> list[float]:
    """Return the times in seconds of a video's frames, without decoding more than the first.

    Raises:
        ValueError: the file has no frame that can be decoded.
    """
    with open_video(file) as container:
        packets = container.demux(container.streams.video[0])
        stamps = [(p.dts if p.pts is None else p.pts, p.time_base) for p in packets]
        container.seek(0)
        if next(container.decode(video=0), None) is None:
            raise ValueError("no frame in it")
    return sorted(float(stamp * base) for stamp, base in stamps if stamp is not None)


def read_clip(clip: Clip, frames: int, size: tuple[int, int]) -> Frames:
    """Decode a clip: uint8 (t, h, w, 3).

    Raises:
        ValueError: the file can't be decoded up to the clip's end.
    """
    times = clip.times(frames)
    with open_video(clip.path) as container:
        container.seek(int(clip.start * 1e6))  # microseconds; to the key frame before
        frames_with_times = timed(container.decode(video=0))
        chosen = [cover(frame, size) for frame in nearest(frames_with_times, times)]
    if len(chosen) < frames:
        raise ValueError("the file ends early")
    return np.stack(chosen)
