"""The JSON files of a diffusers folder, as ``StableVideoDiffusionPipeline`` reads them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from sgm.convert.conversion import Shapes
from sgm.convert.diffusers.clip import foreign_layers
from sgm.convert.diffusers.unet import UNetShape, foreign_unet
from sgm.convert.diffusers.vae import foreign_decoder, foreign_encoder
from sgm.towers import CLIP_MEAN, CLIP_STD, tower_spec

Config = Mapping[str, Any]

_CLASS, _VERSION = "_class_name", "_diffusers_version"
_SINCE = "0.24.0"  # the first version with these classes
# Of a square picture in the published folders; the pipeline has its own default.
_LATENT_SIDE = 96
_MIDDLE_BLOCKS = 2
# What diffusers' classes do whatever their configuration says: parameter, its value there, and the
# native default.
_FIXED_NETWORK = (
    ("use_spatial_context", True, False),
    ("merge_strategy", "learned_with_images", "fixed"),
    ("max_ddpm_temb_period", 10_000, 10_000),
)
_FIXED_DECODER = (("merge_strategy", "learned", "learned"), ("tanh_out", False, False))


def folder_configs(shapes: Shapes, model: Config, num_frames: int) -> dict[str, dict[str, Any]]:
    """Describe the parts of a diffusers folder.

    Sizes come from the tensors; what these do not tell (heads, noise levels) from the YAML. Two
    kinds of folder load but cannot be called there: SV3D's, whose conditioning no pipeline knows,
    and one whose image encoder looks at other than 224 pixels, to which the pipeline resizes.

    Args:
        shapes: shapes of the folder's tensors: ``plan(..., target="diffusers").shapes``.
        model: the ``model`` section of the native YAML.
        num_frames: frames of a video.

    Returns:
        Contents by path in the folder: ``model_index.json``, ``unet/config.json``, ...

    Raises:
        ValueError: the model has something that diffusers' classes cannot have.
    """
    params = model["params"]
    parts = {part: _below(shapes, f"{part}/") for part in ("unet", "vae", "image_encoder")}
    files = {
        "unet/config.json": _unet(parts["unet"], params) | {"num_frames": num_frames},
        "vae/config.json": _vae(parts["vae"], params),
        "scheduler/scheduler_config.json": _scheduler(params),
    }
    index = {path.partition("/")[0]: ["diffusers", file[_CLASS]] for path, file in files.items()}
    tower = _image_encoder(parts["image_encoder"], params)
    index |= {
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    return {
        "model_index.json": {_CLASS: "StableVideoDiffusionPipeline", _VERSION: _SINCE} | index,
        **files,
        "image_encoder/config.json": tower,
        "feature_extractor/preprocessor_config.json": _processor(tower["image_size"]),
    }


def _unet(shapes: Shapes, params: Config) -> dict[str, Any]:
    network = params["network_config"]["params"]
    _require("network_config.params", network, _FIXED_NETWORK)
    unet = foreign_unet(shapes)
    levels = range(len(unet.blocks))
    first = [f"down_blocks.{level}.resnets.0.spatial_res_block.norm2.weight" for level in levels]
    widths = [shapes[key][0] for key in first]
    kinds = ["CrossAttn" if depth else "" for depth in unet.depths]
    context = shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1]
    return {
        _CLASS: "UNetSpatioTemporalConditionModel",
        _VERSION: _SINCE,
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": list(unet.blocks),
        "down_block_types": [f"{kind}DownBlockSpatioTemporal" for kind in kinds],
        "up_block_types": [f"{kind}UpBlockSpatioTemporal" for kind in reversed(kinds)],
        "transformer_layers_per_block": _depths(unet),
        "num_attention_heads": [_heads(network, width) for width in widths],
        "cross_attention_dim": context,
        "addition_time_embed_dim": _embedder(params, "cond_aug")["outdim"],
        "projection_class_embeddings_input_dim": shapes["add_embedding.linear_1.weight"][1],
        "sample_size": _LATENT_SIDE,
    }


def _depths(unet: UNetShape) -> list[int]:
    """Transformer blocks by level; there the middle has as many as the last level."""
    *depths, last = unet.depths
    if last not in (0, unet.middle):
        raise ValueError(
            f"transformer_depth_middle: expected {last}, as on the last level (a diffusers folder "
            f"has one number for both), got {unet.middle}"
        )
    return [*(depth or 1 for depth in depths), unet.middle]


def _heads(network: Config, width: int) -> int:
    head = network.get("num_head_channels", -1)
    return int(network["num_heads"] if head == -1 else width // head)


def _vae(shapes: Shapes, params: Config) -> dict[str, Any]:
    decoder = params["first_stage_config"]["params"]
    decoder = decoder.get("ddconfig") or decoder["decoder_config"]["params"]
    _require("first_stage_config", decoder, _FIXED_DECODER)
    encoder = foreign_encoder(_below(shapes, "encoder."))
    blocks = {*encoder.blocks, *(n - 1 for n in foreign_decoder(_below(shapes, "decoder.")).blocks)}
    temporal = "decoder.time_conv_out.weight" in shapes
    if len(blocks) > 1 or (temporal and blocks != {_MIDDLE_BLOCKS}):
        raise ValueError(
            f"num_res_blocks of the autoencoder: expected {_MIDDLE_BLOCKS} on every level, as many "
            f"as a temporal decoder of diffusers has in the middle; got {sorted(blocks)}"
        )
    levels = len(encoder.blocks)
    config = {
        _CLASS: "AutoencoderKLTemporalDecoder",
        _VERSION: _SINCE,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "block_out_channels": [
            shapes[f"encoder.down_blocks.{level}.resnets.0.norm2.weight"][0]
            for level in range(levels)
        ],
        "layers_per_block": blocks.pop(),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "sample_size": _LATENT_SIDE * 2 ** (levels - 1),
        "scaling_factor": params["scale_factor"],
        "force_upcast": True,
    }
    if temporal:
        return config
    return config | {
        _CLASS: "AutoencoderKL",
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": encoder.attention,
    }


def _image_encoder(shapes: Shapes, params: Config) -> dict[str, Any]:
    clip = _embedder(params, "cond_frames_without_noise")["open_clip_embedding_config"]["params"]
    width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
    tower = tower_spec(clip.get("arch", "ViT-H-14"))
    positions = shapes["vision_model.embeddings.position_embedding.weight"][0]
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        "projection_dim": shapes["visual_projection.weight"][0],
        "num_hidden_layers": foreign_layers(shapes),
        "num_attention_heads": width // tower.head_width,
        "num_channels": 3,
        "image_size": math.isqrt(positions - 1) * patch,
        "patch_size": patch,
        "hidden_act": "quick_gelu" if tower.quick_gelu else "gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
    }


def _processor(size: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }


def _scheduler(params: Config) -> dict[str, Any]:
    levels = params["sampler_config"]["params"]["discretization_config"].get("params", {})
    _require("discretization_config.params", levels, (("rho", 7.0, 7.0),))
    return {
        _CLASS: "EulerDiscreteScheduler",
        _VERSION: _SINCE,
        "prediction_type": "v_prediction",
        "sigma_min": levels.get("sigma_min", 0.002),
        "sigma_max": levels.get("sigma_max", 80.0),
        "use_karras_sigmas": True,
        "timestep_type": "continuous",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "num_train_timesteps": 1000,
        # Without effect beside the noise levels above; in every published folder.
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }


def _embedder(params: Config, input_key: str) -> Config:
    """Parameters of the embedder of ``input_key``."""
    embedders = params["conditioner_config"]["params"]["emb_models"]
    found = next((e["params"] for e in embedders if e["input_key"] == input_key), None)
    if found is None:
        raise ValueError(f"emb_models: expected one with input_key {input_key}, got none")
    return found


def _require(path: str, params: Config, fixed: Iterable[tuple[str, Any, Any]]) -> None:
    for name, expected, native in fixed:
        got = params.get(name, native)
        if got != expected:
            raise ValueError(
                f"{path}.{name}: expected {expected}, the only one that a diffusers folder can "
                f"hold; got {got}"
            )


def _below(shapes: Shapes, prefix: str) -> Shapes:
    return {key.removeprefix(prefix): s for key, s in shapes.items() if key.startswith(prefix)}
