"""Runs by several processes, moved between strategies, killed and cut short: one curve for all."""

import json
import random
import signal

import pytest
import torch
from safetensors.torch import load_file

from scripts import export as export_script
from sgm.inference import VideoPipeline
from sgm.inference.settings import ModelFiles
from sgm.inference.specs import SPECS
from sgm.training import snapshot
from sgm.training.export import export, weights_of
from tests.runs import ROOT, STEPS, curve, kill_at, run, write_photos, write_recipe
from tests.tiny import tiny_config, write_tiny_checkpoint

TOLERANCE = 1e-4
"""Of losses and norms: float32, and other orders of the sums over clips and weights."""

TWO = ["lightning.trainer.devices=2", "data.batch_size=2"]
FRAGMENTS = ROOT / "configs" / "training" / "strategies"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The U-Net's recipe, six steps of four clips, with validation."""
    folder = tmp_path_factory.mktemp("recipe")
    photos = write_photos(folder / "photos.safetensors")
    path = write_recipe(
        folder,
        photos,
        "svd_tiny",
        **{
            "model.params.ckpt_path": str(write_tiny_checkpoint(folder / "weights.safetensors")),
            "data.batch_size": 4,
            "lightning.trainer.max_steps": 6,
            "lightning.callbacks.losses": {
                "target": "sgm.training.validation.LevelLosses",
                "params": {"dataset": "${data.dataset}", "steps": 2, "clips": 3, "sigmas": [1, 9]},
            },
        },
    )
    return str(path)


