"""The picture: a sample, an upload, a photo by the webcam, or that of an earlier run."""

from collections.abc import Sequence

import streamlit as st

from scripts.demo.page.session import errors_in_one_line, keep, put
from sgm.errors import one_line
from sgm.inference.files import PICTURE_SUFFIXES
from sgm.inference.options import SamplingOptions, option_fields
from sgm.inference.pictures import Picture, prepare_picture
from sgm.inference.results import to_frames
from sgm.inference.specs import ModelSpec, find_file
from sgm.serving.studio import Studio

SAMPLES = {
    "red-panda": "assets/sample.jpg",
    "coffee": "assets/samples/coffee.jpg",
    "astronaut": "assets/samples/astronaut.jpg",
    "vase": "assets/samples/vase.png",
}
SOURCES = {
    "sample": ":material/image: Sample",
    "upload": ":material/upload: Upload",
    "camera": ":material/photo_camera: Webcam",
    "earlier": ":material/history: Earlier",
}
SHOWN_PIXELS = 320  # up to which a small picture is shown larger


def choose_pictures(studio: Studio) -> tuple[bytes, ...]:
    """Let the visitor say where the picture comes from; the files, unchecked."""
    # The browser asks whether it may use the camera as soon as its widget is there.
    sources = [name for name in SOURCES if name != "earlier" or "earlier" in st.session_state]
    keep("source", "sample")
    source = st.segmented_control(
        "Picture", sources, format_func=SOURCES.__getitem__, key="source", required=True
    )
    match source:
        case "upload":
            return _uploads(studio)
        case "camera":
            photo = st.camera_input("Take a photo", key="camera")
            return (photo.getvalue(),) if photo else ()
        case "earlier":
            return (st.session_state.earlier,)
    return _sample()


def take_earlier(picture: bytes) -> None:
    """Choose the picture of an earlier run; for a callback, before the widgets are drawn."""
    put("earlier", picture)
    put("source", "earlier")


def _uploads(studio: Studio) -> tuple[bytes, ...]:
    limits = studio.limits
    files = st.file_uploader(
        "Drop pictures here",
        sorted(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES),
        accept_multiple_files=True,
        max_upload_size=max(1, round(limits.max_upload_mb)),
        key="files",
        help=f"Up to {limits.max_pictures} at once, each of {limits.max_upload_mb:g} MB and "
        f"{limits.max_upload_megapixels:g} megapixels at most.",
    )
    return tuple(file.getvalue() for file in files)


def _sample() -> tuple[bytes, ...]:
    found = {name: file for name, path in SAMPLES.items() if (file := find_file(path))}
    if not found:
        st.caption("No sample pictures are here: upload one.")
        return ()
    keep("sample", next(iter(found)))
    st.pills(
        "Sample",
        list(found),
        format_func=sample_label,
        key="sample",
        required=True,
        label_visibility="collapsed",
    )
    return (found[st.session_state.sample].read_bytes(),)


def sample_label(name: str) -> str:
    """A sample's name as it is shown."""
    return name.replace("-", " ").capitalize()


# Kept for all visitors: the pictures used last.
@st.cache_resource(max_entries=4, show_spinner=False)
def _opened(data: bytes, _studio: Studio) -> Picture:
    return _studio.open_picture(data)


def open_pictures(studio: Studio, files: Sequence[bytes]) -> list[Picture]:
    """The pictures of files; none, and a line for each that is refused, if one is."""
    pictures = []
    for number, data in enumerate(files, 1):
        try:
            pictures.append(_opened(data, studio))
        except ValueError as error:  # calls it by its number, as its name is the visitor's
            which = f"picture {number}: " if len(files) > 1 else ""
            st.error(f"{which}{one_line(error)}", icon=":material/error:")
    return pictures if len(pictures) == len(files) else []


def place_pictures(
    pictures: Sequence[Picture], spec: ModelSpec, size: tuple[int, int], options: SamplingOptions
) -> SamplingOptions:
    """Show what the model will see, with a slider where it can be moved; the options then.

    Args:
        pictures: all of them.
        spec: the model.
        size: height and width of the video.
        options: what the visitor asks for.
    """
    with st.container(horizontal=True, horizontal_alignment="left"):
        boxes = [st.container(width="content") for _ in pictures]
    if not spec.orbit:
        rooms = [_room(picture, size, options.fit) for picture in pictures]
        places = {"crop_x": any(x for x, _ in rooms), "crop_y": any(y for _, y in rooms)}
        options = options.replace(**{name: _slider(name) for name, on in places.items() if on})
    for box, picture in zip(boxes, pictures, strict=True):
        with box, errors_in_one_line():
            pixels = to_frames(prepare_picture(picture, size, spec.orbit, options))
            height, width = pixels.shape[:2]
            share = SHOWN_PIXELS / len(pictures) ** 0.5 / max(height, width)
            about = f"{picture.size[1]} x {picture.size[0]} becomes {width} x {height} pixels"
            alt = f"The picture as the model sees it, {width} x {height} pixels"
            st.image(pixels, caption=about, width=max(120, round(width * share)), alt=alt)
    return options


def _room(picture: Picture, size: tuple[int, int], fit: str) -> tuple[bool, bool]:
    """Whether there is room to move a picture sideways, and up and down, by a pixel at least."""
    height, width = size
    wider = picture.size[1] * height / picture.size[0] - width
    match fit:
        case "cover":
            return wider >= 1, wider <= -1
        case "contain":
            return wider <= -1, wider >= 1
    return False, False


def _slider(name: str) -> float:
    (option,) = (option for option in option_fields() if option.name == name)
    keep(name, option.default)
    label = "Crop, left to right" if name == "crop_x" else "Crop, top to bottom"
    return float(st.slider(label, 0.0, 1.0, step=0.01, key=name, help=str(option.metadata["help"])))
