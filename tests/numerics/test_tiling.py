"""Decoding by parts: overlapped and blended (an approximation), and in step (exact)."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sgm.inference.lockstep import DecoderInStep, decode_in_step
from sgm.inference.moments import Moments
from sgm.inference.pictures import fit_picture, load_picture
from sgm.inference.pipeline import VideoPipeline
from sgm.inference.tiling import Tiling, decode_tiled, split_axis
from sgm.modules.autoencoding.temporal_ae import VideoDecoder
from sgm.modules.diffusionmodules.model import Decoder
from tests.tiny import draw_weights

PICTURE = Path(__file__).parents[2] / "assets" / "sample.jpg"
FRAMES, SIDE = 18, 64


@pytest.fixture(scope="module")
def engine():
    engine = VideoPipeline.from_spec("svd_tiny", device="cpu", dtype="float32").engine
    engine.first_stage_model.float()
    return engine


@pytest.fixture(scope="module")
def latents(engine) -> Tensor:
    """A camera that moves over the bundled picture, ever faster, encoded."""
    wide = fit_picture(load_picture(PICTURE), SIDE, 2 * SIDE, "cover", "white")
    starts = [round(k + SIDE * (k / FRAMES) ** 2 / 2) for k in range(FRAMES)]
    clip = torch.stack([wide[:, :, start : start + SIDE] for start in starts])
    with torch.inference_mode():
        z = engine.first_stage_model.moments(clip)[:, :4]
    return z.clone()


@pytest.fixture(scope="module")
def whole(engine, latents) -> Tensor:
    return decode(engine)(latents)


def decode(engine):
    """Unscaled latents of one clip -> frames, in one piece."""

    def run(z: Tensor) -> Tensor:
        with torch.no_grad():
            return engine.first_stage_model.decoder(z, timesteps=len(z))

    return run


def psnr(x: Tensor, y: Tensor) -> float:
    """In dB, of the range from -1 to 1."""
    return float(10 * torch.log10(4 / ((x.clamp(-1, 1) - y.clamp(-1, 1)) ** 2).mean()))


@pytest.mark.parametrize("scale", [1, 8])
@pytest.mark.parametrize(
    ("length", "size", "overlap"),
    [(25, 8, 4), (25, 8, 7), (14, 14, 4), (9, 4, 0), (72, 32, 12), (3, 8, 4), (17, 6, 5)],
)
def test_weights_of_an_axis(length, size, overlap, scale):
    """Caught: weights that do not sum to one, parts that miss or exceed the axis, are larger than
    asked or overlap by less, and results kept that are near to a false border."""
    parts = split_axis(length, size, overlap, scale)
    total = torch.zeros(length * scale)
    for part in parts:
        assert (part.weights > 0).all()
        assert part.taken.stop - part.taken.start == min(size, length)
        assert part.cut.start == part.kept.start - scale * part.taken.start
        assert part.cut.stop - part.cut.start == len(part.weights)
        total[part.kept] += part.weights
        margin = int(scale * overlap * 3 / 8)
        if part.taken.start > 0:
            assert part.cut.start >= margin
        if part.taken.stop < length:
            assert scale * size - part.cut.stop >= margin
    assert torch.equal(total, torch.ones(length * scale))
    assert parts[0].taken.start == 0
    assert parts[-1].taken.stop == length
    for left, right in pairwise(parts):
        assert left.taken.stop - right.taken.start >= overlap
    assert len({part.taken.start for part in parts}) == len(parts)


def test_false_borders_do_not_show():
    """A decoder that is wrong next to every border gives its whole result but at true borders.

    Caught: margins kept, offsets of the cut, axes exchanged.
    """
    f = 4

    def wrong_at_borders(z: Tensor) -> Tensor:
        out = z.repeat_interleave(f, 2).repeat_interleave(f, 3)
        out[0] += 100
        out[-1] += 100
        out[..., :f, :] += 100
        out[..., -f:] += 100
        return out

    z = torch.randn(13, 2, 20, 17)
    tiled = decode_tiled(wrong_at_borders, z, f, Tiling(6, 4, 10, 6))
    torch.testing.assert_close(tiled, wrong_at_borders(z), rtol=0, atol=1e-4)


def test_one_part_is_the_whole():
    """Bit for bit, in the type of the decoder. Caught: weights applied where there is one part."""
    z = torch.randn(5, 4, 6, 6)
    seen = []
    out = decode_tiled(
        lambda z: F.interpolate(z, scale_factor=2.0).half(),
        z,
        2,
        Tiling(8, 4, 8, 2),
        report=lambda *done: seen.append(done),
    )
    assert out.dtype == torch.float16
    assert torch.equal(out, F.interpolate(z, scale_factor=2.0).half())
    assert seen == [(1, 1)]


@pytest.mark.parametrize(
    "sizes", [{"frames": 4, "frame_overlap": 4}, {"frame_overlap": -1}, {"side": 8}]
)
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="expected an overlap from 0 to below"):
        Tiling(**sizes)


def test_chunks_of_the_trained_decoder(engine, latents, whole):
    """What is promised of overlapped chunks: 45 dB (here 57 are asked), and edges that nobody sees.

    Steps between frames are compared with the same steps of the whole decode. Caught: no overlap
    (43 dB), overlaps blended from border to border (55 dB).
    """
    video = decode_tiled(decode(engine), latents, 4, Tiling(8, 4))
    assert psnr(video, whole) > 57
    ratio = steps(video) / steps(whole)
    assert ratio.min() > 0.97
    assert ratio.max() < 1.03


def steps(video: Tensor) -> Tensor:
    """Mean absolute difference of each frame and the next."""
    return video.clamp(-1, 1).diff(dim=0).abs().mean((1, 2, 3))


def test_plain_tiles_of_the_trained_decoder_fail(engine, latents):
    """Why there is decoding in step: a normalisation sees its tile alone, and the trained decoder
    writes into its map's last corner what the whole map is normalised by."""
    wide = torch.cat([latents[:2], latents[-2:]], dim=-1)
    tiling = Tiling(None, 0, 16, 8)
    assert psnr(decode_tiled(decode(engine), wide, 4, tiling), decode(engine)(wide)) < 35


