"""The motion bucket and what it means in pixels.

The SVD paper (arXiv 2311.15127, appendix) conditions on a motion score taken from optical flow but
publishes no map to the bucket 0..255. The map here is linear unless a collection has its own::

    bucket = 255 * speed / 0.010,    speed = mean |flow| / short side

with the flow in pixels per frame at the clip's own rate, averaged over pixels and frame pairs.
Bucket 127 is about 0.3 pixels per frame in a picture of 64 pixels, 2.9 in one of 576.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_BUCKET = 255
MAX_SPEED = 0.010
"""The speed of bucket 255, as a fraction of the short side per frame."""

FARNEBACK = {
    "pyr_scale": 0.5,
    "levels": 3,
    "winsize": 15,
    "iterations": 3,
    "poly_n": 5,
    "poly_sigma": 1.2,
    "flags": 0,
}
"""Fixed parameters of every Farneback estimate, so that measured buckets compare."""


MEDIAN_BUCKET = 127
FLOW_SIDE = 64
"""Short side in pixels that a clip is measured at, if it is larger; see `clip_speed`."""


@dataclass(frozen=True)
class MotionMap:
    """A map from speed to bucket: straight lines between points, the last bucket beyond them.

    Attributes:
        speeds: growing, from 0, in short sides per frame.
        buckets: growing, from 0 to 255, one for each speed.

    Raises:
        ValueError: the points are not such.
    """

    speeds: tuple[float, ...] = (0.0, MAX_SPEED)
    buckets: tuple[float, ...] = (0.0, float(MAX_BUCKET))

    def __post_init__(self) -> None:
        growing = all(a < b for row in (self.speeds, self.buckets) for a, b in pairwise(row))
        ends = (self.speeds[0], self.buckets[0], self.buckets[-1])
        if len(self.speeds) != len(self.buckets) or not growing or ends != (0, 0, MAX_BUCKET):
            raise ValueError(
                f"a motion map needs growing speeds from 0 and buckets from 0 to {MAX_BUCKET}, "
                f"got {self.speeds} and {self.buckets}"
            )

    def bucket(self, speed: float) -> int:
        """Return the bucket, in 0..255, of a speed."""
        return round(float(np.interp(speed, self.speeds, self.buckets)))

    def speed(self, bucket: float) -> float:
        """Return the speed that a bucket asks for."""
        return float(np.interp(bucket, self.buckets, self.speeds))


LINEAR = MotionMap()
"""What the bundled model was trained with."""


def calibrate(speeds: Sequence[float]) -> MotionMap:
    """Return a map for a collection whose median clip gets bucket 127.

    It is two straight lines: half of the clips lie on the first, on which twice the bucket is twice
    the speed; the second ends at the 99th percentile, for the speeds of ordinary collections have a
    long tail, which one line through the median would squeeze into bucket 255.

    Args:
        speeds: of the collection's clips, in short sides per frame.

    Raises:
        ValueError: the clips do not move.
    """
    median, high = np.quantile(speeds, (0.5, 0.99)) if len(speeds) else (0.0, 0.0)
    if not median > 0:
        raise ValueError("calibration needs clips that move, got none")
    straight = median * MAX_BUCKET / MEDIAN_BUCKET
    return MotionMap((0.0, float(median), float(max(high, straight))), (0, MEDIAN_BUCKET, 255))


def flow_to_bucket(flow: float, short_side: int) -> int:
    """Return the bucket, in 0..255, of a mean flow in pixels per frame."""
    return LINEAR.bucket(flow / short_side)


def bucket_to_flow(bucket: float, short_side: int) -> float:
    """Return the mean flow in pixels per frame that a bucket asks for."""
    return LINEAR.speed(bucket) * short_side


def optical_flow(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Estimate dense flow between neighbours by Farneback's method (2003).

    Args:
        frames: (t, h, w, 3) RGB.

    Returns:
        (t - 1, h, w, 2): the (x, y) displacement in pixels of each pixel of frame i on its way to
        frame i + 1.

    Raises:
        ValueError: OpenCV is not installed.
    """
    cv2 = opencv()
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    return np.stack(
        [cv2.calcOpticalFlowFarneback(a, b, None, **FARNEBACK) for a, b in pairwise(grey)]
    )


def mean_flow(flow: npt.NDArray[np.float32]) -> float:
    """Return the mean magnitude of a flow field (..., 2), in its own unit."""
    return float(np.linalg.norm(flow, axis=-1).mean())


def clip_speed(frames: npt.NDArray[np.uint8]) -> float:
    """Return a clip's speed: its mean flow in short sides per frame.

    Larger frames are measured at a short side of 64 pixels: the estimate looks for motion in
    windows of fixed size, so that it finds less of the same motion in a larger picture, and a
    bucket should mean the same in all sizes.

    Args:
        frames: (t, h, w, 3) RGB.

    Raises:
        ValueError: OpenCV is not installed.
    """
    cv2 = opencv()
    h, w = frames.shape[1:3]
    scale = FLOW_SIDE / min(h, w)
    if scale < 1:
        size = round(w * scale), round(h * scale)
        frames = np.stack([cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in frames])
    return mean_flow(optical_flow(frames)) / min(frames.shape[1:3])


def opencv() -> Any:
    """Import OpenCV, or raise a ValueError that says how to install it.

    It is told to work in one thread: on pictures as small as those here more threads gain nothing,
    and on a busy machine they wait for each other.
    """
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            "measuring motion needs OpenCV, which is not installed: "
            "pip install opencv-python-headless"
        ) from error
    _work_in_one_thread(cv2)
    return cv2


@cache
def _work_in_one_thread(cv2: Any) -> None:
    cv2.setNumThreads(1)  # takes milliseconds
