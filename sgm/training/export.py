"""One checkpoint from the state of a run, whatever the strategy that wrote it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgm.checkpoint.source import InMemory
from sgm.checkpoint.writing import Progress, Written, write_file
from sgm.modules.lora import split_updates
from sgm.training import snapshot
from sgm.training.lora import has_adapters, write_adapters

STATES = ("last.ckpt", "state.pt")
"""The state in the folder of a run: of Lightning, of the plain runner."""


def find_state(path: Path) -> Path:
    """Return the state that a run's folder holds, or the file itself.

    Raises:
        ValueError: there is none.
    """
    for found in (path, *(path / name for name in STATES)):
        if found.is_file():
            return found
    raise ValueError(f"{path}: expected a run's folder with {' or '.join(STATES)}, or such a file")


def weights_of(state: Mapping[str, Any], ema: bool = True) -> dict[str, Tensor]:
    """Return the weights of what a run trains, by the names in its engine, adapters among them.

    Args:
        state: of either runner.
        ema: take the averages of what is trained.

    Raises:
        ValueError: it is no such state.
    """
    model = state.get("model") or {
        name.removeprefix("engine."): value
        for name, value in state.get("state_dict", {}).items()
        if name.startswith("engine.")
    }
    averages = {name: x for name, x in state.get("ema", {}).items() if name != "updates"}
    if not model or not averages.keys() <= model.keys():
        raise ValueError("expected the state of a training run, with a model and its averages")
    return {**model, **averages} if ema else dict(model)


def with_adapters_merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a network without adapters that computes the same."""
    plain, updates = split_updates(weights)
    for key, update in updates.items():
        plain[key] = (plain[key] + update.delta().to(plain[key].device)).to(plain[key].dtype)
    return plain


def averages_of(path: Path, ema: bool = True) -> tuple[Path, dict[str, Tensor]]:
    """Return the state that a run has, and the weights in it, not read yet; see `weights_of`.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    found = find_state(path)
    try:
        return found, weights_of(snapshot.load(found, mapped=True), ema)
    except ValueError as exc:
        raise ValueError(str(exc) if str(path) in str(exc) else f"{found}: {exc}") from exc


def export(
    path: Path,
    target: Path,
    ema: bool = True,
    dtype: torch.dtype | None = None,
    force: bool = False,
    notes: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> tuple[Written, ...]:
    """Write a run's weights as one safetensors file, and verify it.

    Of a run that trained adapters (LoRA), the file holds these alone.

    Args:
        path: the run's folder or state.
        target: the file.
        ema: take the averages of what is trained.
        dtype: of the file; None keeps that of the weights.
        force: replace a file that is there.
        notes: metadata.
        progress: called after each tensor.

    Raises:
        ValueError: there is no state, it is damaged, or the file cannot be written.
    """
    found, weights = averages_of(path, ema)
    if has_adapters(weights):
        return write_adapters(weights, target, dtype, force)
    source = InMemory(found, weights, {"averaged": str(ema).lower(), **(notes or {})})
    return write_file(source, target, dtype, force, progress)
