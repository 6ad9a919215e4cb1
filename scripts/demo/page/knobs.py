"""The knobs: a widget for each option, made from its description; few in sight, the others behind.

What a widget holds lies in the page's state under the option's name, so that a link or an earlier
run can set it: see `take`.
"""

import math
import secrets
from collections.abc import Mapping
from typing import Any, cast

import streamlit as st
from PIL import ImageColor

from scripts.demo.page.session import keep, put
from sgm.inference.options import GROUPS, Option, SamplingOptions
from sgm.inference.pictures import Picture
from sgm.inference.specs import ModelSpec
from sgm.serving.limits import Limits, public_options
from sgm.serving.studio import Studio
from sgm.serving.widgets import bounds, has_slider, help_text, is_taken, label, placeholder

WAVE = 20.0  # degrees that the camera rises and falls
NEW_SEEDS = 2**31  # among which a new one is drawn: short enough to read out
BY_THE_PICTURE = ("crop_x", "crop_y")
QUALITIES = {"Quick": 0.4, "Usual": 1.0, "Best": 2.0}  # parts of the model's own steps

Values = dict[str, Any]


def offered(limits: Limits, spec: ModelSpec) -> list[Option]:
    """The options that visitors may set."""
    options = (option for group in GROUPS for option in limits.offered(group))
    return [option for option in options if is_taken(option, spec)]


def plain_options(studio: Studio, spec: ModelSpec, picture: Picture | None) -> SamplingOptions:
    """The options of a visitor who sets nothing: the model's own, cut to what is allowed here.

    Raises:
        ValueError: the model's own size is not.
    """
    plain, limits = SamplingOptions(), studio.limits
    try:
        studio.settings(spec.name, picture, plain)
    except ValueError:
        plain = SamplingOptions(
            num_frames=min(limits.max_frames, spec.num_frames),
            num_steps=min(limits.max_steps, spec.num_steps),
        )
        studio.settings(spec.name, picture, plain)
    return plain


def choose_options(studio: Studio, spec: ModelSpec, picture: Picture | None) -> SamplingOptions:
    """Draw the widgets; what they say.

    Raises:
        ValueError: a text that is no value of its option, or a model that is too large for here.
    """
    limits, plain = studio.limits, plain_options(studio, spec, picture)
    usual = studio.settings(spec.name, picture, plain).options
    options = {option.name: option for option in offered(limits, spec)}
    motion = options.get("motion_bucket_id")
    values = {"motion_bucket_id": _widget(motion, usual, limits)} if motion else {}
    values["num_frames"] = _length(options["num_frames"], usual, limits)
    values["seed"] = _seed(options["seed"], usual, limits)
    _quality(usual, limits)
    panels = {group: st.expander(_title(group), icon=_icon(group)) for group in _panels(spec)}
    if spec.orbit:
        with panels["sv3d"]:
            _path(int(st.session_state.length))
    for name, option in options.items():
        if name not in (*values, *BY_THE_PICTURE):
            group = option.metadata["group"]
            with panels["sv3d" if group == "sv3d" else "expert"]:
                values[name] = _widget(option, usual, limits)
    set_here = {name: value for name, value in values.items() if value is not None}
    return plain.replace(**set_here)


def take(values: Mapping[str, Any], limits: Limits) -> list[str]:
    """Set the widgets; for a callback, or before they are drawn.

    Args:
        values: by the options' names; those not given become their defaults.
        limits: the operator's.

    Returns:
        A line for each value that is more than this page allows.
    """
    complaints = []
    for option in public_options():
        value = values.get(option.name, option.default)
        low, high = bounds(option, limits)
        if isinstance(value, int | float) and high is not None and not low <= value <= high:
            complaints.append(f"{option.name} is {low} to {high} on this page, got {value}")
            value = option.default
        put(option.name, _shown(option, value))
    return complaints


def _panels(spec: ModelSpec) -> list[str]:
    return ["sv3d", "expert"] if spec.orbit else ["expert"]


def _title(group: str) -> str:
    return "Camera" if group == "sv3d" else GROUPS[group]


def _icon(group: str) -> str:
    return ":material/360:" if group == "sv3d" else ":material/tune:"


