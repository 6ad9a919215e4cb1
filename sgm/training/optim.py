"""Optimiser and learning rate from the `training` section of a recipe."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from sgm.training.recipe import require

ADVICE = "lower training.optim.lr and continue from the last saved state"
"""What to do about a loss that is not finite."""

MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2}
"""Bytes that each kind of optimiser keeps for a parameter."""


@dataclass(frozen=True)
class Optim:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with linear warm-up and cosine decay.

    Attributes:
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        final: the learning rate at the end, as a fraction of the peak; 1 for no decay.
        weight_decay: applied to tensors of two and more dimensions, not to biases and norms.
        betas: AdamW's two averaging constants.
        clip: largest norm of the gradient; 0 for no limit.
        ema: decay of the average of the weights.
        kind: ``adamw``; or ``adamw_8bit``, by bitsandbytes, whose moments take a quarter.
    """

    lr: float
    warmup: int = 0
    final: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 0.0
    ema: float = 0.999
    kind: str = "adamw"

    def __post_init__(self) -> None:
        require(
            "training.optim",
            self,
            lr=(0 < self.lr < math.inf, "a number above 0"),
            warmup=(self.warmup >= 0, "0 or more"),
            final=(0 <= self.final <= 1, "0 to 1"),
            weight_decay=(0 <= self.weight_decay < math.inf, "0 or more"),
            betas=(all(0 <= beta < 1 for beta in self.betas), "two numbers, 0 to below 1"),
            clip=(self.clip >= 0, "0 or more"),
            ema=(0 <= self.ema < 1, "0 to below 1"),
            kind=(self.kind in MOMENT_BYTES, " or ".join(MOMENT_BYTES)),
        )

    def check(self) -> None:
        """Make sure that the optimiser can be made.

        Raises:
            ValueError: the package that it comes from is missing.
        """
        if self.kind == "adamw_8bit":
            _bitsandbytes()

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimiser, in its fused form: one pass over the memory.

        Raises:
            ValueError: the package that it comes from is missing.
        """
        params = list(parameters)
        groups = [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        beta1, beta2 = self.betas
        if self.kind == "adamw_8bit":
            return _bitsandbytes().AdamW8bit(groups, lr=self.lr, betas=(beta1, beta2))
        return torch.optim.AdamW(groups, lr=self.lr, betas=(beta1, beta2), fused=True)

    def rate(self, step: int, progress: float) -> float:
        """Return the learning rate of a step.

        Args:
            step: steps that the optimiser has taken.
            progress: how much of the run is done, 0 to 1.
        """
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.lr * warm * (self.final + (1 - self.final) * cosine)

    def clip_(self, parameters: Iterable[nn.Parameter]) -> float:
        """Limit the gradient's norm in place and return the norm it had."""
        return float(nn.utils.clip_grad_norm_(parameters, self.clip or math.inf))


def _bitsandbytes() -> Any:
    """The package's optimisers.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return import_module("bitsandbytes.optim")
    except ModuleNotFoundError as exc:
        raise ValueError(
            "training.optim.kind adamw_8bit needs bitsandbytes: pip install bitsandbytes"
        ) from exc


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate
