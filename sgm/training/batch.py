"""The conditioning of a training batch, drawn once per clip.

A clip of one frame is a picture: layers over time pass it through. Shapes: b clips, t frames, k
draws of the condition frame's noise, z latent channels, f the downsampling factor, h height, w
width, d width of CLIP's embedding.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sgm.modules.draws import draw

# Input keys of the embedders of the condition frame: CLIP's and the autoencoder's.
PICTURE, NOISY = "cond_frames_without_noise", "cond_frames"


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
    level = (aug_mean + aug_std * draw(torch.randn, (b,), generator)).exp()
    noise = draw(torch.randn, first_frame.shape, generator)
    level, noise = level.to(first_frame.device), noise.to(first_frame.device)
    return {
        **scalars,
        PICTURE: first_frame,
        NOISY: first_frame + level[:, None, None, None] * noise,
        "cond_aug": level,
        **_frames(num_frames, level),
    }


def precomputed_batch(
    batch: Mapping[str, Tensor], num_frames: int, generator: torch.Generator
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Make the same from conditions that were computed beforehand.

    Args:
        batch: ``cond_latents`` (b, k, z, h / f, w / f), of frames with noise of the levels
            ``cond_aug`` (b, k), of which one is drawn; or without k where there is one of each. And
            ``image_embedding`` (b, d).
        num_frames: t.
        generator: source of the draw, on the CPU.

    Returns:
        Entries for the network and the conditioner; embeddings by the input keys of the embedders
        whose results they are.
    """
    latents, level = batch["cond_latents"], batch["cond_aug"]
    if level.ndim == 2:
        b, k = level.shape
        chosen = draw(partial(torch.randint, k), (b,), generator).to(level.device)
        clips = torch.arange(b, device=level.device)
        latents, level = latents[clips, chosen], level[clips, chosen]
    given = {PICTURE: batch["image_embedding"].float()[:, None], NOISY: latents.float()}
    return {"cond_aug": level.float(), **_frames(num_frames, level)}, given


def _frames(num_frames: int, like: Tensor) -> dict[str, Any]:
    """What the network is told of the frames of (b,) clips."""
    single = torch.full((len(like), num_frames), float(num_frames == 1), device=like.device)
    return {"num_video_frames": num_frames, "image_only_indicator": single}
