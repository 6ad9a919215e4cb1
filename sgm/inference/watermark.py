"""The invisible watermark: a published message of 48 bits in the colour of every frame.

The method is ``dwtDct`` of the package invisible-watermark, with the message that Stability AI's
own programs write, so that readers of theirs find it. Every block of 8 x 8 pixels carries one bit,
in the largest of 16 wavelet coefficients of the blue difference (but the block's first); a reader
takes what most blocks of a bit say. It outlasts H.264; not the coarser colours of a lossy webp, nor
resizing or cutting, nor areas of pure blue.
"""

import logging
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from sgm.inference.videos import Frames

logger = logging.getLogger(__name__)

Bits = npt.NDArray[np.bool_]

MESSAGE = 0b101100111110110010010000011110111011000110011110
LENGTH = 48
BITS: Bits = np.array([MESSAGE >> k & 1 for k in reversed(range(LENGTH))], dtype=np.bool_)
MIN_PIXELS = 256 * 256

_METHOD = "dwtDct"
_BLOCK = 8  # pixels
_PAIRS = 8  # of calls at most: each marks one of a block's coefficients
_WHITE = 246  # blue of a white block that carries a one: in the middle of what is read as such


def check_watermark(height: int, width: int) -> None:
    """Make sure that frames of this size can be marked here, so that it is told before a run.

    Raises:
        ValueError: they are too small, or the package is not installed.
    """
    if height * width < MIN_PIXELS:
        raise ValueError(
            f"watermark needs frames of {MIN_PIXELS} pixels or more, such as 256x256, got "
            f"{height}x{width}: take a larger --height and --width, or no watermark"
        )
    _library()


def embed(frames: Frames) -> Frames:
    """Mark every frame; a frame that has no room for the whole message is told to the log.

    Args:
        frames: uint8 (t, h, w, 3), RGB.

    Returns:
        New frames of the same shape.

    Raises:
        ValueError: see :func:`check_watermark`.
    """
    check_watermark(*frames.shape[1:3])
    encoder, decoder = _library().WatermarkEncoder(), _decoder()
    encoder.set_watermark("bits", BITS)
    marked, unreadable = [], 0
    for frame in frames:
        bgr, readable = _mark(encoder, decoder, _with_room(frame[..., ::-1].copy()))
        marked.append(bgr[..., ::-1])
        unreadable += not readable
    if unreadable:
        logger.warning(
            "the watermark cannot be read from %d of %d frames: their colours leave it no room",
            unreadable,
            len(frames),
        )
    return np.stack(marked)


def read(frame: Frames) -> Bits:
    """The 48 bits that a frame seems to carry, whether it is marked or not.

    Args:
        frame: uint8 (h, w, 3), RGB.

    Raises:
        ValueError: see :func:`check_watermark`.
    """
    check_watermark(*frame.shape[:2])
    bits: Bits = _decoder().decode(np.ascontiguousarray(frame[..., ::-1]), _METHOD)
    return bits


def _with_room(frame: Frames) -> Frames:
    """Take a little blue from the white blocks of a frame (h, w, 3), BGR, that carry a one.

    A one adds blue, of which white has no more: without this, what a white ground carries is lost
    in the first compression, and outvotes the object before it.
    """
    rows, columns = (side // _BLOCK for side in frame.shape[:2])
    ones = np.resize(BITS, (rows, columns)).repeat(_BLOCK, axis=0).repeat(_BLOCK, axis=1)
    blocks = frame[: rows * _BLOCK, : columns * _BLOCK]
    blocks[ones & (blocks.min(axis=-1) > _WHITE), 0] = _WHITE
    return frame


def _mark(encoder: Any, decoder: Any, frame: Frames) -> tuple[Frames, bool]:
    """Mark a frame (h, w, 3), BGR, and say whether its message can be read.

    The package's encoder is called in pairs. One call swaps the horizontal and the vertical
    details of the blue difference, and the next swaps them back. In an even area, a call lowers one
    of equal coefficients and the reader then looks at another, so calls are repeated until the
    message can be read, and once more for what compression takes away.
    """
    readable = False
    for _ in range(_PAIRS):
        frame = encoder.encode(encoder.encode(frame, _METHOD), _METHOD)
        if readable:
            break
        readable = bool((decoder.decode(frame, _METHOD) == BITS).all())
    return frame, readable


def _decoder() -> Any:
    return _library().WatermarkDecoder("bits", LENGTH)


def _library() -> Any:
    try:
        return import_module("imwatermark")
    except ImportError as error:
        raise ValueError(
            "watermark needs the package invisible-watermark "
            f"(pip install 'svd-video[watermark]'): {error}"
        ) from error
