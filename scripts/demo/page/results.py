"""The result: it plays, can be looked at frame by frame, downloaded, and taken further."""

from functools import partial
from typing import Any

import streamlit as st

from scripts.demo.page import inputs, knobs, running
from scripts.demo.page.session import TROUBLE, errors_in_one_line, put
from sgm.errors import one_line
from sgm.inference.options import SamplingOptions
from sgm.inference.specs import SPECS
from sgm.serving.gallery import FORMATS, Run
from sgm.serving.limits import public_options
from sgm.serving.studio import Order, Studio

SHOWN_PIXELS = 512  # up to which a small video is shown larger
MORE_MOTION, MOST_MOTION = 40, 255


def show_result(studio: Studio, runs: list[Run]) -> None:
    """Show the video that was made last or chosen from the history."""
    run = chosen_run(runs)
    if run is None:
        st.info("The video will appear here.", icon=":material/movie:")
        return
    orbit = SPECS[run.record["version"]].orbit
    film, frames, details = st.tabs(
        [
            ":material/play_circle: Video",
            f":material/360: {'Turntable' if orbit else 'Frame by frame'}",
            ":material/list: Settings",
        ]
    )
    with film, errors_in_one_line():
        play(run, "The video")
        st.caption(summary(run))
    with frames, errors_in_one_line():
        st.fragment(scrub)([run])
    with details:
        st.table(described(run), border="horizontal")
    _downloads(run)
    _further(studio, run)


def chosen_run(runs: list[Run]) -> Run | None:
    """The run that the page shows; None where it has none, or it is gone."""
    shown = st.session_state.get("shown")
    return next((run for run in runs if run.token == shown), None)


def play(run: Run, alt: str) -> None:
    """The video, again and again; ``alt`` says what it is, in other words at each place."""
    mp4, width = run.file("mp4"), shown_width(run)
    st.video(mp4, loop=True, autoplay=True, muted=True, width=width, alt=alt)


def scrub(runs: list[Run]) -> None:
    """One frame of each run, side by side, moved by one slider (the arrow keys as well)."""
    frames = [run.frames() for run in runs]
    last = max(map(len, frames))
    key = "frame_" + "_".join(run.token for run in runs)
    number = st.slider("Frame", 1, last, key=key) if last > 1 else 1
    for column, run, each in zip(st.columns(len(runs)), runs, frames, strict=True):
        index = min(number, len(each)) - 1
        alt = f"Frame {index + 1} of {len(each)}"
        column.image(each[index], width=shown_width(run), alt=alt)


def shown_width(run: Run) -> int:
    """Pixels; small videos are shown larger."""
    options = run.record["options"]
    longer = max(options["height"], options["width"])
    return round(options["width"] * SHOWN_PIXELS / longer)


def summary(run: Run) -> str:
    """A run in a line."""
    options = run.record["options"]
    orbit = SPECS[run.record["version"]].orbit
    motion = "" if orbit else f"motion {options['motion_bucket_id']}, "
    return (
        f"{run.record['version']}, {options['num_frames']} frames of {options['width']} x "
        f"{options['height']}, {options['fps']} frames/s, {motion}"
        f"{options['num_steps']} steps, seed {options['seed']}, "
        f"made in {run.record['seconds']:g} s"
    )


def described(run: Run) -> dict[str, str]:
    """Every setting of a run that is not a matter of this machine's files and devices."""
    options = run.record["options"]
    names = [each.name for each in public_options() if options.get(each.name) is not None]
    made = {"model": run.record["version"]} | {name: _text(options[name]) for name in names}
    return made | {"seconds": f"{run.record['seconds']:g}"}


def asked_by(studio: Studio, run: Run) -> dict[str, Any]:
    """The options that make a run again, without what its model takes by itself.

    Raises:
        ValueError: it is not allowed here any more.
    """
    recorded = {k: v for k, v in run.record["options"].items() if k in _DEFAULTS}
    fixed = {k: v for k, v in recorded.items() if _DEFAULTS[k] is not None}
    picture = None if run.picture is None else studio.open_picture(run.picture)
    spec = SPECS[run.record["version"]]
    plain = knobs.plain_options(studio, spec, picture)
    usual = studio.settings(spec.name, picture, plain.replace(**fixed)).options.to_dict()
    set_here = {k for k, v in plain.to_dict().items() if v is not None}
    if any(recorded[side] != usual[side] for side in _SIDES):  # one side alone would move the other
        usual |= dict.fromkeys(_SIDES)
    return {k: v for k, v in recorded.items() if k in set_here or v != usual[k]}


def use_settings(studio: Studio, run: Run, make: bool = False, **changes: Any) -> None:
    """Set the widgets to what made a run, and take its picture; for a callback.

    Args:
        studio: where it was made.
        run: the earlier one.
        make: also hand in the order at once.
        changes: options that are to be different.
    """
    state = st.session_state
    try:
        asked = asked_by(studio, run) | changes
    except TROUBLE as error:
        state.complaints = [one_line(error)]
        return
    put("version", run.record["version"])
    state.complaints = knobs.take(asked, studio.limits)
    if run.picture is not None:
        inputs.take_earlier(run.picture)
        if make:
            order = Order(run.record["version"], (run.picture,), SamplingOptions(**asked))
            running.start(studio, order)


def _downloads(run: Run) -> None:
    with st.container(horizontal=True):
        for format, mime in FORMATS.items():
            suffix = "zip" if format == "png" else format
            st.download_button(
                "PNG (zip)" if format == "png" else format.upper(),
                partial(run.file, format),
                f"{run.name}.{suffix}",
                mime,
                key=f"download_{format}",
                on_click="ignore",
                icon=":material/download:",
                help=f"Download the video as {format}",
            )


def _further(studio: Studio, run: Run) -> None:
    motion = run.record["options"]["motion_bucket_id"]
    with st.container(horizontal=True):
        st.button(
            "Use these settings",
            key="use_settings",
            icon=":material/settings_backup_restore:",
            on_click=use_settings,
            args=(studio, run),
        )
        if SPECS[run.record["version"]].orbit:
            return
        st.button(
            "Same seed, more motion",
            key="more_motion",
            icon=":material/speed:",
            disabled=run.picture is None or motion >= MOST_MOTION,
            on_click=use_settings,
            args=(studio, run, True),
            kwargs={"motion_bucket_id": min(MOST_MOTION, motion + MORE_MOTION)},
        )


def _text(value: Any) -> str:
    return ", ".join(f"{each:g}" for each in value) if isinstance(value, list) else str(value)


_SIDES = ("height", "width")
_DEFAULTS = {option.name: option.default for option in public_options()}
