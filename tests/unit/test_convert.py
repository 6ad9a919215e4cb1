"""Conversions as plans: what is used, dropped and absent, what is refused, from shapes alone."""

import gzip
import json
from functools import cache
from pathlib import Path

import pytest
import torch

from sgm.convert import detect, folder_part, plan

KEYS = Path(__file__).parents[1] / "data" / "keys"
PUBLISHED = ("svd", "svd_image_decoder", "sv3d_u", "sv3d_p")
Shapes = dict[str, tuple[int, ...]]


@cache
def published(name: str) -> Shapes:
    """The tensors of a published checkpoint, by the reference architecture."""
    with gzip.open(KEYS / f"{name}.json.gz", "rt") as file:
        return {key: tuple(shape) for key, shape in json.load(file).items()}


@cache
def folder(name: str = "svd") -> Shapes:
    return plan(published(name), source="native", target="diffusers").shapes


def to_native(shapes: Shapes, **options: bool) -> Shapes:
    return plan(shapes, source="diffusers", target="native", **options).shapes


def refusal(shapes: Shapes, source: str = "diffusers", target: str = "native") -> str:
    with pytest.raises(ValueError, match=r"^expected the weights of a video model") as info:
        plan(shapes, source=source, target=target)
    return str(info.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_tensor_is_used_dropped_or_absent(name):
    """Catches a block that the tables leave out, and an embedder's number taken for another's."""
    native = published(name)
    there = plan(native, source="native", target="diffusers")
    used = {key for entry in there.entries for key in entry.sources}
    assert used | set(there.dropped) == native.keys()
    assert not used & set(there.dropped)

    back = plan(there.shapes, source="diffusers", target="native")
    assert not back.dropped
    assert {key: shape for key, shape in native.items() if not key.startswith(back.absent)} == (
        back.shapes
    )


def test_only_the_text_side_and_unused_coders_are_dropped():
    conversion = plan(published("svd"), source="native", target="diffusers")
    beginnings = {".".join(key.split(".")[:5]) for key in conversion.dropped}
    clip, condition = "conditioner.embedders.0.open_clip.model", "conditioner.embedders.3.encoder"
    kept_nowhere = {
        key for key in conversion.dropped if not key.startswith("first_stage_model.enc")
    }
    assert all(
        key.startswith((f"{condition}.decoder.", f"{condition}.post_quant_conv.", f"{clip}."))
        for key in kept_nowhere
    ), beginnings
    assert not any(".visual." in key for key in conversion.dropped)


@pytest.mark.parametrize("name", PUBLISHED)
def test_layouts_are_told_apart(name):
    assert detect(published(name)) == "native"
    assert detect(folder(name)) == "diffusers"


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match=r"expected a video model .* such as text_model\.a$"):
        detect({"text_model.a": (1,)})
    with pytest.raises(ValueError, match="got no tensors"):
        detect({})
    with pytest.raises(ValueError, match=r"expected one of the layouts native, .*'onnx'"):
        plan({}, source="onnx", target="native")


@pytest.mark.parametrize("part", ["unet/", "vae/", "image_encoder/"])
def test_bare_files_of_a_folder_are_told_apart(part):
    bare = {k.removeprefix(part): s for k, s in folder().items() if k.startswith(part)}
    assert folder_part(bare) == part
    assert folder_part(published("svd")) is None


def test_a_unet_alone_needs_partial():
    """As AnimateLCM publishes it."""
    unet = {key: shape for key, shape in folder().items() if key.startswith("unet/")}
    conversion = plan(unet, source="diffusers", target="native", partial=True)
    expected = {k for k in published("svd") if k.startswith("model.diffusion_model.")}
    assert conversion.shapes.keys() == expected
    rest = published("svd").keys() - expected
    assert all(key.startswith(conversion.absent) for key in rest)
    assert not any(key.startswith(conversion.absent) for key in expected)
    assert "missing (image_encoder/" in refusal(unet)


def test_a_native_unet_alone_becomes_a_folders():
    unet = {k: s for k, s in published("svd").items() if k.startswith("model.diffusion_model.")}
    conversion = plan(unet, source="native", target="diffusers", partial=True)
    assert conversion.shapes == {k: s for k, s in folder().items() if k.startswith("unet/")}


def test_a_part_must_be_whole_even_if_partial():
    unet = {key: shape for key, shape in folder().items() if key.startswith("unet/")}
    del unet["unet/mid_block.resnets.1.time_mixer.mix_factor"]
    with pytest.raises(ValueError, match=r"missing \(unet/mid_block\.resnets\.1\.time_mixer"):
        plan(unet, source="diffusers", target="native", partial=True)


