"""Sizes of clips: a few of them, so that clips of one size make a batch."""

import math
import re
from collections.abc import Sequence

Size = tuple[int, int]
"""(height, width) in pixels."""

MULTIPLE = 8
"""Of height and width, as the autoencoder reduces them by so much."""


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Read sizes such as ``576x1024,1024x576``: height, then width.

    Raises:
        ValueError: it is something else, or a side is no multiple of 8.
    """
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", part)
        if match is None:
            raise ValueError(f"expected sizes as HEIGHTxWIDTH,..., got {text!r}")
        size = int(match[1]), int(match[2])
        if min(size) < MULTIPLE or any(side % MULTIPLE for side in size):
            raise ValueError(f"sizes must be multiples of {MULTIPLE} pixels, got {part.strip()}")
        sizes.append(size)
    return tuple(dict.fromkeys(sizes))


def choose_size(source: Size, sizes: Sequence[Size], max_upscale: float = 1.0) -> Size | None:
    """Return the size whose aspect ratio is nearest to that of ``source``; the largest of several.

    Args:
        source: height and width of the video.
        sizes: to choose from.
        max_upscale: a size that asks for a larger magnification of the video is left out.

    Returns:
        The size, or None where all are too large.
    """
    h, w = source
    allowed = [size for size in sizes if max(size[0] / h, size[1] / w) <= max_upscale]

    def misfit(size: Size) -> tuple[float, int]:
        return round(abs(math.log(size[1] * h / (size[0] * w))), 6), -size[0] * size[1]

    return min(allowed, key=misfit, default=None)
