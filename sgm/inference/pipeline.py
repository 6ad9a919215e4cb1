"""The one path from a picture to a video.

Command line, page, tests and benchmarks differ only in how the options are made and where the
video goes. Shapes: t frames, z latent channels, f downsampling factor, h height, w width.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sgm.config import construct
from sgm.device import default_device, memory_errors, parse_device
from sgm.inference.budget import HIGH, MemoryPlan, next_smaller
from sgm.inference.conditioning import embed, make_batch
from sgm.inference.dtypes import decoder_dtype, default_dtype
from sgm.inference.options import SamplingOptions
from sgm.inference.pictures import (
    Picture,
    Source,
    isolate_object,
    load_picture,
    native_size,
    prepare_picture,
)
from sgm.inference.placement import FAST_GUIDED, Placement, choose_plan, needs_of
from sgm.inference.progress import Callback, Progress, report
from sgm.inference.results import in_form
from sgm.inference.safety import SafetyFilter, find_filter
from sgm.inference.settings import ModelFiles, Settings, find_model, resolve
from sgm.inference.tiling import decode_tiled
from sgm.inference.weights import given_lora
from sgm.models.diffusion import DiffusionEngine
from sgm.modules.encoders.conditioner import Conditioning
from sgm.modules.encoders.video import VideoPredictionEmbedderWithEncoder

logger = logging.getLogger(__name__)

# Types with a larger range, or finer steps, than the one that a result was not finite in.
_WIDER = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}


class VideoPipeline:
    """A loaded model that turns pictures into videos.

    Args:
        engine: with weights.
        files: where it comes from.
        device: where to compute; None for the fastest there is.
        dtype: type of the U-Net; None for the best that the device is fast in.
        optimize: ``none``, ``exact`` or ``fast``, see :class:`SamplingOptions`.
        plan: how much of the model is on the device at once; less where memory runs out.
        callback: called while the weights go to the device; returning False ends that.
    """

    def __init__(
        self,
        engine: DiffusionEngine,
        files: ModelFiles,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        optimize: str = "exact",
        plan: MemoryPlan = HIGH,
        callback: Callback | None = None,
    ) -> None:
        self.engine, self.files, self.spec = engine, files, files.spec
        self.device = default_device() if device is None else torch.device(device)
        self.dtype, self.optimize = dtype or default_dtype(self.device), optimize

        def placed(done: int, total: int) -> None:
            report(callback, Progress("loading", done // 10**6, max(1, total // 10**6)))

        self.plan, self._first_plan = plan, plan
        self._placement: Placement | None = self._place(placed)
        self._judge: SafetyFilter | None = None

    @classmethod
    def from_spec(
        cls,
        name: str | None = None,
        *,
        config: str | Path | None = None,
        ckpt_path: str | Path | None = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        optimize: str | None = None,
        memory: str | None = None,
        lora: str | Path | Sequence[str | Path] | None = None,
    ) -> Self:
        """Load a named model.

        The YAML is looked for in the working directory, the checkout and the package, in that
        order; the weights are the given ones, else the YAML's ``ckpt_path``, else those under the
        model's name in ``checkpoints/``.

        Args:
            name: a row of :data:`sgm.inference.specs.SPECS`; None for the one that the given YAML
                is named after or the given weights belong to, or without such files the first
                whose weights are there.
            config: another YAML than the model's own.
            ckpt_path: other weights: a file of any known format, a folder, or a repository of the
                Hugging Face hub, ``owner/name``, whose files are fetched if they are not here yet.
            device: such as ``cuda:1``; None for the fastest there is.
            dtype: ``float32``, ``float16`` or ``bfloat16``; None for the best that is fast.
            optimize: ``none``, ``exact`` or ``fast``, see :class:`SamplingOptions`; None for
                ``exact``.
            memory: ``auto``, ``high``, ``low`` or ``min``, see there; None for ``auto``.
            lora: file of low-rank updates, ``FILE[:scale]``, to add to the weights; or several.

        Raises:
            ValueError: unknown name, missing or unfit file, device that is not there, other type.
            MemoryError: the device is too small; the message says what to try.
        """
        options = {"device": device, "dtype": dtype, "optimize": optimize, "memory": memory}
        asked = SamplingOptions.from_dict(options | {"lora": lora})
        return cls.load(find_model(name, config, ckpt_path, asked.lora), asked)

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        options: SamplingOptions | None = None,
        callback: Callback | None = None,
    ) -> Self:
        """Load a model whose files are found.

        Args:
            files: of the model.
            options: of which ``device``, ``dtype``, ``optimize`` and ``memory`` matter here, and
                length and size of the video for ``auto``.
            callback: as in the constructor.

        Raises:
            ValueError: as in :meth:`from_spec`.
            MemoryError: as there.
        """
        asked = options or SamplingOptions()
        target = parse_device(asked.device) if asked.device else default_device()
        number = getattr(torch, asked.dtype) if asked.dtype else None
        name = files.spec.name
        with memory_errors(
            f"{name} does not fit on {target}; try --dtype float16 or another --device"
        ):
            engine = files.load()
            number, optimize = number or default_dtype(target), asked.optimize or "exact"
            decided = asked.replace(device=str(target), dtype=number, optimize=optimize)
            native = files.spec.height, files.spec.width
            settings = resolve(decided, files.config, files.spec, native)
            plan = choose_plan(settings, partial(needs_of, engine, settings))
            return cls(engine, files, target, number, optimize, plan, callback)

    @property
    def placement(self) -> Placement:
        """The model on its device, as :attr:`plan` says."""
        if self._placement is None:
            self._placement = self._place()
        return self._placement

    def _place(self, placed: Callable[[int, int], None] | None = None) -> Placement:
        return Placement(self.engine, self.device, self.dtype, self.optimize, self.plan, placed)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents: z."""
        return int(self.engine.first_stage_model.decoder.conv_in.in_channels)

    @property
    def downsampling(self) -> int:
        """Pixels per latent along an edge: f."""
        return self.engine.first_stage_model.downsampling

    @property
    def size_multiple(self) -> int:
        """Height and width that the network takes are multiples of this; others are padded."""
        network: Any = self.engine.model.diffusion_model
        return self.downsampling * int(network.downsampling)

    def settings(self, picture: Picture, options: SamplingOptions | None = None) -> Settings:
        """What a run on this picture will really do.

        Raises:
            ValueError: options that contradict each other or the model.
        """
        options = options or SamplingOptions()
        if options.device and not self._is_on(options.device):
            raise ValueError(f"device is {self.device} in this pipeline, got {options.device}")
        if options.dtype and getattr(torch, options.dtype) != self.dtype:
            raise ValueError(f"dtype is {self.dtype} in this pipeline, got {options.dtype}")
        if options.optimize not in (None, self.optimize):
            raise ValueError(
                f"optimize is {self.optimize} in this pipeline, got {options.optimize}"
            )
        if options.memory not in (None, "auto", self._first_plan.name):
            raise ValueError(
                f"memory is {self._first_plan.name} in this pipeline, got {options.memory}"
            )
        if options.lora and tuple(map(given_lora, options.lora)) != self.files.loras:
            raise ValueError(f"this pipeline has other weights: load one with lora {options.lora}")
        decided = options.replace(device=str(self.device), dtype=self.dtype, optimize=self.optimize)
        return settings_for(self.files, picture, decided)

    def _is_on(self, device: str) -> bool:
        """Whether a name means this pipeline's device; without a number, any of its kind does."""
        kind, _, index = device.partition(":")
        return kind == self.device.type and (not index or int(index) == (self.device.index or 0))

    def __call__(
        self,
        image: Source | Picture,
        options: SamplingOptions | None = None,
        *,
        callback: Callback | None = None,
        noise: Tensor | None = None,
        latents: Tensor | None = None,
    ) -> Any:
        """Make a video, or several, from a picture.

        Args:
            image: a path, http(s) address, Pillow image, array or tensor (see ``load_picture``).
            options: what to do; see :class:`SamplingOptions`.
            callback: called after each step of each stage; returning False ends the run.
            noise: standard normal (t, z, h / f, w / f) to begin with, instead of the seed's.
            latents: scaled latents of that shape to decode, instead of sampling.

        Returns:
            By ``options.output``: a `sgm.inference.videos.Video` (frames), a float array
            (t, h, w, 3) or tensor (t, 3, h, w) in [0, 1], or the scaled latents; a list where
            ``videos_per_image`` is more than one. Video k is the one that ``seed + k`` gives alone.

        Raises:
            ValueError: a bad picture or option, or a result that is not finite.
            MemoryError: the device is too small; the message says what to try.
            SamplingStopped: the callback ended the run.
        """
        picture = image if isinstance(image, Picture) else load_picture(image)
        picture = isolate_object(picture) if self.spec.orbit else picture
        options = options or SamplingOptions()
        results = []
        for seed in video_seeds(options):
            run = (picture, options.replace(seed=seed), callback, noise, latents)
            results.append(self._in_memory(*run))
        return results[0] if len(results) == 1 else results

    def _in_memory(self, *run: Any) -> Any:
        """Make one video, by a smaller memory plan than the present one if it takes that.

        Raises:
            MemoryError: the device is too small, with what to try.
        """
        advice = "try --memory min, fewer or smaller frames, or a smaller --decoding_t"
        while True:
            try:
                with memory_errors(advice):
                    return self._one(*run)
            except MemoryError as error:
                smaller = next_smaller(self.plan)
                if smaller is None or self.optimize == "none":
                    raise
                logger.warning("%s; going on with the memory plan %r", error, smaller.name)
            self._step_down(smaller)

    def _step_down(self, plan: MemoryPlan) -> None:
        """Give the device's memory back; the next attempt places the model by this plan."""
        self.plan, self._placement = plan, None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _one(
        self,
        picture: Picture,
        options: SamplingOptions,
        callback: Callback | None,
        noise: Tensor | None,
        latents: Tensor | None,
    ) -> Any:
        settings = self.settings(picture, options)
        pixels = self._prepare(picture, settings)
        shape = self._latent_shape(pixels, settings)
        for name, given in (("noise", noise), ("latents", latents)):
            if given is not None and given.shape != shape:
                raise ValueError(f"{name} must have the shape {shape}, got {tuple(given.shape)}")
        judge = self._safety_filter(settings.options)
        with torch.inference_mode():
            if latents is None:
                latents = self._sample(pixels, settings, noise, callback)
            if options.output != "latents":
                frames = self._decode(latents, settings, callback)
                if self.spec.orbit:
                    frames[-1] = self._crop(pixels, settings)
        # Outside of inference mode, copies and results are tensors that autograd takes.
        latents = latents.clone()
        if options.output == "latents":
            return latents
        return in_form(frames, latents, settings.options, judge, callback)

    def _safety_filter(self, options: SamplingOptions) -> SafetyFilter | None:
        """The filter that the options name; it is kept for the next video.

        Raises:
            ValueError: it does not work.
        """
        if options.safety_filter is None:
            return None
        files = find_filter(options.safety_filter)
        if self._judge is None or self._judge.files.folder != files.folder:
            self._judge = SafetyFilter(files)
        return self._judge

    def _prepare(self, picture: Picture, settings: Settings) -> Tensor:
        """The picture at the size of the video, padded to what the network takes: (3, h, w)."""
        height, width = settings.size
        pixels = prepare_picture(picture, settings.size, self.spec.orbit, settings.options)
        unit = self.size_multiple
        pad_h, pad_w = -height % unit, -width % unit
        padding = (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2)
        mode = "reflect" if max(padding) < min(height, width) else "replicate"
        return F.pad(pixels[None], padding, mode=mode)[0]

    def _latent_shape(self, pixels: Tensor, settings: Settings) -> tuple[int, ...]:
        """(t, z, h / f, w / f) for a prepared picture."""
        sides = (side // self.downsampling for side in pixels.shape[1:])
        return (settings.frames, self.latent_channels, *sides)

    def _crop(self, frames: Tensor, settings: Settings) -> Tensor:
        """Undo the padding of :meth:`_prepare` on (..., h, w)."""
        height, width = settings.size
        top, left = (frames.shape[-2] - height) // 2, (frames.shape[-1] - width) // 2
        return frames[..., top : top + height, left : left + width]

    def _sample(
        self, pixels: Tensor, settings: Settings, noise: Tensor | None, callback: Callback | None
    ) -> Tensor:
        """Scaled latents (t, z, h / f, w / f) in float32."""
        frames = settings.frames
        generator = torch.Generator().manual_seed(settings.options.seed)
        aug_noise = torch.randn(pixels.shape, generator=generator)
        drawn = torch.randn(self._latent_shape(pixels, settings), generator=generator)
        x = (drawn if noise is None else noise.float()).to(self.device)

        def more_noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator).to(like)

        report(callback, Progress("encoding", 0, 1))
        batch = make_batch(pixels, settings, aug_noise, self.device)
        with self.placement.running("encoding"):
            c, uc = embed(self.engine.conditioner, batch, frames)
        own = self._picture_latents(c)
        report(callback, Progress("encoding", 1, 1, picture=pixels, picture_latents=own))
        sampler = construct(settings.sampler_config, "sampler_config")
        if self.optimize == "fast":
            sampler.guider.interval = FAST_GUIDED

        def denoise(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
            indicator = torch.zeros(len(x) // frames, frames, device=x.device)
            extra = {"num_video_frames": frames, "image_only_indicator": indicator}
            # All rows are at the same noise level, so one embedding serves them.
            return self.engine.denoiser(self.placement.network, x, sigma[:1], cond, **extra)

        def after_step(step: int, total: int, sigma: float, estimate: Tensor) -> None:
            report(callback, Progress("sampling", step, total, sigma, estimate))

        with self.placement.running("sampling"):
            latents = sampler(
                denoise,
                x,
                cond=c,
                uc=uc,
                num_steps=settings.options.num_steps,
                num_frames=frames,
                noise_fn=more_noise,
                callback=after_step,
            )
        if not torch.isfinite(latents).all():
            raise ValueError(_not_finite("latents", self.dtype))
        return latents

    def _picture_latents(self, conditioning: Conditioning) -> Tensor | None:
        """What the conditioning has of the picture's latents, scaled like the video's."""
        for embedder in self.engine.conditioner.embedders:
            if isinstance(embedder, VideoPredictionEmbedderWithEncoder):
                scale = self.engine.scale_factor / embedder.scale_factor
                return scale * conditioning["concat"][0]
        return None

    def _decode(self, latents: Tensor, settings: Settings, callback: Callback | None) -> Tensor:
        """Frames (t, 3, h, w) in [-1, 1], float32 on the CPU."""
        z, total = latents.to(self.device, torch.float32), len(latents)
        report(callback, Progress("decoding", 0, total))
        parts: list[Tensor] = []
        with self.placement.running("decoding"):
            for part in self._decoded_parts(z, settings):
                if not torch.isfinite(part).all():
                    dtype = decoder_dtype(self.device, self.dtype, self.optimize)
                    raise ValueError(_not_finite("decoded frames", dtype))
                parts.append(self._crop(part, settings).clamp(-1, 1).float().cpu())
                report(callback, Progress("decoding", sum(map(len, parts)), total))
        return torch.cat(parts)

    def _decoded_parts(self, z: Tensor, settings: Settings) -> Iterator[Tensor]:
        """The frames, as many at once as the memory plan and ``decoding_t`` say."""
        tiling, decoder = self.placement.plan.decode_chunk, self.placement.decoder
        if tiling is None or len(z) <= (tiling.frames or len(z)):
            yield from self.engine.decode_chunks(z, settings.options.decoding_t, decoder)
            return

        def decode(part: Tensor) -> Tensor:
            return next(self.engine.decode_chunks(part, None, decoder))

        yield decode_tiled(decode, z, self.downsampling, tiling)


def settings_for(files: ModelFiles, picture: Picture, options: SamplingOptions) -> Settings:
    """What a run of a model on a picture will do; the model need not be loaded.

    Raises:
        ValueError: options that contradict each other or the model.
    """
    native = native_size(picture.size, files.spec.height, files.spec.width)
    return resolve(options, files.config, files.spec, native)


def video_seeds(options: SamplingOptions) -> list[int]:
    """The seed of each video of a picture: consecutive numbers, so each can be made alone."""
    return [(options.seed + k) % 2**63 for k in range(options.videos_per_image)]


def _not_finite(what: str, dtype: torch.dtype) -> str:
    """A message with the advice that helps in this type."""
    wider = f"try --dtype {_WIDER[dtype]}, or " if dtype in _WIDER else ""
    return (
        f"the {what} are not finite in {dtype}: {wider}lower --max_guidance "
        "(given noise, latents or weights that are not finite give this too)"
    )
