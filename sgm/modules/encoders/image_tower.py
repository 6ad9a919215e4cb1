"""CLIP's image tower (Radford et al. 2021, arXiv 2103.00020): a vision transformer.

The names of the parameters are open_clip's, as in published checkpoints; the class is our own, for
importing open_clip takes longer than loading the whole model. Shapes: n pictures, l tokens (one for
the class, one for each patch), w width of the tower, d width of the embedding.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sgm.towers import TowerSpec


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
