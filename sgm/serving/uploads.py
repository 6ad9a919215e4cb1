"""Pictures from strangers: nothing of them is decoded before their size is known."""

import warnings
from io import BytesIO

from PIL import Image, UnidentifiedImageError

from sgm.inference.pictures import FORMATS, Picture, load_picture


def open_upload(data: bytes, max_mb: float, max_megapixels: float) -> Picture:
    """An uploaded picture.

    Args:
        data: the file.
        max_mb: limit of its size in megabytes.
        max_megapixels: limit of height times width in millions, held against the file's header.

    Raises:
        ValueError: too large, or no picture, in one line.
    """
    if len(data) > max_mb * 1e6:
        raise ValueError(
            f"the picture's file has {len(data) / 1e6:.1f} MB, at most {max_mb:g} are allowed here"
        )
    if not data:
        raise ValueError("the picture's file is empty")
    pixels = _pixels(data)
    if pixels is not None and pixels > max_megapixels * 1e6:
        raise ValueError(
            f"the picture is larger than the {max_megapixels:g} megapixels allowed here: "
            "make it smaller"
        )
    return load_picture(data)


def _pixels(data: bytes) -> float | None:
    """Height times width by the file's header; None where it has none that can be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the limit is ours
        try:
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                return image.width * image.height
        except Image.DecompressionBombError:  # more than Pillow opens at all
            return float("inf")
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
            return None
