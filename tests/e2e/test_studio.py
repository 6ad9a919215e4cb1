"""A shared page without its widgets, on the random one-second model: queue, runs, files, limits."""

import ctypes
import gc
import io
import json
import threading
import time
import weakref
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageFile

from scripts.sampling import simple_video_sample
from sgm.inference import specs
from sgm.inference.budget import MIN
from sgm.inference.generation import Generation
from sgm.inference.options import SamplingOptions
from sgm.inference.videos import Video
from sgm.serving.gallery import Run
from sgm.serving.limits import Limits
from sgm.serving.queue import Cancelled
from sgm.serving.studio import MEASUREMENTS, Order, Studio
from tests.tiny import tiny_config, write_tiny_checkpoint

ALICE, BOB = "a" * 32, "b" * 32


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def home(tmp_path_factory, weights):
    """A working directory with the bundled model and SVD, both in small."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(specs, "ROOT", home)
        for folder in ("checkpoints", "configs"):
            (home / folder).mkdir()
        for name in ("svd_tiny", "svd"):
            (home / "checkpoints" / f"{name}.safetensors").symlink_to(weights)
        for name in ("svd_tiny", "svd", "svd_xt"):
            OmegaConf.save(tiny_config(), home / "configs" / f"{name}.yaml")
        yield home


@pytest.fixture(scope="module")
def shared_studio(home):
    """One studio for all tests that leave its limits alone, as loading and counting take time."""
    studio = Studio(Limits(output_folder=home / "videos", max_queue=12, keep_runs=8))
    yield studio
    studio.close()


@pytest.fixture
def studio(shared_studio, monkeypatch):
    """The shared one; no test may leave an order to the next."""
    tickets, submit = weakref.WeakSet(), shared_studio.submit

    def remember(visitor, order):
        ticket = submit(visitor, order)
        tickets.add(ticket)
        return ticket

    with monkeypatch.context() as patch:
        patch.setattr(shared_studio, "submit", remember)
        yield shared_studio
    assert all(ticket.finished for ticket in tickets)


@pytest.fixture
def limited(home, tmp_path):
    """Make a studio of other limits."""
    studios = []

    def make(**limits):
        studios.append(Studio(Limits(**({"output_folder": tmp_path / "videos"} | limits))))
        return studios[-1]

    yield make
    for each in studios:
        each.close()


def picture(seed=0, size=(48, 72), format="png"):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def order(*pictures, version="svd_tiny", **options):
    usual = {"num_frames": 2, "num_steps": 1, "height": 64, "width": 64}
    return Order(version, pictures or (picture(),), SamplingOptions(**(usual | options)))


def made(studio, visitor, *pictures, **options):
    return studio.submit(visitor, order(*pictures, **options)).result()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_frames_and_record_equal_those_of_the_command_line(studio, home, tmp_path):
    # Catches: a default of the page's own, another path from picture to frames or to the file.
    flags = {"num_steps": 3, "num_frames": 3, "seed": 5, "fps": 9, "motion_bucket_id": 200}
    asked = Order("svd_tiny", (picture(1),), SamplingOptions(**flags))
    (run,) = studio.submit(ALICE, asked).result()
    (tmp_path / "given.png").write_bytes(picture(1))
    folder = tmp_path / "line"
    line = [f"--{name}={value}" for name, value in flags.items()]
    given = [str(tmp_path / "given.png"), "--version=svd_tiny", f"--output_folder={folder}"]
    assert simple_video_sample.main([*given, *line]) == 0
    assert run.file("mp4") == (folder / "000000.mp4").read_bytes()
    theirs = json.loads((folder / "000000.json").read_text())
    ours = json.loads(run.video.with_suffix(".json").read_text())
    for record in (ours, theirs):
        record["input"].pop("path")
        record.pop("seconds")
    assert ours == theirs


def test_kept_frames_are_those_before_compression(studio):
    # Catches: frames from the mp4 while the exact ones are at hand, a zip of other frames.
    (run,) = made(studio, ALICE, seed=8, num_frames=4)
    frames = run.frames()
    assert (frames.shape, frames.dtype) == ((4, 64, 64, 3), np.uint8)
    with zipfile.ZipFile(io.BytesIO(run.file("png"))) as archive:
        files = [archive.read(name) for name in archive.namelist()]
    pictures = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
    np.testing.assert_array_equal(pictures, frames)


def test_ten_visitors_are_served_in_turns(studio):
    # Catches: a visitor served twice before another's first, an order lost in the queue.
    first = studio.submit(f"{0:032x}", order(num_frames=4, num_steps=20))
    until(lambda: first.state == "running")
    tickets = [(0, studio.submit(f"{0:032x}", order(seed=100)))]
    tickets += [(n, studio.submit(f"{n:032x}", order(seed=n))) for n in range(1, 10)]
    tickets += [(5, studio.submit(f"{5:032x}", order(seed=105)))]
    assert [ticket.position for _, ticket in tickets] == list(range(1, 12))
    finished = [ticket.result()[0].video for _, ticket in tickets]
    times = [video.stat().st_mtime_ns for video in finished]
    assert times == sorted(times)
    for number, ticket in tickets:
        seeds = [run.record["options"]["seed"] for run in studio.runs(f"{number:032x}")]
        assert ticket.result()[0].record["options"]["seed"] in seeds
        assert len(seeds) == {0: 3 - 1, 5: 2}.get(number, 1)


def test_memory_is_flat_after_fifty_runs(studio):
    # Catches: latents, frames or pictures that stay with old tickets, runs or estimates. The
    # pictures alone, of 0.8 MB, would take 39 MB; 12 MB are allowed for the allocator's gaps.
    def run(seed):
        made(studio, BOB, picture(seed, size=(512, 512)), seed=seed)

    for seed in range(8):
        run(seed)
    before, tensors, videos = resident_bytes(), living(torch.Tensor), living(Run)
    for seed in range(8, 58):
        run(seed)
    assert (living(torch.Tensor), living(Run), living(Video)) == (tensors, videos, 0)
    assert resident_bytes() - before < 12 * 2**20
    assert len(studio.runs(BOB)) == 8
    assert len(list(studio.runs(BOB)[0].video.parent.rglob("*"))) == 8 * 2 + 1 + 8


def living(kind):
    gc.collect()
    return sum(type(each) is kind for each in gc.get_objects())


def resident_bytes():
    """Of this process, without what is free and only kept for later by the C library."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def test_cancelling_midway_frees_the_worker_within_a_step(studio):
    # Catches: a run that goes on to its end, a next one that waits for it or gets other frames.
    (before,) = made(studio, ALICE, seed=3)
    long = studio.submit(ALICE, order(num_steps=100, num_frames=4))
    following = studio.submit(BOB, order(seed=3))
    until(lambda: long.progress is not None and long.progress.text.startswith("sampling 2"))
    long.cancel()
    assert following.wait(60)
    step = long.progress.text.partition("/")[0]
    assert int(step.removeprefix("sampling ")) < 60
    assert long.state == "cancelled"
    with pytest.raises(Cancelled):
        long.result()
    np.testing.assert_array_equal(following.result()[0].frames(), before.frames())


def test_progress_rises_and_shows_the_frames(studio):
    # Catches: a bar that jumps back, no preview, a video's number that is not counted.
    ticket = studio.submit(ALICE, order(picture(1), picture(2), num_steps=6, videos_per_image=2))
    seen = []
    while not ticket.wait(0.001):
        if ticket.progress is not None and ticket.progress not in seen:
            seen.append(ticket.progress)
    assert len(ticket.result()) == 4
    assert {each.pictures for each in seen} == {4}
    assert [each.picture for each in seen] == sorted(each.picture for each in seen)
    for number in (1, 2, 3, 4):
        shares = [each.fraction for each in seen if each.picture == number]
        assert shares == sorted(shares)
        assert 0 <= min(shares) < max(shares) <= 1
    previews = [each.preview for each in seen if each.preview is not None]
    assert {each.shape for each in previews} == {(2, 16, 16, 3)}
    left = [each.seconds_left for each in seen if each.text.startswith("sampling")]
    assert all(seconds is not None and seconds >= 0 for seconds in left)


def test_one_model_is_in_memory_for_everybody(studio):
    # Catches: weights loaded for each visitor, two models at once, a model that cannot be freed.
    made(studio, ALICE)
    first = studio._model.pipeline
    made(studio, BOB, seed=2)
    assert studio._model.pipeline is first
    made(studio, BOB, version="svd")
    assert studio.loaded == "svd"
    made(studio, BOB, optimize="none")
    assert studio.loaded == "svd_tiny"
    assert studio._model.pipeline.optimize == "none"
    running = studio.submit(ALICE, order(num_steps=100))
    until(lambda: running.progress is not None)
    with pytest.raises(ValueError, match="a video is being made: unload the model when"):
        studio.unload()
    running.cancel()
    running.wait(60)
    studio.unload()
    assert studio.loaded is None
    made(studio, ALICE)


def test_a_released_model_is_gone_for_good(studio):
    # Catches: cycles within a model that the garbage collector was told to spare.
    class Part:
        pass

    def part_of_the_model():
        made(studio, ALICE)
        part = studio._model.pipeline.part = Part()
        part.itself = part
        return weakref.ref(part)

    for release in (studio.unload, lambda: made(studio, ALICE, version="svd")):
        part = part_of_the_model()
        gc.freeze()
        release()
        assert part() is None


