"""Folders of checkpoint files: that of a diffusers pipeline, or one file in a folder."""

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from sgm.checkpoint.reading import SUFFIXES, open_file
from sgm.checkpoint.source import Selection, Source

logger = logging.getLogger(__name__)

PARTS = ("unet", "vae", "image_encoder")  # of a diffusers folder

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")


def open_folder(path: Path) -> Source:
    """Open the folder of a diffusers pipeline, or a folder with one checkpoint.

    Of several variants of a part (``diffusion_pytorch_model.fp16.safetensors``) the smallest is
    taken, of those in safetensors if there are any. A variant may be split into numbered files.

    Args:
        path: the folder.

    Returns:
        The tensors by their names; those of a pipeline's part begin with its name: ``unet/...``.

    Raises:
        ValueError: there are no weights, or several; a numbered file is missing, or there are
            some of two sets; as `open_file`.
    """
    try:
        parts = {part: _variants(path / part) for part in PARTS if (path / part).is_dir()}
        own = _variants(path)
    except PermissionError as error:
        raise ValueError(f"{error.filename} is a folder that this user may not read") from None
    if any(parts.values()):
        return _join(path, {part: _choose(path / part, parts[part]) for part in parts})
    if len(own) == 1:
        return _join(path, {"": next(iter(own.values()))})
    if own:
        raise ValueError(f"{path} holds several checkpoints: give one of {', '.join(sorted(own))}")
    raise ValueError(
        f"{path} is a folder without weights: expected one file ending in {', '.join(SUFFIXES)}, "
        f"or those of a diffusers pipeline in {', '.join(f'{part}/' for part in PARTS)}"
    )


def _variants(folder: Path) -> dict[str, list[Path]]:
    """The files of each variant, by the name it has without numbers."""
    variants = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith("."):
            variants[_SHARD.sub("", path.name)].append(path)
    return variants


def _choose(folder: Path, variants: Mapping[str, list[Path]]) -> list[Path]:
    """The files of the variant to read."""
    if not variants:
        raise ValueError(f"{folder} is a folder without weights; fetch it again")

    def rank(name: str) -> tuple[bool, int]:
        size = sum(path.stat().st_size for path in variants[name])
        return not name.endswith(".safetensors"), size

    chosen, *others = sorted(variants, key=rank)
    if others:
        logger.info("%s: %s is read, not %s", folder, chosen, ", ".join(others))
    return variants[chosen]


def _join(path: Path, parts: Mapping[str, Sequence[Path]]) -> Source:
    """The tensors of all files, under the names of their parts."""
    chosen: dict[str, tuple[Source, str]] = {}
    metadata: dict[str, str] = {}
    for part, files in parts.items():
        _require_all(files)
        prefix = part and f"{part}/"
        for file in files:
            source = open_file(file)
            found = {prefix + name: (source, name) for name in source.tensors}
            if again := found.keys() & chosen.keys():
                raise ValueError(f"{file} holds {min(again)} again: keep one set of its files")
            chosen |= found
            metadata |= source.metadata
    return Selection(path, chosen, metadata)


def _require_all(files: Sequence[Path]) -> None:
    numbers = [match for file in files if (match := _SHARD.search(file.name))]
    if not numbers:
        return
    found, total = {int(match[1]) for match in numbers}, int(numbers[0][2])
    lost = [number for number in range(1, total + 1) if number not in found]
    if lost:
        name = _SHARD.sub(f"-{lost[0]:05d}-of-{total:05d}", files[0].name)
        raise ValueError(f"{files[0].with_name(name)} is missing: fetch it again")
