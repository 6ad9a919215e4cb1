"""How tokens (n, s, c) are shared out among the programs of a kernel.

A program has a stretch of the positions of one row, and some neighbouring channels. It walks along
the stretch, a tile of ``POSITIONS`` by ``CHANNELS`` at a time: 64 channels of a 16-bit type are the
128 bytes that a GPU fetches at once. Programs of neighbouring channels run side by side.
"""

# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

POSITIONS = 32
CHANNELS = 64
_PROGRAMS = 8192  # some four times what a large GPU runs at once, so that the last ones are few


def stretch_length(n: int, s: int, c: int) -> int:
    """Positions of a program: a power of two, few enough to give every processor work."""
    wanted = n * s * triton.cdiv(c, CHANNELS) // _PROGRAMS
    return min(max(triton.next_power_of_2(wanted), POSITIONS), 2048)


def grid(n: int, s: int, c: int, length: int) -> tuple[int, int, int]:
    """Programs along channels, stretches and rows."""
    return triton.cdiv(c, CHANNELS), triton.cdiv(s, length), n


def shift_rows(shift: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Shifts (r, c) whose channels are neighbours, r, and what is between their rows."""
    if shift is None:
        return None, 1, 0
    shift = shift if shift.stride(1) == 1 else shift.contiguous()
    return shift, len(shift), shift.stride(0)


@triton.jit
def place(
    s: tl.tensor, c: tl.tensor, length: tl.tensor, CHANNELS: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Where a program is: row, first token of all, positions, channels, which of them exist."""
    row = tl.program_id(2)
    first = tl.program_id(1) * length
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    token = row.to(tl.int64) * s + first  # tokens times channels may exceed 32 bits
    return row, token, tl.minimum(length, s - first), channels, channels < c
