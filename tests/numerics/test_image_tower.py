"""CLIP's image tower against open_clip's own."""

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from open_clip.transformer import VisionTransformer as Reference
from torch import nn

from sgm.modules.encoders.image_tower import VisionTransformer
from sgm.towers import ARCHITECTURES, tower_spec

SMALL = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "width": 48,
        "head_width": 16,
        "layers": 2,
        "mlp_ratio": 3.0,
    },
}


def reference(arch):
    vision = open_clip.CLIPVisionCfg(**arch["vision_cfg"])
    return Reference(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        width=vision.width,
        layers=vision.layers,
        heads=vision.width // vision.head_width,
        mlp_ratio=vision.mlp_ratio,
        output_dim=arch["embed_dim"],
        act_layer=QuickGELU if arch.get("quick_gelu") else nn.GELU,
    )


@pytest.mark.parametrize("quick", [False, True], ids=["gelu", "quick_gelu"])
def test_equals_open_clip(quick):
    """Catches: heads cut otherwise, norm before the class token is chosen, the other GELU."""
    arch = SMALL | {"quick_gelu": quick}
    generator = torch.Generator().manual_seed(0)
    theirs, ours = reference(arch), VisionTransformer(tower_spec(arch))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    with torch.no_grad():
        expected = theirs(pixels)
        torch.testing.assert_close(ours(pixels), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_named_architectures_are_open_clips(name):
    """Catches a wrong number in the table; open_clip's files are the truth."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        theirs, ours = reference(config), VisionTransformer(tower_spec(name))
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    heads = theirs.transformer.resblocks[0].attn.num_heads
    assert tower_spec(name).width // tower_spec(name).head_width == heads
    assert not config.get("quick_gelu")


def test_other_names_are_looked_up_in_open_clip():
    spec = tower_spec("ViT-L-14-336")
    assert (spec.image_size, spec.layers, spec.quick_gelu) == (336, 24, False)
    assert tower_spec("ViT-B-32-quickgelu").quick_gelu


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("ViT-Z-99", "knows no architecture 'ViT-Z-99'"),
        ("RN50", "'layers' is"),
        ("convnext_base", "'timm_model_name' is not known"),
        ({"embed_dim": 8, "vision_cfg": {"attentional_pool": True}}, "'attentional_pool'"),
        ({"vision_cfg": {}}, "embed_dim"),
    ],
)
def test_what_is_no_plain_vision_transformer_is_refused(arch, message):
    with pytest.raises(ValueError, match=message):
        tower_spec(arch)


def test_heads_must_divide_the_width():
    arch = {"embed_dim": 8, "vision_cfg": {"width": 40, "head_width": 16, "layers": 1}}
    with pytest.raises(ValueError, match="no multiple of head_width"):
        VisionTransformer(tower_spec(arch))
