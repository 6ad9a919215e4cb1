"""Random numbers of a batch, drawn clip by clip.

What is drawn for a clip then depends on the clip's own generator alone: not on which other clips
are in the batch, nor on how a global batch is shared out over processes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor


class ClipGenerators(Generator):
    """One generator for each clip of a batch.

    `draw` gives every clip what its own generator draws. To all else this is one generator for the
    whole batch, which begins like that of the first clip.

    Args:
        seeds: of the clips' generators, at least one.
    """

    clips: list[Generator]

    def __new__(cls, seeds: Sequence[int]) -> "ClipGenerators":
        """Make the generators, on the CPU."""
        made = super().__new__(cls)
        made.clips = [Generator().manual_seed(seed) for seed in seeds]
        return made

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__()
        self.manual_seed(seeds[0])


def draw(
    kind: Callable[..., Tensor], shape: Sequence[int], generator: Generator | None = None
) -> Tensor:
    """Draw a tensor whose rows belong to clips, each clip's rows following each other.

    Args:
        kind: `torch.randn`, `torch.rand`, or another function of a shape and a generator.
        shape: of the result; with `ClipGenerators`, its rows are a multiple of the clips.
        generator: on whose device the numbers are drawn; None for torch's own, on the CPU.

    Raises:
        ValueError: the rows do not belong to the clips.
    """
    sources = generator.clips if isinstance(generator, ClipGenerators) else [generator]
    rows, *rest = shape
    if rows % len(sources):
        raise ValueError(f"expected rows of {len(sources)} clips, got {rows} rows")
    each = (rows // len(sources), *rest)
    device = generator.device if generator else "cpu"
    parts = [kind(each, generator=source, device=device) for source in sources]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
