"""Preconditioning of the network: the four coefficients of Karras et al. 2022, equation 7.

``D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)``, where ``F`` is the network and ``D`` the
denoised estimate. A scaling maps noise levels of any shape to ``(c_skip, c_out, c_in, c_noise)``
of that shape.
"""

from typing import Protocol

from torch import Tensor, ones_like

Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]


class DenoiserScaling(Protocol):
    """What a scaling looks like to a denoiser."""

    def __call__(self, sigma: Tensor) -> Coefficients:
        """Return ``(c_skip, c_out, c_in, c_noise)``, each of the shape of ``sigma``."""
        ...


class EDMScaling:
    """Unit variance in and out of the network (Karras et al. 2022, table 1).

    Args:
        sigma_data: standard deviation of the data.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def __call__(self, sigma: Tensor) -> Coefficients:
        """Return the coefficients; ``c_noise = ln(sigma) / 4``."""
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        return c_skip, c_out, variance.rsqrt(), sigma.log() / 4


class EpsScaling:
    """The network predicts the noise: ``D = x - sigma F`` (DDPM, Ho et al. 2020)."""

    def __call__(self, sigma: Tensor) -> Coefficients:
        """Return the coefficients; ``c_noise = sigma``, which a discrete denoiser quantizes."""
        return ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt(), sigma


class VScaling:
    """The network predicts the velocity ``v`` (Salimans and Ho 2022), for data of unit variance."""

    def __call__(self, sigma: Tensor) -> Coefficients:
        """Return the coefficients; ``c_noise = sigma``, which a discrete denoiser quantizes."""
        variance = sigma**2 + 1
        return 1 / variance, -sigma * variance.rsqrt(), variance.rsqrt(), sigma


class VScalingWithEDMcNoise(VScaling):
    """Velocity prediction with the noise input of EDM: the scaling of Stable Video Diffusion."""

    def __call__(self, sigma: Tensor) -> Coefficients:
        """Return the coefficients of ``VScaling``, with ``c_noise = ln(sigma) / 4``."""
        c_skip, c_out, c_in, _ = super().__call__(sigma)
        return c_skip, c_out, c_in, sigma.log() / 4
