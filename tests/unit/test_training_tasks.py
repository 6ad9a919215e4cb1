"""The tasks of training, each against a loss written out by hand."""

import math
import re

import pytest
import torch

from sgm.training.batch import condition_batch, precomputed_batch
from sgm.training.decoder_task import DecoderTask
from sgm.training.latents import LatentClips, encode_clips, latent_modes
from sgm.training.pictures import WithPictures
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

LEARNS = {"conditioner_config.params.emb_models.0.is_trainable": True}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clip_batch(clips=2, size=32):
    g = generator(5)
    return {
        "frames": torch.rand(clips, FRAMES, 3, size, size, generator=g) * 2 - 1,
        "fps_id": torch.tensor([6] * clips),
        "motion_bucket_id": torch.tensor([100] * clips),
    }


def engine_with_loss():
    """A tiny engine with a loss; its first stage samples where it is not asked for the mode."""
    return tiny_engine(loss_fn_config=LOSS, **LEARNS)


# ---------------------------------------------------------------- before a run
def first_stage():
    return tiny_engine().first_stage_model


def image_decoder():
    """A model whose first stage decodes pictures, each on its own."""
    config = tiny_config().model.params.first_stage_config.params
    decoder = {
        "target": "sgm.modules.diffusionmodules.model.Decoder",
        "params": config.encoder_config.params,
    }
    return tiny_engine(**{"first_stage_config.params.decoder_config": decoder})


def without(batch, *keys):
    return {key: value for key, value in batch.items() if key not in keys}


@pytest.mark.parametrize(
    ("task", "engine", "lost", "message"),
    [
        (DiffusionTask(), tiny_engine, (), r"^model\.params\.loss_fn_config: expected a loss"),
        (DiffusionTask(), first_stage, (), "expects the kind DiffusionEngine, got AutoencodingE"),
        (DiffusionTask(), engine_with_loss, ("frames",), r"^data\.dataset: .* got fps_id, motion_"),
        (DiffusionTask(), engine_with_loss, ("fps_id",), r"needs the batch entries \['fps_id'\]"),
        (ReconstructionTask(), tiny_engine, (), "the kind AutoencodingEngine, got DiffusionEngine"),
        (ReconstructionTask(), first_stage, ("frames",), "ReconstructionTask needs clips with fra"),
        (DecoderTask(), tiny_engine, ("frames",), "DecoderTask needs clips with frames"),
        (DecoderTask(), image_decoder, (), "expects the kind VideoDecoder, got Decoder"),
    ],
)
def test_what_a_task_cannot_train_is_refused_before_the_first_step(task, engine, lost, message):
    """Caught: a traceback, or a refusal in the first step, when the run's folder is made."""
    with pytest.raises(ValueError, match=message):
        task.check(engine(), without(clip_batch(), *lost))


