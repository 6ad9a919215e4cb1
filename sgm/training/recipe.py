"""Recipes: YAML files that say what is trained, on what, and how.

A recipe may name another file under ``include`` (a path beside it); what stands in the recipe wins.
``key=value`` overrides come last. The sections are `model` (as for sampling), `engine` (the part
of it that is trained; by default all), `training` (seed, task, optim), `data` and `lightning`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]


def load_recipe(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> DictConfig:
    """Merge recipe files, later ones winning, then the overrides.

    Args:
        paths: YAML files.
        overrides: ``section.key=value`` strings.

    Raises:
        ValueError: a file is missing or not YAML, or an override has no ``=``.
    """
    bad = [o for o in overrides if "=" not in o or o.startswith("-")]
    if bad:
        raise ValueError(f"expected overrides of the form key=value, got {' '.join(bad)}")
    try:
        merged = OmegaConf.merge(*map(_read, paths), OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as exc:
        raise ValueError(f"{', '.join(map(str, paths))}: {str(exc).splitlines()[0]}") from exc
    return cast(DictConfig, merged)


def section(recipe: DictConfig, name: str) -> dict[str, Any]:
    """Return one section as plain dictionaries and lists.

    Raises:
        ValueError: the recipe has no such section, or an interpolation in it leads nowhere.
    """
    try:
        node = OmegaConf.select(recipe, name)
        plain = OmegaConf.to_container(node, resolve=True) if node is not None else None
    except OmegaConfBaseException as exc:
        raise ValueError(f"section '{name}': {str(exc).splitlines()[0]}") from exc
    if not isinstance(plain, dict):
        present = ", ".join(map(str, recipe))
        raise ValueError(f"the recipe has no section '{name}'; it has {present}")
    return cast(dict[str, Any], plain)


def engine_config(recipe: DictConfig) -> dict[str, Any]:
    """Return the config of what is trained."""
    return section(recipe, "engine" if "engine" in recipe else "model")


def _read(path: str | Path) -> DictConfig:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no recipe {path}")
    try:
        node = OmegaConf.load(path)
    except YAMLError as exc:
        raise ValueError(f"{path} is not a YAML file: {str(exc).splitlines()[0]}") from exc
    if not isinstance(node, DictConfig):
        raise ValueError(f"{path}: expected sections, got a list")
    include = node.pop("include", None)
    if include is None:
        return node
    return cast(DictConfig, OmegaConf.merge(_read(path.parent / str(include)), node))
