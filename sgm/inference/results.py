"""What leaves the pipeline: frames in the form that was asked for, judged and marked."""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgm.inference import watermark
from sgm.inference.options import SamplingOptions
from sgm.inference.progress import Callback, Progress, report
from sgm.inference.safety import FRAMES_AT_ONCE, SafetyFilter, blur
from sgm.inference.videos import Frames, Video

logger = logging.getLogger(__name__)


def to_frames(pixels: Tensor) -> Frames:
    """8-bit pictures: (..., 3, h, w) in [-1, 1] -> uint8 (..., h, w, 3), clipped and rounded."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round_().to(torch.uint8)
    return np.ascontiguousarray(levels.movedim(-3, -1).cpu().numpy())


def in_form(
    frames: Tensor,
    latents: Tensor,
    options: SamplingOptions,
    judge: SafetyFilter | None,
    callback: Callback | None,
) -> Any:
    """Frames (t, 3, h, w) in [-1, 1] in the form that ``options.output`` names.

    Raises:
        SamplingStopped: the callback ended the run.
    """
    match options.output:
        case "tensor":
            return (frames + 1) / 2
        case "numpy":
            return ((frames + 1) / 2).permute(0, 2, 3, 1).numpy()
    shown = to_frames(frames)
    flagged = _finding(judge, shown, callback)
    if flagged:
        logger.warning("the safety filter has found something: the video is blurred")
        shown = blur(shown)
    # Last, so that a blurred video carries it too.
    shown = watermark.embed(shown) if options.watermark else shown
    return Video(shown, options.fps, None if flagged else latents, flagged)


def _finding(judge: SafetyFilter | None, frames: Frames, callback: Callback | None) -> bool | None:
    """Whether the safety filter finds something in (t, h, w, 3); None without a filter.

    The last report of decoding is repeated meanwhile, for a callback may end the run.
    """
    if judge is None:
        return None
    found = False
    for first in range(0, len(frames), FRAMES_AT_ONCE):
        found = found or judge.flags(frames[first : first + FRAMES_AT_ONCE])
        report(callback, Progress("decoding", len(frames), len(frames)))
    return found
