"""A tiny Stable Video Diffusion as diffusers builds it, and the native configuration equal to it.

Every weight is drawn from a seed, norms, biases, mix factors and layers that are born zero
included, so that a tensor in the wrong place changes the result::

    from tests.foreign import folder_tensors, native_config, tiny_diffusers_pipeline

    pipeline = tiny_diffusers_pipeline(seed=1)       # StableVideoDiffusionPipeline
    pipeline.save_pretrained(tmp_path / "folder")
    tensors = folder_tensors(pipeline)               # "unet/conv_in.weight": ..., all parts
    config = native_config()                         # the YAML's tree for the same architecture

Figures: pictures in multiples of 8, latents of 4 channels at a quarter of their size, a context
token of 24 channels, a vector of 3 x 16 channels. The autoencoder has two residual blocks a level:
diffusers' temporal decoder has as many in its middle, where every model has two.
"""

import os
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from sgm.convert import plan
from sgm.models.diffusion import DiffusionEngine
from sgm.util import instantiate_from_config
from tests.tiny import draw_weights, tiny_config

os.environ.setdefault("HF_HUB_OFFLINE", "1")

UNET: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": (64, 128),
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "num_attention_heads": (4, 8),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 48,
    "num_frames": 4,
    "sample_size": 16,
}
VAE: dict[str, Any] = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 64,
}
CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 224,  # diffusers' pipeline knows no other size
    "patch_size": 56,
    "projection_dim": 24,
    "hidden_act": "gelu",
}
# The image encoder that all published models have.
PUBLISHED_CLIP: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
# As the published folders have it.
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "sigma_min": 0.002,
    "sigma_max": 700.0,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "steps_offset": 1,
    "use_karras_sigmas": True,
}

NETWORK = {
    "model_channels": 64,
    "channel_mult": [1, 2],
    "attention_resolutions": [1],
    "num_res_blocks": 1,
    "num_head_channels": 16,
    "context_dim": 24,
    "adm_in_channels": 48,
}
AUTOENCODER = {"ch": 32, "ch_mult": [1, 1, 2], "num_res_blocks": 2}
TOWER = {"image_size": 224, "patch_size": 56, "width": 32, "head_width": 16, "layers": 2}


def tiny_diffusers_pipeline(seed: int = 0, **unet: Any) -> Any:
    """A random ``StableVideoDiffusionPipeline`` in evaluation mode; ``unet`` changes its U-Net."""
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    side = CLIP["image_size"]
    pipeline = StableVideoDiffusionPipeline(
        vae=AutoencoderKLTemporalDecoder(**VAE),
        image_encoder=CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP)),
        unet=UNetSpatioTemporalConditionModel(**(UNET | unet)),
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side),
    )
    for number, part in enumerate((pipeline.unet, pipeline.vae, pipeline.image_encoder)):
        draw_weights(part.eval(), seed=3 * seed + number)
    return pipeline


def folder_tensors(pipeline: Any) -> dict[str, Tensor]:
    """All weights of a pipeline, named as in :mod:`sgm.convert`: ``unet/conv_in.weight``."""
    return {
        f"{part}/{key}": tensor
        for part in ("unet", "vae", "image_encoder")
        for key, tensor in getattr(pipeline, part).state_dict().items()
    }


def native_config(network: dict[str, Any] = NETWORK, **changes: Any) -> DictConfig:
    """The YAML's tree that describes the model of :func:`tiny_diffusers_pipeline`.

    Args:
        network: parameters of the U-Net that differ from the tiny model's.
        changes: as for :func:`tests.tiny.tiny_config`, made afterwards.
    """
    embedders = "conditioner_config.params.emb_models"
    arch = {"embed_dim": 24, "vision_cfg": TOWER}
    groups = {
        "network_config.params": network,
        f"{embedders}.0.params.open_clip_embedding_config.params": {"arch": arch},
        f"{embedders}.3.params.encoder_config.params.ddconfig": AUTOENCODER,
        "first_stage_config.params.encoder_config.params": AUTOENCODER,
        "first_stage_config.params.decoder_config.params": AUTOENCODER,
    }
    flat = {
        f"{path}.{key}": value for path, group in groups.items() for key, value in group.items()
    }
    return tiny_config(**(flat | changes))


def native_engine(tensors: dict[str, Tensor], config: DictConfig | None = None) -> DiffusionEngine:
    """The native model with the weights of a diffusers folder, in evaluation mode.

    What a folder has no values for is zero: the condition autoencoder's decoder, used by nothing.
    """
    with torch.device("meta"):
        engine = instantiate_from_config((config or native_config()).model)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    conversion = plan(shapes, source="diffusers", target="native")
    state = {key: torch.zeros(value.shape) for key, value in engine.state_dict().items()}
    absent = {key for key in state if key.startswith(conversion.absent)}
    native = conversion.convert(tensors)
    assert state.keys() - native.keys() == absent
    engine.load_state_dict(state | native, assign=True)
    return engine.eval()
