"""Small helpers that every layer may use; imports torch alone."""

import difflib
import inspect
from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def default(value: T | None, fallback: T) -> T:
    """Return ``value``, or ``fallback`` where ``value`` is None."""
    return fallback if value is None else value


def append_dims(x: torch.Tensor, ndim: int) -> torch.Tensor:
    """View ``x`` with trailing dimensions of size 1, so that it broadcasts with ``ndim`` ones.

    Raises:
        ValueError: ``x`` already has more than ``ndim`` dimensions.
    """
    if x.ndim > ndim:
        raise ValueError(f"expected a tensor of at most {ndim} dimensions, got {x.ndim}")
    return x[(...,) + (None,) * (ndim - x.ndim)]


def counted(items: Iterable[str], noun: str, state: str, listed: int = 3) -> str:
    """Say how many there are, and name some: ``4 keys missing (a, b, c, ...)``; nothing for none.

    Args:
        items: their names; one that is there twice counts once.
        noun: what one of them is.
        state: what is said of them.
        listed: how many are named at most.
    """
    names = list(dict.fromkeys(items))
    if not names:
        return ""
    more = ", ..." if len(names) > listed else ""
    number = noun if len(names) == 1 else f"{noun}s"
    return f"{len(names)} {number} {state} ({', '.join(names[:listed])}{more})"


def refuse_unknown(owner: object, given: Mapping[str, Any], ignored: Collection[str]) -> None:
    """Refuse parameters other than those that published YAML files name and that have no effect.

    Raises:
        ValueError: names the first unknown parameter, and the one it resembles.
    """
    for name in given:
        if name not in ignored:
            close = difflib.get_close_matches(name, [*ignored, *_parameters(owner)], n=1)
            hint = f": did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{type(owner).__name__} has no parameter {name!r}{hint}")


def _parameters(owner: object) -> list[str]:
    return list(inspect.signature(type(owner)).parameters)


def get_obj_from_str(path: str) -> Any:
    """Import the object that a dotted path such as ``sgm.models.diffusion.DiffusionEngine`` names.

    Raises:
        ValueError: the module or the name in it does not exist.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(f"expected a dotted path such as 'package.module.Class', got {path!r}")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not f"{module}.".startswith(f"{exc.name}."):
            raise  # a dependency of the module is missing: that is the message to show
        raise ValueError(f"unknown target {path!r}: there is no module {exc.name!r}") from exc
    except AttributeError as exc:
        raise ValueError(f"unknown target {path!r}: {module!r} has no {name!r}") from exc


def instantiate_from_config(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build the object that ``config`` describes: ``{"target": dotted path, "params": {...}}``.

    Args:
        config: a mapping with ``target`` and, optionally, ``params``; plain or from OmegaConf.
        extra: keyword arguments added to ``params``.

    Raises:
        ValueError: ``target`` is missing or unknown, or does not take the parameters.
    """
    if "target" not in config:
        raise ValueError(f"expected a config with the key 'target', got the keys {sorted(config)}")
    target = str(config["target"])
    params = dict(config.get("params") or {}) | extra
    obj = get_obj_from_str(target)
    try:
        return obj(**params)
    except TypeError as exc:
        if exc.__traceback__ is not None and exc.__traceback__.tb_next is not None:
            raise  # raised inside the constructor: not a matter of the parameters' names
        raise ValueError(f"{target}: {exc}") from exc
