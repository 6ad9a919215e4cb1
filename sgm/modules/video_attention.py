"""The transformer over space, then over time, of the video U-Net.

Shapes: b clips, t frames, n = b t rows, s = h w positions, c channels, k context tokens.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from sgm.modules.attention import BasicTransformerBlock, CrossAttention, FeedForward
from sgm.modules.diffusionmodules.blending import AlphaBlender
from sgm.modules.diffusionmodules.layers import group_norm, sinusoidal_embedding, zero_init


class VideoTransformerBlock(nn.Module):
    """Feed-forward, self-attention, cross-attention, feed-forward over the frames of a position.

    Args:
        dim: channels.
        heads: number of attention heads.
        dim_head: channels of a head.
        context_dim: channels of the context.
        cross_attention: attend to the context.
        dropout: probability inside attention and feed-forward.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        context_dim: int | None,
        cross_attention: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(dim)
        self.ff_in = FeedForward(dim, dropout=dropout)
        self.attn1 = CrossAttention(dim, None, heads, dim_head, dropout)
        self.ff = FeedForward(dim, dropout=dropout)
        if cross_attention:
            self.norm2 = nn.LayerNorm(dim)
            self.attn2 = CrossAttention(dim, context_dim, heads, dim_head, dropout)
        self.has_cross_attention = cross_attention
        self.norm1 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None, num_frames: int) -> Tensor:
        """(b t, s, c), context (b, k, c_context) -> (b t, s, c)."""
        s = x.shape[1]
        x = rearrange(x, "(b t) s c -> (b s) t c", t=num_frames)
        x = x + self.ff_in(self.norm_in(x))
        x = x + self.attn1(self.norm1(x))
        if self.has_cross_attention:
            if context is not None:
                context = repeat(context, "b k c -> (b s) k c", s=s)
            x = x + self.attn2(self.norm2(x), context)
        x = x + self.ff(self.norm3(x))
        return rearrange(x, "(b s) t c -> (b t) s c", s=s)


class SpatialVideoTransformer(nn.Module):
    """Transformer blocks over space, each followed by one over time and blended with it.

    Stable Video Diffusion (arXiv 2311.15127), appendix D; the blend is :class:`AlphaBlender`.

    Args:
        in_channels: channels, equal to ``heads * dim_head``.
        heads: number of attention heads.
        dim_head: channels of a head.
        depth: pairs of spatial and temporal blocks.
        context_dim: channels of the context.
        time_context_dim: channels of the temporal context, where it is another one.
        use_linear: project tokens with linear layers, else feature maps with 1x1 convolutions.
        use_spatial_context: the temporal context is the first frame's context of each clip.
        merge_strategy: see :class:`AlphaBlender`.
        merge_factor: start of the blend.
        temporal_cross_attention: temporal blocks attend to the context.
        max_time_embed_period: slowest wave of the frame-position embedding.
        dropout: probability inside attention and feed-forward.
    """

    def __init__(
        self,
        in_channels: int,
        heads: int,
        dim_head: int,
        depth: int = 1,
        context_dim: int | None = None,
        time_context_dim: int | None = None,
        use_linear: bool = False,
        use_spatial_context: bool = False,
        merge_strategy: str = "fixed",
        merge_factor: float = 0.5,
        temporal_cross_attention: bool = True,
        max_time_embed_period: float = 10_000,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dim = heads * dim_head
        if use_spatial_context:
            time_context_dim = context_dim
        self.in_channels = in_channels
        self.use_linear = use_linear
        self.use_spatial_context = use_spatial_context
        self.max_time_embed_period = max_time_embed_period
        self.norm = group_norm(in_channels)
        if use_linear:
            self.proj_in: nn.Module = nn.Linear(in_channels, dim)
            self.proj_out: nn.Module = zero_init(nn.Linear(dim, in_channels))
        else:
            self.proj_in = nn.Conv2d(in_channels, dim, 1)
            self.proj_out = zero_init(nn.Conv2d(dim, in_channels, 1))
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(dim, heads, dim_head, context_dim, dropout) for _ in range(depth)
        )
        self.time_stack = nn.ModuleList(
            VideoTransformerBlock(
                dim, heads, dim_head, time_context_dim, temporal_cross_attention, dropout
            )
            for _ in range(depth)
        )
        self.time_pos_embed = nn.Sequential(
            nn.Linear(in_channels, in_channels * 4),
            nn.SiLU(),
            nn.Linear(in_channels * 4, in_channels),
        )
        self.time_mixer = AlphaBlender(merge_factor, merge_strategy)

    def frame_positions(self, rows: int, num_frames: int, like: Tensor) -> Tensor:
        """Embedding of each row's frame number: (b t, 1, c)."""
        table = self.time_pos_embed(self.frame_waves(num_frames, like))
        return repeat(table, "t c -> (b t) 1 c", b=rows // num_frames)

    def frame_waves(self, num_frames: int, like: Tensor) -> Tensor:
        """Sinusoids of the frames' numbers, (t, c), in the type and on the device of ``like``."""
        frames = torch.arange(num_frames, device=like.device)
        waves = sinusoidal_embedding(frames, self.in_channels, self.max_time_embed_period)
        return waves.to(like.dtype)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        num_frames: int,
        time_context: Tensor | None = None,
        image_only_indicator: Tensor | None = None,
    ) -> Tensor:
        """Attend over space and time.

        Args:
            x: (b t, c, h, w).
            context: (b t, k, c_context).
            num_frames: t.
            time_context: (b, k, c_time) or (b, c_time), used without ``use_spatial_context``.
            image_only_indicator: (b, t), see :class:`AlphaBlender`.
        """
        residual, (h, w) = x, x.shape[-2:]
        if self.use_spatial_context and context is not None:
            time_context = context[::num_frames]
        elif time_context is not None and time_context.ndim == 2:
            time_context = time_context[:, None]
        x = self.norm(x)
        if not self.use_linear:
            x = self.proj_in(x)
        x = rearrange(x, "n c h w -> n (h w) c")
        if self.use_linear:
            x = self.proj_in(x)
        positions = self.frame_positions(x.shape[0], num_frames, x)
        for spatial, temporal in zip(self.transformer_blocks, self.time_stack, strict=True):
            x = spatial(x, context)
            mixed = temporal(x + positions, time_context, num_frames)
            x = self.time_mixer(x, mixed, image_only_indicator)
        if self.use_linear:
            x = self.proj_out(x)
        x = rearrange(x, "n (h w) c -> n c h w", h=h, w=w)
        if not self.use_linear:
            x = self.proj_out(x)
        return x + residual
