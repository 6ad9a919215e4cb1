"""Attention over frames in one kernel: a program has all frames of one position and head."""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
# ruff: noqa: PLR0913 - a kernel takes its tensors and sizes one by one

import torch
import triton
import triton.language as tl
from torch import Tensor

_LEAST = 16  # rows and columns that a matrix unit takes; a warp is given as many rows


def temporal_attention(qkv: Tensor, heads: int, frames: int) -> Tensor:
    """See :func:`sgm.kernels.temporal_attention`."""
    n, s, width = qkv.shape
    d = width // (3 * heads)
    out = qkv.new_empty(n, s, heads * d)
    padded = max(_LEAST, triton.next_power_of_2(frames))
    with torch.cuda.device_of(qkv):
        _temporal_attention[heads * s, n // frames](
            qkv, out, s, heads, frames, d, d**-0.5,
            FRAMES=padded,
            WIDTH=max(_LEAST, triton.next_power_of_2(d)),
            num_warps=padded // _LEAST,
        )  # fmt: skip
    return out


@triton.jit
def _temporal_attention(
    qkv: tl.tensor,
    out: tl.tensor,
    s: tl.tensor,
    heads: tl.tensor,
    frames: tl.tensor,
    d: tl.tensor,
    scale: tl.tensor,
    FRAMES: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """A softmax over all keys at once: no more than 128 frames fit the registers."""
    position = tl.program_id(0) // heads  # neighbouring programs share a position's memory
    head = tl.program_id(0) % heads
    frame = tl.arange(0, FRAMES)
    channel = tl.arange(0, WIDTH)
    inside = (frame < frames)[:, None] & (channel < d)
    row = (tl.program_id(1) * frames + frame).to(tl.int64)  # tokens times channels may be large
    token = (row * s + position)[:, None]
    inner = heads * d
    query = qkv + token * 3 * inner + head * d + channel
    q = tl.load(query, inside, 0)
    k = tl.load(query + inner, inside, 0)
    v = tl.load(query + 2 * inner, inside, 0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(frame < frames, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1, keep_dims=True))
    total = tl.sum(weights, 1, keep_dims=True)
    mixed = tl.dot(weights.to(v.dtype), v, input_precision="ieee") / total
    tl.store(out + token * inner + head * d + channel, mixed, inside)
