"""A page's settings as the query of its address, so that a link reproduces the page.

A link may come from anybody: it names no file and no device, and a bad value is left out.
"""

from collections.abc import Mapping
from textwrap import shorten
from typing import Any

from sgm.inference.flags import Request
from sgm.inference.options import SamplingOptions
from sgm.inference.specs import get_spec
from sgm.serving.limits import public_options

LONGEST_COMPLAINT = 300  # characters; an address can hold far more

_OPTIONS = {each.name: each for each in public_options()}


def to_query(version: str, options: SamplingOptions) -> dict[str, str]:
    """The model's name, and those options that differ from their defaults, as texts."""
    values = ((name, getattr(options, name), each.default) for name, each in _OPTIONS.items())
    changed = {name: _text(value) for name, value, default in values if value != default}
    return {"version": version, **changed}


def from_query(query: Mapping[str, str]) -> tuple[str | None, dict[str, Any], list[str]]:
    """What an address says; never raises. Names that mean nothing here are passed over.

    Returns:
        The model's name, if it says one; values for :class:`SamplingOptions` by name; and a line
        for each value that is refused.
    """
    version: str | None = None
    values: dict[str, Any] = {}
    complaints: list[str] = []
    for name, text in query.items():
        try:
            if name == "version":
                version = get_spec(text).name
            elif name in _OPTIONS:
                values |= _value(name, text)
        except ValueError as error:
            complaints.append(shorten(str(error), LONGEST_COMPLAINT))
    return version, values, complaints


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _value(name: str, text: str) -> dict[str, Any]:
    """The checked value by its name; nothing where the text stands for the default."""
    given = Request.from_texts([], {name: text}).options
    checked = SamplingOptions.from_dict(given)
    return {each: getattr(checked, each) for each in given}
