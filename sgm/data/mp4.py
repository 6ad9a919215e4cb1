"""A clip as the bytes of an mp4 file, and back."""

import io
from fractions import Fraction

import numpy as np

from sgm.data.reading import Frames

CRF = 12
"""Quality of H.264: visually lossless; what is lost is below what a video's autoencoder loses."""

_BT709, _LIMITED_RANGE = 1, 1  # code points of ISO/IEC 23091-2 and FFmpeg's AVCOL_RANGE_MPEG
# Both options make equal frames equal bytes: x264's result depends on its number of threads, and
# with its macroblock tree now and then on chance.
_OPTIONS = {"crf": str(CRF), "preset": "medium", "x264-params": "mbtree=0:threads=1"}


def encode_mp4(frames: Frames, fps: float) -> bytes:
    """Encode frames (t, h, w, 3) of even height and width as H.264; equal frames, equal bytes."""
    import av

    rate = Fraction(fps).limit_denominator(1001)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options=_OPTIONS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.color_primaries = codec.color_trc = codec.colorspace = _BT709
        codec.color_range = _LIMITED_RANGE
        for index, pixels in enumerate(frames):
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            yuv = rgb.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            yuv.pts, yuv.time_base = index, 1 / rate
            container.mux(stream.encode(yuv))
        container.mux(stream.encode())
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
