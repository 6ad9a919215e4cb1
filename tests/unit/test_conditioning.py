"""The camera of an orbit and the batch, against numbers worked out by hand."""

import math

import pytest
import torch

from sgm.inference.conditioning import camera_path, make_batch
from sgm.inference.options import SamplingOptions
from sgm.inference.settings import resolve
from sgm.inference.specs import SPECS

NATIVE = (64, 64)


def settings(**options):
    return resolve(SamplingOptions(num_frames=4, **options), {}, SPECS["sv3d_p"], NATIVE)


def test_even_turn_ends_at_the_given_picture():
    """Caught: a turn that starts at the picture, azimuths not relative to the last frame."""
    path = camera_path(None, None, 4)
    torch.testing.assert_close(path["azimuths_rad"], torch.tensor([0.5, 1.0, 1.5, 0.0]) * math.pi)
    torch.testing.assert_close(path["polars_rad"], torch.full((4,), math.radians(80.0)))


def test_given_angles_are_relative_to_the_last_and_in_one_turn():
    """Caught: no wrap to [0, 2 pi), elevation in place of the polar angle."""
    path = camera_path((0.0, 30.0, -10.0), (10.0, 400.0, 20.0), 3)
    expected = torch.tensor([350.0, 20.0, 0.0]).deg2rad()
    torch.testing.assert_close(path["azimuths_rad"], expected)
    torch.testing.assert_close(path["polars_rad"], torch.tensor([90.0, 60.0, 100.0]).deg2rad())


@pytest.mark.parametrize(
    ("name", "angles"), [("azimuths_deg", [1.0]), ("elevations_deg", [1.0, 2.0])]
)
def test_a_wrong_number_of_angles_is_refused(name, angles):
    with pytest.raises(ValueError, match=f"{name} must hold"):
        settings(**{name: angles})


def test_the_batch_says_what_the_embedders_ask_for():
    """Caught: noise scaled by another number than cond_aug, CLIP given the noisy picture."""
    picture, noise = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    decided = settings(cond_aug=0.5, fps=11, motion_bucket_id=9)
    batch = make_batch(picture, decided, noise, torch.device("cpu"))
    assert torch.equal(batch["cond_frames"], torch.full((1, 3, 8, 8), 0.5))
    assert torch.equal(batch["cond_frames_without_noise"], torch.zeros(1, 3, 8, 8))
    for key, value in {"cond_aug": 0.5, "fps_id": 10.0, "motion_bucket_id": 9.0}.items():
        assert torch.equal(batch[key], torch.full((4,), value))
