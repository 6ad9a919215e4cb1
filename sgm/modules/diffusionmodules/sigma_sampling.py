"""Distributions that training draws its noise levels from."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from sgm.modules.diffusionmodules.discretizer import Discretization
from sgm.modules.draws import draw
from sgm.util import instantiate_from_config


class SigmaSampler(Protocol):
    """What a distribution of noise levels looks like to a loss."""

    def __call__(
        self, n_samples: int, rand: Tensor | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Return ``n_samples`` noise levels, float32, on the device of the randomness.

        Args:
            n_samples: how many levels to draw.
            rand: the random numbers to use, ``(n_samples,)``, instead of drawing them.
            generator: what draws them; by default torch's own, on the CPU.
        """
        ...


class EDMSampling:
    """Log-normal levels: ``ln sigma ~ N(p_mean, p_std ** 2)`` (Karras et al. 2022, table 1).

    Args:
        p_mean: mean of the logarithm. Stable Video Diffusion ends at 1.0.
        p_std: standard deviation of the logarithm, there 1.6.
    """

    def __init__(self, p_mean: float = -1.2, p_std: float = 1.2) -> None:
        self.p_mean, self.p_std = p_mean, p_std

    def __call__(
        self, n_samples: int, rand: Tensor | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Return ``n_samples`` levels; ``rand`` holds standard normal numbers."""
        if rand is None:
            rand = draw(torch.randn, (n_samples,), generator)
        return (self.p_mean + self.p_std * rand).exp()


class DiscreteSampling:
    """Levels drawn uniformly from those of a schedule.

    Args:
        discretization_config: config of the schedule.
        num_idx: number of its levels.
        do_append_zero: count the level zero among them.
        flip: list the levels in rising order.
        idx_range: draw only indices ``first <= i < end`` of the list.
    """

    def __init__(
        self,
        discretization_config: Mapping[str, Any],
        num_idx: int,
        do_append_zero: bool = False,
        flip: bool = True,
        idx_range: tuple[int, int] | None = None,
    ) -> None:
        schedule: Discretization = instantiate_from_config(discretization_config)
        self.sigmas = schedule(num_idx, do_append_zero=do_append_zero, flip=flip)
        self.first, self.end = idx_range or (0, len(self.sigmas))

    def __call__(
        self, n_samples: int, rand: Tensor | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Return ``n_samples`` levels; ``rand`` holds their indices."""
        if rand is None:
            rand = draw(partial(torch.randint, self.first, self.end), (n_samples,), generator)
        return self.sigmas.to(rand.device)[rand]
