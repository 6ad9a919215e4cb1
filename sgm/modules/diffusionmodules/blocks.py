"""Residual blocks of the video U-Net.

Shapes: b clips, t frames, n = b t rows, c channels, e width of the embedding.
"""

from einops import rearrange
from torch import Tensor, nn

from sgm.modules.diffusionmodules.blending import AlphaBlender
from sgm.modules.diffusionmodules.layers import TemporalConv3d, group_norm, zero_init


class ResBlock(nn.Module):
    """Residual block with an additive embedding; time, noise level and conditioning enter here.

    Args:
        c_in: input channels.
        c_out: output channels.
        emb_channels: width of the embedding, or None for a block without one.
        dropout: probability before the second convolution.
        temporal_kernel: None for 3x3 over space; else the kernel over (t, h, w).
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb_channels: int | None,
        dropout: float = 0.0,
        temporal_kernel: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()

        def conv(a: int, b: int) -> nn.Module:
            if temporal_kernel is None:
                return nn.Conv2d(a, b, 3, padding=1)
            return TemporalConv3d(a, b, temporal_kernel)

        self.in_layers = nn.Sequential(group_norm(c_in, 1e-5), nn.SiLU(), conv(c_in, c_out))
        if emb_channels is not None:
            self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, c_out))
        self.out_layers = nn.Sequential(
            group_norm(c_out, 1e-5), nn.SiLU(), nn.Dropout(dropout), zero_init(conv(c_out, c_out))
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """Apply the block.

        Args:
            x: (n, c_in, h, w), or (b, c_in, t, h, w) for a temporal block.
            emb: (n, e), or (b, t, e).
        """
        h = self.in_layers(x)
        if emb is not None:
            h = h + _per_position(self.emb_layers(emb), h)
        return self.skip_connection(x) + self.out_layers(h)


def _per_position(emb: Tensor, h: Tensor) -> Tensor:
    """Lay (n, c) or (b, t, c) out so that it adds to (n, c, h, w) or (b, c, t, h, w)."""
    emb = emb if h.ndim == 4 else rearrange(emb, "b t c -> b c t")
    return emb[..., None, None]


class VideoResBlock(ResBlock):
    """A spatial residual block, then a temporal one, blended.

    The result is ``alpha * spatial + (1 - alpha) * temporal`` (:class:`AlphaBlender`).

    Args:
        c_in: input channels.
        c_out: output channels.
        emb_channels: width of the embedding.
        video_kernel_size: kernel of the temporal convolutions over (t, h, w).
        dropout: probability before each second convolution.
        merge_strategy: see :class:`AlphaBlender`.
        merge_factor: start of the blend.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb_channels: int,
        video_kernel_size: tuple[int, int, int],
        dropout: float = 0.0,
        merge_strategy: str = "fixed",
        merge_factor: float = 0.5,
    ) -> None:
        super().__init__(c_in, c_out, emb_channels, dropout)
        self.time_stack = ResBlock(c_out, c_out, emb_channels, dropout, video_kernel_size)
        self.time_mixer = AlphaBlender(merge_factor, merge_strategy)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        emb: Tensor,
        num_frames: int,
        image_only_indicator: Tensor | None = None,
    ) -> Tensor:
        """(b t, c_in, h, w), emb (b t, e) -> (b t, c_out, h, w)."""
        spatial = super().forward(x, emb)
        clip = rearrange(spatial, "(b t) c h w -> b c t h w", t=num_frames)
        temporal = self.time_stack(clip, rearrange(emb, "(b t) e -> b t e", t=num_frames))
        temporal = rearrange(temporal, "b c t h w -> (b t) c h w")
        return self.time_mixer(spatial, temporal, image_only_indicator)
