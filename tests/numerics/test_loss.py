"""The training loss against a computation by hand, and its draws: one a clip."""

import math

import pytest
import torch

from sgm.modules.diffusionmodules.denoiser import Denoiser
from sgm.modules.diffusionmodules.loss import StandardDiffusionLoss

D = "sgm.modules.diffusionmodules"
CLIPS, FRAMES, SHAPE = 3, 4, (2, 5, 6)
P_MEAN, P_STD = 0.7, 1.6


def build(weighting="VWeighting", **params):
    sampling = {"p_mean": P_MEAN, "p_std": P_STD}
    return StandardDiffusionLoss(
        {"target": f"{D}.sigma_sampling.EDMSampling", "params": sampling},
        {"target": f"{D}.loss_weighting.{weighting}"},
        **params,
    )


def generator():
    return torch.Generator().manual_seed(11)


def latents(rows=CLIPS * FRAMES):
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(5))


class Recorder:
    """A denoiser that answers half its input and keeps what it was given."""

    def __call__(self, _network, x, sigma, cond, **extra):
        self.x, self.sigma, self.cond, self.extra = x, sigma, cond, extra
        return x / 2


@pytest.mark.parametrize(("loss_type", "offset"), [("l2", 0.0), ("l1", 0.0), ("l2", 0.3)])
def test_loss_by_hand(loss_type, offset):
    # catches: weights of another level, a mean over the batch, noise scaled twice, an offset drawn
    # per frame, l1 and l2 swapped
    rng = generator()
    sigma = [math.exp(P_MEAN + P_STD * r) for r in torch.randn(CLIPS, generator=rng).tolist()]
    noise = torch.randn(CLIPS * FRAMES, *SHAPE, generator=rng)
    shift = torch.randn(CLIPS, SHAPE[0], generator=rng)
    expected = []
    for clip, s in enumerate(sigma):
        total = 0.0
        for row in range(clip * FRAMES, (clip + 1) * FRAMES):
            drawn = noise[row] + offset * shift[clip].reshape(-1, 1, 1)
            error = (latents()[row] + s * drawn) / 2 - latents()[row]
            total += (error.abs() if loss_type == "l1" else error**2).double().mean().item()
        expected.append((1 + s**2) / s**2 * total / FRAMES)
    loss = build(loss_type=loss_type, offset_noise_level=offset)
    out = loss.loss_given_cond(None, Recorder(), {}, latents(), FRAMES, generator=generator())
    assert out.loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert out.sigma.tolist() == pytest.approx(sigma, rel=1e-6)


def test_frames_of_a_clip_share_one_noise_level():
    # catches: one draw a row, or levels ordered (t b) instead of (b t)
    denoiser = Recorder()
    out = build().loss_given_cond(None, denoiser, {}, latents(), FRAMES, generator=generator())
    levels = denoiser.sigma.reshape(CLIPS, FRAMES)
    assert torch.equal(levels, out.sigma[:, None].expand(CLIPS, FRAMES))
    assert len(set(out.sigma.tolist())) == CLIPS
    spread = (denoiser.x - latents()).reshape(CLIPS, -1).std(1)  # 240 values: 5 % standard error
    torch.testing.assert_close(spread, out.sigma, rtol=0.2, atol=0)


def test_conditioning_of_clips_is_repeated_over_frames():
    # catches: tiling [0 1 2 0 1 2 ...] instead of repeating [0 0 0 0 1 1 ...]
    denoiser = Recorder()
    cond = {
        "crossattn": torch.arange(3.0)[:, None, None],
        "vector": torch.arange(12.0)[:, None],
        "flag": True,
    }
    build().loss_given_cond(None, denoiser, cond, latents(), FRAMES, {"extra": 1})
    assert denoiser.cond["crossattn"].flatten().tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4
    assert torch.equal(denoiser.cond["vector"], cond["vector"])
    assert denoiser.cond["flag"] is True
    assert denoiser.extra == {"extra": 1}


def test_forward_takes_frames_conditioning_and_model_inputs_from_the_batch():
    # catches: num_video_frames ignored, other entries of the batch handed to the network
    batch = {"num_video_frames": FRAMES, "motion": torch.zeros(CLIPS, 1), "fps": 6}
    denoiser = Recorder()

    def conditioner(batch):
        return {"vector": batch["motion"]}

    loss = build(batch2model_keys=["num_video_frames", "absent"])
    out = loss(None, denoiser, conditioner, latents(), batch, generator())
    assert out.shape == (CLIPS,)
    assert denoiser.extra == {"num_video_frames": FRAMES}
    assert denoiser.cond["vector"].shape == (CLIPS * FRAMES, 1)
    given = loss.loss_given_cond(None, denoiser, {}, latents(), FRAMES, generator=generator())
    assert torch.equal(out, given.loss)


def test_images_have_a_level_each():
    denoiser = Recorder()
    loss = build(batch2model_keys="fps")
    out = loss(None, denoiser, dict, latents(6), {"fps": 3})
    assert out.shape == (6,)
    assert len(set(denoiser.sigma.tolist())) == 6
    assert denoiser.extra == {"fps": 3}


def test_velocity_weighting_is_the_loss_of_the_bare_network():
    """With VScaling, ``(1 + s^2) / s^2`` undoes c_out: a network of zeros loses ``v^2``.

    Catches: a weighting that does not belong to the scaling. ``v = (n - s x) / sqrt(1 + s^2)``.
    """
    x, seen = latents(), {}

    def network(x, c_noise, cond):
        seen["c_noise"] = c_noise
        return torch.zeros_like(x)

    denoiser = Denoiser({"target": f"{D}.denoiser_scaling.VScalingWithEDMcNoise"})
    out = build().loss_given_cond(network, denoiser, {}, x, FRAMES, generator=generator())
    rng = generator()
    s = (P_MEAN + P_STD * torch.randn(CLIPS, generator=rng)).exp().repeat_interleave(FRAMES)
    s = s.reshape(-1, 1, 1, 1)
    v = (torch.randn(x.shape, generator=rng) - s * x) / (1 + s**2).sqrt()
    torch.testing.assert_close(out.loss, (v**2).reshape(CLIPS, -1).mean(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(seen["c_noise"], s.flatten().log() / 4)


def test_half_precision_latents_give_a_float32_loss_with_gradients():
    scale = torch.nn.Parameter(torch.ones(()))
    denoiser = Denoiser({"target": f"{D}.denoiser_scaling.VScaling"})

    def network(x, c_noise, cond):
        return x * scale

    out = build().loss_given_cond(network, denoiser, {}, latents().bfloat16(), FRAMES)
    assert out.loss.dtype == torch.float32
    out.loss.mean().backward()
    assert scale.grad.isfinite()
    assert scale.grad != 0


def test_shapes_that_do_not_fit_are_refused():
    loss = build()
    with pytest.raises(ValueError, match="whole clips of 5 frames, got 12 rows"):
        loss.loss_given_cond(None, Recorder(), {}, latents(), 5)
    with pytest.raises(ValueError, match=r"'vector' to have 3 rows.*12 rows.*got 2"):
        loss.loss_given_cond(None, Recorder(), {"vector": torch.ones(2, 1)}, latents(), FRAMES)
    with pytest.raises(ValueError, match=r"loss_type.*'huber'"):
        build(loss_type="huber")
