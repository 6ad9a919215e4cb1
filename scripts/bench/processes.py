"""Measurements in a process of their own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def last_line(module: str, *arguments: str) -> str:
    """Run a module of this project in a fresh process; returns the last line that it prints.

    Raises:
        RuntimeError: it failed; with the last line of its errors.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(said[-1][:200])
    return done.stdout.splitlines()[-1]
