"""The decoders for sampling: the plain networks' numbers from less work.

Shapes: n = b t rows, t frames, z latent channels, f the upsampling factor, h height, w width.
"""

from typing import Any

from torch import Tensor, nn

from sgm import kernels
from sgm.inference.optimized.layers import (
    Convolution,
    GroupNorm,
    Linear,
    Place,
    TemporalConvolution,
    UpsampleConvolution,
)
from sgm.inference.optimized.residual import Spatial, SpatioTemporal
from sgm.modules.autoencoding.temporal_ae import AE3DConv, VideoResnetBlock
from sgm.modules.diffusionmodules.model import AttnBlock, Decoder, ResnetBlock


class OptimizedDecoder(nn.Module):
    """A decoder, of images or of videos, made ready for sampling.

    Args:
        plain: the decoder, whose stored weights stay as they are.
        place: brings a stored tensor to the device and type to compute in.
    """

    def __init__(self, plain: Decoder, place: Place) -> None:
        super().__init__()
        self.conv_in = Convolution.of(plain.conv_in, place)
        middle: Any = plain.mid
        layers: list[nn.Module] = [middle.block_1, middle.attn_1, middle.block_2]
        levels: Any = plain.up
        for level in reversed(levels):
            layers += [*level.block, *([level.upsample.conv] if level.upsample else [])]
        self.layers = nn.ModuleList(_optimized(layer, place) for layer in layers)
        self.norm_out = GroupNorm(plain.norm_out, place)
        last: Any = plain.conv_out
        self.conv_out = Convolution.of(last, place)
        over_time = isinstance(last, AE3DConv)
        self.time_out = TemporalConvolution(last.time_mix_conv, place) if over_time else None
        self.tanh_out = plain.tanh_out

    def forward(self, z: Tensor, timesteps: int = 1, skip_video: bool = False) -> Tensor:
        """(n, z, h / f, w / f) -> (n, 3, h, w), about [-1, 1].

        Args:
            z: latents; the rows of a clip follow each other.
            timesteps: t, frames of a clip.
            skip_video: leave the time parts out (pictures, not videos).
        """
        h = self.conv_in(z.permute(0, 2, 3, 1).contiguous())
        for layer in self.layers:
            if isinstance(layer, SpatioTemporal):
                h = layer.spatial(h) if skip_video else layer(h, timesteps)
            else:
                h = layer(h)
        h = self.conv_out(self.norm_out(h))
        if self.time_out is not None and not skip_video:
            h = self.time_out(h, timesteps)
        h = h.permute(0, 3, 1, 2)
        return h.tanh() if self.tanh_out else h


class Attention(nn.Module):
    """Single-head self-attention over the positions of a picture."""

    def __init__(self, plain: AttnBlock, place: Place) -> None:
        super().__init__()
        self.norm = GroupNorm(plain.norm, place, silu=False)
        self.qkv = Linear.joined([plain.q, plain.k, plain.v], place)
        self.out = Linear.of(plain.proj_out, place)

    def forward(self, x: Tensor) -> Tensor:
        """(n, h, w, c) -> (n, h, w, c)."""
        qkv = self.qkv(self.norm(x)).flatten(1, 2)
        return self.out(kernels.spatial_attention(qkv, heads=1).view_as(x)).add_(x)


def _optimized(layer: nn.Module, place: Place) -> nn.Module:
    match layer:
        case VideoResnetBlock():
            return SpatioTemporal(layer, place)
        case ResnetBlock():
            return Spatial(layer, place)
        case AttnBlock():
            return Attention(layer, place)
        case nn.Conv2d():
            return UpsampleConvolution(layer, place)
        case nn.Identity():
            return layer
    raise TypeError(f"expected a layer of a Decoder, got {type(layer).__name__}")
