"""One model, many visitors: what a page needs beside its widgets.

A run here is a run of the command line: the same plan, the same path to a video, the same files.
"""

import gc
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from threading import Lock

import torch

from sgm.config import check_types
from sgm.inference.batch import Job, decide_machine, make_videos, plan_job
from sgm.inference.budget import USABLE
from sgm.inference.flags import Request
from sgm.inference.options import SamplingOptions
from sgm.inference.pictures import Picture
from sgm.inference.pipeline import VideoPipeline, settings_for
from sgm.inference.progress import Progress
from sgm.inference.settings import ModelFiles, Settings, find_model, resolve
from sgm.inference.specs import find_config, get_spec
from sgm.inference.videos import check_video_size
from sgm.serving.costs import Cost, Costs
from sgm.serving.gallery import Gallery, Run
from sgm.serving.limits import Limits
from sgm.serving.models import Offer, list_offers
from sgm.serving.queue import Queue, Ticket
from sgm.serving.reporting import Reporter
from sgm.serving.uploads import open_upload

logger = logging.getLogger(__name__)

MEASUREMENTS = "measurements.jsonl"


@dataclass(frozen=True)
class Order:
    """What a visitor asks for.

    Attributes:
        version: name of the model.
        pictures: files as they were uploaded.
        options: nothing in them names a file.
    """

    version: str
    pictures: tuple[bytes, ...]
    options: SamplingOptions


@dataclass(frozen=True)
class _Loaded:
    """The model in memory.

    Attributes:
        key: of the files and options that decide it.
        pipeline: ready to run.
        held: bytes of the host's memory that its weights take, where it computes there.
    """

    key: str
    pipeline: VideoPipeline
    held: int


