"""Watermark and safety filter from the command line and the pipeline, on the one-second model."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from scripts.sampling.simple_video_sample import main
from sgm.inference import SamplingOptions, VideoPipeline
from sgm.inference.progress import SamplingStopped
from sgm.inference.safety import HEADS, SafetyFilter, blur, find_filter
from sgm.inference.watermark import BITS, read
from tests.judge import write_filter, write_head
from tests.tiny import tiny_config, write_tiny_checkpoint

QUICK = ["--version=svd_tiny", "--num_frames=2", "--num_steps=1", "--output_folder=out"]
QUICK += ["--format=png"]  # exact


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture
def place(tmp_path, monkeypatch, weights):
    """A working directory with a model under a name of the table, and a picture."""
    for folder in ("checkpoints", "configs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "checkpoints" / "svd_tiny.safetensors").symlink_to(weights)
    OmegaConf.save(tiny_config(), tmp_path / "configs" / "svd_tiny.yaml")
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SGM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def sample(*arguments, size=(64, 64)):
    sides = [f"--height={size[0]}", f"--width={size[1]}"]
    return main(["a.png", *QUICK, *sides, *arguments])


def frames(number):
    folder = Path("out", f"{number:06d}")
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def record(number):
    return json.loads(Path("out", f"{number:06d}.json").read_text())


def one_line(capsys):
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    return error


def test_watermark_as_a_switch(place):
    """Catches a mark in a video that nobody asked it for, or none where the record says so."""
    assert sample(size=(256, 256)) == 0
    assert sample("--watermark", size=(256, 256)) == 0
    assert [record(number)["watermark"] for number in (0, 1)] == [False, True]
    plain, marked = frames(0), frames(1)
    assert all(np.array_equal(read(frame), BITS) for frame in marked)
    assert not any(np.array_equal(read(frame), BITS) for frame in plain)
    assert np.abs(marked.astype(float) - plain).mean() < 5


def test_a_finding_blurs_the_video_and_is_on_record(place, caplog):
    write_filter(place / "passes")
    write_filter(place / "finds", finds=True)
    assert sample() == 0
    assert sample("--safety_filter=passes") == 0
    assert "blurred" not in caplog.text
    assert sample("--safety_filter=finds") == 0
    assert "the video is blurred" in caplog.text
    plain, passed, found = (frames(number) for number in range(3))
    assert np.array_equal(passed, plain)
    assert np.array_equal(found, blur(plain))
    assert not np.array_equal(found, plain)
    described = [record(number)["safety_filter"] for number in range(3)]
    assert described[0] == "off"
    assert [each["flagged"] for each in described[1:]] == [False, True]
    assert described[1]["path"] == str(place / "passes")
    assert len({each["sha256"] for each in described[1:]}) == 2


def test_a_blurred_video_is_marked_too(place):
    """Catches the watermark put in before it is blurred away."""
    write_filter(place / "finds", finds=True)
    assert sample("--safety_filter=finds", "--watermark", size=(256, 256)) == 0
    assert record(0)["safety_filter"]["flagged"] is True
    assert all(np.array_equal(read(frame), BITS) for frame in frames(0))


def test_resume_and_repeat_know_both_and_records_from_before(place, capsys):
    write_filter(place / "passes")
    assert sample() == 0
    path = Path("out", "000000.json")
    older = record(0)
    for name in ("crop_x", "crop_y", "watermark", "safety_filter"):
        del older["options"][name]
    del older["watermark"], older["safety_filter"]
    path.write_text(json.dumps(older))
    assert sample("--resume") == 0
    assert not Path("out", "000001.json").exists()
    assert sample("--resume", "--safety_filter=passes") == 0
    assert sample("--resume", f"--safety_filter={place / 'passes'}") == 0
    assert sample("--resume", "--crop_x=0.0") == 0
    assert not Path("out", "000003.json").exists()
    for number in (0, 1, 2):
        again = ["--repeat", f"out/{number:06d}.json", "--output_folder=out"]
        assert main(again) == 0
        assert np.array_equal(frames(3 + number), frames(number))
    assert record(4)["safety_filter"] == record(1)["safety_filter"]
    assert record(5)["options"]["crop_x"] == 0
    assert not np.array_equal(frames(2), frames(0))
    write_filter(place / "passes", finds=True)
    capsys.readouterr()
    assert main(["--repeat", "out/000001.json", "--output_folder=out"]) == 2
    assert "no longer the one of the record: give --safety_filter" in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--watermark"], "65536 pixels or more, such as 256x256, got 64x64"),
        (["--safety_filter=none"], "safety_filter 'none': no such folder"),
        (["--safety_filter=configs"], "p_head_v1.npz and w_head_v1.npz missing"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_model_is_loaded(place, capsys, arguments, words):
    Path("checkpoints", "svd_tiny.safetensors").unlink()
    Path("checkpoints", "svd_tiny.safetensors").write_bytes(b"never read")
    assert sample(*arguments) == 2
    assert words in one_line(capsys)
    assert not Path("out").exists()


def test_a_missing_package_is_refused_before_the_model_is_loaded(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "imwatermark", None)
    assert sample("--watermark", size=(256, 256)) == 2
    assert "pip install 'svd-video[watermark]'" in one_line(capsys)
    assert not Path("out").exists()


def test_every_frame_is_judged_and_that_can_be_stopped(place):
    """Catches: the first few frames alone judged; a run that cannot be cancelled meanwhile."""
    pipeline = VideoPipeline.from_spec("svd_tiny", device="cpu", dtype="float32")
    options = SamplingOptions(num_frames=6, num_steps=1, height=64, width=64)
    folder = write_filter(place / "filter")
    frames = pipeline("a.png", options).frames
    embedded = SafetyFilter(find_filter(folder)).embed(frames).numpy()
    last = embedded[-1] - embedded[:-1].mean(axis=0)
    heights = embedded @ last
    write_head(folder / HEADS[0], last, -(heights[-1] + heights[:-1].max()) / 2)
    assert heights[-1] > heights[:-1].max()
    options = options.replace(safety_filter=folder)
    assert pipeline("a.png", options).flagged is True
    decoded = []

    def stop(progress):
        decoded.append(progress.stage == "decoding" and progress.step == 6)
        return sum(decoded) < 2

    with pytest.raises(SamplingStopped):
        pipeline("a.png", options, callback=stop)


def test_the_pipeline_filters_frames_alone(place):
    write_filter(place / "finds", finds=True)
    pipeline = VideoPipeline.from_spec("svd_tiny", device="cpu", dtype="float32")
    quick = SamplingOptions(num_frames=2, num_steps=1, height=64, width=64, safety_filter="finds")
    video = pipeline("a.png", quick)
    assert video.flagged is True
    assert video.latents is None  # they would give the video that is withheld
    open_ = pipeline("a.png", quick.replace(safety_filter=None))
    assert open_.flagged is None
    assert np.array_equal(video.frames, blur(open_.frames))
    for output in ("numpy", "tensor", "latents"):
        with pytest.raises(ValueError, match="safety_filter need output frames, got "):
            pipeline("a.png", quick.replace(output=output))
    write_filter(place / "passes")
    passed = pipeline("a.png", quick.replace(safety_filter="passes"))
    assert passed.flagged is False
    assert passed.latents is not None
