"""The temporal decoder: the image decoder with time convolutions in every residual block.

Align Your Latents (arXiv 2304.08818), section 3.1.1. Shapes: b clips, t frames, c channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sgm.modules.diffusionmodules.blending import mix_weight
from sgm.modules.diffusionmodules.blocks import ResBlock
from sgm.modules.diffusionmodules.layers import TemporalConv3d, kernel_3d
from sgm.modules.diffusionmodules.model import Decoder, ResnetBlock


class VideoResnetBlock(ResnetBlock):
    """A spatial residual block, then one over time.

    Here the blend is ``alpha * temporal + (1 - alpha) * spatial``: the other way round than in the
    U-Net's :class:`~sgm.modules.diffusionmodules.blending.AlphaBlender`.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        dropout: float,
        kernel: tuple[int, int, int],
        alpha: float,
        learned: bool,
    ) -> None:
        super().__init__(c_in, c_out, dropout)
        self.time_stack = ResBlock(c_out, c_out, None, dropout, kernel)
        self.learned = learned
        if learned:
            self.mix_factor = nn.Parameter(torch.tensor([alpha]))
        else:
            self.register_buffer("mix_factor", torch.tensor([alpha]))

    def forward(self, x: Tensor, timesteps: int, skip_video: bool = False) -> Tensor:  # type: ignore[override]
        """(b t, c_in, h, w) -> (b t, c_out, h, w); ``skip_video`` leaves the time part out."""
        spatial = super().forward(x)
        if skip_video:
            return spatial
        clip = rearrange(spatial, "(b t) c h w -> b c t h w", t=timesteps)
        temporal = rearrange(self.time_stack(clip), "b c t h w -> (b t) c h w")
        alpha = mix_weight(self.mix_factor, self.learned)
        return torch.lerp(spatial, temporal, alpha.to(spatial.dtype))


class AE3DConv(nn.Conv2d):
    """A 3x3 convolution over space, then one over time."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(c_in, c_out, 3, padding=1)
        self.time_mix_conv = TemporalConv3d(c_out, c_out, kernel)

    def forward(self, x: Tensor, timesteps: int, skip_video: bool = False) -> Tensor:  # type: ignore[override]
        """(b t, c_in, h, w) -> (b t, c_out, h, w)."""
        x = super().forward(x)
        if skip_video:
            return x
        clip = rearrange(x, "(b t) c h w -> b c t h w", t=timesteps)
        return rearrange(self.time_mix_conv(clip), "b c t h w -> (b t) c h w")


class VideoDecoder(Decoder):
    """Latents of whole clips to frames that do not flicker.

    Arguments as in :class:`~sgm.modules.diffusionmodules.model.Decoder`, and:

    Args:
        video_kernel_size: kernel of the temporal convolutions over (t, h, w).
        alpha: weight of the temporal branch (fixed), or its start before the sigmoid (learned).
        merge_strategy: ``learned`` or ``fixed``.
        time_mode: must be ``conv-only``, the mode of all published models.

    Raises:
        ValueError: another time mode or merge strategy.
    """

    def __init__(
        self,
        *,
        video_kernel_size: int | Sequence[int] = 3,
        alpha: float = 0.0,
        merge_strategy: str = "learned",
        time_mode: str = "conv-only",
        **params: Any,
    ) -> None:
        if time_mode != "conv-only":
            raise ValueError(f"time_mode: expected 'conv-only', got {time_mode!r}")
        if merge_strategy not in ("learned", "fixed"):
            raise ValueError(
                f"merge_strategy: expected 'learned' or 'fixed', got {merge_strategy!r}"
            )
        self._kernel = kernel_3d(
            video_kernel_size if isinstance(video_kernel_size, int) else tuple(video_kernel_size)
        )
        self._alpha, self._learned = alpha, merge_strategy == "learned"
        super().__init__(**params)

    def make_block(self, c_in: int, c_out: int, dropout: float) -> nn.Module:
        """A residual block over space and time."""
        return VideoResnetBlock(c_in, c_out, dropout, self._kernel, self._alpha, self._learned)

    def make_conv_out(self, c_in: int, c_out: int) -> nn.Module:
        """A last convolution over space and time."""
        return AE3DConv(c_in, c_out, self._kernel)

    def forward(self, z: Tensor, timesteps: int, skip_video: bool = False) -> Tensor:  # type: ignore[override]
        """(b t, z, h / f, w / f) -> (b t, 3, h, w), about [-1, 1].

        Args:
            z: latents; the rows of a clip follow each other.
            timesteps: t, frames of a clip.
            skip_video: leave the time parts out (pictures, not videos).
        """
        return super().forward(z, timesteps=timesteps, skip_video=skip_video)
