"""GEGLU and the blend: functions of one position and channel, each one kernel."""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
# ruff: noqa: PLR0913 - a kernel takes its tensors and sizes one by one

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgm.kernels.fused.tiles import CHANNELS, POSITIONS, grid, place, shift_rows, stretch_length

_TILE = {"POSITIONS": POSITIONS, "CHANNELS": CHANNELS}


def geglu(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See :func:`sgm.kernels.geglu`."""
    width = x.shape[-1] // 2
    tokens = x.numel() // x.shape[-1]
    length = stretch_length(1, tokens, width)
    out = x.new_empty((*x.shape[:-1], width), dtype=dtype)
    with torch.cuda.device_of(x):
        _geglu[grid(1, tokens, width, length)](x, scale, out, tokens, width, length, **_TILE)
    return out


def blend(
    x: Tensor, y: Tensor, delta: Tensor | None, shift: Tensor | None, alpha: float | Tensor
) -> Tensor:
    """See :func:`sgm.kernels.blend`."""
    n, s, c = x.shape
    length = stretch_length(n, s, c)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _blend[grid(n, s, c, length)](
            x, y, delta, *shift_rows(shift), alpha, out, s, c, length,
            BY_ROW=isinstance(alpha, Tensor), **_TILE,
        )  # fmt: skip
    return out


@triton.jit
def _geglu(
    x: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    length: tl.tensor,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Values and gates are ``width`` apart in a token."""
    _, token, count, channels, exists = place(tokens, width, length, CHANNELS)
    x += token * 2 * width + channels
    out += token * width + channels
    if scale is not None:
        factor = tl.load(scale + channels, exists, 0).to(tl.float32)
    for start in range(0, count, POSITIONS):
        position = (start + tl.arange(0, POSITIONS))[:, None]
        inside = (position < count) & exists
        value = tl.load(x + position * 2 * width, inside, 0).to(tl.float32)
        gate = tl.load(x + position * 2 * width + width, inside, 0).to(tl.float32)
        result = value * gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        if scale is not None:
            result *= factor
        tl.store(out + position * width, result, inside)


@triton.jit
def _blend(
    x: tl.tensor,
    y: tl.tensor,
    delta: tl.tensor,
    shift: tl.tensor,
    shifts: tl.tensor,
    shift_stride: tl.tensor,
    alpha: tl.tensor,
    out: tl.tensor,
    s: tl.tensor,
    c: tl.tensor,
    length: tl.tensor,
    BY_ROW: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """``y' + alpha (x - y') + shift`` with ``y' = y + delta``, or x + shift where alpha is 1."""
    row, token, count, channels, exists = place(s, c, length, CHANNELS)
    first = token * c + channels
    if BY_ROW:
        alpha = tl.load(alpha + row).to(tl.float32)
    if shift is not None:
        addend = tl.load(shift + row % shifts * shift_stride + channels, exists, 0).to(tl.float32)
    for start in range(0, count, POSITIONS):
        position = (start + tl.arange(0, POSITIONS))[:, None]
        inside = (position < count) & exists
        here = first + position * c
        spatial = tl.load(x + here, inside, 0).to(tl.float32)
        temporal = tl.load(y + here, inside, 0).to(tl.float32)
        if delta is not None:
            temporal += tl.load(delta + here, inside, 0)
        mixed = temporal + alpha * (spatial - temporal)
        if BY_ROW:
            mixed = tl.where(alpha < 1, mixed, spatial)
        if shift is not None:
            mixed += addend
        tl.store(out + here, mixed, inside)
