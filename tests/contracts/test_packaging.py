"""What is installed, and what is tracked: the wheel, the lock file, the version, the file texts."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import sgm

ROOT = Path(__file__).parents[2]
SOURCES = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "sgm", "configs"]
BUILD = "from setuptools import build_meta; build_meta.build_wheel('.')"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a wheel built from a copy of the tree (a build writes into its source)."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    subprocess.run([sys.executable, "-c", BUILD], cwd=tree, check=True, capture_output=True)
    site = tree / "site"
    zipfile.ZipFile(next(tree.glob("*.whl"))).extractall(site)
    return site


def names(folder: Path, pattern: str) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob(pattern)}


def test_wheel_ships_all_code_and_all_configs(installed: Path):
    # Catches: a package without __init__.py, a kind of file that package_data leaves out.
    assert names(installed / "sgm", "*.py") == names(ROOT / "sgm", "*.py")
    assert names(installed / "sgm/configs", "*.*") == names(ROOT / "configs", "*.*")
    assert {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")} == {"sgm"}


def test_installed_package_finds_its_configs(installed: Path, tmp_path: Path):
    # Catches: configs installed at a place where importlib.resources does not look.
    code = (
        "from importlib.resources import files; import sgm; "
        "print((files('sgm') / 'configs' / 'svd_xt.yaml').is_file(), sgm.__file__)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(installed)}, cwd=tmp_path,
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert out.stdout.split() == ["True", str(installed / "sgm/__init__.py")]


def test_one_version_everywhere(installed: Path):
    # Catches: a release whose metadata or changelog was forgotten.
    metadata = Parser().parsestr(next(installed.glob("*.dist-info/METADATA")).read_text())
    assert metadata["Version"] == sgm.__version__
    assert metadata["License-Expression"] == "MIT"
    assert f"## [{sgm.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def requirement_names(lines: list[str]) -> set[str]:
    return {re.split(r"[\s=<>!~;\[]", line)[0].lower() for line in lines}


def test_lock_pins_every_requirement_and_names_no_index():
    # Catches: a dependency added without `make lock`, a URL or an option in the lock.
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.match(r"[a-z0-9.-]+==[\w.]+( ; |$)", pin) for pin in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["optional-dependencies"]
    extras = [line for name in ("train", "demo", "all", "dev") for line in groups[name]]
    wanted = requirement_names(project["dependencies"] + extras) - {project["name"]}
    assert wanted <= requirement_names(pins)


def test_no_tracked_file_names_a_place_on_somebodys_machine():
    # Catches: a path that works on one machine only, pasted into code, a test or a document.
    place = r"(^|[^[:alnum:]_.-])(/(home|root|Users|work)/|file:///)[[:alnum:]]"
    done = subprocess.run(
        ["git", "grep", "-nIE", place], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode > 1:
        pytest.skip(f"no tracked files to search: {done.stderr.strip()}")
    assert done.stdout == ""
