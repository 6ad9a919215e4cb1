"""Samplers: noise becomes data in a few steps, each of them a rule walked by one common loop.

All rules integrate ``dx/dsigma = (x - D(x; sigma)) / sigma``, where ``D`` is the denoised estimate
(Karras et al. 2022, equations 1 and 3); ancestral rules go lower than asked and add fresh noise.
Noise levels are numbers on the host, so that no step waits for an accelerator.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgm.modules.diffusionmodules.discretizer import Discretization
from sgm.modules.diffusionmodules.guiders import Cond, Guider
from sgm.util import default, instantiate_from_config

logger = logging.getLogger(__name__)

Denoise = Callable[[Tensor, float], Tensor]
Step = tuple[Tensor, Tensor]
StepCallback = Callable[[int, int, float, Tensor], bool | None]

IDENTITY_GUIDER = {"target": "sgm.modules.diffusionmodules.guiders.IdentityGuider"}


def euler(x: Tensor, sigma: float, after: float, denoise: Denoise) -> Step:
    """One Euler step from ``sigma`` to ``after``: the denoised estimate is held constant.

    Returns:
        The data at ``after``, and the denoised estimate at ``sigma``.
    """
    denoised = denoise(x, sigma)
    return x + (after - sigma) * ((x - denoised) / sigma), denoised


def heun(x: Tensor, sigma: float, after: float, denoise: Denoise) -> Step:
    """One step of Heun's second-order method (Karras et al. 2022, algorithm 1); Euler's to zero."""
    guess, denoised = euler(x, sigma, after, denoise)
    if after == 0:
        return guess, denoised
    slope = (x - denoised) / sigma
    slope_after = (guess - denoise(guess, after)) / after
    return x + (after - sigma) / 2 * (slope + slope_after), denoised


def dpmpp_2s(x: Tensor, sigma: float, after: float, denoise: Denoise) -> Step:
    """One step of DPM-Solver++(2S) (Lu et al. 2022, algorithm 1); Euler's to zero.

    The estimate at the middle, in the logarithm of the noise level, is used for the whole step.
    """
    if after == 0:
        return euler(x, sigma, after, denoise)
    middle = math.sqrt(sigma * after)
    x_middle, denoised = euler(x, sigma, middle, denoise)
    return torch.lerp(denoise(x_middle, middle), x, after / sigma), denoised


def ancestral_levels(sigma: float, after: float, eta: float) -> tuple[float, float]:
    """Split a step into a deterministic and a random part (DDPM at ``eta = 1``, Song et al. 2020).

    Returns:
        ``(down, up)`` with ``down^2 + up^2 = after^2``: the level to integrate to, and the
        standard deviation of the noise to add there.
    """
    up = min(after, eta * math.sqrt(after**2 * (1 - (after / sigma) ** 2)))
    return math.sqrt(after**2 - up**2), up


def multistep_weights(levels: list[float], after: float) -> list[float]:
    """Weights of the last slopes in a linear multistep (Adams-Bashforth) step.

    Weight ``j`` is the integral, from ``levels[-1]`` to ``after``, of the polynomial that is 1 at
    ``levels[j]`` and 0 at the others.
    """
    start = levels[-1]
    width = after - start
    weights = []
    for j, level in enumerate(levels):
        poly = [1.0]  # coefficients of rising powers of (sigma - start)
        for other in levels[:j] + levels[j + 1 :]:
            shifted, scaled = [0.0, *poly], [(other - start) * c for c in poly] + [0.0]
            poly = [(a - b) / (level - other) for a, b in zip(shifted, scaled, strict=True)]
        weights.append(sum(c * width ** (k + 1) / (k + 1) for k, c in enumerate(poly)))
    return weights


@dataclass(frozen=True)
class Run:
    """What a step rule can use of the run that it is part of.

    Attributes:
        sigmas: the noise levels, one more than there are steps, the last one zero.
        denoise: the guided estimate of the clean data, from ``(x, sigma)``.
        noise: standard normal noise shaped like its argument.
        past: what a multistep rule keeps of its last steps, newest last.
    """

    sigmas: list[float]
    denoise: Denoise
    noise: Callable[[Tensor], Tensor]
    past: deque[Tensor]


class BaseDiffusionSampler(ABC):
    """The loop that all samplers share.

    Args:
        discretization_config: config of the noise schedule.
        num_steps: number of steps; None leaves it to the call.
        guider_config: config of the guider; None is no guidance.
        verbose: log every step.
        device: accepted from published files; a sampler works on the device of its input.

    Attributes:
        memory: how many tensors ``Run.past`` holds.
    """

    memory = 0

    def __init__(
        self,
        discretization_config: Mapping[str, Any],
        num_steps: int | None = None,
        guider_config: Mapping[str, Any] | None = None,
        verbose: bool = False,
        device: str | None = None,
    ) -> None:
        self.discretization: Discretization = instantiate_from_config(discretization_config)
        self.num_steps = num_steps
        self.guider: Guider = instantiate_from_config(default(guider_config, IDENTITY_GUIDER))
        self.verbose = verbose

    def __call__(
        self,
        denoiser: Callable[[Tensor, Tensor, dict[str, Any]], Tensor],
        x: Tensor,
        cond: Cond,
        uc: Cond | None = None,
        num_steps: int | None = None,
        *,
        num_frames: int | None = None,
        noise_fn: Callable[[Tensor], Tensor] = torch.randn_like,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Turn noise into data.

        Args:
            denoiser: called as ``denoiser(x, sigma, cond)`` with the rows that the guider makes;
                ``sigma`` is a tensor ``(rows,)`` of float32 or better.
            x: standard normal noise, ``(b t, ...)``; left as it is.
            cond: conditioning.
            uc: unconditional conditioning; needed for guidance.
            num_steps: overrides the number of the constructor.
            num_frames: frames of a clip, ``t``; overrides the guider's own number.
            noise_fn: draws the fresh noise of stochastic samplers: standard normal, in the shape,
                type and device of its argument.
            callback: called after each step as ``callback(step, num_steps, sigma, denoised)``:
                the number of steps done, the number of all steps, the noise level that the step
                started from and the clean data as estimated there, ``(b t, ...)``. Returning
                False (not None) ends the run.

        Returns:
            The data, in the shape, type and device of ``x``; still noisy if the run was ended.

        Raises:
            ValueError: the number of steps is not known or impossible, or guidance lacks ``uc``.
        """
        steps = default(num_steps, self.num_steps)
        if steps is None:
            raise ValueError("expected num_steps in the sampler's config or in its call, got none")
        sigmas = self.noise_levels(steps)
        denoise = self._guided(denoiser, cond, uc, num_frames)
        run = Run(sigmas, denoise, noise_fn, deque(maxlen=self.memory))
        x = x * math.sqrt(1 + sigmas[0] ** 2)
        for i, sigma in enumerate(sigmas[:-1]):
            if self.verbose:
                logger.info("%s: step %d/%d, sigma %.4g", type(self).__name__, i + 1, steps, sigma)
            x, denoised = self.step(x, i, run)
            if callback is not None and callback(i + 1, steps, sigma, denoised) is False:
                break
        return x

    def noise_levels(self, steps: int) -> list[float]:
        """The levels of a run: ``steps`` falling ones, then zero.

        Raises:
            ValueError: an impossible number of steps.
        """
        levels: list[float] = self.discretization(steps).tolist()
        return levels

    @abstractmethod
    def step(self, x: Tensor, i: int, run: Run) -> Step:
        """Go from level ``i`` of ``run.sigmas`` to the next.

        Returns:
            The data at the next level, and the denoised estimate that the step began with.
        """

    def _guided(
        self,
        denoiser: Callable[[Tensor, Tensor, dict[str, Any]], Tensor],
        cond: Cond,
        uc: Cond | None,
        num_frames: int | None,
    ) -> Denoise:
        """Bind the guider to the denoiser; the conditioning is merged once, for all steps."""
        merged, alone = self.guider.prepare_cond(cond, uc), dict(cond)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            dtype = torch.promote_types(x.dtype, torch.float32)
            level = torch.full(x.shape[:1], sigma, dtype=dtype, device=x.device)
            if not self.guider.guides(sigma):
                return denoiser(x, level, alone)
            rows, levels = self.guider.prepare_rows(x, level)
            return self.guider(denoiser(rows, levels, merged), level, num_frames)

        return denoise


