"""Each saving by itself: a stretch of the plain network, and what has taken its place.

Layers are the model's own, at the size that they have in it. Shapes: b clips, t frames, n = b t
rows, h height, w width, s = h w positions, c channels, d width of the context.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from scripts.bench.compare import relative_error
from scripts.bench.models import SEED, build_engine
from scripts.bench.presets import Preset
from scripts.bench.report import Results, markdown, seconds, shape
from scripts.bench.timing import alternate
from sgm import kernels
from sgm.inference.optimized.layers import (
    Convolution,
    GroupNorm,
    Linear,
    TemporalConvolution,
    UpsampleConvolution,
)
from sgm.inference.optimized.residual import spatial_weight
from sgm.inference.optimized.transformer import (
    Attention,
    FeedForward,
    LayerNorm,
    transformer_rows,
)
from sgm.inference.settings import ModelFiles
from sgm.modules.diffusionmodules.blocks import VideoResBlock
from sgm.modules.diffusionmodules.layers import Upsample, sinusoidal_embedding
from sgm.modules.video_attention import SpatialVideoTransformer

M = TypeVar("M", bound=nn.Module)
Form = Callable[[], Tensor]


@dataclass(frozen=True)
class Saving:
    """One saving.

    Attributes:
        letter: its name in docs/performance.md.
        what: in words.
        size: shape of the activations.
        plain: the stretch as it is written.
        optimised: what takes its place.
    """

    letter: str
    what: str
    size: tuple[int, ...]
    plain: Form
    optimised: Form


@dataclass(frozen=True)
class Row:
    """What a saving came to; see :class:`Saving`. Times are those of every call, in seconds."""

    letter: str
    what: str
    size: tuple[int, ...]
    plain: tuple[float, ...]
    optimised: tuple[float, ...]
    ratio: float
    error: float


def run(preset: Preset, files: ModelFiles, device: torch.device, results: Results) -> bool:
    """Each saving before and after, at the size of the preset's case."""
    case = preset.cases[0]
    engine = build_engine(files, device, getattr(torch, case.dtypes[0]))
    factor = engine.first_stage_model.downsampling
    size = case.height // factor, case.width // factor
    inner = 10 if device.type == "cuda" else 1
    rows = []
    with torch.inference_mode():
        for saving in savings_of(engine.model.diffusion_model, case.frames, case.clips, size):
            rows.append(measure(saving, device, case.stages["unet"], inner))
            results.add(savings=rows)
    header = ["", "saving", "size", "plain", "optimised", "ratio", "difference"]
    title = f"{case.name}, {case.dtypes[0]}; sizes are those of the activations."
    results.show(f"{title}\n\n{markdown(header, map(_cells, rows))}")
    return True


def measure(saving: Saving, device: torch.device, repeats: int, inner: int = 1) -> Row:
    """Time both forms in turn, and compare their results."""
    forms = {"plain": saving.plain, "optimised": saving.optimised}
    plain, optimised = alternate(forms, device, repeats, 2, inner).values()
    for form in (plain, optimised):
        if form.failure:
            raise RuntimeError(f"{saving.what}, {shape(saving.size)}: {form.failure}")
    ratio = median(plain.seconds) / median(optimised.seconds)
    error = relative_error(optimised.result, plain.result)
    times = plain.seconds, optimised.seconds
    return Row(saving.letter, saving.what, saving.size, *times, ratio, error)


def savings_of(network: Any, frames: int, clips: int, size: tuple[int, int]) -> Iterator[Saving]:
    """The savings that layers show by themselves.

    Args:
        network: a ``VideoUNet`` with weights.
        frames: t.
        clips: b.
        size: height and width of the latents.
    """
    for kind in (_Attention, _Tokens, _Residual, _Network):
        yield from kind(network, frames, clips, size).savings()


