"""The one path from a picture to a video.

Command line, page, tests and benchmarks differ only in how the options are made and where the
video goes. Here is the model, and the memory that it may take; one video is made in
:mod:`sgm.inference.generation`.

Shapes: t frames, z latent channels, f downsampling factor, h height, w width.
"""

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from sgm.device import default_device, full_float32, memory_errors, parse_device
from sgm.inference.budget import HIGH, MemoryPlan, next_smaller
from sgm.inference.dtypes import default_dtype
from sgm.inference.generation import Generation
from sgm.inference.levels import DEFAULT_LEVEL, LEVELS
from sgm.inference.options import SamplingOptions
from sgm.inference.pictures import (
    Picture,
    Source,
    isolate_object,
    load_picture,
    native_size,
)
from sgm.inference.placement import Placement, choose_plan, needs_of, require_device
from sgm.inference.progress import Callback, Progress, report
from sgm.inference.results import in_form
from sgm.inference.safety import SafetyFilter, find_filter
from sgm.inference.settings import ModelFiles, Settings, find_model, resolve
from sgm.inference.weights import given_lora
from sgm.models.diffusion import DiffusionEngine

logger = logging.getLogger(__name__)


class VideoPipeline:
    """A loaded model that turns pictures into videos.

    Args:
        engine: with weights.
        files: where it comes from.
        device: where to compute; None for the fastest there is.
        dtype: type of the U-Net; None for the best that the device is fast in.
        optimize: a level of :data:`sgm.inference.levels.LEVELS`.
        plan: how much of the model is on the device at once; less where memory runs out.
        callback: called while the weights go to the device; returning False ends that.
    """

    def __init__(
        self,
        engine: DiffusionEngine,
        files: ModelFiles,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        optimize: str = DEFAULT_LEVEL,
        plan: MemoryPlan = HIGH,
        callback: Callback | None = None,
    ) -> None:
        self.engine, self.files, self.spec = engine, files, files.spec
        self.device = default_device() if device is None else torch.device(device)
        self.dtype, self.optimize = dtype or default_dtype(self.device), optimize

        def placed(done: int, total: int) -> None:
            report(callback, Progress("loading", done // 10**6, max(1, total // 10**6)))

        self._level = LEVELS[optimize]
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
            optimize: a level of :data:`sgm.inference.levels.LEVELS`; None for ``exact``.
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
        number, optimize = number or default_dtype(target), asked.optimize or DEFAULT_LEVEL
        require_device(target, number, LEVELS[optimize])
        with memory_errors(
            f"{name} does not fit on {target}; try --dtype float16 or another --device"
        ):
            engine = files.load()
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
        return self.engine.first_stage_model.latent_channels

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
        first = "--memory min" if self._level.moves else f"--optimize {DEFAULT_LEVEL}"
        advice = f"try {first}, fewer or smaller frames, or a smaller --decoding_t"
        while True:
            try:
                with memory_errors(advice):
                    return self._one(*run)
            except MemoryError as error:
                smaller = next_smaller(self.plan)
                if smaller is None or not self._level.moves:
                    raise
                # In words: a log that keeps the error would keep the model that it came through.
                logger.warning("%s; going on with the memory plan %r", str(error), smaller.name)
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
        generation = Generation(self.placement, picture, settings, self.spec.orbit, callback)
        for name, given in (("noise", noise), ("latents", latents)):
            if given is not None and given.shape != generation.shape:
                raise ValueError(
                    f"{name} must have the shape {generation.shape}, got {tuple(given.shape)}"
                )
        judge = self._safety_filter(settings.options)
        full = self.dtype == torch.float32 and self.device.type == "cuda"
        exactly = full_float32() if full else nullcontext()
        with torch.inference_mode(), exactly:
            if latents is None:
                latents = generation.sample(noise)
            if options.output != "latents":
                frames = generation.decode(latents)
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