def _length(option: Option, usual: SamplingOptions, limits: Limits) -> int | None:
    """A slider over the number of frames, at first where the model has it; None if left there."""
    low, high = bounds(option, limits)
    state, known = st.session_state, usual.num_frames
    state.length = min(keep("num_frames", None) or known, high)

    def set_frames() -> None:
        put("num_frames", None if state.length == known else state.length)
        if state.get("path"):  # which has an angle for each frame
            put("elevations_deg", camera_paths(state.length)[state.path])

    st.slider(label(option), low, high, key="length", on_change=set_frames, help=help_text(option))
    return None if state.length == known else int(state.length)


def _seed(option: Option, usual: SamplingOptions, limits: Limits) -> Any:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        seed = _widget(option, usual, limits)
        st.button(
            "New seed",
            key="new_seed",
            icon=":material/casino:",
            on_click=lambda: put("seed", secrets.randbelow(NEW_SEEDS)),
        )
    return seed


def _quality(usual: SamplingOptions, limits: Limits) -> None:
    """A choice that sets the number of steps, which the expert panel shows."""
    known = usual.num_steps or 1
    steps: dict[str, int | None] = {
        name: min(limits.max_steps, max(1, round(part * known))) for name, part in QUALITIES.items()
    }
    steps["Usual"] = None  # what the model itself takes
    asked = keep("num_steps", None)
    state = st.session_state
    state.quality = next((name for name, number in steps.items() if number == asked), None)

    def set_steps() -> None:
        if state.quality is not None:
            put("num_steps", steps[state.quality])

    st.segmented_control(
        "Quality",
        list(steps),
        key="quality",
        on_change=set_steps,
        help="Sets the number of sampling steps, which is also among the expert options: more are "
        "slower and sharper.",
    )


def camera_paths(frames: int) -> dict[str, str]:
    """Ready-made paths of the camera: elevations in degrees, one for all frames or one for each."""
    turns = (2 * math.pi * frame / frames for frame in range(1, frames + 1))
    wave = (round(WAVE * math.sin(turn), 1) + 0.0 for turn in turns)  # + 0.0: no negative zero
    return {"Level": "0", "From above": "30", "Up and down": ", ".join(f"{e:g}" for e in wave)}


def _path(frames: int) -> None:
    """A choice of paths, which sets the elevations."""
    paths, state = camera_paths(frames), st.session_state
    state.path = next((p for p in paths if paths[p] == keep("elevations_deg", None)), None)

    def set_elevations() -> None:
        if state.path is not None:
            put("elevations_deg", paths[state.path])

    st.segmented_control("Path", list(paths), key="path", on_change=set_elevations)


def _widget(option: Option, usual: SamplingOptions, limits: Limits) -> Any:
    """Let the visitor set an option; None, shown as the usual value, leaves it to the model."""
    meta = option.metadata
    keep(option.name, _shown(option, option.default))
    common: Any = {
        "label": label(option),
        "key": option.name,
        "help": help_text(option),
    }
    hint: Any = {"placeholder": placeholder(option, usual)}
    match meta["kind"]:
        case "choice":
            return st.selectbox(options=meta["choices"], index=None, **common, **hint)
        case "integer" | "number":
            return _number(option, limits, common, hint)
        case "colour":
            picked = st.color_picker(**common)
            return option.default if picked == _shown(option, option.default) else picked
        case "switch":
            return st.toggle(**common)
    text = st.text_input(**common, **hint)
    return _numbers(text) if text and meta["kind"] == "numbers" else text or None


def _number(option: Option, limits: Limits, common: Any, hint: Any) -> Any:
    low, high = bounds(option, limits)
    if has_slider(option, limits):
        return st.slider(min_value=low, max_value=high, **common)
    return st.number_input(
        min_value=low,
        max_value=high,
        value=None,
        step=type(low)(option.metadata["step"]),
        format="%d" if isinstance(low, int) else "%g",
        **common,
        **hint,
    )


def _shown(option: Option, value: Any) -> Any:
    """A value of an option as its widget holds it."""
    match option.metadata["kind"]:
        case "colour":
            return "#{:02x}{:02x}{:02x}".format(*ImageColor.getrgb(cast(str, value))[:3])
        case "numbers" if value is not None:
            return ", ".join(f"{number:g}" for number in value)
        case "number" if value is not None:
            return float(value)
    return value


def _numbers(text: str) -> list[float] | str:
    """Numbers parted by commas or blanks; other text as it is, for the options to refuse."""
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        return text
