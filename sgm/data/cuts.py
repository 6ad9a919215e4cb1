"""Shots of a video: where it cuts, dissolves or fades.

A *cut* lies between two frames where the later one cannot be made of the earlier one by motion, its
colours are others (half the L1 distance of colour histograms), and that change stands out among
those nearby. Motion is tried twice: along the optical flow, and as a shift of the whole frame by
phase correlation, which follows pans of half a frame; what counts is the share of the frame's
variance that the better one leaves unexplained.

A *transition*, a dissolve or a fade, is a stretch whose ends have nothing in common while all in
between are blends of them: the frames at a quarter, half and three quarters lie near the straight
line from the one end to the other, about where they should. Frames of a camera move have nothing
like that in common, unless they are few and alike.

The numbers were chosen on pans over photographs, of up to 0.4 of the short side per frame, on
zooms, and on real shots joined by cuts, dissolves and fades (docs/data.md has the figures).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sgm.data.motion import FARNEBACK, opencv
from sgm.data.reading import TOLERANCE, Frames, cover, upright_size

if TYPE_CHECKING:
    from av import VideoFrame

Floats = npt.NDArray[np.float64]

SIDE = 48
"""Short side in pixels that frames are compared at."""
UNEXPLAINED = 0.5
"""Share of variance above which frames have nothing in common."""
COLOURS = 0.08
"""Distance of colours above which a cut is possible."""
OUTSTANDING = 3.0
"""How many times the median of its neighbours' the distance of a cut is."""
NEIGHBOURS = 4
"""Of a pair of frames, on each side."""
SPANS = (0.2, 0.3, 0.45, 0.7, 1.0, 1.5, 2.0)
"""Lengths in seconds of the transitions that are looked for."""
OFF_LINE, OFF_PLACE = 0.04, 0.12
"""How far from the line, in shares of its squared length, and from the place on it."""

_TINY = 16, 24
_EMPTY_VARIANCE = 4.0  # of grey levels: a frame with less shows nothing


@dataclass(frozen=True)
class Footage:
    """What is known of a video after it was read once.

    Attributes:
        times: of its frames in seconds.
        size: (height, width) that it is shown with.
        shots: (first, last) frame of each; frames of transitions belong to none.
    """

    times: Floats
    size: tuple[int, int]
    shots: tuple[tuple[int, int], ...]

    @property
    def fps(self) -> float:
        """The mean frame rate."""
        return float((len(self.times) - 1) / max(self.times[-1] - self.times[0], TOLERANCE))


def analyse(frames: "Iterable[tuple[float, VideoFrame]]") -> Footage:
    """Read a video and find its shots.

    Args:
        frames: all of them, with their times in seconds.

    Raises:
        ValueError: there are none.
    """
    times, tiny, pairs = [], [], []
    size, before = (0, 0), None
    for time, frame in frames:
        if before is None:
            size = upright_size(frame)
        small = cover(frame, _small_size(size))
        times.append(time)
        tiny.append(_tiny(small))
        if before is not None:
            pairs.append(compare(before, small))
        before = small
    if not times:
        raise ValueError("no frame in it")
    cuts = find_cuts(np.array(pairs).reshape(-1, 2))
    footage = Footage(np.array(times), size, ())
    inside = find_transitions(np.array(tiny).reshape(len(tiny), -1), footage.fps)
    return Footage(footage.times, size, divide(cuts, inside))


def _small_size(size: tuple[int, int]) -> tuple[int, int]:
    scale = SIDE / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def _tiny(small: Frames) -> npt.NDArray[np.float32]:
    cv2 = opencv()
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return cv2.resize(grey, _TINY[::-1], interpolation=cv2.INTER_AREA)


def compare(before: Frames, after: Frames) -> tuple[float, float]:
    """Return what motion leaves unexplained of a frame, and how far its colours changed: 0 to 1.

    Args:
        before: (h, w, 3).
        after: (h, w, 3), the next frame.
    """
    cv2 = opencv()
    a, b = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, after))
    rest = min(_rest(_moved(a, b), b), _rest(*_shifted(a, b)))
    return rest, float(np.abs(_colours(before) - _colours(after)).sum() / 2)


def _rest(a: Frames, b: Frames) -> float:
    return float(unexplained(a.reshape(1, -1).astype(float), b.reshape(1, -1).astype(float))[0])


