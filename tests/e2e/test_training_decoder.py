"""Training of the temporal decoder against a discriminator, by main.py on the one-second model."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import DDPStrategy
from safetensors.torch import load_file

from sgm.training import snapshot
from sgm.training.decoder_task import AdversarialModule, AdversarialTask, DecoderTask
from sgm.training.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from sgm.training.optim import Optim
from sgm.training.recipe import load_recipe
from sgm.training.run import train
from sgm.training.strategies import FullyShard
from tests.runs import SAVED_AT_THE_END, curve, run, write_photos, write_recipe
from tests.tiny import tiny_engine, write_tiny_checkpoint


def test_the_adaptive_weight_is_its_formula():
    """Catches a weight of all parameters' gradients, of swapped losses, or with a gradient."""
    g = torch.Generator().manual_seed(0)
    last = torch.randn(3, 4, generator=g, requires_grad=True)
    x, y = torch.randn(5, 4, generator=g), torch.randn(5, 3, generator=g)
    out = x @ last.T
    reconstruction, adversarial = (out - y).square().sum(), 3 * out.sum()
    weight = adaptive_weight(reconstruction, adversarial, last)
    by_hand = 2 * (x @ last.detach().T - y).T @ x, 3 * torch.ones(3, 5) @ x
    expected = by_hand[0].norm() / (by_hand[1].norm() + 1e-4)
    assert weight.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not weight.requires_grad
    assert last.grad is None
    assert adaptive_weight(reconstruction, 0 * out.sum(), last).item() == 1e4


def test_hinge_loss_by_hand():
    """Catches exchanged signs and margins."""
    real, made = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_loss(real, made).item() == pytest.approx(0.5 * (0.25 + 0.5))


def test_the_discriminator_sees_patches_of_space_and_time():
    """Catches frames that are judged alone, and a size that is halved once too often."""
    torch.manual_seed(0)
    network = PatchDiscriminator(channels=4, layers=2)
    clip = torch.rand(1, 5, 3, 16, 16)
    assert network(clip).shape == (1, 1, 5, 4, 4)
    other = clip.clone()
    other[:, 1] = 0
    assert not torch.allclose(network(other)[0, 0, 2], network(clip)[0, 0, 2])


