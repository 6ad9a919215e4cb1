"""The U-Net: native ``input_blocks.N`` and diffusers' ``UNetSpatioTemporalConditionModel``.

Native blocks are numbered through; diffusers numbers levels, and residual blocks within a level.
Both mix ``alpha * spatial + (1 - alpha) * temporal`` with the sigmoid of ``mix_factor``. Letters: c
channels of a transformer, i and o of a residual block; M of the first level, E of the embedding,
X of the context, V of the vector conditioning, I and O of input and output.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from sgm.convert.pairs import STEP, Pair, Table, block, count, module, prefixed, tensor

_ENDS = (
    *module("input_blocks.0.0", "conv_in", "M I 3 3"),
    *module("time_embed.0", "time_embedding.linear_1", "E M"),
    *module("time_embed.2", "time_embedding.linear_2", "E E"),
    *module("label_emb.0.0", "add_embedding.linear_1", "E V"),
    *module("label_emb.0.2", "add_embedding.linear_2", "E E"),
    *module("out.0", "conv_norm_out", "M"),
    *module("out.2", "conv_out", "O M 3 3"),
)
_RESIDUAL = (
    *module("in_layers.0", "spatial_res_block.norm1", "i"),
    *module("in_layers.2", "spatial_res_block.conv1", "o i 3 3"),
    *module("emb_layers.1", "spatial_res_block.time_emb_proj", "o E"),
    *module("out_layers.0", "spatial_res_block.norm2", "o"),
    *module("out_layers.3", "spatial_res_block.conv2", "o o 3 3"),
    *module("skip_connection", "spatial_res_block.conv_shortcut", "o i 1 1", projects=True),
    *module("time_stack.in_layers.0", "temporal_res_block.norm1", "o"),
    *module("time_stack.in_layers.2", "temporal_res_block.conv1", "o o 3 1 1"),
    *module("time_stack.emb_layers.1", "temporal_res_block.time_emb_proj", "o E"),
    *module("time_stack.out_layers.0", "temporal_res_block.norm2", "o"),
    *module("time_stack.out_layers.3", "temporal_res_block.conv2", "o o 3 1 1"),
    *tensor("time_mixer.mix_factor", "time_mixer.mix_factor", "1"),
)
_TRANSFORMER = (
    *module("norm", "norm", "c"),
    *module("proj_in", "proj_in", "c c"),
    *module("proj_out", "proj_out", "c c"),
    *module("time_pos_embed.0", "time_pos_embed.linear_1", "4c c"),
    *module("time_pos_embed.2", "time_pos_embed.linear_2", "c 4c"),
    *tensor("time_mixer.mix_factor", "time_mixer.mix_factor", "1"),
)


def _same(name: str, shape: str) -> Table:
    return module(name, name, shape)


def _attention(name: str, context: str) -> Table:
    """Attention over tokens of ``context`` channels; only its output has a bias."""
    shapes = {"to_q": "c c", "to_k": f"c {context}", "to_v": f"c {context}"}
    projections = (
        pair
        for layer, shape in shapes.items()
        for pair in tensor(f"{name}.{layer}.weight", f"{name}.{layer}.weight", shape)
    )
    return (*projections, *_same(f"{name}.to_out.0", "c c"))


def _feed_forward(name: str) -> Table:
    return (*_same(f"{name}.net.0.proj", "8c c"), *_same(f"{name}.net.2", "c 4c"))


_SPATIAL = (
    *_same("norm1", "c"),
    *_attention("attn1", "c"),
    *_same("norm2", "c"),
    *_attention("attn2", "X"),
    *_same("norm3", "c"),
    *_feed_forward("ff"),
)
_TEMPORAL = (*_same("norm_in", "c"), *_feed_forward("ff_in"), *_SPATIAL)


@dataclass(frozen=True)
class UNetShape:
    """What the numbers of the blocks depend on.

    Attributes:
        blocks: residual blocks of each level on the way down, the first level first.
        depths: transformer blocks of each attention layer of a level; 0 for a level without.
        middle: the same in the middle.
    """

    blocks: tuple[int, ...]
    depths: tuple[int, ...]
    middle: int


def native_unet(keys: Collection[str]) -> UNetShape:
    """Tell levels and depths from native keys, without their prefix."""
    blocks, depths = [0], [0]
    for number in range(1, count(keys, "input_blocks.")):
        if any(key.startswith(f"input_blocks.{number}.0.op.") for key in keys):
            blocks.append(0)
            depths.append(0)
        else:
            blocks[-1] += 1
            depth = count(keys, f"input_blocks.{number}.1.transformer_blocks.")
            depths[-1] = max(depths[-1], depth)
    middle = count(keys, "middle_block.1.transformer_blocks.")
    return UNetShape(tuple(blocks), tuple(depths), middle)


def foreign_unet(keys: Collection[str]) -> UNetShape:
    """Tell levels and depths from diffusers' keys, without the folder's name."""
    levels = range(count(keys, "down_blocks."))
    downs = [f"down_blocks.{level}." for level in levels]
    return UNetShape(
        tuple(count(keys, f"{down}resnets.") for down in downs),
        tuple(count(keys, f"{down}attentions.0.transformer_blocks.") for down in downs),
        count(keys, "mid_block.attentions.0.transformer_blocks."),
    )


def unet_pairs(shape: UNetShape) -> Iterator[Pair]:
    """All pairs of a U-Net, without the prefixes of either side."""
    yield from _ENDS
    yield from _way_down(shape)
    yield from block("middle_block.0.", "mid_block.resnets.0.", _RESIDUAL)
    yield from _transformer("middle_block.1.", "mid_block.attentions.0.", shape.middle)
    yield from block("middle_block.2.", "mid_block.resnets.1.", _RESIDUAL)
    yield from _way_up(shape)


def _way_down(shape: UNetShape) -> Iterator[Pair]:
    number = 1
    for level, (blocks, depth) in enumerate(zip(shape.blocks, shape.depths, strict=True)):
        down = f"down_blocks.{level}."
        for index in range(blocks):
            yield from _block(f"input_blocks.{number}.", down, index, depth)
            number += 1
        if level < len(shape.blocks) - 1:
            yield from block(f"input_blocks.{number}.0.op.", f"{down}downsamplers.0.conv.", STEP)
            number += 1


def _way_up(shape: UNetShape) -> Iterator[Pair]:
    number = 0
    last = len(shape.blocks) - 1
    for level in range(last, -1, -1):
        up, depth = f"up_blocks.{last - level}.", shape.depths[level]
        for index in range(shape.blocks[level] + 1):
            yield from _block(f"output_blocks.{number}.", up, index, depth)
            number += 1
        if level > 0:
            native = f"output_blocks.{number - 1}.{2 if depth else 1}.conv."
            yield from block(native, f"{up}upsamplers.0.conv.", STEP)


def _block(native: str, level: str, number: int, depth: int) -> Iterator[Pair]:
    yield from block(f"{native}0.", f"{level}resnets.{number}.", _RESIDUAL)
    if depth:
        yield from _transformer(f"{native}1.", f"{level}attentions.{number}.", depth)


def _transformer(native: str, foreign: str, depth: int) -> Iterator[Pair]:
    pairs = list(_TRANSFORMER)
    for d in range(depth):
        pairs += prefixed(f"transformer_blocks.{d}.", f"transformer_blocks.{d}.", _SPATIAL)
        pairs += prefixed(f"time_stack.{d}.", f"temporal_transformer_blocks.{d}.", _TEMPORAL)
    return block(native, foreign, pairs)
