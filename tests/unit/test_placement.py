"""Memory plans change where and in which pieces a video is computed, and not what it shows."""

import logging
import weakref

import pytest
import torch

from sgm.inference import SamplingOptions, VideoPipeline
from sgm.inference.budget import HIGH, LOW, MIN
from sgm.inference.generation import Generation
from sgm.inference.levels import LEVELS
from sgm.inference.placement import Placement, choose_plan, needs_of, require_device
from sgm.inference.progress import SamplingStopped
from sgm.inference.settings import resolve
from sgm.inference.specs import ROOT

PICTURE = ROOT / "assets" / "sample.jpg"
OPTIONS = SamplingOptions(num_steps=2, num_frames=10, output="tensor")  # two chunks of ``low``


def pipeline(**how) -> VideoPipeline:
    return VideoPipeline.from_spec("svd_tiny", device="cpu", dtype="float32", **how)


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return pipeline()(PICTURE, OPTIONS)


def decibels(frames: torch.Tensor, expected: torch.Tensor) -> float:
    return -10 * float((frames - expected).square().mean().log10())


@pytest.mark.parametrize(("memory", "least"), [("high", 120), ("low", 45), ("min", 110)])
def test_all_plans_show_the_same_video(expected, memory, least):
    """Catches: a plan that is not taken, halves or pieces that get the rows of others.

    ``low`` decodes in overlapped chunks, named an approximation; the others differ by the rounding
    of float32 sums.
    """
    made = pipeline(memory=memory)
    assert made.placement.plan.name == memory
    assert decibels(made(PICTURE, OPTIONS), expected) >= least


def test_the_options_of_the_whole_path_name_the_plan(expected):
    """Catches: an option that only the constructor knows."""
    options = OPTIONS.replace(memory="min", device="cpu", dtype="float32")
    made = VideoPipeline.load(pipeline().files, options)
    assert made.placement.plan == MIN
    assert decibels(made(PICTURE, options), expected) >= 110
    with pytest.raises(ValueError, match="memory is min in this pipeline, got low"):
        made(PICTURE, options.replace(memory="low"))


def test_without_memory_the_next_plan_goes_on(expected, caplog):
    """Catches: a step down that gives up, that is silent, or that goes on with half a video."""
    made = pipeline()
    used = made.placement.network
    calls = []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return used(*args, **kwargs)

    made.placement.network = full
    with caplog.at_level(logging.WARNING):
        frames = made(PICTURE, OPTIONS)
    assert made.placement.plan.name == "unload"
    assert "out of memory" in caplog.text
    assert "'unload'" in caplog.text
    assert decibels(frames, expected) >= 110


def test_a_failed_attempt_holds_no_memory_when_the_next_begins(monkeypatch):
    """Catches its tensors kept by the error, or by a cycle, while the smaller plan is placed."""
    made = pipeline()
    held = []

    def full(x, *_, **__):
        activation = x + 1
        held.append(weakref.ref(activation))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    made.placement.network = full
    held.append(weakref.ref(made.placement))

    def alive(*_, **__):
        assert [reference() for reference in held] == [None, None]
        raise LookupError

    monkeypatch.setattr("sgm.inference.pipeline.Placement", alive)
    with pytest.raises(LookupError):
        made(PICTURE, OPTIONS)


def test_a_plan_that_cannot_be_placed_is_stepped_over(expected, monkeypatch):
    """Catches a pipeline that is left without its model for good."""
    made = pipeline()
    plans = []

    def place(*args):
        plans.append(args[4].name)
        if len(plans) == 1:
            raise RuntimeError("CUDA error: out of memory")
        return Placement(*args)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    made.placement.network = full
    monkeypatch.setattr("sgm.inference.pipeline.Placement", place)
    assert decibels(made(PICTURE, OPTIONS), expected) >= 110
    assert plans == ["unload", "halves"]


def test_nothing_of_a_run_is_kept_after_sampling(monkeypatch):
    """Catches conditions and deep features left on the device while it decodes, or where it was
    stopped."""
    made = pipeline(optimize="fast")
    network, seen = made.placement.network, []
    real = Generation.decode

    def decode(*args):
        seen.append(list(network._parts))
        return real(*args)

    monkeypatch.setattr(Generation, "decode", decode)
    made(PICTURE, OPTIONS)
    assert seen == [[]]
    with pytest.raises(SamplingStopped):
        made(PICTURE, OPTIONS, callback=lambda progress: progress.stage != "sampling")
    assert network._parts == []


@pytest.mark.parametrize(
    ("how", "advice"),
    [({"memory": "min"}, "--memory min"), ({"optimize": "none"}, "--optimize exact")],
)
def test_the_last_plan_gives_up(how, advice):
    """Catches: an endless retry; a plan that the networks as written do not have, or as advice."""
    made = pipeline(**how)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    made.placement.network = full
    with pytest.raises(MemoryError, match=f"try {advice}, fewer or smaller frames"):
        made(PICTURE, OPTIONS)


@pytest.mark.parametrize("level", ["none", "graphs"])
def test_levels_whose_weights_stay_have_one_plan(level):
    with pytest.raises(
        ValueError, match=f"memory low needs --optimize exact, fp8 or fast, got {level}"
    ):
        Placement(pipeline().engine, torch.device("cpu"), torch.float32, level, LOW)


def test_bfloat16_is_refused_where_it_would_be_emulated(monkeypatch):
    monkeypatch.setattr("sgm.inference.placement.has_fast_bfloat16", lambda _: False)
    with pytest.raises(ValueError, match="cuda:1 does not multiply bfloat16: take --dtype float16"):
        require_device(torch.device("cuda:1"), torch.bfloat16, LEVELS["exact"])
    require_device(torch.device("cuda:1"), torch.float16, LEVELS["exact"])
    require_device(torch.device("cpu"), torch.bfloat16, LEVELS["exact"])


def test_recorded_steps_need_a_device_that_records():
    with pytest.raises(ValueError, match="--optimize graphs needs a CUDA device, got cpu"):
        pipeline(optimize="graphs")


@pytest.mark.parametrize(
    ("memory", "free", "plan"), [("auto", 1 << 40, HIGH), ("auto", 0, MIN), ("low", 0, LOW)]
)
def test_auto_takes_what_fits(monkeypatch, memory, free, plan):
    """Catches: ``auto`` that does not look at the device, or counts for nothing on a CPU."""
    made = pipeline()
    options = SamplingOptions(device="cuda", dtype="float16", memory=memory, optimize="exact")
    settings = resolve(options, made.files.config, made.spec, (64, 64))
    monkeypatch.setattr("sgm.inference.placement.free_bytes", lambda _: free)
    assert choose_plan(settings, lambda: needs_of(made.engine, settings)) == plan
