"""``scripts/download.py`` against `tests.local_hub`, a server that speaks the hub's protocol."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.download import main
from sgm.inference.specs import SPECS
from tests.local_hub import TOKEN, local_hub

ROOT = Path(__file__).resolve().parents[2]
XT, LCM = SPECS["svd_xt"], SPECS["svd_xt_lcm"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with two models, and an empty working directory."""
    with local_hub(monkeypatch, tmp_path) as hub:
        monkeypatch.chdir(tmp_path)
        hub.repositories[XT.repository] = {"svd_xt.safetensors": b"xt", "README.md": b"x"}
        hub.repositories[LCM.repository] = {LCM.file: b"lcm"}
        yield hub


def test_a_model_ends_under_its_name_with_its_licence_said_first(hub, tmp_path, capsys):
    assert main(["svd_xt"]) == 0
    assert (tmp_path / "checkpoints" / "svd_xt.safetensors").read_bytes() == b"xt"
    said = capsys.readouterr().out.splitlines()
    page = f"{hub.url}/{XT.repository}"
    assert said[:2] == [
        f"svd_xt.safetensors of {page}",
        f"licence: some-community ({page}/blob/main/LICENSE.md)",
    ]
    assert said[2].endswith(hashlib.sha256(b"xt").hexdigest())
    assert hub.fetched() == {"svd_xt.safetensors"}


def test_a_u_net_comes_with_what_it_builds_on(hub, tmp_path):
    """Catches: a model that cannot be used alone; its file under the publisher's name."""
    assert main(["svd_xt_lcm", "--folder", "weights"]) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "weights").iterdir()}
    assert files == {"svd_xt.safetensors": b"xt", "svd_xt_lcm.safetensors": b"lcm"}


def test_a_gated_model_is_one_line_and_opens_with_a_token(hub, capsys):
    hub.gated.add(XT.repository)
    assert main(["svd_xt"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {XT.repository} is gated: accept its licence at {hub.url}")
    assert not list(Path("checkpoints").iterdir())
    assert main(["svd_xt", "--token", TOKEN]) == 0


def test_a_repository_without_the_file_is_one_line(hub, capsys):
    hub.repositories[XT.repository] = {"other.safetensors": b"x"}
    assert main(["svd_xt"]) == 2
    assert "has no file svd_xt.safetensors; its checkpoints: other" in capsys.readouterr().err


def test_a_home_that_is_not_there_is_one_line(hub, tmp_path, capsys):
    assert main(["svd_xt", "--folder", "~nosuchuser/weights"]) == 2
    assert "there is no home folder ~nosuchuser" in capsys.readouterr().err
    assert not hub.requests
    assert not list(tmp_path.glob("~*"))


def test_every_published_model_can_be_asked_for():
    """Catches: a row of the table without its repository; the bundled model offered."""
    published = {name for name, spec in SPECS.items() if spec.repository}
    assert published == set(SPECS) - {"svd_tiny"}
    assert SPECS["svd_xt_1_1"].repository == "stabilityai/stable-video-diffusion-img2vid-xt-1-1"
    assert SPECS["svd"].repository == SPECS["svd_image_decoder"].repository
    assert {SPECS[name].repository for name in ("sv3d_u", "sv3d_p")} == {"stabilityai/sv3d"}


def run(*arguments, **environment):
    command = [sys.executable, str(ROOT / "scripts" / "download.py"), *arguments]
    place = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, capture_output=True, text=True, env=place, check=False)


def test_the_program_takes_the_address_of_the_hub_from_the_environment(hub, tmp_path):
    """Catches: an address that is built in; a progress bar where there is no terminal."""
    place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    done = run("svd_xt", "--folder", str(tmp_path / "there"), **place)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "there" / "svd_xt.safetensors").read_bytes() == b"xt"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [(["--help"], 0, "svd_xt_lcm"), (["svd_tiny"], 2, "invalid choice"), ([], 2, "NAME")],
)
def test_help_and_mistakes_answer_at_once(arguments, code, words):
    """Within the time that starting Python takes, measured here, and 2 s."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", ""], check=True)
    start = time.monotonic() - began
    began = time.monotonic()
    done = run(*arguments)
    assert time.monotonic() - began < 2 + 2 * start
    assert done.returncode == code
    assert words in done.stdout + done.stderr
