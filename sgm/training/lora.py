"""Adapters in training: put on an engine as a recipe says, and written as a LoRA file."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sgm.checkpoint.lora import write_lora
from sgm.checkpoint.writing import Written
from sgm.modules.lora import add_lora, split_updates
from sgm.training.settings import Lora
from sgm.util import default

logger = logging.getLogger(__name__)


def adapt(engine: nn.Module, settings: Lora, seed: int) -> None:
    """Put adapters on an engine.

    Args:
        engine: with its weights.
        settings: which, and where.
        seed: of the factors' draws.

    Raises:
        ValueError: names what is wrong in the section `training.lora`.
    """
    generator = torch.Generator().manual_seed(seed)
    alpha = default(settings.alpha, float(settings.rank))
    try:
        names = add_lora(engine, settings.targets, settings.rank, alpha, generator)
    except ValueError as exc:
        raise ValueError(f"training.lora: {exc}") from exc
    logger.info("adapters of rank %d on %d layers", settings.rank, len(names))


def has_adapters(state: Mapping[str, Tensor]) -> bool:
    """Whether an engine with such a state has adapters."""
    return bool(split_updates(state)[1])


def write_adapters(
    state: Mapping[str, Tensor],
    path: Path,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> tuple[Written, ...]:
    """Write the adapters of an engine's state as a LoRA file.

    Args:
        state: of an engine with adapters.
        path: ends in ``.safetensors``.
        dtype: the type to write; None keeps that of the factors.
        force: replace a file that is there.

    Raises:
        ValueError: it has no adapters, or it cannot be written.
    """
    rest, updates = split_updates(state)
    return write_lora(updates, path, rest, dtype, force)
