"""The parts of a preparation: sizes, motion map, filters, fingerprints, mp4, archives, workers."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from sgm.data.index import Entry, Place, read_index, write_index
from sgm.data.motion import LINEAR, MotionMap, calibrate, clip_speed, flow_to_bucket
from sgm.data.mp4 import decode_mp4, encode_mp4
from sgm.data.quality import Seen, fault, fingerprint, text_share
from sgm.data.reading import cover, find_videos, numbered_pictures, read_frames
from sgm.data.shards import write_shards
from sgm.data.sizes import choose_size, parse_sizes
from sgm.data.workers import Crash, _work, map_in_processes
from tests.footage import pan, scene, write_video

pytestmark = pytest.mark.usefixtures("new_fork_server")

ROOT = Path(__file__).parents[2]


def test_sizes_are_read_or_refused():
    assert parse_sizes("576x1024, 64x64,64x64") == ((576, 1024), (64, 64))
    for text, complaint in [("64", "HEIGHTxWIDTH"), ("64x60", "multiples of 8"), ("", "HEIGHTx")]:
        with pytest.raises(ValueError, match=complaint):
            parse_sizes(text)


def test_the_size_of_the_nearest_shape_that_needs_no_magnification():
    sizes = parse_sizes("576x1024,1024x576,768x768,288x512")
    assert choose_size((1080, 1920), sizes) == (576, 1024)
    assert choose_size((1920, 1080), sizes) == (1024, 576)
    assert choose_size((900, 1000), sizes) == (768, 768)
    assert choose_size((480, 854), sizes) == (288, 512)  # 576x1024 would magnify 1.2 times
    assert choose_size((480, 854), sizes, max_upscale=1.25) == (576, 1024)
    assert choose_size((200, 300), sizes) is None


def test_the_linear_map_is_what_it_was():
    # Weights that exist were trained with it: bucket = 255 speed / 0.010.
    for speed in (0.0, 0.001, 0.00498, 0.0099, 0.5):
        assert LINEAR.bucket(speed) == min(round(25500 * speed), 255)
        assert flow_to_bucket(64 * speed, 64) == LINEAR.bucket(speed)


def test_a_calibrated_map_puts_the_median_at_127_and_keeps_the_tail_apart():
    speeds = np.random.default_rng(0).lognormal(-6, 1.2, 5001)
    motion = calibrate(speeds)
    buckets = np.array([motion.bucket(speed) for speed in speeds])
    assert np.median(buckets) == 127
    assert (buckets == 255).mean() < 0.02  # one line through the median: over a quarter
    assert motion.bucket(motion.speed(63)) == 63
    assert motion.speed(127) == pytest.approx(np.median(speeds))
    assert motion.bucket(motion.speed(127) / 2) in (63, 64)
    alike = calibrate([0.003] * 9)
    assert (alike.bucket(0.003), alike.bucket(0.0015), alike.bucket(1)) == (127, 64, 255)
    for still in ([], [0.0, 0.0, 0.0, 0.1]):
        with pytest.raises(ValueError, match="clips that move"):
            calibrate(still)
    with pytest.raises(ValueError, match="growing"):
        MotionMap((0.0, 0.2, 0.1), (0.0, 127.0, 255.0))


def test_one_motion_gets_one_bucket_in_all_sizes():
    # Catches a measure whose windows are fixed while the picture grows.
    small = pan(scene(1), 0.01, 5, (64, 96))
    large = np.stack([cv2.resize(f, (576, 384), interpolation=cv2.INTER_CUBIC) for f in small])
    assert clip_speed(small) == pytest.approx(0.01, rel=0.15)
    assert clip_speed(large) == pytest.approx(clip_speed(small), rel=0.05)


def test_what_a_clip_is_left_out_for():
    good = pan(scene(2), 0.01, 6)
    assert fault(good, 0.01) is None
    assert fault(good, 0.0001) == "static"
    assert fault(good, 0.0001, min_speed=0) is None
    night = good // 12
    assert fault(night, 0.01) == "black"
    lights = night.copy()
    lights[:, 20:40, 20:60] = 220  # a dark picture with something to see in it
    assert fault(lights, 0.01) is None
    assert fault(np.full_like(good, 180), 0.01) == "flat"


def lettered(pictures, lines, size):
    """Pictures with text at the lower edge, outlined as subtitles are."""
    font, drawn = ImageFont.load_default(size), []
    for pixels in pictures:
        image = Image.fromarray(pixels)
        for row, line in enumerate(reversed(lines)):
            place = (image.width // 10, image.height - 10 - round((row + 1) * 1.3 * size))
            outline = {"stroke_width": 2, "stroke_fill": "black"}
            ImageDraw.Draw(image).text(place, line, fill="white", font=font, **outline)
        drawn.append(np.asarray(image))
    return np.stack(drawn)


def test_text_that_stays_on_a_moving_photograph():
    """Catches: edges of things taken for letters, and writing in the scene taken for subtitles."""
    photograph = np.asarray(Image.open(ROOT / "assets" / "sample.jpg").convert("RGB"))
    clip = np.stack([photograph[:, x : x + 640] for x in (0, 50, 100)])
    subtitles = lettered(clip, ["And then she said to him:", "we never had so much snow."], 24)
    headline = lettered(clip, ["BREAKING NEWS TODAY"], 48)
    sign = lettered([photograph], ["CITY HOTEL"], 48)[0]
    passing = np.stack([sign[:, x : x + 400] for x in (0, 120, 240)])
    assert text_share(clip) < 0.005
    assert 0.03 < text_share(subtitles) < 0.1
    assert 0.05 < text_share(headline) < 0.2
    assert text_share(passing) < 0.005
    small = np.stack([cv2.resize(frame, (400, 270)) for frame in subtitles])
    assert text_share(small) > 0.02
    assert fault(subtitles, 0.01) is None
    assert fault(subtitles, 0.01, max_text=0.02) == "text"
    assert fault(clip, 0.01, max_text=0.02) is None


def test_duplicates_are_found_after_another_encoding_but_not_by_a_shared_background():
    background = pan(scene(3), 0, 8, (72, 96))
    clips = []
    for x in (0, 30, 60):  # a fixed camera, and something that moves elsewhere in each clip
        clip = background.copy()
        for i, frame in enumerate(clip):
            frame[10 + 4 * i : 22 + 4 * i, x : x + 12] = (250, 240, 30)
        clips.append(clip)
    clips.append(pan(scene(4), 0.01, 8))
    seen = Seen()
    assert [seen.add(fingerprint(clip)) for clip in clips] == [None] * 4
    for number, clip in enumerate(clips):
        again = [cv2.resize(f, (64, 48), interpolation=cv2.INTER_AREA) for f in clip]
        blocky = [cv2.imdecode(cv2.imencode(".jpg", f, [1, 60])[1], 1) for f in again]
        brighter = np.clip(np.stack(blocky) * 1.08 + 5, 0, 255).astype(np.uint8)
        assert seen.add(fingerprint(brighter)) == number


def test_more_clips_than_the_first_table_holds_are_remembered():
    seen = Seen()
    hashes = np.random.default_rng(0).integers(0, 2**63, (1500, 2), np.uint64)
    assert all(seen.add((int(a), int(b))) is None for a, b in hashes)
    assert seen.add((int(hashes[3, 0]) ^ 7, int(hashes[3, 1]))) == 3
    assert seen.add((int(hashes[1400, 0]), int(hashes[1400, 1]) ^ 1)) == 1400


def test_a_clip_survives_its_mp4():
    frames = pan(scene(5), 0.02, 6, (64, 96))
    frames[:, :32, :32] = (200, 30, 40)  # catches another colour matrix on the way back
    data = encode_mp4(frames, 7)
    back = decode_mp4(data)
    assert back.shape == frames.shape
    error = np.square(back.astype(float) - frames).mean()
    assert 10 * np.log10(255**2 / error) > 33
    assert np.abs(back[:, 4:28, 4:28].mean(axis=(0, 1, 2)) - (200, 30, 40)).max() < 3
    assert encode_mp4(frames, 7) == data  # the same on every machine and run
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_mp4(data[:200])


def test_numbered_pictures_are_a_video_in_the_order_of_their_numbers(tmp_path):
    folder = tmp_path / "shot"
    folder.mkdir()
    for number in (1, 2, 10):  # by name, 10 comes before 2
        level = np.full((32, 48, 3), 20 * number, np.uint8)
        cv2.imwrite(str(folder / f"f{number}.png"), level)
    (folder / "cover.png").write_bytes((folder / "f1.png").read_bytes())
    (folder / "notes.txt").write_text("no picture")
    assert [p.name for p in numbered_pictures(folder)] == ["f1.png", "f2.png", "f10.png"]
    frames = [(time, cover(f, (32, 48)).mean()) for time, f in read_frames(folder, 5)]
    np.testing.assert_allclose(frames, [(0, 20), (0.2, 40), (0.4, 200)], atol=1)


def test_videos_are_found_in_order_without_hidden_ones_and_the_output(tmp_path):
    for name in ("b.mp4", "A/x.MKV", "A/.y.mp4", ".trash/z.mp4", "out/clips/k.mp4", "t.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_videos(tmp_path, leave_out=tmp_path / "out")
    assert [p.relative_to(tmp_path).as_posix() for p in found] == ["A/x.MKV", "b.mp4"]


def entries(root, count=5):
    made = []
    for number in range(count):
        path = root / f"{number}.bin"
        path.write_bytes(bytes([number]) * (100 + number))
        places = {s: Place(path.name, 100 + number) for s in ("mp4", "latents.safetensors")}
        made.append(Entry(f"k{number}", "v", 0.0, 7.0, 4, 8, 8, 0.1, 9, False, places))
    return made


def test_archives_follow_webdatasets_convention_and_the_index_finds_their_files(tmp_path):
    # The convention: files of a clip follow each other, and share the name up to its first dot.
    packed = list(write_shards(entries(tmp_path), tmp_path, limit=450))
    names = []
    for shard in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(shard) as archive:
            members = archive.getnames()
            names.append(members)
            facts = json.load(archive.extractfile(members[0]))
            assert facts["key"] == members[0].partition(".")[0]
            assert all(m.mtime == m.uid == 0 for m in archive)
    suffixes = ("json", "mp4", "latents.safetensors")
    expected = [[f"k{n}.{s}" for n in part for s in suffixes] for part in ((0, 1), (2, 3), (4,))]
    assert names == expected
    for number, entry in enumerate(packed):
        for suffix in suffixes[1:]:
            assert entry.files[suffix].read(tmp_path) == bytes([number]) * (100 + number)
    before = (tmp_path / "shard-000001.tar").read_bytes()
    list(write_shards(entries(tmp_path), tmp_path, limit=450))
    assert (tmp_path / "shard-000001.tar").read_bytes() == before


def test_an_index_comes_back_or_says_what_is_wrong(tmp_path):
    made = entries(tmp_path)
    write_index(tmp_path, made)
    assert read_index(tmp_path) == made
    (tmp_path / "2.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"2\.bin is shorter than the index says"):
        made[2].files["mp4"].read(tmp_path)
    with pytest.raises(ValueError, match=r"7\.bin: No such file"):
        Place("7.bin", 3).read(tmp_path)
    with (tmp_path / "index.jsonl").open("a") as file:
        file.write('{"key": "k9"')
    with pytest.raises(ValueError, match=r"index\.jsonl is damaged"):
        read_index(tmp_path)
    with pytest.raises(ValueError, match="no prepared clips"):
        read_index(tmp_path / "absent")


def square_or_die(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 9:
        raise OSError(28, "No space left on device")
    return number**2


def test_a_crash_costs_one_item():
    # Catches a pool that breaks as a whole when a decoder takes its process along.
    results = dict(map_in_processes(square_or_die, range(6), workers=2))
    assert isinstance(results.pop(3), Crash)
    assert results == {n: n**2 for n in (0, 1, 2, 4, 5)}


def test_an_error_ends_the_work_and_the_processes():
    started = time.monotonic()
    with pytest.raises(OSError, match="No space left"):
        list(map_in_processes(square_or_die, [9, 1], workers=1))
    assert time.monotonic() - started < 60


def test_a_process_that_nobody_waits_for_any_more_ends_quietly():
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    receiver.close()
    process = context.Process(target=_work, args=(sender, abs, 1))
    process.start()
    process.join()
    assert process.exitcode == 0


INTERRUPTED = """
import os, signal, threading
from sgm.data.workers import map_in_processes
from slow import double
threading.Timer(0.4, os.killpg, (os.getpgid(0), signal.SIGINT)).start()
try:
    list(map_in_processes(double, [1], 1))
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interruption_while_the_processes_start_is_told_once(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(1)\ndef double(x): return 2 * x\n")
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        start_new_session=True,  # a terminal's interruption reaches all processes
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


def test_rotation_of_a_video_is_part_of_its_size(tmp_path):
    from sgm.data.cuts import analyse

    write_video(tmp_path / "a.mkv", pan(scene(6), 0.01, 5, (48, 80)), 10)
    footage = analyse(read_frames(tmp_path / "a.mkv"))
    assert footage.size == (48, 80)
    assert footage.fps == pytest.approx(10, rel=0.02)
