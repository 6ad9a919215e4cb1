"""The SHA-256 of a large file, computed once and remembered."""

import hashlib
import logging
import os
import re
import sys
import tempfile
from pathlib import Path
from threading import Event

logger = logging.getLogger(__name__)

_CHUNK = 8 << 20  # bytes


def sha256_of(path: str | os.PathLike[str], cancel: Event | None = None) -> str | None:
    """Return the SHA-256 of a file as 64 hexadecimal digits.

    The answer is kept in the user's cache folder (``SGM_CACHE`` overrides it) under the file's
    absolute path, size and time of change, so the next call is immediate. Meant for a background
    thread: reading and hashing release the interpreter's lock.

    Args:
        path: the file.
        cancel: when set by another thread, stops within one chunk of 8 MiB.

    Returns:
        The digest; None when cancelled.

    Raises:
        ValueError: there is no such file.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise ValueError(f"expected a file to hash, but {path} is not there")
    note = _note(path)
    digest = _recall(note)
    if digest is None:
        digest = hash_file(path, cancel)
        if digest is not None and note == _note(path):  # not written to meanwhile
            _remember(note, digest)
    return digest


def known_sha256(path: str | os.PathLike[str]) -> str | None:
    """Return the SHA-256 of a file if it is remembered, without reading the file."""
    return _recall(_note(Path(path).resolve()))


def remember_sha256(path: str | os.PathLike[str], digest: str) -> None:
    """Remember the SHA-256 of a file that has just been written and hashed."""
    _remember(_note(Path(path).resolve()), digest)


def hash_file(path: Path, cancel: Event | None = None) -> str | None:
    """As `sha256_of`, but always by reading the file."""
    state = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            if cancel is not None and cancel.is_set():
                return None
            state.update(buffer[:size])
    return state.hexdigest()


def _note(path: Path) -> Path:
    """Name the small file that remembers the digest: one per state of ``path``, never rewritten."""
    stat = path.stat()
    key = f"{path}\n{stat.st_size}\n{stat.st_mtime_ns}"
    return _cache_folder() / "sha256" / hashlib.sha256(key.encode()).hexdigest()


def _recall(note: Path) -> str | None:
    try:
        digest = note.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return digest if re.fullmatch("[0-9a-f]{64}", digest) else None


def _remember(note: Path, digest: str) -> None:
    """Write under a temporary name and rename: readers and other writers never see a half."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False) as file:
            file.write(digest)
        Path(file.name).replace(note)
    except OSError as error:
        logger.debug("the digest is not remembered: %s", error)


def _cache_folder() -> Path:
    if override := os.environ.get("SGM_CACHE"):
        return Path(override)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "sgm"
    except RuntimeError:  # a user without a home folder, as in some containers
        return Path(tempfile.gettempdir()) / "sgm"
