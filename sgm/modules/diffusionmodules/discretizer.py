"""Noise schedules: a number of steps becomes the noise levels that a sampler walks down."""

from abc import ABC, abstractmethod

import torch


class Discretization(ABC):
    """A noise schedule: ``n`` falling noise levels, by default followed by zero."""

    def __call__(
        self,
        n: int,
        do_append_zero: bool = True,
        device: str | torch.device = "cpu",
        flip: bool = False,
    ) -> torch.Tensor:
        """Return the noise levels as a float32 tensor of shape ``(n + do_append_zero,)``.

        Args:
            n: number of steps, at least 1.
            do_append_zero: end with the level zero, that of clean data.
            device: where to put the result.
            flip: return the levels in rising order.

        Raises:
            ValueError: ``n`` is below 1, or more than the schedule has levels.
        """
        if n < 1:
            raise ValueError(f"expected at least 1 sampling step, got {n}")
        sigmas = self.get_sigmas(n).to(device, torch.float32)
        if do_append_zero:
            sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        return sigmas.flip(0) if flip else sigmas

    @abstractmethod
    def get_sigmas(self, n: int) -> torch.Tensor:
        """Return the ``n`` positive noise levels, falling, on the CPU."""


class EDMDiscretization(Discretization):
    """Levels evenly spaced in ``sigma ** (1 / rho)`` (Karras et al. 2022, equation 5).

    Args:
        sigma_min: the last level above zero.
        sigma_max: the first level.
        rho: 1 spaces the levels evenly; larger values crowd them near ``sigma_min``.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if not 0 < sigma_min <= sigma_max:
            raise ValueError(
                f"expected 0 < sigma_min <= sigma_max, got sigma_min={sigma_min} and "
                f"sigma_max={sigma_max}"
            )
        if rho == 0:
            raise ValueError("expected rho other than 0: it is a root's degree")
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def get_sigmas(self, n: int) -> torch.Tensor:
        """Return equation 5 for ``i = 0 ... n - 1``, in float32.

        Float32 on purpose: a single Euler step from 700 to 0 cancels so much that its result
        shows the rounding of the first level, and published results have this one.
        """
        ramp = torch.linspace(0, 1, n, dtype=torch.float32, device="cpu")
        first, last = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return (first + ramp * (last - first)) ** self.rho


class LegacyDDPMDiscretization(Discretization):
    """Levels of the discrete diffusion that Stable Diffusion was trained with.

    Its betas are evenly spaced in their square root (Rombach et al. 2022, appendix) and
    ``sigma ** 2 = (1 - a) / a``, where ``a`` is the running product of ``1 - beta``.

    Args:
        linear_start: the first beta.
        linear_end: the last beta.
        num_timesteps: number of training levels; a schedule of ``n`` steps takes ``n`` of them.
    """

    def __init__(
        self,
        linear_start: float = 0.00085,
        linear_end: float = 0.0120,
        num_timesteps: int = 1000,
    ) -> None:
        self.num_timesteps = num_timesteps
        roots = torch.linspace(
            linear_start**0.5, linear_end**0.5, num_timesteps, dtype=torch.float64, device="cpu"
        )
        self.alphas_cumprod = (1 - roots**2).cumprod(0)

    def get_sigmas(self, n: int) -> torch.Tensor:
        """Return the levels of ``n`` evenly spaced training steps, the noisiest one included."""
        if n > self.num_timesteps:
            raise ValueError(
                f"expected at most {self.num_timesteps} steps, the length of the schedule, got {n}"
            )
        last = self.num_timesteps - 1
        steps = range(last, -1, -1) if n > last else [last * k // n for k in range(n, 0, -1)]
        alphas = self.alphas_cumprod[list(steps)]
        return ((1 - alphas) / alphas).sqrt()
