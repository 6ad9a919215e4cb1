"""The pipeline on a CUDA device against the CPU in float32: ``pytest -m gpu``."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from sgm.inference import SamplingOptions, VideoPipeline
from tests.tiny import tiny_config, write_tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Relative error of the latents after two steps: float32 differs in the order of summation, half
# types by their rounding (11 and 8 bits) over some thirty layers.
LIMITS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 8e-2}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    weights = write_tiny_checkpoint(folder / "svd_tiny.safetensors")
    OmegaConf.save(tiny_config(ckpt_path=str(weights)), folder / "svd_tiny.yaml")

    def load(device, dtype, **how):
        config = folder / "svd_tiny.yaml"
        return VideoPipeline.from_spec("svd_tiny", config=config, device=device, dtype=dtype, **how)

    return load


def run(pipeline, output, steps=2):
    picture = np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)
    options = SamplingOptions(num_frames=4, num_steps=steps, decoding_t=2, output=output)
    return pipeline(picture, options)


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_latents_agree_with_the_cpu(load, dtype):
    """Catches: noise drawn on the device, a tensor left on the CPU, a type that overflows."""
    expected = run(load("cpu", "float32"), "latents")
    out = run(load("cuda", dtype), "latents").cpu()
    assert (out - expected).norm() < LIMITS[dtype] * expected.norm()


def test_frames_agree_with_the_cpu(load):
    expected = run(load("cpu", "float32"), "frames").frames.astype(int)
    out = run(load("cuda", "float32"), "frames").frames.astype(int)
    assert np.abs(out - expected).max() <= 2


def test_recorded_steps_are_the_same_steps(load, monkeypatch):
    """Catches: a step that cannot be recorded, inputs that a recording does not see; twice, so
    that the second video does not play back the first."""
    monkeypatch.setattr("sgm.inference.optimized.replay.LAUNCH_BOUND", 0.0)
    exact, graphs = (load("cuda", "float16", optimize=level) for level in ("exact", "graphs"))
    for steps in (4, 6):
        assert torch.equal(run(graphs, "latents", steps), run(exact, "latents", steps))


def test_products_of_8_bits_are_close(load):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs an Ada or Hopper GPU")
    expected = run(load("cpu", "float32", optimize="fp8"), "latents")
    out = run(load("cuda", "float16", optimize="fp8"), "latents").cpu()
    assert (out - expected).norm() < 5e-2 * expected.norm()
