"""The page: a picture, some options, a video: ``streamlit run scripts/demo/video_sampling.py``.

Its widgets are made from the options' descriptions; all else is the command line's own path.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import streamlit as st
from PIL import ImageColor

from sgm.config import check_types
from sgm.device import default_device, parse_device
from sgm.inference.dtypes import default_dtype
from sgm.inference.estimate import announcement
from sgm.inference.files import PICTURE_SUFFIXES
from sgm.inference.options import GROUPS, Option, SamplingOptions, expected, option_fields
from sgm.inference.pictures import Picture, isolate_object, load_picture, native_size
from sgm.inference.pipeline import Callback, Progress, VideoPipeline, video_seeds
from sgm.inference.progress import StageClock
from sgm.inference.settings import ModelFiles, Settings, find_model, resolve
from sgm.inference.specs import SPECS, ModelSpec, default_spec, find_file
from sgm.inference.videos import Video, check_video_size

LARGEST_INTEGER = 2**53 - 1  # that a browser holds exactly
LARGEST_WIDTH = 512  # pixels up to which a small video is shown larger, by a whole factor

# Kept for all visitors: the pictures used last, and one model, since two may not fit in memory.
read_picture = st.cache_resource(max_entries=4, show_spinner=False)(load_picture)


@st.cache_resource(max_entries=1, show_spinner=False)
def load_pipeline(
    files: ModelFiles,
    modified: int,  # noqa: ARG001 - part of the key
    device: str | None,
    dtype: str | None,
    optimize: str | None,
    memory: str | None,
    _callback: Callback,  # Streamlit leaves names with an underscore out of the key
) -> VideoPipeline:
    """The pipeline, loaded anew where the YAML differs or the weights were ``modified`` since."""
    options = SamplingOptions(device=device, dtype=dtype, optimize=optimize, memory=memory)
    return VideoPipeline.load(files, options, _callback)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Show what the user can mend as one line of the page."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        st.error(" ".join(str(error).split()))


@errors_in_one_line()
def main() -> None:
    """Lay out the page and answer its button."""
    st.set_page_config("Stable Video Diffusion", layout="wide")
    st.title("A picture becomes a video")
    first, names = default_spec().name, [name for name, spec in SPECS.items() if spec.checkpoint]
    spec = SPECS[st.sidebar.selectbox("Model", names, names.index(first), key="version")]
    st.sidebar.caption(spec.about)
    left, right = st.columns(2, gap="large")
    picture = None
    with left, errors_in_one_line():
        picture = choose_picture()
    values = choose_options(spec, picture)
    with right, errors_in_one_line():
        if st.button("Make the video", type="primary", disabled=picture is None) and picture:
            st.session_state.results = []
            st.session_state.results = sample(spec, picture, SamplingOptions(**values))
        for result in st.session_state.get("results", []):
            show(*result)


def choose_picture() -> Picture | None:
    """The uploaded picture, else the bundled one, and show it."""
    kinds = sorted(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES)
    source = st.file_uploader("Picture", kinds, key="picture") or find_file("assets/sample.jpg")
    if source is None:
        return None
    picture = read_picture(source)
    st.image(picture.image, caption="{1} x {0} pixels".format(*picture.size))
    return picture


def settings(spec: ModelSpec, picture: Picture | None, options: SamplingOptions) -> Settings:
    """What a run will really do, known before its model is loaded."""
    size = (spec.height, spec.width)
    native = native_size(picture.size if picture else size, *size)
    return resolve(options, find_model(spec.name).config, spec, native)


def choose_options(spec: ModelSpec, picture: Picture | None) -> dict[str, Any]:
    """The values of all widgets by the options' names."""
    usual = settings(spec, picture, SamplingOptions()).options
    values: dict[str, Any] = {}
    for group in ["basic", "expert"] + ["sv3d"] * spec.orbit:
        with st.sidebar.expander(GROUPS[group], expanded=group == "basic"):
            # No paths: what files are read is not for visitors to say.
            shown = [each for each in option_fields(group) if each.metadata["kind"] != "files"]
            values |= {option.name: widget(option, usual) for option in shown}
    return values


