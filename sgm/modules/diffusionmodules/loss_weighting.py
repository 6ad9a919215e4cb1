"""Weights of the training loss as functions of the noise level, elementwise."""

from typing import Protocol

from torch import Tensor, ones_like


class DiffusionLossWeighting(Protocol):
    """What a weighting looks like to a loss."""

    def __call__(self, sigma: Tensor) -> Tensor:
        """Return the weight at each noise level, in the shape of ``sigma``."""
        ...


class UnitWeighting:
    """The same weight, 1, at every noise level."""

    def __call__(self, sigma: Tensor) -> Tensor:
        """Return ones."""
        return ones_like(sigma)


class EDMWeighting:
    """The loss of the bare network weighs the same at every level (Karras et al. 2022, table 1).

    Args:
        sigma_data: standard deviation of the data.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def __call__(self, sigma: Tensor) -> Tensor:
        """Return ``(sigma^2 + sigma_data^2) / (sigma sigma_data)^2``."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class VWeighting(EDMWeighting):
    """``EDMWeighting`` for data of unit variance: the unweighted loss of the velocity."""

    def __init__(self) -> None:
        super().__init__(sigma_data=1.0)


class EpsWeighting:
    """The unweighted loss of the predicted noise (Ho et al. 2020)."""

    def __call__(self, sigma: Tensor) -> Tensor:
        """Return ``1 / sigma^2``."""
        return sigma**-2
