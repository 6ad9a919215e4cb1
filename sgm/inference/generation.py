"""One video of one picture: encode, sample, decode.

Shapes: t frames, z latent channels, f downsampling factor, h height, w width.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sgm.config import construct
from sgm.inference.conditioning import embed, make_batch
from sgm.inference.pictures import Picture, prepare_picture
from sgm.inference.placement import Placement
from sgm.inference.progress import Callback, Progress, report
from sgm.inference.settings import Settings
from sgm.inference.tiling import decode_tiled
from sgm.modules.diffusionmodules.video_model import VideoUNet
from sgm.modules.encoders.conditioner import Conditioning
from sgm.modules.encoders.video import VideoPredictionEmbedderWithEncoder

# Types with a larger range, or finer steps, than the one that a result was not finite in.
_WIDER = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}


class Generation:
    """A model on its device, a picture, and what to make of it.

    Args:
        placement: the model.
        picture: to begin with.
        settings: what to do.
        orbit: the camera goes around a cut-out object, and ends where the picture was taken.
        callback: called after each step of each stage; returning False ends the run.

    Attributes:
        shape: of the latents, (t, z, h / f, w / f); h and w padded to what the network takes.
    """

    def __init__(
        self,
        placement: Placement,
        picture: Picture,
        settings: Settings,
        orbit: bool = False,
        callback: Callback | None = None,
    ) -> None:
        self._placement, self._engine = placement, placement.engine
        self._settings, self._orbit, self._callback = settings, orbit, callback
        first_stage, network = self._engine.first_stage_model, self._engine.model.diffusion_model
        f, halvings = first_stage.downsampling, cast(VideoUNet, network).downsampling
        prepared = prepare_picture(picture, settings.size, orbit, settings.options)
        self._pixels = padded(prepared, f * halvings)
        sides = (side // f for side in self._pixels.shape[1:])
        self.shape = (settings.frames, first_stage.latent_channels, *sides)

    def encode(self, noise: Tensor) -> tuple[Conditioning, Conditioning]:
        """The conditioning, and that without the picture.

        Args:
            noise: standard normal numbers of the picture's shape, of which ``cond_aug`` takes some.
        """
        report(self._callback, Progress("encoding", 0, 1))
        batch = make_batch(self._pixels, self._settings, noise, self._placement.device)
        with self._placement.running("encoding"):
            c, uc = embed(self._engine.conditioner, batch, self._settings.frames)
        own = self._picture_latents(c)
        report(
            self._callback,
            Progress("encoding", 1, 1, picture=self._pixels, picture_latents=own),
        )
        return c, uc

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Scaled latents (t, z, h / f, w / f) in float32.

        Args:
            noise: standard normal numbers of that shape to begin with, instead of the seed's.

        Raises:
            ValueError: they are not finite.
            SamplingStopped: the callback ended the run.
        """
        options, frames = self._settings.options, self._settings.frames
        generator = torch.Generator().manual_seed(options.seed)
        aug_noise = torch.randn(self._pixels.shape, generator=generator)
        drawn = torch.randn(self.shape, generator=generator)
        x = (drawn if noise is None else noise.float()).to(self._placement.device)

        def more_noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator).to(like)

        c, uc = self.encode(aug_noise)
        sampler = construct(self._settings.sampler_config, "sampler_config")
        if self._placement.level.guided:
            sampler.guider.interval = self._placement.level.guided

        def denoise(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
            indicator = torch.zeros(len(x) // frames, frames, device=x.device)
            extra = {"num_video_frames": frames, "image_only_indicator": indicator}
            # All rows are at the same noise level, so one embedding serves them.
            return self._engine.denoiser(self._placement.network, x, sigma[:1], cond, **extra)

        def after_step(step: int, total: int, sigma: float, estimate: Tensor) -> None:
            report(self._callback, Progress("sampling", step, total, sigma, estimate))

        with self._placement.running("sampling"):
            latents: Tensor = sampler(
                denoise,
                x,
                cond=c,
                uc=uc,
                num_steps=options.num_steps,
                num_frames=frames,
                noise_fn=more_noise,
                callback=after_step,
            )
        _require_finite(latents, "latents", self._placement.dtype)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Frames (t, 3, h, w) in [-1, 1], float32 on the CPU, of the size that was asked for.

        Args:
            latents: as :meth:`sample` gives them.

        Raises:
            ValueError: the frames are not finite.
            SamplingStopped: the callback ended the run.
        """
        z, total = latents.to(self._placement.device, torch.float32), len(latents)
        report(self._callback, Progress("decoding", 0, total))
        parts: list[Tensor] = []
        with self._placement.running("decoding"):
            for part in self._decoded_parts(z):
                _require_finite(part, "decoded frames", self._placement.decoder_dtype)
                parts.append(self._crop(part).clamp(-1, 1).float().cpu())
                report(self._callback, Progress("decoding", sum(map(len, parts)), total))
        frames = torch.cat(parts)
        if self._orbit:
            frames[-1] = self._crop(self._pixels)
        return frames

    def _picture_latents(self, conditioning: Conditioning) -> Tensor | None:
        """What the conditioning has of the picture's latents, scaled like the video's."""
        for embedder in self._engine.conditioner.embedders:
            if isinstance(embedder, VideoPredictionEmbedderWithEncoder):
                scale = self._engine.scale_factor / embedder.scale_factor
                return scale * conditioning["concat"][0]
        return None

    def _decoded_parts(self, z: Tensor) -> Iterator[Tensor]:
        """The frames, as many at once as the memory plan and ``decoding_t`` say."""
        tiling, decoder = self._placement.plan.decode_chunk, self._placement.decoder
        if tiling is None or len(z) <= (tiling.frames or len(z)):
            yield from self._engine.decode_chunks(z, self._settings.options.decoding_t, decoder)
            return

        def decode(part: Tensor) -> Tensor:
            return next(self._engine.decode_chunks(part, None, decoder))

        yield decode_tiled(decode, z, self._engine.first_stage_model.downsampling, tiling)

    def _crop(self, frames: Tensor) -> Tensor:
        return cropped(frames, self._settings.size)


def padded(pixels: Tensor, multiple: int) -> Tensor:
    """(..., h, w) with borders so that height and width are multiples; the picture in the middle.

    The border mirrors the picture, or where that is too narrow repeats its edge.
    """
    height, width = pixels.shape[-2:]
    pad_h, pad_w = -height % multiple, -width % multiple
    padding = (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2)
    mode = "reflect" if max(padding) < min(height, width) else "replicate"
    return F.pad(pixels[None], padding, mode=mode)[0]


def cropped(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of (..., h, w): what :func:`padded` was given."""
    height, width = size
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def _require_finite(result: Tensor, what: str, dtype: torch.dtype) -> None:
    """Refuse infinite numbers, with the advice that helps in this type."""
    if torch.isfinite(result).all():
        return
    wider = f"try --dtype {_WIDER[dtype]}, or " if dtype in _WIDER else ""
    raise ValueError(
        f"the {what} are not finite in {dtype}: {wider}lower --max_guidance "
        "(given noise, latents or weights that are not finite give this too)"
    )
