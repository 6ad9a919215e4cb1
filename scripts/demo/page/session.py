"""What the page keeps: one studio for all, and for each visitor a name and what they chose."""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import streamlit as st

from sgm.errors import one_line
from sgm.serving.limits import Limits
from sgm.serving.studio import Studio

SENDING_SECONDS = 10.0  # in which a browser has drawn what it was sent
TROUBLE = (ValueError, OSError, MemoryError)  # what a visitor or the operator can mend


@st.cache_resource(show_spinner=False)
def open_studio(settings: Path | None) -> Studio:
    """The studio of this server: made by the first visitor, shared by all.

    Raises:
        ValueError: the operator's settings file is wrong.
    """
    return Studio(Limits.read(settings))


def visitor() -> str:
    """The name under which the studio knows this page: 32 random hexadecimal digits."""
    return str(keep("visitor", secrets.token_hex(16)))


def keep(name: str, first: Any) -> Any:
    """What the page keeps under a name; ``first`` where that is nothing yet."""
    if name not in st.session_state:
        put(name, first)
    return st.session_state[name]


def put(name: str, value: Any) -> None:
    """Set what the page keeps under a name: of a widget, before it is drawn or in a callback."""
    st.session_state[name] = value
    st.session_state.setdefault("fresh_values", {})[name] = value, time.monotonic()


def send_again() -> None:
    """Send the widgets once more what was `put` of late; before they are drawn.

    Streamlit sends a value that was set with the next drawing alone. A busy browser may pass over
    that drawing, where a quick click has asked for another: its widget would show, and later give,
    what one has for which no value was set. Where the value is another by now, it was seen.
    """
    state, now = st.session_state, time.monotonic()
    for name, (value, put_at) in list(state.get("fresh_values", {}).items()):
        if now - put_at < SENDING_SECONDS and name in state and state[name] == value:
            state[name] = value
        else:
            del state.fresh_values[name]


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Show what can be mended as one line of the page."""
    try:
        yield
    except TROUBLE as error:
        st.error(one_line(error), icon=":material/error:")
