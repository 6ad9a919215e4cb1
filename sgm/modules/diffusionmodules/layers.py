"""Small parts that the U-Net and the autoencoders share.

Shapes: b clips, t frames, c channels, h height, w width; n = b t rows.
"""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

GROUPS = 32


def group_norm(channels: int, eps: float = 1e-6) -> nn.GroupNorm:
    """GroupNorm over 32 groups.

    Two epsilons are in use: 1e-6 in the autoencoder's spatial layers and before transformers,
    1e-5 in the U-Net's residual blocks and in every temporal residual block. With 32 channels, one
    to a group, the norm takes away whatever is added to a whole channel, embeddings included: a
    U-Net wants 64 or more.

    Raises:
        ValueError: ``channels`` is not a multiple of 32.
    """
    if channels % GROUPS:
        raise ValueError(f"expected a number of channels divisible by {GROUPS}, got {channels}")
    return nn.GroupNorm(GROUPS, channels, eps=eps)


def zero_init(module: M) -> M:
    """Set all parameters of ``module`` to zero, so that its residual branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def sinusoidal_embedding(x: Tensor, dim: int, max_period: float = 10_000) -> Tensor:
    """Embed numbers as cosines and sines of geometrically spaced frequencies, in float32.

    As in "Attention Is All You Need" (arXiv 1706.03762, section 3.5), cosines first.

    Args:
        x: numbers of shape (n,).
        dim: width of the embedding; an odd width ends in a zero.
        max_period: the slowest wave's period is ``2 pi max_period`` (approached, not reached).

    Returns:
        Float32 tensor (n, dim) on the device of ``x``.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=x.device) / half
    angle = x.float()[:, None] * torch.exp(-math.log(max_period) * exponent)
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, dim % 2))


class TemporalConv3d(nn.Conv3d):
    """Convolution over (t, h, w) that keeps the size.

    A kernel of (k, 1, 1) runs as the equal 2-D convolution (k, 1) over (t, h w): the same numbers,
    without the slow paths that libraries have for thin 3-D kernels.
    """

    def __init__(self, c_in: int, c_out: int, kernel_size: tuple[int, int, int]) -> None:
        t, h, w = kernel_size
        super().__init__(c_in, c_out, kernel_size, padding=(t // 2, h // 2, w // 2))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c_in, t, h, w) -> (b, c_out, t, h, w)."""
        return self._convolved(x, self.kernel_size[0] // 2)

    def within(self, x: Tensor) -> Tensor:
        """(b, c_in, t, h, w) -> (b, c_out, t - k + 1, h, w): where the kernel lies in the clip."""
        return self._convolved(x, 0)

    def _convolved(self, x: Tensor, margin: int) -> Tensor:
        """With so many frames of zeros before the first and after the last."""
        if self.kernel_size[1:] != (1, 1):
            padding = (margin, *(size // 2 for size in self.kernel_size[1:]))
            return F.conv3d(x, self.weight, self.bias, padding=padding)
        out = F.conv2d(x.flatten(3), self.weight[..., 0], self.bias, padding=(margin, 0))
        return out.unflatten(3, x.shape[3:])


def kernel_3d(size: int | list[int] | tuple[int, ...]) -> tuple[int, int, int]:
    """Normalise a YAML's kernel size: 3 -> (3, 3, 3), [3, 1, 1] -> (3, 1, 1).

    Raises:
        ValueError: not one or three odd numbers.
    """
    kernel = (size,) * 3 if isinstance(size, int) else tuple(size)
    if len(kernel) != 3 or any(k % 2 == 0 for k in kernel):
        raise ValueError(f"expected one or three odd kernel sizes, got {size}")
    return kernel


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution."""

    def __init__(self, c_in: int, c_out: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out or c_in, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c_out, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
