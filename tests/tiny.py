"""A one-second model: every part of Stable Video Diffusion, random and as small as it gets.

Its videos show nothing, but they depend on picture, seed, noise, motion bucket, fps_id, cond_aug
and guidance, so a test can see whether a value arrives. Building takes a third of a second, four
frames of 64x64 in two steps two thirds (and importing open_clip, once, some seconds)::

    from tests.tiny import tiny_config, tiny_engine, write_tiny_checkpoint

    engine = tiny_engine(seed=1)                        # weights drawn from a seed, evaluation mode

    config = tiny_config(scale_factor=0.5)              # the YAML's tree: config.model.target, ...
    config = tiny_config(**{"sampler_config.params.num_steps": 5})   # changes by dotted path

    weights = write_tiny_checkpoint(tmp_path / "weights.safetensors")         # and a YAML for it
    OmegaConf.save(tiny_config(ckpt_path=str(weights)), tmp_path / "tiny.yaml")

Figures: latents of 4 channels at a quarter of the size; height and width in multiples of 8 (the
U-Net halves once more); one context token of 24 channels; vector of 3 x 16 channels; 3.1 M weights.
"""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from sgm.models.diffusion import DiffusionEngine
from sgm.util import instantiate_from_config

FRAMES = 4
STEPS = 2

YAML = f"""
model:
  target: sgm.models.diffusion.DiffusionEngine
  params:
    scale_factor: 0.18215
    disable_first_stage_autocast: True

    denoiser_config:
      target: sgm.modules.diffusionmodules.denoiser.Denoiser
      params:
        scaling_config:
          target: sgm.modules.diffusionmodules.denoiser_scaling.VScalingWithEDMcNoise

    network_config:
      target: sgm.modules.diffusionmodules.video_model.VideoUNet
      params:
        adm_in_channels: 48
        num_classes: sequential
        use_checkpoint: False
        in_channels: 8
        out_channels: 4
        model_channels: 64  # a GroupNorm of one channel per group would undo every embedding
        attention_resolutions: [2]
        num_res_blocks: 1
        channel_mult: [1, 1]
        num_head_channels: 16
        use_linear_in_transformer: True
        transformer_depth: 1
        context_dim: 24
        spatial_transformer_attn_type: softmax
        extra_ff_mix_layer: True
        use_spatial_context: True
        merge_strategy: learned_with_images
        video_kernel_size: [3, 1, 1]

    conditioner_config:
      target: sgm.modules.GeneralConditioner
      params:
        emb_models:
        - input_key: cond_frames_without_noise
          target: sgm.modules.encoders.modules.FrozenOpenCLIPImagePredictionEmbedder
          params:
            n_cond_frames: 1
            n_copies: 1
            open_clip_embedding_config:
              target: sgm.modules.encoders.modules.FrozenOpenCLIPImageEmbedder
              params:
                arch:
                  embed_dim: 24
                  vision_cfg:
                    {{image_size: 32, patch_size: 16, width: 32, head_width: 16, layers: 1}}

        - input_key: fps_id
          target: sgm.modules.encoders.modules.ConcatTimestepEmbedderND
          params: {{outdim: 16}}

        - input_key: motion_bucket_id
          target: sgm.modules.encoders.modules.ConcatTimestepEmbedderND
          params: {{outdim: 16}}

        - input_key: cond_frames
          target: sgm.modules.encoders.modules.VideoPredictionEmbedderWithEncoder
          params:
            disable_encoder_autocast: True
            n_cond_frames: 1
            n_copies: 1
            is_ae: True
            encoder_config:
              target: sgm.models.autoencoder.AutoencoderKLModeOnly
              params:
                embed_dim: 4
                ddconfig: &autoencoder
                  attn_type: vanilla
                  double_z: True
                  z_channels: 4
                  resolution: 64
                  in_channels: 3
                  out_ch: 3
                  ch: 32
                  ch_mult: [1, 1, 1]
                  num_res_blocks: 1
                  attn_resolutions: []
                  dropout: 0.0
                lossconfig:
                  target: torch.nn.Identity

        - input_key: cond_aug
          target: sgm.modules.encoders.modules.ConcatTimestepEmbedderND
          params: {{outdim: 16}}

    first_stage_config:
      target: sgm.models.autoencoder.AutoencodingEngine
      params:
        loss_config:
          target: torch.nn.Identity
        regularizer_config:
          target: sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer
        encoder_config:
          target: sgm.modules.diffusionmodules.model.Encoder
          params: *autoencoder
        decoder_config:
          target: sgm.modules.autoencoding.temporal_ae.VideoDecoder
          params:
            <<: *autoencoder
            video_kernel_size: [3, 1, 1]

    sampler_config:
      target: sgm.modules.diffusionmodules.sampling.EulerEDMSampler
      params:
        num_steps: {STEPS}
        discretization_config:
          target: sgm.modules.diffusionmodules.discretizer.EDMDiscretization
          params:
            sigma_max: 700.0
        guider_config:
          target: sgm.modules.diffusionmodules.guiders.LinearPredictionGuider
          params:
            num_frames: {FRAMES}
            max_scale: 2.5
            min_scale: 1.0
"""


def tiny_config(**changes: Any) -> DictConfig:
    """The model's YAML as a tree, with ``changes`` to ``model.params`` by (dotted) path.

    A value replaces what stood there, a mapping as a whole; None takes it away.
    """
    config = OmegaConf.create(YAML)
    for path, value in changes.items():
        OmegaConf.update(config, f"model.params.{path}", value, merge=False, force_add=True)
    return config


def tiny_engine(seed: int = 0, **changes: Any) -> DiffusionEngine:
    """The model of :func:`tiny_config` with weights drawn from ``seed``, in evaluation mode.

    The same seed gives the same weights, whatever the global generators' state, and leaves that
    state alone. Layers that are born zero are drawn like the others.
    """
    with torch.device("meta"):
        engine = instantiate_from_config(tiny_config(**changes).model)
    draw_weights(engine.to_empty(device="cpu"), seed)
    return engine.eval()


def draw_weights(module: nn.Module, seed: int) -> None:
    """Draw every weight: matrices keep the variance of what they multiply, norms stay near one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    with torch.no_grad():
        for key, value in module.state_dict().items():
            if value.ndim >= 2:
                value.copy_(normal(value) / value[0].numel() ** 0.5)
            elif key.endswith("mix_factor"):
                value.copy_(normal(value))
            else:
                value.copy_(0.1 * normal(value) + key.endswith("weight"))


def write_tiny_checkpoint(
    path: str | Path, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Write the weights of ``tiny_engine(seed)`` as a safetensors file; returns its path."""
    tensors = {key: value.to(dtype) for key, value in tiny_engine(seed).state_dict().items()}
    save_file(tensors, path)
    return Path(path)
