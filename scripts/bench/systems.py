"""The systems that are compared, by name."""

from typing import Protocol

import torch

from scripts.bench.inputs import Inputs
from scripts.bench.ours import Ours
from scripts.bench.presets import COMPILED, DIFFUSERS, SYSTEMS
from scripts.bench.theirs import Diffusers
from scripts.bench.timing import Calls
from sgm.inference.settings import ModelFiles
from sgm.models.diffusion import DiffusionEngine


class System(Protocol):
    """Something that makes videos."""

    def calls(self, given: Inputs) -> Calls:
        """What to call for each stage; a stage may be missing."""


def make_system(
    name: str, files: ModelFiles, engine: DiffusionEngine, device: torch.device, dtype: torch.dtype
) -> System:
    """One of :data:`~scripts.bench.presets.SYSTEMS`, on an engine of this device and type.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: another name.
    """
    level, compiled = name.removesuffix(" compiled"), name in COMPILED
    if name not in SYSTEMS:
        raise ValueError(f"systems: expected {', '.join(SYSTEMS)}; got {name}")
    if level == DIFFUSERS:
        return Diffusers(files, engine, device, dtype, compiled)
    return Ours(files, engine, device, dtype, level, compiled)
