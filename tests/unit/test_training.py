"""The parts of training, each against a second derivation."""

import inspect
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from sgm.modules.ema import Ema
from sgm.training import assemble, parts, snapshot
from sgm.training.draws import StepBatches, clip_generators
from sgm.training.loop import Plan, Run
from sgm.training.lora import adapt
from sgm.training.optim import Optim
from sgm.training.recipe import engine_config, load_recipe, section, typed
from sgm.training.settings import Cache, Data, Lightning, Training
from sgm.training.tasks import ReconstructionTask, select_trainable
from sgm.util import get_obj_from_str, instantiate_from_config
from tests.tiny import tiny_config, tiny_engine

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "training"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- draws
def test_generators_depend_on_seed_and_position():
    """Catches a seed or a position that does not enter, and batches that share a clip's draws."""

    def drawn(seed, first, count):
        made = clip_generators(seed, first, count)
        return [torch.rand(1, generator=each).item() for each in made.clips]

    keys = [(0, 0), (0, 1), (1, 0), (0, 2**31)]
    assert len({drawn(*key, 1)[0] for key in keys}) == 4
    assert drawn(0, 3, 4) == drawn(0, 3, 2) + drawn(0, 5, 2)


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
    x = torch.rand(2, 3, 32, 32, generator=generator()) * 2 - 1
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
    """Catches an include that wins over the recipe, overrides that come first, and mistyped ones
    that are silently added."""
    (tmp_path / "base.yaml").write_text("model: {a: 1, b: 1, c: 1}\n")
    (tmp_path / "one.yaml").write_text("include: base.yaml\nmodel: {b: 2}\nengine: ${model}\n")
    (tmp_path / "two.yaml").write_text("model: {c: 3}\n")
    recipe = load_recipe(
        [tmp_path / "one.yaml", tmp_path / "two.yaml"], ["model.c=4", "+model.d=5"]
    )
    assert section(recipe, "model") == {"a": 1, "b": 2, "c": 4, "d": 5}
    assert section(recipe, "engine") == section(recipe, "model")
    for paths, overrides, message in [
        (["one.yaml"], ["model.d"], "key=value"),
        (["one.yaml"], ["=1"], "key=value"),
        (["one.yaml"], ["modle.a=1"], r"no key 'modle\.a'; to add it, write \+modle\.a=1"),
        (["one.yaml"], ["model.a.b=1"], r"no key 'model\.a\.b'"),
        (["one.yaml"], ["model.a={"], "model.a={: while parsing"),
        (["none.yaml"], [], "no recipe"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_recipe([tmp_path / p for p in paths], overrides)
    with pytest.raises(ValueError, match="no section 'data'"):
        section(recipe, "data")


GIVEN = {"seed": 1, "task": {"target": "a.b"}, "optim": {"lr": "1e-3", "betas": [0.9, 0.99]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "???"}, r"^training\.seed: expected a value"),
        ({"sead": 1}, r"^training\.sead: "),
        ({"optim": {}}, r"^training\.optim\.lr: expected a value"),
        ({"optim": {"lr": "abc"}}, r"^training\.optim\.lr: .*'abc'"),
        ({"optim": {"lr": 1, "lrr": 1}}, r"^training\.optim\.lrr: "),
        ({"optim": {"lr": -1}}, r"^training\.optim\.lr: expected a number above 0, got -1"),
        ({"task": 3}, r"^training\.task: "),
    ],
)
def test_sections_are_checked(change, message):
    """Catches unknown keys that have no effect, and missing or wrong ones that end in a
    traceback."""
    made = typed(OmegaConf.create({"training": GIVEN}), "training", Training)
    assert made == Training(1, {"target": "a.b"}, Optim(0.001, betas=(0.9, 0.99)))
    with pytest.raises(ValueError, match=message) as error:
        typed(OmegaConf.create({"training": GIVEN | change}), "training", Training)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name", "key", "value"),
    [
        (Training, "training", "seed", -1),
        (Training, "training", "seed", 2**64),
        (Optim, "training.optim", "lr", "nan"),
        (Optim, "training.optim", "weight_decay", "nan"),
        (Optim, "training.optim", "betas", [2, 3]),
        (Optim, "training.optim", "ema", 1),
        (Data, "data", "batch_size", 0),
        (Data, "data", "workers", -1),
        (Lightning, "lightning", "save.steps", 0),
        (Lightning, "lightning", "log.every", 0),
    ],
)
def test_values_out_of_range_are_refused_when_a_recipe_is_read(kind, name, key, value):
    """Caught: a traceback after the first step, and refusals once the run's folder is made."""
    data = {"dataset": {"target": "a.b"}, "batch_size": 1, "workers": 0}
    recipe = OmegaConf.create({"training": GIVEN, "data": data, "lightning": {"trainer": {}}})
    typed(recipe, name, kind)
    OmegaConf.update(recipe, f"{name}.{key}", value)
    with pytest.raises(ValueError, match=f"^{name}.{key}: expected .*, got "):
        typed(recipe, name, kind)


