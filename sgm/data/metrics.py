"""What is measured on a generated clip: fidelity, motion, coherence, sharpness, colour.

Pictures are uint8 RGB (h, w, 3), clips (t, h, w, 3). Flow is measured as in :mod:`sgm.data.motion`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sgm.data.motion import mean_flow, opencv, optical_flow

Frames = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ClipMeasures:
    """The measures of one clip, each by the function of its name."""

    psnr: float
    flow: float
    explained: float
    sharpness: float
    drift: tuple[float, float, float]


def measure_clip(frames: Frames, picture: Frames) -> ClipMeasures:
    """Measure a clip that was made from ``picture``, of the same size as its frames."""
    red, green, blue = colour_drift(frames).tolist()
    return ClipMeasures(
        psnr=psnr(frames[0], picture),
        flow=mean_flow(optical_flow(frames)),
        explained=explained_variance(frames),
        sharpness=sharpness(frames[-1]) / max(sharpness(frames[0]), 1e-6),
        drift=(red, green, blue),
    )


def psnr(a: Frames, b: Frames) -> float:
    """Return the peak signal-to-noise ratio of two pictures or clips in dB; infinite if equal."""
    if a.shape != b.shape:
        raise ValueError(f"expected two pictures of one shape, got {a.shape} and {b.shape}")
    error = np.square(a.astype(np.float64) - b).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def explained_variance(frames: Frames) -> float:
    """Return how much of each frame's variance its predecessor, moved by the flow, explains.

    Frame i + 1 is predicted at each pixel by frame i at the place where the flow from i + 1 to i
    points; pixels that come from outside frame i are left out. The result is
    1 - (squared error) / (variance about each channel's mean), averaged over the pairs.
    """
    cv2 = opencv()
    y, x = np.indices(frames.shape[1:3], dtype=np.float32)
    inside = np.array(frames.shape[2:0:-1]) - 1
    scores = []
    for before, after in pairwise(frames):
        flow = optical_flow(np.stack([after, before]))[0]
        source = np.stack([x, y], axis=-1) + flow
        moved = cv2.remap(before, source, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        known = ((source >= 0) & (source <= inside)).all(axis=-1)
        actual = after[known].astype(np.float64)
        spread = np.square(actual - actual.mean(axis=0)).sum()
        scores.append(1 - np.square(actual - moved[known]).sum() / max(spread, 1e-6))
    return float(np.mean(scores))


def sharpness(picture: Frames) -> float:
    """Return the variance of the Laplacian of the grey picture after a 1-pixel blur."""
    cv2 = opencv()
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float64)
    return float(cv2.Laplacian(cv2.GaussianBlur(grey, (0, 0), 1.0), cv2.CV_64F).var())


def colour_drift(frames: Frames) -> Floats:
    """Return the change (3,) of each channel's mean from the first frame to the last, of 255."""
    return frames[-1].mean(axis=(0, 1)) - frames[0].mean(axis=(0, 1))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation, ties sharing their mean rank; 0 if one is constant."""
    x, y = (ranks - ranks.mean() for ranks in (_ranks(a), _ranks(b)))
    norm = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / norm if norm else 0.0


def _ranks(values: Sequence[float]) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