def test_the_reconstruction_loss_by_hand():
    """Catches noisy latents, frames out of order, and an encoder that gets gradients."""
    engine = tiny_engine().requires_grad_(True)
    frames = torch.rand(2, 3, 3, 16, 16) * 2 - 1
    loss, _ = DecoderTask(edge_weight=0.5)(engine, {"frames": frames}, torch.Generator())
    stage = engine.first_stage_model
    clips = []
    for clip in frames:
        z = stage.encode(clip, unregularized=True)[0].chunk(2, 1)[0]
        clips.append(stage.decode(z, timesteps=3))
    x = torch.stack(clips)
    edges = [F.l1_loss(x.diff(dim=d), frames.diff(dim=d)) for d in (1, 3, 4)]
    assert loss.item() == pytest.approx((F.l1_loss(x, frames) + 0.5 * sum(edges) / 3).item())
    loss.backward()
    assert all(p.grad is None for p in stage.encoder.parameters())
    assert all(p.grad is not None for p in stage.decoder.parameters())


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Twelve steps, the last six against the discriminator."""
    folder = tmp_path_factory.mktemp("decoder")
    changes = {
        "model.params.ckpt_path": str(write_tiny_checkpoint(folder / "weights.safetensors")),
        "training.task.params.start": 6,
        "training.task.params.channels": 4,
        "training.optim.lr": 1e-3,
        **SAVED_AT_THE_END,
    }
    photos = write_photos(folder / "photos.safetensors")
    return folder, write_recipe(folder, photos, "svd_tiny_decoder_adversarial", **changes)


@pytest.fixture(scope="module")
def whole(recipe):
    """The folder of a run without interruption."""
    folder, path = recipe
    train(load_recipe([path]), folder / "whole", resume=False)
    return folder / "whole"


def test_the_decoder_learns_and_nothing_else(recipe, whole):
    """Catches a step against the gradient, optimisers that are counted as two steps, and weights
    of the encoder, the condition autoencoder or the U-Net that move."""
    lines = curve(whole)
    assert [line[0] for line in lines] == list(range(1, 13))
    assert lines[5][2] < 0.9 * lines[0][2]
    before = load_file(recipe[0] / "weights.safetensors")
    after = load_file(whole / "weights.safetensors")
    moved = {key for key in before if not torch.equal(before[key].half(), after[key])}
    assert moved
    assert all(key.startswith("first_stage_model.decoder.") for key in moved)
    start = snapshot.load(whole / "last.ckpt")["state_dict"]
    assert any(key.startswith("discriminator.") for key in start)


def test_a_decoder_run_resumes_bit_equal(recipe, whole):
    """Catches a discriminator or an optimiser of two that is not saved, and draws of the first
    step again: stopped before the adversary begins, and after."""
    folder, path = recipe
    for stop in (4, 9):
        parts = folder / f"stopped_{stop}"
        halt = f"+lightning.callbacks.stop={{target: tests.runs.StopAt, params: {{step: {stop}}}}}"
        train(load_recipe([path], [halt]), parts, resume=False)
        assert snapshot.load(parts / "last.ckpt")["global_step"] == stop
        train(load_recipe([path]), parts, resume=True)
        assert curve(parts) == curve(whole)
        states = [snapshot.load(run / "last.ckpt") for run in (parts, whole)]
        for part in ("state_dict", "ema"):
            assert all(torch.equal(states[0][part][k], x) for k, x in states[1][part].items())


def test_two_processes_train_it(recipe, whole, tmp_path):
    """Catches gradients that are not shared where two losses each reach a part of the weights: up
    to the adversary's start, the losses are those of one process with the same clips."""
    arguments = ["--base", str(recipe[1]), "--logdir", str(tmp_path), "data.batch_size=1"]
    arguments += ["lightning.trainer.devices=2"]
    arguments += ["+lightning.trainer.strategy=ddp_find_unused_parameters_true"]
    codes = run(2, arguments, tmp_path / "out")
    assert codes == [0, 0], (tmp_path / "out" / "0.err").read_text()
    expected, got = curve(whole), curve(tmp_path)
    assert len(got) == 12
    for line, other in zip(expected[:6], got[:6], strict=True):
        assert other[:3] == pytest.approx(line[:3], rel=1e-4)
        # The gradient of |x| jumps at 0, so that rounding is seen in its norm.
        assert other[3] == pytest.approx(line[3], rel=1e-3)
    assert "adversarial" in json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"strategy": FullyShard()}, "trains on one device or by the strategy"),
        ({"scaler": torch.amp.GradScaler("cpu")}, "in precision bf16-mixed or 32-true"),
        ({"accumulate_grad_batches": 2}, r"\(raise data\.batch_size\)"),
        ({"gradient_clip_val": 1.0}, r"\(set training\.optim\.clip\)"),
    ],
)
def test_trainers_that_cannot_train_against_it_are_refused_before_the_start(changes, message):
    """Catches a traceback, and a refusal once the run's folder is made."""
    stage = tiny_engine().first_stage_model
    task = AdversarialTask(start=0, trainable=["decoder"], channels=4)
    module = AdversarialModule(stage, task, Optim(lr=1.0), seed=0)
    usual = {"strategy": DDPStrategy(), "scaler": None, "accumulate_grad_batches": 1}
    trainer = SimpleNamespace(**usual | {"gradient_clip_val": None} | changes)
    refused = pytest.raises(ValueError, match=rf"^lightning\.trainer: a decoder with .*{message}")
    with refused if message else nullcontext():
        module.check(trainer, {"frames": torch.zeros(1, 2, 3, 8, 8)})


def test_the_adversary_needs_its_package():
    """Catches a perceptual loss that is silently left out."""
    with pytest.raises(ValueError, match=r"pip install lpips|weights at"):
        AdversarialTask(start=0, lpips="vgg")
