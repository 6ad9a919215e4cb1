"""What the widget of an option shows, whichever toolkit draws it."""

from typing import Any

from sgm.inference.options import Option, SamplingOptions, expected
from sgm.inference.specs import ModelSpec
from sgm.serving.limits import Limits

LARGEST_INTEGER = 2**53 - 1  # that a browser holds exactly
SLIDER_STEPS = 256  # a longer range is typed

IGNORED_IN_ORBITS = ("motion_bucket_id", "fps_id")  # SV3D is told the camera's angles instead
_NAMES = {
    "motion_bucket_id": "Motion",
    "num_frames": "Length",
    "num_steps": "Steps",
    "fps": "Frame rate",
}


def is_taken(option: Option, spec: ModelSpec) -> bool:
    """Whether an option means something to a model."""
    if option.metadata["group"] == "sv3d":
        return spec.orbit
    return not (spec.orbit and option.name in IGNORED_IN_ORBITS)


def label(option: Option) -> str:
    """The option's name in plain words, with its unit: ``Height (pixels)``."""
    plain = option.name.removesuffix("_deg").replace("_", " ").capitalize()
    name, unit = _NAMES.get(option.name, plain), option.metadata["unit"]
    return f"{name} ({unit})" if unit and not name.lower().endswith(unit) else name


def help_text(option: Option) -> str:
    """What the option does, and which values it takes."""
    return f"{option.metadata['help']} Takes {expected(option)}."


def placeholder(option: Option, usual: SamplingOptions) -> str:
    """What an empty widget stands for.

    Args:
        option: of the widget.
        usual: the options of the chosen model, where it decides.
    """
    unset = option.metadata["unset"]
    known = getattr(usual, option.name) if unset == "the model's" else None
    return str(unset if known is None else known)


def bounds(option: Option, limits: Limits) -> tuple[Any, Any]:
    """Lowest and highest value of a number on this page; None for what is no number."""
    meta = option.metadata
    if meta["kind"] not in ("integer", "number"):
        return None, None
    allowed = {
        "num_frames": limits.max_frames,
        "num_steps": limits.max_steps,
        "videos_per_image": limits.max_videos,
    }
    number: Any = int if meta["kind"] == "integer" else float
    high = min(meta["max"], LARGEST_INTEGER, allowed.get(option.name, LARGEST_INTEGER))
    return number(meta["min"]), number(high)


def has_slider(option: Option, limits: Limits) -> bool:
    """Whether the option's numbers are few enough to slide over, and one is always set."""
    low, high = bounds(option, limits)
    return low is not None and option.default is not None and 0 < high - low < SLIDER_STEPS
