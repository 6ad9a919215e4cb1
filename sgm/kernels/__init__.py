"""What a network does between its matrix products, each as one pass over memory.

All functions take activations as *tokens* ``(n, s, c)``, contiguous (else they are copied): n rows,
which are the frames of the clips one after the other, s positions of a frame, c channels. They have
two forms that compute:

- :mod:`~sgm.kernels.reference`: PyTorch calls. The specification, and what a CPU runs.
- ``fused``: Triton kernels, for CUDA devices and 16 or 32-bit floats. They compute in float32 and
  round once. Attention in float32 is left to PyTorch.

(:mod:`~sgm.kernels.sizes` is what the second allocates, to count its memory.) The exception is
:func:`spatial_attention`, for which PyTorch has exact backends of its own. :func:`use` forces a
form. All are for inference: no gradients. Triton is imported, and tried, when a CUDA tensor first
arrives: before a CUDA graph is captured.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from sgm.kernels.backends import attend
from sgm.kernels.dispatch import Form, attention_form_for, form_for, has_triton, use

__all__ = [
    "Form", "blend", "geglu", "group_norm", "has_triton", "residual_layer_norm",
    "spatial_attention", "temporal_attention", "use",
]  # fmt: skip


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    shift: Tensor | None = None,
    frames: int = 1,
    silu: bool = False,
) -> Tensor:
    """GroupNorm (arXiv 1803.08494, equations 1 to 6) of ``x + shift``, and SiLU after it.

    The variance is summed around a mean, so that a mean much larger than the deviation is safe.

    Args:
        x: (n, s, c).
        weight: (c,).
        bias: (c,).
        groups: groups that the channels are split into, in order.
        eps: added to the variance.
        shift: (r, c) with n divisible by r, added to every position first: row i takes
            ``shift[i % r]``. The embedding of a residual block.
        frames: consecutive rows that are normalised together.
        silu: apply ``y -> y sigmoid(y)`` to the result.

    Returns:
        (n, s, c).

    Raises:
        ValueError: the shapes do not fit together.
    """
    n, _, c = x.shape
    _require(c % groups == 0, f"channels divisible by {groups} groups", c)
    _require_clips(n, frames)
    _require_affine(c, weight, bias)
    _require_addends(x, None, shift)
    (x,) = _contiguous(x)
    return form_for(x).group_norm(x, weight, bias, groups, eps, shift, frames, silu)


def residual_layer_norm(
    x: Tensor,
    delta: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """A residual sum and its LayerNorm (arXiv 1607.06450, equations 3 and 4).

    Args:
        x: (n, s, c).
        delta: (n, s, c), what a layer adds to ``x``.
        shift: (r, c) with n divisible by r, added to every position: row i takes ``shift[i % r]``.
        weight: (c,).
        bias: (c,).
        eps: added to the variance.
        dtype: of the norm; None for that of ``x``.

    Returns:
        ``x + delta + shift``, which is ``x`` itself where there is nothing to add, and its norm
        over the channels; both (n, s, c).

    Raises:
        ValueError: the shapes do not fit together.
    """
    _require_affine(x.shape[2], weight, bias)
    _require_addends(x, delta, shift)
    x, delta = _contiguous(x, delta)
    form = form_for(x)
    return form.residual_layer_norm(x, delta, shift, weight, bias, eps, dtype or x.dtype)


def geglu(x: Tensor, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """``value * gelu(gate) * scale``: GEGLU (arXiv 2002.05202, equation 6) of a linear layer.

    Args:
        x: (..., 2 f), values, then gates.
        scale: (f,), or None for ones.
        dtype: of the result; None for that of ``x``.

    Returns:
        (..., f).

    Raises:
        ValueError: the shapes do not fit together.
    """
    width = x.shape[-1]
    _require(width % 2 == 0, "an even number of channels", width)
    half = width // 2
    _require(scale is None or scale.shape == (half,), f"a scale of shape ({half},)", scale)
    (x,) = _contiguous(x)
    return form_for(x).geglu(x, scale, dtype or x.dtype)


def blend(
    x: Tensor, y: Tensor, delta: Tensor | None, shift: Tensor | None, alpha: float | Tensor
) -> Tensor:
    """``alpha x + (1 - alpha) (y + delta) + shift``: two branches mixed.

    Args:
        x: (n, s, c), the spatial branch.
        y: (n, s, c), the temporal branch before its last layer.
        delta: (n, s, c), the result of that layer; None for zeros.
        shift: (r, c) with n divisible by r: row i of the tokens takes ``shift[i % r]``.
        alpha: for all rows, or (n,): one for each row, where a row of exactly 1 is a single image,
            and takes nothing of the temporal branch, not even what is infinite.

    Returns:
        (n, s, c).

    Raises:
        ValueError: the shapes do not fit together.
    """
    _require_addends(x, y, None)
    _require_addends(x, delta, shift)
    if isinstance(alpha, Tensor):
        _require(alpha.shape == x.shape[:1], f"alpha of shape ({len(x)},)", alpha)
    x, y, delta = _contiguous(x, y, delta)
    return form_for(x).blend(x, y, delta, shift, alpha)


def spatial_attention(qkv: Tensor, heads: int) -> Tensor:
    """Attention over the positions of a frame, for each head by itself.

    Scaled dot products (arXiv 1706.03762, equation 1), with the scale ``d ** -0.5``, by the exact
    backend of PyTorch that was the quickest when tensors like these first came.

    Args:
        qkv: (n, s, 3 heads d): queries, keys, values, each with the heads in order.
        heads: number of heads.

    Returns:
        (n, s, heads d).

    Raises:
        ValueError: the channels do not fit the heads.
    """
    width = qkv.shape[2]
    _require(width % (3 * heads) == 0, f"channels divisible by 3 x {heads} heads", width)
    q, k, v = rearrange(qkv, "n s (part heads d) -> part n heads s d", part=3, heads=heads)
    return rearrange(attend(q, k, v), "n heads s d -> n s (heads d)")


def temporal_attention(qkv: Tensor, heads: int, frames: int) -> Tensor:
    """Attention over the frames of a clip, for each position and head by itself.

    Scaled dot products (arXiv 1706.03762, equation 1), with the scale ``d ** -0.5``.

    Args:
        qkv: (b frames, s, 3 heads d): queries, keys, values, each with the heads in order.
        heads: number of heads.
        frames: rows of a clip.

    Returns:
        (b frames, s, heads d).

    Raises:
        ValueError: the shapes do not fit together.
    """
    n, _, width = qkv.shape
    _require_clips(n, frames)
    _require(width % (3 * heads) == 0, f"channels divisible by 3 x {heads} heads", width)
    (qkv,) = _contiguous(qkv)
    form = attention_form_for(qkv, frames, width // (3 * heads))
    return form.temporal_attention(qkv, heads, frames)


def _contiguous(*tokens: Tensor | None) -> Any:
    return [x if x is None else x.contiguous() for x in tokens]


def _require_clips(n: int, frames: int) -> None:
    _require(frames > 0 and n % frames == 0, f"rows in clips of {frames} frames", n)


def _require_affine(c: int, weight: Tensor, bias: Tensor) -> None:
    for vector in (weight, bias):
        _require(vector.shape == (c,), f"weight and bias of shape ({c},)", vector)


def _require_addends(x: Tensor, delta: Tensor | None, shift: Tensor | None) -> None:
    n, _, c = x.shape
    if delta is not None:
        _require(delta.shape == x.shape, f"a tensor of shape {tuple(x.shape)}", delta)
    if shift is not None:
        fits = shift.ndim == 2 and shift.shape[1] == c and n % len(shift) == 0
        _require(fits, f"shift of shape (a divisor of {n}, {c})", shift)


def _require(holds: bool, expected: str, given: object) -> None:
    """Refuse what does not fit: a kernel would read beyond the end of a tensor."""
    if not holds:
        given = tuple(given.shape) if isinstance(given, Tensor) else given
        raise ValueError(f"expected {expected}, got {given}")
