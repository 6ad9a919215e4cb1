"""The autoencoder: native encoder and decoders and diffusers' ``AutoencoderKLTemporalDecoder``.

Diffusers numbers the levels of a decoder from its input on, the native layout from the pictures
on. Attention is made of 1x1 convolutions natively, of linear layers there. Residual blocks of the
temporal decoder mix ``alpha * temporal + (1 - alpha) * spatial`` on both sides (diffusers' mixer is
told to ``switch_spatial_to_temporal_mix``), so ``mix_factor`` is the same number. Letters: i and o
channels of a residual block, c of another layer, f of the level next to the pictures, p of the
pictures; Z of the latents.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from sgm.convert.pairs import LINEAR, STEP, Pair, Table, block, count, module, tensor

_ATTENTION = (
    *module("norm", "group_norm", "c"),
    *module("q", "to_q", "c c 1 1", LINEAR),
    *module("k", "to_k", "c c 1 1", LINEAR),
    *module("v", "to_v", "c c 1 1", LINEAR),
    *module("proj_out", "to_out.0", "c c 1 1", LINEAR),
)
# What diffusers called the attention's layers before version 0.17, and calls them since.
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"(?<=mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")


def _residual(foreign: str = "") -> Table:
    return (
        *module("norm1", f"{foreign}norm1", "i"),
        *module("conv1", f"{foreign}conv1", "o i 3 3"),
        *module("norm2", f"{foreign}norm2", "o"),
        *module("conv2", f"{foreign}conv2", "o o 3 3"),
        *module("nin_shortcut", f"{foreign}conv_shortcut", "o i 1 1", projects=True),
    )


_SPATIAL = _residual()
_TEMPORAL = (
    *_residual("spatial_res_block."),
    *module("time_stack.in_layers.0", "temporal_res_block.norm1", "o"),
    *module("time_stack.in_layers.2", "temporal_res_block.conv1", "o o 3 1 1"),
    *module("time_stack.out_layers.0", "temporal_res_block.norm2", "o"),
    *module("time_stack.out_layers.3", "temporal_res_block.conv2", "o o 3 1 1"),
    *tensor("mix_factor", "time_mixer.mix_factor", "1"),
)
_ENCODER = (
    *module("conv_in", "conv_in", "f p 3 3"),
    *module("norm_out", "conv_norm_out", "c"),
    *module("conv_out", "conv_out", "2Z c 3 3"),
)
_DECODER = (
    *module("conv_in", "conv_in", "c Z 3 3"),
    *module("norm_out", "conv_norm_out", "f"),
    *module("conv_out", "conv_out", "p f 3 3"),
)
_TIME_OUT = module("conv_out.time_mix_conv", "time_conv_out", "p p 3 1 1")
QUANT = module("quant_conv", "quant_conv", "2Z 2Z 1 1")
POST_QUANT = module("post_quant_conv", "post_quant_conv", "Z Z 1 1")


@dataclass(frozen=True)
class CoderShape:
    """What the numbers of the blocks of an encoder or a decoder depend on.

    Attributes:
        blocks: residual blocks of each level, from the pictures on.
        attention: there is attention in the middle.
        temporal: residual blocks have a time part.
    """

    blocks: tuple[int, ...]
    attention: bool
    temporal: bool


def native_encoder(keys: Collection[str]) -> CoderShape:
    """Tell an encoder's shape from native keys, without their prefix."""
    return _native_coder(keys, "down.")


def native_decoder(keys: Collection[str]) -> CoderShape:
    """Tell a decoder's shape from native keys, without their prefix."""
    return _native_coder(keys, "up.")


def foreign_encoder(keys: Collection[str]) -> CoderShape:
    """Tell an encoder's shape from diffusers' keys, without their prefix."""
    return _foreign_coder(keys, "down_blocks.")


def foreign_decoder(keys: Collection[str]) -> CoderShape:
    """Tell a decoder's shape from diffusers' keys, without their prefix."""
    shape = _foreign_coder(keys, "up_blocks.")
    return replace(shape, blocks=shape.blocks[::-1])


def current_name(key: str) -> str:
    """The name that diffusers gives today to what it once called ``key``."""
    return _OLD_NAME.sub(lambda old: _RENAMED[old[0]], key)


def encoder_pairs(shape: CoderShape) -> Iterator[Pair]:
    """All pairs of an encoder, without the prefixes of either side."""
    yield from _ENCODER
    yield from _middle(shape, _SPATIAL)
    for level, blocks in enumerate(shape.blocks):
        native, foreign = f"down.{level}.", f"down_blocks.{level}."
        yield from _residuals(native, foreign, blocks, _SPATIAL)
        if level < len(shape.blocks) - 1:
            yield from block(f"{native}downsample.conv.", f"{foreign}downsamplers.0.conv.", STEP)


def decoder_pairs(shape: CoderShape) -> Iterator[Pair]:
    """All pairs of a decoder, without the prefixes of either side."""
    residual = _TEMPORAL if shape.temporal else _SPATIAL
    yield from _DECODER
    if shape.temporal:
        yield from _TIME_OUT
    yield from _middle(shape, residual)
    for level, blocks in enumerate(shape.blocks):
        native, foreign = f"up.{level}.", f"up_blocks.{len(shape.blocks) - 1 - level}."
        yield from _residuals(native, foreign, blocks, residual)
        if level > 0:
            yield from block(f"{native}upsample.conv.", f"{foreign}upsamplers.0.conv.", STEP)


def _middle(shape: CoderShape, residual: Table) -> Iterator[Pair]:
    yield from block("mid.block_1.", "mid_block.resnets.0.", residual)
    if shape.attention:
        yield from block("mid.attn_1.", "mid_block.attentions.0.", _ATTENTION)
    yield from block("mid.block_2.", "mid_block.resnets.1.", residual)


def _residuals(native: str, foreign: str, blocks: int, table: Table) -> Iterator[Pair]:
    for number in range(blocks):
        yield from block(f"{native}block.{number}.", f"{foreign}resnets.{number}.", table)


def _native_coder(keys: Collection[str], levels: str) -> CoderShape:
    return CoderShape(
        tuple(count(keys, f"{levels}{n}.block.") for n in range(count(keys, levels))),
        any(key.startswith("mid.attn_1.") for key in keys),
        any(".time_stack." in key for key in keys),
    )


def _foreign_coder(keys: Collection[str], levels: str) -> CoderShape:
    return CoderShape(
        tuple(count(keys, f"{levels}{n}.resnets.") for n in range(count(keys, levels))),
        any(key.startswith("mid_block.attentions.0.") for key in keys),
        any(".temporal_res_block." in key for key in keys),
    )
