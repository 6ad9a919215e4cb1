"""Videos in: the frames of a file, or of a folder of numbered pictures, with their times.

PyAV decodes; nothing here needs torch.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

Frames = npt.NDArray[np.uint8]
"""(t, h, w, 3), RGB; or one frame, (h, w, 3)."""

VIDEOS = frozenset((".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm"))
PICTURES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
TOLERANCE = 1e-4
"""Seconds by which a timestamp may miss, by rounding, the time that it stands for."""

_NUMBERED = re.compile(r"(.*?)(\d+)")


def find_videos(folder: Path, leave_out: Path | None = None) -> list[Path]:
    """Return the videos under a folder, in the order of their names.

    A video is a file with one of the suffixes `VIDEOS`, or a folder with at least two numbered
    pictures. What begins with a dot is passed over.

    Args:
        folder: searched with its subfolders.
        leave_out: a folder in it that is not searched.
    """
    found = []
    skipped = leave_out and leave_out.resolve()
    for root, folders, files in os.walk(folder):
        here = Path(root)
        shown = [n for n in folders if not n.startswith(".")]
        folders[:] = [n for n in shown if (here / n).resolve() != skipped]
        found += [here / n for n in files if _is_video(n)]
        if len(numbered_pictures(here)) > 1:
            found.append(here)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _is_video(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in VIDEOS


def numbered_pictures(folder: Path) -> list[Path]:
    """Return the pictures of a folder whose names end in a number, by name and number."""
    numbered = []
    for path in folder.iterdir():
        match = _NUMBERED.fullmatch(path.stem)
        if match and path.suffix.lower() in PICTURES and not path.name.startswith("."):
            numbered.append((match[1], int(match[2]), path))
    return [path for *_, path in sorted(numbered)]


@contextmanager
def open_video(file: Path) -> "Iterator[InputContainer]":
    """Open a file that has pictures; its first video stream is decoded in this thread alone.

    Raises:
        ValueError: there are none, or decoding fails in the block.
    """
    import av

    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise ValueError("no video in it")
            yield container
    except av.FFmpegError as error:
        raise ValueError(error.strerror) from error


def timed(decoded: "Iterable[VideoFrame]") -> "Iterator[tuple[float, VideoFrame]]":
    """Give frames with their times in seconds.

    Raises:
        ValueError: a frame has no time.
    """
    for frame in decoded:
        if frame.time is None:
            raise ValueError("its frames have no times: store it in another container, such as mkv")
        yield frame.time, frame


def read_frames(path: Path, picture_fps: float = 7) -> "Iterator[tuple[float, VideoFrame]]":
    """Give the frames of a video with their times in seconds, in order.

    Args:
        path: a file, or a folder of numbered pictures.
        picture_fps: rate of such a folder.

    Raises:
        ValueError: something cannot be decoded.
    """
    if path.is_dir():
        for number, picture in enumerate(numbered_pictures(path)):
            with open_video(picture) as container:
                for frame in container.decode(video=0):
                    yield number / picture_fps, frame
    else:
        with open_video(path) as container:
            yield from timed(container.decode(video=0))


def nearest(
    frames: "Iterable[tuple[float, VideoFrame]]", times: Sequence[float]
) -> "Iterator[VideoFrame]":
    """Give the frame nearest to each of the growing times, as far as the frames reach."""
    wanted = iter(times)
    time = next(wanted, math.inf)
    before = None
    for at, frame in frames:
        while at >= time - TOLERANCE:
            yield frame if before is None or at - time < time - before[0] else before[1]
            time = next(wanted, math.inf)
        if time == math.inf:
            return
        before = at, frame


def upright_size(frame: "VideoFrame") -> tuple[int, int]:
    """Return the (height, width) that a frame is shown with."""
    size = frame.height, frame.width
    return size[::-1] if frame.rotation % 180 else size


def cover(frame: "VideoFrame", size: tuple[int, int]) -> Frames:
    """Turn a frame upright and scale it to cover (h, w), cutting the overhang evenly."""
    h, w = size[::-1] if frame.rotation % 180 else size
    scale = max(h / frame.height, w / frame.width)
    small = frame.reformat(
        width=max(round(frame.width * scale), w),
        height=max(round(frame.height * scale), h),
        format="rgb24",
        interpolation="AREA" if scale < 1 else "BICUBIC",
    ).to_ndarray()
    top, left = (small.shape[0] - h) // 2, (small.shape[1] - w) // 2
    return np.rot90(small[top : top + h, left : left + w], frame.rotation // 90)
