"""A picture and settings become the conditioning of the U-Net.

The only place that knows how frame rate, motion, noise and camera reach the embedders.
Shapes: t frames, h height, w width.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sgm.inference.settings import Settings
from sgm.modules.encoders.conditioner import Conditioning, GeneralConditioner

PICTURE_KEYS = ("cond_frames", "cond_frames_without_noise")


def make_batch(
    picture: Tensor, settings: Settings, aug_noise: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """Everything that an embedder of the published models asks for.

    Args:
        picture: (3, h, w) in [-1, 1].
        settings: the run.
        aug_noise: (3, h, w), standard normal; ``cond_aug`` of it is added to the picture.
        device: where the entries go.
    """
    options, frames = settings.options, settings.frames
    cond_aug = float(options.cond_aug or 0.0)
    clean = picture[None]

    def per_frame(value: float) -> Tensor:
        return torch.full((frames,), value, dtype=torch.float32)

    batch = {
        "cond_frames_without_noise": clean,
        "cond_frames": clean + cond_aug * aug_noise[None],
        "cond_aug": per_frame(cond_aug),
        "fps_id": per_frame(float(options.fps_id or 0)),
        "motion_bucket_id": per_frame(float(options.motion_bucket_id)),
        **camera_path(options.elevations_deg, options.azimuths_deg, frames),
    }
    return {key: value.to(device) for key, value in batch.items()}


def camera_path(
    elevations_deg: tuple[float, ...] | None, azimuths_deg: tuple[float, ...] | None, frames: int
) -> dict[str, Tensor]:
    """The camera of an orbit, as SV3D was trained (arXiv 2403.12008, section 3).

    The last frame is the given picture: azimuths count from it.

    Args:
        elevations_deg: one angle for all frames or one each; 10 degrees where None.
        azimuths_deg: one angle per frame; a full even turn where None.
        frames: t.

    Returns:
        ``polars_rad`` (90 degrees less the elevation) and ``azimuths_rad`` in [0, 2 pi), each (t,).
    """
    elevations = list(elevations_deg or (10.0,))
    if len(elevations) == 1:
        elevations *= frames
    azimuths = list(azimuths_deg or (360.0 * (i + 1) / frames for i in range(frames)))
    turned = [(azimuth - azimuths[-1]) % 360.0 for azimuth in azimuths]
    return {
        "polars_rad": torch.tensor([math.radians(90.0 - e) for e in elevations]),
        "azimuths_rad": torch.tensor([math.radians(a) for a in turned]),
    }


def embed(
    conditioner: GeneralConditioner, batch: Mapping[str, Tensor], frames: int
) -> tuple[Conditioning, Conditioning]:
    """Conditioning with the picture and without it, one row per frame.

    The unconditional half has a zero picture, and keeps frame rate, motion and camera.
    """
    c, uc = conditioner.get_unconditional_conditioning(batch, force_uc_zero_embeddings=PICTURE_KEYS)
    for half in (c, uc):
        for place in ("crossattn", "concat"):
            if place in half:
                half[place] = half[place].repeat_interleave(frames, dim=0)
    return c, uc
