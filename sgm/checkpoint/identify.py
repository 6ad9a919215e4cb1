"""Which model a set of weights belongs to, told from names and shapes alone."""

import re
from collections.abc import Mapping, Sequence

_UNET = "model.diffusion_model."
_PUBLISHED_WIDTH = 320

# The first pattern that some key matches decides. Layouts that are not the native one come first:
# their keys may contain native names.
_LAYOUTS = {
    r"(^|[._])lora[._]": "a LoRA file (an addition to a model)",
    r"motion_modules\.": "an AnimateDiff motion module",
    r"^down_blocks\..*temporal_transformer_blocks": "the U-Net of a diffusers SVD folder",
    r"^down_blocks\.": "a diffusers image U-Net",
    r"^(en|de)coder\.(down|mid|up)_block": "a diffusers autoencoder",
    r"^(vision|text)_model\.": "a CLIP model in the layout of transformers",
    r"^model\.diffusion_model\..*time_mix_blocks": "SV4D",
    r"^model\.diffusion_model\.(joint|double)_blocks": "an image transformer (SD 3, Flux)",
}
_OTHERS = {
    r"^model\.diffusion_model\..*attn2": "a Stable Diffusion image model",
    r"^(en|de)coder\.conv_in\.": "an autoencoder alone",
    r"^visual\.": "an OpenCLIP model",
}


def identify(shapes: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """Name the models that have keys and shapes such as these.

    Args:
        shapes: shape by key, without the prefixes of training wrappers.

    Returns:
        The names that `sgm.inference.specs` gives to models with equal keys and shapes, such as
        ``("svd", "svd_xt", "svd_xt_1_1")``; or one phrase, such as ``("SV4D",)``; or nothing where
        no model is recognised.
    """
    keys = "\n".join(shapes)
    video = re.search(r"^model\.diffusion_model\..*\.time_stack\.", keys, re.MULTILINE)
    return _search(_LAYOUTS, keys) or (
        _video_models(shapes, keys) if video else _image_models(shapes) or _search(_OTHERS, keys)
    )


def _search(table: Mapping[str, str], keys: str) -> tuple[str, ...]:
    found = (name for pattern, name in table.items() if re.search(pattern, keys, re.MULTILINE))
    return tuple(found)[:1]


def _video_models(shapes: Mapping[str, Sequence[int]], keys: str) -> tuple[str, ...]:
    """Tell the video models apart by width, vector conditioning and first stage."""
    width = shapes.get(f"{_UNET}input_blocks.0.0.weight", (0,))[0]
    if width < _PUBLISHED_WIDTH:
        return ("svd_tiny",)
    temporal = re.search(r"^first_stage_model\.decoder\..*\.time_", keys, re.MULTILINE)
    by_vector = {
        768: ("svd", "svd_xt", "svd_xt_1_1")
        if temporal
        else ("svd_image_decoder", "svd_xt_image_decoder"),
        256: ("sv3d_u",),
        1280: ("sv3d_p",),
    }
    vector = shapes.get(f"{_UNET}label_emb.0.0.weight", (0,))[-1]
    return by_vector.get(vector, ("a video model of this family, with other conditioning",))


def _image_models(shapes: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """Tell the versions of Stable Diffusion apart by the width of the text context."""
    key = re.compile(rf"{re.escape(_UNET)}.*attn2\.to_k\.weight")
    context = next((shape[-1] for name, shape in shapes.items() if key.match(name)), None)
    names = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
    return (f"{names[context]} (an image model)",) if context in names else ()
