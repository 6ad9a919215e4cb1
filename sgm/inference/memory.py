"""Where weights live, and in which type."""

import torch
from torch import nn

from sgm.device import has_fast_bfloat16
from sgm.models.diffusion import DiffusionEngine


def default_dtype(device: torch.device) -> torch.dtype:
    """The type for the U-Net: the half type with the smaller error that the device is fast in.

    float16 keeps three more bits of a value than bfloat16 and every GPU multiplies it natively; a
    CPU with bfloat16 units takes that, one without them float32.
    """
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


def first_stage_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the autoencoders beside a U-Net of ``dtype``: in float16 they overflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def place(engine: DiffusionEngine, device: torch.device, dtype: torch.dtype) -> None:
    """Bring the parts that sampling uses to a device and type; the others stay where they are.

    The first stage's encoder and the condition autoencoder's decoder are not used: mapped from a
    file, they are never read.
    """
    autoencoder_dtype = first_stage_dtype(dtype)
    engine.model.to(device, dtype)
    _place(engine.first_stage_model, device, autoencoder_dtype, unused="encoder")
    for embedder in engine.conditioner.embedders:
        encoder = getattr(embedder, "encoder", None)
        if isinstance(encoder, nn.Module):
            _place(encoder, device, autoencoder_dtype, unused="decoder")
        else:
            embedder.to(device, dtype)
    engine.eval().requires_grad_(False)


def _place(module: nn.Module, device: torch.device, dtype: torch.dtype, unused: str) -> None:
    for name, child in module.named_children():
        if name != unused:
            child.to(device, dtype)
