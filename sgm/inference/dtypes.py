"""Which number types the parts of a model are computed in."""

import torch

from sgm.device import has_fast_bfloat16
from sgm.inference.levels import LEVELS


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


def decoder_dtype(device: torch.device, dtype: torch.dtype, optimize: str) -> torch.dtype:
    """The type of the decoder beside a U-Net of ``dtype``.

    The optimised decoder holds in float16 what overflows in the plain one; a CPU computes float32
    faster than float16.
    """
    scaled = LEVELS[optimize].derived and device.type != "cpu"
    return dtype if scaled else first_stage_dtype(dtype)
