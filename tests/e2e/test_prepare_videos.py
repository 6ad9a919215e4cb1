"""The command that makes training clips, on videos made here."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from scripts.prepare_videos import main
from sgm.data.clips import Clips
from sgm.inference.specs import ROOT
from tests.footage import blend, pan, scene, write_video

pytestmark = pytest.mark.usefixtures("new_fork_server")

SCRIPT = str(ROOT / "scripts" / "prepare_videos.py")
CHECKPOINT = str(ROOT / "checkpoints" / "svd_tiny.safetensors")
GIVEN = ["--sizes", "64x64,64x96", "--frames", "5"]
LATENTS = ["--latents", "--ckpt_path", CHECKPOINT, "--device", "cpu"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A video of every kind, and what cannot be one."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "sub").mkdir()
    two = np.concatenate([pan(scene(1), 0.015, 26), pan(scene(2), 0.04, 26)])
    write_video(folder / "two shots.mp4", two, 14)
    copied = pan(scene(3), 0.004, 12)
    write_video(folder / "sub" / "a.mkv", copied, 14)
    write_video(folder / "again.mov", copied, 14)
    write_video(
        folder / "fade.webm", blend(pan(scene(4), 0.01, 30), pan(scene(5), 0.02, 30), 10), 14
    )
    write_video(folder / "b.avi", pan(scene(6), 0.006, 12), 14)
    write_video(folder / "g.gif", pan(scene(7), 0.01, 6), 7)
    write_video(folder / "night.mp4", pan(scene(8), 0.01, 12) // 12, 14)
    write_video(folder / "still.mp4", pan(scene(11), 0, 12), 14)
    write_video(folder / "small.mp4", pan(scene(9), 0.01, 12, (32, 48)), 14)
    write_video(folder / "short.mp4", pan(scene(9), 0.01, 3), 14)
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "pictures").mkdir()
    for number, frame in enumerate(pan(scene(10), 0.01, 6)):
        cv2.imwrite(str(folder / "pictures" / f"{number}.png"), frame[..., ::-1])
    return folder


@pytest.fixture(scope="module")
def prepared(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "clips"
    assert main([str(videos), str(out), *GIVEN, "--workers", "2"]) == 0
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A folder with one short video."""
    folder = tmp_path_factory.mktemp("one")
    write_video(folder / "a.mp4", pan(scene(6), 0.006, 12), 14)
    return folder


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_every_kind_of_video_becomes_clips_and_the_rest_is_counted(prepared):
    clips = Clips(prepared)
    made = {}
    for entry in clips.entries:
        made.setdefault(entry.source, []).append(entry)
    faded = [entry.start for entry in made.pop("fade.webm")]
    assert {source: len(entries) for source, entries in made.items()} == {
        "again.mov": 1,  # by name before its copy in sub/
        "b.avi": 1,
        "g.gif": 1,
        "pictures": 1,
        "two shots.mp4": 4,
    }
    assert len(faded) >= 2
    assert all(start + 4 / 7 < 25 / 14 or start > 25 / 14 for start in faded)
    report = json.loads((prepared / "report" / "report.json").read_text())
    counts = {"kept": len(clips), "duplicate": 1, "black": 1, "static": 1, "small": 1, "short": 1}
    assert report["counts"] == counts | {"unreadable": 1}
    assert list(report["unreadable"]) == ["bad.mp4"]
    second = made["two shots.mp4"][2:]
    assert second[0].start == pytest.approx(26 / 14, abs=1e-3)  # at the cut
    assert second[0].speed > 1.8 * made["two shots.mp4"][0].speed
    assert all((e.height, e.width, e.fps) == (64, 96, 7) for e in clips.entries)


def test_the_report_shows_pictures(prepared):
    for name in ("histograms", "kept", "rejected"):
        picture = cv2.imread(str(prepared / "report" / f"{name}.png"))
        assert picture is not None
        assert picture.std() > 10


def test_a_complete_collection_is_left_alone(videos, prepared, capsys):
    before = files_of(prepared)
    assert main([str(videos), str(prepared), *GIVEN]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([str(videos), str(prepared), *GIVEN, "--fps", "6"]) == 2
    assert "begun with fps 7.0, now it is 6.0" in capsys.readouterr().err
    assert files_of(prepared) == before


def test_killed_it_goes_on_and_gives_the_same_files(videos, prepared, tmp_path):
    # Catches finished videos that are done again, and half-written ones that count.
    out = tmp_path / "clips"
    with start(videos, out, *GIVEN, "--workers", "1") as process:
        for line in process.stdout:
            if line.startswith("[4/"):
                break
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "index.jsonl").exists()
    done = {p: p.stat().st_mtime_ns for p in (out / ".work" / "videos").glob("*.json")}
    assert len(done) >= 4
    with start(videos, out, *GIVEN, "--workers", "2") as process:
        told = process.stdout.read()
    assert process.returncode == 0, told
    assert files_of(out) == files_of(prepared)


def test_archives_with_latents_are_read_like_files(videos, tmp_path, capsys):
    options = ["--format", "shards", "--shard_mb", "1", "--calibrate", "--heldout", "0.3"]
    latents = [*LATENTS, "--draws", "2"]
    few = tmp_path / "few"
    few.mkdir()
    for name in ("two shots.mp4", "b.avi"):
        (few / name).symlink_to(videos / name)
    out = tmp_path / "out"
    assert main([str(few), str(out), *GIVEN, *options, *latents]) == 0
    clips = Clips(out)
    assert {p.name for p in out.iterdir()} == {
        "index.jsonl",
        "meta.json",
        "report",
        "shard-000000.tar",
    }
    assert clips[0]["latents"].shape == (5, 4, 16, 24)
    assert clips[0]["cond_latents"].shape == (2, 4, 16, 24)
    assert np.median([e.motion_bucket_id for e in clips.entries]) == 127
    assert 0 < len(Clips(out, split="heldout")) < len(clips)
    assert clips.meta[clips.folders[0]]["latents"]["draws"] == 2


