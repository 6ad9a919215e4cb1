"""Frames as H.264, for videos that are made and clips that are kept."""

from collections.abc import Mapping
from fractions import Fraction
from typing import IO

import numpy as np
import numpy.typing as npt

BT709, LIMITED_RANGE = 1, 1  # code points of ISO/IEC 23091-2 and FFmpeg's AVCOL_RANGE_MPEG


def encode_h264(
    frames: npt.NDArray[np.uint8],
    file: str | IO[bytes],
    fps: Fraction,
    quality: Mapping[str, str],
    container_options: Mapping[str, str] | None = None,
) -> None:
    """Encode frames as an mp4 file of BT.709 colours in 4:2:0.

    With the macroblock tree of x264 (``mbtree``), equal frames now and then give other bytes;
    they also depend on its number of threads.

    Args:
        frames: (t, h, w, 3), height and width even.
        file: to write to.
        fps: frames per second.
        quality: options of the encoder libx264.
        container_options: of the mp4 muxer.

    Raises:
        av.FFmpegError: it cannot be written.
    """
    import av  # 0.2 s

    options = dict(container_options or {})
    with av.open(file, "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=fps, options=dict(quality))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.color_primaries = codec.color_trc = codec.colorspace = BT709
        codec.color_range = LIMITED_RANGE
        for index, pixels in enumerate(frames):
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            yuv = rgb.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            yuv.pts, yuv.time_base = index, 1 / fps
            container.mux(stream.encode(yuv))
        container.mux(stream.encode())
