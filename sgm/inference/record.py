"""The JSON beside a video: everything that made it, enough to make it again."""

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, cast

import sgm
from sgm.inference.files import is_address, is_there, user_path
from sgm.inference.flags import Request
from sgm.inference.options import SamplingOptions
from sgm.inference.settings import ModelFiles, Settings

if TYPE_CHECKING:
    from sgm.inference.pictures import Picture

Record = dict[str, Any]

OFF = "off"  # what a record says of a safety filter that was not asked for

# What decides the pixels and the file; the rest says where things lay and who computed.
_DECIDING = ("version", "format", "options", "sampler_config")
_HASHED = ("input", "config", "checkpoint")
# By entry of a record with a path, the flag that gives another.
_FLAGS = {
    "input": "input_path",
    "config": "config",
    "checkpoint": "ckpt_path",
    "safety_filter": "safety_filter",
}


def describe_run(files: ModelFiles, settings: Settings, source: Record, format: str) -> Record:
    """Describe one video, in values that JSON can hold; the hash of the weights is left open.

    Args:
        files: the model.
        settings: of the run, ``options`` with the seed of this video, its device and type.
        source: what :func:`describe_input` gave.
        format: mp4, gif, webp or png.
    """
    options = settings.options
    record = {
        "version": files.spec.name,
        "format": format,
        "options": options.replace(videos_per_image=1).to_dict(),
        "sampler_config": settings.sampler_config,
        "input": source,
        "config": _located(files.config_path, _sha256_of_config(files)),
        "checkpoint": _located(files.checkpoint, None),
        "watermark": options.watermark,
        "safety_filter": _describe_filter(options.safety_filter) if options.safety_filter else OFF,
    }
    return cast(Record, json.loads(json.dumps(record)))


def with_checkpoint(record: Record, sha256: str) -> Record:
    """The record with the hash of the weights."""
    return record | {"checkpoint": record["checkpoint"] | {"sha256": sha256}}


def with_finding(record: Record, flagged: bool | None) -> Record:
    """The record with what the safety filter found; None where it was off."""
    if flagged is None:
        return record
    return record | {"safety_filter": record["safety_filter"] | {"flagged": flagged}}


def describe_input(source: str | Path, picture: "Picture") -> Record:
    """Where a picture came from, and a SHA-256: of the file, or of an address's decoded pixels."""
    if is_address(source):
        sha256 = hashlib.sha256(picture.image.tobytes()).hexdigest()
        return {"path": source, "sha256": sha256}
    return _located(Path(source), sha256_of_file(source))


def describe_machine(device_name: str) -> Record:
    """The versions of what computes; ``device_name`` in words."""
    import torch

    return {
        "sgm": sgm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name,
    }


def identity(record: Record) -> Record:
    """The part of a record that decides the video: two runs with the same give the same.

    An option that a record of an older version lacks has its default.
    """
    hashes = {name: record[name]["sha256"] for name in _HASHED}
    judged = {"safety_filter": _filter_sha256(record)}
    options = SamplingOptions().to_dict() | record["options"] | judged
    return {name: record[name] for name in _DECIDING} | hashes | {"options": options}


def read_record(path: str | Path) -> Record:
    """Read a record.

    Raises:
        ValueError: no such file, or not a record.
    """
    path = user_path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        identity(record)
    except OSError as error:
        raise ValueError(f"record {str(path)!r}: {error.strerror}") from error
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"record {str(path)!r}: not the JSON of a video made here") from error
    return cast(Record, record)


def finished_runs(folder: Path) -> list[tuple[Path, Record]]:
    """The videos of a folder that are there, each with its record."""
    found = []
    for path in sorted(folder.glob("[0-9]*.json")):
        try:
            record = read_record(path)
        except ValueError:
            continue
        video = path.with_name(str(record.get("video")))
        if video.exists():
            found.append((video, record))
    return found


def find_run(
    wanted: Record, runs: Iterable[tuple[Path, Record]], checkpoint_sha256: Callable[[], str]
) -> Path | None:
    """The video of a finished run that equals ``wanted``, whose checkpoint need not be hashed yet.

    ``checkpoint_sha256`` is called only where all else is equal, for it may have to wait.
    """
    asked = identity(wanted) | {"checkpoint": None}
    for video, record in runs:
        same = identity(record) | {"checkpoint": None} == asked
        if same and record["checkpoint"]["sha256"] == checkpoint_sha256():
            return video
    return None


