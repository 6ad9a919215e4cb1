"""Names of files: which pictures the user means, and under which number a video is stored."""

import os
import re
from collections.abc import Callable, Iterable
from glob import glob
from pathlib import Path

PICTURE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff")
)


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path that a user means, whose ``~`` or ``~name`` may stand for a home folder.

    Raises:
        ValueError: there is no such home folder, nor something of that very name here.
    """
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError:
        if is_there(path):
            return path
        raise ValueError(
            f"{str(path)!r}: there is no home folder {path.parts[0]}; write ./ before a name that "
            "itself begins with ~"
        ) from None


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether there is such a file or folder; a text that can be no name is none."""
    return os.path.exists(os.path.expanduser(path))  # noqa: PTH110, PTH111 - pathlib's raise errors


def is_address(source: object) -> bool:
    """Whether ``source`` is an http or https address."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def expand_inputs(input_path: str | Path | Iterable[str | Path]) -> list[Path | str]:
    """The pictures that the user means, each once, in the order given.

    Args:
        input_path: a file, a folder (its pictures by name, without sub-folders), a pattern such as
            ``photos/*.jpg`` (``**`` enters sub-folders) or an http(s) address; or several of them.

    Returns:
        Paths of existing files, and addresses as they are.

    Raises:
        ValueError: where nothing is found, or may not be read.
    """
    several = [input_path] if isinstance(input_path, str | Path) else list(input_path)
    found = [each for source in several for each in _expand(str(source))]
    if not found:
        raise ValueError("no input picture: give a file, folder, pattern or http(s) address")
    return list(dict.fromkeys(found))


def _expand(source: str) -> list[Path | str]:
    if is_address(source):
        return [source]
    if not source.strip():
        raise ValueError("input '': expected a file, folder, pattern or http(s) address")
    path = user_path(source)
    try:
        if path.is_dir():
            return _pictures_in(path)
        if path.exists():  # before the pattern: a file's own name may hold brackets
            return [path]
    except OSError as error:  # not permitted, or longer than a name can be
        raise ValueError(f"input {source!r}: {error.strerror}") from error
    names = glob(str(path), recursive=True)  # noqa: PTH207 - skips hidden files, as shells do
    matches = [Path(name) for name in sorted(names)]
    files: list[Path | str] = [match for match in matches if match.is_file()]
    if not files:
        raise ValueError(f"input {source!r}: no such file or folder, and no file matches")
    return files


def _pictures_in(folder: Path) -> list[Path | str]:
    pictures: list[Path | str] = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in PICTURE_SUFFIXES
        and path.is_file()
        and not path.name.startswith(".")
    ]
    if not pictures:
        known = ", ".join(sorted(PICTURE_SUFFIXES))
        raise ValueError(f"input {str(folder)!r}: the folder holds no picture ({known})")
    return pictures


def place_numbered(video: Path, folder: Path, describe: Callable[[str], str]) -> Path:
    """Move a video to the next free number of a folder, as in ``000004.mp4``, beside its record.

    A number counts as taken as soon as a file of any suffix bears it. Of processes that share the
    folder, the one that makes ``000004.json`` has that number. Nothing else marks it, so that a
    kill keeps none from others; at worst it leaves a record whose video was about to come.

    Args:
        video: the whole video, a file or a folder of frames, in the file system of ``folder``.
        folder: where it goes.
        describe: gives the text of its record, by its name there.

    Returns:
        Where the video is.

    Raises:
        OSError: the folder cannot be written; it is left as it was.
    """
    while True:
        path = folder / f"{_highest_number(folder) + 1:06d}{video.suffix}"
        record = path.with_suffix(".json")
        try:
            file = record.open("x", encoding="utf-8")
        except FileExistsError:
            continue  # another process has just taken this number
        try:
            with file:
                file.write(describe(path.name) + "\n")
            return video.rename(path)
        except BaseException:
            record.unlink()
            raise


def _highest_number(folder: Path) -> int:
    names = (re.match(r"(\d{6,})(\.|$)", path.name) for path in folder.iterdir())
    return max((int(name[1]) for name in names if name), default=-1)
