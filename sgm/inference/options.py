"""The options of one sampling run, checked on construction.

`SamplingOptions` is the only description of an option in the project: the command line's help, the
widgets of the Streamlit page and the table of the README are all made from the metadata of its
fields. The module imports neither torch nor Pillow, so help and argument errors answer at once.
"""

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import PurePath
from textwrap import TextWrapper
from typing import Any, Self

from sgm.inference.levels import DEFAULT_LEVEL, LEVELS

GUIDANCE_SHAPES = ("constant", "linear", "triangle", "trapezoid", "none")
SAMPLERS = ("euler", "heun", "euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_2m", "lms", "lcm")
MEMORY_MODES = ("auto", "high", "low", "min")
DTYPES = ("float32", "float16", "bfloat16")
FITS = ("cover", "contain", "stretch")
OUTPUTS = ("frames", "numpy", "tensor", "latents")

GROUPS = {"basic": "Options", "expert": "Expert options", "sv3d": "Options of the SV3D models"}
# Options of the group "python" are the pipeline's alone: no front end offers them.


def _option(kind: str, help: str, default: Any = None, group: str = "basic", **more: Any) -> Any:
    """A dataclass field whose metadata always has the same keys.

    ``unset`` says in words what a default of `None` stands for.
    """
    metadata = {"kind": kind, "help": help, "group": group, "unset": "the model's"}
    absent = dict.fromkeys(("unit", "min", "max", "step", "choices"))
    return field(default=default, metadata={**absent, **metadata, **more})


def _integer(help: str, **more: Any) -> Any:
    return _option("integer", help, **{"step": 1, **more})


def _number(help: str, **more: Any) -> Any:
    return _option("number", help, **more)


def _switch(help: str) -> Any:
    return _option("switch", help, default=False)


def _choice(help: str, choices: Sequence[str], **more: Any) -> Any:
    return _option("choice", help, choices=tuple(choices), **more)


