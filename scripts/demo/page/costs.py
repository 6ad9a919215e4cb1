"""What a video will take, in a line above the run; found out beside the page, which goes on."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import streamlit as st

from scripts.demo.page.session import TROUBLE, keep
from sgm.checkpoint.room import in_bytes
from sgm.errors import one_line
from sgm.inference.progress import duration
from sgm.inference.settings import Settings
from sgm.serving.costs import Cost
from sgm.serving.studio import Studio

POLL_SECONDS = 0.5
AT_ONCE_SECONDS = 0.2  # in which what was counted before is estimated again


@st.cache_resource(show_spinner=False)
def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "costs")


def announce_cost(studio: Studio, version: str, settings: Settings, videos: int) -> None:
    """Show what each video of a run will take, as soon as that is known.

    Args:
        studio: which will make it.
        version: name of the model.
        settings: of the run.
        videos: made so far: with each the studio knows better.
    """
    asked = (version, settings, videos)
    known, future = keep("cost", (None, Future()))
    if known != asked:
        future.cancel()  # of what is asked for no longer, unless it has begun
        future = _worker().submit(studio.cost, settings, version)
        st.session_state.cost = asked, future
        wait([future], AT_ONCE_SECONDS)
    if future.done():
        st.session_state.pop("estimating", None)
    st.fragment(run_every=None if future.done() else POLL_SECONDS)(_look)()


def _future() -> "Future[Cost]":
    future: Any = st.session_state.cost[1]
    return future


def _look() -> None:
    if not _future().done():
        st.caption("Estimating time and memory …")
        # The whole page is drawn once more when it is known, so that the looking ends.
        st.session_state.estimating = True
        return
    if st.session_state.pop("estimating", False):
        st.rerun()
    try:
        _show(_future().result())
    except TROUBLE as error:
        st.caption(one_line(error))


def _show(cost: Cost) -> None:
    source = "as measured here" if cost.measured else "a rough estimate"
    memory = f"{in_bytes(cost.bytes)} of memory, {in_bytes(cost.free_bytes)} free"
    text = f"About {duration(cost.seconds)} a video, {source}; {memory}"
    if cost.bytes > cost.free_bytes:
        st.warning(f"{text}: it may not fit, so try fewer frames or a smaller size")
    else:
        st.caption(text)
