"""Training runs of seconds: the loss falls, a killed run goes on with the same curve, and the
stages of a small model end in a checkpoint that samples.
"""

import json
import random
import shutil
from statistics import mean

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from main import main
from scripts import train_tiny
from sgm.training.recipe import load_recipe
from sgm.training.stages import Stage, encode_latents, train_unet
from sgm.util import instantiate_from_config
from tests.runs import (
    SAVED_AT_THE_END,
    STEPS,
    curve,
    kill_at,
    run,
    write_photos,
    write_recipe,
)
from tests.tiny import tiny_config, write_tiny_checkpoint


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three smooth pictures in a tensor file."""
    return write_photos(tmp_path_factory.mktemp("photos") / "photos.safetensors")


def some_step():
    """Another one at each run, after a state was saved and before the end."""
    return random.SystemRandom().randint(3, STEPS - 2)


def test_plain_run_continues_after_a_kill(tmp_path, photos):
    """Catches draws, batches or rates that depend on where a run started, a state that misses the
    optimiser or the average, and a log that says a step twice."""
    path = write_recipe(tmp_path, photos, "svd_tiny_autoencoder")
    common = ["autoencoder", "--recipe", str(path), "--precision", "float32"]
    killed, whole = (tmp_path / name / "autoencoder" for name in ("killed", "whole"))
    program = {"output": tmp_path / "out", "program": "scripts.train_tiny"}
    kill_at(some_step(), killed / "log.jsonl", [*common, "--out", str(killed.parent)], **program)
    for folder in (killed, whole):
        assert run(1, [*common, "--out", str(folder.parent)], **program) == [0]
    assert len(curve(whole)) == STEPS
    assert curve(killed) == curve(whole)
    states = [torch.load(folder / "state.pt")["ema"] for folder in (killed, whole)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_lightning_run_continues_after_a_kill(tmp_path, photos):
    """As above through main.py, and catches a loader that starts again from the first batch."""
    from sgm.training.run import train

    path = write_recipe(tmp_path, photos, "svd_tiny_autoencoder")
    killed, whole, output = (tmp_path / name for name in ("killed", "whole", "out"))
    base = ["--base", str(path), "--logdir"]
    kill_at(some_step(), killed / "log.jsonl", [*base, str(killed)], output)
    with pytest.raises(ValueError, match="--resume"):
        train(load_recipe([path]), killed, resume=False)
    for folder in (killed, whole):
        assert run(1, [*base, str(folder), "--resume"], output) == [0]
    assert len(curve(whole)) == STEPS
    assert curve(killed) == curve(whole)
    assert content(killed / "weights.safetensors") == content(whole / "weights.safetensors")


def content(path):
    """Metadata and tensors of a file; the order of its metadata is drawn by the library."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: x.tolist() for key, x in load_file(path).items()}


def test_plain_and_lightning_take_the_same_steps(tmp_path, photos):
    """Catches logic of the step that one of the runners has alone."""
    from sgm.training.run import train

    weights = str(write_tiny_checkpoint(tmp_path / "weights.safetensors"))
    changes = {"model.params.ckpt_path": weights, **SAVED_AT_THE_END}
    recipe = load_recipe([write_recipe(tmp_path, photos, "svd_tiny", **changes)])
    train(recipe, tmp_path / "lightning", resume=False)
    stage = Stage(recipe, tmp_path / "plain", torch.device("cpu"))
    run = stage.run("unet", stage.build())
    assert stage.fit(run, stage.dataset())
    plain, lightning = (
        [loss for _, _, loss, _ in curve(folder)] for folder in (run.folder, tmp_path / "lightning")
    )
    assert lightning == pytest.approx(plain, rel=1e-4)  # fused kernels may differ in rounding


@pytest.fixture(scope="module")
def stages(tmp_path_factory, photos):
    """The folder of all stages of a small model, and the file that they end in."""
    folder = tmp_path_factory.mktemp("stages")
    common = ["--out", str(folder / "runs"), "--precision", "float32"]
    steps = {"training.plan.steps": 60, **SAVED_AT_THE_END}
    write_recipe(folder, photos, "svd_tiny_autoencoder", **steps)
    write_recipe(folder, photos, "svd_tiny_decoder", **{"training.plan.steps": 3})
    cache = {"data.cache": {"clips": 12, "shard": 5}}
    write_recipe(folder, photos, "svd_tiny", **steps, **cache)

    def call(stage, recipe, *more):
        return train_tiny.main([stage, "--recipe", str(folder / f"{recipe}.yaml"), *common, *more])

    assert call("autoencoder", "svd_tiny_autoencoder") == 0
    assert call("decoder", "svd_tiny_decoder") == 0
    assert call("unet", "svd_tiny") == 0
    notes = torch.load(folder / "runs" / "autoencoder" / "state.pt")["notes"]
    file = folder / "model.safetensors"
    assert call("export", "svd_tiny", "--checkpoint", str(file)) == 2  # another scale factor
    scale = notes["scale_factor"]
    more = ["--checkpoint", str(file), f"model.params.scale_factor={scale}"]
    assert call("export", "svd_tiny", *more) == 0
    return folder, file, scale


