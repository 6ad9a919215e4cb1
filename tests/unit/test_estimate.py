"""The estimate of a run's time grows with the work, and is of the right order."""

import io
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from sgm.device import memory_errors, parse_device
from sgm.inference import estimate
from sgm.inference.estimate import (
    bound_seconds,
    count_flops,
    estimate_seconds,
    matmul_rate,
    network_calls,
    reading_seconds,
)
from sgm.inference.options import SamplingOptions
from sgm.inference.pipeline import VideoPipeline
from sgm.inference.progress import Progress, ProgressLine, duration
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
    estimated = estimate_seconds(files, settings(files, **options.to_dict()))
    pipeline = VideoPipeline.load(files, SamplingOptions(device="cpu", dtype="float32"))
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    began = time.perf_counter()
    pipeline(picture, options)
    measured = time.perf_counter() - began
    assert measured / 10 < estimated < measured * 10


def test_the_bound_exceeds_the_estimate(files, monkeypatch):
    """At one speed of the machine, however busy it is."""
    monkeypatch.setattr(estimate, "matmul_rate", lambda *_: 1e10)
    large = settings(files, num_frames=4, num_steps=3, height=192, width=192)
    assert bound_seconds(files, large) > estimate_seconds(files, large)


def test_rates_are_plausible(files):
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32) < 1e14
    assert 0 < reading_seconds(files.weight_files()) < 60


def test_loading_is_reported_in_megabytes(files):
    """Caught: a total that is not reached, since unused parts count, and steps that go back."""
    seen: list[Progress] = []
    VideoPipeline.load(files, SamplingOptions(device="cpu", dtype="float32"), seen.append)
    assert {progress.stage for progress in seen} == {"loading"}
    steps = [progress.step for progress in seen]
    assert steps == sorted(steps)
    assert steps[-1] == seen[-1].total == 11
    assert ProgressLine(terminal := io.StringIO())(seen[-1]) is None
    assert "loading 11/11 MB" in terminal.getvalue()


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


def test_long_runs_alone_are_announced(files, monkeypatch):
    run = settings(files, num_frames=2, num_steps=1)
    assert estimate.announcement(files, run, videos=1) is None
    monkeypatch.setattr(estimate, "LONG", 1e-9)
    assert "svd_tiny on this CPU: about " in (estimate.announcement(files, run, videos=1) or "")


def test_a_network_without_context_can_be_counted(files):
    """Caught: a KeyError for a parameter that the network need not be given.

    Attention to the one token of the context becomes attention among all, which costs more.
    """
    config = tiny_config(**{"network_config.params.context_dim": None})
    model = OmegaConf.to_container(config.model, resolve=True)
    del model["params"]["network_config"]["params"]["context_dim"]
    bare = replace(files, config=model)
    assert count_flops(bare, settings(bare))[0] > count_flops(files, settings(files))[0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GiB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:20],
)
def test_every_lack_of_memory_is_one_kind_of_error(error):
    """Caught: the plain RuntimeError of one device, left as a traceback."""
    with (
        pytest.raises(MemoryError, match=r"^out of memory: take less$"),
        memory_errors("take less"),
    ):
        raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="size mismatch"), memory_errors("take less"):
        raise RuntimeError("size mismatch")


def test_a_real_allocation_that_fails_is_known():
    with pytest.raises(MemoryError, match="take less"), memory_errors("take less"):
        torch.empty(2**60)


def test_a_device_that_holds_no_values_is_refused():
    """Caught: meta, on which everything seems to work until the first value is read."""
    with pytest.raises(ValueError, match="device 'meta' is not available here"):
        parse_device("meta")
