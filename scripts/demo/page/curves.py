"""What the run will do, drawn: noise levels, guidance over the frames, the path of the camera."""

import math
from typing import Any

import streamlit as st

from sgm.inference.settings import Settings
from sgm.serving.curves import CameraPath, camera_path, guidance, noise_levels

HEIGHT = 240  # pixels
LOOK_DOWN = math.radians(25)
GREY = "#888888"  # seen in the light and the dark theme

Spec = dict[str, Any]  # of a Vega-Lite chart; layers hold their data, which is there from the start


def show_curves(settings: Settings) -> None:
    """The noise schedule, and the guidance of each frame."""
    left, right = st.columns(2)
    with left:
        st.markdown("**Noise level at each step**")
        levels = noise_levels(settings)[:-1]  # the last is 0, which no logarithmic axis has
        _line("step", "noise level", levels, {"type": "log"})
    with right:
        st.markdown("**Guidance of each frame**")
        scales = guidance(settings, settings.frames)
        if scales is None:
            st.caption("This run has no guidance.")
        else:
            _line("frame", "guidance", scales, {"zero": False})


def show_camera(settings: Settings) -> None:
    """The camera's path around the object, to be turned."""
    st.markdown("**Path of the camera**")
    st.fragment(_camera)(camera_path(settings))


def _line(x: str, y: str, values: list[float], scale: Spec) -> None:
    rows = [{x: number, y: value} for number, value in enumerate(values, 1)]
    layer = {
        "data": {"values": rows},
        "mark": {"type": "line", "point": True, "tooltip": True},
        "encoding": {
            "x": {"field": x, "type": "quantitative", "axis": {"tickMinStep": 1, "format": "d"}},
            "y": {"field": y, "type": "quantitative", "scale": scale},
        },
    }
    st.vega_lite_chart(spec={"layer": [layer], "height": HEIGHT}, width="stretch")


def _camera(path: CameraPath) -> None:
    turn = math.radians(st.slider("Look from", 0, 360, 30, format="%d°", key="look_from"))
    circle = (math.radians(degrees) for degrees in range(0, 361, 5))
    horizon = [(math.cos(angle), math.sin(angle), 0.0) for angle in circle]
    frame = {"field": "frame", "type": "quantitative", "scale": {"scheme": "viridis"}}
    frame["legend"] = {"orient": "bottom", "gradientLength": 200}
    layers = [
        _points(horizon, turn, {"type": "line", "strokeDash": [4, 4], "color": GREY}),
        _points([(0, 0, 0)], turn, {"type": "square", "size": 400, "color": GREY}),
        _points(path.xyz, turn, {"type": "line", "color": GREY}),
        _points(path.xyz, turn, {"type": "circle", "size": 90, "opacity": 1}, color=frame),
        _points(
            path.xyz[-1:], turn, {"type": "text", "text": "the picture", "dy": 18, "color": GREY}
        ),
    ]
    st.vega_lite_chart(spec={"layer": layers, "width": 300, "height": 300}, width="content")


def _points(
    points: list[tuple[float, float, float]], turn: float, mark: Spec, **encoding: Spec
) -> Spec:
    """A layer of points in space, numbered from 1, seen from the direction ``turn``."""
    flat = [_projected(point, turn) for point in points]
    rows = [{"x": x, "y": y, "frame": number} for number, (x, y) in enumerate(flat, 1)]
    axis = {"type": "quantitative", "axis": None, "scale": {"domain": [-1.2, 1.2]}}
    order = {"field": "frame", "type": "quantitative"}
    fixed = {"x": {"field": "x", **axis}, "y": {"field": "y", **axis}, "order": order}
    return {"data": {"values": rows}, "mark": mark, "encoding": fixed | encoding}


def _projected(point: tuple[float, float, float], turn: float) -> tuple[float, float]:
    """Where a point is seen from the direction ``turn``, from a little above."""
    x, y, z = point
    right = math.cos(turn) * y - math.sin(turn) * x
    near = math.cos(turn) * x + math.sin(turn) * y
    return right, math.cos(LOOK_DOWN) * z - math.sin(LOOK_DOWN) * near
