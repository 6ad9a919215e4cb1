"""``scripts/convert.py``: between all layouts and types, with the tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from scripts import convert, writing
from sgm.checkpoint import load_checkpoint, open_checkpoint, read_state_dict, sha256_of
from sgm.util import instantiate_from_config
from tests.foreign import native_config
from tests.local_hub import local_hub
from tests.tiny import draw_weights

ROOT = Path(__file__).parents[2]
UNUSED = ("first_stage_model.encoder.", "conditioner.embedders.3.encoder.decoder.")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SGM_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the test's own process keeps its ways


def on_meta() -> torch.nn.Module:
    with torch.device("meta"):
        return instantiate_from_config(native_config().model)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = on_meta().to_empty(device="cpu")
    draw_weights(engine, seed=0)
    path = tmp_path_factory.mktemp("native") / "mine.safetensors"
    save_file(engine.state_dict(), path, metadata={"title": "mine"})
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "mine.yaml"
    OmegaConf.save(native_config(), path)
    return path


def run(*arguments: object) -> int:
    return convert.main([str(argument) for argument in arguments])


def without_unused(path: Path) -> dict[str, torch.Tensor]:
    """What sampling uses."""
    tensors = read_state_dict(path)
    unused = (*UNUSED, "conditioner.embedders.3.encoder.post_quant_conv.")
    return {key: value for key, value in tensors.items() if not key.startswith(unused)}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_to_diffusers_and_back(native: Path, config: Path, tmp_path: Path):
    # Catches: a tensor lost or changed on either way; configurations that diffusers cannot read.
    from diffusers import StableVideoDiffusionPipeline

    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    names = ("--config", config, "--version", "svd_tiny")
    assert run(native, folder, "--to", "diffusers", *names) == 0
    assert run(folder, back) == 0
    assert_equal(without_unused(back), without_unused(native))
    pipeline = StableVideoDiffusionPipeline.from_pretrained(folder)
    assert_equal(
        {f"unet/{key}": value for key, value in pipeline.unet.state_dict().items()},
        {k: v for k, v in all_views(folder).items() if k.startswith("unet/")},
    )
    load_checkpoint(on_meta(), back)


def all_views(path: Path) -> dict[str, torch.Tensor]:
    source = open_checkpoint(path)
    return {name: source.view(name) for name in source.tensors}


def test_to_mindspore_and_back(native: Path, tmp_path: Path):
    assert run(native, tmp_path / "ms.ckpt", "--to", "mindspore") == 0
    assert any(name.endswith(".gamma") for name in read_state_dict(tmp_path / "ms.ckpt"))
    assert run(tmp_path / "ms.ckpt", tmp_path / "back.safetensors") == 0
    assert_equal(load_file(tmp_path / "back.safetensors"), load_file(native))


def test_half_precision(native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "half.safetensors"
    assert run(native, out, "--dtype", "fp16") == 0
    assert_equal(load_file(out), {key: value.half() for key, value in load_file(native).items()})
    assert capsys.readouterr().out.split() == [
        str(out),
        f"{out.stat().st_size / 1e9:.3f}",
        "GB",
        "sha256",
        sha256_of(out),
    ]


def test_a_training_checkpoint_becomes_plain(native: Path, tmp_path: Path):
    wrapped = {f"engine.{key}": value for key, value in load_file(native).items()}
    torch.save({"state_dict": wrapped, "global_step": 7}, tmp_path / "last.ckpt")
    assert run(tmp_path / "last.ckpt", tmp_path / "out.safetensors") == 0
    assert_equal(load_file(tmp_path / "out.safetensors"), load_file(native))
    assert open_checkpoint(tmp_path / "out.safetensors").metadata["global_step"] == "7"


def test_a_part_alone_is_converted_when_said(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    unet = {k: v for k, v in load_file(native).items() if k.startswith("model.")}
    save_file(unet, tmp_path / "unet.safetensors")
    out = tmp_path / "out.safetensors"
    assert run(tmp_path / "unet.safetensors", out) == 2
    assert "missing" in capsys.readouterr().err
    assert run(tmp_path / "unet.safetensors", out, "--partial") == 0
    assert load_file(out).keys() == unet.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{native}", "{there}"], "is there already"),
        (["{native}", "{native}", "--force"], "is the source itself"),
        (["{native}", "{new}.txt"], "ends in .safetensors"),
        (["{native}", "{new}.safetensors", "--to", "mindspore"], "ends in .ckpt"),
        (["{native}", "{there}/x.safetensors"], "cannot be written"),
        (["{new}.safetensors", "{there}"], "no such file or folder"),
        (["{native}", "~nosuchuser/x.safetensors"], "no home folder ~nosuchuser"),
        (["~nosuchuser/x.ckpt", "{new}.safetensors"], "no home folder ~nosuchuser"),
        (["{native}", "{new}", "--to", "diffusers", "--partial"], "leave --partial out"),
    ],
)
def test_wrong_wishes_are_one_line(
    native: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
):
    places = {"native": native, "there": tmp_path / "there.safetensors", "new": tmp_path / "new"}
    places["there"].write_text("precious")
    before = native.read_bytes()
    assert run(*(argument.format(**places) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert {path.name for path in tmp_path.iterdir()} == {"there.safetensors"}
    assert places["there"].read_text() == "precious"
    assert native.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], "--dtype {fp16,bf16,fp32}"),
        (["x.safetensors", "y.safetensors", "--dtype", "int3"], "invalid choice: 'int3'"),
        (["README.md", "y.bin"], "ends in .safetensors"),
        (["absent.ckpt", "y.safetensors"], "no such file"),
    ],
)
def test_help_and_wrong_wishes_answer_at_once(arguments: list[str], words: str):
    # Without torch: its import alone takes most of the two seconds.
    code = "import sys; from scripts.convert import main\ntry: main(sys.argv[1:])\n"
    code += "finally: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert words in done.stdout + done.stderr


def test_a_repository_of_the_hub(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with local_hub(monkeypatch, tmp_path / "hub") as hub:
        hub.repositories["me/video"] = {"mine.safetensors": native.read_bytes()}
        assert run("me/video", tmp_path / "out.safetensors") == 0
    assert_equal(load_file(tmp_path / "out.safetensors"), load_file(native))


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(native: Path, tmp_path: Path, sent: signal.Signals):
    # Reading takes its time, so that the signal comes while the target is being written.
    code = (
        "import signal, sys, time; from sgm.checkpoint import source\n"
        "from scripts.convert import main\n"
        "read = source.StoredTensors.read\n"
        "def slowly(self, name): time.sleep(0.2); return read(self, name)\n"
        "source.StoredTensors.read = slowly\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may ignore it
        "sys.exit(main(sys.argv[1:]))"
    )
    target = tmp_path / "out/x.safetensors"
    command = [sys.executable, "-c", code, str(native), str(target)]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=os.environ, text=True)
    while child.poll() is None and not any(target.parent.glob(".x*")):
        time.sleep(0.05)
    child.send_signal(sent)
    _, error = child.communicate(timeout=120)
    assert child.returncode == 130
    assert error == "interrupted: nothing is left behind\n"
    assert list(tmp_path.iterdir()) == []


def test_progress_is_shown_on_a_terminal(native: Path, tmp_path: Path):
    shown: list[str] = []

    class Line:
        def show(self, text: str) -> None:
            shown.append(text)

    show = writing.shower(Line())
    show("writing", 0, 4_000_000_000)
    time.sleep(0.01)
    show("writing", 1_000_000_000, 4_000_000_000)
    assert shown[0] == "writing 0.0 of 4.0 GB"
    assert shown[1].startswith("writing 1.0 of 4.0 GB, ")
    assert shown[1].endswith(" s left")


def test_json_files_are_the_layout_s_own(native: Path, config: Path, tmp_path: Path):
    folder = tmp_path / "folder"
    run(native, folder, "--to", "diffusers", "--config", config, "--version", "svd_tiny")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableVideoDiffusionPipeline"
    assert (folder / "unet/config.json").is_file()
