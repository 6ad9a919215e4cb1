"""The functions of :mod:`sgm.kernels` in PyTorch: what they mean, and what a CPU runs.

Shapes: b clips, n = b frames rows, s positions, c channels, d channels of a head.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Deviations that a mean may be away from zero before float32 sums of squares lose accuracy.
_FAR = 8


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
    if shift is not None:
        x = _add_shift(x, shift)
    x = x.view(n // frames, frames * s, c)
    if x.device.type == "cpu":
        out = _group_norm_on_cpu(x, weight, bias, groups, eps)
    else:
        out = F.group_norm(_map(x), groups, weight, bias, eps)
    if silu:
        F.silu(out, inplace=True)
    return rearrange(out, "b c p 1 -> b p c").contiguous().view(n, s, c)


def _group_norm_on_cpu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """(b, p, c) -> (b, c, p, 1). The CPU takes E[x^2] - E[x]^2, which a mean far away ruins."""

    def norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, p, c = x.shape
        return torch.native_group_norm(_map(x), weight, bias, b, c, p, groups, eps)

    out, mean, inverse_deviation = norm(x)
    if (mean * inverse_deviation).abs().amax() <= _FAR:
        return out
    # A norm does not see what is subtracted from a whole group.
    centre = mean.to(x.dtype).repeat_interleave(x.shape[2] // groups, dim=1)
    return norm(x - centre[:, None])[0]


def _map(x: Tensor) -> Tensor:
    """(b, p, c) -> (b, c, p, 1), a view: channels last, which is the CPU's quick path."""
    return x[:, :, None].permute(0, 3, 1, 2)


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
    total = x if delta is None else x + delta
    if shift is not None:
        total = _add_shift(total, shift, in_place=delta is not None)
    return total, F.layer_norm(total, weight.shape, weight, bias, eps).to(dtype)


def geglu(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See :func:`sgm.kernels.geglu`."""
    value, gate = x.chunk(2, dim=-1)
    out = F.gelu(gate).mul_(value)
    return (out if scale is None else out.mul_(scale)).to(dtype)


def blend(
    x: Tensor, y: Tensor, delta: Tensor | None, shift: Tensor | None, alpha: float | Tensor
) -> Tensor:
    """See :func:`sgm.kernels.blend`."""
    end = y if delta is None else y + delta
    if isinstance(alpha, Tensor):
        by_row = alpha[:, None, None]
        out = torch.where(by_row < 1, torch.lerp(end, x, by_row.to(x.dtype)), x)
    else:
        out = torch.lerp(end, x, alpha)
    return out if shift is None else _add_shift(out, shift, in_place=True)


def temporal_attention(qkv: Tensor, heads: int, frames: int) -> Tensor:
    """See :func:`sgm.kernels.temporal_attention`."""
    s = qkv.shape[1]
    q, k, v = rearrange(
        qkv, "(b t) s (part heads d) -> part (b s) heads t d", t=frames, part=3, heads=heads
    )
    out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "(b s) heads t d -> (b t) s (heads d)", s=s).contiguous()


def _add_shift(x: Tensor, shift: Tensor, *, in_place: bool = False) -> Tensor:
    """(n, s, c) + (r, c): row i of x takes row i % r."""
    rows = x.view(-1, len(shift), *x.shape[1:])
    return (rows.add_ if in_place else rows.add)(shift[:, None]).view_as(x)
