"""What keeps a clip out of a collection: too little to see, no motion, or another like it."""

import numpy as np
import numpy.typing as npt

from sgm.data.motion import opencv
from sgm.data.reading import Frames

BLACK, FLAT, STATIC, TEXT, DUPLICATE = "black", "flat", "static", "text", "duplicate"

DARK_LEVEL = 32
"""A frame is black where 95 of 100 pixels are darker, of 255."""
FLAT_DEVIATION = 4.0
"""A frame is flat where the grey levels' standard deviation is less, of 255."""
MIN_SPEED = 0.0002
"""Clips below are static, in short sides per frame: bucket 5 of the linear map."""
SAME_BITS = 10
"""Clips are duplicates where each of their two hashes differs in so many of 64 bits at most."""

_HASH_SIDE, _HASH_WAVES = 32, 8

# Text is looked for in frames of this short side in pixels, as strong edges that close to lines.
_TEXT_SIDE = 360
_EDGE = 60  # least contrast of a stroke, of 255
_GAP, _CORE = 15, 5  # between letters of a line at most; height of a line at least
_LINE_HEIGHTS = (7, 80)
_LONGER = 2.5  # a line is so much longer than high
_SOLID = 0.6  # part of its box that a closed line fills
_INK = (0.25, 0.9)  # part of its box that edges fill
_STROKES = 1.5  # edges that a row crosses in each square of the line


def fault(
    frames: Frames, speed: float, min_speed: float = MIN_SPEED, max_text: float = 1.0
) -> str | None:
    """Say why a clip (t, h, w, 3) is of no use, or None.

    Args:
        frames: the clip; the middle one of its frames is looked at.
        speed: of the clip, in short sides per frame.
        min_speed: the clip is static below it.
        max_text: it is one of text where that covers more, in parts of the frame; 1 to not look.
    """
    grey = opencv().cvtColor(frames[len(frames) // 2], opencv().COLOR_RGB2GRAY)
    if np.percentile(grey, 95) < DARK_LEVEL:
        return BLACK
    if grey.std() < FLAT_DEVIATION:
        return FLAT
    if speed < min_speed:
        return STATIC
    return TEXT if max_text < 1 and text_share(frames) > max_text else None


def text_share(frames: Frames) -> float:
    """Which part of the frames of a clip (t, h, w, 3) has lines of text that stay, from 0 to 1.

    Subtitles, captions and logos stay where they are in the first, the middle and the last frame.
    Level lines alone are found, of a script with strokes of letters, and not on busy ground.
    """
    first, middle, last = (_text_lines(frames[i]) for i in (0, len(frames) // 2, -1))
    return float((first & middle & last).mean())


def _text_lines(frame: Frames) -> npt.NDArray[np.bool_]:
    """Where boxes with strokes as close as those of text lie, at the size that is looked at."""
    cv2 = opencv()
    scale = _TEXT_SIDE / min(frame.shape[:2])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=how)
    edges = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    otsu, _ = cv2.threshold(edges, 0, 255, cv2.THRESH_OTSU)
    strong = (edges > max(otsu, _EDGE)).astype(np.uint8)
    lines = cv2.morphologyEx(strong, cv2.MORPH_CLOSE, np.ones((1, _GAP), np.uint8))
    lines = cv2.morphologyEx(lines, cv2.MORPH_OPEN, np.ones((_CORE, _CORE), np.uint8))
    found = np.zeros(grey.shape, bool)
    _, _, boxes, _ = cv2.connectedComponentsWithStats(lines)
    for left, top, width, height, area in boxes[1:]:  # the first is the ground
        place = np.s_[top : top + height, left : left + width]
        is_line = _LINE_HEIGHTS[0] <= height <= _LINE_HEIGHTS[1] and width >= _LONGER * height
        if is_line and area >= _SOLID * width * height and _has_strokes(strong[place]):
            found[place] = True
    return found


def _has_strokes(edges: npt.NDArray[np.uint8]) -> bool:
    """Whether a box of edges, 0 or 1, looks like a line of letters."""
    height, width = edges.shape
    crossed = np.count_nonzero(np.diff(edges, axis=1), axis=1).mean() * height / width
    return _INK[0] < edges.mean() < _INK[1] and crossed >= _STROKES


def fingerprint(frames: Frames) -> tuple[int, int]:
    """Return two perceptual hashes of 64 bits: of the middle frame, and of what changes.

    The second one is of the last frame less the first. It tells apart clips that a fixed camera
    took one after the other, which look alike but move otherwise.
    """
    first, middle, last = (_small(frames[i]) for i in (0, len(frames) // 2, -1))
    return _hash(middle), _hash(last - first)


class Seen:
    """The fingerprints of the clips kept so far."""

    def __init__(self) -> None:
        self._hashes = np.empty((1024, 2), np.uint64)
        self._count = 0

    def add(self, hashes: tuple[int, int]) -> int | None:
        """Return the number of a clip with nearly the same fingerprint, or keep this one.

        Clips are numbered from 0 in the order in which they are kept.
        """
        new = np.array(hashes, np.uint64)
        differing = np.bitwise_count(self._hashes[: self._count] ^ new)
        alike = np.flatnonzero((differing <= SAME_BITS).all(axis=1))
        if len(alike):
            return int(alike[0])
        if self._count == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.empty_like(self._hashes)])
        self._hashes[self._count] = new
        self._count += 1
        return None


def _small(frame: Frames) -> npt.NDArray[np.float32]:
    cv2 = opencv()
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return cv2.resize(grey, (_HASH_SIDE, _HASH_SIDE), interpolation=cv2.INTER_AREA)


def _hash(picture: npt.NDArray[np.float32]) -> int:
    """Tell which of the 64 lowest waves of a cosine transform are above their median."""
    waves = opencv().dct(picture)[:_HASH_WAVES, :_HASH_WAVES].ravel()
    waves[0] = 0  # the mean brightness says nothing about the content
    bits = np.packbits(waves > np.median(waves))
    return int.from_bytes(bits.tobytes(), "big")
