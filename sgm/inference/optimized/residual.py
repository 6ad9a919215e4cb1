"""Residual blocks, over space and over time, of the U-Net and of the temporal decoder.

Shapes: n = b t rows, h height, w width, c channels; maps are (n, h, w, c).
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
    plus,
)
from sgm.modules.autoencoding.temporal_ae import VideoResnetBlock
from sgm.modules.diffusionmodules.blending import AlphaBlender, mix_weight
from sgm.modules.diffusionmodules.blocks import ResBlock, VideoResBlock
from sgm.modules.diffusionmodules.model import ResnetBlock


def spatial_weight(blender: AlphaBlender) -> float:
    """Weight of the spatial branch in frames of videos."""
    return mix_weight(blender.mix_factor.detach().double(), blender.learned).item()


class Spatial(nn.Module):
    """A residual block over the positions of a frame."""

    def __init__(self, plain: ResBlock | ResnetBlock, place: Place) -> None:
        super().__init__()
        if isinstance(plain, ResBlock):
            norms, convs = _parts(plain)
            skip = plain.skip_connection
        else:
            norms, convs = (plain.norm1, plain.norm2), (plain.conv1, plain.conv2)
            skip = plain.nin_shortcut
        self.norms = nn.ModuleList(GroupNorm(norm, place) for norm in norms)
        self.convs: Any = nn.ModuleList(Convolution.of(conv, place) for conv in convs)
        self.skip = nn.Identity() if isinstance(skip, nn.Identity) else Linear.of(skip, place)

    def forward(self, x: Tensor) -> Tensor:
        """(n, h, w, c_in) -> (n, h, w, c_out)."""
        return plus(*self.product(x))

    def product(self, x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The result, and a bias that is still to be added.

        Args:
            x: (n, h, w, c_in).
            shift: (r, c_out), the embedding.

        Returns:
            (n, h, w, c_out), and (c_out,) or None.
        """
        h, bias = self.convs[0].product(self.norms[0](x))
        h, bias = self.convs[1].product(self.norms[1](h, _sum(shift, bias)))
        return h.add_(self.skip(x)), bias


class Temporal(nn.Module):
    """A residual block over the frames of a clip whose branch is weighted.

    Both blends end here: the U-Net's ``a x + (1 - a) (x + f(x))`` and the decoder's
    ``(1 - a) x + a (x + f(x))`` are ``x + share f(x)``.
    """

    def __init__(self, plain: ResBlock, place: Place, share: float) -> None:
        super().__init__()
        norms, convs = _parts(plain)
        self.norms = nn.ModuleList(GroupNorm(norm, place) for norm in norms)
        self.convs: Any = nn.ModuleList(TemporalConvolution(conv, place) for conv in convs)
        self.share = share

    def forward(
        self,
        x: Tensor,
        offset: Tensor | None,
        frames: int,
        shift: Tensor | None = None,
        videos: Tensor | None = None,
    ) -> Tensor:
        """(n, h, w, c) -> (n, h, w, c).

        Args:
            x: the spatial block's result; overwritten.
            offset: (c,), which is still to be added to that, or None.
            frames: rows of a clip.
            shift: (r, c), the embedding.
            videos: (n,), 1 for frames of videos and 0 for single images, or None for videos alone.
        """
        given = _sum(None, offset)
        h, bias = self.convs[0].product(self.norms[0](x, given, frames), frames)
        h, bias = self.convs[1].product(self.norms[1](h, _sum(shift, bias), frames), frames)
        late = _sum(None, bias)
        if videos is not None:
            h *= videos[:, None, None, None]
            late = late if late is None else late * videos[:, None]
        if late is None:
            return plus(x, offset).add_(h, alpha=self.share)
        late = self.share * late
        return _weighted(x, h, self.share, late if given is None else given + late)


class SpatioTemporal(nn.Module):
    """The residual block of the U-Net or of the temporal decoder: over space, then over time."""

    def __init__(self, plain: VideoResBlock | VideoResnetBlock, place: Place) -> None:
        super().__init__()
        self.spatial = Spatial(plain, place)
        self.marks_images = False
        if isinstance(plain, VideoResBlock):
            share = 1 - spatial_weight(plain.time_mixer)
            self.marks_images = plain.time_mixer.marks_images
        else:
            share = mix_weight(plain.mix_factor.detach().double(), plain.learned).item()
        self.temporal = Temporal(plain.time_stack, place, share)

    def forward(
        self,
        x: Tensor,
        frames: int,
        shifts: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
        videos: Tensor | None = None,
    ) -> Tensor:
        """(n, h, w, c_in) -> (n, h, w, c_out); see :class:`Temporal`."""
        x, offset = self.spatial.product(x, shifts[0])
        return self.temporal(x, offset, frames, shifts[1], videos if self.marks_images else None)


def _sum(shift: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Rows (r, c) and a vector (c,) as rows."""
    if bias is None:
        return shift
    return bias[None] if shift is None else shift + bias


def _weighted(x: Tensor, h: Tensor, share: float, shift: Tensor) -> Tensor:
    """``x + share h + shift`` for maps (n, h, w, c) and rows (r, c), in one pass."""
    tokens, delta = x.flatten(1, 2), h.flatten(1, 2)
    return kernels.blend(tokens, tokens, delta, shift, 1 - share).view_as(x)


def _parts(plain: ResBlock) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The norms and the convolutions of a block."""
    return (plain.in_layers[0], plain.out_layers[0]), (plain.in_layers[2], plain.out_layers[3])
