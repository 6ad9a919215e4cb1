"""Decoding by overlapped chunks of frames and overlapped tiles, blended: an approximation.

Every chunk or tile is decoded on its own, so that only one is in the device's memory. Where it
ends, the decoder sees a border that is none; so parts overlap, the results near such borders are
thrown away, and the rest is blended. What remains is that a normalisation sees one part and not
the whole: little over time, much over space (docs/performance.md has the figures), where
:mod:`sgm.inference.lockstep` is exact instead.

Shapes: t frames, z latent channels, h height, w width, f pixels per latent along an edge.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product
from math import ceil

import torch
from torch import Tensor

# Share of an overlap in which two parts are blended; at either side of it one of them is thrown
# away, being too near to its false border.
BLENDED = 0.25

Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tiling:
    """Sizes of what is decoded at once, in frames and latents; None for all.

    Attributes:
        frames: of a chunk.
        frame_overlap: frames that neighbouring chunks share at least.
        side: height and width of a tile.
        side_overlap: latents that neighbouring tiles share at least.

    Raises:
        ValueError: an overlap that is negative, or that fills its chunk or tile.
    """

    frames: int | None = 8
    frame_overlap: int = 4
    side: int | None = None
    side_overlap: int = 8

    def __post_init__(self) -> None:
        for size, overlap in ((self.frames, self.frame_overlap), (self.side, self.side_overlap)):
            if overlap < 0 or (size is not None and size <= overlap):
                raise ValueError(f"expected an overlap from 0 to below {size}, got {overlap}")


@dataclass(frozen=True)
class Part:
    """A stretch of an axis.

    Attributes:
        taken: what is decoded, in units of the input.
        kept: where a part of the result goes, in units of the output.
        cut: the same stretch in the result of this part.
        weights: of the kept values; over all parts, those of a position sum to one.
    """

    taken: slice
    kept: slice
    cut: slice
    weights: Tensor


def split_axis(length: int, size: int | None, overlap: int, scale: int = 1) -> list[Part]:
    """Split an axis into evenly spaced, equally long, overlapping parts.

    The weight of part i is ``rise_i - rise_(i+1)``, where ``rise_i`` steps from 0 to 1 in the
    middle of the overlap of the parts i - 1 and i: a sum that telescopes to one.

    Args:
        length: of the axis.
        size: of a part; None for the whole axis.
        overlap: that neighbours share at least.
        scale: positions of the output for one of the input.
    """
    size = min(size or length, length)
    count = 1 if size == length else ceil((length - overlap) / (size - overlap))
    starts = [round(i * (length - size) / max(1, count - 1)) for i in range(count)]
    cuts = [scale * (left + size + right) / 2 for left, right in pairwise(starts)]
    positions = torch.arange(scale * length, dtype=torch.float64) + 0.5
    width = max(1.0, BLENDED * overlap * scale)
    rises = [((positions - cut) / width + 0.5).clamp(0, 1).float() for cut in cuts]
    edges = [torch.ones(scale * length), *rises, torch.zeros(scale * length)]
    return [
        _part(start, start + size, scale, rise - following)
        for start, (rise, following) in zip(starts, pairwise(edges), strict=True)
    ]


def _part(start: int, stop: int, scale: int, weights: Tensor) -> Part:
    used = weights.nonzero().flatten()
    first, last = int(used[0]), int(used[-1]) + 1
    cut = slice(first - scale * start, last - scale * start)
    return Part(slice(start, stop), slice(first, last), cut, weights[first:last])


def decode_tiled(
    decode: Decode,
    latents: Tensor,
    factor: int,
    tiling: Tiling,
    store: torch.device | str = "cpu",
    report: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Decode a clip part by part. One part is equal to ``decode(latents)``.

    Args:
        decode: latents (t', z, h', w') -> frames (t', c, f h', f w').
        latents: (t, z, h, w) of one clip.
        factor: f.
        tiling: sizes of the parts.
        store: where the frames are put together.
        report: called with the parts that are done, and all of them.

    Returns:
        Frames (t, c, f h, f w) on ``store``, in the type that ``decode`` gives.
    """
    t, _, h, w = latents.shape
    parts = list(
        product(
            split_axis(t, tiling.frames, tiling.frame_overlap),
            split_axis(h, tiling.side, tiling.side_overlap, factor),
            split_axis(w, tiling.side, tiling.side_overlap, factor),
        )
    )
    whole = torch.empty(0)
    for done, (time, row, column) in enumerate(parts, 1):
        frames = decode(latents[time.taken, :, row.taken, column.taken])
        dtype = frames.dtype
        if done == 1:
            shape = (t, frames.shape[1], factor * h, factor * w)
            whole = torch.zeros(
                shape, dtype=torch.promote_types(dtype, torch.float32), device=store
            )
        weights = time.weights[:, None, None, None] * row.weights[:, None] * column.weights
        cut = frames[time.cut, :, row.cut, column.cut].to(whole)
        whole[time.kept, :, row.kept, column.kept] += cut.mul_(weights.to(whole))
        if report:
            report(done, len(parts))
    return whole.to(dtype)
