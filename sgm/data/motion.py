"""The motion bucket and what it means in pixels.

The SVD paper (arXiv 2311.15127, appendix) conditions on a motion score taken from optical flow but
publishes no map to the bucket 0..255. The map here is linear::

    bucket = 255 * speed / 0.010,    speed = mean |flow| / short side

with the flow in pixels per frame at the clip's own rate, averaged over pixels and frame pairs.
Bucket 127 is about 0.3 pixels per frame in a picture of 64 pixels, 2.9 in one of 576.
"""

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


def flow_to_bucket(flow: float, short_side: int) -> int:
    """Return the bucket, in 0..255, of a mean flow in pixels per frame."""
    return min(round(MAX_BUCKET * flow / (MAX_SPEED * short_side)), MAX_BUCKET)


def bucket_to_flow(bucket: float, short_side: int) -> float:
    """Return the mean flow in pixels per frame that a bucket asks for."""
    return bucket / MAX_BUCKET * MAX_SPEED * short_side


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


def opencv() -> Any:
    """Import OpenCV, or raise a ValueError that says how to install it."""
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            "measuring motion needs OpenCV, which is not installed: "
            "pip install opencv-python-headless"
        ) from error
    return cv2