# One tensor of every kind, of either layout.
NATIVE_KEYS = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.input_blocks.4.0.in_layers.0.weight",
    "model.diffusion_model.input_blocks.4.0.skip_connection.bias",
    "model.diffusion_model.input_blocks.3.0.op.weight",
    "model.diffusion_model.middle_block.1.time_stack.0.ff_in.net.0.proj.weight",
    "model.diffusion_model.output_blocks.5.2.conv.weight",
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight",
    "first_stage_model.decoder.up.0.block.2.mix_factor",
    "first_stage_model.decoder.conv_out.time_mix_conv.weight",
    "conditioner.embedders.3.encoder.encoder.mid.attn_1.q.weight",
    "conditioner.embedders.3.encoder.quant_conv.bias",
    "conditioner.embedders.0.open_clip.model.visual.proj",
    "conditioner.embedders.0.open_clip.model.visual.transformer.resblocks.7.attn.in_proj_weight",
)
FOREIGN_KEYS = (
    "unet/add_embedding.linear_2.bias",
    "unet/down_blocks.1.resnets.0.spatial_res_block.conv_shortcut.weight",
    "unet/down_blocks.2.downsamplers.0.conv.weight",
    "unet/up_blocks.3.attentions.2.temporal_transformer_blocks.0.norm_in.weight",
    "vae/decoder.up_blocks.0.resnets.2.temporal_res_block.conv1.weight",
    "vae/encoder.mid_block.attentions.0.to_v.weight",
    "vae/quant_conv.weight",
    "image_encoder/vision_model.encoder.layers.3.self_attn.k_proj.weight",
    "image_encoder/visual_projection.weight",
)
CASES = [
    *(("native", "diffusers", key) for key in NATIVE_KEYS),
    *(("diffusers", "native", key) for key in FOREIGN_KEYS),
]


def source_shapes(layout: str) -> Shapes:
    return dict(published("svd") if layout == "native" else folder())


@pytest.mark.parametrize(("source", "target", "key"), CASES)
def test_a_missing_tensor_is_named(source, target, key):
    shapes = source_shapes(source)
    del shapes[key]
    assert f"1 tensor missing ({key})" in refusal(shapes, source, target)


@pytest.mark.parametrize(("source", "target", "key"), CASES)
def test_a_misshapen_tensor_is_named_alone(source, target, key):
    """Catches blaming a tensor that agrees with the others for the one that does not."""
    shapes = source_shapes(source)
    shapes[key] = (*shapes[key][:-1], shapes[key][-1] + 2)
    error = refusal(shapes, source, target)
    assert "1 tensor of another shape" in error
    assert f"{key} {list(shapes[key])}" in error


@pytest.mark.parametrize(("source", "target", "key"), CASES)
def test_a_tensor_too_many_is_named(source, target, key):
    shapes = source_shapes(source)
    shapes[f"{key}_2"] = (1,)
    assert f"1 tensor left over ({key}_2)" in refusal(shapes, source, target)


def test_a_shortcut_where_none_belongs_is_left_over():
    extra = "unet/down_blocks.0.resnets.0.spatial_res_block.conv_shortcut.weight"
    assert f"left over ({extra})" in refusal(folder() | {extra: (320, 320, 1, 1)})


def test_position_numbers_of_transformers_are_dropped():
    """Versions before 4.31 saved them."""
    key = "image_encoder/vision_model.embeddings.position_ids"
    conversion = plan(folder() | {key: (1, 257)}, source="diffusers", target="native")
    assert conversion.dropped == (key,)


def test_old_names_of_the_autoencoders_attention():
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, shape in folder().items():
        block, mark, rest = key.partition(".mid_block.attentions.0.")
        name = rest.rpartition(".")[0]
        is_old = key.startswith("vae/") and name in renamed
        old[f"{block}{mark}{rest.replace(name, renamed[name])}" if is_old else key] = shape
    assert sum("proj_attn" in key for key in old) == 4
    conversion = plan(old, source="diffusers", target="native")
    assert conversion.shapes == to_native(folder())
    assert {key for entry in conversion.entries for key in entry.sources} == old.keys()


def test_a_renamed_tensor_is_the_tensor_itself():
    """Views of a mapped file must stay views."""
    conversion = plan(folder(), source="diffusers", target="native")
    (entry,) = (e for e in conversion.entries if e.key.endswith("input_blocks.0.0.weight"))
    tensor = torch.zeros(entry.shape)
    assert entry.make(tensor) is tensor
    (entry,) = (
        e for e in conversion.entries if e.key.endswith("3.encoder.encoder.mid.attn_1.q.weight")
    )
    tensor = torch.zeros(entry.shape[:2])
    assert entry.make(tensor).data_ptr() == tensor.data_ptr()


def test_shapes_are_those_of_the_tensors_made():
    """Writers put the shapes into a header before there is any tensor."""
    for source, target in (("native", "diffusers"), ("diffusers", "native")):
        shapes = source_shapes(source)
        for entry in plan(shapes, source=source, target=target).entries:
            made = entry.make(*(torch.empty(shapes[key], device="meta") for key in entry.sources))
            assert tuple(made.shape) == entry.shape, entry.key


def test_a_layout_to_itself():
    conversion = plan(folder(), source="diffusers", target="diffusers")
    assert conversion.shapes == folder()