@pytest.mark.parametrize(("frames", "bands"), [(1, 1), (3, 2), (5, 5)])
def test_in_step_equals_the_whole(engine, latents, frames, bands):
    """The trained decoder, in float32: 45 dB are promised, 110 are left by rounding."""
    z = latents[-5:]
    video = decode_in_step(engine.first_stage_model.decoder, z, frames, bands)
    assert psnr(video, decode(engine)(z)) > 110


CONFIG = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4}


@pytest.mark.parametrize("frames", [1, 2, 5, 7])
@pytest.mark.parametrize("bands", [1, 2, 9])
@pytest.mark.parametrize(
    "params",
    [
        {"video_kernel_size": [3, 1, 1]},
        {"video_kernel_size": 3, "merge_strategy": "fixed", "alpha": 0.3},
        {"video_kernel_size": [5, 3, 1], "tanh_out": True},
        None,
    ],
)
def test_in_step_in_double_precision(frames, bands, params):
    """Equal but for the rounding of sums, for every split and kernel.

    Caught: statistics of a part, of the wrong frames, of halos as well, or pooled without the
    variance between frames; a halo too small; a result written over what is still to be read; the
    residual path's start exchanged; the wrong weight of the blend.
    """
    decoder = Decoder(**CONFIG) if params is None else VideoDecoder(**CONFIG, **params)
    draw_weights(decoder, 1)
    decoder = decoder.double().eval()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 4, 9, 6, dtype=torch.float64, generator=generator)
    z = z * torch.tensor([1.0, 2, 1, 3, 1], dtype=torch.float64)[:, None, None, None]
    given = z.clone()
    with torch.no_grad():
        expected = decoder(z) if params is None else decoder(z, timesteps=5)
    out = decode_in_step(decoder, z, frames, bands)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    assert torch.equal(z, given)


def test_in_step_takes_the_place_of_a_decoder(engine, latents):
    """Called as the engine calls its decoder. Caught: clips of a batch mixed, latents unscaled."""
    decoder = DecoderInStep(engine.first_stage_model.decoder)
    z = latents[:6, :, :8, :8]
    with torch.no_grad():
        out = decoder(z, timesteps=3)
        assert psnr(out[:3], engine.first_stage_model.decoder(z[:3], timesteps=3)) > 110
        assert psnr(out, engine.first_stage_model.decoder(z, timesteps=3)) > 110
    assert decoder.norm_out.weight.dtype == torch.float32


# A tolerance is what rounding the values, and the result, costs: a bfloat16 has 8 bits.
@pytest.mark.parametrize(
    ("dtype", "mean", "tolerance"), [(torch.float32, 1e4, 5e-2), (torch.bfloat16, 60, 2e-2)]
)
def test_moments_of_a_large_mean(dtype, mean, tolerance):
    """A deviation of one, in parts of different sizes, against float64.

    Caught: mean square minus squared mean, parts weighted equally, moments in half precision.
    """
    generator = torch.Generator().manual_seed(0)
    x = mean + torch.randn(3, 64, 10, 4, generator=generator)
    x[1] += 0.5
    x = x.to(dtype)
    norm = torch.nn.GroupNorm(32, 64)
    draw_weights(norm, 0)
    moments = Moments(x, norm)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 10)):
        moments.add(slice(0, 2), x[:2, :, rows])
    moments.add(slice(2, 3), x[2:])
    exact, wide = norm.double(), x.double()
    over_time = exact(wide.transpose(0, 1)[None])[0].transpose(0, 1)
    for clip, expected in ((False, exact(wide)), (True, over_time)):
        out = moments.normalise(slice(1, 3), x[1:], clip)
        torch.testing.assert_close(out.double(), expected[1:], rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("bands", [1, 3])
def test_in_step_parked_on_the_host(bands):
    """Caught: the host reads, or overwrites, what a copy has not finished."""
    decoder = VideoDecoder(**CONFIG, video_kernel_size=[3, 1, 1])
    draw_weights(decoder, 1)
    decoder = decoder.double().eval().cuda()
    z = torch.randn(9, 4, 32, 32, dtype=torch.float64, device="cuda")
    with torch.no_grad():
        expected = decoder(z, timesteps=9)
    for _ in range(3):
        out = decode_in_step(decoder, z, 2, bands, store="cpu")
        assert out.device.type == "cpu"
        torch.testing.assert_close(out, expected.cpu(), rtol=1e-9, atol=1e-9)
