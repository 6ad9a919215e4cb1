"""The parts of training, each against a second derivation."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sgm.modules.ema import Ema
from sgm.training import assemble, snapshot
from sgm.training.batch import condition_batch
from sgm.training.draws import StepBatches, step_generator
from sgm.training.loop import Plan
from sgm.training.optim import Optim
from sgm.training.recipe import load_recipe, section
from sgm.training.tasks import DiffusionTask, ReconstructionTask, edges, select_trainable
from sgm.util import instantiate_from_config
from tests.tiny import FRAMES, tiny_config, tiny_engine

LOSS = {
    "target": "sgm.modules.diffusionmodules.loss.StandardDiffusionLoss",
    "params": {
        "batch2model_keys": ["num_video_frames", "image_only_indicator"],
        "sigma_sampler_config": {
            "target": "sgm.modules.diffusionmodules.sigma_sampling.EDMSampling",
            "params": {"p_mean": 0.7, "p_std": 1.6},
        },
        "loss_weighting_config": {
            "target": "sgm.modules.diffusionmodules.loss_weighting.VWeighting"
        },
    },
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clip_batch(clips=2, size=32):
    g = generator(5)
    return {
        "frames": torch.rand(clips, FRAMES, 3, size, size, generator=g) * 2 - 1,
        "fps_id": torch.tensor([6] * clips),
        "motion_bucket_id": torch.tensor([100] * clips),
    }


def mode_engine():
    """A tiny engine with a loss, whose first stage does not sample."""
    engine = tiny_engine(loss_fn_config=LOSS)
    engine.first_stage_model.regularization.sample = False
    return engine


# ---------------------------------------------------------------- draws
def test_generator_depends_on_seed_step_and_rank():
    """Catches a step or rank that does not enter the seed."""
    draws = {
        torch.rand(1, generator=step_generator(*key)).item()
        for key in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (0, 2**31, 0)]
    }
    assert len(draws) == 5
    again = torch.rand(1, generator=step_generator(0, 2**31, 0)).item()
    assert again in draws


def test_an_epoch_gives_each_item_once_over_all_ranks():
    """Catches overlapping ranks, items left out at the end of an epoch, and equal epochs."""
    feeds = [iter(StepBatches(12, 2, seed=3, rank=r, world=2)) for r in (0, 1)]
    epochs = [[i for _ in range(3) for feed in feeds for i in next(feed)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]


def test_batches_continue_from_any_step():
    """Catches an order that depends on where the run started (also across epochs: 5 does not
    divide by 2)."""
    start = iter(StepBatches(5, 2, seed=1))
    whole = [next(start) for _ in range(9)]
    for step in (1, 4, 7):
        assert next(iter(StepBatches(5, 2, seed=1, step=step))) == whole[step]


# ---------------------------------------------------------------- conditioning
def test_condition_noise_is_per_clip_and_told():
    """Catches noise drawn per batch, a level that is not its ``cond_aug``, and noise in what CLIP
    sees: the added noise divided by ``cond_aug`` must be standard normal in every clip."""
    first = torch.zeros(400, 3, 8, 8)
    batch = condition_batch(first, {"fps_id": torch.zeros(400)}, 5, generator())
    level = batch["cond_aug"]
    log = level.log()
    assert log.mean().item() == pytest.approx(-3.0, abs=0.1)  # 0.5 / sqrt(400) = 0.025
    assert log.std().item() == pytest.approx(0.5, abs=0.08)
    ratio = batch["cond_frames"].std(dim=(1, 2, 3)) / level
    assert ratio.min() > 0.75  # 192 numbers: standard error 0.05
    assert ratio.max() < 1.25
    assert torch.equal(batch["cond_frames_without_noise"], first)
    assert batch["image_only_indicator"].shape == (400, 5)
    assert not batch["image_only_indicator"].any()


def test_diffusion_task_equals_a_written_out_step():
    """The loss by hand, in the order of the draws: noise level of the condition, its noise, dropout
    (rates are zero here), noise levels, noise. Catches a missing scale factor, levels per frame,
    another weight, or a condition that is noised after encoding."""
    engine = mode_engine()
    batch = clip_batch()
    task = DiffusionTask(trainable=["model"])
    with torch.no_grad():
        loss, _ = task(engine, batch, generator(9))

        g = generator(9)
        aug = (-3 + 0.5 * torch.randn(2, generator=g)).exp()
        first = batch["frames"][:, 0]
        noisy = first + aug.reshape(2, 1, 1, 1) * torch.randn(first.shape, generator=g)
        rows = {"fps_id": batch["fps_id"], "motion_bucket_id": batch["motion_bucket_id"]}
        rows |= {"cond_aug": aug, "cond_frames": noisy, "cond_frames_without_noise": first}
        cond = {k: v.repeat_interleave(FRAMES, 0) for k, v in engine.conditioner(rows).items()}
        z = engine.first_stage_model.encode(batch["frames"].flatten(0, 1)) * engine.scale_factor
        sigma = (0.7 + 1.6 * torch.randn(2, generator=g)).exp()
        s = sigma.repeat_interleave(FRAMES).reshape(-1, 1, 1, 1)
        x = z + s * torch.randn(z.shape, generator=g)
        out = engine.model(
            x / (s**2 + 1).sqrt(),
            0.25 * s.flatten().log(),
            cond,
            num_video_frames=FRAMES,
            image_only_indicator=torch.zeros(2, FRAMES),
        )
        denoised = x / (s**2 + 1) - s / (s**2 + 1).sqrt() * out
        by_hand = ((1 + s**2) / s**2 * (denoised - z) ** 2).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)  # float32, another order of sums


def test_cached_latents_give_the_loss_of_frames():
    """Catches a cache that is scaled twice or not at all."""
    engine = mode_engine()
    batch = clip_batch()
    latents = engine.encode_first_stage(batch["frames"].flatten(0, 1)).unflatten(0, (2, FRAMES))
    cached = {k: v for k, v in batch.items() if k != "frames"}
    cached |= {"latents": latents, "first_frame": batch["frames"][:, 0]}
    task = DiffusionTask(trainable=["model"])
    with torch.no_grad():
        a, b = (task(engine, each, generator(2))[0].item() for each in (batch, cached))
    assert a == pytest.approx(b, rel=1e-6)


def test_dropout_is_the_conditioners_and_off_outside_training():
    """Catches dropout whose draws are not the step's generator's."""
    engine = mode_engine()
    engine.conditioner.ucg_rates[0] = engine.conditioner.ucg_rates[3] = 0.5
    task, batch = DiffusionTask(trainable=["model"]), clip_batch(clips=8)
    list(select_trainable(engine, ["model"]))
    quiet = [task(engine, batch, generator(s))[0].item() for s in (1, 1)]
    engine.conditioner.training = True
    drawn = [task(engine, batch, generator(s))[0].item() for s in (1, 1)]
    assert quiet[0] == quiet[1]
    assert drawn[0] == drawn[1]
    assert drawn[0] != quiet[0]


# ---------------------------------------------------------------- reconstruction
def test_edges_are_neighbour_differences():
    """A ramp along x, y and t has constant differences; catches a transposed or missing axis."""
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in (3, 4, 5)), indexing="ij")
    clip = (100 * t + 10 * h + w).float()[None, :, None]
    assert [d.unique().tolist() for d in edges(clip)] == [[1.0], [10.0], [100.0]]
    assert len(edges(clip[:, :1])) == 2


def test_reconstruction_loss_by_hand():
    """Catches a weight that is not applied and a divergence that is not summed over latents."""
    stage = tiny_config().model.params.first_stage_config
    torch.manual_seed(0)
    engine = instantiate_from_config(stage).eval()
    engine.decode = lambda *_, **__: torch.zeros(2, 3, 16, 16)
    frames = torch.full((2, 1, 3, 16, 16), 0.5)
    with torch.no_grad():
        moments, _ = engine.encode(frames[:, 0], unregularized=True)
        mean, log_var = moments.chunk(2, 1)
        kl = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, (log_var / 2).exp()),
            torch.distributions.Normal(0.0, 1.0),
        )
        expected = 0.5 + 0.01 * kl.sum().item() / 2
        task = ReconstructionTask(kl_weight=0.01, edge_weight=3.0)
        loss, logs = task(engine, {"frames": frames}, generator())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert logs["psnr"].item() == pytest.approx(10 * math.log10(4 / 0.25), rel=1e-5)


def test_only_the_named_parts_train():
    """Catches frozen parts that get gradients and prefixes that match half a name."""
    engine = tiny_engine()
    chosen = list(select_trainable(engine, ["conditioner.embedders.0"]))
    inside = list(engine.conditioner.embedders[0].parameters())
    assert [id(p) for p in chosen] == [id(p) for p in inside]
    assert not engine.model.training
    assert engine.conditioner.embedders[0].training
    with pytest.raises(ValueError, match=r"no parameters under conditioner\.embed$"):
        select_trainable_list(engine, ["model", "conditioner.embed"])


def select_trainable_list(engine, names):
    return list(select_trainable(engine, names))


# ---------------------------------------------------------------- optimiser, average, plan
def test_rate_warms_up_and_decays():
    """Catches a warm-up from zero, a cosine of the wrong period and a floor below ``final``."""
    optim = Optim(lr=2.0, warmup=3, final=0.1)
    assert optim.rate(0, 0.0) == pytest.approx(0.5)
    assert optim.rate(3, 0.0) == pytest.approx(2.0)
    assert optim.rate(99, 0.5) == pytest.approx(2.0 * 0.55)
    assert optim.rate(99, 1.3) == pytest.approx(0.2)


def test_weight_decay_spares_vectors():
    """Catches decay on biases and norms."""
    layer = nn.Linear(2, 2)
    optimizer = Optim(lr=1.0, weight_decay=0.1).build(layer.parameters())
    rates = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert rates == {id(layer.weight): 0.1, id(layer.bias): 0.0}


def test_ema_against_the_recursion():
    """Catches swapped weights of the average and a warm-up that starts late."""
    layer = nn.Linear(1, 1, bias=False)
    ema = Ema(layer.named_parameters(), decay=0.25)
    expected = layer.weight.item()
    for n, value in enumerate([1.0, -2.0, 5.0, 7.0]):
        layer.weight.data.fill_(value)
        ema.update()
        d = min(0.25, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * value
    with ema.applied():
        assert layer.weight.item() == pytest.approx(expected, rel=1e-6)
    assert layer.weight.item() == 7.0
    with pytest.raises(ValueError, match="another model"):
        ema.load_state_dict({"updates": torch.tensor(1), "other": torch.zeros(1)})


def test_plan_needs_one_measure():
    assert Plan(steps=10).progress(5, 1e9) == 0.5
    assert Plan(minutes=2).progress(10**9, 60.0) == 0.5
    with pytest.raises(ValueError, match="one of steps and minutes"):
        Plan(steps=1, minutes=1)


def test_a_failed_write_keeps_the_state(tmp_path):
    """Catches writing over the old state."""
    path = tmp_path / "state.pt"
    snapshot.save_atomically({"step": 1}, path)
    with pytest.raises(AttributeError):
        snapshot.save_atomically({"step": lambda: 2}, path)
    assert snapshot.load(path) == {"step": 1}


# ---------------------------------------------------------------- assembly
def test_condition_autoencoder_is_the_first_stage():
    """Catches moments that the 1x1 convolutions change: both must give the same mode and, without
    time, the same picture."""
    engine = tiny_engine(seed=4)
    assemble.install_first_stage(engine, engine.first_stage_model.state_dict())
    condition = engine.conditioner.embedders[3].encoder
    x = clip_batch()["frames"][:, 0]
    with torch.no_grad():
        moments, _ = engine.first_stage_model.encode(x, unregularized=True)
        z = condition.encode(x)
        assert torch.allclose(z, moments.chunk(2, 1)[0], atol=1e-6)
        spatial = engine.first_stage_model.decode(z, timesteps=1, skip_video=True)
        assert torch.allclose(condition.decode(z), spatial, atol=1e-5)


def test_video_decoder_starts_as_the_image_decoder():
    """Catches a start whose random last convolution would throw the image training away: with
    zeroed time stacks, decoding a clip equals decoding its frames."""
    stage = tiny_config().model.params.first_stage_config
    torch.manual_seed(1)
    engine = instantiate_from_config(stage)
    engine.load_state_dict(assemble.start_of_video_decoder(engine.state_dict()))
    z = torch.randn(3, 4, 8, 8, generator=generator())
    with torch.no_grad():
        video = engine.decode(z, timesteps=3)
        frames = engine.decode(z, timesteps=3, skip_video=True)
    assert torch.allclose(video, frames, atol=1e-5)


def test_statistics_give_unit_deviation():
    """Catches a deviation in place of its inverse."""
    z = torch.randn(50, 4, 16, 16, generator=generator()) * 3.2
    stats = assemble.latent_statistics(z)
    assert (z * stats["scale_factor"]).std().item() == pytest.approx(1.0, abs=1e-3)
    assert len(stats["mean"]) == len(stats["std"]) == 4


def test_half_file_is_checked(tmp_path):
    """Catches infinities written in place of large weights."""
    path = tmp_path / "w.safetensors"
    assemble.write_half({"a": torch.tensor([1.5])}, path, {"model": "x"})
    assert load_file(path)["a"].dtype == torch.float16
    with pytest.raises(ValueError, match="half precision: b"):
        assemble.write_half({"b": torch.tensor([1e6])}, path, {})
    assert "a" in load_file(path)


# ---------------------------------------------------------------- recipes
def test_recipes_include_merge_and_override(tmp_path):
    """Catches an include that wins over the recipe, and overrides that come first."""
    (tmp_path / "base.yaml").write_text("model: {a: 1, b: 1, c: 1}\n")
    (tmp_path / "one.yaml").write_text("include: base.yaml\nmodel: {b: 2}\nengine: ${model}\n")
    (tmp_path / "two.yaml").write_text("model: {c: 3}\n")
    recipe = load_recipe([tmp_path / "one.yaml", tmp_path / "two.yaml"], ["model.d=4"])
    assert section(recipe, "model") == {"a": 1, "b": 2, "c": 3, "d": 4}
    assert section(recipe, "engine") == section(recipe, "model")
    for paths, overrides, message in [
        (["one.yaml"], ["model.d"], "key=value"),
        (["none.yaml"], [], "no recipe"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_recipe([tmp_path / p for p in paths], overrides)
    with pytest.raises(ValueError, match="no section 'data'"):
        section(recipe, "data")