def widget(option: Option, usual: SamplingOptions) -> Any:
    """Let the user set an option; None, shown as the ``usual`` value, leaves it to the model."""
    meta, default = option.metadata, cast(Any, option.default)
    known = getattr(usual, option.name) if meta["unset"] == "the model's" else None
    hint: Any = {"placeholder": str(meta["unset"] if known is None else known)}
    common: Any = {"key": option.name, "help": f"{meta['help']} Takes {expected(option)}."}
    label = option.name.replace("_", " ").capitalize()
    if meta["unit"] and not label.endswith(meta["unit"]):
        label += f" ({meta['unit']})"
    match meta["kind"]:
        case "choice":
            index = None if default is None else meta["choices"].index(default)
            return st.selectbox(label, meta["choices"], index, **common, **hint)
        case "integer" | "number" as kind:
            number: Any = int if kind == "integer" else float
            low, high = number(meta["min"]), number(min(meta["max"], LARGEST_INTEGER))
            if default is not None and high - low < 256:
                return st.slider(label, low, high, default, **common)
            style = {"step": number(meta["step"]), "format": "%d" if number is int else "%g"}
            return st.number_input(label, low, high, default, **style, **common, **hint)
        case "colour":
            shown = "#{:02x}{:02x}{:02x}".format(*ImageColor.getrgb(default))
            return st.color_picker(label, shown, **common)
    text = st.text_input(label, default, **common, **hint)
    return numbers(text) if text and meta["kind"] == "numbers" else text or None


def numbers(text: str) -> list[float] | str:
    """Numbers parted by commas or blanks; other text as it is, for the options to refuse."""
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        return text


def sample(
    spec: ModelSpec, picture: Picture, options: SamplingOptions
) -> list[tuple[str, Video, bytes]]:
    """Make the videos, with progress: the name of the mp4 file, frames, the file."""
    device = parse_device(options.device) if options.device else default_device()
    dtype = options.dtype or default_dtype(device)
    decided = settings(spec, picture, options.replace(device=str(device), dtype=dtype))
    check_video_size("mp4", *decided.size)
    with st.status(f"Loading {spec.name}", expanded=True) as status, TemporaryDirectory() as folder:
        picture = isolate_object(picture) if spec.orbit else picture
        files = find_model(spec.name)
        check_types(files.config, f"{files.config_path.name}: model")
        if about := announcement(files, decided, options.videos_per_image):
            st.write(about)
        modified = max(file.stat().st_mtime_ns for file in files.weight_files())
        callback = progress_bars()
        how = (options.device, options.dtype, options.optimize, options.memory)
        pipeline = load_pipeline(files, modified, *how, callback)
        status.update(label=f"Sampling with {spec.name} on {pipeline.device}", expanded=True)
        made = pipeline(picture, options, callback=callback)
        status.update(label="Done", expanded=False)
        videos = made if isinstance(made, list) else [made]
        paths = [Path(folder, f"{spec.name}_{seed}.mp4") for seed in video_seeds(options)]
        return [(p.name, v, v.save(p).read_bytes()) for p, v in zip(paths, videos, strict=True)]


def progress_bars() -> Callback:
    """A callback that draws a bar for each stage, with the time that remains."""
    bars: dict[str, Any] = {}
    clock = StageClock()

    def show_progress(progress: Progress) -> None:
        bar = bars.get(progress.stage, st)
        text = clock.describe(progress).capitalize()
        bars[progress.stage] = bar.progress(progress.step / progress.total, text)

    return show_progress


def show(name: str, video: Video, file: bytes) -> None:
    """Play a video, with a button to download it."""
    count, height, width = video.frames.shape[:3]
    larger = max(1, LARGEST_WIDTH // width)
    st.video(file, loop=True, autoplay=True, muted=True, width=width * larger)
    st.caption(f"{name}: {count} frames of {width} x {height} pixels, {video.fps} frames/s")
    st.download_button("Download", file, name, "video/mp4", key=name, on_click="ignore")


if __name__ == "__main__":
    main()
