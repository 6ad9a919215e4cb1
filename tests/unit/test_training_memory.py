"""What takes less memory in training, and the estimate of it, against what was really allocated."""

import logging
from functools import cache

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from sgm.modules.attention import CrossAttention, FeedForward
from sgm.modules.lora import add_lora
from sgm.training import memory
from sgm.training.memory import Needs, count_needs
from sgm.training.optim import Optim
from sgm.training.savings import (
    ChunkedFeedForward,
    OneTokenAttention,
    chunk_feed_forwards,
    skip_idle_attention,
    store_weights,
)
from sgm.training.tasks import DiffusionTask, select_trainable
from tests.measured import allocated_peak
from tests.tiny import FRAMES, tiny_engine
from tests.unit.test_training_tasks import LOSS

CHECKPOINTS = "network_config.params.use_checkpoint"
TEMPORAL = [f"model.diffusion_model.*.{part}" for part in ("time_stack", "time_mixer")]
MODES = {
    "full": ["model.diffusion_model"],
    "temporal": TEMPORAL,
    "lora": ["*.lora_*"],
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def encoded(clips=2, size=24):
    """A batch whose conditions were computed beforehand."""
    g = generator(1)
    item = {
        "latents": torch.randn(FRAMES, 4, size, size, generator=g),
        "cond_latents": torch.randn(4, size, size, generator=g),
        "cond_aug": torch.tensor(0.05),
        "image_embedding": torch.randn(24, generator=g),
        "fps_id": torch.tensor(6),
        "motion_bucket_id": torch.tensor(90),
    }
    return default_collate([item] * clips)


def training(mode, **changes):
    engine = tiny_engine(loss_fn_config=LOSS, **changes)
    if mode == "lora":
        add_lora(engine, ["model.diffusion_model.*.attn1.to_*"], 4, 4, generator())
    task = DiffusionTask(trainable=MODES[mode])
    select_trainable(engine, task.trainable)
    return engine, task


def gradients(engine, task):
    loss, _ = task(engine, encoded(), generator(3))
    loss.backward()
    return {name: p.grad for name, p in engine.named_parameters() if p.grad is not None}


@cache
def as_written(mode):
    """The gradients without any saving, and the operations that they take."""
    with FlopCounterMode(display=False) as counter:
        plain = gradients(*training(mode))
    return plain, counter.get_total_flops()


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_checkpoints_and_chunks_give_the_same_gradients(mode):
    """Catches: activations that are computed again with other inputs, pieces that are lost, and
    checkpoints that are off because the network is frozen and so in evaluation mode."""
    plain, _ = as_written(mode)
    engine, task = training(mode, **{CHECKPOINTS: True})
    assert engine.model.diffusion_model.training
    chunk_feed_forwards(engine, 3)
    assert any(isinstance(m, ChunkedFeedForward) for m in engine.modules())
    assert_same(gradients(engine, task), plain)
    assert plain


@pytest.mark.parametrize("mode", MODES)
def test_idle_attention_that_is_skipped_changes_no_gradient(mode):
    """Catches: a value that is lost, and queries and keys without a gradient: an optimiser's decay
    leaves out what has none, and several processes wait for it."""
    plain, operations = as_written(mode)
    engine, task = training(mode)
    skip_idle_attention(engine)
    kinds = [type(m) for m in engine.modules() if isinstance(m, CrossAttention)]
    assert set(kinds) == {OneTokenAttention}
    with FlopCounterMode(display=False) as counter:
        skipped = gradients(engine, task)
    assert_same(skipped, plain)
    assert counter.get_total_flops() < 0.99 * operations


def test_chunks_keep_one_piece_at_a_time():
    """Catches: pieces that all stay for the backward pass."""
    x = torch.zeros(64, 32, 16, requires_grad=True)
    whole, chunked = nn.Sequential(FeedForward(16)), nn.Sequential(FeedForward(16))
    chunk_feed_forwards(chunked, 8)
    peaks = [allocated_peak(lambda n=n: n(x).sum().backward()) for n in (whole, chunked)]
    assert peaks[1] < 0.35 * peaks[0]


@pytest.mark.parametrize("frozen", [torch.bfloat16, torch.float32])
def test_types_of_weights(frozen):
    """Catches: a float32 copy of a frozen base, adapters or autoencoders in a narrow type."""
    engine, _ = training("lora")
    adapters = {id(p) for name, p in engine.named_parameters() if ".lora_" in name}
    store_weights(engine.half(), frozen)
    for name, p in engine.named_parameters():
        wide = id(p) in adapters or "encoder." in name or name.startswith("first_stage_model")
        assert p.dtype == (torch.float32 if wide else frozen), name


def test_a_step_with_narrow_frozen_weights():
    """Under autocast, against float32. Catches: layers that do not take both types."""
    engine, task = training("lora")
    with torch.no_grad():
        wide, _ = task(engine, encoded(), generator(3))
    store_weights(engine, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = task(engine, encoded(), generator(3))
    loss.backward()
    assert loss.item() == pytest.approx(wide.item(), rel=0.03)
    assert all(p.grad.dtype == torch.float32 for p in engine.parameters() if p.requires_grad)


# ---------------------------------------------------------------- the estimate
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_estimate_against_the_allocator(mode, checkpoints):
    """Within 15 %. Catches: what the backward pass needs left out or counted twice, checkpoints
    that the estimate does not see, gradients of frozen weights."""
    engine, task = training(mode, **{CHECKPOINTS: checkpoints})
    learning = [p for p in engine.parameters() if p.requires_grad]
    for p in learning:
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step() -> None:
        task(engine, encoded(), generator())[0].backward()

    measured = allocated_peak(step)
    needs = count_needs(engine, task, Optim(lr=1.0), encoded(), None)
    assert needs.activations == pytest.approx(measured, rel=0.15)


def test_parts_by_counting():
    """Catches: frozen weights in the optimiser, an average of half types, 8 bits not seen."""
    engine, task = training("temporal")
    store_weights(engine, torch.bfloat16)
    learning = sum(p.numel() for p in engine.parameters() if p.requires_grad)
    for kind, each in (("adamw", 8), ("adamw_8bit", 2)):
        optim = Optim(lr=1.0, kind=kind)
        needs = count_needs(engine, task, optim, encoded(1, 8), torch.bfloat16)
        assert needs.gradients == needs.average == 4 * learning
        assert needs.optimizer == each * learning
    assert needs.weights == sum(p.nbytes for p in (*engine.parameters(), *engine.buffers()))
    assert needs.total == sum(
        (needs.weights, needs.gradients, needs.optimizer, needs.average, needs.activations)
    )


def test_encoding_counts_where_frames_are_given():
    """Catches: the first stage left out, which takes more than the network for long clips."""
    engine, _ = training("full")
    frames = {"frames": torch.empty(1, FRAMES, 3, 128, 128, device="meta")}
    batch = frames | {"fps_id": torch.zeros(1), "motion_bucket_id": torch.zeros(1)}
    peaks = []
    for at_once in (FRAMES, 1):
        task = DiffusionTask(trainable=MODES["full"], frames_at_once=at_once)
        engine.model.diffusion_model.use_checkpoint = True
        peaks.append(count_needs(engine, task, Optim(lr=1.0), batch, None).activations)
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize(("free", "warned"), [(10, True), (10**12, False)])
def test_too_little_memory_is_said_before_the_start(monkeypatch, caplog, free, warned):
    """Catches: an estimate that is compared with nothing, advice that does not help."""
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda _: free)
    engine, task = training("full")
    with caplog.at_level(logging.INFO):
        memory.announce(engine, task, Optim(lr=1.0), encoded(), None, torch.device("cpu"))
    said, *warnings = caplog.records
    assert "training takes about" in said.message
    assert bool(warnings) == warned
    if warned:
        assert "use_checkpoint=true; lower data.batch_size; " in warnings[0].message


def test_needs_in_words():
    needs = Needs(10**9, 2 * 10**9, 0, 0, 10**8)
    assert needs.describe() == (
        "3.1 GB (weights 1.0, gradients 2.0, optimizer 0.0, average 0.0, activations 0.1)"
    )


@pytest.mark.parametrize(
    ("kind", "message"), [("adam", "expected adamw or adamw_8bit, got 'adam'")]
)
def test_unknown_optimisers_are_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        Optim(lr=1.0, kind=kind)


def test_a_missing_package_is_one_line(monkeypatch):
    """Catches: a traceback, or float32 moments instead."""
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="needs bitsandbytes: pip install bitsandbytes"):
        Optim(lr=1.0, kind="adamw_8bit").check()