class Studio:
    """Serves visitors one after the other with one model in memory.

    Every method may be called from any thread. Models are loaded and run in the queue's alone.

    Args:
        limits: the operator's.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._gallery = Gallery(
            limits.output_folder, limits.keep_runs, limits.keep_days, limits.share_outputs
        )
        self._costs = Costs(limits.output_folder / MEASUREMENTS)
        self._queue = Queue(limits.max_queue, limits.max_waiting, limits.abandoned_seconds)
        self._busy = Lock()  # held while the model is loaded, used or taken out of memory
        self._opening = Lock()  # a picture may take a gigabyte while it is decoded
        self._model: _Loaded | None = None
        self._files: dict[str, tuple[object, ModelFiles]] = {}
        _tidy()

    @property
    def loaded(self) -> str | None:
        """Name of the model in memory."""
        model = self._model
        return model.pipeline.spec.name if model else None

    def unload(self) -> None:
        """Take the model out of memory; the next run loads it again.

        Raises:
            ValueError: a video is being made with it.
        """
        if not self._busy.acquire(blocking=False):
            raise ValueError("a video is being made: unload the model when that is done")
        try:
            self._release()
        finally:
            self._busy.release()

    def offers(self) -> list[Offer]:
        """The models that are offered, those whose weights are here first."""
        return list_offers(self.limits.models)

    def open_picture(self, data: bytes) -> Picture:
        """An uploaded picture, held against the limits before its pixels are decoded.

        Raises:
            ValueError: too large, or no picture, in one line.
        """
        with self._opening:
            limits = self.limits
            return open_upload(data, limits.max_upload_mb, limits.max_upload_megapixels)

    def settings(self, version: str, picture: Picture | None, options: SamplingOptions) -> Settings:
        """What a run will really do; its model need not be loaded.

        Args:
            version: name of the model.
            picture: whose orientation decides the size where the options do not; None for the
                model's own.
            options: a visitor's.

        Raises:
            ValueError: options that contradict each other, the model or the operator's limits, or
                a model that is not offered or not here.
        """
        files = self._find(version)
        options = self.limits.enforce(options)
        options = options.replace(**decide_machine(options))
        if picture is not None:
            settings = settings_for(files, picture, options)
        else:
            size = files.spec.height, files.spec.width
            settings = resolve(options, files.config, files.spec, size)
        self.limits.check(settings)
        return settings

    def cost(self, settings: Settings, version: str) -> Cost:
        """What each video of a run will take.

        Raises:
            ValueError: a model that is not offered or not here.
            MemoryError: the device has no room to measure its speed.
        """
        return self._costs.estimate(self._find(version), settings, self._held(settings))

    def submit(self, visitor: str, order: Order) -> Ticket:
        """Put an order into the queue; its ticket's result is a list of `Run`.

        Args:
            visitor: 32 hexadecimal digits, drawn at random for each visitor.
            order: what to make.

        Raises:
            ValueError: a refused picture or option, or a full queue; in one line.
        """
        self._gallery.visitor_folder(visitor)
        count, limit = len(order.pictures), self.limits.max_pictures
        if not 1 <= count <= limit:
            raise ValueError(f"give from 1 to {limit} pictures, got {count}")
        for number, data in enumerate(order.pictures, 1):
            try:
                picture = self.open_picture(data)
            except ValueError as error:
                which = f"picture {number} of {count}: " if count > 1 else ""
                raise ValueError(f"{which}{error}") from error
            settings = self.settings(order.version, picture, order.options)
            check_video_size("mp4", *settings.size)
        return self._queue.submit(visitor, partial(self._serve, order))

    def runs(self, visitor: str) -> list[Run]:
        """The videos that a visitor may see, newest first."""
        return self._gallery.runs(visitor)

    def close(self) -> None:
        """Call all orders off, end the queue and take the model out of memory."""
        self._queue.close()
        self.unload()

    def _find(self, version: str) -> ModelFiles:
        """The files of an offered model, looked at again where they have changed.

        Raises:
            ValueError: it is not offered, or not here.
        """
        if self.limits.models is not None and version not in self.limits.models:
            raise ValueError(
                f"the model must be one of {', '.join(self.limits.models)} here, got {version!r}"
            )
        spec = get_spec(version)
        state = _stamp([find_config(version), *([spec.checkpoint] if spec.checkpoint else [])])
        known = self._files.get(version)
        if known is None or known[0] != state:
            known = self._files[version] = state, find_model(version)
        return known[1]

    def _serve(self, order: Order, ticket: Ticket) -> list[Run]:
        """Make the videos of an order; called in the queue's thread.

        Raises:
            MemoryError: with the settings that would fit.
        """
        with self._busy:
            try:
                pictures = [self._gallery.store(ticket.visitor, data) for data in order.pictures]
                job = plan_job(self._request(order, pictures, ticket.visitor))
                self._refuse_too_large(job)
                try:
                    return self._make(job, ticket)
                except MemoryError:
                    logger.debug("out of memory", exc_info=True)
                # After the clause, as the error holds on to the tensors of the run.
                self._release()
                raise MemoryError(self._costs.advice(job.files, job.settings))
            finally:
                self._gallery.prune(ticket.visitor)

    def _request(self, order: Order, pictures: Sequence[Path], visitor: str) -> Request:
        return Request(
            options=self.limits.enforce(order.options).to_dict(),
            input_path=tuple(map(str, pictures)),
            version=order.version,
            output_folder=str(self._gallery.visitor_folder(visitor)),
        )

    def _refuse_too_large(self, job: Job) -> None:
        """Refuse what the host lacks memory for: the system ends programs that run out.

        Raises:
            MemoryError: with the settings that would fit.
        """
        if _has_own_memory(job.settings):
            return
        held = self._held(job.settings)
        cost = self._costs.estimate(job.files, job.settings, held)
        if cost.bytes > USABLE * cost.free_bytes:
            raise MemoryError(self._costs.advice(job.files, job.settings, held))

    def _make(self, job: Job, ticket: Ticket) -> list[Run]:
        """Make the videos one by one, until one fails.

        Raises:
            MemoryError: the device is too small.
        """
        cost = self._costs.estimate(job.files, job.settings, self._held(job.settings))
        videos = len(job.inputs) * job.settings.options.videos_per_image
        unfiltered = job.settings.options.safety_filter is None
        reporter = Reporter(ticket, videos, cost.stages, shown=unfiltered)
        made = []
        with closing(make_videos(job, partial(self._load, reporter), reporter)) as outcomes:
            for outcome in outcomes:
                if outcome.error:
                    raise outcome.error
                reporter.end_video()
                if outcome.path and outcome.video:
                    made.append(self._gallery.add(outcome.path, outcome.video.frames))
                    self._note(job.files, made[-1], reporter.seconds)
        return made

    def _load(self, reporter: Reporter, job: Job) -> VideoPipeline:
        """The pipeline in memory if it is the right one, else a new one in its place."""
        options, weights = job.settings.options, job.files.weight_files()
        how = options.device, options.dtype, options.optimize, options.memory
        key = str((_stamp(weights), job.files.config, how))
        if self._model is None or self._model.key != key:
            self._release()
            check_types(job.files.config, f"{job.files.config_path.name}: model")
            size = sum(path.stat().st_size for path in weights)
            reporter(Progress("loading", 0, ceil(size / 1e6)))
            pipeline = VideoPipeline.load(job.files, options, reporter)
            held = self._costs.weight_bytes(job.files, job.settings)
            self._model = _Loaded(key, pipeline, held)
            _tidy()
        if _has_own_memory(job.settings):
            torch.cuda.reset_peak_memory_stats(self._model.pipeline.device)
        return self._model.pipeline

    def _note(self, files: ModelFiles, run: Run, seconds: Mapping[str, float]) -> None:
        """Note how long a video took, for estimates."""
        if self._model is None:
            return
        options = SamplingOptions.from_dict(run.record["options"])
        settings = Settings(options, run.record["sampler_config"])
        device, plan = self._model.pipeline.device, self._model.pipeline.placement.plan
        peak = torch.cuda.max_memory_allocated(device) if _has_own_memory(settings) else None
        self._costs.note(files, settings, plan, seconds, peak)

    def _held(self, settings: Settings) -> int:
        """Bytes of a device that a new run need not find free: the model's in memory."""
        model, device = self._model, torch.device(str(settings.options.device))
        if model is None or model.pipeline.device.type != device.type:
            return 0
        return torch.cuda.memory_allocated(device) if _has_own_memory(settings) else model.held

    def _release(self) -> None:
        self._model = None
        _tidy()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _tidy() -> None:
    """Collect all garbage; then spare the collector what stays, such as PyTorch's objects.

    Streamlit collects garbage after each look at a run, twice a second for each visitor. Going
    through all objects stops every thread for a seventh of a second, the run's own among them.
    """
    gc.unfreeze()  # else the cycles of what was spared before, such as a model's, would stay
    gc.collect()
    gc.freeze()


def _has_own_memory(settings: Settings) -> bool:
    """Whether the device's memory is not the host's, and a lack of it does no harm."""
    return str(settings.options.device).startswith("cuda")


def _stamp(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """What tells whether files are still the same."""
    stats = [(path, path.stat()) for path in paths]
    return [(str(path), stat.st_mtime_ns, stat.st_size) for path, stat in stats]
