"""Many pictures, one model: numbered files, each with its record beside it.

What can be refused is refused by :func:`plan_job`, before anything large is loaded; one bad picture
does not end the run.
"""

import json
import logging
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, Any

from sgm.errors import let_go
from sgm.inference import record
from sgm.inference.files import expand_inputs, place_numbered, user_path
from sgm.inference.flags import OUTPUT_FOLDER, SAMPLE_PICTURE, Request, to_options
from sgm.inference.levels import DEFAULT_LEVEL
from sgm.inference.options import SamplingOptions
from sgm.inference.settings import ModelFiles, Settings, find_model, resolve
from sgm.inference.specs import find_file

if TYPE_CHECKING:
    from sgm.inference.pictures import Picture
    from sgm.inference.pipeline import VideoPipeline
    from sgm.inference.progress import Callback
    from sgm.inference.videos import Video

logger = logging.getLogger(__name__)

Sha256 = Callable[[], str]


@dataclass(frozen=True)
class Job:
    """Work that can begin.

    Attributes:
        files: the model.
        settings: of a picture in the model's own orientation; device and type are decided.
        inputs: the pictures.
        folder: where the videos go.
        format: mp4, gif, webp or png.
        request: what it was made from, options included.
    """

    files: ModelFiles
    settings: Settings
    inputs: list[Path | str]
    folder: Path
    format: str
    request: Request


@dataclass(frozen=True)
class Outcome:
    """What became of one video, or of all videos of a bad picture.

    Attributes:
        source: the picture.
        path: the video; None where it failed.
        seconds: that it took; None where it was there already.
        error: what went wrong, where it failed.
        video: what was written, with its latents; None where nothing was.
    """

    source: Path | str
    path: Path | None = None
    seconds: float | None = None
    error: Exception | None = None
    video: "Video | None" = None


def plan_job(request: Request) -> Job:
    """Decide everything, and refuse what is impossible.

    Raises:
        ValueError: in one line.
    """
    if request.repeat is None:
        return _plan(request)
    earlier = record.read_record(request.repeat)
    record.refuse_missing(request, earlier)
    job = _plan(record.repeat_request(request, earlier))
    with record.background_sha256(job.files.weight_files) as checkpoint_sha256:
        record.refuse_changes(request, earlier, job.files, checkpoint_sha256)
    return job


def decide_machine(options: SamplingOptions) -> dict[str, Any]:
    """The options that say where and how to compute, with what is best here where nothing is said.

    Raises:
        ValueError: a device that is not there.
    """
    from sgm.device import default_device, parse_device
    from sgm.inference.dtypes import default_dtype

    device = parse_device(options.device) if options.device else default_device()
    return {
        "device": str(device),
        "dtype": options.dtype or default_dtype(device),
        "optimize": options.optimize or DEFAULT_LEVEL,
        "memory": options.memory or "auto",
    }


def make_videos(
    job: Job, load: Callable[[Job], "VideoPipeline"], callback: "Callback | None" = None
) -> Generator[Outcome]:
    """Make the videos one by one, in the order of the inputs; a bad picture is passed over.

    Args:
        job: the work.
        load: gives the pipeline; called when the first video has to be made, if any has.
        callback: as the pipeline's.

    Yields:
        What became of each video, as soon as it is known.
    """
    finished = record.finished_runs(job.folder) if job.request.resume else []
    pipeline: VideoPipeline | None = None
    with record.background_sha256(job.files.weight_files) as checkpoint_sha256:
        for source in job.inputs:
            try:
                runs = list(_runs(job, source))
            except (ValueError, OSError) as error:
                yield Outcome(source, error=error)
                continue
            for run in runs:
                path = record.find_run(run.described, finished, checkpoint_sha256)
                if path is not None:
                    yield Outcome(source, path)
                    continue
                pipeline = pipeline or load(job)
                yield _make(run, job, pipeline, callback, checkpoint_sha256)


@dataclass(frozen=True)
class _Run:
    """One video to make."""

    source: Path | str
    picture: "Picture"
    settings: Settings
    described: record.Record


def _plan(request: Request) -> Job:
    options = to_options(request)
    inputs = expand_inputs(request.input_path or (find_file(SAMPLE_PICTURE) or SAMPLE_PICTURE,))
    wanted = (request.version, request.config, request.ckpt_path, options.lora)
    files = find_model(*wanted)  # may fetch gigabytes
    settings = resolve(options, files.config, files.spec, (files.spec.height, files.spec.width))

    format = request.format or "mp4"

    from sgm.inference.videos import check_video_size

    check_video_size(format, *settings.size)

    decided = decide_machine(options)  # last: PyTorch takes longer than all above
    return Job(
        files,
        replace(settings, options=settings.options.replace(**decided)),
        inputs,
        _output_folder(Path(request.output_folder or OUTPUT_FOLDER / files.spec.name)),
        format,
        replace(request, options=request.options | decided),
    )


def _output_folder(folder: Path) -> Path:
    """The folder, made if absent.

    Raises:
        ValueError: nothing can be written there.
    """
    folder = user_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except FileExistsError as error:
        raise ValueError(
            f"output_folder {str(folder)!r}: expected a folder, but this is a file"
        ) from error
    except OSError as error:
        raise ValueError(f"output_folder {str(folder)!r}: {error.strerror}") from error
    return folder


def _runs(job: Job, source: Path | str) -> Iterator[_Run]:
    """The videos of one picture.

    Raises:
        ValueError: the picture cannot be read, or its object not be told from the background.
        OSError: it cannot be read.
    """
    from sgm.inference.pictures import isolate_object, load_picture
    from sgm.inference.pipeline import settings_for, video_seeds

    picture = load_picture(source)
    found = record.describe_input(source, picture)
    if job.files.spec.orbit:
        picture = isolate_object(picture)
    options = to_options(job.request)
    for seed in video_seeds(options):
        settings = settings_for(job.files, picture, options.replace(seed=seed, videos_per_image=1))
        described = record.describe_run(job.files, settings, found, job.format)
        yield _Run(source, picture, settings, described)


def _make(
    run: _Run,
    job: Job,
    pipeline: "VideoPipeline",
    callback: "Callback | None",
    checkpoint_sha256: Sha256,
) -> Outcome:
    from sgm.device import device_name

    began = time.monotonic()
    try:
        video = pipeline(run.picture, run.settings.options, callback=callback)
        made = {
            "seconds": round(time.monotonic() - began, 2),
            "made_with": record.describe_machine(device_name(pipeline.device)),
        }
        described = record.with_finding(run.described, video.flagged)
        complete = record.with_checkpoint(described, checkpoint_sha256())

        def describe(name: str) -> str:
            return json.dumps(complete | {"video": name} | made, indent=2)

        suffix = "" if job.format == "png" else f".{job.format}"
        with TemporaryDirectory(
            prefix=".unfinished-", dir=job.folder, ignore_cleanup_errors=True
        ) as unfinished:
            whole = video.save(Path(unfinished, f"video{suffix}"))
            path = place_numbered(whole, job.folder, describe)
    except (ValueError, OSError, MemoryError) as error:
        logger.debug("%s failed", run.source, exc_info=True)
        let_go(error)
        return Outcome(run.source, error=error)
    return Outcome(run.source, path, time.monotonic() - began, video=video)