@pytest.mark.parametrize("stage", ["autoencoder", "unet"])
def test_the_loss_falls(stages, stage):
    """Catches a step in the wrong direction and gradients that do not arrive."""
    losses = [loss for _, _, loss, _ in curve(stages[0] / "runs" / stage)]
    assert mean(losses[-15:]) < 0.85 * mean(losses[:15])


def test_clips_are_encoded_once(stages):
    """Three files, the last one short; a second call finds nothing to do."""
    (folder,) = (stages[0] / "runs").glob("latents-*")
    files = sorted(folder.iterdir())
    assert [len(load_file(file)["latents"]) for file in files] == [5, 5, 2]
    times = [file.stat().st_mtime_ns for file in files]
    recipe = load_recipe([stages[0] / "svd_tiny.yaml"])
    assert encode_latents(Stage(recipe, stages[0] / "runs", torch.device("cpu")))
    assert [file.stat().st_mtime_ns for file in sorted(folder.iterdir())] == times


def test_the_export_is_a_checkpoint_of_the_model(stages):
    """Catches parts taken from the wrong stage or not averaged, and a condition autoencoder that
    is not the first stage's."""
    folder, file, scale = stages
    model = tiny_config(scale_factor=scale, ckpt_path=str(file)).model
    engine = instantiate_from_config(model).float()
    assert engine.scale_factor == scale
    states = {part: torch.load(folder / "runs" / part / "state.pt") for part in ("decoder", "unet")}
    key = "diffusion_model.input_blocks.0.0.weight"
    averaged = states["unet"]["ema"][f"model.{key}"]
    assert torch.equal(engine.model.state_dict()[key], averaged.half().float())
    key = "conv_out.time_mix_conv.weight"
    averaged = states["decoder"]["ema"][f"decoder.{key}"]
    assert torch.equal(engine.first_stage_model.decoder.state_dict()[key], averaged.half().float())
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        moments, _ = engine.first_stage_model.encode(x, unregularized=True)
        mode = engine.conditioner.embedders[3].encoder.encode(x)
    assert torch.allclose(mode, moments.chunk(2, 1)[0], atol=1e-5)


def test_a_unet_keeps_its_autoencoder(stages, tmp_path):
    """Catches a U-Net that goes on with latents of an autoencoder it was not trained with."""
    folder = shutil.copytree(stages[0] / "runs", tmp_path / "runs")
    state = torch.load(folder / "autoencoder" / "state.pt")
    state["notes"]["scale_factor"] *= 2
    torch.save(state, folder / "autoencoder" / "state.pt")
    recipe = load_recipe([stages[0] / "svd_tiny.yaml"])
    with pytest.raises(ValueError, match="another autoencoder"):
        train_unet(Stage(recipe, folder, torch.device("cpu")))


def test_lightning_starts_from_a_trained_autoencoder(stages, tmp_path, capsys, caplog):
    """Catches a U-Net or a decoder that learns with an autoencoder of random weights, weights that
    are refused, and a U-Net that silently learns latents of another scale."""
    for name in ("svd_tiny", "svd_tiny_decoder"):
        base = ["--base", str(stages[0] / f"{name}.yaml"), "lightning.trainer.max_steps=1"]
        base += ["--logdir", str(tmp_path / name)]
        assert main(base) == 2
        assert "training.first_stage=FILE" in one_error(capsys)
        assert main([*base, f"training.first_stage={first_stage_file(stages[0], tmp_path)}"]) == 0
        warned = "give model.params.scale_factor=0.7" in caplog.text
        assert warned == (name == "svd_tiny")
        caplog.clear()


