"""The training loss of diffusion: denoise data whose noise level is drawn once per clip.

Legend: ``b`` clips, ``t`` frames of a clip (1 for images), rows ordered ``(b t)``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from sgm.modules.diffusionmodules.loss_weighting import DiffusionLossWeighting
from sgm.modules.diffusionmodules.sigma_sampling import SigmaSampler
from sgm.modules.draws import draw
from sgm.util import append_dims, instantiate_from_config

ERRORS: dict[str, Callable[[Tensor], Tensor]] = {"l2": torch.square, "l1": torch.abs}


class ClipLoss(NamedTuple):
    """The loss of each clip and the noise level it was measured at, both ``(b,)``, float32."""

    loss: Tensor
    sigma: Tensor


class StandardDiffusionLoss(nn.Module):
    """Weighted denoising error (Karras et al. 2022, equation 8).

    Args:
        sigma_sampler_config: config of a class of ``sigma_sampling``.
        loss_weighting_config: config of a class of ``loss_weighting``.
        loss_type: ``l2`` or ``l1``.
        offset_noise_level: standard deviation of noise that is constant over a clip's frames and
            pixels, one number a channel, added to the unit noise before scaling.
        batch2model_keys: entries of the batch that the network receives by name.
    """

    def __init__(
        self,
        sigma_sampler_config: Mapping[str, Any],
        loss_weighting_config: Mapping[str, Any],
        loss_type: str = "l2",
        offset_noise_level: float = 0.0,
        batch2model_keys: str | Sequence[str] | None = None,
    ) -> None:
        if loss_type not in ERRORS:
            raise ValueError(f"expected loss_type to be one of {sorted(ERRORS)}, got {loss_type!r}")
        super().__init__()
        self.sigma_sampler: SigmaSampler = instantiate_from_config(sigma_sampler_config)
        self.loss_weighting: DiffusionLossWeighting = instantiate_from_config(loss_weighting_config)
        self.loss_type = loss_type
        self.offset_noise_level = offset_noise_level
        keys = batch2model_keys or ()
        self.batch2model_keys = [keys] if isinstance(keys, str) else list(keys)

    def forward(
        self,
        network: Callable[..., Tensor],
        denoiser: Callable[..., Tensor],
        conditioner: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        input: Tensor,
        batch: Mapping[str, Any],
        generator: Generator | None = None,
    ) -> Tensor:
        """Return the loss of each clip, ``(b,)``.

        Args:
            network: the network that ``denoiser`` wraps.
            denoiser: a ``Denoiser``.
            conditioner: makes the conditioning from the batch.
            input: clean latents, ``(b t, c, h, w)``.
            batch: the batch; ``num_video_frames`` in it is ``t``, without it rows are images.
            generator: draws noise levels and noise; by default torch's own, on the CPU.
        """
        extra = {key: batch[key] for key in self.batch2model_keys if key in batch}
        frames = int(batch.get("num_video_frames", 1))
        cond = conditioner(batch)
        return self.loss_given_cond(network, denoiser, cond, input, frames, extra, generator).loss

    def loss_given_cond(
        self,
        network: Callable[..., Tensor],
        denoiser: Callable[..., Tensor],
        cond: Mapping[str, Any],
        input: Tensor,
        num_video_frames: int = 1,
        extra: Mapping[str, Any] | None = None,
        generator: Generator | None = None,
    ) -> ClipLoss:
        """Return the loss of each clip and its noise level.

        Args:
            network: the network that ``denoiser`` wraps.
            denoiser: a ``Denoiser``.
            cond: conditioning; its tensors have one row for each clip or one for each frame.
            input: clean latents, ``(b t, c, h, w)``.
            num_video_frames: frames of a clip, ``t``.
            extra: further keyword arguments of the network.
            generator: draws noise levels and noise; by default torch's own, on the CPU.

        Raises:
            ValueError: the rows of ``input`` or of ``cond`` do not fit the number of frames.
        """
        rows = input.shape[0]
        if num_video_frames < 1 or rows % num_video_frames:
            raise ValueError(
                f"expected rows of whole clips of {num_video_frames} frames, got {rows} rows"
            )
        clips = rows // num_video_frames
        sigma = self.sigma_sampler(clips, generator=generator).to(input.device)
        noise = self._noise(input, clips, generator)
        level = sigma.repeat_interleave(num_video_frames)
        noised = (input + noise * append_dims(level, input.ndim)).to(input.dtype)
        frame_cond = {k: _per_frame(k, v, clips, num_video_frames) for k, v in cond.items()}
        denoised = denoiser(network, noised, level, frame_cond, **(extra or {}))
        error = ERRORS[self.loss_type](denoised.float() - input.float())
        return ClipLoss(self.loss_weighting(sigma) * error.reshape(clips, -1).mean(1), sigma)

    def _noise(self, like: Tensor, clips: int, generator: Generator | None) -> Tensor:
        """Draw float32 noise shaped like ``like``, on its device."""
        noise = draw(torch.randn, like.shape, generator)
        if self.offset_noise_level > 0:
            offset = draw(torch.randn, (clips, like.shape[1]), generator)
            offset = offset.repeat_interleave(like.shape[0] // clips, 0)
            noise += self.offset_noise_level * append_dims(offset, like.ndim)
        return noise.to(like.device)


def _per_frame(key: str, value: Any, clips: int, frames: int) -> Any:
    """Repeat the rows of clips over their frames; leave rows of frames, and what has no rows."""
    if not isinstance(value, Tensor) or value.shape[0] == clips * frames:
        return value
    if value.shape[0] == clips:
        return value.repeat_interleave(frames, 0)
    raise ValueError(
        f"expected conditioning {key!r} to have {clips} rows (clips) or {clips * frames} rows "
        f"(frames), got {value.shape[0]}"
    )
