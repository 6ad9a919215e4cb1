"""The diffusion engine: everything a checkpoint holds, composed from a YAML.

Shapes: b clips, t frames, n = b t rows, z latent channels, f the downsampling factor.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sgm.checkpoint import load_checkpoint
from sgm.config import construct
from sgm.models.autoencoder import AutoencodingEngine
from sgm.models.widths import check_widths
from sgm.modules.autoencoding.temporal_ae import VideoDecoder
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.util import default, instantiate_from_config, refuse_unknown

Config = Mapping[str, Any]

# Settings of the original trainer in published YAML files; training has its own section here.
IGNORED = frozenset(
    (
        "ema_decay_rate",
        "input_key",
        "log_keys",
        "network_wrapper",
        "no_cond_log",
        "optimizer_config",
        "scheduler_config",
        "use_ema",
    )
)


class DiffusionEngine(nn.Module):
    """U-Net, denoiser, conditioner, first stage, and optionally a sampler and a loss.

    Args:
        network_config: the U-Net.
        denoiser_config: the preconditioning around it.
        first_stage_config: the autoencoder.
        conditioner_config: the embedders.
        sampler_config: the sampler, where the YAML names one.
        loss_fn_config: the training loss, where the YAML names one.
        ckpt_path: weights to load.
        scale_factor: video latents are the first stage's times this number.
        disable_first_stage_autocast: run the first stage in its own type, whatever autocast says.
        en_and_decode_n_samples_a_time: frames that the first stage takes at once; all where None.
            A video decoder sees that many frames, so the number changes its result.
        compile_model: run the U-Net through ``torch.compile``.
        ignored: settings of the original trainer that published YAML files name.

    Raises:
        ValueError: an unknown parameter, one that a part refuses, or parts that do not fit.
    """

    def __init__(
        self,
        network_config: Config,
        denoiser_config: Config,
        first_stage_config: Config,
        conditioner_config: Config,
        sampler_config: Config | None = None,
        loss_fn_config: Config | None = None,
        ckpt_path: str | None = None,
        scale_factor: float = 1.0,
        disable_first_stage_autocast: bool = False,
        en_and_decode_n_samples_a_time: int | None = None,
        compile_model: bool = False,
        **ignored: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(self, ignored, IGNORED)
        network = instantiate_from_config(network_config)
        self.model = OpenAIWrapper(network, compile_model)
        self.denoiser = instantiate_from_config(denoiser_config)
        self.sampler = instantiate_from_config(sampler_config) if sampler_config else None
        self.conditioner = instantiate_from_config(conditioner_config)
        self.first_stage_model: AutoencodingEngine = instantiate_from_config(first_stage_config)
        self.first_stage_model.requires_grad_(False).eval()
        check_widths(network, self.conditioner, self.first_stage_model)
        self.loss_fn = instantiate_from_config(loss_fn_config) if loss_fn_config else None
        self.scale_factor = scale_factor
        self.disable_first_stage_autocast = disable_first_stage_autocast
        self.en_and_decode_n_samples_a_time = en_and_decode_n_samples_a_time
        if ckpt_path is not None:
            load_checkpoint(self, ckpt_path)

    @staticmethod
    def without_weights(config: Config) -> "DiffusionEngine":
        """The engine of a YAML's ``model`` section on the meta device; no file is opened.

        Raises:
            ValueError: the section describes something else.
        """
        params = (config.get("params") or {}) | {"ckpt_path": None}
        with torch.device("meta"):
            engine = construct({**config, "params": params}, "model")
        if not isinstance(engine, DiffusionEngine):
            raise ValueError(f"expected a DiffusionEngine in the YAML, got {config['target']}")
        return engine

    def train(self, mode: bool = True) -> "DiffusionEngine":
        """Switch the mode; the first stage stays in evaluation mode."""
        super().train(mode)
        self.first_stage_model.eval()
        return self

    def _first_stage_autocast(self, x: Tensor) -> torch.autocast:
        device = x.device.type
        enabled = not self.disable_first_stage_autocast and torch.is_autocast_enabled(device)
        return torch.autocast(device, enabled=enabled)

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Frames (n, 3, h, w) in [-1, 1] -> scaled latents (n, z, h / f, w / f).

        Args:
            x: the frames.
            generator: source of the draw where the first stage samples its latents.

        Raises:
            ValueError: the first stage decodes alone, as SV3D's does.
        """
        parameter = next(self.first_stage_model.encoder.parameters(), None)
        if parameter is None:
            raise ValueError("the first stage of this model has no encoder")
        chunks = x.to(parameter.dtype).split(default(self.en_and_decode_n_samples_a_time, len(x)))
        with self._first_stage_autocast(x):
            parts = [self.first_stage_model.encode(part, generator=generator) for part in chunks]
        return self.scale_factor * torch.cat(parts).to(x.dtype)

    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Scaled latents (n, z, h / f, w / f) of one clip -> frames (n, 3, h, w), about [-1, 1]."""
        return torch.cat(list(self.decode_chunks(z, self.en_and_decode_n_samples_a_time)))

    def decode_chunks(
        self, z: Tensor, chunk: int | None = None, decoder: nn.Module | None = None
    ) -> Iterator[Tensor]:
        """As :meth:`decode_first_stage`, ``chunk`` frames after the other (None: all at once).

        ``decoder`` is another form of the first stage's decoder to use instead.
        """
        plain = self.first_stage_model.decoder
        chosen: Any = default(decoder, plain)
        dtype: torch.dtype = chosen.norm_out.weight.dtype
        wide = torch.promote_types(z.dtype, dtype)  # a half type would round the division as well
        for part in (z.to(wide) / self.scale_factor).to(dtype).split(default(chunk, len(z))):
            kwargs = {"timesteps": len(part)} if isinstance(plain, VideoDecoder) else {}
            with torch.no_grad(), self._first_stage_autocast(z):
                frames = self.first_stage_model.decode(part, decoder, **kwargs)
            yield frames.to(z.dtype)
