"""The U-Net's architecture as data: hyper-parameters in, a list of blocks out; no tensors.

The U-Net is three lists of blocks. A block is a list of layers that run one after the other; the
result of every input block is kept and concatenated to the input of its mirror image among the
output blocks. Position in the lists is position in the checkpoint: ``input_blocks.4.1`` is the
second layer of the fifth input block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Layer:
    """One layer: its kind, channels in and out, and, for attention, depth and heads."""

    kind: Literal["conv", "res", "attention", "down", "up"]
    c_in: int
    c_out: int
    depth: int = 0
    heads: int = 0


Block = tuple[Layer, ...]


@dataclass(frozen=True)
class UNetPlan:
    """Blocks of the three parts; ``out_channels`` are those of the last output block."""

    input_blocks: tuple[Block, ...]
    middle_block: Block
    output_blocks: tuple[Block, ...]
    out_channels: int

    @property
    def downsampling(self) -> int:
        """Height and width of the input must be divisible by this number."""
        return int(2 ** sum(layer.kind == "down" for block in self.input_blocks for layer in block))


def plan_unet(  # noqa: C901 - four loops over the levels, each plain
    *,
    in_channels: int,
    model_channels: int,
    channel_mult: Sequence[int],
    num_res_blocks: int | Sequence[int],
    attention_resolutions: Sequence[int],
    transformer_depth: int | Sequence[int] = 1,
    transformer_depth_middle: int | None = None,
    num_heads: int = -1,
    num_head_channels: int = -1,
) -> UNetPlan:
    """Lay out the U-Net of latent diffusion (arXiv 2112.10752; Dhariwal and Nichol, 2105.05233).

    Args:
        in_channels: channels of the input.
        model_channels: channels of the first level.
        channel_mult: channels of each level as multiples of ``model_channels``.
        num_res_blocks: residual blocks of a level on the way down (one more on the way up).
        attention_resolutions: downsampling factors (1, 2, 4, ...) whose levels have attention.
        transformer_depth: transformer blocks per attention layer, one number or one per level.
        transformer_depth_middle: the same in the middle; the last level's where None.
        num_heads: attention heads, or -1 for ``num_head_channels`` each.
        num_head_channels: channels of a head, or -1 for ``num_heads`` heads.

    Raises:
        ValueError: heads are under-determined or do not divide the channels, or a list's length
            is not the number of levels.
    """
    levels = len(channel_mult)
    depths = _per_level("transformer_depth", transformer_depth, levels)
    res_blocks = _per_level("num_res_blocks", num_res_blocks, levels)
    widths = [mult * model_channels for mult in channel_mult]
    attention = _Attention(num_heads, num_head_channels)

    def layers(c_in: int, level: int) -> list[Layer]:
        block = [Layer("res", c_in, widths[level])]
        if 2**level in attention_resolutions:
            block.append(attention(widths[level], depths[level]))
        return block

    inputs: list[Block] = [(Layer("conv", in_channels, model_channels),)]
    for level, width in enumerate(widths):
        for _ in range(res_blocks[level]):
            inputs.append(tuple(layers(inputs[-1][-1].c_out, level)))
        if level < levels - 1:
            inputs.append((Layer("down", width, width),))

    channels = widths[-1]
    depth = depths[-1] if transformer_depth_middle is None else transformer_depth_middle
    res = Layer("res", channels, channels)
    middle = (res, attention(channels, depth), res)

    skips = [block[-1].c_out for block in inputs]
    outputs: list[Block] = []
    for level in reversed(range(levels)):
        for _ in range(res_blocks[level] + 1):
            outputs.append(tuple(layers(channels + skips.pop(), level)))
            channels = widths[level]
        if level > 0:
            outputs[-1] += (Layer("up", channels, channels),)
    return UNetPlan(tuple(inputs), middle, tuple(outputs), channels)


@dataclass(frozen=True)
class _Attention:
    """Makes attention layers from the one of two numbers that is given."""

    num_heads: int
    num_head_channels: int

    def __post_init__(self) -> None:
        if (self.num_heads == -1) == (self.num_head_channels == -1):
            raise ValueError(
                f"expected one of num_heads and num_head_channels, "
                f"got {self.num_heads} and {self.num_head_channels}"
            )

    def __call__(self, channels: int, depth: int) -> Layer:
        by_width = self.num_heads == -1
        divisor = self.num_head_channels if by_width else self.num_heads
        if divisor < 1 or channels % divisor:
            raise ValueError(
                f"{channels} channels do not divide into heads "
                f"(num_heads {self.num_heads}, num_head_channels {self.num_head_channels})"
            )
        return Layer(
            "attention", channels, channels, depth, channels // divisor if by_width else divisor
        )


def _per_level(name: str, value: int | Sequence[int], levels: int) -> list[int]:
    values = [value] * levels if isinstance(value, int) else list(value)
    if len(values) != levels:
        raise ValueError(f"{name}: expected one number or {levels}, one per level; got {value}")
    return values