@pytest.mark.parametrize(
    ("task", "engine"),
    [
        (DiffusionTask(), engine_with_loss),
        (ReconstructionTask(), first_stage),
        (DecoderTask(), tiny_engine),
        (DecoderTask(), first_stage),
    ],
)
def test_what_a_task_can_train_passes(task, engine):
    task.check(engine(), clip_batch())


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
    another weight, latents that are sampled, or a condition that is noised after encoding."""
    engine = engine_with_loss()
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
        moments = engine.first_stage_model.moments(batch["frames"].flatten(0, 1))
        z = moments[:, :4] * engine.scale_factor
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


def test_cached_latents_give_the_loss_of_frames(tmp_path):
    """Catches a cache that is scaled twice or not at all, and one that holds modes where frames
    are encoded to samples. Cached latents are rounded to half precision, first frames to 8 bits."""
    engine, batch = engine_with_loss(), clip_batch()
    items = [{key: value[i] for key, value in batch.items()} for i in range(2)]
    assert encode_clips(engine, items, tmp_path, clips=2, shard=2, workers=0)
    clips = LatentClips(tmp_path)
    cached = torch.utils.data.default_collate([clips[0], clips[1]])
    task = DiffusionTask(trainable=["model"])
    with torch.no_grad():
        a, b = (task(engine, each, generator(2))[0].item() for each in (batch, cached))
    assert a == pytest.approx(b, rel=1e-3)


def test_modes_do_not_depend_on_how_many_are_encoded_at_once():
    """Catches chunks that are lost, and a scale factor that is left out."""
    engine, frames = engine_with_loss(), clip_batch()["frames"].flatten(0, 1)
    whole = latent_modes(engine, frames)
    moments = engine.first_stage_model.moments(frames)
    torch.testing.assert_close(whole, engine.scale_factor * moments[:, :4].detach())
    engine.en_and_decode_n_samples_a_time = 3
    torch.testing.assert_close(latent_modes(engine, frames), whole)


@pytest.mark.parametrize("names", [["model"], ["model", "conditioner.embedders.0"]])
def test_conditionings_drop_out_also_where_the_conditioner_is_frozen(names):
    """Catches a conditioner in evaluation mode, and draws that are not the step's generator's."""
    engine = engine_with_loss()
    task, batch = DiffusionTask(trainable=names), clip_batch(clips=8)
    select_trainable(engine, names)

    def losses():
        return [task(engine, batch, generator(1))[0].item() for _ in range(2)]

    whole = losses()
    engine.conditioner.ucg_rates[0] = engine.conditioner.ucg_rates[3] = 0.5
    dropped = losses()
    assert whole[0] == whole[1]
    assert dropped[0] == dropped[1]
    assert dropped[0] != whole[0]


def test_dropout_of_networks_acts_in_selected_parts_alone():
    """Catches modes decided by a module's parameters: `nn.Dropout` has none."""
    engine = tiny_engine(**{"network_config.params.dropout": 0.5}, **LEARNS)
    modes = {}
    for name in ("model", "conditioner.embedders.0"):
        select_trainable(engine, [name])
        layers = [m for m in engine.model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
        modes[name] = {layer.training for layer in layers}
        assert engine.conditioner.training
        assert not engine.conditioner.embedders[3].training
        assert not engine.first_stage_model.training
    assert modes == {"model": {True}, "conditioner.embedders.0": {False}}


def precomputed(engine, batch, draws):
    """The clips' latents and conditions, the condition's noise of the generators ``draws``."""
    cond = [condition_batch(batch["frames"][:, 0], {}, FRAMES, each) for each in draws]
    clip, vae = engine.conditioner.embedders[0], engine.conditioner.embedders[3]
    numbers = {key: batch[key] for key in ("fps_id", "motion_bucket_id")}
    with torch.no_grad():
        return numbers | {
            "latents": latent_modes(engine, batch["frames"].flatten(0, 1)).unflatten(
                0, (-1, FRAMES)
            ),
            "cond_latents": torch.stack([vae(each["cond_frames"]) for each in cond], 1),
            "cond_aug": torch.stack([each["cond_aug"] for each in cond], 1),
            "image_embedding": clip(batch["frames"][:, 0])[:, 0],
            "index": torch.arange(len(batch["frames"])),
        }


def after_conditions(seed, clips, size):
    """A generator from which the noise of the condition has been drawn."""
    g = generator(seed)
    torch.randn(clips, generator=g)
    torch.randn(clips, 3, size, size, generator=g)
    return g


def test_precomputed_conditions_give_the_loss_of_frames():
    """With one draw of noise, the same that training on frames would take.

    Catches: latents of the condition that are scaled, a level that is not told, an embedder that
    runs although its result is there, dropout that is left out.
    """
    engine, batch = engine_with_loss(), clip_batch()
    engine.conditioner.ucg_rates[0] = engine.conditioner.ucg_rates[3] = 0.5
    select_trainable(engine, ["model"])
    task = DiffusionTask(trainable=["model"])
    made = precomputed(engine, batch, [generator(4)])
    single = {key: x[:, 0] if key.startswith("cond_") else x for key, x in made.items()}
    with torch.no_grad():
        wanted, _ = task(engine, batch, generator(4))
        engine.conditioner.embedders[0].forward = engine.conditioner.embedders[3].forward = None
        got, _ = task(engine, single, after_conditions(4, 2, 32))
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_each_clip_takes_one_of_its_draws():
    """Catches: the same draw for all clips or steps, a level of another draw than the latents'."""
    k, clips = 4, 64
    level = torch.arange(float(k)).repeat(clips, 1)
    batch = {
        "cond_latents": level[..., None, None, None].expand(-1, -1, 4, 2, 2),
        "cond_aug": level,
        "image_embedding": torch.zeros(clips, 24),
    }
    chosen = []
    for seed in (0, 1):
        cond, given = precomputed_batch(batch, 3, generator(seed))
        chosen.append(cond["cond_aug"])
        assert torch.equal(given["cond_frames"][:, 0, 0, 0], cond["cond_aug"])
        assert given["cond_frames_without_noise"].shape == (clips, 1, 24)
        assert len(cond["cond_aug"].unique()) == k
    assert not torch.equal(*chosen)


def test_results_that_are_there_cannot_be_learned():
    """Catches: an image tower that is to learn and gets no gradient."""
    engine = engine_with_loss()
    names = ["model", "conditioner.embedders.0"]
    select_trainable(engine, names)
    batch = precomputed(engine, clip_batch(), [generator()])
    with pytest.raises(ValueError, match=r"names conditioner\.embedders\.0, whose results are"):
        DiffusionTask(trainable=names)(engine, batch, generator())


def test_a_clip_of_one_frame_is_a_picture():
    """Catches: pictures that go through layers over time, which get no gradient from them."""
    assert (
        condition_batch(torch.zeros(3, 3, 8, 8), {}, 1, generator())[
            "image_only_indicator"
        ].tolist()
        == [[1.0]] * 3
    )
    engine = engine_with_loss()
    temporal = ["model.diffusion_model.*.time_stack"]
    select_trainable(engine, temporal)
    for frames, moves in ((1, False), (FRAMES, True)):
        batch = clip_batch()
        batch["frames"] = batch["frames"][:, :frames]
        loss, _ = DiffusionTask(trainable=temporal)(engine, batch, generator())
        gradients = torch.autograd.grad(loss, [p for p in engine.parameters() if p.requires_grad])
        assert any(g.abs().max() > 0 for g in gradients) == moves


def test_conditionings_drop_out_independently():
    """Rates of 0.3 and 0.5 of 4000 clips: both at once 0.15, by the rule of products.

    Catches: one draw for both embedders, rates in the wrong order, single frames that drop out.
    """
    engine = tiny_engine(
        **{
            "conditioner_config.params.ucg_rates": {
                "cond_frames": 0.5,
                "cond_frames_without_noise": 0.3,
            }
        }
    )
    embeddings = [torch.ones(4000, *[1] * n) for n in (2, 1, 1, 3, 1)]
    dropped = [x.flatten(1)[:, 0] == 0 for x in engine.conditioner.drop(embeddings, generator())]
    shares = [x.float().mean().item() for x in (dropped[0], dropped[3], dropped[0] & dropped[3])]
    assert shares == pytest.approx([0.3, 0.5, 0.15], abs=0.03)  # five standard errors
    assert not any(dropped[i].any() for i in (1, 2, 4))
    with pytest.raises(ValueError, match=r"ucg_rates: expected keys of .*, got 'clip'"):
        tiny_engine(**{"conditioner_config.params.ucg_rates": {"clip": 0.5}})


@pytest.mark.parametrize("at_once", [1, 3])
def test_frames_encoded_in_parts_give_the_same_loss(at_once):
    engine, batch = engine_with_loss(), clip_batch()
    with torch.no_grad():
        whole, parts = (
            DiffusionTask(frames_at_once=n)(engine, batch, generator())[0] for n in (None, at_once)
        )
    assert whole.item() == pytest.approx(parts.item(), rel=1e-5)


def test_patterns_choose_temporal_layers():
    """All that a picture model lacks, and nothing else. Catches: spatial layers that learn too,
    and modes that go by the names of modules instead of what learns."""
    engine = tiny_engine()
    names = [f"model.diffusion_model.*.time_{part}" for part in ("stack", "pos_embed", "mixer")]
    select_trainable(engine, names)
    learns = {name for name, p in engine.named_parameters() if p.requires_grad}
    every = (name for name, _ in engine.model.named_parameters(prefix="model"))
    temporal = re.compile(r"\.time_(stack|pos_embed|mixer)\.")
    assert learns == {name for name in every if temporal.search(name)}
    transformer = engine.model.diffusion_model.input_blocks[3][1]
    assert transformer.time_stack.training
    assert not transformer.transformer_blocks.training
    with pytest.raises(ValueError, match=r"no parameters under \*\.time_stak$"):
        select_trainable(engine, ["*.time_stack", "*.time_stak"])


# ---------------------------------------------------------------- pictures
class Numbers(torch.utils.data.Dataset):
    """Six clips, of two shapes."""

    groups = ((0, 1, 2, 3), (4, 5))

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"frames": torch.full((3, 2), float(index)), "index": torch.tensor(index)}


