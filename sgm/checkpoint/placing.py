"""Names that files get when they are finished, and have not before."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sgm.checkpoint.source import Source


@contextmanager
def write_errors_in_one_line(path: Path) -> Iterator[None]:
    """Turn what the system refuses in the block into a `ValueError` about ``path``."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise ValueError(f"{path} cannot be written: {reason}") from error


@contextmanager
def temporary(source: Source, path: Path, force: bool) -> Iterator[Path]:
    """A name beside ``path`` to write to, at which nothing is left in the end.

    The folder is made; if the block fails, it is taken away again.

    Args:
        source: what will be written.
        path: the name that it is to have in the end.
        force: something else of that name may be replaced.

    Raises:
        ValueError: as in `require_free`.
    """
    require_free(source, path, force)
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):
            part.unlink()
        with suppress(OSError):  # none of them is empty after success
            for folder in made:
                folder.rmdir()


def require_free(source: Source, path: Path, force: bool) -> None:
    """Make sure that nothing is lost when ``path`` is written.

    Raises:
        ValueError: it is there and may not be replaced, or is or holds a file of ``source``.
    """
    if not path.exists():
        return
    target = path.resolve()
    for file in map(Path.resolve, source.files):
        if target == file or target in file.parents:
            raise ValueError(f"{path} is the source itself: give another name")
    if not force:
        raise ValueError(f"{path} is there already: give another name, or --force to replace it")
