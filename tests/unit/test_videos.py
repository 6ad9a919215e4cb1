"""Videos are decoded back by PyAV and Pillow; files are whole or absent."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation
from PIL import Image

from sgm.inference.videos import Video, check_video_size, write_video

ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def waves(count=14, height=64, width=96):
    """Smooth colours that move, so that half-size colour loses little."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    red, green, blue = np.sin(x / 25 + t / 3), np.cos(y / 30), np.sin((x + y) / 20 + t / 3)
    return (128 + 100 * np.stack([red, green, blue], axis=-1)).astype(np.uint8)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def read_mp4(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [
            frame.reformat(format="rgb24", src_colorspace="ITU709", interpolation=ACCURATE)
            for frame in container.decode(stream)
        ]
        return np.stack([frame.to_ndarray() for frame in frames]), stream, stream.codec_context


def read_animation(path):
    frames, times = [], []
    with Image.open(path) as image:
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            frames.append(np.asarray(image.convert("RGB")))
            times.append(image.info["duration"])
        return np.stack(frames), times, image.info["loop"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_mp4_is_what_browsers_play(tmp_path):
    """Caught: the BT.601 matrix under a BT.709 tag, full range under a limited tag (28 dB)."""
    frames = waves()
    path = Video(frames, fps=7).save(tmp_path / "new" / "a.mp4")
    decoded, _, codec = read_mp4(path)
    assert decoded.shape == frames.shape
    assert psnr(decoded, frames) > 38
    assert np.abs((decoded.astype(float) - frames).mean(axis=(0, 1, 2))).max() < 0.5
    assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
    tags = (codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range)
    assert tags == (1, 1, 1, 1)  # BT.709 three times, limited range
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index comes first"
    assert names(tmp_path / "new") == ["a.mp4"]


def test_equal_frames_give_equal_files(tmp_path):
    """Caught: x264's macroblock tree, with which about one file in three differs for noise."""
    noise = np.random.default_rng(3).normal(0, 20, (14, 64, 96, 3))
    frames = np.clip(waves() + noise, 0, 255).astype(np.uint8)
    written = [write_video(frames, tmp_path / f"{k}.mp4", 7).read_bytes() for k in range(40)]
    assert len(set(written)) == 1


@pytest.mark.parametrize("fps", [1, 7, 25, 240, Fraction(30000, 1001)])
@pytest.mark.parametrize("count", [1, 5])
def test_an_mp4_has_exactly_the_rate_asked_for(tmp_path, fps, count):
    path = write_video(waves(count), tmp_path / "a.mp4", fps)
    decoded, stream, _ = read_mp4(path)
    assert len(decoded) == count
    assert stream.average_rate == fps
    assert stream.duration * stream.time_base == pytest.approx(float(count / fps), abs=1e-4)


@pytest.mark.parametrize(("suffix", "tick", "least"), [("gif", 10, 22), ("webp", 1, 36)])
def test_animations_keep_frames_and_total_time(tmp_path, suffix, tick, least):
    """Caught: each frame's time rounded by itself (7 frames/s in gif: 1.96 s instead of 2 s)."""
    frames = waves()
    decoded, times, loop = read_animation(Video(frames, 7).save(tmp_path / f"a.{suffix}"))
    assert decoded.shape == frames.shape
    assert psnr(decoded, frames) > least
    assert sum(times) == 2000
    assert max(abs(time - 1000 / 7) for time in times) <= tick
    assert loop == 0, "endless"


def test_png_is_a_folder_of_exact_frames(tmp_path):
    frames = waves(3, 33, 35)
    folder = Video(frames, 7).save(tmp_path / "000004")
    assert names(folder) == ["000000.png", "000001.png", "000002.png"]
    for frame, path in zip(frames, sorted(folder.iterdir()), strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), frame)


@pytest.mark.parametrize(
    ("height", "width", "even"), [(65, 96, "64x96"), (64, 97, "64x96"), (65, 97, "64x96")]
)
def test_odd_sizes_are_refused_by_mp4_alone(tmp_path, height, width, even):
    with pytest.raises(ValueError, match=rf"got {height}x{width}; the nearest is {even}"):
        write_video(waves(2, height, width), tmp_path / "a.mp4", 7)
    assert names(tmp_path) == []
    for other in ("gif", "webp", "png"):
        check_video_size(other, height, width)


@pytest.mark.parametrize(
    "frames",
    [waves(2).astype(np.float32), waves(2)[0], waves(2)[..., :1], waves(2)[:0]],
    ids=["float", "one picture", "grey", "empty"],
)
def test_other_arrays_are_refused(tmp_path, frames):
    with pytest.raises(ValueError, match=r"frames must be uint8 \(t, h, w, 3\), got"):
        write_video(frames, tmp_path / "a.mp4", 7)


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one of mp4, gif, webp, png, got 'avi'"):
        write_video(waves(2), tmp_path / "a.avi", 7)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    """Caught: a folder that is named ~."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Video(waves(2), 7).save("~/a.gif") == tmp_path / "home" / "a.gif"
    assert names(tmp_path) == ["home"]
    assert names(tmp_path / "home") == ["a.gif"]
    with pytest.raises(ValueError, match="there is no home folder ~nosuchuser"):
        write_video(waves(2), "~nosuchuser/a.gif", 7)


@pytest.mark.parametrize("suffix", [".gif", ""])
def test_a_folder_is_not_replaced(tmp_path, suffix):
    """Caught: OSError 39 or 21, after all frames were written."""
    (tmp_path / f"a{suffix}" / "kept").mkdir(parents=True)
    with pytest.raises(ValueError, match="is a folder that is there already: give another name"):
        write_video(waves(2), tmp_path / f"a{suffix}", 7)
    assert names(tmp_path) == [f"a{suffix}"]


def test_frames_replace_an_empty_folder_and_no_file(tmp_path):
    (tmp_path / "a").mkdir()
    assert len(names(write_video(waves(2), tmp_path / "a", 7))) == 2
    (tmp_path / "b").write_bytes(b"old")
    with pytest.raises(ValueError, match=r"'.*b' is a file, expected a new folder"):
        write_video(waves(2), tmp_path / "b", 7)
    assert (tmp_path / "b").read_bytes() == b"old"


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ""])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, suffix, error):
    """The third frame's conversion is interrupted: no file, no temporary file, old file kept."""
    owner, method = (av.VideoFrame, "from_ndarray") if suffix == ".mp4" else (Image, "fromarray")
    original, calls = getattr(owner, method), []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise error("stop")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, interrupted)
    old = tmp_path / "old.mp4"
    old.write_bytes(b"old")
    path = old if suffix == ".mp4" else tmp_path / f"new{suffix}"
    with pytest.raises(error, match="stop"):
        write_video(waves(5), path, 7)
    assert names(tmp_path) == ["old.mp4"]
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ""])
def test_an_interruption_just_before_the_renaming_leaves_nothing(tmp_path, monkeypatch, suffix):
    """By then the whole temporary file stands. Caught: no clean-up of files, or of folders."""

    def interrupted(unfinished, path):
        assert unfinished.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_video(waves(2), tmp_path / f"new{suffix}", 7)
    assert names(tmp_path) == []


def test_what_ffmpeg_refuses_is_an_error_of_the_system(tmp_path, monkeypatch):
    """Caught: PyAV's own errors, of which some are no OSError: a run would end in a traceback."""

    def refuse(*_args, **_options):
        raise av.error.ExternalError(1, "Generic error in an external library")

    monkeypatch.setattr(av, "open", refuse)
    with pytest.raises(OSError, match="the mp4 cannot be written: Generic error"):
        write_video(waves(2), tmp_path / "a.mp4", 7)
    assert names(tmp_path) == []