class _Layers:
    """Draws activations of the network's type, on its device."""

    def __init__(self, network: Any, frames: int, clips: int, size: tuple[int, int]) -> None:
        self.network, self.t, self.n, self.size = network, frames, frames * clips, size
        weight = next(network.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.generator = torch.Generator().manual_seed(SEED)
        self.images = torch.zeros(clips, frames, device=weight.device)

    def normal(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=self.generator).to(self.device, self.dtype)

    def all(self, kind: type[M]) -> list[M]:
        return [each for each in self.network.modules() if isinstance(each, kind)]


class _Transformer(_Layers):
    """The first transformer, and tokens (n, s, c) for it."""

    def __init__(self, network: Any, frames: int, clips: int, size: tuple[int, int]) -> None:
        super().__init__(network, frames, clips, size)
        layer: Any = self.all(SpatialVideoTransformer)[0]
        self.layer = layer
        self.spatial: Any = layer.transformer_blocks[0]
        self.temporal: Any = layer.time_stack[0]
        self.s = size[0] * size[1]
        self.shape = self.n, self.s, layer.in_channels
        self.x, self.delta = self.normal(*self.shape), self.normal(*self.shape)
        context = self.normal(1, 1, self.spatial.attn2.to_k.in_features)
        self.context = context.expand(self.n, 1, -1)
        self.rows = transformer_rows(self.layer, _as_it_is, self.context, self.t)

    def by_position(self, x: Tensor) -> Tensor:
        return rearrange(x, "(b t) s c -> (b s) t c", t=self.t)

    def by_frame(self, x: Tensor) -> Tensor:
        return rearrange(x, "(b s) t c -> (b t) s c", s=self.s)


class _Attention(_Transformer):
    def savings(self) -> Iterator[Saving]:
        spatial, temporal, x, delta = self.spatial, self.temporal, self.x, self.delta
        norms = [LayerNorm(each.norm3, _as_it_is) for each in (spatial, temporal)]

        def cross() -> Tensor:
            total = x + delta
            return spatial.norm3(total + spatial.attn2(spatial.norm2(total), self.context))

        def cross_time() -> Tensor:
            total = self.by_position(x + delta)
            everywhere = repeat(self.context[:: self.t], "b k d -> (b s) k d", s=self.s)
            total = total + temporal.attn2(temporal.norm2(total), everywhere)
            return self.by_frame(temporal.norm3(total))

        def without(norm: LayerNorm, row: Tensor | None) -> Form:
            return lambda: norm(x, delta, row)[1]

        token = "cross-attention to one token, and the norm after it"
        rows = self.rows.spatial[0], self.rows.temporal[0]
        yield Saving("A", f"spatial {token}", self.shape, cross, without(norms[0], rows[0]))
        yield Saving("B", f"temporal {token}", self.shape, cross_time, without(norms[1], rows[1]))

        layers = [spatial.attn1.to_q, spatial.attn1.to_k, spatial.attn1.to_v]
        joined = Linear.joined(layers, _as_it_is)
        yield Saving(
            "J",
            "query, key and value as one product",
            self.shape,
            lambda: torch.cat([layer(x) for layer in layers], dim=-1),
            lambda: joined(x),
        )
        attention = Attention(temporal.attn1, _as_it_is)
        yield Saving(
            "H",
            "attention over time without moving tokens",
            self.shape,
            lambda: self.by_frame(temporal.attn1(self.by_position(x))),
            lambda: attention.over_time(attention.qkv(x), self.t),
        )


class _Tokens(_Transformer):
    def savings(self) -> Iterator[Saving]:
        layer, x, delta = self.layer, self.x, self.delta
        positions, alpha = self.rows.positions[:, None], spatial_weight(layer.time_mixer)
        yield Saving(
            "C",
            "embedding of the frames' numbers",
            self.shape,
            lambda: x + layer.frame_positions(self.n, self.t, x),
            lambda: (x.unflatten(0, (-1, self.t)) + positions).flatten(0, 1),
        )
        yield Saving(
            "F",
            "blend of a transformer",
            self.shape,
            lambda: layer.time_mixer(x, x + delta, self.images),
            lambda: kernels.blend(x, x, delta, None, alpha),
        )
        feed_forward = FeedForward(self.spatial.ff, _as_it_is)
        yield Saving(
            "M", "feed-forward", self.shape, lambda: self.spatial.ff(x), lambda: feed_forward(x)
        )
        projection = Linear.of(layer.proj_in, _as_it_is)
        yield Saving(
            "",
            "linear layer, weights laid out once",
            self.shape,
            lambda: layer.proj_in(x),
            lambda: projection(x),
        )


class _Residual(_Layers):
    """The first residual block on maps (n, h, w, c); as it is written it sees (n, c, h, w)."""

    def savings(self) -> Iterator[Saving]:
        block: Any = self.all(VideoResBlock)[0]
        norm, _, conv = block.in_layers
        x = self.normal(self.n, *self.size, conv.in_channels)
        image, size = x.permute(0, 3, 1, 2), tuple(x.shape)
        norm_and_silu, laid_out = GroupNorm(norm, _as_it_is), Convolution.of(conv, _as_it_is)
        yield Saving(
            "G",
            "GroupNorm and SiLU",
            size,
            lambda: F.silu(norm(image)).permute(0, 2, 3, 1),
            lambda: norm_and_silu(x),
        )
        yield Saving(
            "",
            "3x3 convolution, weights laid out once",
            size,
            lambda: conv(image).permute(0, 2, 3, 1),
            lambda: laid_out(x),
        )
        over_time: Any = block.time_stack.in_layers[2]
        thin = TemporalConvolution(over_time, _as_it_is)

        def three_dimensional() -> Tensor:
            clips = rearrange(x, "(b t) h w c -> b c t h w", t=self.t)
            padding = over_time.padding
            out = F.conv3d(clips, over_time.weight, over_time.bias, padding=padding)
            return rearrange(out, "b c t h w -> (b t) h w c")

        what = "convolution over time, as 3-D and as 2-D"
        yield Saving("O", what, size, three_dimensional, lambda: thin(x, self.t))
        share = 1 - spatial_weight(block.time_mixer)
        yield Saving(
            "E",
            "blend of a residual block",
            size,
            lambda: block.time_mixer(image, image + image, self.images).permute(0, 2, 3, 1),
            lambda: torch.add(x, x, alpha=share),
        )


class _Network(_Layers):
    """What the network has once."""

    def savings(self) -> Iterator[Saving]:
        yield self.upsampling()
        yield self.first_convolution()
        yield self.embeddings()

    def upsampling(self) -> Saving:
        """The last one, to the size of the latents."""
        plain: Any = self.all(Upsample)[-1]
        h, w = (side // 2 for side in self.size)
        x = self.normal(self.n, h, w, plain.conv.in_channels)
        image, optimised = x.permute(0, 3, 1, 2), UpsampleConvolution(plain.conv, _as_it_is)
        return Saving(
            "I",
            "upsampling and 3x3 convolution",
            tuple(x.shape),
            lambda: plain(image).permute(0, 2, 3, 1),
            lambda: optimised(x),
        )

    def first_convolution(self) -> Saving:
        """Of noisy latents and condition latents."""
        conv: Any = self.network.input_blocks[0][0]
        z = conv.in_channels // 2
        x, picture = (self.normal(self.n, *self.size, z) for _ in range(2))
        images = [each.permute(0, 3, 1, 2).contiguous() for each in (x, picture)]
        noisy = Convolution(conv.weight[:, :z], conv.bias)
        once = Convolution(conv.weight[:, z:], None)(picture)
        return Saving(
            "L",
            "first convolution, the condition's part once",
            tuple(x.shape),
            lambda: conv(torch.cat(images, dim=1)).permute(0, 2, 3, 1),
            lambda: noisy(x).add_(once),
        )

    def embeddings(self) -> Saving:
        """Noise level and vector, to what every residual block adds."""
        network = self.network
        blocks: list[Any] = list(self.all(VideoResBlock))
        layers = [part.emb_layers for each in blocks for part in (each, each.time_stack)]
        mlp, label = network.time_embed, network.label_emb
        vector = self.normal(1, label[0][0].in_features).expand(self.n, -1)
        once = label(vector[:1])
        embed = [Linear.of(layer, _as_it_is) for layer in (mlp[0], mlp[2])]
        joined = Linear.joined([layer[1] for layer in layers], _as_it_is)
        level = torch.full((self.n,), 0.4, device=self.device)

        def plain() -> Tensor:
            emb = network.embed(level, vector, self.dtype)
            return torch.cat([layer(emb) for layer in layers], dim=-1)[:1]

        def optimised() -> Tensor:
            waves = sinusoidal_embedding(level[:1], network.model_channels).to(self.dtype)
            return joined(F.silu(embed[1](F.silu(embed[0](waves))) + once))

        return Saving("D", "embeddings, one for all rows", tuple(vector.shape), plain, optimised)


def _as_it_is(stored: Tensor) -> Tensor:
    return stored


def _cells(row: Row) -> list[str]:
    plain, optimised = (seconds(median(each)) for each in (row.plain, row.optimised))
    size, ratio = shape(row.size), f"{row.ratio:.2f}"
    return [row.letter, row.what, size, plain, optimised, ratio, f"{row.error:.0e}"]
