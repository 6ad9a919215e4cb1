"""CLIP's image tower (Radford et al. 2021, arXiv 2103.00020): a vision transformer.

The names of the parameters are open_clip's, as in published checkpoints; the class is our own, for
importing open_clip takes longer than loading the whole model. Shapes: n pictures, l tokens (one for
the class, one for each patch), w width of the tower, d width of the embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


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


class SelfAttention(nn.Module):
    """Attention of all tokens to all, with one matrix for query, key and value."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        """(n, l, w) -> (n, l, w)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = rearrange(qkv, "n l (three h d) -> three n h l d", three=3, d=self.head_width)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(rearrange(x, "n h l d -> n l (h d)"))


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and beside a shortcut."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        hidden = int(spec.width * spec.mlp_ratio)
        self.ln_1 = nn.LayerNorm(spec.width)
        self.attn = SelfAttention(spec.width, spec.head_width)
        self.ln_2 = nn.LayerNorm(spec.width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(spec.width, hidden))
        self.mlp.add_module("gelu", QuickGELU() if spec.quick_gelu else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(hidden, spec.width))

    def forward(self, x: Tensor) -> Tensor:
        """(n, l, w) -> (n, l, w)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The blocks, under the name that checkpoints use (``transformer.resblocks``)."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(spec) for _ in range(spec.layers)))

    def forward(self, x: Tensor) -> Tensor:
        """(n, l, w) -> (n, l, w)."""
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    """The tower: a picture's patches and a class token, of which the latter becomes the embedding.

    Args:
        spec: its numbers.

    Raises:
        ValueError: heads that do not divide the width.
    """

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        if spec.width % spec.head_width:
            raise ValueError(
                f"arch: width {spec.width} is no multiple of head_width {spec.head_width}"
            )
        w = spec.width
        tokens = 1 + (spec.image_size // spec.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, w, spec.patch_size, spec.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(w))
        self.positional_embedding = nn.Parameter(torch.empty(tokens, w))
        self.ln_pre = nn.LayerNorm(w)
        self.transformer = Transformer(spec)
        self.ln_post = nn.LayerNorm(w)
        self.proj = nn.Parameter(torch.empty(w, spec.embed_dim))
        # Of variance 1 / w; uniform, as normal draws on the meta device import torch's compiler.
        bound = (3 / w) ** 0.5
        for parameter in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, 3, size, size), normalised -> (n, d)."""
        patches = rearrange(self.conv1(pixels), "n w h v -> n (h v) w")
        first = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat((first, patches), dim=1) + self.positional_embedding.to(patches.dtype)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj
