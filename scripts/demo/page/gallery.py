"""Earlier runs: to look at again, and two of them side by side."""

import streamlit as st

from scripts.demo.page.results import described, play, scrub
from scripts.demo.page.session import errors_in_one_line, keep, put
from sgm.inference.videos import Frames
from sgm.serving.gallery import Run

PAGE = 12  # runs that are listed before the visitor asks for more
THUMBNAIL = 128  # pixels, of the longer side


def show_history(runs: list[Run]) -> None:
    """A picture of each run, newest first, with a button that shows it."""
    if not runs:
        st.caption("What you make is listed here.")
        return
    listed = keep("listed", PAGE)
    with st.container(horizontal=True):
        for number, run in enumerate(runs[:listed]):
            with st.container(width=THUMBNAIL + 16, gap="small"), errors_in_one_line():
                label = labels(runs)[run.token]
                st.image(_thumbnail(run.token, run), width=THUMBNAIL, alt=label)
                st.caption(label)
                st.button(
                    "Show", key=f"show_{number}", on_click=_show, args=(run.token,), width="stretch"
                )
    if len(runs) > listed:
        st.button("More", key="more_history", on_click=_list_more)


def compare(runs: list[Run]) -> None:
    """Two runs side by side, with the settings that tell them apart."""
    if len(runs) < 2:
        st.caption("Make two videos, then compare them here.")
        return
    names = labels(runs)
    chosen = []
    for column, key, first in zip(st.columns(2), ("left", "right"), (1, 0), strict=True):
        if st.session_state.get(key) not in names:
            put(key, runs[first].token)
        column.selectbox(key.capitalize(), list(names), format_func=names.__getitem__, key=key)
        run = next(run for run in runs if run.token == st.session_state[key])
        chosen.append(run)
        with column, errors_in_one_line():
            play(run, f"The video on the {key}")
    with errors_in_one_line():
        st.fragment(scrub)(chosen)
    left, right = map(described, chosen)
    differing = [name for name in {**left, **right} if left.get(name) != right.get(name)]
    st.table(
        {
            "setting": differing,
            "left": [left.get(name, "") for name in differing],
            "right": [right.get(name, "") for name in differing],
        },
        border="horizontal",
        hide_index=True,
    )


def labels(runs: list[Run]) -> dict[str, str]:
    """A short name for each run, by its token: numbered as they were made."""
    return {
        run.token: f"{len(runs) - place}: motion {run.record['options']['motion_bucket_id']}, "
        f"seed {run.record['options']['seed']}"
        for place, run in enumerate(runs)
    }


@st.cache_resource(max_entries=256, show_spinner=False)
def _thumbnail(token: str, _run: Run) -> Frames:  # noqa: ARG001 - the token is the key
    frames = _run.frames()
    middle = frames[len(frames) // 2]
    step = max(1, max(middle.shape[:2]) // (2 * THUMBNAIL))
    return middle[::step, ::step].copy()


def _show(token: str) -> None:
    st.session_state.shown = token


def _list_more() -> None:
    st.session_state.listed += PAGE
