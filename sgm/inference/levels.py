"""The levels of ``--optimize``: what each does to the networks as they are written.

Imports nothing heavy: the help of the command line is made from here.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """What is done; figures and reasons are in docs/performance.md.

    Attributes:
        about: the level in words, for help texts.
        derived: sampling runs networks made of the loaded ones, with the same numbers from less
            work; else the loaded ones, to which nothing below applies.
        records: a step is recorded as a CUDA graph where the host cannot keep up with the device.
        eight_bits: products behind LayerNorms are of 8-bit floats: an approximation.
        reuse: calls of the U-Net that share their deep features (DeepCache, arXiv 2312.00858); more
            than one is an approximation.
        guided: lowest and highest noise level with guidance (arXiv 2404.07724), an approximation;
            None for all of them.
    """

    about: str
    derived: bool = True
    records: bool = False
    eight_bits: bool = False
    reuse: int = 1
    guided: tuple[float, float] | None = None

    @property
    def moves(self) -> bool:
        """Whether weights may move while sampling, as the smaller memory plans have it."""
        return self.derived and not self.records


LEVELS = {
    "none": Level("as written", derived=False),
    "exact": Level("the same numbers from less work"),
    "graphs": Level("the same with each step launched in one go on CUDA", records=True),
    "fp8": Level(
        "products behind LayerNorms in 8 bits on Ada and Hopper GPUs, an approximation",
        eight_bits=True,
    ),
    "fast": Level(
        "deep features serve two steps, no guidance below noise level 0.3, approximations",
        reuse=2,
        guided=(0.3, math.inf),
    ),
}
DEFAULT_LEVEL = "exact"
