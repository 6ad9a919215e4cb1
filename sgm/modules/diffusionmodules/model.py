"""The 2-D encoder and decoder of the autoencoder.

Latent diffusion (arXiv 2112.10752), appendix: residual blocks, one attention in the middle, halving
and doubling of the resolution between levels. Shapes: n pictures, c channels, h height, w width.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sgm.modules.diffusionmodules.layers import Upsample, group_norm
from sgm.util import refuse_unknown

# Published YAML files give both networks the same fields; these have no effect on the one.
ENCODER_IGNORED = frozenset(("out_ch", "resolution", "tanh_out"))
DECODER_IGNORED = frozenset(("double_z", "in_channels", "resolution"))
ATTENTION_TYPES = ("vanilla", "vanilla-xformers", "none")


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU, around a residual connection."""

    def __init__(self, c_in: int, c_out: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, h, w) -> (n, c_out, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of a picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, h, w)."""
        y = self.norm(x)
        q, k, v = (rearrange(f(y), "n c h w -> n 1 (h w) c") for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        out = rearrange(out, "n 1 (h w) c -> n c h w", h=x.shape[-2])
        return x + self.proj_out(out)


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded below and to the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, h // 2, w // 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Middle(nn.Module):
    """Residual block, attention, residual block; ``temporal`` goes to the residual blocks."""

    def __init__(self, block_1: nn.Module, attn_1: nn.Module, block_2: nn.Module) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = block_1, attn_1, block_2

    def forward(self, h: Tensor, **temporal: Any) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h, **temporal)), **temporal)


class _Level(nn.Module):
    """The residual blocks of one resolution, then the step to the next (published name)."""

    def __init__(self, blocks: list[nn.Module], step_name: str, step: nn.Module | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.step_name = step_name
        self.add_module(step_name, step)

    def forward(self, h: Tensor, **temporal: Any) -> Tensor:
        for block in self.block:
            h = block(h, **temporal)
        step = getattr(self, self.step_name)
        return h if step is None else step(h)


def _check(attn_type: str, attn_resolutions: Sequence[int]) -> None:
    if attn_type not in ATTENTION_TYPES:
        raise ValueError(
            f"attn_type: expected one of {', '.join(ATTENTION_TYPES)}; got {attn_type!r}"
        )
    if attn_resolutions:
        raise ValueError(
            f"attn_resolutions: expected [] (attention in the middle alone, as in every published "
            f"model), got {list(attn_resolutions)}"
        )


class Encoder(nn.Module):
    """Picture to the moments of its latent distribution.

    Args:
        ch: channels of the first level.
        ch_mult: channels of each level as multiples of ``ch``; the size halves between levels.
        num_res_blocks: residual blocks of a level.
        z_channels: latent channels.
        in_channels: channels of the picture.
        double_z: give mean and log-variance, so twice ``z_channels``.
        dropout: probability inside residual blocks.
        attn_type: ``vanilla`` (``vanilla-xformers`` is the same) or ``none``.
        attn_resolutions: must be empty; named in published YAML files.
        ignored: fields of published YAML files that have no effect here.

    Raises:
        ValueError: an attention type or resolution outside the published ones, or an unknown
            parameter.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        z_channels: int,
        in_channels: int = 3,
        double_z: bool = True,
        dropout: float = 0.0,
        attn_type: str = "vanilla",
        attn_resolutions: Sequence[int] = (),
        **ignored: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(self, ignored, ENCODER_IGNORED)
        _check(attn_type, attn_resolutions)
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        c = ch
        for level, mult in enumerate(ch_mult):
            blocks: list[nn.Module] = []
            for _ in range(num_res_blocks):
                blocks.append(ResnetBlock(c, ch * mult, dropout))
                c = ch * mult
            last = level == len(ch_mult) - 1
            self.down.append(_Level(blocks, "downsample", None if last else Downsample(c)))
        self.mid = _Middle(
            ResnetBlock(c, c, dropout),
            nn.Identity() if attn_type == "none" else AttnBlock(c),
            ResnetBlock(c, c, dropout),
        )
        self.norm_out = group_norm(c)
        self.conv_out = nn.Conv2d(c, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] -> (n, 2 z, h / f, w / f), mean first, then log-variance."""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents to pictures, each frame on its own.

    The video decoder differs in its residual blocks and last convolution alone: it overrides
    :meth:`make_block` and :meth:`make_conv_out`. Arguments as in :class:`Encoder`, and:

    Args:
        out_ch: channels of the picture.
        tanh_out: end in a hyperbolic tangent.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int = 3,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        z_channels: int,
        dropout: float = 0.0,
        attn_type: str = "vanilla",
        attn_resolutions: Sequence[int] = (),
        tanh_out: bool = False,
        **ignored: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(self, ignored, DECODER_IGNORED)
        _check(attn_type, attn_resolutions)
        self.tanh_out = tanh_out
        c = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, c, 3, padding=1)
        self.mid = _Middle(
            self.make_block(c, c, dropout),
            nn.Identity() if attn_type == "none" else AttnBlock(c),
            self.make_block(c, c, dropout),
        )
        levels: list[nn.Module] = []
        for level, mult in reversed(list(enumerate(ch_mult))):
            blocks: list[nn.Module] = []
            for _ in range(num_res_blocks + 1):
                blocks.append(self.make_block(c, ch * mult, dropout))
                c = ch * mult
            levels.append(_Level(blocks, "upsample", None if level == 0 else Upsample(c)))
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = group_norm(c)
        self.conv_out = self.make_conv_out(c, out_ch)

    def make_block(self, c_in: int, c_out: int, dropout: float) -> nn.Module:
        """A residual block of this decoder."""
        return ResnetBlock(c_in, c_out, dropout)

    def make_conv_out(self, c_in: int, c_out: int) -> nn.Module:
        """The last convolution of this decoder."""
        return nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, z: Tensor, **temporal: Any) -> Tensor:
        """(n, z, h / f, w / f) -> (n, 3, h, w), about [-1, 1].

        ``temporal`` goes to every residual block and to the last convolution.
        """
        h = self.mid(self.conv_in(z), **temporal)
        for level in reversed(self.up):
            h = level(h, **temporal)
        h = self.conv_out(F.silu(self.norm_out(h)), **temporal)
        return h.tanh() if self.tanh_out else h
