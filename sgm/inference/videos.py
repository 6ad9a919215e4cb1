"""Videos out: frames become an mp4, gif or webp file or a folder of pngs, whole or not at all."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np
import numpy.typing as npt
from PIL import Image

from sgm.h264 import encode_h264
from sgm.inference.files import user_path

if TYPE_CHECKING:
    from torch import Tensor

Frames = npt.NDArray[np.uint8]

MP4_QUALITY = {"crf": "17", "preset": "medium", "x264-params": "mbtree=0"}
PALETTE_FRAMES = 8  # spread over a video, enough to find the colours of a gif


@dataclass(frozen=True, eq=False)
class Video:
    """What sampling gives.

    Attributes:
        frames: uint8 (t, h, w, 3), RGB.
        fps: frames per second of the file.
        latents: the undecoded (t, c, h / factor, w / factor) tensor, where it was kept.
        flagged: whether the safety filter found something, so that the frames are blurred and
            there are no latents; None where it was off.
    """

    frames: Frames
    fps: int
    latents: "Tensor | None" = None
    flagged: bool | None = None

    def save(self, path: str | Path) -> Path:
        """Write to ``path``, in the format of its suffix (none: a folder of png files)."""
        return write_video(self.frames, path, self.fps)


def write_video(frames: Frames, path: str | Path, fps: float, format: str | None = None) -> Path:
    """Write a video; a file appears under its name only when it is complete.

    Args:
        frames: uint8 (t, h, w, 3), RGB.
        path: of the file, or of the new folder where ``format`` is png; may begin with ``~``. A
            file is replaced by a file, and an empty folder by a folder.
        fps: frames per second, exact in mp4; gif rounds each frame's time to 1/100 s, webp to
            1/1000 s, so that the sum of times stays exact (browsers play gif to 50 frames/s).
        format: mp4 (H.264, yuv420p), gif, webp or png; by default what the path's suffix says,
            and png for a path without suffix.

    Returns:
        The path, without ``~``.

    Raises:
        ValueError: for frames of another shape or type, an unknown format, an odd size in mp4, a
            name that something has already which is not replaced, no such home folder.
    """
    path = user_path(path)
    format = format or path.suffix.lower().removeprefix(".") or "png"
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        shape = tuple(frames.shape)
        raise ValueError(f"frames must be uint8 (t, h, w, 3), got {frames.dtype} {shape}")
    check_video_size(format, *frames.shape[1:3])
    _refuse_taken(path, folder=format == "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _whole(path) as unfinished:
        WRITERS[format](frames, unfinished, Fraction(fps).limit_denominator(1001))
    return path


def check_video_size(format: str, height: int, width: int) -> None:
    """Refuse what a format cannot hold, so that it can be told before a long run.

    Raises:
        ValueError: for an unknown format, or an odd side in mp4 (its colour is at half size).
    """
    if format not in WRITERS:
        raise ValueError(f"format must be one of {', '.join(WRITERS)}, got {format!r}")
    if format == "mp4" and (height % 2 or width % 2):
        even = f"{height - height % 2}x{width - width % 2}"
        raise ValueError(
            f"mp4 needs an even height and width, got {height}x{width}; the nearest is {even} "
            "(gif, webp and png take any size)"
        )


def _refuse_taken(path: Path, folder: bool) -> None:
    """Refuse what a new file, or a new folder, would not replace.

    Raises:
        ValueError: it is there.
    """
    if path.is_dir() and not (folder and not any(path.iterdir())):
        raise ValueError(f"{str(path)!r} is a folder that is there already: give another name")
    if folder and path.is_file():
        raise ValueError(f"{str(path)!r} is a file, expected a new folder: give another name")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``: renamed to it at the end, removed if that never comes."""
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)


def _write_mp4(frames: Frames, path: Path, fps: Fraction) -> None:
    import av  # 0.2 s, and needed for this format alone

    try:
        encode_h264(frames, str(path), fps, MP4_QUALITY, {"movflags": "+faststart"})
    except av.FFmpegError as error:  # of which not all are errors of the system
        raise OSError(f"the mp4 cannot be written: {error.strerror}") from error


def _write_gif(frames: Frames, path: Path, fps: Fraction) -> None:
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), PALETTE_FRAMES)).round().astype(int)
    palette = Image.fromarray(np.concatenate(frames[chosen])).quantize(256)
    images = [Image.fromarray(frame).quantize(palette=palette) for frame in frames]
    times = [10 * ticks for ticks in _durations(len(frames), fps, 100)]
    _save_animation(images, path, "GIF", times)


def _write_webp(frames: Frames, path: Path, fps: Fraction) -> None:
    images = [Image.fromarray(frame) for frame in frames]
    _save_animation(images, path, "WEBP", _durations(len(frames), fps, 1000), quality=90)


def _write_png(frames: Frames, path: Path, _fps: Fraction) -> None:
    path.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{index:06d}.png")


def _save_animation(
    images: list[Image.Image], path: Path, format: str, times: list[int], **options: int
) -> None:
    """Save an endless animation whose frames last ``times`` milliseconds each."""
    first, *rest = images
    first.save(path, format, save_all=True, append_images=rest, duration=times, loop=0, **options)


def _durations(count: int, fps: Fraction, ticks: int) -> list[int]:
    """Each frame's time in 1/ticks s, rounded so that the errors do not add up."""
    ends = [round(index * ticks / fps) for index in range(count + 1)]
    return [end - start for start, end in pairwise(ends)]


WRITERS: dict[str, Callable[[Frames, Path, Fraction], None]] = {
    "mp4": _write_mp4,
    "gif": _write_gif,
    "webp": _write_webp,
    "png": _write_png,
}
