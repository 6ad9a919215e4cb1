"""The numbers of CLIP's image towers, by open_clip's names of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

# Of the colours in the pictures that all of them were trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class TowerSpec:
    """The numbers of an image tower.

    Attributes:
        embed_dim: width of the embedding.
        layers: transformer blocks.
        width: width of the tokens.
        head_width: channels of an attention head.
        patch_size: side of a patch in pixels.
        image_size: side of the square input in pixels.
        mlp_ratio: width of the feed-forward over that of the tokens.
        quick_gelu: ``x sigmoid(1.702 x)`` in place of GELU, as in OpenAI's own weights.
    """

    embed_dim: int
    layers: int
    width: int
    head_width: int = 64
    patch_size: int = 16
    image_size: int = 224
    mlp_ratio: float = 4.0
    quick_gelu: bool = False

    @classmethod
    def from_mapping(cls, arch: Mapping[str, Any]) -> Self:
        """Read an architecture as open_clip's files write it.

        Raises:
            ValueError: it is no plain vision transformer.
        """
        vision: dict[str, Any] = {"layers": 12, "width": 768} | dict(arch.get("vision_cfg") or {})
        fields = {name: vision.pop(name) for name in tuple(vision) if name in _VISION_FIELDS}
        faults = [f"{name!r} is not known here" for name, value in vision.items() if value]
        if not isinstance(fields["layers"], int):
            faults.append(f"'layers' is {fields['layers']}")
        if "embed_dim" not in arch:
            faults.append("'embed_dim' is missing")
        if faults:
            raise ValueError(f"arch: expected a plain vision transformer, but {faults[0]}")
        return cls(arch["embed_dim"], quick_gelu=arch.get("quick_gelu", False), **fields)


_VISION_FIELDS = {"layers", "width", "head_width", "patch_size", "image_size", "mlp_ratio"}

# By open_clip's names; other names are looked up there.
ARCHITECTURES = {
    "ViT-B-32": TowerSpec(512, layers=12, width=768, patch_size=32),
    "ViT-B-16": TowerSpec(512, layers=12, width=768),
    "ViT-L-14": TowerSpec(768, layers=24, width=1024, patch_size=14),
    "ViT-H-14": TowerSpec(1024, layers=32, width=1280, head_width=80, patch_size=14),
    "ViT-g-14": TowerSpec(
        1024, layers=40, width=1408, head_width=88, patch_size=14, mlp_ratio=4.3637
    ),
    "ViT-bigG-14": TowerSpec(
        1280, layers=48, width=1664, head_width=104, patch_size=14, mlp_ratio=4.9231
    ),
}


def tower_spec(arch: str | Mapping[str, Any]) -> TowerSpec:
    """The numbers of an architecture.

    Args:
        arch: a name of open_clip's, such as ``ViT-H-14``, or the contents of such a file of its.

    Raises:
        ValueError: an unknown name, or no plain vision transformer.
    """
    if not isinstance(arch, str):
        return TowerSpec.from_mapping(arch)
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch]
    import open_clip  # for rare names alone: this takes seconds

    config = open_clip.get_model_config(arch)
    if config is None:
        raise ValueError(f"arch: open_clip knows no architecture {arch!r}")
    return TowerSpec.from_mapping(config)