def first_stage_file(folder, target):
    """Write the weights of the autoencoder's run as main.py would."""
    state = torch.load(folder / "runs" / "autoencoder" / "state.pt")
    notes = {"latents": json.dumps({"scale_factor": 0.7})}
    save_file(state["model"], target / "weights.safetensors", notes)
    return target / "weights.safetensors"


def one_error(capsys):
    """The one line that standard error has."""
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trianing.optim.lr=1"], "no key 'trianing.optim.lr'"),
        (["data.batchsize=4"], "no key 'data.batchsize'"),
        (["+data.batchsize=4"], "data.batchsize: "),
        (["+training.optim.lrr=4"], "training.optim.lrr: "),
        (["data.workers=null"], "data.workers: "),
        (["training.optim.lr=abc"], "training.optim.lr: "),
        (["lightning.save.steps=abc"], "lightning.save.steps: "),
        (["lightning.trainer.max_steps=abc"], "lightning.trainer.max_steps: "),
        (["lightning.trainer.accelerator=abacus"], "lightning.trainer: "),
        (["lightning.trainer.devices=0"], "lightning.trainer: "),
        (["+lightning.trainer.nope=1"], "lightning.trainer: "),
        (["+lightning.trainer.accumulate_grad_batches=a"], "lightning.trainer.accumulate_grad_ba"),
        (["+engine.params.encoder_config.params.ch=a"], "engine.params.encoder_config.params.ch: "),
        (["+engine.params.encoder_config.params.ch=-1"], "engine: sgm.models.autoencoder.Autoe"),
        (["+training.task.params.edge_weight=a"], "training.task.params.edge_weight: expected a n"),
        (["training.task.params.trainable=encoder"], "training.task.params.trainable: expected a"),
        (["training.task.params.trainable=[]"], "training.task.params.trainable: expected names"),
        (["+training.optim.kind=adamw_8bit"], "training.optim.kind adamw_8bit needs bitsandbytes"),
        (["lightning.log.to=paper"], "lightning.log.to: expected tensorboard, wandb or none"),
        (["+lightning.callbacks.v={target: sgm.no.Such}"], "there is no module 'sgm.no'"),
        (["data.dataset.params.length=0"], "data: expected 1 item or more in the dataset and "),
        (["data.dataset.params.size=[32,a]"], "data.dataset.params.size: expected a list (each an"),
        (["data.dataset.params.photos=none.safetensors"], "none.safetensors"),
        (["--logdir", __file__], "test_training.py"),
    ],
)
def test_wrong_recipes_are_one_line(tmp_path, photos, capsys, overrides, message):
    """Catches tracebacks, overrides that are accepted and do nothing, and refusals that come once
    the run's folder is made."""
    recipe = write_recipe(tmp_path, photos, "svd_tiny_autoencoder")
    assert main(["--base", str(recipe), "--logdir", str(tmp_path / "run"), *overrides]) == 2
    assert message in one_error(capsys)
    assert not (tmp_path / "run").exists()


def test_standard_output_has_the_result_alone(tmp_path, photos, capsys):
    """Catches a progress bar that ends a run where nobody reads standard output, and that a
    program which does would have to tell from the result."""
    recipe = write_recipe(tmp_path, photos, "svd_tiny_autoencoder")
    short = ["lightning.trainer.max_steps=1", "lightning.trainer.enable_progress_bar=true"]
    assert main(["--base", str(recipe), "--logdir", str(tmp_path / "run"), *short]) == 0
    said = capsys.readouterr()
    assert said.out == f"averaged weights: {tmp_path / 'run' / 'weights.safetensors'}\n"
    assert "Epoch 0" in said.err


def test_errors_are_one_line(tmp_path, photos, capsys):
    """Wrong arguments of the training commands: exit code 2, one line, no traceback."""
    recipe = str(write_recipe(tmp_path, photos, "svd_tiny_decoder"))
    decoder = ["decoder", "--recipe", recipe, "--out", str(tmp_path)]
    for program, arguments, message in [
        (main, ["--base", "none.yaml"], "no recipe none.yaml"),
        (main, ["--base", recipe, "--nope"], "--nope"),
        (train_tiny.main, decoder, "run that stage first"),
        (train_tiny.main, [*decoder, "training.seed=x"], "training.seed: "),
        (train_tiny.main, [*decoder, "--device", "abacus"], "device 'abacus'"),
    ]:
        assert _code_of(program, arguments) == 2
        assert message in one_error(capsys)


def _code_of(program, arguments):
    """Exit code, as a process of its own would have it."""
    try:
        return program(arguments)
    except SystemExit as end:
        return end.code
