"""GroupNorm in three kernels: moments of each channel over stretches, their merger, the norm.

The moments are a mean and the sum of squared distances from it, merged as in Chan, Golub and
LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
"""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
# ruff: noqa: PLR0913 - a kernel takes its tensors and sizes one by one

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgm.kernels.fused.tiles import CHANNELS, POSITIONS, grid, place, shift_rows, stretch_length

_MERGED_AT_ONCE = 4096


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    shift: Tensor | None,
    frames: int,
    silu: bool,
) -> Tensor:
    """See :func:`sgm.kernels.group_norm`."""
    n, s, c = x.shape
    clips, width = n // frames, c // groups
    padded = triton.next_power_of_2(width)
    size = frames * s * width  # of a group
    length = stretch_length(n, s, c)
    programs = grid(n, s, c, length)
    tile = {"POSITIONS": POSITIONS, "CHANNELS": CHANNELS}
    shift_of_row = shift_rows(shift)
    moments = x.new_empty((2, n * programs[1], c), dtype=torch.float32)
    norms = x.new_empty((2, clips, groups), dtype=torch.float32)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _moments[programs](x, *shift_of_row, *moments, s, c, length, **tile)
        _merge[groups, clips](
            *moments, *norms, s, c, length, programs[1], frames, width, float(size), eps,
            ENTRIES=max(1, _MERGED_AT_ONCE // padded), WIDTH=padded,
        )  # fmt: skip
        _apply[programs](
            x, *shift_of_row, weight, bias, *norms, out, s, c, length, frames, width,
            SILU=silu, **tile,
        )  # fmt: skip
    return out


@triton.jit
def _moments(
    x: tl.tensor,
    shift: tl.tensor,
    shifts: tl.tensor,
    shift_stride: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    s: tl.tensor,
    c: tl.tensor,
    length: tl.tensor,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Mean, and sum of squared distances from it, of each channel over a stretch of positions.

    Summed are differences from the stretch's first position. It is no further from the mean than
    the root of the length times the deviation, so that little cancels whatever the mean is.
    """
    row, token, count, channels, exists = place(s, c, length, CHANNELS)
    x += token * c + channels
    first = tl.load(x, exists, 0).to(tl.float32)
    sums = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    square_sums = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for start in range(0, count, POSITIONS):
        position = (start + tl.arange(0, POSITIONS))[:, None]
        inside = (position < count) & exists
        value = tl.load(x + position * c, inside, 0).to(tl.float32)
        difference = tl.where(inside, value - first, 0)
        sums += difference
        square_sums += difference * difference
    sums = tl.sum(sums, 0)
    mean = sums / count
    square_sum = tl.sum(square_sums, 0) - sums * mean
    mean += first
    if shift is not None:
        mean += tl.load(shift + row % shifts * shift_stride + channels, exists, 0)
    entry = (row * tl.num_programs(1) + tl.program_id(1)) * c + channels
    tl.store(means + entry, mean, exists)
    tl.store(squares + entry, square_sum, exists)


@triton.jit
def _merge(
    means: tl.tensor,
    squares: tl.tensor,
    group_means: tl.tensor,
    group_scales: tl.tensor,
    s: tl.tensor,
    c: tl.tensor,
    length: tl.tensor,
    stretches: tl.tensor,
    frames: tl.tensor,
    width: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Mean and inverse deviation of a group, from the moments of its channels in a clip."""
    group = tl.program_id(0)
    clip = tl.program_id(1)
    entries = frames * stretches
    channel = tl.arange(0, WIDTH)
    means += clip * entries * c + group * width + channel
    squares += clip * entries * c + group * width + channel
    sums = tl.zeros((ENTRIES, WIDTH), tl.float32)
    for start in range(0, entries, ENTRIES):
        entry = (start + tl.arange(0, ENTRIES))[:, None]
        inside = (entry < entries) & (channel < width)
        count = tl.minimum(length, s - entry % stretches * length)
        sums += tl.load(means + entry * c, inside, 0) * count
    mean = tl.sum(sums) / size
    sums = tl.zeros((ENTRIES, WIDTH), tl.float32)
    for start in range(0, entries, ENTRIES):
        entry = (start + tl.arange(0, ENTRIES))[:, None]
        inside = (entry < entries) & (channel < width)
        count = tl.minimum(length, s - entry % stretches * length)
        difference = tl.load(means + entry * c, inside, mean) - mean
        sums += tl.load(squares + entry * c, inside, 0) + difference * difference * count
    out = clip * tl.num_programs(0) + group
    tl.store(group_means + out, mean)
    tl.store(group_scales + out, tl.rsqrt(tl.sum(sums) / size + eps))


@triton.jit
def _apply(
    x: tl.tensor,
    shift: tl.tensor,
    shifts: tl.tensor,
    shift_stride: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    group_means: tl.tensor,
    group_scales: tl.tensor,
    out: tl.tensor,
    s: tl.tensor,
    c: tl.tensor,
    length: tl.tensor,
    frames: tl.tensor,
    width: tl.tensor,
    SILU: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """``(x + shift - mean) / deviation * weight + bias``, and SiLU."""
    row, token, count, channels, exists = place(s, c, length, CHANNELS)
    x += token * c + channels
    out += token * c + channels
    group = row // frames * (c // width) + channels // width
    centre = tl.load(group_means + group, exists, 0)
    if shift is not None:
        centre -= tl.load(shift + row % shifts * shift_stride + channels, exists, 0)
    scale = tl.load(group_scales + group, exists, 0) * tl.load(weight + channels, exists, 0)
    offset = tl.load(bias + channels, exists, 0).to(tl.float32)
    for start in range(0, count, POSITIONS):
        position = (start + tl.arange(0, POSITIONS))[:, None]
        inside = (position < count) & exists
        value = tl.load(x + position * c, inside, 0).to(tl.float32)
        value = (value - centre) * scale + offset
        if SILU:
            value *= tl.sigmoid(value)
        tl.store(out + position * c, value, inside)
