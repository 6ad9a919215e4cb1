"""What an operator allows on a page that others use: one YAML file, every entry with a default."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml  # type: ignore[import-untyped]

from sgm.config import check_arguments
from sgm.errors import one_line
from sgm.inference.files import user_path
from sgm.inference.options import GROUPS, Option, SamplingOptions, option_fields
from sgm.inference.specs import get_spec

if TYPE_CHECKING:
    from sgm.inference.settings import Settings

OUTPUT_FOLDER = Path("outputs") / "demo"
# Options that name files of this machine, which no page may offer or tell.
PATH_OPTIONS = [each.name for each in option_fields() if each.metadata["kind"] in ("files", "path")]
# Those, and the ones that name devices of it, which no page may offer either.
HOST_OPTIONS = [
    *PATH_OPTIONS,
    *(each.name for each in option_fields() if each.metadata["kind"] == "device"),
]


def _limit(default: Any, help: str, least: float | None = None) -> Any:
    return field(default=default, metadata={"help": help, "least": least})


@dataclass(frozen=True)
class Limits:
    """The operator's settings; the help of each stands in the metadata of its field.

    Raises:
        ValueError: a value that makes no sense, such as a queue of no places.
    """

    models: tuple[str, ...] | None = _limit(
        None, "names of the models that are offered; null: all, those with weights first"
    )
    max_frames: int = _limit(100, "frames of a video", 1)
    max_steps: int = _limit(100, "sampling steps", 1)
    max_pixels: int = _limit(1024 * 1024, "height times width of a video", 64 * 64)
    max_videos: int = _limit(4, "videos made from each picture", 1)
    max_pictures: int = _limit(8, "pictures of one order", 1)
    max_upload_mb: float = _limit(20.0, "size of a picture's file, in megabytes", 0)
    max_upload_megapixels: float = _limit(60.0, "size of a picture, in millions of pixels", 0)
    max_queue: int = _limit(20, "orders that wait, of all visitors", 1)
    max_waiting: int = _limit(3, "orders that wait, of one visitor", 1)
    abandoned_seconds: float = _limit(
        180.0, "an order whose page has not been heard of for so long is taken out", 1
    )
    keep_runs: int = _limit(100, "videos kept for each visitor; older files are removed", 1)
    keep_days: float | None = _limit(None, "days that a video is kept at most; null: for ever")
    share_outputs: bool = _limit(
        False, "list the videos of all visitors, and of the command line, to everybody"
    )
    output_folder: Path = field(
        default=OUTPUT_FOLDER,
        metadata={"help": "where videos and uploaded pictures are kept", "least": None},
    )
    watermark: bool | None = _limit(
        None, "true or false: for all videos; null: for each visitor to say"
    )
    safety_filter: str | None = _limit(
        None, "folder with the weights of the safety filter, for all videos; null: off"
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value, least = getattr(self, each.name), each.metadata["least"]
            if least is not None and not value >= least:
                raise ValueError(f"{each.name} must be at least {least:g}, got {value}")
        for name in self.models or ():
            get_spec(name)
        if self.models == ():
            raise ValueError("models must name one at least, or be null for all")

    @classmethod
    def read(cls, path: str | Path | None) -> Self:
        """Read the operator's file; None for the defaults.

        Raises:
            ValueError: in one line: no such file, no YAML, an unknown entry, a refused value.
        """
        if path is None:
            return cls()
        path = user_path(path)
        try:
            return cls(**_values(yaml.safe_load(path.read_text(encoding="utf-8"))))
        except OSError as error:
            raise ValueError(f"settings {str(path)!r}: {error.strerror}") from error
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"settings {str(path)!r}: {one_line(error)}") from error

    def check(self, settings: "Settings") -> None:
        """Refuse a run that is longer, larger or slower than is allowed here.

        Raises:
            ValueError: names the option, the limit and what came.
        """
        options = settings.options
        height, width = settings.size
        pixels = f"{height * width} ({height}x{width})"
        for name, limit, value, shown in (
            ("num_frames", self.max_frames, settings.frames, settings.frames),
            ("num_steps", self.max_steps, options.num_steps or 0, options.num_steps),
            ("height x width", self.max_pixels, height * width, pixels),
            ("videos_per_image", self.max_videos, options.videos_per_image, None),
        ):
            if value > limit:
                raise ValueError(f"{name} must be at most {limit} here, got {shown or value}")

    def offered(self, group: str) -> list[Option]:
        """The options of a group that visitors may set: none of the host's, none decided here."""
        decided = {"watermark"} if self.watermark is not None else set()
        return [option for option in public_options(group) if option.name not in decided]

    def enforce(self, options: SamplingOptions) -> SamplingOptions:
        """The options with what the operator decides; no visitor names the host's files or device.

        Raises:
            ValueError: one of `HOST_OPTIONS` is set.
        """
        for name in HOST_OPTIONS:
            if getattr(options, name) is not None:
                raise ValueError(f"{name} is for the operator to set, not for visitors")
        forced = {"watermark": self.watermark, "safety_filter": self.safety_filter}
        return options.replace(**{k: v for k, v in forced.items() if v is not None})


def public_options(group: str | None = None) -> list[Option]:
    """The options of front ends that visitors may see and set, in order: none of `HOST_OPTIONS`."""
    groups = GROUPS if group is None else [group]
    options = (option for each in groups for option in option_fields(each))
    return [option for option in options if option.name not in HOST_OPTIONS]


def _values(content: Any) -> dict[str, Any]:
    """The entries of a file, brought to their types.

    Raises:
        ValueError: it holds something else than known names with values of their types.
    """
    if not isinstance(content, Mapping | None):
        raise ValueError(f"expected names and values, got {content!r}")
    values: dict[str, Any] = {str(name): value for name, value in (content or {}).items()}
    known = [each.name for each in fields(Limits)]
    for name in values:
        if name not in known:
            raise ValueError(f"unknown entry {name!r}; known: {', '.join(known)}")
    check_arguments(Limits, values, "settings")
    if values.get("models") is not None:
        values["models"] = tuple(values["models"])
    if "output_folder" in values:
        values["output_folder"] = _folder(values["output_folder"])
    return values


def _folder(value: Any) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError(f"output_folder must be the path of a folder, got {value!r}")
    return user_path(value)
