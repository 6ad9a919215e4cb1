"""From the conditioner's dictionary to the network's arguments."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class OpenAIWrapper(nn.Module):
    """Give the U-Net its conditioning by name, in its own type.

    Args:
        diffusion_model: the U-Net.
        compile_model: run it through ``torch.compile``.
    """

    def __init__(self, diffusion_model: nn.Module, compile_model: bool = False) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        if compile_model:
            self.diffusion_model.compile()

    def forward(self, x: Tensor, t: Tensor, c: Mapping[str, Tensor], **kwargs: Any) -> Tensor:
        """Call the network.

        Args:
            x: (b t, z, h, w), scaled noisy latents.
            t: (b t,), or (1,) for all rows: c_noise; stays in its type, since half precision would
                round it.
            c: ``concat`` (b t, z, h, w), ``crossattn`` (b t, k, d) and ``vector`` (b t, e); each
                may be absent.
            kwargs: ``num_video_frames`` and ``image_only_indicator``.

        Returns:
            (b t, z, h, w) in the type of ``x``.
        """
        dtype = next(self.diffusion_model.parameters()).dtype
        concat, context, vector = (
            c[key].to(dtype) if key in c else None for key in ("concat", "crossattn", "vector")
        )
        h = x.to(dtype)
        if concat is not None:
            h = torch.cat([h, concat], dim=1)
        return self.diffusion_model(h, t.expand(len(h)), context, vector, **kwargs).to(x.dtype)
