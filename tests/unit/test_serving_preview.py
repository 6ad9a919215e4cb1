"""The map from latents to colours, on maps that are known and on the bundled model."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sgm.inference import SamplingOptions, VideoPipeline
from sgm.inference.settings import ModelFiles
from sgm.inference.specs import ROOT, SPECS
from sgm.serving.preview import LatentPreview
from tests.tiny import tiny_config, tiny_engine

PICTURE = ROOT / "assets" / "sample.jpg"


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def levels(colours):
    """(..., 3) in [-1, 1] -> 0 to 255, not rounded."""
    return (colours.double().clamp(-1, 1) + 1).numpy() * 127.5


@pytest.mark.parametrize(("channels", "factor"), [(4, 8), (16, 4), (3, 6)])
def test_colours_of_a_known_map_are_found(channels, factor):
    """Catches: transposed channels, a picture that is sampled in place of averaged, no offset."""
    matrix, offset = 0.2 * normal(3, channels, seed=1), torch.tensor([0.3, -0.1, -0.4])

    def colours(latents):  # (t, z, h, w) -> (t, h, w, 3)
        return torch.einsum("cz,tzhw->thwc", matrix, latents) + offset

    latents, others = normal(channels, 24, 40) + 0.5, normal(2, channels, 9, 7, seed=2)
    pixels = colours(latents[None])[0].permute(2, 0, 1)
    pixels = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    pixels += 2.0 * (torch.arange(pixels.shape[2]) % 2) - 1.0  # stripes, grey on average
    shown = LatentPreview.fit(latents, pixels).frames(others)
    assert shown.shape == (2, 9, 7, 3)
    assert shown.dtype == np.uint8
    # Half a level of rounding, and a penalty of one part in the number of places.
    np.testing.assert_allclose(shown, levels(colours(others)), rtol=0, atol=1.5)


def test_what_neighbours_tell_is_used():
    """Catches: a kernel of one place, turned or mirrored; edges that are not shown."""
    kernel = torch.zeros(3, 2, 3, 3)
    kernel[0, 0, 0, 1], kernel[1, 1, 1, 2], kernel[2, 0, 2, 0] = 0.3, 0.3, 0.3

    def colours(latents):
        padded = F.pad(latents, (1, 1, 1, 1), mode="replicate")
        return F.conv2d(padded, kernel).permute(0, 2, 3, 1)

    latents, others = normal(2, 32, 32), normal(3, 2, 8, 8, seed=3)
    shown = LatentPreview.fit(latents, colours(latents[None])[0].permute(2, 0, 1)).frames(others)
    np.testing.assert_allclose(shown, levels(colours(others)), rtol=0, atol=1.5)


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1.0])
def test_a_picture_of_one_colour_shows_that_colour(noise):
    """Catches: a system without a solution, weights that blow up what is next to nothing."""
    pixels = torch.tensor([1.0, -1.0, 0.2])[:, None, None].expand(3, 64, 64)
    shown = LatentPreview.fit(0.7 + noise * normal(4, 8, 8), pixels).frames(normal(2, 4, 8, 8))
    np.testing.assert_array_equal(shown, np.broadcast_to([255, 0, 153], shown.shape))


@pytest.mark.parametrize(("channels", "side"), [(64, 2), (4, 6)])
def test_few_places_do_not_show_wild_colours_elsewhere(channels, side):
    """Catches: an exact fit to no more places than weights, here five times the picture's range."""
    latents, others = normal(channels, side, side), normal(20, channels, side, side, seed=10)
    pixels = 0.1 * (2 * (torch.arange(side * side) % 2) - 1).float().view(1, side, side)
    preview = LatentPreview.fit(latents, pixels.expand(3, -1, -1))
    own, wanted = preview.frames(latents[None])[0], levels(pixels.permute(1, 2, 0))
    contrast = np.abs(wanted - 127.5).mean()
    assert np.abs(own - wanted).mean() < 0.5 * contrast
    assert np.sqrt(np.square(preview.frames(others) - 127.5).mean()) < 2 * contrast


