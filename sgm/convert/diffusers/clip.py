"""The image encoder: open_clip's visual tower and transformers' ``CLIPVisionModelWithProjection``.

open_clip stacks the projections to query, key and value (as torch does) and multiplies with
``proj`` from the right; transformers has three projections and a linear layer. Letters: w width of
the tower, h of its feed-forward, n positions, p pixels of a patch's edge; X of the context.
"""

from collections.abc import Collection, Iterator

from sgm.convert.pairs import STACKED, TRANSPOSED, Pair, Table, count, module, prefixed, tensor

_LAYERS = "vision_model.encoder.layers."

_TOWER = (
    *tensor("class_embedding", "vision_model.embeddings.class_embedding", "w"),
    *tensor("conv1.weight", "vision_model.embeddings.patch_embedding.weight", "w 3 p p"),
    *tensor("positional_embedding", "vision_model.embeddings.position_embedding.weight", "n w"),
    *module("ln_pre", "vision_model.pre_layrnorm", "w"),  # spelt so there
    *module("ln_post", "vision_model.post_layernorm", "w"),
    *tensor("proj", "visual_projection.weight", "w X", TRANSPOSED),
)


def _stacked(native: str, kind: str, shape: str) -> Table:
    parts = tuple(f"self_attn.{letter}_proj.{kind}" for letter in "qkv")
    return (Pair(native, parts, shape, STACKED),)


_LAYER = (
    *module("ln_1", "layer_norm1", "w"),
    *_stacked("attn.in_proj_weight", "weight", "3w w"),
    *_stacked("attn.in_proj_bias", "bias", "3w"),
    *module("attn.out_proj", "self_attn.out_proj", "w w"),
    *module("ln_2", "layer_norm2", "w"),
    *module("mlp.c_fc", "mlp.fc1", "h w"),
    *module("mlp.c_proj", "mlp.fc2", "w h"),
)


def native_layers(keys: Collection[str]) -> int:
    """Number of layers by native keys, without their prefix."""
    return count(keys, "transformer.resblocks.")


def foreign_layers(keys: Collection[str]) -> int:
    """Number of layers by keys of transformers."""
    return count(keys, _LAYERS)


def clip_pairs(layers: int) -> Iterator[Pair]:
    """All pairs of an image encoder of so many layers, without the prefixes of either side."""
    yield from _TOWER
    for n in range(layers):
        yield from prefixed(f"transformer.resblocks.{n}.", f"{_LAYERS}{n}.", _LAYER)