def test_latents_can_be_added_to_files(prepared, videos, tmp_path):
    out = tmp_path / "clips"
    for path, data in files_of(prepared).items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(data)
    command = [str(videos), str(out), *GIVEN, "--latents", "--ckpt_path", CHECKPOINT]
    assert main(command) == 0
    assert Clips(out)[3]["latents"].shape == (5, 4, 16, 24)
    before = files_of(out)
    assert main(command) == 0
    assert files_of(out) == before


class Stop(Exception):  # noqa: N818 - a test's own
    """What a test stops a preparation by."""


def stop(*_):
    raise Stop


def test_a_preparation_without_latents_so_far_takes_those_of_any_settings(
    one, tmp_path, monkeypatch
):
    command = [str(one), str(tmp_path / "out"), *GIVEN, *LATENTS, "--draws"]
    with monkeypatch.context() as patch:
        patch.setattr("scripts.prepare_videos.encode", stop)
        with pytest.raises(Stop):
            main([*command, "3"])
    assert main([*command, "2"]) == 0
    clips = Clips(tmp_path / "out")
    assert clips[0]["cond_latents"].shape[0] == 2
    assert clips.meta[clips.folders[0]]["latents"]["draws"] == 2


@pytest.mark.parametrize("complete", [False, True])
def test_latents_of_other_settings_are_not_mixed(one, tmp_path, monkeypatch, capsys, complete):
    out = tmp_path / "out"
    command = [str(one), str(out), *GIVEN]
    latents = [*command, *LATENTS, "--draws"]
    if complete:
        assert main(command) == 0
    with monkeypatch.context() as patch:
        patch.setattr(
            "scripts.prepare_videos.tell", lambda text: text.startswith("latents") and stop()
        )
        with pytest.raises(Stop):
            main([*latents, "3"])
    begun = files_of(out)
    assert main([*latents, "2"]) == 2
    assert "'draws': 3" in capsys.readouterr().err
    assert files_of(out) == begun
    if not complete:
        assert main(command) == 2
    assert main([*latents, "3"]) == 0
    assert Clips(out)[0]["cond_latents"].shape[0] == 3
    assert not (out / ".work").exists()


def test_where_nothing_was_kept_another_preparation_can_begin(one, tmp_path, capsys):
    command = [str(one), str(tmp_path), "--frames", "5", "--sizes"]
    assert main([*command, "1000x1000"]) == 2
    assert "small 1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []  # a folder that was there stays
    assert main([*command, "64x64"]) == 0


def test_progress_that_nobody_reads_does_not_stop_it(one, tmp_path):
    command = [sys.executable, SCRIPT, str(one), str(tmp_path), *GIVEN]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(
            command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "index.jsonl").is_file()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["absent", "out"], "no such file or folder"),
        (["empty", "out"], "no videos in"),
        (["empty", "full"], "has other files"),
        (["empty", "out", "--sizes", "60x64"], "multiples of 8"),
        (["empty", "out", "--frames", "1"], "expected 2 or more"),
        (["empty", "out", "--latents"], "need each other"),
        (["empty", "out", "--heldout", "1"], "from 0 to below 1"),
        (["one", "full/file"], "need a folder at "),
        (["one", "full/file/out"], "full/file is a file"),
        (["one", "out", "--latents", "--ckpt_path", "nofile"], "checkpoint 'nofile'"),
        (["one", "out", *LATENTS, "--device", "nodevice"], "device 'nodevice'"),
        (["one", "out", *LATENTS, "--config", "no.yaml"], "no.yaml"),
        (["one", "out", *GIVEN, "--max_upscale", "0.1"], "no clip is left"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    one, tmp_path, monkeypatch, capsys, arguments, complaint
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/file").touch()
    Path("one").symlink_to(one)
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr().err
    assert code == 2
    assert list(Path("full").iterdir()) == [Path("full/file")]
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert complaint in told
    assert not Path("out").exists()


def test_the_command_line_needs_neither_torch_nor_numpy():
    code = (
        "import sys; from scripts.prepare_videos import parse; parse(['a', 'b']);"
        "sys.exit(bool({'torch', 'numpy', 'cv2', 'av'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_cluster_gives_the_same_files(videos, prepared, tmp_path):
    pytest.importorskip("ray.data")
    with start(videos, tmp_path / "clips", *GIVEN, "--ray", "local") as process:
        told = process.stdout.read()
    assert process.returncode == 0, told
    assert files_of(tmp_path / "clips") == files_of(prepared)


def test_without_ray_one_line_says_what_to_install(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([str(videos), str(tmp_path / "out"), *GIVEN, "--ray", "auto"]) == 2
    assert "pip install 'ray[data]'" in capsys.readouterr().err


def test_the_commands_of_the_page_run(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "data.md").read_text()
    blocks = page.split("```bash\n")[1:]
    commands = [line for block in blocks for line in block.split("```")[0].splitlines() if line]
    commands = [command for command in commands if "--ray" not in command]
    assert len(commands) >= 4
    monkeypatch.chdir(tmp_path)
    Path("videos").mkdir()
    for number in range(3):
        shot = pan(scene(number, (160, 400)), 0.01 * (1 + number), 28)
        write_video(Path("videos", f"{number}.mp4"), shot, 14)
    Path("checkpoints").symlink_to(ROOT / "checkpoints")
    for command in commands:
        program, script, *arguments = shlex.split(command)
        assert (program, script) == ("python", "scripts/prepare_videos.py")
        assert main(arguments) == 0, command
