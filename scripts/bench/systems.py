"""The systems that are compared, by name."""

from typing import Protocol

import torch

from scripts.bench.inputs import Inputs
from scripts.bench.ours import Ours
from scripts.bench.presets import COMPILED, DIFFUSERS, PROJECT
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
    """A level of ``--optimize``, or diffusers, on an engine that is on the device in this type.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: another name.
    """
    if name in PROJECT:
        return Ours(files, engine, device, dtype, name)
    if name in (DIFFUSERS, COMPILED):
        return Diffusers(files, engine, device, dtype, name == COMPILED)
    raise ValueError(f"systems: expected {', '.join((*PROJECT, DIFFUSERS, COMPILED))}; got {name}")
