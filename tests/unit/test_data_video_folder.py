"""Real videos as clips, checked on files made on the fly whose content tells time and motion."""

import logging
import sys

import av
import cv2
import numpy as np
import pytest
import torch

from sgm.data.motion import flow_to_bucket
from sgm.data.video_folder import VideoFolder, timestamps
from tests.footage import write_video


def clock(count, size=(64, 64)):
    """Frames whose grey level tells their number: 4 levels each, from 16 to 232."""
    levels = 16 + 4 * (np.arange(count) % 55)
    return np.broadcast_to(levels[:, None, None, None], (count, *size, 3)).astype(np.uint8)


def numbers(item):
    """The numbers that the frames of an item tell, between 0 and 54."""
    return ((item["frames"].mean(dim=(1, 2, 3)) + 1) * 127.5 - 16) / 4


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi"])
def test_frames_are_taken_at_the_rate_by_their_timestamps(tmp_path, suffix):
    # Frame k of clip n lies at (n t + k) / 7 s: the nearest of 30 frames per second. Catches a
    # fixed stride, a seek that lands late, frames in decoding order.
    write_video(tmp_path / f"clock{suffix}", clock(54), 30)
    dataset = VideoFolder(tmp_path, frames=6, fps=7)
    assert len(dataset) == 2
    for n in range(2):
        item = dataset[n]
        expected = np.array([round((6 * n + k) * 30 / 7) for k in range(6)])
        np.testing.assert_allclose(numbers(item), expected, atol=0.45)
        assert item["fps_id"] == 6
        assert item["frames"].shape == (6, 3, 64, 64)
        assert item["frames"].dtype == torch.float32


def test_a_slower_video_keeps_its_own_rate(tmp_path):
    write_video(tmp_path / "slow.gif", clock(12), 5)
    dataset = VideoFolder(tmp_path, frames=6, fps=7)
    assert len(dataset) == 2
    assert dataset[1]["fps_id"] == 4
    np.testing.assert_allclose(numbers(dataset[1]), np.arange(6, 12), atol=4)  # rgb8 is coarse
    assert VideoFolder(tmp_path, frames=6, fps=None)[0]["fps_id"] == 4


def test_bucket_is_the_measured_motion_at_the_rate_of_the_clip(tmp_path):
    # 0.3 px per frame at 28 frames per second are 1.2 px at 7. Catches flow before resampling.
    noise = np.random.default_rng(0).normal(size=(96, 200, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.5)
    picture = np.clip(127 + 50 * smooth / smooth.std(), 0, 255).astype(np.float32)
    views = [
        cv2.warpAffine(picture, np.float32([[1, 0, -10 - 0.3 * i], [0, 1, -10]]), (64, 64))
        for i in range(60)
    ]
    write_video(tmp_path / "pan.mp4", np.round(views).astype(np.uint8), 28)
    item = VideoFolder(tmp_path, frames=14, fps=7)[0]
    assert int(item["motion_bucket_id"]) == pytest.approx(flow_to_bucket(1.2, 64), rel=0.15)


def test_a_moving_square_moves_in_the_frames_by_what_it_did(tmp_path):
    frames = np.full((24, 128, 128, 3), 40, np.uint8)
    for i in range(24):
        frames[i, 40:80, 10 + 3 * i : 50 + 3 * i] = 220
    write_video(tmp_path / "square.mp4", frames, 24)
    item = VideoFolder(tmp_path, frames=8, size=(64, 64), fps=8)[0]
    bright = item["frames"].mean(1) > 0
    columns = torch.arange(64.0)
    middles = torch.stack(
        [(f.float().mean(0) * columns).sum() / f.float().mean(0).sum() for f in bright]
    )
    np.testing.assert_allclose(middles.diff(), np.full(7, 9 / 2), atol=0.5)  # 3 frames, half size


@pytest.mark.parametrize(("height", "width"), [(64, 192), (192, 64), (100, 260)])
def test_frames_cover_the_size_with_their_middle(tmp_path, height, width):
    frames = np.zeros((4, height, width, 3), np.uint8)
    axis = int(width > height)
    for channel, part in enumerate(np.array_split(np.arange(max(height, width)), 3)):
        frames[(slice(None), slice(None), part) if axis else (slice(None), part)] = (
            np.eye(3)[channel] * 255
        )
    write_video(tmp_path / "bands.mp4", frames, 4)
    red, green, blue = VideoFolder(tmp_path, frames=2, fps=None)[0]["frames"][0].mean(dim=(1, 2))
    assert green > 0.7
    assert max(red, blue) < -0.7


def test_a_video_filmed_sideways_stands_upright(tmp_path):
    # The display matrix of the track header says how a phone was held; here 90 degrees clockwise.
    frames = np.zeros((8, 64, 64, 3), np.uint8)
    frames[:, :, :32] = 255  # the left half, which is the upper one on the screen
    path = tmp_path / "phone.mp4"
    write_video(path, frames, 8)
    data = bytearray(path.read_bytes())
    identity = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    turned = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30], ">i4").tobytes()
    at = data.index(identity, data.index(b"tkhd"))
    data[at : at + 36] = turned
    path.write_bytes(data)
    frame = VideoFolder(tmp_path, frames=4, fps=None)[0]["frames"][0]
    assert frame[:, :28].mean() > 0.8
    assert frame[:, 36:].mean() < -0.8


def test_index_is_in_order_and_bad_files_are_named_and_left_out(tmp_path, caplog):
    (tmp_path / "b").mkdir()
    write_video(tmp_path / "b" / "second.mkv", clock(14), 10)
    write_video(tmp_path / "a.mp4", clock(24), 10)
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.gif").write_bytes(b"")
    (tmp_path / "text.webm").write_text("this is no video")
    (tmp_path / "notes.txt").write_text("neither is this")
    write_video(tmp_path / "short.mp4", clock(3), 10)
    with caplog.at_level(logging.INFO, "sgm"):
        dataset = VideoFolder(tmp_path, frames=7, fps=10)
    assert [(clip.path.name, round(clip.start, 3)) for clip in dataset.clips] == [
        ("a.mp4", 0),
        ("a.mp4", 0.7),
        ("a.mp4", 1.4),
        ("second.mkv", 0),
        ("second.mkv", 0.7),
    ]
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 3
    for name in ("cut.mp4", "empty.gif", "text.webm"):
        assert any(name in message for message in warned)
    assert any("short.mp4" in record.getMessage() for record in caplog.records)


def test_a_file_that_breaks_later_gives_way_to_the_next_clip(tmp_path, caplog):
    write_video(tmp_path / "a.mp4", clock(8), 8)
    write_video(tmp_path / "b.mp4", clock(8)[::-1], 8)
    dataset = VideoFolder(tmp_path, frames=8, fps=8)
    (tmp_path / "a.mp4").write_bytes(b"gone")
    np.testing.assert_allclose(numbers(dataset[0]), np.arange(8)[::-1], atol=0.45)
    assert "a.mp4" in caplog.text
    (tmp_path / "b.mp4").write_bytes(b"gone")
    with pytest.raises(ValueError, match="none of the clips"):
        dataset[1]


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="none of its 0 videos has 14 frames"):
        VideoFolder(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        VideoFolder(tmp_path / "absent")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="pip install opencv-python-headless"):
        VideoFolder(tmp_path)


def test_sound_without_pictures_is_no_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="no video in it"):
        timestamps(path)
