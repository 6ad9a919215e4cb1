"""The embedders under the names that published YAML files use."""

from sgm.modules.encoders.clip_image import (
    FrozenOpenCLIPImageEmbedder,
    FrozenOpenCLIPImagePredictionEmbedder,
)
from sgm.modules.encoders.conditioner import GeneralConditioner
from sgm.modules.encoders.timestep import ConcatTimestepEmbedderND
from sgm.modules.encoders.video import VideoPredictionEmbedderWithEncoder

__all__ = [
    "ConcatTimestepEmbedderND",
    "FrozenOpenCLIPImageEmbedder",
    "FrozenOpenCLIPImagePredictionEmbedder",
    "GeneralConditioner",
    "VideoPredictionEmbedderWithEncoder",
]
