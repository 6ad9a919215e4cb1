"""The picture resize that the published CLIP embeddings were trained with."""

import torch
import torch.nn.functional as F
from torch import Tensor


def antialiased_resize(x: Tensor, height: int, width: int) -> Tensor:
    """Blur with a Gaussian as wide as the reduction asks for, then interpolate bicubically.

    Each axis that shrinks by a factor r is blurred with sigma = (r - 1) / 2 over about four sigma,
    borders reflected; the interpolation aligns corners. This is not torch's ``antialias=True``:
    the weights expect this one.

    Args:
        x: (n, c, h, w).
        height: target height in pixels.
        width: target width in pixels.

    Returns:
        (n, c, height, width); overshoots the input's range a little at edges.
    """
    factors = (x.shape[-2] / height, x.shape[-1] / width)
    if max(factors) > 1:
        kernels = [_gaussian(factor).to(x) for factor in factors]
        pad_h, pad_w = (len(kernel) // 2 for kernel in kernels)
        channels = x.shape[1]
        x = F.pad(x, (pad_w, pad_w, pad_h, pad_h), mode="reflect")
        x = F.conv2d(x, kernels[0][:, None].expand(channels, 1, -1, 1), groups=channels)
        x = F.conv2d(x, kernels[1][None].expand(channels, 1, 1, -1), groups=channels)
    return F.interpolate(x, size=(height, width), mode="bicubic", align_corners=True)


def _gaussian(factor: float) -> Tensor:
    """Normalised window for a reduction by ``factor``; an odd number of taps, three at least."""
    sigma = max((factor - 1) / 2, 0.001)
    taps = int(max(4 * sigma, 3)) | 1
    offset = torch.arange(taps, dtype=torch.float32) - taps // 2
    window = torch.exp(-(offset**2) / (2 * sigma**2))
    return window / window.sum()