def repeat_request(request: Request, record: Record) -> Request:
    """A request for the video of a record, with what the user says besides taking precedence.

    A frame rate given anew also conditions the model, unless the record's run was told otherwise.
    """
    options = dict(record["options"])
    if "fps" in request.options and options["fps_id"] == options["fps"] - 1:
        options["fps_id"] = None
    files = {} if request.version else {k: record[k]["path"] for k in ("config", "checkpoint")}
    return replace(
        request,
        options=options | request.options,
        input_path=request.input_path or (record["input"]["path"],),
        version=request.version or record["version"],
        config=request.config or files.get("config"),
        ckpt_path=request.ckpt_path or files.get("checkpoint"),
        format=request.format or record["format"],
    )


def refuse_missing(asked: Request, record: Record) -> None:
    """Make sure that all files of a record are there, apart from those that ``asked`` replaces.

    Raises:
        ValueError: one is not; names the flag that gives another.
    """
    for name, path in _paths_used_again(asked, record).items():
        there = Path(path).is_file() if name == "input" else is_there(path)
        if not (there or is_address(path)):
            raise ValueError(
                f"the {name} {path} of the record is no longer there: "
                f"say with --{_FLAGS[name]} where it is now, or give another"
            )


def refuse_changes(
    asked: Request, record: Record, files: ModelFiles, checkpoint_sha256: Callable[[], str]
) -> None:
    """Make sure that what is to be repeated is as it was, apart from what ``asked`` replaces.

    Raises:
        ValueError: the picture, YAML or weights have changed since the record was written.
    """
    paths = _paths_used_again(asked, record)
    if is_address(paths.get("input")):
        del paths["input"]
    if "lora" in asked.options:
        paths.pop("checkpoint", None)
    sha256: dict[str, Callable[[], str]] = {
        "input": lambda: sha256_of_file(paths["input"]),
        "config": lambda: _sha256_of_config(files),
        "checkpoint": checkpoint_sha256,
        "safety_filter": lambda: _describe_filter(paths["safety_filter"])["sha256"],
    }
    for name, path in paths.items():
        if sha256[name]() != record[name]["sha256"]:
            raise ValueError(
                f"the {name} {path} is no longer the one of the record: "
                f"give --{_FLAGS[name]} to use another"
            )


def _paths_used_again(asked: Request, record: Record) -> dict[str, str]:
    """Where the files of a record lie, by its entries, apart from those that ``asked`` replaces."""
    replaced = {
        "input": asked.input_path,
        "config": asked.config or asked.version,
        "checkpoint": asked.ckpt_path or asked.version,
        "safety_filter": "safety_filter" in asked.options or _filter_sha256(record) is None,
    }
    return {name: record[name]["path"] for name, other in replaced.items() if not other}


@contextmanager
def background_sha256(find: Callable[[], Sequence[Path]]) -> Iterator[Callable[[], str]]:
    """Hash the large files that ``find`` gives, all in another thread.

    The function that the block gets waits for the result, and raises what went wrong. It is the
    hash of the only file, or that of the hashes of several in rising order, a line for each: where
    they lie and how they are called does not count. Leaving the block ends the work.
    """
    cancel = Event()

    def digest() -> str:
        return _sha256_of_files(find(), cancel)

    with ThreadPoolExecutor(1, "sha256") as pool:
        future = pool.submit(digest)
        try:
            yield future.result
        finally:
            cancel.set()


def sha256_of_file(path: str | Path) -> str:
    """Hash a small file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_files(paths: Iterable[Path], cancel: Event | None = None) -> str:
    """The hash of one large file, or that of the hashes of several."""
    from sgm.checkpoint import sha256_of

    digests = sorted(sha256_of(path, cancel) or "" for path in paths)
    lines = "\n".join(digests)
    return lines if len(digests) == 1 else hashlib.sha256(lines.encode()).hexdigest()


def _describe_filter(folder: str) -> Record:
    """Where a safety filter lies, and the hash of its weights.

    Raises:
        ValueError: it is no longer there.
    """
    from sgm.inference.safety import find_filter

    return _located(Path(folder), _sha256_of_files(find_filter(folder).files))


def _filter_sha256(record: Record) -> str | None:
    """The hash of the weights of a record's safety filter; None where it was off."""
    described = record.get("safety_filter", OFF)
    return None if described == OFF else described["sha256"]


def _sha256_of_config(files: ModelFiles) -> str:
    """Of the model section as it is understood: comments and spelling do not count."""
    return hashlib.sha256(json.dumps(files.config, sort_keys=True).encode()).hexdigest()


def _located(path: Path, sha256: str | None) -> Record:
    # Links are kept: the hub's cache gives files their names by them.
    return {"path": str(path.absolute()), "sha256": sha256}
