"""docs/coming-from.md: what its tables say to write here runs, on the one-second model.

A code in a column "here" is a command line's flags (``--...``), a whole command, an expression that
gives `SamplingOptions`, which then make a video, or any other expression.
"""

import inspect
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from scripts import convert
from scripts.sampling import simple_video_sample
from sgm import SamplingOptions, VideoPipeline
from sgm.inference import specs
from sgm.inference.options import option_fields
from tests.foreign import native_config, tiny_diffusers_pipeline

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming-from.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| there ")
]
# Cells without a code of ours: what has no counterpart, or needs none.
WITHOUT = {"not yet", "not here", "not an option", "no need", "the same file"}

# The parameters of the original scripts/sampling/simple_video_sample.py.
ORIGINAL = [
    "input_path", "num_frames", "num_steps", "version", "fps_id", "motion_bucket_id", "cond_aug",
    "seed", "decoding_t", "device", "output_folder", "elevations_deg", "azimuths_deg",
    "image_frame_ratio", "verbose",
]  # fmt: skip
# The arguments of MindONE's examples/svd/image_to_video.py.
MINDONE = [
    "config", "mode", "seed", "image", "output_dir", "SVD.config", "SVD.checkpoint",
    "SVD.num_frames", "SVD.fps", "SVD.motion_bucket_id", "SVD.noise_aug_strength",
    "SVD.decode_chunk_size", "SVD.sampling_steps", "SVD.amp_level",
]  # fmt: skip


def codes():
    """The code of every cell "here", once each."""
    found = [code for row in ROWS for code in re.findall(r"`([^`]+)`", row[1])]
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory where a small random model has the bundled one's name, in all forms."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("assets", "configs", "videos"):
        (folder / name).mkdir()
    tiny_diffusers_pipeline(seed=3).save_pretrained(folder / "weights" / "svd_tiny_pipeline")
    forms = (["checkpoints/svd_tiny.safetensors"], ["weights/mindspore.ckpt", "--to", "mindspore"])
    for target, *to in forms:
        pipeline = str(folder / "weights" / "svd_tiny_pipeline")
        assert convert.main([pipeline, str(folder / target), *to]) == 0
    config = native_config(**{"sampler_config.params.num_steps": 1})
    OmegaConf.save(config, folder / "configs" / "svd_tiny.yaml")
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "assets" / "sample.jpg")
    return folder


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(specs, "ROOT", place)


@pytest.fixture(scope="module")
def names(place):
    """What the page's Python expressions may use."""
    config, weights = place / "configs/svd_tiny.yaml", place / "checkpoints/svd_tiny.safetensors"
    pipeline = VideoPipeline.from_spec("svd_tiny", config=config, ckpt_path=weights)
    return {
        "Image": Image,
        "SamplingOptions": SamplingOptions,
        "VideoPipeline": VideoPipeline,
        "image": place / "assets" / "sample.jpg",
        "pipeline": pipeline,
        "torch": torch,
    }


@pytest.mark.parametrize("code", codes())
def test_what_the_page_says_runs(code, names, place):
    """Catches a flag or an option that was renamed, removed or takes other values."""
    if code.startswith("--"):
        if "--repeat" in code:
            assert simple_video_sample.main(["--output_folder", "videos"]) == 0
        assert simple_video_sample.main(shlex.split(code)) == 0
        return
    if code.startswith("python scripts/convert.py "):
        assert convert.main(shlex.split(code)[2:]) == 0
        return
    result = eval(compile(code, PAGE.name, "eval"), dict(names))  # noqa: S307
    if isinstance(result, SamplingOptions):
        result = names["pipeline"](names["image"], result)
    assert result is not None


def test_the_example_of_the_page_runs(names):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    scope = {}
    exec(compile(block, PAGE.name, "exec"), scope)
    assert scope["video"].frames.shape == (3, 64, 64, 3)


def theirs():
    return " ".join(row[0] for row in ROWS)


@pytest.mark.parametrize("name", ORIGINAL)
def test_every_flag_of_the_original_is_on_the_page_and_keeps_its_name(name):
    here = next(row[1] for row in ROWS if re.search(rf"`--{name}\b", row[0]))
    assert re.search(rf"`--{name}\b", here)


@pytest.mark.parametrize("name", MINDONE)
def test_every_argument_of_mindone_is_on_the_page(name):
    assert re.search(rf"`--{re.escape(name)}\b", theirs())


def test_every_argument_of_diffusers_is_on_the_page():
    """Held against the installed diffusers: catches an argument that it has got since."""
    from diffusers import StableVideoDiffusionPipeline

    names = list(inspect.signature(StableVideoDiffusionPipeline.__call__).parameters)[1:]
    assert not [name for name in names if not re.search(rf"`{name}\b", theirs())]


def test_every_row_has_an_answer():
    """Catches a row of two cells, or an answer that is neither code nor one of the known words."""
    assert len(ROWS) > 60
    for row in ROWS:
        assert len(row) == 3
        assert "`" in row[1] or row[1] in WITHOUT, row


def test_what_is_said_not_to_exist_does_not():
    """Catches a page that was forgotten when offload, chunks of the network or tiles came."""
    words = " ".join(option.name for option in option_fields()) + " ".join(dir(VideoPipeline))
    assert not re.search("offload|chunk|tile|tiling|sigmas", words)
