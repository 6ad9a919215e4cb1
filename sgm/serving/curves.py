"""What a run will do, as numbers for a plot, from the parts that will do it; no model is loaded."""

import math
from dataclasses import dataclass

from sgm.inference import conditioning
from sgm.inference.settings import Settings
from sgm.modules.diffusionmodules.guiders import ScaledGuider
from sgm.modules.diffusionmodules.sampling import BaseDiffusionSampler
from sgm.util import instantiate_from_config


@dataclass(frozen=True)
class CameraPath:
    """Where the camera of an orbit stands, frame by frame.

    Attributes:
        elevations: height over the object's horizon, in degrees.
        azimuths: angle around the object in [0, 360), in degrees; the given picture's is 0.
        xyz: on the unit sphere around the object; z is up, x towards azimuth 0, y towards 90.
    """

    elevations: list[float]
    azimuths: list[float]
    xyz: list[tuple[float, float, float]]


def noise_levels(settings: Settings) -> list[float]:
    """The noise levels that the run's steps begin with, falling, and the zero that it ends with.

    Raises:
        ValueError: a number of steps that the schedule does not have.
    """
    return _sampler(settings).noise_levels(settings.options.num_steps or 0)


def guidance(settings: Settings, frames: int) -> list[float] | None:
    """The guidance scale of each of a video's frames; None where the run has no guidance.

    Raises:
        ValueError: the YAML lists scales for another number of frames.
    """
    guider = _sampler(settings).guider
    if not isinstance(guider, ScaledGuider):
        return None
    scales: list[float] = guider.frame_scales(frames).tolist()
    return scales


def camera_path(settings: Settings) -> CameraPath:
    """The orbit that SV3D is told, or would be where the model has one path alone."""
    options = settings.options
    path = conditioning.camera_path(options.elevations_deg, options.azimuths_deg, settings.frames)
    polars, azimuths = path["polars_rad"].tolist(), path["azimuths_rad"].tolist()
    return CameraPath(
        elevations=[90 - math.degrees(polar) for polar in polars],
        azimuths=[math.degrees(azimuth) for azimuth in azimuths],
        xyz=[
            (
                math.sin(polar) * math.cos(azimuth),
                math.sin(polar) * math.sin(azimuth),
                math.cos(polar),
            )
            for polar, azimuth in zip(polars, azimuths, strict=True)
        ],
    )


def _sampler(settings: Settings) -> BaseDiffusionSampler:
    sampler: BaseDiffusionSampler = instantiate_from_config(settings.sampler_config)
    return sampler
