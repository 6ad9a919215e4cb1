"""Which half type is nearer to float32 on trained weights: what the default type rests on."""

import numpy as np
import pytest
import torch
from PIL import Image

from sgm.inference import SamplingOptions, VideoPipeline
from sgm.inference.dtypes import default_dtype
from sgm.inference.specs import ROOT

HALF_TYPES = ("float16", "bfloat16")


@pytest.fixture(scope="module")
def videos():
    """The final latents and the frames of the bundled model, by type of the U-Net."""

    def run(dtype):
        pipeline = VideoPipeline.from_spec("svd_tiny", device="cpu", dtype=dtype)
        latents = []
        options = SamplingOptions(num_frames=3, num_steps=4, seed=3)
        with Image.open(ROOT / "assets" / "sample.jpg") as picture:
            video = pipeline(picture, options, callback=lambda p: latents.append(p.latents))
        return [x for x in latents if x is not None][-1].float(), np.asarray(video.frames)

    return {dtype: run(dtype) for dtype in ("float32", *HALF_TYPES)}


@pytest.fixture(scope="module")
def errors(videos):
    """The relative error of the final latents, by half type."""
    truth = videos["float32"][0]
    return {
        dtype: ((videos[dtype][0] - truth).norm() / truth.norm()).item() for dtype in HALF_TYPES
    }


def test_float16_is_the_nearer_half_type(errors):
    """Three more bits of fraction: up to eight times nearer, if nothing overflows.

    Catches: a part that is kept in bfloat16 whatever was asked, noise drawn in the half type.
    """
    assert 0 < 3 * errors["float16"] < errors["bfloat16"] < 0.05


def test_default_type_of_an_accelerator_is_the_nearer_one(errors):
    nearer = min(errors, key=errors.__getitem__)
    assert default_dtype(torch.device("cuda")) is getattr(torch, nearer)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_half_types_give_the_frames_of_float32(videos, dtype):
    """Catches: black frames from an autoencoder that overflows, a type that drifts.

    On average two of 255 levels: what rounding alone changes, also in the decoder.
    """
    expected, frames = (videos[name][1].astype(float) for name in ("float32", dtype))
    assert np.abs(frames - expected).mean() < 2
