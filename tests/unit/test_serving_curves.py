"""Curves of a run, against what the run's own parts are seen to do and numbers worked out by hand.

The sampler and the guider under test are those that sampling itself builds.
"""

import math

import pytest
import torch

from sgm.inference.options import SAMPLERS, SamplingOptions
from sgm.inference.settings import read_config, resolve
from sgm.inference.specs import SPECS, find_config
from sgm.serving.curves import camera_path, guidance, noise_levels
from sgm.util import instantiate_from_config


def settings(version="svd_tiny", **options):
    config, spec = read_config(find_config(version)), SPECS[version]
    return resolve(SamplingOptions(**options), config, spec, (64, 64))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_levels_are_those_that_the_steps_begin_with(sampler):
    """Catches: a schedule of another sampler (LCM has its own), the YAML's number of steps."""
    decided = settings(sampler=sampler, num_steps=5)
    seen = []

    def after_step(_step, _total, sigma, _estimate):
        seen.append(sigma)

    sample = instantiate_from_config(decided.sampler_config)
    sample(lambda x, *_: x / 2, torch.ones(3, 1), {}, {}, 5, num_frames=3, callback=after_step)
    assert noise_levels(decided) == [*seen, 0.0]
    assert len(seen) == 5


def test_noise_levels_of_the_published_schedule():
    """Karras et al. 2022, equation 5, worked out here: 700 to 0.002, rho 7."""
    levels = noise_levels(settings("svd", num_steps=3))
    middle = ((700 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert levels == pytest.approx([700, middle, 0.002, 0], rel=1e-4)


@pytest.mark.parametrize(
    ("version", "options", "expected"),
    [
        ("svd", {}, [1, 1.375, 1.75, 2.125, 2.5]),
        ("svd", {"max_guidance": 5.0, "min_guidance": 3.0}, [3, 3.5, 4, 4.5, 5]),
        ("sv3d_u", {}, [1, 1.75, 2.5, 1.75, 1]),
        ("svd", {"guidance_shape": "constant", "max_guidance": 4.0}, [4] * 5),
        ("svd", {"guidance_shape": "none"}, None),
        ("svd_xt_lcm", {}, None),
    ],
)
def test_guidance_of_each_frame(version, options, expected):
    """Catches: a second formula, the YAML's scales in place of the flags', a scale of no guider."""
    found = guidance(settings(version, **options, num_frames=5), 5)
    assert found == (None if expected is None else pytest.approx(expected))


def test_camera_goes_round_once_and_ends_at_the_picture():
    """Catches: a default path of the plot's own, z and y exchanged, radians."""
    path = camera_path(settings("sv3d_u", num_frames=4))
    assert path.azimuths == pytest.approx([90, 180, 270, 0], abs=1e-4)
    assert path.elevations == pytest.approx([10] * 4, abs=1e-4)
    low, high = math.cos(math.radians(10)), math.sin(math.radians(10))
    expected = [(0, low, high), (-low, 0, high), (0, -low, high), (low, 0, high)]
    for point, wanted in zip(path.xyz, expected, strict=True):
        assert point == pytest.approx(wanted, abs=1e-6)


def test_given_angles_are_the_path():
    asked = {"elevations_deg": (90.0, -30.0), "azimuths_deg": (30.0, 120.0)}
    path = camera_path(settings("sv3d_p", num_frames=2, **asked))
    assert path.elevations == pytest.approx([90, -30], abs=1e-4)
    assert path.azimuths == pytest.approx([270, 0], abs=1e-4)
    assert path.xyz[0] == pytest.approx((0, 0, 1), abs=1e-6)
    assert path.xyz[1] == pytest.approx((math.sqrt(3) / 2, 0, -0.5), abs=1e-6)
