"""CLIP's image tower as the context of the U-Net.

Shapes: n pictures, b clips, d width of the embedding.
"""

from collections.abc import Mapping
from typing import Any

from einops import rearrange, repeat
from torch import Tensor, nn

from sgm.modules.encoders.image_tower import VisionTransformer
from sgm.modules.encoders.resize import antialiased_resize
from sgm.towers import CLIP_MEAN, CLIP_STD, tower_spec
from sgm.util import instantiate_from_config, refuse_unknown

# Fields of published YAML files: where weights came from, and what the text side would need.
IGNORED = frozenset(
    (
        "device",
        "init_device",
        "max_length",
        "num_image_crops",
        "output_tokens",
        "repeat_to_max_len",
        "ucg_rate",
        "version",
    )
)


class ImageTower(nn.Module):
    """Holder of the tower under the name that checkpoints use (``model.visual``)."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, 3, size, size), normalised -> (n, d)."""
        return self.visual(pixels)


class FrozenOpenCLIPImageEmbedder(nn.Module):
    """A picture's CLIP embedding (arXiv 2103.00020).

    The weights come with the model's checkpoint and are never downloaded; the text tower is not
    built.

    Args:
        arch: name of an open_clip architecture such as ``ViT-H-14``, or a mapping with
            ``embed_dim`` and ``vision_cfg`` as in open_clip's own files.
        freeze: keep the weights fixed in training.
        antialias: must be true, as in every published model.
        unsqueeze_dim: give (n, 1, d).
        ignored: ``version``, ``device``, ``init_device`` and others of published YAML files.

    Attributes:
        place: where the result enters the U-Net.
        channels: d.

    Raises:
        ValueError: an unknown parameter, or an architecture that is no plain vision transformer.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "ViT-H-14",
        freeze: bool = True,
        antialias: bool = True,
        unsqueeze_dim: bool = False,
        **ignored: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(self, ignored, IGNORED)
        if not antialias:
            raise ValueError("antialias: expected true, as in every published model; got false")
        spec = tower_spec(arch)
        self.size = spec.image_size
        self.model = ImageTower(VisionTransformer(spec))
        self.unsqueeze_dim = unsqueeze_dim
        self.place = "crossattn" if unsqueeze_dim else "vector"
        self.channels = spec.embed_dim
        if freeze:
            self.requires_grad_(False)

    def preprocess(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] -> normalised pictures of the tower's size."""
        x = antialiased_resize(x, self.size, self.size)
        mean, std = (x.new_tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        return ((x + 1) / 2 - mean) / std

    def forward(self, image: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] -> (n, d), in the type of ``image``."""
        pixels = self.preprocess(image).to(next(self.model.parameters()).dtype)
        z = self.model(pixels).to(image.dtype)
        return z[:, None] if self.unsqueeze_dim else z


class FrozenOpenCLIPImagePredictionEmbedder(nn.Module):
    """CLIP embeddings of the condition frames, as context tokens.

    Args:
        open_clip_embedding_config: the embedder of one picture.
        n_cond_frames: condition frames per clip, one token each.
        n_copies: rows given per clip.

    Attributes:
        place: where the result enters the U-Net.
        channels: d; None where the embedder does not tell it.
    """

    place = "crossattn"

    def __init__(
        self, open_clip_embedding_config: Mapping[str, Any], n_cond_frames: int, n_copies: int
    ) -> None:
        super().__init__()
        self.n_cond_frames = n_cond_frames
        self.n_copies = n_copies
        self.open_clip = instantiate_from_config(open_clip_embedding_config)
        self.channels = getattr(self.open_clip, "channels", None)

    def forward(self, frames: Tensor) -> Tensor:
        """(b n_cond_frames, 3, h, w) in [-1, 1] -> (b n_copies, n_cond_frames, d)."""
        tokens = rearrange(self.open_clip(frames), "(b k) d -> b k d", k=self.n_cond_frames)
        return repeat(tokens, "b k d -> (b copies) k d", copies=self.n_copies)
