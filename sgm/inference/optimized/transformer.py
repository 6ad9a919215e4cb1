"""The transformer over space and time, with everything gone that one context token makes constant.

A softmax over one key is 1: cross-attention to a single token is ``to_out(to_v(token))`` at every
position and in every step, so its norm, query, key and attention are never computed. What remains
is one row per frame, added where the self-attention's output is.

Shapes: b clips, t frames, n = b t rows, s = h w positions, c channels, k context tokens.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from sgm import kernels
from sgm.inference.optimized.layers import GroupNorm, Held, Linear, Place, stored
from sgm.inference.optimized.residual import spatial_weight
from sgm.modules.attention import CrossAttention
from sgm.modules.attention import FeedForward as PlainFeedForward
from sgm.modules.video_attention import SpatialVideoTransformer

# Channels times rows of a feed-forward that a CPU computes at once: its inside, eight times as
# large, then stays in the cache.
_CPU_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Rows:
    """What one transformer adds to its rows, the same in every step of a run.

    Attributes:
        spatial: (n, c) of each spatial block: its cross-attention.
        temporal: (n, c) of each temporal block, or None for a block without cross-attention.
        positions: (t, c): the embedding of the frames' numbers.
    """

    spatial: tuple[Tensor, ...]
    temporal: tuple[Tensor | None, ...]
    positions: Tensor


class LayerNorm(nn.Module):
    """A residual sum and its LayerNorm; see :func:`sgm.kernels.residual_layer_norm`.

    Attributes:
        dtype: of the norm; None for that of the sum.
    """

    weight: Tensor
    bias: Tensor
    dtype: torch.dtype | None = None

    def __init__(self, plain: nn.LayerNorm, place: Place) -> None:
        super().__init__()
        self.eps = plain.eps
        self.register_buffer("weight", place(plain.weight))
        self.register_buffer("bias", place(plain.bias))

    def forward(
        self, x: Tensor, delta: Tensor | None = None, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(n, s, c) -> the sum and its norm, both (n, s, c)."""
        affine = self.weight, self.bias, self.eps
        return kernels.residual_layer_norm(x, delta, shift, *affine, self.dtype)


class Attention(nn.Module):
    """Self-attention with query, key and value as one product."""

    def __init__(self, plain: CrossAttention, place: Place) -> None:
        super().__init__()
        self.heads = plain.heads
        self.qkv: Any = Linear.joined([plain.to_q, plain.to_k, plain.to_v], place)
        self.out = Linear.of(plain.to_out[0], place)

    def over_space(self, qkv: Tensor) -> Tensor:
        """Attend to the positions of a frame: (n, s, 3 c) -> (n, s, c)."""
        return self.out(kernels.spatial_attention(qkv, self.heads))

    def over_time(self, qkv: Tensor, frames: int) -> Tensor:
        """Attend to the frames of a position: (n, s, 3 c) -> (n, s, c)."""
        return self.out(kernels.temporal_attention(qkv, self.heads, frames))


class FeedForward(nn.Module):
    """GEGLU to four times the width and back, some rows at a time where that is better.

    Attributes:
        pieces: that a device other than a CPU computes one after the other, to need less memory.
        scale: (4 c,), what the inside is multiplied by, or None.
        inside: type of the inside, or None for that of the layer.
    """

    pieces = 1
    scale: Tensor | None
    inside: torch.dtype | None = None

    def __init__(self, plain: PlainFeedForward, place: Place) -> None:
        super().__init__()
        gated: Any = plain.net[0]
        self.widen: Any = Linear.of(gated.proj, place)
        self.narrow: Any = Linear.of(plain.net[2], place)
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        """(n, s, c) -> (n, s, c)."""
        tokens = x.flatten(0, 1)
        on_cpu = x.device.type == "cpu"
        rows = _CPU_ELEMENTS // x.shape[-1] if on_cpu else ceil(len(tokens) / self.pieces)
        parts = [
            self.narrow(kernels.geglu(self.widen(part), self.scale, self.inside))
            for part in tokens.split(max(1, rows))
        ]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).view_as(x)


class SpatialBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward over the positions of one frame."""

    def __init__(self, plain: Any, place: Place) -> None:
        super().__init__()
        self.norm1, self.norm3 = LayerNorm(plain.norm1, place), LayerNorm(plain.norm3, place)
        self.attention = Attention(plain.attn1, place)
        self.feed_forward = FeedForward(plain.ff, place)

    def forward(self, held: Held, cross: Tensor) -> Held:
        """(n, s, c) -> two addends of the result, so that the next norm adds them up."""
        attended = self.attention.over_space(self.attention.qkv(self.norm1(held[0])[1]))
        x, normed = self.norm3(held.pop(), attended, cross)
        del attended
        return [x, self.feed_forward(normed)]


class TemporalBlock(nn.Module):
    """Feed-forward, self-attention, cross-attention, feed-forward over the frames of a position."""

    def __init__(self, plain: Any, place: Place) -> None:
        super().__init__()
        self.norm_in = LayerNorm(plain.norm_in, place)
        self.norm1, self.norm3 = LayerNorm(plain.norm1, place), LayerNorm(plain.norm3, place)
        self.feed_forward_in = FeedForward(plain.ff_in, place)
        self.attention = Attention(plain.attn1, place)
        self.feed_forward = FeedForward(plain.ff, place)

    def forward(
        self, held: Held, positions: Tensor, cross: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From the two addends of the spatial result to three parts of the blend.

        Args:
            held: two of (n, s, c).
            positions: (t, c).
            cross: (n, c), or None.

        Returns:
            Their sum with ``positions``, and two addends of the temporal result.
        """
        delta, x = held.pop(), held.pop()
        start, normed = self.norm_in(x, delta, positions)
        del delta, x
        x, normed = self.norm1(start, self.feed_forward_in(normed))
        qkv = self.attention.qkv(normed)
        del normed
        attended = self.attention.over_time(qkv, len(positions))
        del qkv
        x, normed = self.norm3(x, attended, cross)
        del attended
        return start, x, self.feed_forward(normed)


class Transformer(nn.Module):
    """Blocks over space, each followed by one over time and blended with it.

    Args:
        plain: the layer.
        place: see :mod:`sgm.inference.optimized.layers`.
    """

    def __init__(self, plain: SpatialVideoTransformer, place: Place) -> None:
        super().__init__()
        self.norm = GroupNorm(plain.norm, place, silu=False)
        self.proj_in, self.proj_out = (
            Linear.of(layer, place) for layer in (plain.proj_in, plain.proj_out)
        )
        self.spatial = nn.ModuleList(
            SpatialBlock(block, place) for block in plain.transformer_blocks
        )
        self.temporal = nn.ModuleList(TemporalBlock(block, place) for block in plain.time_stack)
        self.alpha = spatial_weight(plain.time_mixer)
        self.marks_images = plain.time_mixer.marks_images

    def forward(self, x: Tensor, rows: Rows, videos: Tensor | None = None) -> Tensor:
        """Attend over space and time.

        Args:
            x: (n, h, w, c).
            rows: of this transformer and run.
            videos: (n,), 1 for frames of videos and 0 for single images, or None for videos alone.
        """
        alpha: float | Tensor = self.alpha
        # The temporal branch begins with the frames' numbers, which the blend takes off again.
        back = -self.alpha * rows.positions
        if videos is not None and self.marks_images:
            alpha = 1 - (1 - self.alpha) * videos
            back = -alpha[:, None] * rows.positions.repeat(len(x) // len(rows.positions), 1)
        held = [self.proj_in(self.norm(x).flatten(1, 2))]
        back = back.to(x.dtype)
        blocks = zip(self.spatial, self.temporal, rows.spatial, rows.temporal, strict=True)
        for spatial, temporal, cross, cross_time in blocks:
            start, end, delta = temporal(spatial(held, cross), rows.positions, cross_time)
            held = [kernels.blend(start, end, delta, back, alpha)]
            del start, end, delta
        return self.proj_out(held.pop()).view_as(x).add_(x)


def transformer_rows(
    plain: SpatialVideoTransformer, place: Place, context: Tensor, frames: int
) -> Rows:
    """What a run adds in a transformer, from its one context token.

    Args:
        plain: the layer as stored; its weights are placed for the moment.
        place: see :mod:`sgm.inference.optimized.layers`.
        context: (n, 1, c_context).
        frames: t.
    """

    def cross(block: nn.Module, token: Tensor) -> Tensor:
        attention: Any = block.attn2
        return stored(attention.to_out[0], place, stored(attention.to_v, place, token[:, 0]))

    def cross_time(block: nn.Module) -> Tensor | None:
        if not block.has_cross_attention:
            return None
        return cross(block, context[::frames]).repeat_interleave(frames, dim=0)

    return Rows(
        spatial=tuple(cross(block, context) for block in plain.transformer_blocks),
        temporal=tuple(cross_time(block) for block in plain.time_stack),
        positions=stored(plain.time_pos_embed, place, plain.frame_waves(frames, context)),
    )
