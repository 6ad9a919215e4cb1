"""The page as a whole: on the left what is asked for, on the right what came of it."""

from dataclasses import dataclass

import streamlit as st

from scripts.demo.page import costs, curves, gallery, inputs, knobs, models, results, running
from scripts.demo.page.session import errors_in_one_line, keep, put, send_again, visitor
from sgm.inference.options import SamplingOptions
from sgm.inference.settings import Settings
from sgm.inference.specs import ModelSpec
from sgm.serving.address import from_query, to_query
from sgm.serving.gallery import Run
from sgm.serving.studio import Order, Studio

PICTURE = "picture"  # name in the address of the sample that is chosen
VIEWS = {
    "history": ":material/history: History",
    "compare": ":material/compare: Compare",
    "curves": ":material/show_chart: Curves",
}


@dataclass(frozen=True)
class Wish:
    """What the left side of the page asks for, as far as it is possible.

    Attributes:
        spec: the model.
        settings: what a run will do.
        order: what the button hands in; None where a picture is missing or refused.
    """

    spec: ModelSpec
    settings: Settings
    order: Order | None


def show_page(studio: Studio) -> None:
    """Draw everything.

    Raises:
        ValueError: there is no model.
    """
    send_again()
    _read_address(studio)
    left, right = st.columns([2, 3], gap="large")
    wish = None
    with left, errors_in_one_line():
        wish = _ask(studio)
    with right:
        # Parts that draw themselves anew need places that never move, made before anything ends.
        button, cost, trouble, tickets, result = (st.container() for _ in range(5))
    with button:
        _run_button(studio, wish)
    running.collect()
    runs = studio.runs(visitor())
    with cost:
        if wish:
            costs.announce_cost(studio, wish.spec.name, wish.settings, len(runs))
    with trouble:
        running.show_trouble()
    with tickets:
        running.show_tickets()
    with result:
        results.show_result(studio, runs)
    st.divider()
    with errors_in_one_line():
        _show_view(wish, runs)


def _read_address(studio: Studio) -> None:
    """Set the widgets to what a link says, when the page is opened; say what cannot be."""
    if "complaints" not in st.session_state:
        query = st.query_params.to_dict()
        version, values, complaints = from_query(query)
        refused = models.refuse_model(studio, version) if version else None
        if version and not refused:
            put("version", version)
        if query.get(PICTURE) in inputs.SAMPLES:
            put("sample", query[PICTURE])
        complaints += [refused] if refused else []
        st.session_state.complaints = complaints + knobs.take(values, studio.limits)
    for complaint in st.session_state.complaints:
        st.warning(complaint, icon=":material/link_off:")


def _write_address(wish: Wish, options: SamplingOptions) -> None:
    query = to_query(wish.spec.name, options)
    if st.session_state.source == "sample" and "sample" in st.session_state:
        query[PICTURE] = st.session_state.sample
    if st.query_params.to_dict() != query:
        st.query_params.from_dict(query)


def _ask(studio: Studio) -> Wish:
    """The left side.

    Raises:
        ValueError: there is no model, or no run with these options.
    """
    with st.container():  # so that what stands below keeps its place, and stays open
        files = inputs.choose_pictures(studio)
    below = st.container()
    with below:
        pictures = inputs.open_pictures(studio, files)
    spec = models.choose_model(studio)
    first = pictures[0] if pictures else None
    options = knobs.choose_options(studio, spec, first)
    settings = studio.settings(spec.name, first, options)
    with below:
        options = inputs.place_pictures(pictures, spec, settings.size, options)
    settings = studio.settings(spec.name, first, options)
    if spec.orbit:
        curves.show_camera(settings)
    seconds, steps = settings.frames / options.fps, settings.options.num_steps
    st.caption(f"A video of {seconds:.1f} s: {settings.frames} frames, in {steps} steps")
    order = Order(spec.name, files, options) if pictures else None
    wish = Wish(spec, settings, order)
    _write_address(wish, options)
    return wish


def _run_button(studio: Studio, wish: Wish | None) -> None:
    order = wish.order if wish else None
    pressed = st.button(
        "Make the video",
        key="make",
        type="primary",
        icon=":material/movie:",
        width="stretch",
        disabled=order is None,
    )
    if pressed and order:
        running.start(studio, order)


def _show_view(wish: Wish | None, runs: list[Run]) -> None:
    """One of the views below, drawn only when it is asked for."""
    keep("view", "history")
    view = st.segmented_control(
        "Look at",
        list(VIEWS),
        format_func=VIEWS.__getitem__,
        key="view",
        required=True,
        label_visibility="collapsed",
    )
    match view:
        case "compare":
            gallery.compare(runs)
        case "curves" if wish:
            curves.show_curves(wish.settings)
        case "history":
            gallery.show_history(runs)
