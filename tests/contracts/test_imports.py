"""Importing is silent, cheap and minimal. Each check runs in a process of its own."""

import subprocess
import sys

import pytest

FRONT_ENDS = {"fire", "streamlit"}
HEAVY = FRONT_ENDS | {"PIL", "av", "cv2", "open_clip", "pytorch_lightning", "torchvision"}


def python(code: str) -> str:
    """Run ``code`` with warnings as errors; it must leave stderr empty."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def loaded_by(module: str) -> set[str]:
    """Top-level packages that importing ``module`` loads; it must print nothing."""
    out = python(f"import sys, {module}; print(*{{m.partition('.')[0] for m in sys.modules}})")
    assert out.count("\n") == 1
    return set(out.split())


def test_import_sgm_costs_torch_plus_a_fifth_of_a_second():
    # Catches: an engine, open_clip or Lightning imported at the top of sgm/__init__.py.
    seconds = python(
        "import time, torch; t = time.perf_counter(); import sgm; print(time.perf_counter() - t)"
    )
    assert float(seconds) < 0.2


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("sgm", HEAVY | {"torch"}),
        ("sgm.models.diffusion", HEAVY),
        ("sgm.inference.options", HEAVY | {"torch"}),
        ("sgm.inference.pipeline", FRONT_ENDS | {"open_clip", "pytorch_lightning"}),
    ],
)
def test_module_loads_only_what_it_needs(module: str, absent: set[str]):
    # Catches: a heavy package at the top of a light module, or something printed on import.
    assert not loaded_by(module) & absent


def test_public_names_load_on_first_use():
    # Catches: a name in sgm.__all__ that its module does not define.
    import sgm

    assert all(getattr(sgm, name) for name in sgm.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        sgm.no_such_name  # noqa: B018
