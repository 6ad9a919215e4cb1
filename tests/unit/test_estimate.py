"""The estimate of a run's time grows with the work, and is of the right order."""

import io
import time

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from sgm.inference.estimate import (
    bound_seconds,
    count_flops,
    estimate_seconds,
    matmul_rate,
    network_calls,
    reading_seconds,
)
from sgm.inference.options import SamplingOptions
from sgm.inference.pipeline import Progress, VideoPipeline
from sgm.inference.progress import ProgressLine, duration
from sgm.inference.settings import ModelFiles, read_config, resolve
from sgm.inference.specs import SPECS, find_config
from tests.tiny import tiny_config, write_tiny_checkpoint


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    OmegaConf.save(tiny_config(), folder / "tiny.yaml")
    weights = write_tiny_checkpoint(folder / "tiny.safetensors")
    return ModelFiles(
        SPECS["svd_tiny"], folder / "tiny.yaml", read_config(folder / "tiny.yaml"), weights
    )


def settings(files, **options):
    asked = SamplingOptions(device="cpu", dtype="float32").replace(**options)
    return resolve(asked, files.config, files.spec, (files.spec.height, files.spec.width))


def test_full_size_model_costs_what_its_layers_say():
    """One call of svd_xt: within a tenth of 80 T operations, 25 frames of 3.2 T each.

    The figure by hand: the 1.52 G weights of the U-Net are used at 72x128 positions and below; the
    count must be under the product of both and over a sixteenth of it.
    """
    path = find_config("svd_xt")
    full = ModelFiles(SPECS["svd_xt"], path, read_config(path), path)
    network, decoder = count_flops(full, settings(full))
    per_call = network / (30 * 2)
    assert per_call == pytest.approx(80e12, rel=0.1)
    everywhere = 2 * 1.52e9 * 25 * 72 * 128
    assert everywhere / 16 < per_call < everywhere
    assert 1.0 < decoder / per_call < 4.0


def test_work_grows_with_frames_size_and_steps(files):
    base = count_flops(files, settings(files, num_frames=4, num_steps=2))
    frames = count_flops(files, settings(files, num_frames=8, num_steps=2))
    size = count_flops(files, settings(files, num_frames=4, num_steps=2, height=128, width=64))
    steps = count_flops(files, settings(files, num_frames=4, num_steps=6))
    padded = count_flops(files, settings(files, num_frames=4, num_steps=2, height=66, width=66))
    assert steps == pytest.approx((3 * base[0], base[1]))
    for more in (frames, size):
        assert all(1.9 < a / b < 2.6 for a, b in zip(more, base, strict=True))
    assert all(1.1 < a / b < 1.5 for a, b in zip(padded, base, strict=True))


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, 20),
        ({"guidance_shape": "none"}, 10),
        ({"sampler": "heun"}, 40),
        ({"sampler": "dpmpp_2m"}, 20),
        ({"sampler": "dpmpp_2s_ancestral", "guidance_shape": "none"}, 20),
    ],
)
def test_calls_of_the_network(files, options, calls):
    assert network_calls(settings(files, num_steps=10, **options)) == calls


def test_estimate_is_of_the_order_of_a_run(files):
    """Within a factor of ten of a run large enough to be bound by its arithmetic."""
    options = settings(files, num_frames=4, num_steps=3, height=192, width=192).options
    estimate = estimate_seconds(files, settings(files, **options.to_dict()))
    pipeline = VideoPipeline.load(files, "cpu", "float32")
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    began = time.perf_counter()
    pipeline(picture, options)
    measured = time.perf_counter() - began
    assert measured / 10 < estimate < measured * 10
    assert bound_seconds(files, settings(files, **options.to_dict())) > estimate


def test_rates_are_plausible(files):
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32) < 1e14
    assert 0 < reading_seconds(files.checkpoint) < 60


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.96, "10 s"),
        (99, "99 s"),
        (100, "2 min"),
        (14400, "4.0 h"),
        (9e4, "25 h"),
    ],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_remaining_time_is_that_of_the_steps_so_far():
    """Caught: time of the stage before counted, steps done in place of steps left."""
    now = iter([0, 0, 0, 100, 110, 120, 130])
    terminal = io.StringIO()
    line = ProgressLine(terminal, clock=lambda: next(now))
    line.title = "2/3"
    line(Progress("encoding", 0, 1))
    line(Progress("encoding", 1, 1))
    for step in (1, 2, 3):
        line(Progress("sampling", step, 3))
    shown = [text.strip() for text in terminal.getvalue().split("\r")[1:]]
    assert shown == [
        "2/3: encoding 0/1",
        "2/3: encoding 1/1",
        "2/3: sampling 1/3, 20 s left",
        "2/3: sampling 2/3, 10 s left",
        "2/3: sampling 3/3",
    ]
