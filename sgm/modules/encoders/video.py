"""Condition frames as latents, concatenated to the U-Net's input."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from sgm.util import default, instantiate_from_config


class VideoPredictionEmbedderWithEncoder(nn.Module):
    """Latents of the condition frames, not multiplied by the model's scale factor.

    Args:
        encoder_config: an autoencoder (``is_ae``) or a plain encoder.
        n_cond_frames: condition frames per clip, stacked along the channels.
        n_copies: rows given per clip.
        is_ae: call ``encode`` of the encoder.
        scale_factor: multiplies the latents; 1 in every published model.
        en_and_decode_n_samples_a_time: pictures encoded at once; all where None.
        disable_encoder_autocast: encode in the encoder's own type, whatever autocast says.

    Attributes:
        place: where the result enters the U-Net.
        channels: n_cond_frames z; None where the encoder does not tell z.
    """

    place = "concat"

    def __init__(
        self,
        encoder_config: Mapping[str, Any],
        n_cond_frames: int,
        n_copies: int,
        is_ae: bool = False,
        scale_factor: float = 1.0,
        en_and_decode_n_samples_a_time: int | None = None,
        disable_encoder_autocast: bool = False,
    ) -> None:
        super().__init__()
        self.n_cond_frames = n_cond_frames
        self.n_copies = n_copies
        self.is_ae = is_ae
        self.scale_factor = scale_factor
        self.chunk = en_and_decode_n_samples_a_time
        self.disable_encoder_autocast = disable_encoder_autocast
        self.encoder = instantiate_from_config(encoder_config)
        z = getattr(self.encoder, "latent_channels", None)
        self.channels = None if z is None else n_cond_frames * z

    def forward(self, frames: Tensor) -> Tensor:
        """(b n_cond_frames, 3, h, w) in [-1, 1] -> (b n_copies, n_cond_frames z, h / f, w / f).

        The result has the type of ``frames``.
        """
        encode = self.encoder.encode if self.is_ae else self.encoder
        dtype = next(self.encoder.parameters()).dtype
        enabled = not self.disable_encoder_autocast and torch.is_autocast_enabled(
            frames.device.type
        )
        with torch.autocast(frames.device.type, enabled=enabled):
            chunks = frames.to(dtype).split(default(self.chunk, len(frames)))
            z = torch.cat([encode(chunk) for chunk in chunks]).to(frames.dtype)
        z = rearrange(z * self.scale_factor, "(b k) c h w -> b (k c) h w", k=self.n_cond_frames)
        return repeat(z, "b c h w -> (b copies) c h w", copies=self.n_copies)
