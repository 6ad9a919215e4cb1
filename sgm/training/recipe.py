"""Recipes: YAML files that say what is trained, on what, and how.

A recipe may name another file under ``include`` (a path beside it); what stands in the recipe wins.
``key=value`` overrides of what is there come last, ``+key=value`` adds to it. The sections are
`model` (as for sampling), `engine` (the part of it that is trained; by default all), `training`
(seed, task, optim), `data` and `lightning`; `sgm.training.settings` has the keys of the last three.
"""

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml import YAMLError  # type: ignore[import-untyped]

from sgm.config import check_types

T = TypeVar("T")

_ABSENT = object()


def load_recipe(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> DictConfig:
    """Merge recipe files, later ones winning, then the overrides.

    Args:
        paths: YAML files.
        overrides: ``section.key=value`` strings; those of a new key begin with ``+``.

    Raises:
        ValueError: a file is missing, not YAML or includes itself, or an override has no ``=`` or
            an unknown key.
    """
    bad = [o for o in overrides if "=" not in o or o.startswith(("-", "="))]
    if bad:
        raise ValueError(f"expected overrides of the form key=value, got {' '.join(bad)}")
    try:
        merged = cast(DictConfig, OmegaConf.merge(*map(_read, paths)))
    except OmegaConfBaseException as exc:
        raise ValueError(f"{', '.join(map(str, paths))}: {str(exc).splitlines()[0]}") from exc
    return reduce(_override, overrides, merged)


def section(recipe: DictConfig, name: str) -> dict[str, Any]:
    """Return one section as plain dictionaries and lists.

    Raises:
        ValueError: the recipe has no such section, it is no mapping, an interpolation in it leads
            nowhere, or a parameter of an object in it has a wrong type.
    """
    try:
        node = OmegaConf.select(recipe, name)
        plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except InterpolationToMissingValueError as exc:
        key = str(exc).splitlines()[0].rpartition(" ")[2]
        raise ValueError(f"{key}: expected a value, got none: give {key}=...") from exc
    except OmegaConfBaseException as exc:
        raise ValueError(f"section '{name}': {str(exc).splitlines()[0]}") from exc
    if plain is None:
        present = ", ".join(map(str, recipe))
        raise ValueError(f"the recipe has no section '{name}'; it has {present}")
    if not isinstance(plain, dict):
        raise ValueError(f"section '{name}': expected names and values, got {plain!r}")
    check_types(plain, name)
    return cast(dict[str, Any], plain)


def typed(recipe: DictConfig, name: str, kind: type[T]) -> T:
    """Return one section as the dataclass ``kind``, its values converted to the fields' types.

    Raises:
        ValueError: names the key that is missing, unknown or of a wrong type.
    """
    plain = section(recipe, name)
    try:
        return cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), plain)))
    except OmegaConfBaseException as exc:
        missing = isinstance(exc, MissingMandatoryValue)
        reason = "expected a value, got none" if missing else str(exc).splitlines()[0]
        key = f"{name}.{exc.full_key}" if exc.full_key else name
        raise ValueError(f"{key}: {reason}") from exc


def require(name: str, made: object, **checks: tuple[bool, str]) -> None:
    """Check the values of a section.

    Args:
        name: of the section, such as ``training.optim``.
        made: the dataclass made of it.
        checks: by key, whether its value is right, and what is expected.

    Raises:
        ValueError: names the first key with a wrong value.
    """
    for key, (right, expected) in checks.items():
        if not right:
            raise ValueError(f"{name}.{key}: expected {expected}, got {getattr(made, key)!r}")


def engine_section(recipe: DictConfig) -> str:
    """Return the name of the section that describes what is trained."""
    return "engine" if "engine" in recipe else "model"


def engine_config(recipe: DictConfig) -> dict[str, Any]:
    """Return the config of what is trained."""
    return section(recipe, engine_section(recipe))


def _override(recipe: DictConfig, override: str) -> DictConfig:
    """Set ``key=value`` where the recipe has the key, ``+key=value`` in any case."""
    assignment = override.removeprefix("+")
    key = assignment.partition("=")[0]
    try:
        if override == assignment and not _has(recipe, key):
            raise ValueError(f"the recipe has no key '{key}'; to add it, write +{override}")
        return cast(DictConfig, OmegaConf.merge(recipe, OmegaConf.from_dotlist([assignment])))
    except (OmegaConfBaseException, YAMLError, TypeError) as exc:
        raise ValueError(f"{override}: {str(exc).splitlines()[0]}") from exc


def _has(recipe: DictConfig, key: str) -> bool:
    """Whether a recipe has a key, also one whose value is yet to be given (``???``)."""
    if OmegaConf.select(recipe, key, default=_ABSENT) is not _ABSENT:
        return True
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(recipe, parent) if parent else recipe
    return isinstance(node, DictConfig) and OmegaConf.is_missing(node, name)


def _read(path: str | Path, seen: tuple[Path, ...] = ()) -> DictConfig:
    """Read a recipe with what it includes; ``seen`` are the files that led to it."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no recipe {path}")
    chain = (*seen, path)
    if any(path.samefile(earlier) for earlier in seen):
        raise ValueError(f"a recipe includes itself: {' > '.join(map(str, chain))}")
    try:
        node = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as exc:
        raise ValueError(f"{path} is not a YAML file: {str(exc).splitlines()[0]}") from exc
    if not isinstance(node, DictConfig):
        raise ValueError(f"{path}: expected sections, got a list")
    include = node.pop("include", None)
    if include is None:
        return node
    return cast(DictConfig, OmegaConf.merge(_read(path.parent / str(include), chain), node))