@pytest.mark.parametrize("value", [3, "a", [1]])
def test_a_section_that_is_no_mapping_is_refused(value):
    """Caught: words of OmegaConf's own, and a section that is there called missing."""
    with pytest.raises(ValueError, match=r"^section 'data': expected names and values, got "):
        section(OmegaConf.create({"data": value}), "data")


def test_a_picture_is_no_recipe(tmp_path):
    """Caught: a message that does not name the file."""
    (tmp_path / "one.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"one\.png is not a YAML file: 'utf-8' codec"):
        load_recipe([tmp_path / "one.png"])


@pytest.mark.parametrize("included", ["one.yaml", "two.yaml"])
def test_a_recipe_that_includes_itself_is_refused(tmp_path, included):
    """Caught: recursion without end; and a file refused that two recipes share."""
    (tmp_path / "one.yaml").write_text(f"include: {included}\n")
    (tmp_path / "two.yaml").write_text("include: ./one.yaml\n")
    with pytest.raises(ValueError, match=rf"includes itself: .*one\.yaml > .*{included}"):
        load_recipe([tmp_path / "one.yaml"])
    (tmp_path / "one.yaml").write_text("a: 1\n")
    assert load_recipe([tmp_path / "one.yaml", tmp_path / "two.yaml"]) == {"a": 1}


def test_a_task_that_trains_nothing_is_refused():
    """Caught: a run whose optimiser finds nothing to do, once its folder is made."""
    with pytest.raises(ValueError, match=r"trainable: expected names of weights, got none"):
        select_trainable(tiny_engine(), [])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_fits_its_model(path):
    """Catches a target, a parameter or a trained part that does not exist."""
    recipe = load_recipe([path])
    if OmegaConf.is_missing(recipe.data, "root"):
        recipe = load_recipe([path], ["data.root=clips", "model.ckpt_path=null"])
    settings = typed(recipe, "training", Training)
    with torch.device("meta"):
        engine = instantiate_from_config(engine_config(recipe))
    if settings.lora:
        adapt(engine, settings.lora, settings.seed)
    task = instantiate_from_config(settings.task)
    assert select_trainable(engine, task.trainable)
    assert not settings.plan or typed(recipe, "training.plan", Plan)
    data = typed(recipe, "data", Data)
    assert not data.cache or typed(recipe, "data.cache", Cache)
    dataset = data.dataset
    inspect.signature(get_obj_from_str(dataset["target"])).bind(**dataset["params"])
    assert typed(recipe, "lightning", Lightning).trainer["max_steps"] > 0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["conditioner.embedders.3"], r"names conditioner\.embedders\.3, .*emb_models\[3\]\.is_tr"),
        (["model", "conditioner"], r"names conditioner\.embedders\.0, "),
    ],
)
def test_an_embedder_that_cannot_learn_is_refused(names, message):
    """Catches a part that is asked to learn and silently does not: it runs without gradients."""
    with pytest.raises(ValueError, match=message):
        select_trainable(tiny_engine(), names)


# ---------------------------------------------------------------- runs
def autoencoder_run(folder, **optim):
    torch.manual_seed(0)
    engine = instantiate_from_config(tiny_config().model.params.first_stage_config)
    return Run(engine, ReconstructionTask(), Optim(lr=1e-3, warmup=4, **optim), folder)


def images(value=None):
    frames = torch.rand(2, 1, 3, 16, 16, generator=generator()) * 2 - 1
    return {"frames": frames if value is None else torch.full_like(frames, value)}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """Catches a run that goes on and saves weights that are not numbers."""
    run = autoencoder_run(tmp_path)
    run.advance(images(), 0.0)
    with pytest.raises(ValueError, match="loss at step 1 is nan: lower training"):
        run.advance(images(float("nan")), 0.0)
    assert run.step == 1
    assert all(torch.isfinite(p).all() for p in run.parameters)


def test_a_state_goes_through_half_precision_parts(tmp_path):
    """Catches lost weights, averages or steps, files beyond the limit, and a start at full rate
    without the optimiser's state."""
    run = autoencoder_run(tmp_path / "here" / "autoencoder", ema=0.5)
    for _ in range(3):
        run.advance(images(), 0.0)
    run.save()
    parts.pack(tmp_path / "here", tmp_path / "carried", limit=300_000)
    files = sorted((tmp_path / "carried" / "autoencoder").iterdir())
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 350_000  # tensors and a header
    parts.unpack(tmp_path / "carried", tmp_path / "there")
    other = autoencoder_run(tmp_path / "there" / "autoencoder", ema=0.5)
    assert other.resume()
    assert (other.step, other.ema.updates) == (3, 3)
    for mine, its in zip(run.parameters, other.parameters, strict=True):
        assert torch.equal(mine.half().float(), its)
    for name, average in run.ema.state_dict().items():
        assert torch.equal(average.half().float(), other.ema.state_dict()[name].float())
    other.advance(images(), 0.0)
    assert other.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 5)
    files[0].unlink()
    with pytest.raises(ValueError, match="all of them"):
        parts.unpack(tmp_path / "carried", tmp_path / "elsewhere")
