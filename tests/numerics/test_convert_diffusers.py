"""Converted weights against diffusers and transformers themselves.

Every weight is random, so a tensor in another's place, a mixer the wrong way round, projections in
another order or a product that is not transposed make errors of the order of one. What remains is
rounding, and the epsilon of diffusers' residual blocks (1e-6 in most of them, where the reference
has 1e-5): 1e-5 of the U-Net's output here.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from sgm.convert import folder_configs, plan
from sgm.models.autoencoder import AutoencoderKL
from sgm.modules.diffusionmodules.discretizer import EDMDiscretization
from sgm.modules.diffusionmodules.layers import sinusoidal_embedding
from sgm.modules.diffusionmodules.model import Decoder
from sgm.modules.diffusionmodules.video_model import VideoUNet
from sgm.util import instantiate_from_config
from tests.foreign import (
    AUTOENCODER,
    PUBLISHED_CLIP,
    UNET,
    VAE,
    folder_tensors,
    native_config,
    native_engine,
    tiny_diffusers_pipeline,
)
from tests.recorded import noise, relative_error
from tests.tiny import draw_weights

TOLERANCE = 1e-4
FRAMES = 3
CONFIGS = Path(__file__).parents[2] / "configs"


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def converted(tensors: dict[str, Tensor], target: str, partial: bool = False) -> dict[str, Tensor]:
    source = "native" if target == "diffusers" else "diffusers"
    conversion = plan(shapes_of(tensors), source=source, target=target, partial=partial)
    return conversion.convert(tensors)


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def prefixed(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": tensor for key, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_diffusers_pipeline(seed=1)


@pytest.fixture(scope="module")
def engine(pipeline: Any) -> Any:
    return native_engine(folder_tensors(pipeline))


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def unet_error(ours: nn.Module, theirs: Any, clips: int, side: int = 16) -> float:
    """Relative error of our U-Net's output; two clips are what guidance makes of one."""
    config = theirs.config
    width = config.addition_time_embed_dim
    x = noise("x", clips, FRAMES, config.in_channels, side, side)
    context = noise("context", clips, 1, config.cross_attention_dim)
    ids = 10 * noise("ids", clips, config.projection_class_embeddings_input_dim // width).abs()
    timestep = torch.tensor(1.2)
    expected = theirs(x, timestep, context, ids).sample.flatten(0, 1)
    vector = sinusoidal_embedding(ids.flatten(), width).reshape(clips, -1)
    out = ours(
        x.flatten(0, 1),
        timestep.expand(clips * FRAMES),
        context=context.repeat_interleave(FRAMES, 0),
        y=vector.repeat_interleave(FRAMES, 0),
        num_video_frames=FRAMES,
        image_only_indicator=torch.zeros(clips, FRAMES),
    )
    return relative_error(out, expected)


def autoencoder_errors(engine: Any, vae: Any, number: int = 3, side: int = 32) -> dict[str, float]:
    pictures, condition = noise("pictures", 2, 3, side, side), engine.conditioner.embedders[number]
    posterior = vae.encode(pictures).latent_dist
    latents = noise("latents", 2 * FRAMES, *posterior.mean.shape[1:])
    return {
        "condition": relative_error(condition.encoder.encode(pictures), posterior.mode()),
        "first stage": relative_error(
            engine.first_stage_model.encode(pictures, unregularized=True)[0], posterior.parameters
        ),
        "decode": relative_error(
            engine.first_stage_model.decode(latents, timesteps=FRAMES),
            vae.decode(latents, num_frames=FRAMES).sample,
        ),
    }


def tower_error(engine: Any, image_encoder: Any) -> float:
    side = image_encoder.config.image_size
    pixels = noise("pixels", 2, 3, side, side)
    out = engine.conditioner.embedders[0].open_clip.model(pixels)
    return relative_error(out, image_encoder(pixels).image_embeds)


@pytest.mark.parametrize("clips", [1, 2])
def test_unet_of_diffusers(engine, pipeline, clips):
    assert unet_error(engine.model.diffusion_model, pipeline.unet, clips) < TOLERANCE


def test_unet_of_diffusers_with_the_references_epsilon(engine):
    """All that is left then is rounding: catches mistakes that the other tolerance may hide."""
    unet = tiny_diffusers_pipeline(seed=1).unet
    blocks = [
        m for m in unet.modules() if type(m).__name__ in ("ResnetBlock2D", "TemporalResnetBlock")
    ]
    for block in blocks:
        block.norm1.eps = block.norm2.eps = 1e-5
    assert unet_error(engine.model.diffusion_model, unet, clips=2) < 5e-6


def test_autoencoder_of_diffusers(engine, pipeline):
    """Catches the time mixer's direction, the levels' order, and attention of the wrong kind."""
    errors = autoencoder_errors(engine, pipeline.vae)
    assert max(errors.values()) < TOLERANCE, errors


def test_image_encoder_of_transformers(engine, pipeline):
    """Catches projections stacked in another order, and one that is not transposed."""
    assert tower_error(engine, pipeline.image_encoder) < TOLERANCE


def test_quant_conv_folds_into_the_first_stages_encoder(pipeline):
    """In double precision, so that nothing but the folding can differ."""
    tensors = {key: tensor.double() for key, tensor in folder_tensors(pipeline).items()}
    native = converted(tensors, "native")
    pictures = noise("pictures", 1, 3, 32, 32).double()
    model = instantiate_from_config(native_config().model.params.first_stage_config).double()
    model.load_state_dict(below(native, "first_stage_model."))
    condition = instantiate_from_config(
        native_config().model.params.conditioner_config.params.emb_models[3]
    ).encoder.double()
    condition.load_state_dict(below(native, "conditioner.embedders.3.encoder."), strict=False)
    moments = model.encode(pictures, unregularized=True)[0]
    assert relative_error(moments, condition.encode(pictures, unregularized=True)[0]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_there_and_back_changes_no_bit(pipeline, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in folder_tensors(pipeline).items()}
    native = converted(tensors, "native")
    again = converted(native, "diffusers")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    assert {tensor.dtype for tensor in (*native.values(), *again.values())} == {dtype}


def write_folder(
    folder: Path, tensors: dict[str, Tensor], files: dict[str, dict[str, Any]]
) -> None:
    names = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    for part in ("unet", "vae", "image_encoder"):
        weights = {key: tensor.clone() for key, tensor in below(tensors, f"{part}/").items()}
        name = f"{names.get(part, 'model')}.safetensors"
        save_file(weights, folder / part / name, metadata={"format": "pt"})


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # by diffusers
def test_diffusers_loads_and_runs_a_native_model(tmp_path):
    """Weights and configuration are ours alone; the first stage has an encoder of its own."""
    from diffusers import StableVideoDiffusionPipeline
    from PIL import Image

    config = native_config()
    engine = instantiate_from_config(config.model)
    draw_weights(engine.eval(), seed=2)
    tensors = converted(engine.state_dict(), "diffusers")
    section = OmegaConf.to_container(config.model, resolve=True)
    write_folder(tmp_path, tensors, folder_configs(shapes_of(tensors), section, num_frames=FRAMES))
    loaded = StableVideoDiffusionPipeline.from_pretrained(tmp_path)

    assert unet_error(engine.model.diffusion_model, loaded.unet, clips=2) < TOLERANCE
    errors = autoencoder_errors(engine, loaded.vae)
    assert max(errors["condition"], errors["decode"]) < TOLERANCE, errors
    assert tower_error(engine, loaded.image_encoder) < TOLERANCE

    loaded.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (32, 32), (200, 30, 40))
    generator = torch.Generator().manual_seed(0)
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    frames = loaded(picture, generator=generator, **options).frames
    assert frames.shape == (1, FRAMES, 3, 32, 32)  # as many as unet/config.json says
    assert frames.isfinite().all()

    loaded.scheduler.set_timesteps(5)
    expected = EDMDiscretization(sigma_max=700.0)(5)
    assert relative_error(loaded.scheduler.sigmas, expected) < 1e-5


# Pairs of native and diffusers' parameters: (network, U-Net).
ODD = (
    {
        "model_channels": 64,
        "channel_mult": [1, 2, 1],
        "num_res_blocks": [2, 1, 2],
        "attention_resolutions": [2],
        "transformer_depth": [1, 2, 1],
        "num_head_channels": 16,
    },
    {
        "block_out_channels": (64, 128, 64),
        "layers_per_block": (2, 1, 2),
        "transformer_layers_per_block": (1, 2, 1),
        "num_attention_heads": (4, 8, 4),
        "down_block_types": (
            "DownBlockSpatioTemporal",
            "CrossAttnDownBlockSpatioTemporal",
            "DownBlockSpatioTemporal",
        ),
        "up_block_types": (
            "UpBlockSpatioTemporal",
            "CrossAttnUpBlockSpatioTemporal",
            "UpBlockSpatioTemporal",
        ),
    },
)
ONE_LEVEL = (
    {
        "model_channels": 64,
        "channel_mult": [1],
        "num_res_blocks": 1,
        "attention_resolutions": [1],
        "num_head_channels": 32,
    },
    {
        "block_out_channels": (64,),
        "layers_per_block": 1,
        "num_attention_heads": 2,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal",),
        "up_block_types": ("CrossAttnUpBlockSpatioTemporal",),
    },
)


def our_unet(params: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        network = VideoUNet(**params)
    network.load_state_dict(below(weights, "model.diffusion_model."), assign=True)
    return network.eval()


@pytest.mark.parametrize("case", [ODD, ONE_LEVEL], ids=["odd", "one level"])
def test_other_architectures(case):
    """Catches numbers of blocks that hold for svd alone, in both directions."""
    from diffusers import UNetSpatioTemporalConditionModel

    ours, theirs = case
    reference = UNetSpatioTemporalConditionModel(**(UNET | theirs)).eval()
    draw_weights(reference, seed=3)
    params = dict(native_config(ours).model.params.network_config.params)
    tensors = prefixed(reference, "unet/")
    native = converted(tensors, "native", partial=True)
    assert unet_error(our_unet(params, native), reference, clips=2) < TOLERANCE
    again = converted(native, "diffusers", partial=True)
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


def test_the_bundled_models_unet():
    from diffusers import UNetSpatioTemporalConditionModel

    params = OmegaConf.load(CONFIGS / "svd_tiny.yaml").model.params.network_config.params
    widths = [params.model_channels * mult for mult in params.channel_mult]
    attention = [2**level in params.attention_resolutions for level in range(len(widths))]
    kinds = ["CrossAttn" * there for there in attention]
    network = VideoUNet(**params).eval()
    draw_weights(network, seed=4)
    theirs = UNetSpatioTemporalConditionModel(
        block_out_channels=widths,
        down_block_types=[f"{kind}DownBlockSpatioTemporal" for kind in kinds],
        up_block_types=[f"{kind}UpBlockSpatioTemporal" for kind in reversed(kinds)],
        num_attention_heads=[width // params.num_head_channels for width in widths],
        layers_per_block=params.num_res_blocks,
        cross_attention_dim=params.context_dim,
        addition_time_embed_dim=params.adm_in_channels // 3,
        projection_class_embeddings_input_dim=params.adm_in_channels,
    ).eval()
    weights = converted(prefixed(network, "model.diffusion_model."), "diffusers", partial=True)
    theirs.load_state_dict(below(weights, "unet/"))
    assert unet_error(network, theirs, clips=1, side=8) < TOLERANCE


@pytest.mark.parametrize("quantised", [True, False], ids=["image decoder", "SV3D"])
def test_a_decoder_of_single_frames(quantised):
    """The image-decoder variants keep their 1x1 convolutions, SV3D's first stage is a decoder."""
    from diffusers import AutoencoderKL as TheirAutoencoder

    theirs = TheirAutoencoder(
        **VAE, up_block_types=("UpDecoderBlock2D",) * 3, use_post_quant_conv=quantised
    ).eval()
    draw_weights(theirs, seed=5)
    tensors = prefixed(theirs, "vae/")
    native = converted(tensors, "native", partial=True)
    again = converted(native, "diffusers", partial=True)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())

    coder = AUTOENCODER | {"z_channels": 4}
    first_stage = below(native, "first_stage_model.")
    latents = noise("latents", 2, 4, 8, 8)
    expected = theirs.decode(latents).sample
    if quantised:
        ours = AutoencoderKL(ddconfig=coder, embed_dim=4, sample=False).eval()
        ours.load_state_dict(first_stage)
        assert relative_error(ours.decode(latents), expected) < TOLERANCE
        pictures = noise("pictures", 2, 3, 32, 32)
        posterior = theirs.encode(pictures).latent_dist
        assert relative_error(ours.encode(pictures), posterior.mode()) < TOLERANCE
    else:
        decoder = Decoder(**coder).eval()
        decoder.load_state_dict(below(first_stage, "decoder."))
        assert first_stage.keys() == {f"decoder.{key}" for key in decoder.state_dict()}
        assert relative_error(decoder(latents), expected) < TOLERANCE
        assert any(key.startswith("conditioner.embedders.1.encoder.") for key in native)


@pytest.mark.slow
def test_full_width_unet():
    """The U-Net of svd on few latents, in float32: 7 GB, the weights being shared by both sides."""
    from diffusers import UNetSpatioTemporalConditionModel

    with torch.device("meta"):
        theirs = UNetSpatioTemporalConditionModel()
    theirs = theirs.to_empty(device="cpu").eval()
    draw_weights(theirs, seed=6)
    params = OmegaConf.load(CONFIGS / "svd.yaml").model.params.network_config.params
    native = converted(prefixed(theirs, "unet/"), "native", partial=True)
    assert unet_error(our_unet(params, native), theirs, clips=1, side=8) < TOLERANCE


@pytest.mark.slow
def test_full_width_autoencoder():
    from diffusers import AutoencoderKLTemporalDecoder

    theirs = AutoencoderKLTemporalDecoder(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        layers_per_block=2,
    ).eval()
    draw_weights(theirs, seed=7)
    native = converted(prefixed(theirs, "vae/"), "native", partial=True)
    config = OmegaConf.load(CONFIGS / "svd.yaml").model.params.first_stage_config
    ours = instantiate_from_config(config).eval()
    ours.load_state_dict(below(native, "first_stage_model."))
    latents = noise("latents", FRAMES, 4, 8, 8)
    expected = theirs.decode(latents, num_frames=FRAMES).sample
    assert relative_error(ours.decode(latents, timesteps=FRAMES), expected) < TOLERANCE
    pictures = noise("pictures", 1, 3, 64, 64)
    moments = ours.encode(pictures, unregularized=True)[0]
    assert relative_error(moments, theirs.encode(pictures).latent_dist.parameters) < TOLERANCE


@pytest.mark.slow
def test_full_width_image_encoder():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from sgm.modules.encoders.clip_image import FrozenOpenCLIPImageEmbedder

    theirs = CLIPVisionModelWithProjection(CLIPVisionConfig(**PUBLISHED_CLIP)).eval()
    draw_weights(theirs, seed=8)
    native = converted(prefixed(theirs, "image_encoder/"), "native", partial=True)
    with torch.device("meta"):
        ours = FrozenOpenCLIPImageEmbedder()
    prefix = "conditioner.embedders.0.open_clip."
    ours.load_state_dict(below(native, prefix), assign=True)
    pixels = noise("pixels", 1, 3, 224, 224)
    assert relative_error(ours.model(pixels), theirs(pixels).image_embeds) < TOLERANCE
