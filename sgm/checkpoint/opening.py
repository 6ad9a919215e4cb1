"""Any checkpoint, in any layout, as native weights."""

import re
from collections.abc import Mapping
from functools import reduce
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from sgm.checkpoint.folder import open_folder
from sgm.checkpoint.identify import identify
from sgm.checkpoint.reading import is_file, open_file
from sgm.checkpoint.source import Selection, Source
from sgm.convert import NATIVE, Conversion, Entry, detect, folder_part, plan

# Training wraps the engine; parallel and compiled training wrap it again.
_WRAPPERS = re.compile(r"^((engine|module|_forward_module|_orig_mod)\.)+")


def open_checkpoint(path: str | PathLike[str]) -> Source:
    """Open a file or folder of weights, in the layout that it has.

    Args:
        path: a file for `open_file`, or a folder for `open_folder`.

    Returns:
        The tensors, their names without the prefixes of training wrappers. Those of a diffusers
        pipeline, or of one part of it, begin with the part: ``unet/...``.

    Raises:
        ValueError: as in `open_file` and `open_folder`, or a weight is there twice.
    """
    path = Path(path)
    source = open_file(path) if is_file(path) or not path.is_dir() else open_folder(path)
    part = folder_part(source.shapes) or ""
    chosen = {part + _WRAPPERS.sub("", name): (source, name) for name in source.tensors}
    if len(chosen) < len(source.tensors):
        raise ValueError(f"{path} holds some weights twice, with and without a wrapper's prefix")
    return Selection(path, chosen, source.metadata)


def open_native(path: str | PathLike[str], overlay: str | PathLike[str] | None = None) -> Source:
    """Open a file or folder of weights as native ones, whatever its layout.

    Args:
        path: as in `open_checkpoint`.
        overlay: another checkpoint, of one part or more, such as a U-Net alone; its tensors stand
            in place of those of ``path``.

    Raises:
        ValueError: as in `open_checkpoint`, or the tensors are not those of a video model.
    """
    base = _native(open_checkpoint(path))
    if overlay is None:
        return base
    above = _native(open_checkpoint(overlay), partial=True)
    extra = above.tensors.keys() - base.tensors.keys()
    if extra:
        raise ValueError(
            f"{overlay} does not go over {path}, which has no {min(extra)} ({len(extra)} such)"
        )
    chosen = {key: (above if key in above.tensors else base, key) for key in base.tensors}
    return Selection(base.path, chosen, base.metadata)


def _native(source: Source, partial: bool = False) -> Source:
    try:
        layout = detect(source.shapes)
    except ValueError:  # a part of a model, or none: comparing with the model's keys will tell
        layout = NATIVE
    return source if layout == NATIVE else convert(source, NATIVE, partial)


def convert(source: Source, target: str, partial: bool = False) -> "Converted":
    """The tensors of ``source`` in another layout.

    Args:
        source: in any layout.
        target: one of `sgm.convert.LAYOUTS`.
        partial: the source may be a part of a model.

    Raises:
        ValueError: the source has not all tensors of a video model, or others.
    """
    shapes = source.shapes
    try:
        layout = detect(shapes)
        return Converted(source, plan(shapes, source=layout, target=target, partial=partial))
    except ValueError as error:
        unet = {name.removeprefix("unet/"): shape for name, shape in shapes.items()}
        known = " or ".join(identify(unet))
        looks = f". It looks like {known}" if known else ""
        raise ValueError(f"{source.path}: {error}{looks}") from error


class Converted(Source):
    """The tensors of another source, in another layout.

    Args:
        source: where the values come from.
        conversion: for its tensors.
    """

    def __init__(self, source: Source, conversion: Conversion) -> None:
        self._source = source
        self._entries = {entry.key: entry for entry in conversion.entries}
        self.conversion = conversion
        blanks = {entry.key: _blank(entry, source.tensors) for entry in conversion.entries}
        super().__init__(source.path, blanks, source.metadata)

    @property
    def files(self) -> tuple[Path, ...]:  # noqa: D102 - as in the base class
        return self._source.files

    def view(self, name: str) -> Tensor:  # noqa: D102
        entry = self._entries[name]
        return entry.make(*(self._source.view(old) for old in entry.sources))

    def read(self, name: str) -> Tensor:  # noqa: D102
        entry = self._entries[name]
        return entry.make(*(self._source.read(old) for old in entry.sources))

    def require_unchanged(self) -> None:  # noqa: D102
        self._source.require_unchanged()


def _blank(entry: Entry, tensors: Mapping[str, Tensor]) -> Tensor:
    """What ``entry`` will make, without values.

    By its shape, and not by making it of blanks: much that is computed on the meta device imports
    torch's compiler first, which takes seconds.
    """
    types = (tensors[name].dtype for name in entry.sources)
    return torch.empty(entry.shape, dtype=reduce(torch.promote_types, types), device="meta")
