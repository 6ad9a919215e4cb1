"""Checkpoints from the Hugging Face hub to this machine."""

import hashlib
import logging
from pathlib import Path, PurePosixPath
from typing import Any

from sgm.checkpoint.digest import sha256_of
from sgm.checkpoint.hub import Published, Repository, ask, choose_files
from sgm.checkpoint.hub_errors import errors_in_one_line, network_errors, page_of, status_of
from sgm.checkpoint.room import in_bytes, require_room

logger = logging.getLogger(__name__)


def fetch(repository: str, file: str | None = None, token: str | None = None) -> Path:
    """Bring a checkpoint into the hub's cache on this machine, unless it is there.

    Where the hub cannot be reached, what the cache holds is taken. The licence is logged before
    anything is fetched, as a warning: it binds whoever uses the weights.

    Args:
        repository: ``owner/name``.
        file: as in `choose_files`.
        token: of the hub; None for the user's own.

    Returns:
        The file, or the folder of a diffusers pipeline.

    Raises:
        ValueError: there is no such checkpoint, no access to it, or no room.
    """
    with errors_in_one_line(repository):
        try:
            found = ask(repository, token)
        except network_errors() as error:
            folder = None if status_of(error) else _cached(repository)
            if folder is None:
                raise
            return _chosen_in(folder, repository, file)
        chosen = choose_files(repository, found.files, file)
        _announce(found, chosen)
        return _within(_fetch_all(repository, chosen, token), chosen)


def _fetch_all(repository: str, files: tuple[str, ...], token: str | None) -> Path:
    """The folder with these files in the hub's cache; progress is shown on a terminal alone."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **({"disable": None} | kwargs))  # type: ignore[no-untyped-call]

    place = snapshot_download(repository, allow_patterns=list(files), token=token, tqdm_class=Bar)
    return Path(place)


def _cached(repository: str) -> Path | None:
    """The folder with what an earlier `fetch` has brought, if there is one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        return None


def _chosen_in(folder: Path, repository: str, file: str | None) -> Path:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    logger.warning("%s cannot be reached: %s is used", page_of(repository), folder)
    return _within(folder, choose_files(repository, names, file))


def _within(folder: Path, chosen: tuple[str, ...]) -> Path:
    return folder / chosen[0] if len(chosen) == 1 else folder


def _announce(repository: Repository, chosen: tuple[str, ...]) -> None:
    """Say what will be fetched under which licence, and make sure that there is room for it."""
    from huggingface_hub import constants, try_to_load_from_cache

    absent = [
        name
        for name in chosen
        if not isinstance(
            try_to_load_from_cache(repository.name, name, revision=repository.commit), str
        )
    ]
    if absent:
        size = sum(repository.files[name].size for name in absent)
        require_room(Path(constants.HF_HUB_CACHE), size)
        logger.warning(
            "fetching %s of %s; licence: %s", in_bytes(size), repository.name, repository.licence
        )


def download(repository: Repository, name: str, target: Path, token: str | None = None) -> Path:
    """Bring one file of a repository to a place of one's own, checked.

    It has another name until it is complete, ``.NAME.DIGEST.part``, and the next call goes on where
    this one was interrupted.

    Args:
        repository: as `look_up` gave it.
        name: path in the repository.
        target: where the file will stand.
        token: of the hub; None for the user's own.

    Returns:
        ``target``.

    Raises:
        ValueError: there is no such file, no access, no room, another file at ``target``, or the
            content is not what the hub says it is.
    """
    (name,) = choose_files(repository.name, repository.files, name)
    published = repository.files[name]
    part = target.with_name(f".{target.name}.{(published.sha256 or repository.commit)[:12]}.part")
    with errors_in_one_line(repository.name):
        if target.exists():
            if target.stat().st_size == published.size and sha256_of(target) == published.sha256:
                return target
            raise ValueError(f"{target} is there and is not {repository.name}/{name}: move it away")
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch_rest(repository, name, part, token)
        _require_content(part, published, f"{repository.name}/{name}")
        part.replace(target)
    return target


def _fetch_rest(repository: Repository, name: str, part: Path, token: str | None) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    size = repository.files[name].size
    done = part.stat().st_size if part.exists() else 0
    require_room(part.parent, size - done)
    if done == size:
        return
    try:
        with part.open("ab") as file:
            http_get(
                hf_hub_url(repository.name, name, revision=repository.commit),
                file,
                resume_size=done,
                headers=build_hf_headers(token=token),
                expected_size=size,
                displayed_filename=PurePosixPath(name).name,
            )
    finally:
        if part.exists() and not part.stat().st_size:
            part.unlink()


def _require_content(path: Path, published: Published, name: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if published.sha256 not in (None, digest):
        path.unlink()
        raise ValueError(
            f"what came for {name} is damaged, fetch it again: its sha256 is {digest}, "
            f"that of the hub's {published.sha256}"
        )
