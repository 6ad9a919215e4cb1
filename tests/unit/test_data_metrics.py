"""The measures against closed-form cases: moved textures, known noise, known ranks."""

import cv2
import numpy as np
import pytest

from sgm.data import metrics
from sgm.data.motion import bucket_to_flow, flow_to_bucket, mean_flow, optical_flow


def texture(seed: int, size: int = 160) -> np.ndarray:
    """A smooth random picture with details of a few pixels."""
    noise = np.random.default_rng(seed).normal(size=(size, size, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.5)
    return np.clip(127 + 55 * smooth / smooth.std(), 0, 255)


def moving(dx: float, dy: float, frames: int = 5, size: int = 64) -> np.ndarray:
    """A window that slides over the texture: the content moves by (-dx, -dy) per frame."""
    picture = texture(0)
    views = [
        cv2.warpAffine(
            picture, np.float32([[1, 0, -30 - i * dx], [0, 1, -30 - i * dy]]), (size, size)
        )
        for i in range(frames)
    ]
    return np.round(views).astype(np.uint8)


def test_bucket_is_linear_in_the_relative_speed():
    # Catches another short side, scale or clamp: 0.005 of 64 px is 0.32 px, half of the top.
    assert flow_to_bucket(0.32, 64) == 128
    assert flow_to_bucket(0.0, 64) == 0
    assert flow_to_bucket(100.0, 64) == 255
    assert flow_to_bucket(2.88, 576) == flow_to_bucket(0.32, 64)
    assert bucket_to_flow(127, 64) == pytest.approx(0.3187, abs=1e-4)
    assert [flow_to_bucket(bucket_to_flow(b, 96), 96) for b in range(256)] == list(range(256))


@pytest.mark.parametrize(("dx", "dy"), [(1.0, 0.0), (0.0, -1.5), (0.6, 0.8)])
def test_flow_of_a_translated_texture(dx, dy):
    # Catches swapped axes, a sign, frames taken in the wrong order.
    flow = optical_flow(moving(dx, dy))
    assert flow.shape == (4, 64, 64, 2)
    inner = flow[:, 12:-12, 12:-12].mean(axis=(0, 1, 2))
    np.testing.assert_allclose(inner, (-dx, -dy), atol=0.06)
    assert mean_flow(flow) == pytest.approx(np.hypot(dx, dy), rel=0.1)


def test_psnr_of_a_known_error():
    # An error of 5 levels everywhere: 20 log10(255 / 5) dB. Catches uint8 wrap-around.
    low = np.full((8, 8, 3), 3, np.uint8)
    assert metrics.psnr(low, low + 5) == pytest.approx(20 * np.log10(51))
    assert metrics.psnr(low + 5, low) == pytest.approx(20 * np.log10(51))
    assert metrics.psnr(low, low) == np.inf
    with pytest.raises(ValueError, match="one shape"):
        metrics.psnr(low, low[:4])


def test_motion_explains_a_moved_texture_and_not_another_picture():
    clip = moving(1.2, -0.7)
    assert metrics.explained_variance(clip) > 0.98
    dissolved = np.stack([np.uint8(texture(seed)[:64, :64]) for seed in range(3)])
    assert metrics.explained_variance(dissolved) < 0.6


def test_explained_variance_counts_noise_as_its_share():
    # Independent noise of variance v on both frames of a still scene of variance s leaves
    # 1 - 2 v / (s + v). Catches a missing square or a division by the wrong frame.
    rng = np.random.default_rng(1)
    still = np.repeat(moving(0, 0, frames=1), 2, axis=0).astype(np.float64)
    noisy = np.clip(still + rng.normal(0, 12, still.shape), 0, 255).round().astype(np.uint8)
    spread = still[0].var(axis=(0, 1)).mean()
    assert metrics.explained_variance(noisy) == pytest.approx(1 - 288 / (spread + 144), abs=0.03)


def test_sharpness_of_a_sine_is_the_analytic_one():
    # For A sin(wx): the blur multiplies by exp(-w^2 / 2), the discrete Laplacian by 2 - 2 cos w.
    period, amplitude = 8, 60
    w = 2 * np.pi / period
    row = 128 + amplitude * np.sin(w * np.arange(128))
    picture = np.repeat(np.tile(row, (128, 1)).round().astype(np.uint8)[..., None], 3, axis=-1)
    expected = (amplitude * np.exp(-(w**2) / 2) * (2 - 2 * np.cos(w))) ** 2 / 2
    assert metrics.sharpness(picture) == pytest.approx(expected, rel=0.05)


def test_colour_drift_is_signed_and_per_channel():
    frames = np.full((4, 6, 6, 3), 100, np.uint8)
    frames[-1] += np.array([0, 7, 0], np.uint8)
    frames[-1, ..., 2] = 96
    np.testing.assert_allclose(metrics.colour_drift(frames), (0, 7, -4))


def test_rank_correlation():
    # Spearman by hand; catches Pearson on the values, and ties broken by position.
    assert metrics.rank_correlation([1, 2, 3, 4, 5], [1, 10, 11, 500, 501]) == pytest.approx(1)
    assert metrics.rank_correlation([1, 2, 3, 4, 5], [5, 4, 3, 2, 1]) == pytest.approx(-1)
    assert metrics.rank_correlation([1, 2, 3, 4, 5], [1, 2, 3, 5, 4]) == pytest.approx(0.9)
    assert metrics.rank_correlation([1, 2, 3], [1, 2, 2]) == pytest.approx(np.sqrt(3) / 2)
    assert metrics.rank_correlation([1, 2, 3], [4, 4, 4]) == 0


def test_measure_clip_gathers_the_measures_of_the_right_frames():
    clip = moving(1.0, 0.0)
    measured = metrics.measure_clip(clip, clip[0])
    assert measured.psnr == np.inf
    assert measured.flow == pytest.approx(1, rel=0.1)
    assert measured.explained > 0.98
    assert measured.sharpness == pytest.approx(
        metrics.sharpness(clip[-1]) / metrics.sharpness(clip[0])
    )
    np.testing.assert_allclose(measured.drift, metrics.colour_drift(clip))
