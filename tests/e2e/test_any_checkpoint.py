"""``--ckpt_path ANYTHING``: the same weights in every form make the same video."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from scripts.sampling.simple_video_sample import main
from sgm.convert import plan
from sgm.inference import SamplingOptions, VideoPipeline
from sgm.inference.settings import find_model
from tests.foreign import folder_tensors, native_config, tiny_diffusers_pipeline
from tests.local_hub import local_hub
from tests.recorded import relative_error

OPTIONS = SamplingOptions(num_frames=2, num_steps=1, height=64, width=64, output="latents")
REPOSITORY = "someone/svd-tiny"


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """A folder with one model in every form."""
    place = tmp_path_factory.mktemp("forms")
    pipeline = tiny_diffusers_pipeline(seed=3)
    pipeline.save_pretrained(place / "svd_tiny_pipeline")
    tensors = folder_tensors(pipeline)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    native = plan(shapes, source="diffusers", target="native").convert(tensors)
    native = {key: tensor.contiguous().clone() for key, tensor in native.items()}
    (place / "folder").mkdir()
    save_file(native, place / "folder" / "tiny.safetensors")
    save_file(native, place / "tiny.safetensors")
    torch.save({"state_dict": native}, place / "tiny.ckpt")
    unet = {key.removeprefix("unet/"): t for key, t in tensors.items() if key.startswith("unet/")}
    save_file(
        {key: tensor + 0.01 for key, tensor in unet.items()},
        place / "AnimateLCM-SVD-xt.safetensors",
    )
    return place


@pytest.fixture
def place(tmp_path, monkeypatch, forms):
    """A working directory with the YAML of that model, and a picture."""
    (tmp_path / "configs").mkdir()
    OmegaConf.save(native_config(ckpt_path=None), tmp_path / "configs" / "svd_tiny.yaml")
    noise = np.random.default_rng(0).integers(0, 255, (70, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SGM_CACHE", str(tmp_path / "digests"))
    return tmp_path


def latents(ckpt_path, name=None):
    pipeline = VideoPipeline.from_spec(name, ckpt_path=ckpt_path, device="cpu", dtype="float32")
    return pipeline("a.png", OPTIONS)


def test_every_form_gives_the_same_latents(place, forms, monkeypatch):
    """Without ``--version``: each is told by its keys. Catches: a form that is not taken, a part
    of it that is left at other values, a repository of the hub that needs more than its name."""
    expected = latents(forms / "tiny.safetensors")
    assert torch.isfinite(expected).all()
    for form in ("tiny.ckpt", "folder", "svd_tiny_pipeline"):
        # Not to the bit: sums may depend on where in memory weights lie.
        assert relative_error(latents(forms / form), expected) < 1e-5, form
    folder = forms / "svd_tiny_pipeline"
    files = [path for path in folder.rglob("*") if path.is_file()]
    with local_hub(monkeypatch, place) as hub:
        contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        hub.repositories[REPOSITORY] = contents
        assert relative_error(latents(REPOSITORY), expected) < 1e-5
        assert relative_error(latents(f"hf://{REPOSITORY}"), expected) < 1e-5


def test_a_u_net_alone_lies_over_the_other_weights(place, forms):
    """Catches: the base's U-Net left in place, another part changed, guidance or other steps."""
    (place / "checkpoints").mkdir()
    (place / "checkpoints" / "svd_xt.safetensors").symlink_to(forms / "tiny.safetensors")
    lcm = {
        "target": "sgm.modules.diffusionmodules.sampling.LCMSampler",
        "params": {
            "num_steps": 4,
            "discretization_config": {
                "target": "sgm.modules.diffusionmodules.discretizer.EDMDiscretization",
                "params": {"sigma_max": 700.0},
            },
        },
    }
    config = native_config(ckpt_path=None, sampler_config=lcm)
    OmegaConf.save(config, place / "configs" / "svd_xt_lcm.yaml")
    files = find_model(ckpt_path=forms / "AnimateLCM-SVD-xt.safetensors")
    assert files.spec.name == "svd_xt_lcm"
    pipeline = VideoPipeline.load(
        files, SamplingOptions(device="cpu", dtype="float32", optimize="none")
    )
    OmegaConf.save(config, place / "configs" / "svd_xt.yaml")
    base = VideoPipeline.from_spec("svd_xt", device="cpu", dtype="float32").engine.state_dict()
    for key, tensor in pipeline.engine.state_dict().items():
        moved = 0.01 if key.startswith("model.diffusion_model.") else 0.0
        torch.testing.assert_close(tensor, base[key] + moved, rtol=0, atol=1e-6)
    rows = []
    pipeline.engine.model.diffusion_model.register_forward_hook(
        lambda _module, inputs, _output: rows.append(len(inputs[0]))
    )
    video = pipeline("a.png", OPTIONS.replace(num_steps=None))
    assert torch.isfinite(video).all()
    assert rows == [2] * 4  # two frames without an unconditional half, four steps


def test_the_command_line_records_a_folder_and_repeats_it(place, forms, capsys):
    """Catches: a folder that cannot be hashed, a record whose path cannot be loaded again."""
    few = ["--num_frames=2", "--num_steps=1", "--height=64", "--width=64", "--format=png"]
    folder = forms / "svd_tiny_pipeline"
    assert main(["a.png", f"--ckpt_path={folder}", "--output_folder=out", *few]) == 0
    assert main(["--repeat=out/000000.json", "--output_folder=out"]) == 0
    first, second = (sorted((Path("out") / name).iterdir()) for name in ("000000", "000001"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert "error" not in capsys.readouterr().err
    resumed = ["a.png", f"--ckpt_path={folder}", "--output_folder=out", "--resume", *few]
    assert main(resumed) == 0
    assert "there already" in capsys.readouterr().out


def test_the_log_says_which_model_it_is(place, forms, caplog):
    with caplog.at_level(logging.INFO, "sgm.inference"):
        find_model(ckpt_path=forms / "tiny.ckpt")
    assert caplog.messages == ["tiny.ckpt is svd_tiny, by its keys"]


def test_an_unreachable_hub_is_one_line(place, monkeypatch, capsys):
    with local_hub(monkeypatch, place):
        assert main(["a.png", "--ckpt_path=no/such"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no repository http://127.0.0.1")
    assert error.count("\n") == 1
    assert not Path("outputs").exists()
