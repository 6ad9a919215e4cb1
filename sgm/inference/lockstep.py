"""Decoding all parts of a clip in step: the result of the whole decode in the memory of a part.

Parts that are decoded one after the other differ from the whole in their normalisations: a
GroupNorm sees the mean and variance of its part alone, and a trained decoder carries information
in them. Here every convolution is done for all parts before the next begins, so that the
statistics of its result are those of the whole, and parts overlap by no more than a kernel.
Between convolutions the activations are parked, in the device's memory or in the host's. Nothing
is approximated: what differs from the whole decode is the rounding of sums.

Shapes: t frames, z latent channels, c channels, h height, w width, g groups.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.inference.moments import Moments
from sgm.inference.streaming import pinned
from sgm.modules.autoencoding.temporal_ae import AE3DConv, VideoDecoder, VideoResnetBlock
from sgm.modules.diffusionmodules.layers import TemporalConv3d
from sgm.modules.diffusionmodules.model import Decoder


@dataclass(frozen=True)
class _Step:
    """A convolution, with the GroupNorm and SiLU before it.

    Attributes:
        conv: (t, c, h, w) -> (t, c', scale h, scale w).
        norm: what its input goes through first; None for nothing.
        clip: the norm's statistics are over all frames, not over each.
        halo: frames and rows of the input beyond a part that its result depends on.
        within: the convolution gives the frames whose kernel lies within what it is given, so that
            no more than the part is computed: zeros are put where the clip ends.
        scale: rows and columns of the result for one of the input.
        keep: the input, as it is, begins a residual path.
        add: ends that path: (kept input, result of the convolution) -> result.
    """

    conv: Callable[[Tensor], Tensor]
    norm: nn.GroupNorm | None = None
    clip: bool = False
    halo: tuple[int, int] = (0, 1)
    within: bool = False
    scale: int = 1
    keep: bool = False
    add: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class _Span:
    """A part of an axis: what of the input is read, where its result goes, and what that is."""

    taken: slice
    kept: slice
    cut: slice


_Part = tuple[_Span, _Span]  # frames and rows


@dataclass(frozen=True)
class _Parked:
    """A whole activation (t, c, h, w), and its moments where the next step asks for them."""

    values: Tensor
    moments: Moments | None


@torch.no_grad()
def decode_in_step(
    decoder: Decoder,
    z: Tensor,
    frames: int = 1,
    bands: int = 1,
    store: torch.device | str | None = None,
) -> Tensor:
    """Decode a clip while only a few frames, or a band of their rows, are worked on.

    The decoder's first part, up to its attention, is small and runs whole.

    Args:
        decoder: of images or of video.
        z: unscaled latents (t, z, h / f, w / f) in the decoder's type, on its device.
        frames: worked on at once.
        bands: horizontal bands that a frame is split into; no memory plan needs them.
        store: where activations are parked, at most three whole ones; None for the device.

    Returns:
        Frames (t, 3, h, w), about [-1, 1], on ``store``.
    """
    h = _middle(decoder, z)
    steps = list(_steps(decoder))
    y = _Parked(h.to(store or h.device), _moments(h, steps[0]))
    if y.moments:
        y.moments.add(slice(None), h)
    residual = y
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        residual = y if step.keep else residual
        parts = _parts(y.values.shape, step, frames, bands)
        y = _run(step, parts, y, residual.values, _moments(z, following), z.device)
    return y.values.tanh() if decoder.tanh_out else y.values


class DecoderInStep(nn.Module):
    """Called as the decoder is; arguments as in :func:`decode_in_step`."""

    def __init__(
        self,
        plain: Decoder,
        frames: int = 1,
        bands: int = 1,
        store: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.plain, self.norm_out = plain, plain.norm_out
        self.frames, self.bands, self.store = frames, bands, store

    def forward(self, z: Tensor, timesteps: int | None = None) -> Tensor:
        """(b t, z, h / f, w / f) -> (b t, 3, h, w), about [-1, 1]; ``timesteps`` is t."""
        clips = z.split(timesteps or len(z))
        decoded = [
            decode_in_step(self.plain, clip, self.frames, self.bands, self.store) for clip in clips
        ]
        return torch.cat(decoded) if len(decoded) > 1 else decoded[0]


def _middle(decoder: Any, z: Tensor) -> Tensor:
    """The decoder up to and with its middle; its attention frame by frame."""
    timesteps = {"timesteps": len(z)} if isinstance(decoder, VideoDecoder) else {}
    h = decoder.mid.block_1(decoder.conv_in(z), **timesteps)
    h = torch.cat([decoder.mid.attn_1(frame) for frame in h.split(1)])
    return decoder.mid.block_2(h, **timesteps)


def _moments(like: Tensor, step: _Step | None) -> Moments | None:
    """Room for what a step asks of its input."""
    return Moments(like, step.norm) if step and step.norm else None


def _steps(decoder: Any) -> Iterator[_Step]:
    """The decoder after its middle."""
    for level in reversed(decoder.up):
        for block in level.block:
            yield from _spatial(block)
            if isinstance(block, VideoResnetBlock):
                yield from _temporal(block)
        if level.upsample is not None:
            yield _Step(level.upsample, scale=2)
    out = decoder.conv_out
    if isinstance(out, AE3DConv):
        t, h, _ = out.time_mix_conv.kernel_size
        halo = (t // 2, 1 + h // 2)
        yield _Step(lambda x: out(x, timesteps=len(x)), decoder.norm_out, halo=halo)
    else:
        yield _Step(out, decoder.norm_out)


def _spatial(block: Any) -> Iterator[_Step]:
    yield _Step(block.conv1, block.norm1, keep=True)
    yield _Step(block.conv2, block.norm2, add=lambda x, h: h.add_(block.nin_shortcut(x)))


def _temporal(block: Any) -> Iterator[_Step]:
    """The blend ``lerp(x, x + h, alpha)`` is ``x + alpha h``."""
    alpha = block.mix_factor.sigmoid() if block.learned else block.mix_factor
    (norm1, _, conv1), (norm2, *_, conv2) = block.time_stack.in_layers, block.time_stack.out_layers
    t, h, _ = conv1.kernel_size
    first = _Step(_over_time(conv1), norm1, clip=True, halo=(t // 2, h // 2), within=True)
    yield replace(first, keep=True)
    yield replace(first, conv=_over_time(conv2), norm=norm2, add=lambda x, h: h.mul_(alpha).add_(x))


def _over_time(conv: TemporalConv3d) -> Callable[[Tensor], Tensor]:
    return lambda x: conv.within(x.transpose(0, 1)[None])[0].transpose(0, 1)


def _convolved(step: _Step, x: Tensor, time: _Span) -> Tensor:
    """The frames of a part, from them and their neighbours."""
    if not step.within:
        return step.conv(x)[time.cut]
    before = step.halo[0] - (time.kept.start - time.taken.start)
    after = step.halo[0] - (time.taken.stop - time.kept.stop)
    return step.conv(F.pad(x, (0, 0, 0, 0, 0, 0, before, after)) if before or after else x)


def _run(
    step: _Step,
    parts: Sequence[_Part],
    y: _Parked,
    residual: Tensor,
    moments: Moments | None,
    device: torch.device,
) -> _Parked:
    """Apply a step to a parked activation part by part.

    Args:
        step: what to do.
        parts: of the activation.
        y: (t, c, h, w).
        residual: what the last residual path began with, parked.
        moments: of the result, to be gathered.
        device: where to compute.

    Returns:
        (t, c', scale h, scale w), parked where ``y`` is, perhaps in its place.
    """
    spare = [residual] if step.add else []
    if not step.keep and all(span.taken == span.kept for part in parts for span in part):
        spare.append(y.values)
    result = y.values
    for i, (time, row) in enumerate(parts):
        x = y.values[time.taken, :, row.taken].to(device, non_blocking=True)
        if y.moments:
            x = F.silu(y.moments.normalise(time.taken, x, step.clip), inplace=True)
        x = _convolved(step, x, time)[:, :, row.cut]
        if step.add:
            x = step.add(residual[time.kept, :, row.kept].to(device, non_blocking=True), x)
        if moments:
            moments.add(time.kept, x)
        if i == 0:
            t, _, h, w = result.shape
            result = _room((t, x.shape[1], step.scale * h, step.scale * w), spare, result, device)
        result[time.kept, :, row.kept].copy_(x, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # before the host itself reads what it was sent
    return _Parked(result, moments)


def _room(
    shape: tuple[int, ...], spare: Sequence[Tensor], like: Tensor, device: torch.device
) -> Tensor:
    """A spare activation of this shape, or new memory beside ``like``.

    The host's memory is pinned, so that a GPU reads and writes it by itself.
    """
    for each in spare:
        if each.shape == shape:
            return each
    if device.type == "cuda" and like.device.type == "cpu":
        return pinned(shape, like.dtype)
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _parts(shape: Sequence[int], step: _Step, frames: int, bands: int) -> list[_Part]:
    t, _, h, _ = shape
    times = _spans(t, frames, step.halo[0])
    return list(product(times, _spans(h, ceil(h / bands), step.halo[1], step.scale)))


def _spans(length: int, size: int, halo: int, scale: int = 1) -> Iterator[_Span]:
    for start in range(0, length, size):
        stop = min(start + size, length)
        first, last = max(0, start - halo), min(length, stop + halo)
        cut = slice(scale * (start - first), scale * (stop - first))
        yield _Span(slice(first, last), slice(scale * start, scale * stop), cut)
