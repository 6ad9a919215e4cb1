"""Videos on disk: files in every format, frames that are kept or decoded, what is removed."""

import io
import json
import os
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from sgm.inference.options import SamplingOptions
from sgm.inference.videos import write_video
from sgm.serving import gallery as module
from sgm.serving.gallery import Gallery

VISITOR, OTHER = "0" * 32, "1" * 32


def smooth_frames(number=0, count=3, height=32, width=48):
    """Frames of gradients that move, which compression hardly changes."""
    t, y, x = np.ogrid[:count, :height, :width]
    red = 2 * x + 10 * t + 20 * number + 0 * y
    return np.stack([red, 200 - red, 5 * y + 0 * red], -1).astype(np.uint8)


def add(gallery, number, visitor=VISITOR, picture=b"picture"):
    """A video as a run leaves it: numbered, with its record and its picture."""
    path = gallery.visitor_folder(visitor) / f"{number:06d}.mp4"
    stored = gallery.store(visitor, picture)
    frames = smooth_frames(number % 4)
    write_video(frames, path, 7)
    record = {
        "version": "svd_tiny",
        "format": "mp4",
        "options": {"seed": number, "fps": 7, "lora": ["/srv/a.safetensors"]},  # older: no others
        "sampler_config": {},
        "input": {"path": str(stored), "sha256": "0"},
        "config": {"path": "/srv/secret/configs/svd_tiny.yaml", "sha256": "1"},
        "checkpoint": {"path": "/srv/secret/svd_tiny.safetensors", "sha256": "2"},
        "safety_filter": {"path": "/srv/secret/filter", "sha256": "3"},
        "video": path.name,
    }
    path.with_suffix(".json").write_text(json.dumps(record))
    os.utime(path, (number, number))
    return gallery.add(path, frames)


@pytest.fixture
def gallery(tmp_path):
    return Gallery(tmp_path, keep_runs=2)


def test_files_of_every_format_hold_the_frames(gallery):
    # Catches: another order of frames, a wrong frame rate, pngs that were compressed before.
    run = add(gallery, 1)
    assert run.file("mp4") == run.video.read_bytes()
    for format, tolerance in (("gif", 40), ("webp", 20)):
        with Image.open(io.BytesIO(run.file(format))) as animation:
            assert animation.format == format.upper()
            assert animation.n_frames == 3
            for index, frame in enumerate(run.frames()):
                animation.seek(index)
                shown = np.asarray(animation.convert("RGB"), dtype=int)
                assert abs(shown - frame).mean() < tolerance / 4
                assert animation.info["duration"] == pytest.approx(1000 / 7, abs=10)
    with zipfile.ZipFile(io.BytesIO(run.file("png"))) as archive:
        assert archive.namelist() == ["000000.png", "000001.png", "000002.png"]
        pictures = [np.asarray(Image.open(archive.open(name))) for name in archive.namelist()]
    np.testing.assert_array_equal(pictures, smooth_frames(1))
    with pytest.raises(ValueError, match="format must be one of mp4, gif, webp, png, got 'exe'"):
        run.file("exe")


def test_frames_of_older_videos_come_from_the_file(gallery, tmp_path):
    # Catches: runs of an earlier start of the page that have no frames.
    add(gallery, 1)
    (run,) = Gallery(tmp_path).runs(VISITOR)
    assert abs(run.frames().astype(int) - smooth_frames(1)).mean() < 3
    assert run.name == "svd_tiny_1"


def test_few_frames_are_kept_in_memory(gallery, monkeypatch):
    monkeypatch.setattr(module, "KEPT_BYTES", 2 * smooth_frames().nbytes)
    runs = [add(gallery, number) for number in (1, 2)]
    runs[0].frames()  # used last, so the second goes first
    add(gallery, 3)
    assert list(gallery._frames) == [runs[0].video, gallery.runs(VISITOR)[0].video]
    assert abs(runs[1].frames().astype(int) - smooth_frames(2)).mean() < 3


def test_the_oldest_videos_are_removed_with_all_that_belongs_to_them(gallery):
    # Catches: pictures that stay for ever, another visitor's files removed.
    first = add(gallery, 1, picture=b"only of the first")
    add(gallery, 2)
    add(gallery, 3)
    others = add(gallery, 1, visitor=OTHER)
    gallery.prune(VISITOR)
    folder = gallery.visitor_folder(VISITOR)
    assert [run.record["options"]["seed"] for run in gallery.runs(VISITOR)] == [3, 2]
    names = {path.name for path in folder.iterdir()}
    assert names == {"000002.mp4", "000002.json", "000003.mp4", "000003.json", "pictures"}
    assert [path.read_bytes() for path in (folder / "pictures").iterdir()] == [b"picture"]
    assert first.picture is None
    with pytest.raises(ValueError, match="this video is no longer there"):
        first.file("mp4")
    with pytest.raises(ValueError, match="this video is no longer there"):
        first.frames()
    assert [run.token for run in gallery.runs(OTHER)] == [others.token]


def test_old_videos_of_all_visitors_are_removed(tmp_path):
    # Catches: a disk that fills with the videos of visitors who never come back.
    gallery = Gallery(tmp_path, keep_days=2)
    days = 86400
    now = int(time.time())
    old = add(gallery, now - 3 * days, visitor=OTHER)
    young = add(gallery, now - days)
    (tmp_path / "measurements.jsonl").touch()
    gallery.prune(VISITOR)
    assert not old.video.parent.exists()
    assert [run.token for run in gallery.runs(VISITOR)] == [young.token]
    assert young.picture == b"picture"
    assert (tmp_path / "measurements.jsonl").exists()


def test_records_tell_no_paths(gallery):
    # Catches: where the operator keeps things, shown on the page; a lora that a visitor then sets.
    run = add(gallery, 1)
    assert "/" not in json.dumps(run.record)
    assert run.record["checkpoint"] == {"path": "svd_tiny.safetensors", "sha256": "2"}
    assert run.record["options"] == SamplingOptions(seed=1).to_dict()


def test_tokens_are_random_and_bound_to_their_visitor(gallery, tmp_path):
    run = add(gallery, 1)
    assert [each.token for each in gallery.runs(VISITOR)] == [run.token]
    assert len(run.token) > 16
    assert gallery.runs(OTHER) == []
    assert Gallery(tmp_path).runs(VISITOR)[0].token != run.token


def test_a_picture_outside_of_the_folder_is_not_shown(gallery, tmp_path):
    # Catches: a record, of the command line's or a forged one, that names any file of the machine.
    run = add(gallery, 1)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    described = run.video.with_suffix(".json")
    record = json.loads(described.read_text())
    record["input"]["path"] = str(secret)
    described.write_text(json.dumps(record))
    assert Gallery(tmp_path).runs(VISITOR)[0].picture is None
