"""The one path from a picture to a video: options, media, pipeline. Names load when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgm.inference.options import SamplingOptions as SamplingOptions
    from sgm.inference.pipeline import VideoPipeline as VideoPipeline
    from sgm.inference.videos import Video as Video

__all__ = ["SamplingOptions", "Video", "VideoPipeline"]

_HOMES = {
    "SamplingOptions": "sgm.inference.options",
    "Video": "sgm.inference.videos",
    "VideoPipeline": "sgm.inference.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
