"""Optimiser and learning rate from the `training` section of a recipe."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

ADVICE = "lower training.optim.lr and continue from the last saved state"
"""What to do about a loss that is not finite."""


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
    """

    lr: float
    warmup: int = 0
    final: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 0.0
    ema: float = 0.999

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.warmup < 0 or not 0 <= self.final <= 1 or self.clip < 0:
            raise ValueError(
                f"training.optim: expected lr > 0, warmup >= 0, final in [0, 1] and clip >= 0, "
                f"got {self}"
            )

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        """Make the optimiser, in its fused form: one pass over the memory."""
        params = list(parameters)
        groups = [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        beta1, beta2 = self.betas
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


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate
