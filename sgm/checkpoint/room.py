"""Room on a disk, and sizes in words."""

import shutil
from pathlib import Path


def require_room(folder: Path, size: int) -> None:
    """Make sure that so many bytes fit into a folder, which need not be there yet.

    Raises:
        ValueError: they do not.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(f"{folder} has {in_bytes(free)} left, {in_bytes(size)} are needed")


def in_bytes(size: int) -> str:
    """A size in words, such as ``9.56 GB``."""
    unit, name = next(
        ((n, name) for n, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")) if size >= n),
        (1, "bytes"),
    )
    return f"{size / unit:.3g} {name}"
