"""The attention kernel that trains fastest."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def training_attention(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which attention is computed by what trains fastest on the device.

    On a CPU the fused kernel's backward pass costs several times the plain matrix products for
    sequences as short as a clip's frames; forward alone it is the better one.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
