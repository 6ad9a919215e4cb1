"""Importing is silent, cheap and minimal. Each check runs in a process of its own."""

import subprocess
import sys

import pytest

UNUSED = {"fire", "streamlit", "open_clip", "pytorch_lightning", "lightning"}
HEAVY = UNUSED | {"PIL", "av", "cv2", "torchvision"}
# From the lightest on: of each, what it may not load. Those that follow may not load less.
MODULES = {
    "sgm": HEAVY | {"torch"},
    "sgm.inference.options": HEAVY | {"torch"},
    "sgm.models.diffusion": HEAVY,
    "sgm.inference.pipeline": UNUSED,
}


def python(code: str) -> str:
    """Run ``code`` with warnings as errors; it must leave stderr empty."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_import_sgm_costs_torch_plus_a_fifth_of_a_second():
    # Catches: an engine, open_clip or Lightning imported at the top of sgm/__init__.py.
    seconds = python(
        "import time, torch; t = time.perf_counter(); import sgm; print(time.perf_counter() - t)"
    )
    assert float(seconds) < 0.2


def test_modules_load_only_what_they_need():
    # Catches: a heavy package at the top of a light module, or something printed on import.
    tell = "print(*{m.partition('.')[0] for m in sys.modules})"
    out = python("\n".join(["import sys", *(f"import {module}; {tell}" for module in MODULES)]))
    loaded = dict(zip(MODULES, map(set, map(str.split, out.splitlines())), strict=True))
    assert {name: loaded[name] & absent for name, absent in MODULES.items()} == {
        name: set() for name in MODULES
    }


def test_public_names_load_on_first_use():
    # Catches: a name in sgm.__all__ that its module does not define.
    import sgm

    assert all(getattr(sgm, name) for name in sgm.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        sgm.no_such_name  # noqa: B018
