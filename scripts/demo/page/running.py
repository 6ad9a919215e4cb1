"""The run: its button, its place in the queue, its progress, a first sight of it, its end.

Nothing here waits: a fragment looks at the tickets now and then and says that they are wanted.
"""

from base64 import b64encode
from io import BytesIO
from math import ceil
from typing import Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray
from PIL import Image

from scripts.demo.page.session import TROUBLE, keep, visitor
from sgm.errors import one_line
from sgm.serving.queue import Cancelled, Ticket
from sgm.serving.reporting import in_words
from sgm.serving.studio import Order, Studio

POLL_SECONDS = 0.7
SHEET = 16 / 9  # proportions of the sheet of preview frames


def start(studio: Studio, order: Order) -> None:
    """Hand an order in; what is refused is said where progress would be, what was is forgotten."""
    keep("tickets", [])
    st.session_state.trouble, st.session_state.complaints = "", []
    try:
        st.session_state.tickets.append(studio.submit(visitor(), order))
    except TROUBLE as error:
        st.session_state.trouble = one_line(error)


def show_trouble() -> None:
    """Say what went wrong with the last order."""
    if keep("trouble", ""):
        st.error(st.session_state.trouble, icon=":material/error:")


def show_tickets() -> None:
    """Show all orders of this page that are not done, and keep looking at them."""
    if keep("tickets", []):
        st.session_state.drawing_all = True
        st.fragment(run_every=POLL_SECONDS)(_look)()


def _look() -> None:
    """One look at the tickets; the whole page is drawn anew when one is done."""
    tickets: list[Ticket] = st.session_state.tickets
    # Not while it is being drawn, which would leave it half drawn: the next look sees it as well.
    drawing_all = st.session_state.pop("drawing_all", False)
    for number, ticket in enumerate(tickets):
        ticket.touch()
        if ticket.finished and not drawing_all:
            st.rerun()
        _show_ticket(ticket, number)


def collect() -> None:
    """Take the results of finished tickets; before anything shows results."""
    tickets: list[Ticket] = keep("tickets", [])
    for ticket in [each for each in tickets if each.finished]:
        tickets.remove(ticket)
        try:
            runs = ticket.result()
        except Cancelled:
            st.toast("Cancelled", icon=":material/cancel:")
        except Exception as error:  # noqa: BLE001 - whatever ended the run is said in one line
            st.session_state.trouble = one_line(error)
        else:
            st.session_state.shown = runs[0].token
            st.session_state.fresh = [run.token for run in runs]


def _show_ticket(ticket: Ticket, number: int) -> None:
    with st.container(border=True, key=f"ticket_{number}"):
        progress = ticket.progress
        st.progress(progress.fraction if progress else 0.0, in_words(ticket.position, progress))
        if progress and progress.preview is not None:
            st.html(_inline(sheet(progress.preview), "The frames so far, roughly"))
        called_off = ticket.cancelled
        st.button(
            "Cancelling" if called_off else "Cancel",
            key=f"cancel_{number}",
            icon=":material/cancel:",
            on_click=ticket.cancel,
            disabled=called_off,
        )


def _inline(picture: NDArray[Any], alt: str) -> str:
    """A picture in the text of the page: a file could be gone before the browser asks for it."""
    file = BytesIO()
    Image.fromarray(picture).save(file, "webp")
    source = b64encode(file.getvalue()).decode()
    return f'<img alt="{alt}" style="width: 100%" src="data:image/webp;base64,{source}">'


def sheet(frames: NDArray[Any]) -> NDArray[Any]:
    """Frames (t, h, w, 3) side by side in rows, uint8 (H, W, 4); what is left over is clear."""
    t, h, w, _ = frames.shape
    columns = min(t, max(1, round((SHEET * t * h / w) ** 0.5)))
    rows = ceil(t / columns)
    cells = np.zeros((rows * columns, h, w, 4), np.uint8)
    cells[:t, ..., :3], cells[:t, ..., 3] = frames, 255
    grid = cells.reshape(rows, columns, h, w, 4).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * h, columns * w, 4)
