"""Every program runs as the documents call it: by its file, from any folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "scripts" / "sampling").glob("*.py")]
PROGRAMS = [*sorted(path for path in FILES if "__main__" in path.read_text()), ROOT / "main.py"]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_help(program: Path, tmp_path: Path):
    # Catches: an import that is found under the tests' own path alone.
    done = subprocess.run(
        [sys.executable, program, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PAGER": "cat"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert program.stem in done.stdout + done.stderr
