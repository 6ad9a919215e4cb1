"""How time and memory grow with frames, size and steps, and how they should."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from scripts.bench.charts import Curve, curves
from scripts.bench.floor import count
from scripts.bench.inputs import inputs_of
from scripts.bench.models import build_engine
from scripts.bench.ours import Ours
from scripts.bench.presets import Case, Growth, Preset
from scripts.bench.report import Results, gigabytes, markdown, seconds
from scripts.bench.timing import Timing, alternate
from sgm.inference.settings import ModelFiles

LAWS = {
    "frames": "arithmetic: linear, and quadratic in what attention over time has of it",
    "side": "arithmetic: quadratic, and to the fourth power in attention over space",
    "steps": "arithmetic: linear, on top of one decoding",
}
_UNITS = {"frames": "frames", "side": "pixels, height = width", "steps": "steps"}
_AXES = {"frames": ("unet", "decode"), "side": ("unet", "decode"), "steps": ("video",)}


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        axis: what grows.
        stage: what is measured.
        value: of the axis.
        seconds: of every call.
        median: of those; None where there are none.
        expected: seconds, from the arithmetic and the time of the largest value measured.
        flops: the arithmetic.
        working_bytes: most memory during a call beyond what was there before; None but on CUDA.
        failure: why there are no times.
    """

    axis: str
    stage: str
    value: int
    seconds: tuple[float, ...]
    median: float | None
    expected: float | None
    flops: float
    working_bytes: int | None
    failure: str | None


def run(preset: Preset, files: ModelFiles, device: torch.device, results: Results) -> bool:
    """Measure this project along every axis, from the preset's case on."""
    case, growth = preset.cases[0], preset.growth
    if growth is None:
        raise ValueError("expected a preset with growth")
    dtype = getattr(torch, case.dtypes[0])
    engine = build_engine(files, device, dtype)
    system = Ours(files, engine, device, dtype, "exact")
    found: dict[tuple[str, str], list[Point]] = {}
    for axis, stages in _AXES.items():
        for value, sized in _cases(case, growth, axis):
            flops = count(files, sized)
            with inputs_of(files, engine, sized, device) as given:
                calls = system.calls(given)
                for stage in stages:
                    timing = alternate({stage: calls[stage]}, device, case.stages[stage])[stage]
                    point = _point(axis, stage, value, timing, flops[stage].exact)
                    found.setdefault((axis, stage), []).append(point)
        results.add(points=[point for each in found.values() for point in with_law(each)])
    points = [point for each in found.values() for point in with_law(each)]
    header = ["stage", "axis", "value", "median", "expected", "working memory"]
    laws = "\n".join(f"- {axis}: {law}" for axis, law in LAWS.items())
    text = f"Points are measured, lines expected:\n\n{laws}\n\n"
    results.show(text + markdown(header, map(_cells, points)), chart(points))
    return True


def with_law(points: list[Point]) -> Iterator[Point]:
    """Points of one axis and stage, with the seconds that are expected from the largest one's."""
    measured = [point for point in points if point.median]
    rate = max((p.value, p.flops / p.median) for p in measured if p.median)[1] if measured else None
    for point in points:
        yield replace(point, expected=point.flops / rate if rate else None)


def chart(points: list[Point]) -> str:
    """A panel for every axis and stage."""
    panels: dict[tuple[str, str], list[Point]] = {(p.axis, p.stage): [] for p in points}
    for point in points:
        if point.median and point.expected:
            panels[point.axis, point.stage].append(point)
    return curves(
        [
            Curve(
                f"{stage}: seconds",
                _UNITS[axis],
                [point.value for point in each],
                [point.median or 0 for point in each],
                [point.expected or 0 for point in each],
            )
            for (axis, stage), each in panels.items()
            if each
        ]
    )


def _cases(case: Case, growth: Growth, axis: str) -> Iterator[tuple[int, Case]]:
    match axis:
        case "frames":
            yield from ((value, replace(case, frames=value)) for value in growth.frames)
        case "side":
            yield from ((value, replace(case, height=value, width=value)) for value in growth.sides)
        case "steps":
            yield from ((value, replace(case, steps=value)) for value in growth.steps)


def _point(axis: str, stage: str, value: int, timing: Timing, flops: float) -> Point:
    memory, failure = timing.working_bytes, timing.failure
    return Point(axis, stage, value, timing.seconds, timing.median, None, flops, memory, failure)


def _cells(point: Point) -> list[str]:
    return [
        *(point.stage, point.axis, str(point.value)),
        seconds(point.median) or point.failure or "",
        seconds(point.expected),
        gigabytes(point.working_bytes),
    ]