@dataclass(frozen=True)
class SamplingOptions:
    """What one sampling run is asked to do.

    Every value is checked and brought to its type on construction: ``num_steps=25.0`` becomes 25,
    a number for ``elevations_deg`` becomes a tuple of one. `None` always means the default; where
    the default itself is `None`, the YAML file and then the model's row decide. The help, unit and
    range of each option stand in the metadata of its field: see `describe` and `option_table`.

    Raises:
        ValueError: in one line, with the option's name, what it expects and what came.
    """

    num_frames: int | None = _integer("Length of the video.", unit="frames", min=1, max=1024)
    num_steps: int | None = _integer(
        "Sampling steps; more are slower and sharper.", unit="steps", min=1, max=1000
    )
    height: int | None = _integer("Height of the video.", unit="pixels", min=64, max=8192, step=64)
    width: int | None = _integer("Width of the video.", unit="pixels", min=64, max=8192, step=64)
    seed: int = _integer(
        "Number that all random draws follow from: same seed, same video.",
        default=23,
        min=0,
        max=2**63 - 1,
    )
    fps: int = _integer(
        "Frame rate of the file, which also conditions the model (with fps - 1, as in training).",
        default=7,
        unit="frames/s",
        min=1,
        max=240,
    )
    motion_bucket_id: int = _integer(
        "How much moves: about 20 is calm, 127 usual, 230 lively.", default=127, min=0, max=255
    )
    min_guidance: float | None = _number(
        "Guidance where it is weakest: at the first frame of 'linear', at the ends of the others.",
        min=0,
        max=100,
        step=0.1,
    )
    max_guidance: float | None = _number(
        "Guidance where it is strongest; the only value of 'constant'.", min=0, max=100, step=0.1
    )
    fit: str = _choice(
        "How the picture meets the size: crop it, pad with the background, or distort.",
        FITS,
        default="cover",
    )
    crop_x: float = _number(
        "Where the crop lies, or the picture in its padding: 0 is left, 0.5 the centre, 1 right.",
        default=0.5,
        min=0,
        max=1,
        step=0.01,
    )
    crop_y: float = _number(
        "Where the crop lies, or the picture in its padding: 0 is the top, 1 the bottom.",
        default=0.5,
        min=0,
        max=1,
        step=0.01,
    )
    background: str = _option(
        "colour", "Colour behind a transparent picture and of padding.", default="white"
    )
    videos_per_image: int = _integer("Videos made from each picture.", default=1, min=1, max=1024)
    watermark: bool = _switch(
        "Hide a mark of 48 bits in every frame, by which programs tell that a model made it."
    )

    guidance_shape: str | None = _choice(
        "How guidance varies over the frames.", GUIDANCE_SHAPES, group="expert"
    )
    sampler: str | None = _choice("Solver of the sampling equation.", SAMPLERS, group="expert")
    cond_aug: float | None = _number(
        "Standard deviation of the noise put on the input picture (range -1 to 1).",
        group="expert",
        min=0,
        max=10,
        step=0.01,
    )
    fps_id: int | None = _integer(
        "Frame rate that the model is told, less one; overrides fps there, not in the file.",
        group="expert",
        min=0,
        max=239,
        unset="fps - 1",
    )
    decoding_t: int | None = _integer(
        "Frames decoded at once; fewer need less memory and change the pixels slightly.",
        group="expert",
        unit="frames",
        min=1,
        max=1024,
    )
    dtype: str | None = _choice(
        "Number type of the network's weights and arithmetic.",
        DTYPES,
        group="expert",
        unset="the best that the device is fast in",
    )
    device: str | None = _option(
        "device", "Where to compute.", group="expert", unset="the fastest there is"
    )
    optimize: str | None = _choice(
        f"How the networks compute: {'; '.join(f'{v.about} ({k})' for k, v in LEVELS.items())}.",
        tuple(LEVELS),
        group="expert",
        unset=DEFAULT_LEVEL,
    )
    memory: str | None = _choice(
        "How much of a CUDA device to take: all at once (high), less and slower (low, min), or the "
        "fastest that fits (auto).",
        MEMORY_MODES,
        group="expert",
        unset="auto",
    )
    lora: tuple[str, ...] | None = _option(
        "files",
        "LoRA files to add to the weights, each with how much of it: FILE or FILE:0.8.",
        group="expert",
        unset="none",
    )
    safety_filter: str | None = _option(
        "path",
        "Folder with the weights of CLIP and of two heads that judge every frame; a video that "
        "they flag is blurred.",
        group="expert",
        unset="off",
    )
    output: str = _choice(
        "What the pipeline returns: 8-bit frames, float arrays or tensors, or undecoded latents.",
        OUTPUTS,
        default="frames",
        group="python",
    )

    elevations_deg: tuple[float, ...] | None = _option(
        "numbers",
        "Height of the camera over the object's horizon: one angle, or one for each frame.",
        group="sv3d",
        unit="degrees",
        min=-90,
        max=90,
        step=1.0,
    )
    azimuths_deg: tuple[float, ...] | None = _option(
        "numbers",
        "Angles of the camera around the object, one for each frame.",
        group="sv3d",
        unit="degrees",
        min=-3600,
        max=3600,
        step=1.0,
    )
    image_frame_ratio: float | None = _number(
        "Longer side of the cut-out object in parts of the frame's side.",
        group="sv3d",
        min=0.01,
        max=1,
        step=0.01,
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            checked = option.default if value is None else _check(option, value)
            object.__setattr__(self, option.name, checked)

    def replace(self, **changes: Any) -> Self:
        """A copy with some options changed; the changes are checked as in `from_dict`."""
        _refuse_unknown(changes)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All options by name, in values that JSON can hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Options from names and values.

        Raises:
            ValueError: for an unknown name (with the closest known ones) or a refused value.
        """
        _refuse_unknown(values)
        return cls(**values)


Option = Field[Any]


def option_fields(group: str | None = None) -> list[Option]:
    """The fields of `SamplingOptions`, in order; all, or those of one group."""
    return [f for f in fields(SamplingOptions) if group in (None, f.metadata["group"])]


def expected(option: Option) -> str:
    """The values that an option takes, in words, such as ``an integer from 1 to 1024``."""
    meta = option.metadata
    match meta["kind"]:
        case "choice":
            return "one of " + ", ".join(meta["choices"])
        case "colour":
            return "a colour such as white or #ffcc00"
        case "device":
            return "a device such as cpu, cuda, cuda:1 or mps"
        case "files":
            return "a file or several, with commas between"
        case "path":
            return "a folder"
        case "switch":
            return "true or false"
    noun = {"integer": "an integer", "number": "a number", "numbers": "a number or a list of them"}
    top = "2^63 - 1" if meta["max"] == 2**63 - 1 else meta["max"]
    return f"{noun[meta['kind']]} from {meta['min']} to {top}"


def describe(width: int = 100) -> str:
    """The options of the command line as plain text for a terminal of ``width`` columns."""
    wrapper = TextWrapper(width=width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(_describe_groups(wrapper))


def option_table() -> str:
    """All options as the rows of a Markdown table, its head included."""
    head = ["| option | default | values | meaning |", "|---|---|---|---|"]
    rows = (
        f"| `{f.name}` | {_default(f)} | {_range(f)} | {f.metadata['help']} |"
        for f in option_fields()
    )
    return "\n".join([*head, *rows])


def _describe_groups(wrapper: TextWrapper) -> Iterator[str]:
    for group, title in GROUPS.items():
        yield f"{title}:"
        for f in option_fields(group):
            yield f"  --{f.name}  (default: {_default(f)})"
            yield wrapper.fill(f"{f.metadata['help']} Takes {_range(f)}.")
        yield ""


def _default(option: Option) -> str:
    if option.default is None:
        return str(option.metadata["unset"])
    switch = option.metadata["kind"] == "switch"
    return str(option.default).lower() if switch else str(option.default)


def _range(option: Option) -> str:
    unit = option.metadata["unit"]
    return expected(option) + (f" {unit}" if unit else "")


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    known = [f.name for f in fields(SamplingOptions)]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"unknown option {name!r}; {hint}")


def _check(option: Option, value: Any) -> Any:
    """The value in the option's own type, or a `ValueError` that says what was expected."""
    meta = option.metadata
    try:
        match meta["kind"]:
            case "integer" | "number":
                return _check_number(meta, value)
            case "numbers":
                return _check_numbers(meta, value)
            case "files":
                return _check_files(value)
            case "path":
                return _check_path(value)
            case "switch":
                return _check_switch(value)
            case kind:
                return _check_text(kind, meta["choices"], value)
    except (TypeError, ValueError):
        wanted, came = expected(option), reprlib.repr(value)
        raise ValueError(f"{option.name} must be {wanted}, got {came}") from None


def _check_number(meta: Mapping[str, Any], value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError
    number = int(value) if isinstance(value, Integral) else float(value)
    if not meta["min"] <= number <= meta["max"]:  # also false for not-a-number
        raise ValueError
    if meta["kind"] != "integer":
        return float(number)
    if number != int(number):
        raise ValueError
    return int(number)


def _check_numbers(meta: Mapping[str, Any], value: Any) -> tuple[float, ...]:
    single = isinstance(value, str) or not hasattr(value, "__iter__")
    numbers = tuple(_check_number(meta, each) for each in ([value] if single else value))
    if not numbers:
        raise ValueError
    return numbers


def _check_files(value: Any) -> tuple[str, ...]:
    if not isinstance(value, str | PurePath | list | tuple):
        raise TypeError
    listed = str(value).split(",") if isinstance(value, str | PurePath) else map(str, value)
    files = tuple(text.strip() for text in listed)
    if not all(files):
        raise ValueError
    return files


def _check_path(value: Any) -> str:
    if not isinstance(value, str | PurePath):
        raise TypeError
    if not str(value).strip():
        raise ValueError
    return str(value)


def _check_switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _check_text(kind: str, choices: Sequence[str] | None, value: Any) -> str:
    text = str(value).removeprefix("torch.")  # torch.float16 and torch.device("cpu") are welcome
    if kind == "device":
        known = re.fullmatch(r"[a-z]+(:\d+)?", text) is not None
    elif kind == "colour":
        known = _is_colour(text)
    else:
        known = choices is not None and text in choices
    if not known:
        raise ValueError
    return text


def _is_colour(text: str) -> bool:
    """Whether Pillow knows the colour; Pillow is loaded for other colours than white alone."""
    if text == "white":
        return True
    from PIL import ImageColor

    try:
        ImageColor.getrgb(text)
    except ValueError:
        return False
    return True
