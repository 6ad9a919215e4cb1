"""``scripts/inspect_checkpoint.py``: what it says about files of every layout."""

import gzip
import json
import math
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import inspect_checkpoint
from sgm.checkpoint import sha256_of
from tests.tiny import write_tiny_checkpoint

ROOT = Path(__file__).parents[2]
KEYS = ROOT / "tests/data/keys"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SGM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, str]:
    """The lines by label; of several with one label, the last."""
    assert inspect_checkpoint.main([str(argument) for argument in arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    width = inspect_checkpoint.INDENT
    return {line[:width].strip(): line[width:] for line in lines}


def hollow(path: Path, name: str = "svd") -> Path:
    """A file with a published model's header in half precision, whose values take no space."""
    shapes = json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes()))
    header, end = {"__metadata__": {"modelspec.title": "Stable Video Diffusion"}}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def test_the_published_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    # Catches: reading the 4.8 GB; a part counted twice or not at all.
    path = hollow(tmp_path / "svd_xt.safetensors")
    started = time.process_time()
    facts = inspect(capsys, path)
    assert time.process_time() - started < 2
    assert facts["layout"] == "native"
    assert facts["model"] == "svd or svd_xt or svd_xt_1_1"
    assert facts["types"] == "float16 (2446)"
    assert facts["file"].startswith("4.7")
    assert facts["missing"] == "nothing"
    assert facts["metadata"] == "modelspec.title: Stable Video Diffusion"
    assert facts["sha256"].startswith("not known yet")
    total, *parts = (float(part.rpartition(" M")[0].split()[-1]) for part in split(facts))
    assert total == pytest.approx(sum(parts), abs=0.3)
    assert parts[0] == pytest.approx(1524.6, abs=1)  # the U-Net, as the paper counts it


def split(facts: dict[str, str]) -> list[str]:
    total, _, parts = facts["parameters"].partition(": ")
    return [total, *parts.split(", ")]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("svd_image_decoder", "svd_image_decoder or svd_xt_image_decoder"),
        ("sv3d_u", "sv3d_u"),
        ("sv3d_p", "sv3d_p"),
    ],
)
def test_the_other_published_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, model: str
):
    facts = inspect(capsys, hollow(tmp_path / "x.safetensors", name))
    assert (facts["model"], facts["missing"]) == (model, "nothing")


def test_the_digest_is_remembered(tiny: Path, capsys: pytest.CaptureFixture[str]):
    assert inspect(capsys, tiny)["sha256"].startswith("not known yet")
    assert inspect(capsys, tiny, "--hash")["sha256"] == sha256_of(tiny)
    assert inspect(capsys, tiny)["sha256"] == sha256_of(tiny)


def test_mindspore_s_layout(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path):
    from scripts import convert

    path = tmp_path / "tiny.ckpt"
    assert convert.main([str(tiny), str(path), "--to", "mindspore"]) == 0
    capsys.readouterr()
    facts = inspect(capsys, path)
    assert (facts["layout"], facts["model"]) == ("mindspore", "svd_tiny")


def test_a_part_alone_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
):
    path = tmp_path / "unet.safetensors"
    save_file({k: v for k, v in load_file(tiny).items() if k.startswith("model.")}, path)
    assert inspect(capsys, path)["missing"] == "autoencoder, conditioner"


def test_values_are_checked_when_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
):
    assert inspect(capsys, tiny, "--values")["values"] == "all finite"
    key = "model.diffusion_model.out.2.bias"
    content = load_file(tiny)
    content[key][1] = torch.nan
    save_file(content, tmp_path / "x.safetensors")
    assert inspect_checkpoint.main([str(tmp_path / "x.safetensors"), "--values"]) == 2
    assert f"{key} has values that are not finite" in capsys.readouterr().err


def test_an_incomplete_model_is_an_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
):
    content = load_file(tiny)
    del content["model.diffusion_model.out.2.bias"]
    save_file(content, tmp_path / "x.safetensors")
    assert inspect_checkpoint.main([str(tmp_path / "x.safetensors")]) == 2
    assert "1 tensor missing (model.diffusion_model.out.2.bias)" in capsys.readouterr().err


def test_help_answers_without_torch():
    code = "import sys; from scripts.inspect_checkpoint import main\ntry: main(['--help'])\n"
    code += "except SystemExit: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "False"
