"""A random model, and diffusers' modules over the same tensors."""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from scripts.bench.presets import Preset
from sgm.convert import folder_configs, plan
from sgm.inference.settings import ModelFiles, read_config
from sgm.inference.specs import SPECS, find_config
from sgm.models.diffusion import DiffusionEngine
from sgm.util import instantiate_from_config

SEED = 0
# The mode as diffusers' page on this model advises; lengths come one after the other, and code for
# a symbolic one would be slower.
COMPILATION: Any = {"mode": "reduce-overhead", "dynamic": False}
_STRIDE, _STARTS = 7919, 1 << 16


def model_files(preset: Preset) -> ModelFiles:
    """The preset's model: its YAML with the preset's changes."""
    path = find_config(preset.model)
    config = OmegaConf.create(read_config(path))
    for name, value in preset.changes.items():
        OmegaConf.update(config, name, value, merge=False, force_add=True)
    plain: Any = OmegaConf.to_container(config)
    plain["params"]["ckpt_path"] = None
    return ModelFiles(SPECS[preset.model], path, plain, Path("random weights"))


def build_engine(files: ModelFiles, device: torch.device, dtype: torch.dtype) -> DiffusionEngine:
    """The model with random weights, the same ones in every type but for its rounding."""
    with torch.device("meta"):
        engine: DiffusionEngine = instantiate_from_config(files.config)
    shapes = {key: tuple(value.shape) for key, value in engine.state_dict().items()}
    engine.load_state_dict(draw(shapes, device, dtype), assign=True)
    return engine.eval().requires_grad_(False)


def draw(
    shapes: Mapping[str, Sequence[int]], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Random weights under which activations stay finite in half precision.

    Matrices keep the variance of what they multiply, norms stay near one. All take their values
    from one pool of normal numbers, each from another place: drawing afresh takes half a minute.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    size = _STARTS + max(prod(shape) for shape in shapes.values())
    pool = torch.randn(size, generator=generator, device=device)
    weights = {}
    for number, (key, shape) in enumerate(shapes.items()):
        start = number * _STRIDE % _STARTS
        values = pool[start : start + prod(shape)].view(*shape)
        if len(shape) >= 2:
            values = values / prod(shape[1:]) ** 0.5
        elif not key.endswith("mix_factor"):
            values = 0.1 * values + key.endswith("weight")
        weights[key] = values.to(dtype, copy=True)
    return weights


def lay_channels_last(module: nn.Module) -> None:
    """Lay the weights of 2-D convolutions channels-last; ``to`` fails where there are 3-D ones."""
    for weight in module.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def build_diffusers(files: ModelFiles, engine: DiffusionEngine) -> Any:
    """A ``StableVideoDiffusionPipeline`` whose tensors are the engine's own."""
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    kinds: Any = (UNetSpatioTemporalConditionModel, AutoencoderKLTemporalDecoder)
    scheduler: Any = EulerDiscreteScheduler
    state = engine.state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    conversion = plan(shapes, source="native", target="diffusers")
    configs = folder_configs(conversion.shapes, files.config, files.spec.num_frames)
    tower = CLIPVisionConfig(**configs["image_encoder/config.json"])
    processor = configs["feature_extractor/preprocessor_config.json"]
    with torch.device("meta"):
        parts = {
            "unet": kinds[0].from_config(configs["unet/config.json"]),
            "vae": kinds[1].from_config(configs["vae/config.json"]),
            "image_encoder": CLIPVisionModelWithProjection(tower),
        }
    tensors = conversion.convert(state)
    for name, part in parts.items():
        own = {
            k.removeprefix(f"{name}/"): t for k, t in tensors.items() if k.startswith(f"{name}/")
        }
        part.load_state_dict(own, assign=True)
        _fill_positions(part, next(iter(own.values())).device)
        part.eval().requires_grad_(False)
    kind: Any = StableVideoDiffusionPipeline
    pipeline = kind(
        **parts,
        scheduler=scheduler.from_config(configs["scheduler/scheduler_config.json"]),
        feature_extractor=CLIPImageProcessor(**processor),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _fill_positions(module: nn.Module, device: torch.device) -> None:
    """The one tensor that is in no checkpoint: CLIP's numbers of positions."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(part, name, torch.arange(buffer.numel(), device=device).view_as(buffer))
