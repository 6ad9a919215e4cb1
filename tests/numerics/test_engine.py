"""The engine: a recorded video, and what it adds to its parts."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from sgm.models.diffusion import DiffusionEngine
from sgm.util import instantiate_from_config
from tests.recorded import assert_recorded, filled, noise, recorded_config, relative_error
from tests.tiny import FRAMES, tiny_config, tiny_engine, write_tiny_checkpoint

PICTURES = ("cond_frames", "cond_frames_without_noise")


def sample(model: DiffusionEngine, image: Tensor, aug: Tensor, start: Tensor, **ids) -> Tensor:
    """Latents of one video, by the engine's own parts, from given noise."""
    frames = len(start)
    numbers = {"fps_id": 6, "motion_bucket_id": 127, "cond_aug": 0.02} | ids
    batch = {"cond_frames_without_noise": image, "cond_frames": image + numbers["cond_aug"] * aug}
    batch |= {key: torch.full((frames,), value) for key, value in numbers.items()}
    halves = model.conditioner.get_unconditional_conditioning(
        batch, force_uc_zero_embeddings=PICTURES
    )
    c, uc = (
        {k: v if len(v) == frames else v.repeat_interleave(frames, 0) for k, v in half.items()}
        for half in halves
    )
    extra = {"image_only_indicator": torch.zeros(2, frames), "num_video_frames": frames}

    def denoiser(x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return model.denoiser(model.model, x, sigma, cond, **extra)

    return model.sampler(denoiser, start, cond=c, uc=uc)


@torch.no_grad()
def test_recorded_video():
    """A picture in, frames out, through every part.

    Catches: condition latents multiplied by the scale factor, video latents not divided by it,
    halves of the guidance exchanged, guidance falling over the frames.
    """
    model = filled(DiffusionEngine(**recorded_config()))
    image = noise("engineimg", 1, 3, 128, 192).tanh()
    aug, start = noise("engineaug", *image.shape), noise("enginenoise", 4, 4, 16, 24)
    latents = sample(model, image, aug, start)
    frames = model.decode_first_stage(latents)
    assert_recorded("engine", latents=latents, frames=frames[..., ::4, ::4])


@pytest.fixture(scope="module")
def tiny() -> DiffusionEngine:
    return tiny_engine()


IMAGE = noise("picture", 1, 3, 8, 8).tanh().repeat_interleave(8, 2).repeat_interleave(8, 3)


def tiny_frames(model: DiffusionEngine, image: Tensor = IMAGE, seed: int = 0, **ids) -> Tensor:
    start = noise(f"start {seed}", FRAMES, 4, 16, 16)
    with torch.no_grad():
        return model.decode_first_stage(sample(model, image, torch.zeros_like(image), start, **ids))


def test_tiny_videos_depend_on_everything(tiny: DiffusionEngine):
    """Without this, tests with the tiny model could not see whether a value arrives.

    Catches: an embedding that a norm undoes, a conditioning that no layer reads.
    """
    frames = tiny_frames(tiny)
    assert frames.shape == (FRAMES, 3, 64, 64)
    assert 0.2 < float(frames.std()) < 1.0
    assert torch.equal(frames, tiny_frames(tiny))
    for change in (
        {"fps_id": 20},
        {"motion_bucket_id": 20},
        {"cond_aug": 0.3},
        {"image": -IMAGE},
        {"seed": 1},
    ):
        pixels = (127.5 * (tiny_frames(tiny, **change) - frames)).abs()
        assert float((pixels > 1).float().mean()) > 0.3, change


def test_tiny_weights_depend_on_their_seed_alone(tmp_path: Path):
    state = torch.get_rng_state()
    first, again, other = (tiny_engine(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in first.items():
        assert torch.equal(value, again[key]), key
        assert value.all(), key  # nothing left at zero
        assert not torch.equal(value, other[key]), key
    path = write_tiny_checkpoint(tmp_path / "tiny.safetensors", 1, torch.float16)
    for key, value in load_file(path).items():
        assert torch.equal(value, other[key].half()), key


def test_weights_are_loaded_from_the_files_path(tmp_path: Path):
    """Catches: ``ckpt_path`` ignored, or read before the parts are built."""
    path = write_tiny_checkpoint(tmp_path / "tiny.safetensors", 1)
    config = OmegaConf.create(OmegaConf.to_yaml(tiny_config(ckpt_path=str(path))))
    loaded, expected = instantiate_from_config(config.model).state_dict(), tiny_engine(1)
    assert all(torch.equal(loaded[k], v) for k, v in expected.state_dict().items())


def test_scale_factor_belongs_to_the_video_latents_alone(tiny: DiffusionEngine):
    """Catches: condition latents scaled, encode dividing, decode multiplying."""
    frames = torch.randn(3, 3, 16, 16).tanh()
    scaled = tiny_engine(scale_factor=0.5)
    unscaled = tiny.first_stage_model.encode(frames, unregularized=True)[0][:, :4]
    for model, factor in ((tiny, 0.18215), (scaled, 0.5)):
        model.first_stage_model.regularization.sample = False
        torch.testing.assert_close(model.encode_first_stage(frames), factor * unscaled)
        with torch.no_grad():
            expected = tiny.first_stage_model.decode(unscaled, timesteps=3)
        torch.testing.assert_close(model.decode_first_stage(factor * unscaled), expected)
        model.first_stage_model.regularization.sample = True
    latents = [m.conditioner.embedders[3](frames) for m in (tiny, scaled)]
    assert torch.equal(*latents)


@pytest.mark.parametrize(("chunk", "sizes"), [(None, [5]), (2, [2, 2, 1]), (8, [5])])
def test_frames_are_decoded_in_chunks(tiny: DiffusionEngine, chunk: int | None, sizes: list[int]):
    """Every chunk is a clip of its own. Catches: a wrong last chunk, a chunk that sees others."""
    z = noise("chunks", 5, 4, 4, 4)
    tiny.en_and_decode_n_samples_a_time = chunk
    try:
        out, encoded = tiny.decode_first_stage(z), tiny.encode_first_stage(torch.zeros(5, 3, 8, 8))
    finally:
        tiny.en_and_decode_n_samples_a_time = None
    chunks = list(tiny.decode_chunks(z, chunk))
    assert [len(part) for part in chunks] == sizes
    assert encoded.shape == (5, 4, 2, 2)
    with torch.no_grad():
        alone = [
            tiny.first_stage_model.decode(part / tiny.scale_factor, timesteps=len(part))
            for part in z.split(sizes)
        ]
    assert torch.equal(out, torch.cat(alone))
    assert torch.equal(torch.cat(chunks), out)
    assert not out.requires_grad


def test_an_image_decoder_takes_frames_one_by_one():
    """Catches: ``timesteps`` handed to a decoder that has none."""
    encoder = tiny_config().model.params.first_stage_config.params.encoder_config
    decoder = {"target": "sgm.modules.diffusionmodules.model.Decoder", "params": encoder.params}
    model = tiny_engine(**{"first_stage_config.params.decoder_config": decoder})
    model.en_and_decode_n_samples_a_time = 2
    z = noise("chunks", 5, 4, 4, 4)
    with torch.no_grad():
        expected = model.first_stage_model.decode(z / model.scale_factor)
    torch.testing.assert_close(model.decode_first_stage(z), expected)


def test_first_stage_keeps_its_type_and_gives_the_callers():
    """Catches: latents decoded in the U-Net's half precision, frames of the decoder's type."""
    model = tiny_engine()
    z = noise("types", 2, 4, 4, 4)
    expected = model.decode_first_stage(z)
    out = model.decode_first_stage(z.bfloat16())
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected) < 0.005  # z and the frames are rounded, once each
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.decode_first_stage(z), expected)
        model.disable_first_stage_autocast = False
        assert not torch.equal(model.decode_first_stage(z), expected)
    assert model.double().decode_first_stage(z).dtype == torch.float32


def test_first_stage_is_never_trained(tiny: DiffusionEngine):
    """Catches: a first stage that ``train`` switches or that takes gradients."""
    assert tiny.train().model.training
    assert not any(module.training for module in tiny.first_stage_model.modules())
    assert not any(p.requires_grad for p in tiny.first_stage_model.parameters())
    assert not tiny.encode_first_stage(torch.zeros(1, 3, 16, 16)).requires_grad
    tiny.eval()


def test_sampler_and_loss_may_be_absent():
    with torch.device("meta"):
        model = instantiate_from_config(tiny_config(sampler_config=None).model)
    assert model.sampler is None
    assert model.loss_fn is None