class EDMSampler(BaseDiffusionSampler):
    """Deterministic steps with an optional churn of noise (Karras et al. 2022, algorithm 2).

    Args:
        s_churn: how much noise all steps together add; 0 is none.
        s_tmin: the lowest noise level with churn.
        s_tmax: the highest noise level with churn.
        s_noise: standard deviation of the added noise.
        kwargs: see ``BaseDiffusionSampler``.
    """

    solve: Callable[[Tensor, float, float, Denoise], Step]

    def __init__(
        self,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.s_churn, self.s_tmin, self.s_tmax = s_churn, s_tmin, float(s_tmax)
        self.s_noise = s_noise

    def step(self, x: Tensor, i: int, run: Run) -> Step:
        """Raise the noise level by churn, then solve down to the next one."""
        sigma, after = run.sigmas[i], run.sigmas[i + 1]
        if self.s_churn > 0 and self.s_tmin <= sigma <= self.s_tmax:
            gamma = min(self.s_churn / (len(run.sigmas) - 1), math.sqrt(2) - 1)
            raised = sigma * (1 + gamma)
            x = x + run.noise(x) * (self.s_noise * math.sqrt(raised**2 - sigma**2))
            sigma = raised
        return self.solve(x, sigma, after, run.denoise)


class EulerEDMSampler(EDMSampler):
    """Euler's method: one evaluation a step, first order. The sampler of SVD."""

    solve = staticmethod(euler)


class HeunEDMSampler(EDMSampler):
    """Heun's method: two evaluations a step, second order."""

    solve = staticmethod(heun)


class AncestralSampler(BaseDiffusionSampler):
    """Steps that go below the next level and return to it by fresh noise.

    Args:
        eta: 0 is deterministic, 1 adds as much noise as DDPM.
        s_noise: standard deviation of the added noise.
        kwargs: see ``BaseDiffusionSampler``.
    """

    solve: Callable[[Tensor, float, float, Denoise], Step]

    def __init__(self, eta: float = 1.0, s_noise: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.eta, self.s_noise = eta, s_noise

    def step(self, x: Tensor, i: int, run: Run) -> Step:
        """Solve to below the next level, then add noise."""
        down, up = ancestral_levels(run.sigmas[i], run.sigmas[i + 1], self.eta)
        x, denoised = self.solve(x, run.sigmas[i], down, run.denoise)
        return (x + run.noise(x) * (self.s_noise * up) if up > 0 else x), denoised


class EulerAncestralSampler(AncestralSampler):
    """Ancestral sampling with Euler's method."""

    solve = staticmethod(euler)


class DPMPP2SAncestralSampler(AncestralSampler):
    """Ancestral sampling with DPM-Solver++(2S)."""

    solve = staticmethod(dpmpp_2s)


class DPMPP2MSampler(BaseDiffusionSampler):
    """DPM-Solver++(2M): second order from one evaluation a step (Lu et al. 2022, algorithm 2)."""

    memory = 1

    def step(self, x: Tensor, i: int, run: Run) -> Step:
        """Extrapolate the last two estimates, in the logarithm of the noise level."""
        sigma, after = run.sigmas[i], run.sigmas[i + 1]
        denoised = estimate = run.denoise(x, sigma)
        if run.past and after > 0:
            ratio = math.log(run.sigmas[i - 1] / sigma) / math.log(sigma / after)
            estimate = torch.lerp(run.past[-1], denoised, 1 + 1 / (2 * ratio))
        run.past.append(denoised)
        return torch.lerp(estimate, x, after / sigma), denoised


class LinearMultistepSampler(BaseDiffusionSampler):
    """Linear multistep method: the last ``order`` slopes, extrapolated by a polynomial.

    Args:
        order: number of slopes, at least 1.
        kwargs: see ``BaseDiffusionSampler``.
    """

    def __init__(self, order: int = 4, **kwargs: Any) -> None:
        if order < 1:
            raise ValueError(f"expected an order of at least 1, got {order}")
        super().__init__(**kwargs)
        self.memory = order

    def step(self, x: Tensor, i: int, run: Run) -> Step:
        """Integrate the polynomial through the last slopes."""
        sigma, after = run.sigmas[i], run.sigmas[i + 1]
        denoised = run.denoise(x, sigma)
        run.past.append((x - denoised) / sigma)
        weights = multistep_weights(run.sigmas[i + 1 - len(run.past) : i + 1], after)
        for weight, slope in zip(weights, run.past, strict=True):
            x = x + weight * slope
        return x, denoised


class LCMSampler(BaseDiffusionSampler):
    """Multistep sampling of a consistency model (Song et al. 2023, algorithm 1), in a few steps.

    A consistency model's estimate is the end of the path that starts at ``x``, so each step goes
    all the way to clean data and then back up to the next level by fresh noise. As AnimateLCM-SVD
    does (Wang et al. 2024), the added noise has the standard deviation ``tau`` where the algorithm
    has ``sqrt(tau^2 - epsilon^2)``, ``epsilon`` being the lowest level: 0.1 % more for the last of
    8 steps, nothing for the others.

    Args:
        train_steps: length of the schedule that the model was distilled on. A run of ``n`` steps
            takes every ``train_steps // n``-th level of it from the highest on, so that a few steps
            never spend one on the lowest level, where nothing is left to do.
        kwargs: see ``BaseDiffusionSampler``; ``discretization_config`` gives the whole schedule.
    """

    def __init__(self, train_steps: int = 40, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.train_steps = train_steps

    def noise_levels(self, steps: int) -> list[float]:
        """See ``BaseDiffusionSampler``."""
        if not 1 <= steps <= self.train_steps:
            raise ValueError(f"expected 1 to {self.train_steps} sampling steps, got {steps}")
        stride = self.train_steps // steps
        return [*super().noise_levels(self.train_steps)[: steps * stride : stride], 0.0]

    def step(self, x: Tensor, i: int, run: Run) -> Step:
        """Estimate the clean data, and add noise of the next level."""
        denoised, after = run.denoise(x, run.sigmas[i]), run.sigmas[i + 1]
        return (denoised + after * run.noise(x) if after > 0 else denoised), denoised
