"""Pictures in: any source becomes a `Picture`, and a `Picture` becomes the network's tensor."""

import string
import time
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sgm.inference.files import is_address, user_path
from sgm.inference.options import SamplingOptions

Array = npt.NDArray[Any]
Source = str | Path | bytes | BinaryIO | Image.Image | Array | Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF")
MAX_PIXELS = 120_000_000
MAX_DOWNLOAD = 256 * 2**20  # bytes
DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer
DOWNLOAD_LIMIT = 300.0  # seconds in all
CENTRE = (0.5, 0.5)


@dataclass(frozen=True, eq=False)
class Picture:
    """An upright 8-bit picture.

    Attributes:
        image: of mode RGB, or RGBA where at least one pixel is not opaque.
        name: where it came from, for messages.
    """

    image: Image.Image
    name: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.height, self.image.width

    @property
    def has_alpha(self) -> bool:
        """Whether part of the picture is transparent."""
        return self.image.mode == "RGBA"


def load_picture(source: Source, enough: int = 4096) -> Picture:
    """Read a picture of any common kind, turned upright by its EXIF orientation.

    Files may be jpeg, png, webp, gif, bmp or tiff (of several frames, the first), of any mode that
    Pillow reads: palette, grey, alpha, CMYK, 1, 8, 16 or 32 bits, float. Transparency is kept.
    A decoded picture takes 4 bytes a pixel, twice that while it is turned or its mode changed,
    three times for float: 0.5, 1 and 1.5 GB at the limit of 120 megapixels. A larger one is
    refused from its header.

    Args:
        source: a path, an http(s) address, the bytes of a file or an open binary file, a Pillow
            image, an array (h, w) or (h, w, c), or a tensor (c, h, w); c is 1 (grey), 2 (with
            alpha), 3 (RGB) or 4 (RGBA); values are bool, uint8, uint16 or float in [0, 1].
        enough: a jpeg at least twice as large as this many pixels on both sides is decoded at a
            half, a quarter or an eighth of its size, never below it, which saves time and memory.

    Raises:
        ValueError: for what is missing, broken, cut short, too large or no picture, by its name.
    """
    name = _name(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata is no matter; the size limit is ours
            return Picture(_decode(source, enough), name)
    except Exception as error:  # on broken files, decoders raise almost anything
        raise ValueError(f"{name}: {_reason(error)}") from error


def native_size(
    picture_size: tuple[int, int], native_height: int, native_width: int
) -> tuple[int, int]:
    """The model's own (height, width), sides swapped where that is the picture's orientation.

    A model trained at 576 x 1024 gives 576 x 1024 for landscape and square pictures, and
    1024 x 576 for upright ones; a square model always gives its square.
    """
    height, width = picture_size
    upright, native_upright = height > width, native_height > native_width
    if height == width or upright == native_upright:
        return native_height, native_width
    return native_width, native_height


def fit_picture(
    picture: Picture,
    height: int,
    width: int,
    mode: str = "cover",
    background: str = "white",
    place: tuple[float, float] = CENTRE,
) -> Tensor:
    """Bring a picture to exactly the given size, antialiased (Lanczos).

    Args:
        picture: what `load_picture` gave.
        height: of the result, in pixels.
        width: of the result, in pixels.
        mode: ``cover`` fills the size and crops the overhang; ``contain`` shows the whole picture
            on the background; ``stretch`` ignores the proportions.
        background: colour behind transparent parts and around a contained picture.
        place: x and y in [0, 1] of the crop in the picture, or of the contained picture on the
            background; (0, 0) is the upper left corner, (1, 1) the lower right one.

    Returns:
        Float32 tensor (3, height, width) in [-1, 1].
    """
    size = (width, height)
    if mode == "cover":
        image = _resize(picture.image, size, _cover_box(picture.image, size, place))
    elif mode == "contain":
        image = _resize(picture.image, _contained_size(picture.image, size))
    elif mode == "stretch":
        image = _resize(picture.image, size)
    else:
        raise ValueError(f"fit must be one of cover, contain, stretch, got {mode!r}")
    pixels = np.asarray(_on_background(image, size, background, place), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def isolate_object(picture: Picture) -> Picture:
    """The picture with its background transparent: as it is, or else through ``rembg``.

    Raises:
        ValueError: a picture without transparency, where ``rembg`` is not installed or fails.
    """
    if picture.has_alpha:
        return picture
    try:
        rembg = import_module("rembg")
    except (ImportError, SystemExit):  # rembg exits where its own runtime is missing
        raise ValueError(
            f"{picture.name}: SV3D needs the object alone; give a picture with a transparent "
            "background, or install rembg (pip install 'rembg[cpu]')"
        ) from None
    try:
        image = cast("Image.Image", rembg.remove(picture.image)).convert("RGBA")
    except Exception as error:  # of its model's download, its runtime, ...
        raise ValueError(
            f"{picture.name}: rembg cannot remove the background "
            f"({error or type(error).__name__}); give a picture with a transparent one"
        ) from error
    return Picture(image, picture.name)


def cut_out_object(picture: Picture, image_frame_ratio: float | None, size: int) -> Picture:
    """Centre the picture's object on a white square, as SV3D was trained.

    The object is what is not fully transparent in what :func:`isolate_object` gives.

    Args:
        picture: what `load_picture` gave.
        image_frame_ratio: the object's longer side in parts of ``size``, in (0, 1]; None keeps
            its share of the picture's longer side.
        size: side of the result in pixels.

    Raises:
        ValueError: where there is no object, or no way to tell it from the background.
    """
    image = isolate_object(picture).image
    box = image.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"{picture.name}: fully transparent, so there is no object to show")
    found = image.crop(box)
    ratio = image_frame_ratio or max(found.size) / max(image.size)
    side = max(1, round(ratio * size))
    found = _resize(found, _contained_size(found, (side, side)))
    return Picture(_on_background(found, (size, size), "white"), picture.name)


def prepare_picture(
    picture: Picture, size: tuple[int, int], orbit: bool, options: SamplingOptions
) -> Tensor:
    """What a model will see of a picture, as the options say: (3, h, w) in [-1, 1].

    Args:
        picture: what `load_picture` gave.
        size: height and width of the video.
        orbit: the model circles an object (SV3D), which is then cut out.
        options: of the run.

    Raises:
        ValueError: there is no object, or no way to tell it from the background.
    """
    if orbit:
        picture = cut_out_object(picture, options.image_frame_ratio, min(size))
    place = options.crop_x, options.crop_y
    return fit_picture(picture, *size, options.fit, options.background, place)


def _name(source: Source) -> str:
    """How messages call a source."""
    if isinstance(source, str | Path):
        return f"picture {str(source)!r}"
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return f"picture {name!r}" if isinstance(name, str) else "the given picture"


def _reason(error: Exception) -> str:
    match error:
        case ValueError():
            return str(error)
        case UnidentifiedImageError():
            return "not a jpeg, png, webp, gif, bmp or tiff picture"
        case Image.DecompressionBombError():
            return f"larger than the {MAX_PIXELS // 10**6} megapixels allowed"
        case OSError(strerror=str(text)):  # missing, a folder, not permitted
            return text
    return f"broken or cut short ({error or type(error).__name__})"


def _decode(source: Source, enough: int) -> Image.Image:
    """The upright image of any source, of mode RGB or RGBA."""
    if isinstance(source, Image.Image):
        return _upright_colour(_checked(source))
    if isinstance(source, Tensor):
        return _upright_colour(_checked(_from_array(_channels_last(source))))
    if isinstance(source, np.ndarray):
        return _upright_colour(_checked(_from_array(source)))
    with _open(_file(source)) as image:
        _checked(image)
        image.draft(image.mode, (enough, enough))
        return _upright_colour(image)


def _file(source: str | Path | bytes | BinaryIO) -> Path | BinaryIO:
    if isinstance(source, bytes):
        return BytesIO(source)
    if is_address(source):
        return BytesIO(_download(cast("str", source)))
    if isinstance(source, str | Path):
        return user_path(source)
    return source


def _download(address: str) -> bytes:
    ascii_address = urllib.parse.quote(address, safe=string.punctuation)
    request = urllib.request.Request(ascii_address, headers={"User-Agent": "sgm"})
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
            content = b"".join(_limited(iter(lambda: response.read1(1 << 20), b"")))
            if response.length:  # announced and not sent
                raise ValueError(f"the download ended {response.length} bytes too early")
    except (OSError, HTTPException) as error:
        raise ValueError(f"cannot be downloaded ({error})") from error
    return content


def _limited(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Pass on what comes, until it is too much or takes too long."""
    size, deadline = 0, time.monotonic() + DOWNLOAD_LIMIT
    for chunk in chunks:
        size += len(chunk)
        if size > MAX_DOWNLOAD:
            raise ValueError(f"larger than {MAX_DOWNLOAD >> 20} MiB, so the download was stopped")
        if time.monotonic() > deadline:
            raise ValueError(f"not there after {DOWNLOAD_LIMIT:.0f} s, so the download was stopped")
        yield chunk


def _open(file: Path | BinaryIO) -> Image.Image:
    """Open one of the known formats only: others start outside programs (eps) or are untested."""
    if isinstance(file, Path) and file.exists():
        if not file.is_file():
            raise ValueError("expected a file; this is a folder, device or pipe")
        if file.stat().st_size == 0:
            raise ValueError("the file is empty")
    return Image.open(file, formats=FORMATS)


def _checked(image: Image.Image) -> Image.Image:
    """The same image, of which at most the header has been read, unless it is too large."""
    if image.width * image.height > MAX_PIXELS:
        size, limit = f"{image.width} x {image.height}", MAX_PIXELS // 10**6
        raise ValueError(f"{size} pixels, larger than the {limit} megapixels allowed")
    return image


def _upright_colour(image: Image.Image) -> Image.Image:
    """Read the pixels, turn them upright, convert to RGB, or RGBA if any is not opaque."""
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_deep_to_bytes(np.asarray(image)))
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    opaque = image.getextrema()[-1] == (255, 255)
    return image.convert("RGB") if opaque else image


def _deep_to_bytes(values: Array) -> npt.NDArray[np.uint8]:
    """8 bits from a file's 16-bit, 32-bit or float grey values, whose range no header tells.

    White is the first of 1 (float only), 255 (not for 16 bits), 65535, 2^31 - 1 that the brightest
    pixel does not exceed; floats up to 2 count as highlights of a picture whose white is 1.
    """
    if values.dtype.name == "uint16":  # in either order of bytes
        return _scale(values, 65535)
    if not np.isfinite(values).all():
        raise ValueError("holds values that are not finite")
    top = float(values.max())
    if values.dtype.kind == "f" and top <= 2:
        return _scale(values, 1)
    return _scale(values, next(white for white in (255, 65535, np.inf) if top <= white))


def _from_array(values: Array) -> Image.Image:
    """An image of mode L, LA, RGB or RGBA."""
    shape = values.shape
    channels = 1 if values.ndim == 2 else shape[-1]
    if values.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or 0 in shape:
        raise ValueError(f"an array must have shape (h, w) or (h, w, 1 to 4), got {shape}")
    pixels = _array_to_bytes(values)
    return Image.fromarray(pixels.reshape(shape[:2]) if channels == 1 else pixels)


def _array_to_bytes(values: Array) -> npt.NDArray[np.uint8]:
    white = {"bool": 1, "uint8": 255, "uint16": 65535}.get(values.dtype.name)
    if white is not None:
        return _scale(values, white)
    if values.dtype.kind != "f":
        raise ValueError(f"values must be bool, uint8, uint16 or float, got {values.dtype}")
    low, high = float(values.min()), float(values.max())
    if not (low >= -0.01 and high <= 1.01):  # a little overshoot of a resampling is no error
        raise ValueError(f"float values must be in [0, 1], got {low:.3g} to {high:.3g}")
    return _scale(values, 1)


def _scale(values: Array, white: float) -> npt.NDArray[np.uint8]:
    """Values from 0 to ``white`` as 0 to 255, rounded; what lies outside is clipped."""
    if values.dtype == np.uint8:
        return values
    scaled = values.astype(np.float32)
    scaled *= 255 / white
    return np.rint(scaled.clip(0, 255, out=scaled), out=scaled).astype(np.uint8)


def _channels_last(tensor: Tensor) -> Array:
    if tensor.ndim != 3:
        shape = tuple(tensor.shape)
        raise ValueError(f"a tensor must have shape (1 to 4 channels, h, w), got {shape}")
    tensor = tensor.detach().cpu()
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return tensor.permute(1, 2, 0).numpy()


def _cover_box(
    image: Image.Image, size: tuple[int, int], place: tuple[float, float]
) -> tuple[float, float, float, float]:
    """The largest box (left, top, right, bottom) there with the proportions of ``size``."""
    width = min(image.width, image.height * size[0] / size[1])
    height = min(image.height, image.width * size[1] / size[0])
    x, y = place
    left, right = x * (image.width - width), (1 - x) * (image.width - width)
    top, bottom = y * (image.height - height), (1 - y) * (image.height - height)
    return left, top, image.width - right, image.height - bottom


def _contained_size(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """The largest size with the image's proportions in ``size``, of a pixel at least."""
    scale = min(size[0] / image.width, size[1] / image.height)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _resize(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    return image.resize(size, Image.Resampling.LANCZOS, box, reducing_gap=3.0)


def _on_background(
    image: Image.Image,
    size: tuple[int, int],
    background: str,
    place: tuple[float, float] = CENTRE,
) -> Image.Image:
    """Put an image on a canvas of one colour: alpha * image + (1 - alpha) * background."""
    canvas = Image.new("RGBA", size, background)
    left = int(place[0] * (size[0] - image.width))
    top = int(place[1] * (size[1] - image.height))
    canvas.alpha_composite(image.convert("RGBA"), (left, top))
    return canvas.convert("RGB")
