"""A clip as the bytes of an mp4 file, and back."""

import io
from fractions import Fraction

import numpy as np

from sgm.data.reading import Frames
from sgm.h264 import encode_h264

CRF = 12
"""Quality of H.264: visually lossless; what is lost is below what a video's autoencoder loses."""

# One thread and no macroblock tree: equal frames give equal bytes on every machine.
_QUALITY = {"crf": str(CRF), "preset": "medium", "x264-params": "mbtree=0:threads=1"}


def encode_mp4(frames: Frames, fps: float) -> bytes:
    """Encode frames (t, h, w, 3) of even height and width as H.264; equal frames, equal bytes."""
    file = io.BytesIO()
    encode_h264(frames, file, Fraction(fps).limit_denominator(1001), _QUALITY)
    return file.getvalue()


def decode_mp4(data: bytes) -> Frames:
    """Decode all frames of a file: (t, h, w, 3).

    Raises:
        ValueError: it is damaged.
    """
    import av

    try:
        with av.open(io.BytesIO(data), "r") as container:
            frames = [
                frame.reformat(format="rgb24", src_colorspace="ITU709").to_ndarray()
                for frame in container.decode(video=0)
            ]
    except av.FFmpegError as error:
        raise ValueError(f"the clip cannot be decoded: {error.strerror}") from error
    return np.stack(frames)
