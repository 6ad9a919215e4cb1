"""The Hugging Face hub: what a name means there, and which files of a repository a model needs.

All goes through ``huggingface_hub``, so its settings hold: ``HF_ENDPOINT``, ``HF_TOKEN`` and the
token of ``hf auth login``, ``HF_HOME`` and ``HF_HUB_OFFLINE``.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sgm.checkpoint.folder import PARTS
from sgm.checkpoint.hub_errors import errors_in_one_line, page_of
from sgm.checkpoint.reading import SUFFIXES

_PART_FILE = re.compile(
    r"(?P<variant>(diffusion_pytorch_model|model)(\.fp16)?)(-\d{5}-of-\d{5})?"
    r"(?P<suffix>\.safetensors|\.bin)"
)


@dataclass(frozen=True)
class Published:
    """A file of a repository.

    Attributes:
        size: in bytes.
        sha256: of its content, as 64 hexadecimal digits; None where the hub does not say.
    """

    size: int
    sha256: str | None


@dataclass(frozen=True)
class Repository:
    """What the hub says about a repository.

    Attributes:
        name: ``owner/name``.
        commit: the newest state of its main branch.
        page: its address, for people.
        licence: in words, with the address of its text where there is one.
        files: by path.
    """

    name: str
    commit: str
    page: str
    licence: str
    files: Mapping[str, Published]


def look_up(repository: str, token: str | None = None) -> Repository:
    """Ask the hub about a repository.

    Raises:
        ValueError: it is not there, or the hub cannot be reached.
    """
    with errors_in_one_line(repository):
        return ask(repository, token)


def ask(repository: str, token: str | None) -> Repository:
    """As `look_up`, with the errors of ``huggingface_hub``."""
    from huggingface_hub import HfApi

    info = HfApi(token=token).model_info(repository, files_metadata=True)
    card: dict[str, Any] = vars(info.card_data) if info.card_data else {}
    page = page_of(repository)
    link = card.get("license_link") or ""
    if link and "://" not in link:
        link = f"{page}/blob/main/{link}"
    licence = card.get("license_name") or card.get("license") or "not stated"
    files = {
        file.rfilename: Published(file.size or 0, file.lfs.sha256 if file.lfs else None)
        for file in info.siblings or ()
    }
    return Repository(repository, info.sha or "main", page, f"{licence} ({link or page})", files)


def choose_files(repository: str, files: Iterable[str], file: str | None = None) -> tuple[str, ...]:
    """Choose what a model needs of the files of a repository.

    Args:
        repository: its name, for errors.
        files: all paths in it.
        file: the one to take. Without it, a diffusers pipeline is taken, of its half-precision
            variant if there is one; else the only checkpoint.

    Raises:
        ValueError: there is no such file, no checkpoint, or several.
    """
    files = sorted(files)
    single = _checkpoints(files)
    if file is not None:
        if file not in files:
            known = ", ".join(single) or "none"
            raise ValueError(f"{repository} has no file {file}; its checkpoints: {known}")
        return (file,)
    parts = [_variant(part, files) for part in PARTS]
    if all(parts):
        return tuple(file for part in parts for file in part)
    if len(single) > 1:
        choices = ", ".join(f"{repository}/{each}" for each in single)
        raise ValueError(f"{repository} holds several checkpoints: give one of {choices}")
    if not single:
        raise ValueError(f"{repository} holds no checkpoint that is known here")
    return (single[0],)


def _checkpoints(files: Iterable[str]) -> list[str]:
    return [file for file in files if file.endswith(SUFFIXES) and "/" not in file]


def _variant(part: str, files: Iterable[str]) -> list[str]:
    """The files of a part of a pipeline: safetensors before others, half precision before full."""
    variants: dict[tuple[bool, bool], list[str]] = defaultdict(list)
    for file in files:
        match = _PART_FILE.fullmatch(file.removeprefix(f"{part}/"))
        if match and file.startswith(f"{part}/"):
            rank = match["suffix"] != ".safetensors", not match["variant"].endswith(".fp16")
            variants[rank].append(file)
    return variants[min(variants)] if variants else []
