"""The video U-Net for sampling: the plain network's numbers from less work.

What is constant over the steps of a run is computed once (:class:`Condition`), what is multiplied
by zero or added to nothing is left out, and what lies between products is one kernel. The plain
network, :class:`~sgm.modules.diffusionmodules.video_model.VideoUNet`, remains the reference: tests
hold both against each other in float64.

Shapes: b clips, t frames, n = b t rows, h height, w width, c channels, e width of the embedding.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.inference.optimized.layers import (
    Convolution,
    GroupNorm,
    Held,
    Linear,
    Place,
    UpsampleConvolution,
    stored,
)
from sgm.inference.optimized.residual import SpatioTemporal
from sgm.inference.optimized.transformer import FeedForward, Rows, Transformer, transformer_rows
from sgm.modules.diffusionmodules.blocks import VideoResBlock
from sgm.modules.diffusionmodules.layers import Upsample, sinusoidal_embedding
from sgm.modules.diffusionmodules.video_model import Downsample, VideoUNet
from sgm.modules.video_attention import SpatialVideoTransformer


@dataclass(frozen=True)
class Condition:
    """What the network adds in every step of a run, the same each time.

    Attributes:
        frames: t.
        picture: (b, h, w, c), or (n, h, w, c) where frames of a clip differ: the first convolution
            of the condition latents; or None.
        label: (n, e), or (1, e) where all rows are equal: the embedded vector, or None.
        rows: of each transformer, in order.
        videos: (n,), 1 for frames of videos and 0 for single images, or None for videos alone.
    """

    frames: int
    picture: Tensor | None
    label: Tensor | None
    rows: tuple[Rows, ...]
    videos: Tensor | None


def fits(plain: VideoUNet, cond: Mapping[str, Tensor]) -> bool:
    """Whether a network and its conditioning have what :class:`OptimizedUNet` builds on.

    That is one context token per row, from which the temporal transformers take theirs, as in
    every published model.
    """
    context = cond.get("crossattn")
    transformers = [each for each in plain.modules() if isinstance(each, SpatialVideoTransformer)]
    return (
        context is not None
        and context.shape[1] == 1
        and all(
            each.use_spatial_context or not block.has_cross_attention
            for each in transformers
            for block in each.time_stack
        )
    )


@dataclass
class Deep:
    """Deep features for calls that share them: an approximation (DeepCache, arXiv 2312.00858).

    Attributes:
        features: what comes up to the level of full size, (n, h, w, c); None before the first
            call, which computes them. With them, only the level of full size is computed.
    """

    features: Tensor | None = None


class OptimizedUNet(nn.Module):
    """The network made ready for sampling, where it :func:`fits`.

    Args:
        plain: the network, whose stored weights stay as they are and are still needed: the parts
            that run once per run are taken from there.
        place: brings a stored tensor to the device and type to compute in.
    """

    def __init__(self, plain: VideoUNet, place: Place) -> None:
        super().__init__()
        self._place = place
        parts: Any = plain
        self._plain = [parts]  # in a list, so that the stored weights are no part of this module
        self.model_channels = plain.model_channels
        self.embed = nn.ModuleList(
            Linear.of(layer, place) for layer in (parts.time_embed[0], parts.time_embed[2])
        )
        residual = [block for block in plain.modules() if isinstance(block, VideoResBlock)]
        self.shifts = _Shifts(residual, place)
        first, last = parts.input_blocks[0][0], parts.out[2]
        self.latent_channels: int = last.out_channels
        self.first = Convolution(place(first.weight)[:, : self.latent_channels], place(first.bias))
        numbers = (count(), count())
        self.input_blocks, self.middle_block, self.output_blocks = (
            nn.ModuleList(_Block(block, place, numbers) for block in blocks)
            for blocks in (parts.input_blocks[1:], [parts.middle_block], parts.output_blocks)
        )
        down = (isinstance(block[0], Downsample) for block in parts.input_blocks[1:])
        self.outer = next((i for i, found in enumerate(down) if found), len(self.input_blocks))
        self.norm_out = GroupNorm(parts.out[0], place)
        self.conv_out = Convolution.of(last, place)

    def split_feed_forwards(self, pieces: int) -> None:
        """Have feed-forwards computed in so many pieces: the same numbers in less memory."""
        for module in self.modules():
            if isinstance(module, FeedForward):
                module.pieces = pieces

    def condition(
        self,
        cond: Mapping[str, Tensor],
        frames: int,
        image_only_indicator: Tensor | None = None,
    ) -> Condition:
        """Compute what stays the same over the steps of a run.

        Args:
            cond: ``crossattn`` (n, 1, c_context) and, where the network was built for them,
                ``concat`` (n, z, h, w) and ``vector`` (n, c_vector).
            frames: t.
            image_only_indicator: (b, t); non-zero where a row is an image and no video frame.
        """
        plain, place = self._plain[0], self._place
        given = {key: place(value) for key, value in cond.items()}
        picture = given.get("concat")
        if picture is not None:
            firsts = picture[::frames]
            if _equal(firsts.repeat_interleave(frames, dim=0), picture):
                picture = firsts
            weight = place(plain.input_blocks[0][0].weight)[:, self.latent_channels :]
            picture = Convolution(weight, None)(picture.permute(0, 2, 3, 1).contiguous())
        label = given.get("vector")
        if label is not None and plain.label_emb is not None:
            same = _equal(label[:1].expand_as(label), label)
            label = stored(plain.label_emb, place, label[:1] if same else label)
        images = image_only_indicator
        videos = None if images is None or not images.any() else place((images == 0).flatten())
        transformers = (m for m in plain.modules() if isinstance(m, SpatialVideoTransformer))
        rows = (transformer_rows(each, place, given["crossattn"], frames) for each in transformers)
        return Condition(frames, picture, label, tuple(rows), videos)

    def forward(
        self, x: Tensor, timesteps: Tensor, condition: Condition, deep: Deep | None = None
    ) -> Tensor:
        """Denoise.

        Args:
            x: (n, z, h, w), the scaled noisy latents without the condition latents.
            timesteps: (n,), or (1,) where all rows have the same: c_noise of the denoiser.
            condition: of these rows.
            deep: takes the deep features along to calls that share them; None where none do.

        Returns:
            (n, z, h, w).
        """
        waves = sinusoidal_embedding(timesteps, self.model_channels).to(x.dtype)
        emb = self.embed[1](F.silu(self.embed[0](waves)))
        if condition.label is not None:
            emb = emb + condition.label
        run = _Run(condition, self.shifts(emb))
        skips = [self._begin(x, condition)]
        outer, inner = self.outer, len(self.output_blocks) - self.outer - 1
        _down(self.input_blocks[:outer], skips, run)
        if deep is None or deep.features is None:
            below = skips[-1:]
            _down(self.input_blocks[outer:], below, run)
            held = [self.middle_block[0](below[-1:], run)]
            _up(self.output_blocks[:inner], held, below, run)
        else:
            held = [deep.features]
        if deep is not None:
            (deep.features,) = held
        _up(self.output_blocks[inner:], held, skips, run)
        return self.conv_out(self.norm_out(held.pop())).permute(0, 3, 1, 2)

    def _begin(self, x: Tensor, condition: Condition) -> Tensor:
        """The first convolution, of latents and condition latents: (n, h, w, c)."""
        h = self.first(x.permute(0, 2, 3, 1).contiguous())
        if condition.picture is not None:
            clips = h.unflatten(0, (len(condition.picture), -1))
            clips += condition.picture[:, None]
        return h


@dataclass(frozen=True)
class _Run:
    """One call: its condition, and the shifts of its noise level for every residual block."""

    condition: Condition
    shifts: list[tuple[Tensor, Tensor]]


class _Block(nn.Module):
    """A block of the network: layers one after the other.

    Args:
        plain: the block.
        place: see :mod:`sgm.inference.optimized.layers`.
        numbers: of the next residual block and the next transformer of the network.
    """

    def __init__(
        self, plain: nn.Sequential, place: Place, numbers: tuple[Iterator[int], Iterator[int]]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_optimized(layer, place) for layer in plain)
        residuals, transformers = numbers
        self.numbers = [
            next(residuals)
            if isinstance(layer, SpatioTemporal)
            else next(transformers)
            if isinstance(layer, Transformer)
            else -1
            for layer in self.layers
        ]

    def forward(self, held: Held, run: _Run) -> Tensor:
        """(n, h, w, c_in), or several whose channels are put together -> (n, h', w', c_out)."""
        condition = run.condition
        h = torch.cat(held, dim=-1) if len(held) > 1 else held[0]
        held.clear()
        for layer, number in zip(self.layers, self.numbers, strict=True):
            if isinstance(layer, SpatioTemporal):
                h = layer(h, condition.frames, run.shifts[number], condition.videos)
            elif isinstance(layer, Transformer):
                h = layer(h, condition.rows[number], condition.videos)
            else:
                h = layer(h)
        return h


def _down(blocks: nn.ModuleList, skips: list[Tensor], run: _Run) -> None:
    """Run input blocks from the last skip on, and keep every result."""
    for block in blocks:
        skips.append(block(skips[-1:], run))


def _up(blocks: nn.ModuleList, held: Held, skips: list[Tensor], run: _Run) -> None:
    """Run output blocks, each on what came up and the last skip that is left."""
    for block in blocks:
        held.append(skips.pop())
        held.append(block(held, run))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether the values are known to be equal; on the meta device there are none."""
    return not a.is_meta and torch.equal(a, b)


def _optimized(layer: nn.Module, place: Place) -> nn.Module:
    match layer:
        case VideoResBlock():
            return SpatioTemporal(layer, place)
        case SpatialVideoTransformer():
            return Transformer(layer, place)
        case Downsample():
            return Convolution.of(layer.op, place)
        case Upsample():
            return UpsampleConvolution(layer.conv, place)
    raise TypeError(f"expected a layer of a VideoUNet, got {type(layer).__name__}")


class _Shifts(nn.Module):
    """The embedding layers of all residual blocks as one product.

    ``forward`` gives, for each block, the shifts of its spatial and of its temporal part.
    """

    def __init__(self, blocks: list[VideoResBlock], place: Place) -> None:
        super().__init__()
        layers = [part.emb_layers[1] for block in blocks for part in (block, block.time_stack)]
        self.widths = [layer.out_features for layer in layers]
        self.product = Linear.joined(layers, place)

    def forward(self, emb: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(r, e) -> pairs of (r, c)."""
        shifts = self.product(F.silu(emb)).split(self.widths, dim=-1)
        return list(zip(shifts[::2], shifts[1::2], strict=True))