def test_latents_that_are_not_finite_are_shown_as_well():
    """Catches: a preview that ends a run in other words than the pipeline's own."""
    latents = normal(1, 4, 8, 8)
    latents[0, :, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0])
    shown = LatentPreview.fit(latents[0], torch.zeros(3, 8, 8)).frames(latents)
    np.testing.assert_array_equal(shown, 128)


def run(pipeline, **options):
    """The video, and all reports on the way to it."""
    reports = []
    video = pipeline(PICTURE, SamplingOptions(**options), callback=reports.append)
    return video, reports


def test_frames_of_the_bundled_model_are_foretold():
    """Catches: latents in another scale than the sampled ones, another picture than the model's.

    With all ten steps of a longer run the correlation is 0.987, the error a sixth of grey's.
    """
    pipeline = VideoPipeline.from_spec("svd_tiny", device="cpu", dtype="float32")
    video, reports = run(pipeline, num_steps=4, num_frames=6)
    (encoded,) = (each for each in reports if each.picture is not None)
    assert (encoded.stage, encoded.step) == ("encoding", 1)
    preview = LatentPreview.fit(encoded.picture_latents, encoded.picture)
    frames = torch.tensor(video.frames).permute(0, 3, 1, 2).double()
    true = F.interpolate(frames, (16, 16), mode="area").permute(0, 2, 3, 1).numpy()

    def error(shown):
        return np.sqrt(np.square(shown - true).mean())

    shown = preview.frames(video.latents)
    assert np.corrcoef(shown.ravel(), true.ravel())[0, 1] > 0.97
    assert error(shown) < error(127.5) / 4
    assert error(shown) < error(true.mean((0, 1, 2))) / 4
    # Half-way, it is nearer to the end than to the input picture.
    (halfway,) = (each for each in reports if (each.stage, each.step) == ("sampling", 2))
    assert error(preview.frames(halfway.latents)) < error(
        preview.frames(encoded.picture_latents[None])
    )

    # The autoencoder's own latents, which it draws about the mean that the conditioning has.
    own = pipeline.engine.encode_first_stage(encoded.picture[None])[0]
    ratio = (own * encoded.picture_latents).sum() / encoded.picture_latents.square().sum()
    assert float(ratio) == pytest.approx(1, abs=0.02)


def test_watching_changes_no_frame(tmp_path):
    """Catches: a report whose tensors are the run's own, a draw that depends on being watched."""
    config = tiny_config(scale_factor=0.5)["model"]
    files = ModelFiles(SPECS["svd_tiny"], tmp_path, config, tmp_path)
    pipeline = VideoPipeline(tiny_engine(scale_factor=0.5), files, "cpu", torch.float32)

    def watch(progress):
        if progress.picture is not None:
            progress.picture.zero_()
            progress.picture_latents.zero_()

    alone = pipeline(PICTURE, SamplingOptions(num_steps=2))
    watched = pipeline(PICTURE, SamplingOptions(num_steps=2), callback=watch)
    np.testing.assert_array_equal(watched.frames, alone.frames)
    _, reports = run(pipeline, num_steps=1)
    (encoded,) = (each for each in reports if each.picture is not None)
    preview = LatentPreview.fit(encoded.picture_latents, encoded.picture)
    (sampled,) = (each for each in reports if each.latents is not None)
    assert preview.frames(sampled.latents).shape == (4, 16, 16, 3)


def test_a_model_that_sees_no_latents_reports_none(tmp_path):
    """Catches: a run that fails where the conditioning has no such place."""
    tree = tiny_config(**{"network_config.params.in_channels": 4})
    embedders = tree.model.params.conditioner_config.params.emb_models
    kept = [each for each in embedders if each["input_key"] != "cond_frames"]
    changes = {
        "network_config.params.in_channels": 4,
        "conditioner_config.params.emb_models": kept,
    }
    files = ModelFiles(SPECS["svd_tiny"], tmp_path, tiny_config(**changes)["model"], tmp_path)
    pipeline = VideoPipeline(tiny_engine(**changes), files, "cpu", torch.float32)
    _, reports = run(pipeline, num_steps=1)
    (encoded,) = (each for each in reports if each.picture is not None)
    assert encoded.picture_latents is None
