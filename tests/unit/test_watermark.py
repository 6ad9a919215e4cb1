"""The watermark: the package's own reader finds the published message, also in an mp4."""

import logging
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from imwatermark import WatermarkDecoder, WatermarkEncoder

from sgm.inference.pictures import fit_picture, load_picture
from sgm.inference.videos import write_video
from sgm.inference.watermark import BITS, check_watermark, embed, read

PHOTO = Path(__file__).resolve().parents[2] / "assets" / "sample.jpg"
PUBLISHED = "101100111110110010010000011110111011000110011110"


def pan(height, width, count=4):
    """A camera that moves over a photograph."""
    pixels = fit_picture(load_picture(PHOTO), height + 30, width + 30)
    levels = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return np.stack([levels[9 * k :, 9 * k :][:height, :width] for k in range(count)])


def text(bits):
    return "".join("01"[int(bit)] for bit in bits)


def majority(frames):
    return np.mean([read(frame) for frame in frames], axis=0) > 0.5


def through_mp4(frames, folder):
    path = write_video(frames, folder / "video.mp4", fps=7)
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def psnr(a, b):
    return 10 * np.log10(255**2 / np.square(a.astype(float) - b).mean())


def test_the_packages_own_reader_finds_the_message_in_every_frame():
    """Catches: another message, RGB given for BGR, the bits in another order."""
    frames = pan(320, 512)
    marked = embed(frames)
    assert (marked.shape, marked.dtype) == (frames.shape, np.uint8)
    for frame in marked:
        bgr = np.ascontiguousarray(frame[..., ::-1])
        assert text(WatermarkDecoder("bits", 48).decode(bgr, "dwtDct")) == PUBLISHED
        assert text(read(frame)) == PUBLISHED
    assert max((read(frame) == BITS).sum() for frame in frames) < 36  # 24 by chance


@pytest.mark.parametrize(("height", "width"), [(256, 256), (320, 512), (576, 1024)])
def test_all_bits_outlast_the_projects_h264(tmp_path, height, width):
    frames = through_mp4(embed(pan(height, width)), tmp_path)
    assert len(frames) == 4
    assert text(majority(frames)) == PUBLISHED
    assert psnr(frames, pan(height, width)) > 34


def test_an_object_on_white_keeps_all_bits_too(tmp_path):
    """Catches SV3D's white ground, which has no room for more blue, outvoting its object."""
    white = np.full((3, 326, 330, 3), 255, np.uint8)
    white[:, 120:220, 100:200] = pan(100, 100, count=3)
    marked = embed(white)
    assert text(majority(through_mp4(marked, tmp_path))) == PUBLISHED
    assert np.abs(marked.astype(int) - white)[:, :100].max() <= 20


def test_colour_details_stay_as_they_are():
    """Catches an odd number of calls: each swaps blue's horizontal and vertical details."""
    stripes = pan(256, 256, count=1)[0]
    stripes[::2, :, 2] = 40
    marked = embed(stripes[None])[0]
    assert psnr(marked, stripes) > 35
    encoder = WatermarkEncoder()
    encoder.set_watermark("bits", [int(bit) for bit in PUBLISHED])
    single = encoder.encode(np.ascontiguousarray(stripes[..., ::-1]), "dwtDct")[..., ::-1]
    assert psnr(marked, stripes) > psnr(single, stripes) + 6


@pytest.mark.parametrize("colour", [(255, 255, 255), (90, 140, 220), (214, 66, 27), (0, 0, 0)])
def test_even_colours_are_marked_too(colour):
    """Catches a single call, which leaves white and most even colours without a message."""
    even = np.full((1, 256, 256, 3), colour, np.uint8)
    assert text(read(embed(even)[0])) == PUBLISHED


def test_a_frame_without_room_is_told(caplog):
    blue = np.zeros((2, 256, 256, 3), np.uint8)
    blue[1, ..., 2] = 255
    with caplog.at_level(logging.WARNING):
        embed(blue)
    assert "cannot be read from 1 of 2 frames" in caplog.text


def test_small_frames_are_refused():
    check_watermark(128, 512)
    with pytest.raises(ValueError, match=r"65536 pixels or more, such as 256x256, got 128x504"):
        check_watermark(128, 504)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "imwatermark", None)
    with pytest.raises(ValueError, match=r"pip install 'svd-video\[watermark\]'") as error:
        check_watermark(256, 256)
    assert "\n" not in str(error.value)
