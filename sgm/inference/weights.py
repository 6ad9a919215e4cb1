"""Which checkpoint a name means, and which model a checkpoint is: both without reading weights."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path

from sgm.inference.files import is_there, user_path
from sgm.inference.specs import SPECS, ModelSpec, find_path

logger = logging.getLogger(__name__)

Shapes = Mapping[str, Sequence[int]]

_NAME = r"[A-Za-z0-9][\w.-]*"
_ADDRESS = re.compile(rf"({_NAME}/{_NAME})(?:/(?:(?:blob|resolve|tree)/[^/]+/?)?(.*))?")
_HUB = re.compile(r"hf://|https?://(www\.)?(huggingface\.co|hf\.co)/")
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def given_weights(asked: str, spec: ModelSpec | None = None) -> Path:
    """The checkpoint that the user names, as :func:`locate` finds it.

    Raises:
        ValueError: there is none.
    """
    found = locate(asked, spec)
    if found is None:
        raise ValueError(
            f"checkpoint {asked!r}: no such file or folder; a repository of the Hugging Face hub "
            "is written OWNER/NAME"
        )
    return found


def own_weights(spec: ModelSpec, asked: str | None = None) -> Path:
    """The checkpoint of a model: what its YAML asks for, else what is there under its name.

    Raises:
        ValueError: it is not there; what is missing is named.
    """
    found = (locate(asked, spec) if asked else None) or spec.checkpoint
    if found is None:
        wanted = asked or f"checkpoints/{spec.name}.safetensors"
        fetch = f"fetch it with 'python scripts/download.py {spec.name}'"
        raise ValueError(
            f"{spec.name} needs its weights at {wanted}, and there is no such file: "
            f"{fetch if spec.repository else 'put it there'} (see checkpoints/README.md), or give "
            "--ckpt_path"
        )
    return found


def given_lora(asked: str) -> tuple[Path, float]:
    """The file of updates that the user names, and by how much to add it: ``FILE[:scale]``.

    Raises:
        ValueError: there is no such file or folder.
    """
    file, _, text = asked.rpartition(":")
    try:
        scale = float(text)
    except ValueError:
        file, scale = asked, 1.0
    if not file or is_there(asked):  # a name that itself ends in a number
        file, scale = asked, 1.0
    path = find_path(user_path(file)) if is_there(file) else None
    if path is None or not isfinite(scale):
        raise ValueError(
            f"lora {asked!r}: expected FILE or FILE:SCALE, such as motion.safetensors:0.8; there "
            "is no such file or folder"
        )
    return path, scale


def base_of(spec: ModelSpec, checkpoint: Path) -> Path | None:
    """The checkpoint of all but the U-Net, where a model's own holds that alone; else None.

    Raises:
        ValueError: it is not there.
    """
    if spec.base is None or not _is_unet_alone(_native_shapes(checkpoint)):
        return None
    found = SPECS[spec.base].checkpoint
    if found is None:
        raise ValueError(
            f"{checkpoint.name} holds the U-Net of {spec.name} alone, the rest is {spec.base}'s: "
            f"fetch that with 'python scripts/download.py {spec.base}'"
        )
    return found


def locate(asked: str, spec: ModelSpec | None = None) -> Path | None:
    """Find a checkpoint; one of the hub is fetched if it is not on this machine yet.

    Args:
        asked: a file or folder, or what :func:`parse_address` takes; what is there comes first.
        spec: the model that it is to be, if that is known; decides where a repository of the hub
            holds several.

    Returns:
        The file or folder; None where there is none and no place on the hub is meant.

    Raises:
        ValueError: no name of a file, or the hub does not have it or cannot be reached.
    """
    try:
        found = find_path(user_path(asked))
    except OSError as error:  # not permitted, or longer than a name can be
        raise ValueError(f"checkpoint {asked!r}: {error.strerror}") from None
    address = None if found else parse_address(asked)
    if address is None:
        return found
    from sgm.checkpoint.hub_fetch import fetch

    repository, file = address
    return fetch(repository, file or _published_file(repository, spec))


def parse_address(text: str) -> tuple[str, str | None] | None:
    """Understand a place on the Hugging Face hub.

    Args:
        text: ``owner/name`` or ``owner/name/file.safetensors``, also with ``hf://`` before it, or
            the address of a page of huggingface.co.

    Returns:
        The repository and, if given, the file; None for what is meant as a path of this machine: a
        file of weights in a folder, or something in a folder that is here.

    Raises:
        ValueError: ``hf://`` or huggingface.co, and then no repository.
    """
    prefix = _HUB.match(text)
    match = _ADDRESS.fullmatch(text[prefix.end() :] if prefix else text)
    if prefix:
        if match is None:
            raise ValueError(f"expected hf://OWNER/NAME or hf://OWNER/NAME/FILE, got {text!r}")
        return match[1], match[2] or None
    if match is None or Path(text.partition("/")[0]).is_dir():
        return None
    repository, file = match[1], match[2] or None
    meant = file.endswith(_SUFFIXES) if file else not repository.endswith(_SUFFIXES)
    return (repository, file) if meant else None


def _published_file(repository: str, spec: ModelSpec | None) -> str | None:
    """The file of a repository that is meant; None leaves the choice to what is there."""
    rows = [s for s in SPECS.values() if s.repository == repository and spec in (None, s)]
    return rows[0].file if len(rows) == 1 and not rows[0].pipeline else None


def tell_model(path: Path) -> ModelSpec:
    """The model that a checkpoint belongs to: its keys tell, and where several fit, its name.

    Raises:
        ValueError: it cannot be read, is of no model of the table, or of several.
    """
    shapes = _native_shapes(path)
    fitting = _fitting(path, shapes)
    undecided = len(fitting) > 1 or _is_unet_alone(shapes)
    spec = _named(path, fitting) if undecided else fitting[0]
    if spec is None:
        names = ", ".join(each.name for each in fitting)
        raise ValueError(
            f"{path.name} may be {names}, its name does not tell: say which with --version"
        )
    logger.info("%s is %s, by its %s", path.name, spec.name, "name" if undecided else "keys")
    return spec


def _fitting(path: Path, shapes: Shapes) -> list[ModelSpec]:
    """The models whose tensors have these names and shapes."""
    from sgm.checkpoint import identify

    if _is_unet_alone(shapes):
        return [spec for spec in SPECS.values() if spec.base]
    known = identify(shapes)
    fitting = [spec for spec in SPECS.values() if spec.name in known or spec.base in known]
    if not fitting:
        looks = f" but like {' or '.join(known)}" if known else ""
        raise ValueError(
            f"{path.name} looks like none of {', '.join(SPECS)}{looks}; if it is one, say so with "
            "--version"
        )
    return fitting


def _named(path: Path, specs: Iterable[ModelSpec]) -> ModelSpec | None:
    """The model that a checkpoint is named after: by its file, its folder, or its repository."""
    cached = (part for part in path.parts if part.startswith("models--"))  # by the hub's library
    folder = (path.parent.name,) if path.is_file() else _names_inside(path)
    aliases = sorted(
        ((_words(alias), spec) for spec in specs for alias in spec.aliases),
        key=lambda pair: -len(pair[0]),  # svd_xt_1_1 also contains svd_xt
    )
    for name in (path.stem if path.is_file() else path.name, *folder, *cached):
        for alias, spec in aliases:
            if alias in _words(name):
                return spec
    return None


def _names_inside(folder: Path) -> tuple[str, ...]:
    """The name of the checkpoint of a folder that holds just one."""
    files = [path.stem for path in folder.iterdir() if path.suffix in _SUFFIXES]
    return tuple(files) if len(files) == 1 else ()


def _words(name: str) -> str:
    """A name in lower case, with ``_`` around each word: ``_svd_xt_1_1_``."""
    return f"_{'_'.join(re.findall('[a-z0-9]+', name.lower()))}_"


def _native_shapes(path: Path) -> Shapes:
    """Shapes of a checkpoint's tensors by their native names; of a part of a model, what is there.

    Raises:
        ValueError: it cannot be read, or is of no video model.
    """
    from sgm.checkpoint import open_checkpoint
    from sgm.checkpoint.opening import convert
    from sgm.convert import NATIVE

    return convert(open_checkpoint(path), NATIVE, partial=True).shapes


def _is_unet_alone(shapes: Shapes) -> bool:
    """Whether native keys are of a U-Net and nothing else."""
    return all(key.startswith("model.diffusion_model.") for key in shapes)
