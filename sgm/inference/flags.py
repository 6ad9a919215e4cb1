"""What a command line asks for: texts to values, unknown flags, the help.

Imports neither torch nor Pillow, so that help and argument errors answer at once.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from textwrap import TextWrapper
from typing import Any, Self

from sgm.inference.files import is_address, is_there
from sgm.inference.options import GROUPS, SamplingOptions, describe, option_fields
from sgm.inference.specs import SPECS

FORMATS = ("mp4", "gif", "webp", "png")
OUTPUT_FOLDER = Path("outputs") / "simple_video_sample"
SAMPLE_PICTURE = Path("assets") / "sample.jpg"

_USAGE = """\
Turn pictures into videos with Stable Video Diffusion.

Usage: python scripts/sampling/simple_video_sample.py [PICTURE ...] [--FLAG VALUE ...]
"""
_EXAMPLES = """\
Examples:
  simple_video_sample.py
  simple_video_sample.py --input_path photo.jpg --version svd_xt --motion_bucket_id 180
  simple_video_sample.py photo.jpg --ckpt_path stabilityai/stable-video-diffusion-img2vid-xt
  simple_video_sample.py holiday/*.jpg --fps 12 --format gif --seed 7 --videos_per_image 3
  simple_video_sample.py --input_path photos/ --output_folder videos --resume
  simple_video_sample.py --repeat outputs/simple_video_sample/svd_xt/000004.json --num_steps 50

Each video is numbered (000000.mp4, 000001.mp4, ...), never replacing one, and beside it lies a
JSON with everything that made it. Exit code: 0 all done, 1 some input failed, 2 nothing could be
started, 130 interrupted.
"""


def _flag(help: str, default: str, default_value: Any = None, kind: str = "text") -> Any:
    return field(default=default_value, metadata={"help": help, "default": default, "kind": kind})


@dataclass(frozen=True)
class Request:
    """What the user asks for, as typed; where nothing is said, None or empty.

    Attributes:
        options: values for :class:`SamplingOptions` by name, not checked yet.

    The other attributes are explained in the metadata of their fields.

    Raises:
        ValueError: an unknown format.
    """

    options: dict[str, Any] = field(default_factory=dict)
    input_path: tuple[str, ...] = _flag(
        "Picture, folder, pattern such as 'photos/*.jpg' or http(s) address; or several, with "
        "commas or spaces between.",
        str(SAMPLE_PICTURE),
        (),
        kind="paths",
    )
    version: str | None = _flag(
        f"Model: one of {', '.join(SPECS)}.",
        "what the weights of --ckpt_path are, else the first of these whose weights are there",
    )
    config: str | None = _flag("YAML of the model.", "configs/VERSION.yaml")
    ckpt_path: str | None = _flag(
        "Weights of the model: a .safetensors or .ckpt file (also MindSpore's), a diffusers folder "
        "or a repository of the Hugging Face hub, OWNER/NAME, which is fetched when first used.",
        "checkpoints/VERSION.safetensors",
    )
    output_folder: str | None = _flag(
        "Where the videos go; made if absent.", str(OUTPUT_FOLDER / "VERSION")
    )
    format: str | None = _flag(
        f"Kind of file: one of {', '.join(FORMATS)}; png is a folder of frames.", "mp4"
    )
    repeat: str | None = _flag(
        "JSON beside an earlier video: make that video again; flags given as well override it.",
        "none",
    )
    resume: bool = _flag(
        "Skip what lies in the output folder already, made from the same picture, options and "
        "weights.",
        "off",
        False,
        kind="switch",
    )
    verbose: bool = _flag(
        "Log what happens, and show where in the code an error arose.", "off", False, kind="switch"
    )

    def __post_init__(self) -> None:
        if self.format not in (None, *FORMATS):
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")

    @classmethod
    def from_texts(cls, pictures: Sequence[str], flags: Mapping[str, str]) -> Self:
        """Bring texts to values: the types that the options check, not their ranges.

        Args:
            pictures: inputs without a flag's name.
            flags: texts by flag; ``None`` stands for the default.

        Raises:
            ValueError: an unknown flag, a flag without its value.
        """
        values: dict[str, Any] = {}
        options: dict[str, Any] = {}
        for name, text in flags.items():
            kind = _KINDS.get(name)
            if kind is None:
                raise ValueError(_unknown(f"--{name}"))
            if text == "None":
                continue
            if text == "True" and kind not in ("switch", "paths"):
                raise ValueError(f"--{name} needs a value")
            (values if name in _REQUEST_KINDS else options)[name] = _value(name, kind, text)
        paths = (*values.pop("input_path", ()), *pictures)
        return cls(options=options, input_path=paths, **values)


def refuse_unknown(arguments: Sequence[str]) -> None:
    """Look at a command line before anything runs.

    Raises:
        ValueError: a flag that does not exist, with the closest ones, or one given twice.
    """
    seen = set()
    for argument in arguments:
        if not re.match("--?([a-zA-Z]|$)|--", argument):
            continue
        name = argument.lstrip("-").split("=")[0].replace("-", "_")
        if name.startswith("no") and _KINDS.get(name[2:]) == "switch":
            name = name[2:]
        if name not in _KINDS or not argument.startswith("--"):
            raise ValueError(_unknown(argument.split("=")[0]))
        if name in seen:
            raise ValueError(f"--{name} is given twice")
        seen.add(name)


def help_text(width: int = 100) -> str:
    """The whole help, for a terminal of ``width`` columns."""
    return "\n".join([_USAGE, *_describe_request(width), "", describe(width), _models(), _EXAMPLES])


def _describe_request(width: int) -> Iterator[str]:
    wrapper = TextWrapper(width=width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    yield "Files:"
    for flag in _request_fields():
        yield f"  --{flag.name}  (default: {flag.metadata['default']})"
        yield wrapper.fill(flag.metadata["help"])


def _models() -> str:
    rows = (f"  {name:<21} {spec.about}; {spec.num_steps} steps" for name, spec in SPECS.items())
    return "\n".join(["Models:", *rows, ""])


def _request_fields() -> list[Field[Any]]:
    return [f for f in fields(Request) if f.metadata]


_REQUEST_KINDS: dict[str, str] = {f.name: f.metadata["kind"] for f in _request_fields()}
_OPTION_KINDS: dict[str, str] = {
    f.name: f.metadata["kind"] for group in GROUPS for f in option_fields(group)
}
_KINDS = _REQUEST_KINDS | _OPTION_KINDS


def _unknown(flag: str) -> str:
    close = difflib.get_close_matches(flag.lstrip("-").replace("-", "_"), _KINDS)
    hint = f"did you mean --{' or --'.join(close)}?" if close else "see --help"
    return f"unknown flag {flag}; {hint}"


def _value(name: str, kind: str, text: str) -> Any:
    match kind:
        case "integer" | "number":
            return _number(text)
        case "numbers":
            return tuple(_number(part) for part in text.strip("[]()").split(",") if part.strip())
        case "paths":
            return _paths(text)
        case "switch":
            if text.lower() not in ("true", "false"):
                raise ValueError(f"--{name} is a switch: give it alone and last, got {text!r}")
            return text.lower() == "true"
    return text


def _number(text: str) -> int | float | str:
    """The number that a text is, exact where it is whole; else the text, for the check to name."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _paths(text: str) -> tuple[str, ...]:
    """One path, or several with commas between, as they are or in brackets."""
    if is_address(text) or "," not in text or is_there(text):
        return (text,)
    listed = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    return tuple(part.strip().strip("'\"") for part in listed.split(",") if part.strip())


def to_options(request: Request) -> SamplingOptions:
    """The checked options of a request.

    Raises:
        ValueError: a refused value, or an ``output`` that is no video.
    """
    options = SamplingOptions.from_dict(request.options)
    if options.output != "frames":
        raise ValueError(
            f"output must be frames on the command line, got {options.output!r}: "
            "VideoPipeline gives the others"
        )
    return options
