"""The JSON files of a diffusers folder."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sgm.convert import folder_configs
from tests.foreign import PUBLISHED_CLIP
from tests.unit.test_convert import folder

CONFIGS = Path(__file__).parents[2] / "configs"

# What the folder of stable-video-diffusion-img2vid-xt has, where it is not its classes' default.
UNET = {
    "_class_name": "UNetSpatioTemporalConditionModel",
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlockSpatioTemporal"] * 3, "DownBlockSpatioTemporal"],
    "up_block_types": ["UpBlockSpatioTemporal", *["CrossAttnUpBlockSpatioTemporal"] * 3],
    "layers_per_block": [2, 2, 2, 2],
    "transformer_layers_per_block": [1, 1, 1, 1],
    "num_attention_heads": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 768,
    "num_frames": 25,
    "sample_size": 96,
}
VAE = {
    "_class_name": "AutoencoderKLTemporalDecoder",
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
    "sample_size": 768,
}


def model(name: str, **changes: Any) -> Any:
    config = OmegaConf.load(CONFIGS / f"{name}.yaml")
    for path, value in changes.items():
        OmegaConf.update(config, f"model.params.{path}", value, force_add=True)
    return OmegaConf.to_container(config.model, resolve=True)


def assert_holds(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {key: config.get(key) for key in expected} == expected


def test_svd_xt_is_described_as_its_published_folder():
    files = folder_configs(folder("svd"), model("svd_xt"), num_frames=25)
    assert_holds(files["unet/config.json"], UNET)
    assert_holds(files["vae/config.json"], VAE)
    assert_holds(files["image_encoder/config.json"], PUBLISHED_CLIP | {"layer_norm_eps": 1e-5})
    scheduler = {"sigma_min": 0.002, "sigma_max": 700.0, "timestep_type": "continuous"}
    scheduler |= {"prediction_type": "v_prediction", "use_karras_sigmas": True}
    assert_holds(files["scheduler/scheduler_config.json"], scheduler)
    assert_holds(
        files["feature_extractor/preprocessor_config.json"], {"size": {"shortest_edge": 224}}
    )
    assert files["model_index.json"]["vae"] == ["diffusers", "AutoencoderKLTemporalDecoder"]


@pytest.mark.parametrize(("name", "quantised"), [("svd_image_decoder", True), ("sv3d_u", False)])
def test_a_decoder_of_single_frames_is_an_image_autoencoder(name, quantised):
    vae = folder_configs(folder(name), model(name), num_frames=14)["vae/config.json"]
    assert vae["_class_name"] == "AutoencoderKL"
    assert vae["use_post_quant_conv"] is quantised


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("network_config.params.use_spatial_context", False),
        ("network_config.params.merge_strategy", "learned"),
        ("network_config.params.max_ddpm_temb_period", 1000),
        ("first_stage_config.params.decoder_config.params.merge_strategy", "fixed"),
        ("sampler_config.params.discretization_config.params.rho", 5.0),
    ],
)
def test_what_diffusers_cannot_have_is_refused(path, value):
    name = path.rpartition(".")[2]
    with pytest.raises(ValueError, match=rf"{name}: expected .* diffusers folder .* got {value}"):
        folder_configs(folder("svd"), model("svd", **{path: value}), num_frames=14)


def test_an_autoencoder_of_one_block_a_level_is_refused():
    """diffusers would build one block in the middle, leave the attention out and load the rest."""
    fewer = {k: s for k, s in folder("svd").items() if not k.startswith("vae/") or not _second(k)}
    with pytest.raises(ValueError, match=r"num_res_blocks .* expected 2 .* got \[1\]"):
        folder_configs(fewer, model("svd"), num_frames=14)


def _second(key: str) -> bool:
    return ("decoder.up_blocks" in key and ".resnets.2." in key) or (
        "encoder.down_blocks" in key and ".resnets.1." in key
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"num_attention_heads": 20, "hidden_act": "gelu"}),
        ({"quick_gelu": True}, {"num_attention_heads": 20, "hidden_act": "quick_gelu"}),
    ],
)
def test_a_tower_given_by_its_numbers(changes, expected):
    """Caught: heads and activation of the usual tower, which tensors do not tell."""
    arch = {"embed_dim": 1024, "vision_cfg": {"layers": 32, "width": 1280}} | changes
    params = model("svd")
    embedder = params["params"]["conditioner_config"]["params"]["emb_models"][0]["params"]
    embedder["open_clip_embedding_config"]["params"]["arch"] = arch
    files = folder_configs(folder("svd"), params, num_frames=14)
    assert_holds(files["image_encoder/config.json"], expected)
