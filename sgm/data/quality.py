"""What keeps a clip out of a collection: too little to see, no motion, or another like it."""

import numpy as np
import numpy.typing as npt

from sgm.data.motion import opencv
from sgm.data.reading import Frames

BLACK, FLAT, STATIC, DUPLICATE = "black", "flat", "static", "duplicate"

DARK_LEVEL = 32
"""A frame is black where 95 of 100 pixels are darker, of 255."""
FLAT_DEVIATION = 4.0
"""A frame is flat where the grey levels' standard deviation is less, of 255."""
MIN_SPEED = 0.0002
"""Clips below are static, in short sides per frame: bucket 5 of the linear map."""
SAME_BITS = 10
"""Clips are duplicates where each of their two hashes differs in so many of 64 bits at most."""

_HASH_SIDE, _HASH_WAVES = 32, 8


def fault(frames: Frames, speed: float, min_speed: float = MIN_SPEED) -> str | None:
    """Say why a clip (t, h, w, 3) is of no use, or None.

    Args:
        frames: the clip; the middle one of its frames is looked at.
        speed: of the clip, in short sides per frame.
        min_speed: the clip is static below it.
    """
    grey = opencv().cvtColor(frames[len(frames) // 2], opencv().COLOR_RGB2GRAY)
    if np.percentile(grey, 95) < DARK_LEVEL:
        return BLACK
    if grey.std() < FLAT_DEVIATION:
        return FLAT
    return STATIC if speed < min_speed else None


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
