"""The autoencoders: recorded outputs, the latent distribution by formula, and what time does.

Recorded cases and the mistakes they have caught (each was made on purpose, in a copy):

- ``vae_video``: blend of space and time as in the U-Net; no temporal padding.
- ``vae_image``: the downsampling padded above and on the left, upsampling by interpolation.
- ``vae_quiet``: 1e-5 for 1e-6 in spatial blocks, 1e-6 for 1e-5 in temporal blocks.
- ``vae_mode_only``: latents drawn instead of their mode, a missing 1x1 convolution.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from sgm.models.autoencoder import AutoencoderKL, AutoencoderKLModeOnly, AutoencodingEngine
from sgm.modules.autoencoding.regularizers import DiagonalGaussianRegularizer
from sgm.modules.autoencoding.temporal_ae import VideoDecoder, VideoResnetBlock
from sgm.modules.diffusionmodules.model import Decoder, Encoder
from sgm.util import instantiate_from_config
from tests.recorded import assert_recorded, filled, noise, recorded_config, relative_error
from tests.tiny import draw_weights, tiny_config


def recorded_first_stage(ch: int = 32, video: bool = True, quiet: bool = False):
    config = recorded_config().first_stage_config
    config.params.encoder_config.params.ch = config.params.decoder_config.params.ch = ch
    if not video:
        config.params.decoder_config = {
            "target": "sgm.modules.diffusionmodules.model.Decoder",
            "params": config.params.encoder_config.params,
        }
    return filled(instantiate_from_config(config), quiet)


def picture(case: str, h: int = 64, w: int = 96) -> Tensor:
    return noise(f"{case}img", 2, 3, h, w).tanh()


def thinned(frames: Tensor) -> Tensor:
    return frames[..., ::2, ::2]


def check_first_stage(case: str, model: AutoencodingEngine, frames: int, h: int, w: int) -> None:
    moments, _ = model.encode(picture(case, h, w), unregularized=True)
    z = noise(f"{case}z", frames, 4, h // 8, w // 8)
    video = isinstance(model.decoder, VideoDecoder)
    decoded = model.decode(z, **({"timesteps": frames} if video else {}))
    assert_recorded(case, moments=moments, decoded=thinned(decoded))


@pytest.mark.parametrize(
    ("case", "build"),
    [("vae_video", {}), ("vae_image", {"video": False}), ("vae_quiet", {"quiet": True})],
)
@torch.no_grad()
def test_recorded_first_stage(case: str, build: dict):
    """Catches what the head of this file lists."""
    check_first_stage(case, recorded_first_stage(**build), 5, 64, 96)


@pytest.mark.slow
@torch.no_grad()
def test_recorded_first_stage_at_full_width():
    """Catches: numbers of channels or groups that only fit small networks."""
    check_first_stage("vae_full", recorded_first_stage(ch=128), 3, 64, 64)


@torch.no_grad()
def test_recorded_condition_autoencoder():
    config = recorded_config().conditioner_config.params.emb_models[3].params.encoder_config
    model = filled(instantiate_from_config(config))
    case = "vae_mode_only"
    decoded = model.decode(noise(f"{case}z", 2, 4, 8, 8))
    assert_recorded(case, mode=model.encode(picture(case)), decoded=thinned(decoded))


# --- the latent distribution ---


def test_divergence_is_that_of_two_gaussians():
    """Catches: a sum over the batch, a mean over positions, standard deviation for variance."""
    moments = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    mean, log_var = moments.chunk(2, 1)
    _, log = DiagonalGaussianRegularizer()(moments)
    each = kl_divergence(Normal(mean, (log_var / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(log["kl_loss"], each.sum() / 3)


def test_latents_have_the_moments_that_were_asked_for():
    """Catches: variance taken for standard deviation, mean and variance exchanged."""
    mean = torch.tensor([1.0, -2.0]).reshape(1, 2, 1, 1).expand(1, 2, 200, 200)
    std = torch.tensor([0.5, 3.0]).reshape(1, 2, 1, 1).expand(1, 2, 200, 200)
    z, _ = DiagonalGaussianRegularizer()(
        torch.cat([mean, 2 * std.log()], 1), torch.Generator().manual_seed(0)
    )
    # 40,000 draws: their mean is within 5 / 200 standard deviations, their own deviation likewise
    torch.testing.assert_close(
        z.mean((2, 3)) / std[..., 0, 0], mean[..., 0, 0] / std[..., 0, 0], rtol=0, atol=0.025
    )
    torch.testing.assert_close(z.std((2, 3)), std[..., 0, 0], rtol=0.025, atol=0)


def test_draws_are_the_generators():
    """Catches: a draw from the global generator."""
    moments = torch.zeros(1, 8, 4, 4)
    first, again, other = (
        DiagonalGaussianRegularizer()(moments, torch.Generator().manual_seed(seed))[0]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_extreme_variances_stay_finite():
    """Catches: a log-variance that is not held within bounds (exp(100) is infinite)."""
    moments = torch.cat([torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 100.0)], 1)
    z, log = DiagonalGaussianRegularizer()(moments)
    assert torch.isfinite(z).all()
    assert torch.isfinite(log["kl_loss"])


def kl(cls: type[AutoencoderKL]) -> AutoencoderKL:
    params = tiny_config().model.params.conditioner_config.params.emb_models[3].params
    model = cls(**params.encoder_config.params)
    draw_weights(model, 0)
    return model.eval()


@torch.no_grad()
def test_mode_is_the_mean_and_a_sample_is_not():
    x = torch.randn(2, 3, 16, 24).tanh()
    mode_only, sampling = kl(AutoencoderKLModeOnly), kl(AutoencoderKL)
    moments, log = mode_only.encode(x, unregularized=True)
    assert log == {}
    assert torch.equal(mode_only.encode(x), moments[:, :4])
    z, log = sampling.encode(x, return_reg_log=True)
    assert log.keys() == {"kl_loss"}
    assert not torch.equal(z, moments[:, :4])
    torch.manual_seed(0)
    _, decoded, _ = mode_only(x)
    assert torch.equal(decoded, mode_only.decode(moments[:, :4]))
    assert decoded.shape == x.shape


def test_embedding_channels_may_differ_from_latent_channels():
    """Catches: the 1x1 convolutions exchanged or of one width."""
    params = tiny_config().model.params.conditioner_config.params.emb_models[3].params
    model = AutoencoderKLModeOnly(**(dict(params.encoder_config.params) | {"embed_dim": 2}))
    z = model.encode(torch.zeros(1, 3, 16, 16))
    assert z.shape == (1, 2, 4, 4)
    assert model.decode(z).shape == (1, 3, 16, 16)


# --- time ---


def first_stage(**decoder) -> AutoencodingEngine:
    config = tiny_config(
        **{f"first_stage_config.params.decoder_config.params.{k}": v for k, v in decoder.items()}
    )
    model = instantiate_from_config(config.model.params.first_stage_config)
    draw_weights(model, 0)
    return model.eval()


@torch.no_grad()
def test_clips_do_not_influence_each_other():
    """Catches: rows taken as "(t b)", norms or convolutions across clips."""
    model = first_stage()
    z = noise("clips", 6, 4, 4, 6)
    together = model.decode(z, timesteps=3)
    assert (
        relative_error(torch.cat([model.decode(x, timesteps=3) for x in (z[:3], z[3:])]), together)
        < 2e-6
    )
    assert relative_error(model.decode(z, timesteps=6), together) > 1e-3


@torch.no_grad()
def test_without_its_temporal_parts_the_decoder_is_the_image_decoder():
    """Catches: a temporal layer that ``skip_video`` forgets."""
    video = first_stage()
    params = tiny_config().model.params.first_stage_config.params.encoder_config.params
    image = Decoder(**params).eval()
    own = video.decoder.state_dict()
    image.load_state_dict({key: own[key] for key in image.state_dict()})
    z = noise("skip", 3, 4, 4, 6)
    assert torch.equal(video.decode(z, timesteps=3, skip_video=True), image(z))


@pytest.mark.parametrize(
    ("learned", "factor", "alpha"), [(True, 30.0, 1.0), (True, -30.0, 0.0), (False, 0.25, 0.25)]
)
@torch.no_grad()
def test_blend_weights_the_temporal_branch(learned: bool, factor: float, alpha: float):
    """The other way round than in the U-Net. Catches: that; a fixed factor through the sigmoid."""
    block = VideoResnetBlock(32, 32, 0.0, (3, 1, 1), factor, learned)
    draw_weights(block, 0)
    block.mix_factor.fill_(factor)
    x = noise("blend", 6, 32, 3, 5)
    spatial = block(x, 3, skip_video=True)
    clip = spatial.reshape(2, 3, 32, 3, 5).transpose(1, 2)
    temporal = block.time_stack(clip).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(block(x, 3), alpha * temporal + (1 - alpha) * spatial)


@torch.no_grad()
def test_a_fixed_blend_is_a_buffer_and_used_as_it_is():
    model = first_stage(merge_strategy="fixed", alpha=0.0)
    assert not [key for key, _ in model.named_parameters() if key.endswith("mix_factor")]
    assert "decoder.mid.block_1.mix_factor" in dict(model.named_buffers())


# --- architecture ---


@pytest.mark.parametrize("mult", [(1,), (1, 1), (1, 2, 2)])
@torch.no_grad()
def test_sizes_follow_the_levels(mult: tuple[int, ...]):
    """Catches: a factor of 8 taken for granted."""
    f = 2 ** (len(mult) - 1)
    ddconfig = {"ch": 32, "ch_mult": mult, "num_res_blocks": 1, "z_channels": 3}
    model = AutoencoderKL(ddconfig=ddconfig, embed_dim=3)
    z = model.encode(torch.zeros(1, 3, 16, 24))
    assert z.shape == (1, 3, 16 // f, 24 // f)
    assert model.decode(z).shape == (1, 3, 16, 24)
    assert model.downsampling == f


def test_single_moments_attention_and_tanh_can_be_chosen():
    ddconfig = {"ch": 32, "ch_mult": [1], "num_res_blocks": 1, "z_channels": 4}
    assert Encoder(**ddconfig, double_z=False)(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 8, 8)
    plain, bounded = (Decoder(**ddconfig, attn_type="none", tanh_out=t) for t in (False, True))
    assert isinstance(plain.mid.attn_1, nn.Identity)
    bounded.load_state_dict(plain.state_dict())
    z = 10 * torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(bounded(z), plain(z).tanh())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_type": "linear"}, "attn_type.*vanilla-xformers, none; got 'linear'"),
        ({"attn_resolutions": [16]}, r"attn_resolutions: expected \[\].*\[16\]"),
        ({"time_mode": "all"}, "time_mode: expected 'conv-only', got 'all'"),
        ({"merge_strategy": "learned_with_images"}, "merge_strategy.*'learned' or 'fixed'"),
        ({"video_kernel_size": 2}, "odd kernel sizes"),
        ({"ch": 20}, "divisible by 32, got 20"),
    ],
)
def test_impossible_parameters_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        first_stage(**change)