@pytest.mark.parametrize(("share", "pictures"), [(0.0, []), (0.25, [0, 3]), (0.5, list(range(6)))])
def test_pictures_are_first_frames_of_clips(share, pictures):
    """Catches: a share of clips instead of items, pictures of one end of the dataset, batches of
    clips and pictures or of two sizes, numbers that name another item."""
    config = {"target": f"{__name__}.Numbers"}
    dataset = WithPictures(config, share)
    items = [dataset[i] for i in range(len(dataset))]
    assert [int(item["index"]) for item in items] == list(range(6 + len(pictures)))
    assert [item["frames"].shape[0] for item in items] == [3] * 6 + [1] * len(pictures)
    assert [int(item["frames"][0, 0]) for item in items[6:]] == pictures
    assert sorted(i for group in dataset.groups for i in group) == list(range(len(items)))
    for group in dataset.groups:
        kinds = {(len(items[i]["frames"]), items[i]["frames"][0, 0] >= 4) for i in group}
        assert len({(n, bool(big)) for n, big in kinds}) == 1
    if pictures:
        assert dataset.describe(6 + 1) == f"clip {pictures[1]}"


def test_a_share_of_everything_is_refused():
    with pytest.raises(ValueError, match="below 1, got 1"):
        WithPictures({"target": f"{__name__}.Numbers"}, 1.0)


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
    engine = tiny_engine(**LEARNS)
    chosen = select_trainable(engine, ["conditioner.embedders.0"])
    inside = list(engine.conditioner.embedders[0].parameters())
    assert [id(p) for p in chosen] == [id(p) for p in inside]
    assert not engine.model.training
    assert engine.conditioner.embedders[0].training
    with pytest.raises(ValueError, match=r"no parameters under conditioner\.embed$"):
        select_trainable(engine, ["model", "conditioner.embed"])
