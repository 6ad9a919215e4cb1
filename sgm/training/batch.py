"""The conditioning of a training batch, drawn once per clip.

Shapes: b clips, t frames, h height, w width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def condition_batch(
    first_frame: Tensor,
    scalars: Mapping[str, Tensor],
    num_frames: int,
    generator: torch.Generator,
    aug_mean: float = -3.0,
    aug_std: float = 0.5,
) -> dict[str, Any]:
    """Make what the conditioner and the network take from first frames and their numbers.

    Noise of level s, ``ln s ~ N(aug_mean, aug_std^2)``, is added to the frame that becomes the
    condition latents, and s itself is the conditioning ``cond_aug`` (SVD, arXiv 2311.15127,
    appendix D). CLIP sees the frame without noise.

    Args:
        first_frame: (b, 3, h, w) in [-1, 1].
        scalars: further conditionings by name, each (b,): ``fps_id``, ``motion_bucket_id``.
        num_frames: t.
        generator: source of all draws, on the CPU.
        aug_mean: mean of the logarithm of the noise level.
        aug_std: standard deviation of the logarithm.
    """
    b = len(first_frame)
    level = (aug_mean + aug_std * torch.randn(b, generator=generator)).exp()
    noise = torch.randn(first_frame.shape, generator=generator)
    level, noise = level.to(first_frame.device), noise.to(first_frame.device)
    return {
        **scalars,
        "cond_frames_without_noise": first_frame,
        "cond_frames": first_frame + level[:, None, None, None] * noise,
        "cond_aug": level,
        "num_video_frames": num_frames,
        "image_only_indicator": torch.zeros(b, num_frames, device=first_frame.device),
    }
