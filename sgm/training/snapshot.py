"""The state of a run in one file that a kill at any moment leaves whole."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def save_atomically(state: Mapping[str, Any], path: Path) -> None:
    """Write ``state`` under a temporary name, flush it to the disk, and rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read what `save_atomically` wrote, on the CPU; tensors and plain values alone are accepted.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"expected the state of a training run at {path}: run that stage first")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