def _moved(a: Frames, b: Frames) -> Frames:
    """Make grey frame ``b`` (h, w) of ``a`` along the optical flow."""
    cv2 = opencv()
    flow = cv2.calcOpticalFlowFarneback(b, a, None, **FARNEBACK)
    y, x = np.indices(a.shape, dtype=np.float32)
    source = x + flow[..., 0], y + flow[..., 1]
    moved: Frames = cv2.remap(a, *source, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return moved


def _shifted(a: Frames, b: Frames) -> tuple[Frames, Frames]:
    """Return the parts of two grey frames that show the same if the camera did nothing but pan."""
    (right, down), _ = opencv().phaseCorrelate(
        a.astype(np.float32), b.astype(np.float32), _window(a.shape)
    )
    return _inner(a, -round(down), -round(right)), _inner(b, round(down), round(right))


def _inner(frame: Frames, down: int, right: int) -> Frames:
    """Return what remains in a frame of content that moved; at least half of each side."""
    h, w = frame.shape
    down, right = max(-(h // 2), min(down, h // 2)), max(-(w // 2), min(right, w // 2))
    return frame[max(down, 0) : h + min(down, 0), max(right, 0) : w + min(right, 0)]


@cache
def _window(shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Weights that fade out towards the edges, which phase correlation would see as content."""
    window: npt.NDArray[np.float32] = opencv().createHanningWindow(shape[::-1], opencv().CV_32F)
    return window


def _colours(frame: Frames) -> Floats:
    """Return the shares of 64 colours."""
    red, green, blue = (frame // 64).astype(np.int64).reshape(-1, 3).T
    return np.bincount(16 * red + 4 * green + blue, minlength=64) / red.size


def unexplained(a: Floats, b: Floats) -> Floats:
    """Return the share of variance of pictures ``b`` that ``a``, made brighter or darker, lacks.

    Args:
        a: (n, pixels).
        b: (n, pixels).

    Returns:
        (n,), from 0 to 1; 1 where one of them shows nothing, 0 where both do.
    """
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    common = np.clip((a * b).sum(axis=1), 0, None) ** 2
    power = np.stack([np.square(x).sum(axis=1) for x in (a, b)])
    empty = power < _EMPTY_VARIANCE * a.shape[1]
    rest = 1 - common / np.maximum(power.prod(axis=0), 1e-9)
    return np.where(empty.all(axis=0), 0.0, np.where(empty.any(axis=0), 1.0, rest))


def find_cuts(pairs: Floats) -> list[int]:
    """Return the numbers of the frames that begin a shot after a cut.

    Args:
        pairs: (n - 1, 2), as `compare` gives for neighbours.
    """
    cuts = []
    for i in np.flatnonzero((pairs[:, 0] > UNEXPLAINED) & (pairs[:, 1] > COLOURS)):
        near = np.r_[max(i - NEIGHBOURS, 0) : i, i + 1 : min(i + 1 + NEIGHBOURS, len(pairs))]
        usual = float(np.median(pairs[near, 1])) if len(near) else 0.0
        if pairs[i, 1] > OUTSTANDING * usual:
            cuts.append(int(i) + 1)
    return cuts


def find_transitions(tiny: npt.NDArray[np.float32], fps: float) -> npt.NDArray[np.bool_]:
    """Say which frames (n,) lie inside a dissolve or fade.

    Args:
        tiny: (n, pixels), small grey frames.
        fps: their rate.
    """
    inside = np.zeros(len(tiny), bool)
    lengths = {max(4, 4 * round(fps * seconds / 4)) for seconds in SPANS}
    for length in sorted(lengths):
        for first in np.flatnonzero(_blends(tiny, length)):
            inside[first + 1 : first + length] = True
    return inside


def _blends(tiny: npt.NDArray[np.float32], length: int) -> npt.NDArray[np.bool_]:
    """Say of which frames (n - length,) a transition of this length begins."""
    count = len(tiny) - length
    if count < 1:
        return np.zeros(0, bool)
    start, end = tiny[:count].astype(np.float64), tiny[length:].astype(np.float64)
    found = unexplained(start, end) > UNEXPLAINED
    fades = np.minimum(start.var(axis=1), end.var(axis=1)) < _EMPTY_VARIANCE

    def shape(change: Floats) -> Floats:
        """Leave out what is a change of light, but for fades."""
        return change - np.where(fades, 0.0, change.mean(axis=1))[:, None]

    way = shape(end - start)
    squared = np.maximum(np.square(way).sum(axis=1), 1e-9)
    for quarter in (1, 2, 3):
        between = shape(tiny[quarter * length // 4 :][:count] - start)
        place = (between * way).sum(axis=1) / squared
        off = np.square(between - place[:, None] * way).sum(axis=1) / squared
        found &= (off < OFF_LINE) & (np.abs(place - quarter / 4) < OFF_PLACE)
    return found


def divide(cuts: Iterable[int], inside: npt.NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    """Return (first, last) frame of each shot.

    Args:
        cuts: the frames that begin a shot.
        inside: (n,), the frames that belong to none.
    """
    begins = set(cuts)
    shots: list[tuple[int, int]] = []
    first = None
    for i, left_out in enumerate(inside):
        if first is not None and (left_out or i in begins):
            shots.append((first, i - 1))
            first = None
        if first is None and not left_out:
            first = i
    return (*shots, (first, len(inside) - 1)) if first is not None else tuple(shots)