def train(recipe, folder, fragment=None, stop=None, resume=False, changes=()):
    """Run main.py in one process, or in two by a shipped fragment; its folder."""
    bases = [str(FRAGMENTS / f"{fragment}.yaml")] if fragment else []
    arguments = ["--base", recipe, *bases, "--logdir", str(folder), *changes]
    arguments += TWO if fragment else []
    if stop:
        arguments.append(
            f"+lightning.callbacks.stop={{target: tests.runs.StopAt, params: {{step: {stop}}}}}"
        )
    count = 2 if fragment else 1
    codes = run(count, [*arguments, *["--resume"] * resume], folder / "out")
    errors = "".join(path.read_text() for path in (folder / "out").iterdir())
    assert codes == [0] * count, errors
    return folder


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """One process."""
    return train(recipe, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module", params=[("ddp", "fsdp2"), ("fsdp2", "ddp")], ids="-then-".join)
def moved(request, recipe, tmp_path_factory):
    """Two processes by one strategy, stopped in the middle, continued by another."""
    folder = tmp_path_factory.mktemp("moved")
    first, second = request.param
    train(recipe, folder, first, stop=3)
    assert snapshot.load(folder / "last.ckpt")["global_step"] == 3
    return train(recipe, folder, second, resume=True)


def test_strategies_take_the_same_steps(alone, moved):
    """Catches draws or clips that depend on the rank, gradients that are added up and not averaged
    (or not at all: parts without shares), a norm of one process's share, optimiser states that are
    lost on the way from one strategy to the other, and validation that disturbs training."""
    expected, got = curve(alone), curve(moved)
    assert len(expected) == 6
    for line, other in zip(expected, got, strict=True):
        assert other == pytest.approx(line, rel=TOLERANCE)


def test_averages_are_those_of_one_process(alone, moved):
    """Catches averages of shares, such that were not moved along, and names of another layout."""
    states = [snapshot.load(folder / "last.ckpt") for folder in (alone, moved)]
    expected, got = (weights_of(state) for state in states)
    assert got.keys() == expected.keys()
    plain = weights_of(states[0], ema=False)
    trained = [key for key in expected if not torch.equal(expected[key], plain[key])]
    assert trained
    for key in expected:
        assert got[key].shape == expected[key].shape
        # Adam moves weights whose gradients are rounding alone by whole steps of their own.
        assert (got[key] - expected[key]).abs().mean() < 1e-4, key


def test_validation_is_that_of_one_process(alone, moved):
    """Catches clips that are counted twice or left out (three do not divide by two)."""
    files = [(folder / "losses.jsonl").read_text().splitlines() for folder in (alone, moved)]
    lines = [[json.loads(line) for line in file] for file in files]
    assert [line["step"] for line in lines[0]] == [0, 2, 4, 6]
    for line, other in zip(*lines, strict=True):
        assert other == pytest.approx(line, rel=TOLERANCE)


def test_a_run_becomes_a_checkpoint_to_sample_with(moved, tmp_path):
    """Catches names that sampling does not know, and an export of the last weights as averages."""
    (averaged,) = export(moved, tmp_path / "averaged.safetensors")
    (last,) = export(moved / "last.ckpt", tmp_path / "last.safetensors", ema=False)
    one, other = load_file(averaged.path), load_file(last.path)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(one[key], snapshot.load(moved / "last.ckpt")["ema"][key])
    assert not torch.equal(one[key], other[key])
    config = tiny_config(scale_factor=2.0).model
    files = ModelFiles(SPECS["svd_tiny"], tmp_path, dict(config), averaged.path)
    assert VideoPipeline.load(files).engine.scale_factor == 2.0


def test_adapters_are_shared_out_beside_a_frozen_base(recipe, tmp_path):
    """Catches shares of one type alone (the base is in bfloat16, the adapters in float32), and
    adapters that are lost on the way to their file."""
    changes = [
        "+training.lora={targets: ['model.diffusion_model.*.attn1.to_*'], rank: 2}",
        "training.task.params.trainable=['*.lora_*']",
        "+training.memory.frozen=bfloat16",
        "lightning.trainer.precision=bf16-mixed",
        "lightning.trainer.max_steps=3",
        "lightning.callbacks={}",
    ]
    one = train(recipe, tmp_path / "one", changes=changes)
    two = train(recipe, tmp_path / "two", "fsdp2", changes=changes)
    for line, other in zip(curve(one), curve(two), strict=True):
        assert other == pytest.approx(line, rel=0.02)  # products in bfloat16
    files = [load_file(folder / "lora.safetensors") for folder in (one, two)]
    assert files[0].keys() == files[1].keys()
    assert all("lora_" in key for key in files[0])
    assert any(x.abs().max() > 0 for key, x in files[1].items() if "lora_B" in key)


def test_the_export_script(alone, tmp_path, capsys):
    """Catches another type than asked for, and errors that are not one line or leave something."""
    target = tmp_path / "mine.safetensors"
    assert export_script.main([str(alone), str(target), "--dtype", "fp16", "--no-ema"]) == 0
    assert capsys.readouterr().out.startswith(f"{target}  ")
    key = "model.diffusion_model.input_blocks.0.0.weight"
    state = snapshot.load(alone / "last.ckpt")["state_dict"]
    assert torch.equal(load_file(target)[key], state[f"engine.{key}"].half())
    for arguments, message in [
        ([alone, target], "is there already"),
        ([alone, tmp_path / "mine.ckpt"], "ends in .safetensors"),
        ([tmp_path / "none", target, "--force"], "no such run"),
        ([tmp_path, target, "--force"], "last.ckpt or state.pt"),
        ([target, tmp_path / "other.safetensors"], "expected the state of a training run"),
    ]:
        assert export_script.main([str(each) for each in arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]


def test_a_run_killed_five_times_goes_on(tmp_path):
    """Catches draws, batches or rates that depend on where a run started, and a state that a kill
    can damage."""
    photos = write_photos(tmp_path / "photos.safetensors")
    steps = 2 * STEPS
    changes = {"lightning.trainer.max_steps": steps, "lightning.save.steps": 1}
    recipe = write_recipe(tmp_path, photos, "svd_tiny_autoencoder", **changes)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    base = ["--base", str(recipe), "--logdir"]
    for step in sorted(random.SystemRandom().sample(range(1, steps - 2), 5)):
        kill_at(step, killed / "log.jsonl", [*base, str(killed), "--resume"], tmp_path / "out")
    assert run(1, [*base, str(killed), "--resume"], tmp_path / "out") == [0]
    assert run(1, [*base, str(whole)], tmp_path / "out") == [0]
    assert len(curve(whole)) == steps
    assert curve(killed) == curve(whole)
    states = [snapshot.load(folder / "last.ckpt")["ema"] for folder in (killed, whole)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("count", "number"), [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)]
)
def test_a_run_told_to_stop_saves_the_step_in_work(recipe, alone, tmp_path, count, number):
    """Catches success reported to a scheduler, steps that are lost, and a process that waits for
    one that was told alone."""
    where = f"{{target: tests.runs.SignalAt, params: {{step: 2, number: {number.value}}}}}"
    base = ["--base", recipe, "--logdir", str(tmp_path), "lightning.save.steps=100"]
    if count == 2:
        base[2:2] = [str(FRAGMENTS / "ddp.yaml")]
        base += TWO
    told = [*base, f"+lightning.callbacks.told={where}"]
    assert run(count, told, tmp_path / "out") == [128 + number] * count
    error = (tmp_path / "out" / "0.err").read_text().splitlines()[-1]
    assert error == f"stopped by {number.name} after step 3: --resume goes on from there"
    assert snapshot.load(tmp_path / "last.ckpt")["global_step"] == 3
    assert run(count, [*base, "--resume"], tmp_path / "out") == [0] * count
    for line, other in zip(curve(alone), curve(tmp_path), strict=True):
        assert other == pytest.approx(line, rel=TOLERANCE)


def test_a_full_disk_keeps_the_state_before(tmp_path):
    """Catches a half-written state in the place of the last whole one, a traceback, and the rest
    of the file that stays on the full disk."""
    photos = write_photos(tmp_path / "photos.safetensors")
    full = {"target": "tests.runs.FullDisk", "params": {"step": 5}}
    changes = {"lightning.callbacks.full": full}
    recipe = write_recipe(tmp_path, photos, "svd_tiny_autoencoder", **changes)
    folder = tmp_path / "run"
    assert run(1, ["--base", str(recipe), "--logdir", str(folder)], tmp_path) == [2]
    (line,) = errors(tmp_path)
    assert line.startswith(f"error: {folder / 'last.ckpt'} cannot be written: ")
    assert snapshot.load(folder / "last.ckpt")["global_step"] == 4
    assert not list(folder.glob("*.part"))


def test_a_loss_that_is_no_number_names_its_clips(tmp_path):
    """Catches a run that goes on, and a message that leaves the broken file to be guessed."""
    photos = write_photos(tmp_path / "photos.safetensors")
    changes = {"data.dataset.target": "tests.runs.BrokenMotion", "data.dataset.params.length": 9}
    weights = str(write_tiny_checkpoint(tmp_path / "weights.safetensors"))
    changes |= {"model.params.ckpt_path": weights, "data.batch_size": 1}
    recipe = write_recipe(tmp_path, photos, "svd_tiny", **changes)
    assert run(1, ["--base", str(recipe), "--logdir", str(tmp_path / "run")], tmp_path) == [2]
    (line,) = errors(tmp_path)
    assert "is nan, with clips/7.mp4 at 1.5 s: lower" in line


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "not a state"])
def test_a_damaged_state_is_one_line(tmp_path, damage, capsys):
    """Catches tracebacks of torch's unpickler, and a run that silently starts anew."""
    from main import main

    photos = write_photos(tmp_path / "photos.safetensors")
    recipe = write_recipe(tmp_path, photos, "svd_tiny_autoencoder")
    last = tmp_path / "run" / "last.ckpt"
    snapshot.save_atomically({"state_dict": {"engine.a": torch.zeros(1)}, "ema": {}}, last)
    whole = last.read_bytes()
    content = {"cut": whole[:-40], "empty": b"", "not a state": b"x" * 2000}
    last.write_bytes(content.get(damage, whole))
    assert main(["--base", str(recipe), "--logdir", str(last.parent), "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {last} is ")
    assert error.count("\n") == 1


def errors(folder):
    """What the one process said on standard error, but for its log."""
    return [
        line for line in (folder / "0.err").read_text().splitlines() if line.startswith("error")
    ]
