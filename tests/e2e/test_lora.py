"""LoRA from a recipe to a video: trained, written, sampled, merged."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from main import main
from scripts import merge_lora
from sgm.checkpoint import open_native
from sgm.checkpoint.lora import Update, read_lora, write_lora
from sgm.inference import SamplingOptions, VideoPipeline
from sgm.inference.flags import Request, to_options
from sgm.inference.specs import ROOT
from tests.e2e.test_training import photos, write_recipe  # noqa: F401 - a fixture
from tests.tiny import FRAMES, tiny_config, write_tiny_checkpoint

TARGETS = ["model.diffusion_model.*.attn1.to_*"]
SHORT = {"num_steps": 1, "num_frames": FRAMES, "height": 64, "width": 64, "output": "latents"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, its YAML and two LoRA files."""
    folder = tmp_path_factory.mktemp("lora")
    weights = write_tiny_checkpoint(folder / "tiny.safetensors")
    OmegaConf.save(tiny_config(ckpt_path=str(weights)), folder / "tiny.yaml")
    g = torch.Generator().manual_seed(0)
    stored = load_file(weights)
    chosen = [key for key in stored if ".attn1.to_" in key and key.endswith("weight")]
    for name, rank in (("a", 2), ("b", 3)):
        updates = {}
        for key in chosen:
            c_out, c_in = stored[key].shape
            down, up = (torch.randn(shape, generator=g) for shape in ((rank, c_in), (c_out, rank)))
            updates[key] = Update(down, 0.2 * up, 1.0)
        write_lora(updates, folder / f"{name}.safetensors", stored)
    return folder


def latents(place, weights="tiny", lora=None, optimize="exact"):
    """What a picture gives."""
    pipeline = VideoPipeline.from_spec(
        "svd_tiny",
        config=place / "tiny.yaml",
        ckpt_path=place / f"{weights}.safetensors",
        device="cpu",
        dtype="float32",
        optimize=optimize,
        lora=lora,
    )
    return pipeline(ROOT / "assets" / "sample.jpg", SamplingOptions(**SHORT))


def test_sampling_with_files_equals_the_merged_checkpoint(place):
    """By the plain and the optimised networks. Catches: updates of one form alone, a scale that is
    not read, a second file that is not looked at."""
    wanted = [f"{place / 'a.safetensors'}:0.5", str(place / "b.safetensors")]
    paths = [str(place / f"{name}.safetensors") for name in ("tiny", "merged")]
    assert merge_lora.main([paths[0], *wanted, paths[1], "--force"]) == 0
    plain = latents(place)
    for optimize in ("none", "exact"):
        with_files = latents(place, lora=wanted, optimize=optimize)
        assert torch.equal(with_files, latents(place, "merged", optimize=optimize))
        assert (with_files - plain).abs().max() > 0.01 * plain.abs().max()
    one = latents(place, lora=wanted[:1])
    assert not torch.equal(one, latents(place, lora=wanted))


def test_the_flag_is_a_list_of_files():
    """Catches: a comma or a colon that ends up in a name."""
    request = Request.from_texts([], {"lora": "a.safetensors:0.8, b"})
    assert to_options(request).lora == ("a.safetensors:0.8", "b")
    assert SamplingOptions(lora=["a", "b:2"]).to_dict()["lora"] == ["a", "b:2"]


@pytest.mark.parametrize("lora", ["none.safetensors", "none.safetensors:0.5", "a:nan", ":1"])
def test_files_that_are_not_there(place, lora):
    with pytest.raises(ValueError, match=r"^lora .*: expected FILE or FILE:SCALE"):
        latents(place, lora=[lora])


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", [str, Path])
def test_files_are_given_as_the_option_takes_them(place, several, kind):
    """Catches: a text taken for a list of letters; a path, or paths in a list, with a traceback."""
    file = kind(place / "a.safetensors")
    model = {"config": place / "tiny.yaml", "ckpt_path": place / "tiny.safetensors"}
    lora = [file] if several else file
    pipeline = VideoPipeline.from_spec("svd_tiny", **model, device="cpu", lora=lora)
    assert pipeline.files.loras == ((place / "a.safetensors", 1.0),)


def test_a_pipeline_keeps_its_updates(place):
    """Catches: an option that is accepted and does nothing."""
    pipeline = VideoPipeline.from_spec(
        "svd_tiny", config=place / "tiny.yaml", ckpt_path=place / "tiny.safetensors", device="cpu"
    )
    options = SamplingOptions(**SHORT, lora=str(place / "a.safetensors"))
    with pytest.raises(ValueError, match="this pipeline has other weights"):
        pipeline(ROOT / "assets" / "sample.jpg", options)


def test_a_lora_is_trained_from_a_recipe(place, photos, tmp_path, capsys):  # noqa: F811
    """Catches: adapters that are not saved or stay zero, a base that learns or is written too, a
    file that does not fit the model, a resumed run that loses them."""
    changes = {
        "model.params.ckpt_path": str(place / "tiny.safetensors"),
        "training.lora": {"rank": 2, "alpha": 4, "targets": TARGETS},
        "training.task.params.trainable": ["*.lora_*"],
        "training.memory": {"feed_forward_chunks": 2},
    }
    path, run = write_recipe(tmp_path, photos, "svd_tiny", **changes), tmp_path / "run"
    base = ["--base", str(path), "--logdir", str(run)]
    assert main([*base, "lightning.trainer.max_steps=1"]) == 0
    assert main([*base, "lightning.trainer.max_steps=2", "--resume"]) == 0
    assert str(run / "lora.safetensors") in capsys.readouterr().out
    model = open_native(place / "tiny.safetensors")
    updates = read_lora(run / "lora.safetensors", model.shapes)
    assert {update.rank for update in updates.values()} == {2}
    assert {update.alpha for update in updates.values()} == {4.0}
    assert all(update.up.abs().max() > 0 for update in updates.values())
    state = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    for key, value in load_file(place / "tiny.safetensors").items():
        assert torch.equal(state[f"engine.{key}"], value), key


def test_another_model_is_refused(place, tmp_path):
    """Catches: a checkpoint of a model that the updates were not made for."""
    other = {"lora_unet_x_to_q.lora_up.weight": torch.ones(4, 1)}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not fit the model: 1 name unknown"):
        latents(place, lora=[str(tmp_path / "other.safetensors")])
