"""Embedding of scalar conditionings."""

from einops import rearrange
from torch import Tensor, nn

from sgm.modules.diffusionmodules.layers import sinusoidal_embedding


class ConcatTimestepEmbedderND(nn.Module):
    """Sinusoidal embeddings of d numbers per row, side by side (frames per second, motion, ...).

    Args:
        outdim: width of one number's embedding.

    Attributes:
        place: where the result enters the U-Net.
        channels: its width, of one number per row.
    """

    place = "vector"

    def __init__(self, outdim: int) -> None:
        super().__init__()
        self.outdim = self.channels = outdim

    def forward(self, x: Tensor) -> Tensor:
        """(n,) or (n, d) numbers -> (n, d outdim), float32."""
        x = x[:, None] if x.ndim == 1 else x
        embedded = sinusoidal_embedding(x.flatten(), self.outdim)
        return rearrange(embedded, "(n d) e -> n (d e)", d=x.shape[1])