def test_the_garbage_collector_spares_the_model(studio):
    # Catches: a page that stops the run while it goes through a model, also one loaded again.
    for _ in range(2):
        studio.unload()
        made(studio, ALICE)
        unet = studio._model.pipeline.engine.model.diffusion_model
        assert not any(each is unet for each in gc.get_objects())


def test_weights_that_have_changed_are_loaded_again(limited, home, weights):
    # Catches: a replaced file of which the old weights are used.
    studio = limited()
    file = home / "checkpoints" / "svd_xt.safetensors"
    with pytest.raises(ValueError, match="svd_xt needs its weights"):
        studio.submit(ALICE, order(version="svd_xt"))
    file.symlink_to(weights)
    (before,) = made(studio, ALICE, version="svd_xt")
    file.unlink()
    write_tiny_checkpoint(file, seed=1)
    (after,) = made(studio, ALICE, version="svd_xt")
    file.unlink()
    assert not np.array_equal(before.frames(), after.frames())


def bomb(side=20_000):
    """A small file of 20,000 x 20,000 pixels."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bomb, "the picture is larger than the 60 megapixels allowed here: make it smaller"),
        (lambda: bomb(7800), "the picture is larger than the 60 megapixels"),
        (lambda: b"no picture\n", "the given picture: not a jpeg, png, webp, gif, bmp or tiff pic"),
        (lambda: b"", "the picture's file is empty"),
        (lambda: bytes(25_000_000), "the picture's file has 25.0 MB, at most 20 are allowed here"),
        (lambda: picture(size=(500, 500))[:-5000], "the given picture: "),
    ],
)
def test_refused_pictures_are_one_line_each(studio, data, message):
    # Catches: a bomb decoded, a traceback, a file found out to be none after waiting in the queue.
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is looked at
        studio.submit(ALICE, order(data()))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^picture 2 of 2: "):
        studio.submit(ALICE, order(picture(), data()))


def test_the_pixels_of_a_bomb_are_never_decoded(studio, monkeypatch):
    asked = order(bomb(7800))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="megapixels"):
        studio.submit(ALICE, asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 101}, "num_frames must be at most 100 here"),
        ({"height": 66, "width": 65}, "mp4 needs an even height and width"),
        ({"lora": "/etc/passwd"}, "lora is for the operator to set"),
        ({"device": "cpu"}, "device is for the operator to set"),
        ({"min_guidance": 9.0}, "min_guidance must not exceed max_guidance"),
        ({"version": "svd_xt"}, "svd_xt needs its weights at "),
        ({"version": "../svd"}, "version must be one of"),
        ({"videos_per_image": 9}, "videos_per_image must be at most 4 here"),
    ],
)
def test_refused_orders_are_one_line_and_do_not_wait(studio, options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is looked at
        studio.submit(ALICE, order(**options))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("visitor", ["", "../../etc", "A" * 32, "a" * 31, "a" * 32 + "\n"])
def test_a_visitors_id_is_no_path(studio, visitor):
    with pytest.raises(ValueError, match="32 random hexadecimal digits"):
        studio.submit(visitor, order())
    with pytest.raises(ValueError, match="32 random hexadecimal digits"):
        studio.runs(visitor)


def test_the_number_of_pictures_and_models_is_limited(limited):
    studio = limited(models=("svd_tiny",), max_pictures=2)
    assert [offer.spec.name for offer in studio.offers()] == ["svd_tiny"]
    with pytest.raises(ValueError, match="the model must be one of svd_tiny here, got 'svd'"):
        studio.submit(ALICE, order(version="svd"))
    with pytest.raises(ValueError, match="give from 1 to 2 pictures, got 3"):
        studio.submit(ALICE, order(*[picture()] * 3))
    with pytest.raises(ValueError, match="give from 1 to 2 pictures, got 0"):
        studio.submit(ALICE, Order("svd_tiny", (), SamplingOptions()))


def test_visitors_do_not_see_each_others_videos(studio):
    # Catches: runs listed to all, a token that opens another visitor's video, ids in file names.
    (run,) = made(studio, ALICE, seed=11)
    assert run in studio.runs(ALICE)
    assert run not in studio.runs(BOB)
    assert run.video not in {each.video for each in studio.runs(BOB)}
    assert ALICE not in str(run.video)
    assert run.picture == picture()
    assert str(run.video.parent) not in json.dumps(run.record)


def test_an_operator_may_show_all_videos_to_all(limited, home, tmp_path):
    (tmp_path / "given.png").write_bytes(picture())
    line = ["--version=svd_tiny", "--num_frames=2", "--num_steps=1"]
    assert simple_video_sample.main([str(tmp_path / "given.png"), *line]) == 0
    studio = limited(share_outputs=True)
    (run,) = made(studio, ALICE, seed=12)
    shown = studio.runs(BOB)
    assert [each.record["options"]["seed"] for each in shown] == [12, 23]
    assert shown[0].file("mp4") == run.file("mp4")
    assert [each.picture is None for each in shown] == [False, True]
    assert shown[1].frames().shape == (2, 64, 64, 3)


def test_a_lack_of_memory_is_told_with_what_would_fit_and_the_queue_goes_on(studio, monkeypatch):
    # Catches: a crash, advice that does not fit either, a worker or a model left unusable.
    needed = studio.cost(studio.settings("svd_tiny", None, order(num_frames=6).options), "svd_tiny")
    free = needed.bytes * 0.8
    monkeypatch.setattr("sgm.serving.costs.free_bytes", lambda _: int(free))
    studio.unload()
    ticket = studio.submit(ALICE, order(num_frames=6))
    with pytest.raises(MemoryError) as error:
        ticket.result()
    told = str(error.value)
    assert told.startswith("out of memory: svd_tiny takes about ")
    assert " for 6 frames of 64x64, and " in told
    frames = int(told.rpartition(" frames")[0].rpartition(" ")[2])
    assert 1 <= frames < 6
    assert len(made(studio, ALICE, num_frames=frames)) == 1


def test_a_too_large_order_does_not_cost_others_the_model(studio, monkeypatch):
    # Catches: one visitor who has the model loaded anew for everybody, each time.
    made(studio, BOB)
    pipeline, asked = studio._model.pipeline, order(num_frames=6)
    cost = studio.cost(studio.settings("svd_tiny", None, asked.options), "svd_tiny")
    free = int(cost.bytes * 0.8) - studio._model.held
    monkeypatch.setattr("sgm.serving.costs.free_bytes", lambda _: free)
    with pytest.raises(MemoryError, match=r"svd_tiny takes about .*; this would fit: "):
        studio.submit(ALICE, asked).result()
    made(studio, BOB)
    assert studio._model.pipeline is pipeline


def test_the_plan_in_force_at_the_end_is_noted(limited, monkeypatch):
    # Catches: a run noted under the memory plan that it had no room for.
    studio, sample = limited(), Generation.sample

    def step_down(generation, *args):
        generation._placement.plan = MIN
        return sample(generation, *args)

    monkeypatch.setattr(Generation, "sample", step_down)
    made(studio, ALICE)
    (line,) = (studio.limits.output_folder / MEASUREMENTS).read_text().splitlines()
    assert json.loads(line)["plan"] == MIN.name


def test_an_error_of_the_device_is_told_as_such(studio, monkeypatch):
    # Catches: an error within a run that is not turned into advice; a half-used model kept.
    def run_out(*_, **__):
        raise MemoryError("out of memory: try something")

    with monkeypatch.context() as patch:
        patch.setattr(Generation, "sample", run_out)
        ticket = studio.submit(ALICE, order(num_frames=6))
        with pytest.raises(MemoryError, match=r"svd_tiny takes about .*; this would fit: "):
            ticket.result()
    assert studio.loaded is None
    assert len(made(studio, ALICE)) == 1


def test_cost_comes_from_earlier_runs_of_this_machine(limited):
    # Catches: an estimate that stays a guess, loads the model, or counts anew at each call.
    studio = limited()
    settings = studio.settings("svd_tiny", None, order(num_steps=8, num_frames=4).options)
    guess = studio.cost(settings, "svd_tiny")
    assert (guess.measured, studio.loaded) == (False, None)
    assert 0 < guess.bytes < guess.free_bytes
    for seed in range(3):
        made(studio, ALICE, num_steps=8, num_frames=4, seed=seed)
    known = studio.cost(settings, "svd_tiny")
    assert known.measured
    took = [run.record["seconds"] for run in studio.runs(ALICE)]
    assert known.seconds == pytest.approx(sorted(took)[1], rel=0.5)
    twice = studio.settings("svd_tiny", None, order(num_steps=16, num_frames=4).options)
    sampling = studio.cost(twice, "svd_tiny").stages["sampling"]
    assert sampling == pytest.approx(2 * known.stages["sampling"])
    began = time.monotonic()
    for _ in range(20):
        studio.cost(settings, "svd_tiny")
    assert time.monotonic() - began < 1
    again = limited()  # another start of the page
    assert again.cost(settings, "svd_tiny").measured


def test_pages_may_ask_while_a_run_goes_on(studio):
    # Catches: estimates in other threads that disturb a run, or wait for its end.
    running = studio.submit(ALICE, order(num_steps=15, num_frames=4))
    errors = []

    def ask():
        try:
            for frames in (5, 7):
                options = order(num_frames=frames).options
                studio.cost(studio.settings("svd_tiny", None, options), "svd_tiny")
                studio.runs(BOB)
        except Exception as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    (run,) = running.result()
    assert errors == []
    (alone,) = made(studio, ALICE, num_steps=15, num_frames=4)
    np.testing.assert_array_equal(run.frames(), alone.frames())
