"""Autoencoders: pictures or clips to latents and back.

Shapes: n pictures (rows of clips follow each other), c channels, z latent channels,
f the downsampling factor.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sgm.checkpoint import load_checkpoint
from sgm.util import default, instantiate_from_config, refuse_unknown

Config = Mapping[str, Any]

# Settings of the original trainer in published YAML files; training has its own section here.
IGNORED = frozenset(
    (
        "additional_decode_keys",
        "ckpt_engine",
        "disc_start_iter",
        "ema_decay",
        "input_key",
        "is_trainable",
        "lr_g_factor",
        "monitor",
        "optimizer_config",
        "trainable_ae_params",
    )
)
KL = "sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer"
MODEL = "sgm.modules.diffusionmodules.model"


class AutoencodingEngine(nn.Module):
    """Encoder, regulariser and decoder from a YAML.

    Args:
        encoder_config: encoder; ``torch.nn.Identity`` where only decoding is needed.
        decoder_config: decoder.
        regularizer_config: latent distribution.
        loss_config: training loss; ``torch.nn.Identity`` in published YAML files.
        ckpt_path: weights to load.
        ignored: settings of the original trainer that published YAML files name.

    Raises:
        ValueError: an unknown parameter, or one that a part refuses.
    """

    def __init__(
        self,
        *,
        encoder_config: Config,
        decoder_config: Config,
        regularizer_config: Config,
        loss_config: Config | None = None,
        ckpt_path: str | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(self, ignored, IGNORED)
        self.encoder = instantiate_from_config(encoder_config)
        self.decoder = instantiate_from_config(decoder_config)
        self.regularization = instantiate_from_config(regularizer_config)
        self.loss = instantiate_from_config(loss_config or {"target": "torch.nn.Identity"})
        if ckpt_path is not None:
            load_checkpoint(self, ckpt_path)

    @property
    def downsampling(self) -> int:
        """Pixels per latent along an edge: f."""
        return int(2 ** (len(self.decoder.up) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents: z."""
        return int(self.decoder.conv_in.in_channels)

    def moments(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] -> (n, 2 z, h / f, w / f)."""
        return self.encoder(x)

    def encode(
        self,
        x: Tensor,
        return_reg_log: bool = False,
        unregularized: bool = False,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Encode pictures.

        Args:
            x: (n, 3, h, w) in [-1, 1].
            return_reg_log: also give the regulariser's dictionary (``kl_loss``).
            unregularized: give the moments and an empty dictionary instead.
            generator: source of the draw where the regulariser samples.

        Returns:
            Latents (n, z, h / f, w / f), not multiplied by any scale factor.
        """
        moments = self.moments(x)
        if unregularized:
            return moments, {}
        z, log = self.regularization(moments, generator)
        return (z, log) if return_reg_log else z

    def decode(self, z: Tensor, decoder: nn.Module | None = None, **kwargs: Any) -> Tensor:
        """(n, z, h / f, w / f) -> (n, 3, h, w); ``timesteps`` goes to a video decoder.

        ``decoder`` is another form of :attr:`decoder` to call instead.
        """
        return default(decoder, self.decoder)(z, **kwargs)

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Encode and decode: latents, reconstruction and the regulariser's dictionary."""
        z, log = self.encode(x, return_reg_log=True)
        return z, self.decode(z, **kwargs), log


class AutoencoderKL(AutoencodingEngine):
    """The image autoencoder with 1x1 convolutions around its latents.

    Args:
        ddconfig: parameters of encoder and decoder.
        embed_dim: latent channels between the 1x1 convolutions.
        lossconfig: training loss.
        sample: draw latents, else take the mode.
        params: as in :class:`AutoencodingEngine`.
    """

    def __init__(
        self,
        *,
        ddconfig: Config,
        embed_dim: int,
        lossconfig: Config | None = None,
        sample: bool = True,
        ckpt_path: str | None = None,
        **params: Any,
    ) -> None:
        super().__init__(
            encoder_config={"target": f"{MODEL}.Encoder", "params": ddconfig},
            decoder_config={"target": f"{MODEL}.Decoder", "params": ddconfig},
            regularizer_config={"target": KL, "params": {"sample": sample}},
            loss_config=lossconfig,
            **params,
        )
        z = ddconfig["z_channels"]
        doubling = 1 + bool(ddconfig.get("double_z", True))
        self.quant_conv = nn.Conv2d(doubling * z, doubling * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z, 1)
        if ckpt_path is not None:
            load_checkpoint(self, ckpt_path)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents: z."""
        return self.post_quant_conv.in_channels

    def moments(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] -> (n, 2 z, h / f, w / f)."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor, decoder: nn.Module | None = None, **kwargs: Any) -> Tensor:
        """(n, z, h / f, w / f) -> (n, 3, h, w); see :meth:`AutoencodingEngine.decode`."""
        return super().decode(self.post_quant_conv(z), decoder, **kwargs)


class AutoencoderKLModeOnly(AutoencoderKL):
    """:class:`AutoencoderKL` whose latents are the mode of their distribution."""

    def __init__(self, **params: Any) -> None:
        super().__init__(**params, sample=False)
