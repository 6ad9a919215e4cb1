"""Bad files through the three commands that take a checkpoint: one clear line, exit code 2."""

import contextlib
import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from scripts import convert, inspect_checkpoint
from scripts.sampling import simple_video_sample
from sgm.checkpoint import open_checkpoint
from tests.tiny import tiny_config, write_tiny_checkpoint

ROOT = Path(__file__).parents[2]
SUFFIXES = (".safetensors", ".ckpt", ".pt")
COMMANDS = ("convert", "inspect", "sample")


@pytest.fixture(autouse=True)
def _surroundings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SGM_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


Refusal = Callable[[Path, str], str]


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Gives a file to a command and returns its one line, having checked that it is one."""
    config = tmp_path / "tiny.yaml"
    OmegaConf.save(tiny_config(), config)
    out = tmp_path / "results"
    out.mkdir()
    sample = ["--input_path", str(ROOT / "assets/sample.jpg"), "--version", "svd_tiny"]
    sample += ["--config", str(config), "--output_folder", str(out)]
    commands = {
        "convert": lambda path: convert.main([path, str(out / "x.safetensors")]),
        "inspect": lambda path: inspect_checkpoint.main([path]),
        "sample": lambda path: simple_video_sample.main([*sample, "--ckpt_path", path]),
    }

    def refuse(path: Path, command: str) -> str:
        assert commands[command](str(path)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert str(path) in error
        assert not [file for file in out.rglob("*") if file.is_file()]
        return error

    return refuse


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_short(tiny: Path, tmp_path: Path, refusal: Refusal, command: str, suffix: str):
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    if suffix == ".safetensors":
        whole.write_bytes(tiny.read_bytes())
    else:
        torch.save(load_file(tiny), whole, _use_new_zipfile_serialization=suffix == ".ckpt")
    size = whole.stat().st_size
    places = (0, 1, 7, 9, 100, size // 2, size - 1, *random.Random(0).sample(range(size), 2))
    for length in places:
        path.write_bytes(whole.read_bytes()[:length])
        refusal(path, command)


class Payload:
    """Makes a folder when it is unpickled by pickle itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_other_model(path: Path) -> None:
    block = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2"
    shapes = {f"{block}.to_q.weight": (320, 320), f"{block}.to_k.weight": (320, 768)}
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)


def write_other_unet(path: Path) -> None:
    keys = ("conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.x")
    save_file({key: torch.zeros(4) for key in keys}, path)


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a web page": (
        "x.safetensors",
        lambda path: path.write_text("<!DOCTYPE html><title>Sign in</title>"),
        "a web page; the download did not give the file",
    ),
    "a git-lfs pointer": (
        "x.safetensors",
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "git lfs pull",
    ),
    "a text": ("x.ckpt", lambda path: path.write_text("weights"), "not a .ckpt file"),
    "an unknown kind": ("x.gguf", lambda path: path.write_bytes(b"GGUF"), "ending in"),
    "another archive": ("x.ckpt", lambda path: path.write_bytes(b"PK\5\6" + bytes(18)), "damaged"),
    "a model of pictures": ("x.safetensors", write_other_model, "Stable Diffusion 1.x"),
    "a U-Net of pictures": ("x.safetensors", write_other_unet, "diffusers image U-Net"),
    "a folder without weights": ("x", lambda path: path.mkdir(), "a folder without weights"),
    "nothing": ("x.safetensors", lambda _: None, "no"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", BAD)
def test_something_else(tmp_path: Path, refusal: Refusal, command: str, kind: str):
    name, write, message = BAD[kind]
    write(tmp_path / name)
    assert message in refusal(tmp_path / name, command)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, refusal: Refusal, command: str, zipped: bool):
    path = tmp_path / "evil.ckpt"
    content = {"a": torch.ones(1), "b": Payload(tmp_path / "owned")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert "Python objects besides tensors" in refusal(path, command)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("command", ["convert", "sample"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_another_type(
    tiny: Path, tmp_path: Path, refusal: Refusal, command: str, dtype: torch.dtype
):
    path = tmp_path / "x.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(tiny).items()}, path)
    error = refusal(path, command)
    assert str(dtype) in error
    assert ("--dtype fp32" if dtype == torch.float64 else "uantised weights") in error


def test_weights_that_are_not_finite(tiny: Path, tmp_path: Path, refusal: Refusal):
    path = tmp_path / "x.safetensors"
    content = load_file(tiny)
    content["model.diffusion_model.out.2.weight"].fill_(torch.nan)
    save_file(content, path)
    assert "out.2.weight has values that are not finite" in refusal(path, "convert")


def test_sampling_suspects_the_weights(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    # Loading does not look at values; a result that is not finite is no video, and one line.
    path, config, out = tmp_path / "x.safetensors", tmp_path / "tiny.yaml", tmp_path / "out"
    OmegaConf.save(tiny_config(), config)
    content = load_file(tiny)
    content["model.diffusion_model.out.2.weight"].fill_(torch.nan)
    save_file(content, path)
    arguments = ["--input_path", str(ROOT / "assets/sample.jpg"), "--version", "svd_tiny"]
    arguments += ["--config", str(config), "--ckpt_path", str(path), "--output_folder", str(out)]
    assert simple_video_sample.main([*arguments, "--height", "64", "--width", "64"]) != 0
    error = capsys.readouterr().err
    assert "not finite" in error
    assert "weights" in error
    assert not list(out.rglob("*.mp4"))


@contextlib.contextmanager
def other_user() -> Iterator[None]:
    """Act as a user without rights, where this one may do everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs the rights of Unix")
@pytest.mark.parametrize("locked", ["file", "folder"])
@pytest.mark.parametrize("whole", [False, True])
def test_no_permission(locked: str, whole: bool):
    # At the function that all three open with: another user could not import the commands.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "weights"
        folder.mkdir()
        path = folder / "x.safetensors"
        save_file({"x": torch.ones(1)}, path)
        Path(name).chmod(0o755)
        (path if locked == "file" else folder).chmod(0)
        try:
            with other_user(), pytest.raises(ValueError, match="this user"):
                open_checkpoint(folder if whole else path)
        finally:
            folder.chmod(0o755)
