"""A residual sum and its LayerNorm in one kernel: whole tokens in registers."""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
# ruff: noqa: PLR0913 - a kernel takes its tensors and sizes one by one

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgm.kernels.fused.tiles import shift_rows

_TILE = 2048


def residual_layer_norm(
    x: Tensor,
    delta: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See :func:`sgm.kernels.residual_layer_norm`."""
    n, s, c = x.shape
    channels = triton.next_power_of_2(c)
    tokens = max(1, _TILE // channels)
    total = x if delta is None and shift is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=dtype)
    with torch.cuda.device_of(x):
        _layer_norm[(triton.cdiv(n * s, tokens),)](
            x, delta, *shift_rows(shift), weight, bias, total, normed, n * s, s, c, eps,
            TOKENS=tokens, CHANNELS=channels,
        )  # fmt: skip
    return total, normed


@triton.jit
def _layer_norm(
    x: tl.tensor,
    delta: tl.tensor,
    shift: tl.tensor,
    shifts: tl.tensor,
    shift_stride: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    tokens: tl.tensor,
    s: tl.tensor,
    c: tl.tensor,
    eps: tl.tensor,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """The sum of what is given, rounded once, and the norm of the sum before rounding."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    channel = tl.arange(0, CHANNELS)
    exists = channel < c
    inside = (token < tokens) & exists
    here = token.to(tl.int64) * c + channel  # may exceed 32 bits
    value = tl.load(x + here, inside, 0).to(tl.float32)
    if delta is not None:
        value += tl.load(delta + here, inside, 0)
    if shift is not None:
        value += tl.load(shift + token // s % shifts * shift_stride + channel, inside, 0)
    if delta is not None or shift is not None:
        tl.store(total + here, value, inside)
    mean = tl.sum(value, 1, keep_dims=True) / c
    difference = tl.where(exists, value - mean, 0)
    variance = tl.sum(difference * difference, 1, keep_dims=True) / c
    scale = tl.load(weight + channel, exists, 0).to(tl.float32)
    offset = tl.load(bias + channel, exists, 0).to(tl.float32)
    tl.store(normed + here, difference * tl.rsqrt(variance + eps) * scale + offset, inside)
