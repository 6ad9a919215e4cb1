"""Learned mixing of a spatial and a temporal branch."""

import torch
from torch import Tensor, nn

MERGE_STRATEGIES = ("fixed", "learned", "learned_with_images")


def mix_weight(factor: Tensor, learned: bool) -> Tensor:
    """The weight in [0, 1] that a mix factor stands for: its sigmoid where it is learned."""
    return factor.sigmoid() if learned else factor


class AlphaBlender(nn.Module):
    """``alpha * spatial + (1 - alpha) * temporal`` with one ``alpha`` for all channels.

    Align Your Latents (arXiv 2304.08818), equation 2. Strategies:

    - ``fixed``: alpha is the given number;
    - ``learned``: alpha is the sigmoid of a parameter;
    - ``learned_with_images``: as learned, and 1 for the frames marked as single images.

    Args:
        alpha: number in [0, 1] (fixed) or the parameter's start, before the sigmoid.
        merge_strategy: one of the three.

    Raises:
        ValueError: unknown strategy.
    """

    def __init__(self, alpha: float, merge_strategy: str = "learned_with_images") -> None:
        super().__init__()
        if merge_strategy not in MERGE_STRATEGIES:
            raise ValueError(
                f"merge_strategy: expected one of {', '.join(MERGE_STRATEGIES)}; "
                f"got {merge_strategy!r}"
            )
        self.learned = merge_strategy != "fixed"
        self.marks_images = merge_strategy == "learned_with_images"
        value = torch.tensor([alpha])
        if self.learned:
            self.mix_factor = nn.Parameter(value)
        else:
            self.register_buffer("mix_factor", value)

    def alpha(self, image_only_indicator: Tensor | None) -> Tensor:
        """Weight of the spatial branch: shape (1,), or (b, t) where images are marked."""
        alpha = mix_weight(self.mix_factor, self.learned)
        if not self.marks_images:
            return alpha
        if image_only_indicator is None:
            raise ValueError("merge_strategy 'learned_with_images' needs image_only_indicator")
        return torch.where(image_only_indicator.bool(), torch.ones_like(alpha), alpha)

    def forward(
        self, spatial: Tensor, temporal: Tensor, image_only_indicator: Tensor | None = None
    ) -> Tensor:
        """Blend two tensors of shape (b t, ...).

        Args:
            spatial: the spatial branch.
            temporal: the temporal branch, of the same shape.
            image_only_indicator: (b, t); non-zero where a row is an image and no video frame.
        """
        alpha = self.alpha(image_only_indicator).to(spatial.dtype)
        alpha = alpha.reshape(-1, *[1] * (spatial.ndim - 1))
        return torch.lerp(temporal, spatial, alpha)
