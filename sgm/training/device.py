"""Which device to train on, in which precision, and with which attention kernel."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def default_device() -> torch.device:
    """Return the accelerator that torch finds, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Say whether bfloat16 is computed by the device itself, not emulated.

    On a CPU that is so with the instructions AVX512-BF16 or AMX.
    """
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def training_attention(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which attention is computed by what trains fastest on the device.

    On a CPU the fused kernel's backward pass costs several times the plain matrix products for
    sequences as short as a clip's frames; forward alone it is the better one.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
