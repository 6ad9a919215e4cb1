"""What latents will look like, without a decoder: a linear map to colours, fitted to one picture.

Shapes: t frames, z latent channels, h height, w width, both in latents; H, W in pixels.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sgm.inference.results import to_frames
from sgm.inference.videos import Frames

# Latents around a place that its colour depends on. They also code what is finer than a latent,
# which neighbours give away: alone, a latent shows with twice the error (bundled model).
KERNEL = 3


@dataclass(frozen=True)
class LatentPreview:
    """Colours that are an affine function of the latents at the same place and around it.

    Attributes:
        weight: (3, z, KERNEL, KERNEL), colour in [-1, 1] per unit of latent.
        bias: (3,), colour of latents that are zero.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, latents: Tensor, pixels: Tensor) -> Self:
        """Fit the map to a picture whose latents are known, by ridge regression.

        The penalty on each weight is that of one more place, with latents of mean variance and
        grey pixels. So it hardly counts where places are many, and decides where they are few or
        all alike: then only the mean colour is sure.

        Args:
            latents: (z, h, w), scaled like those that will be shown.
            pixels: (3, H, W) in [-1, 1].
        """
        colours = F.interpolate(pixels[None].cpu().double(), latents.shape[1:], mode="area")
        x = F.unfold(_padded(latents[None]).double(), KERNEL)[0].T
        y = rearrange(colours[0], "c h w -> (h w) c")
        x_mean, y_mean = x.mean(0), y.mean(0)
        x, y = x - x_mean, y - y_mean
        penalty = x.square().mean().sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
        x, y = torch.cat([x, penalty]), torch.cat([y, y.new_zeros(x.shape[1], 3)])
        # This driver takes matrices of any rank: latents that are all alike give zeros.
        weight = torch.linalg.lstsq(x, y, driver="gelsd").solution
        kernel = rearrange(weight, "(z i j) c -> c z i j", i=KERNEL, j=KERNEL)
        return cls(kernel.float(), (y_mean - x_mean @ weight).float())

    def frames(self, latents: Tensor) -> Frames:
        """Latents (t, z, h, w) -> pictures (t, h, w, 3)."""
        colours = F.conv2d(_padded(latents), self.weight, self.bias)
        return to_frames(colours)


def _padded(latents: Tensor) -> Tensor:
    """Latents with their edges repeated, in float32 on the CPU; what is not finite becomes zero."""
    finite = latents.float().cpu().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return F.pad(finite, (KERNEL // 2,) * 4, mode="replicate")
