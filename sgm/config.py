"""Types of the values in a config, checked before anything is built from them.

A config is a tree of mappings and lists; ``{"target": dotted path, "params": {...}}`` anywhere in
it describes an object (see `sgm.util.instantiate_from_config`). What the constructor's annotations
say of a parameter is what its value is held against.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from reprlib import repr as short_repr
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sgm.util import get_obj_from_str, instantiate_from_config

_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
}
# What a constructor raises at a value of the right type that makes no sense to it.
_REFUSALS = (TypeError, RuntimeError, LookupError, AttributeError, ArithmeticError)


def check_types(config: Any, path: str) -> None:
    """Check the parameters of every object that ``config`` describes.

    Args:
        config: a tree of plain mappings, lists and values.
        path: its place in the YAML, such as ``model``.

    Raises:
        ValueError: names the place of the first value of a wrong type, and what is expected.
    """
    if isinstance(config, Mapping):
        if "target" in config:
            _check_described(config, path)
        for name, value in config.items():
            check_types(value, f"{path}.{name}")
    elif isinstance(config, list | tuple):
        for i, value in enumerate(config):
            check_types(value, f"{path}[{i}]")


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any], path: str) -> None:
    """Check the types of keyword arguments against the annotations of a function or class.

    Raises:
        ValueError: as :func:`check_types`.
    """
    hints = _hints(function)
    for name, value in given.items():
        hint = hints.get(name, Any)
        if not _fits(value, hint):
            raise ValueError(f"{path}.{name}: expected {_words(hint)}, got {short_repr(value)}")


def build(config: Mapping[str, Any], path: str) -> Any:
    """Build the object that ``config`` describes, as `instantiate_from_config`, of checked types.

    Raises:
        ValueError: names the place of a value of a wrong type, or ``path`` as `construct` does.
    """
    check_types(config, path)
    return construct(config, path)


def construct(config: Mapping[str, Any], path: str) -> Any:
    """Build the object that ``config`` describes, as `instantiate_from_config`.

    Raises:
        ValueError: names ``path`` where a constructor refuses what it is given.
    """
    try:
        return instantiate_from_config(config)
    except _REFUSALS as exc:
        reason = str(exc).partition("\n")[0]
        raise ValueError(f"{path}: {config['target']} cannot be built: {reason}") from exc


def _check_described(config: Mapping[str, Any], path: str) -> None:
    params = config.get("params")
    if not isinstance(params, Mapping | None):
        raise ValueError(f"{path}.params: expected names and values, got {short_repr(params)}")
    try:
        described = get_obj_from_str(str(config["target"]))
    except (ValueError, ImportError):
        return  # building it says what is wrong with the target
    check_arguments(described, params or {}, f"{path}.params")


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations by parameter; of a class those of its bases too, as ``**params`` go to them."""
    classes = reversed(inspect.getmro(function)) if isinstance(function, type) else ()
    hints: dict[str, Any] = {}
    for each in [cls.__dict__.get("__init__") for cls in classes] or [function]:
        try:
            hints |= get_type_hints(each) if inspect.isfunction(each) else {}
        except (NameError, TypeError):  # names that its module imports for type checkers alone
            continue
    return hints


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can stand for ``hint``; true where the hint is no plain type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in args)
    if origin is Literal:
        return value in args
    if _is_a(origin, Mapping):
        return isinstance(value, Mapping)
    if _is_a(origin, Iterable):
        item = args[0] if args else Any
        return isinstance(value, list | tuple) and all(_fits(each, item) for each in value)
    if isinstance(value, bool) and hint in (int, float):
        return False
    return hint not in _WORDS or isinstance(value, int | float if hint is float else hint)


def _words(hint: Any) -> str:
    """A hint for people, such as ``an integer or null``."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_words, args)))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if _is_a(origin, Mapping):
        return "names and values"
    if _is_a(origin, Iterable):
        return f"a list (each {_words(args[0])})" if args else "a list"
    return _WORDS.get(hint, "another value")


def _is_a(origin: Any, kind: type) -> bool:
    return isinstance(origin, type) and issubclass(origin, kind)
