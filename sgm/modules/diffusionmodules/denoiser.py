"""Denoisers: a network becomes an estimate of the clean data (Karras et al. 2022, equation 7)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sgm.modules.diffusionmodules.denoiser_scaling import DenoiserScaling
from sgm.modules.diffusionmodules.discretizer import Discretization
from sgm.util import append_dims, instantiate_from_config


class Denoiser(nn.Module):
    """Wraps a network in the coefficients of a scaling.

    Args:
        scaling_config: config of a class of ``denoiser_scaling``.
    """

    def __init__(self, scaling_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.scaling: DenoiserScaling = instantiate_from_config(scaling_config)

    def forward(
        self,
        network: Callable[..., Tensor],
        input: Tensor,
        sigma: Tensor,
        cond: Mapping[str, Any],
        **additional_model_inputs: Any,
    ) -> Tensor:
        """Estimate the clean data, in the shape and the type of ``input``.

        The coefficients are computed and applied in float32 or better, whatever the types of the
        input and of the network's output.

        Args:
            network: called as ``network(x, c_noise, cond, **additional_model_inputs)``, with ``x``
                like ``input`` and ``c_noise`` of shape ``(n,)``.
            input: noisy data, ``(n, ...)``.
            sigma: noise level of each row, ``(n,)``, positive.
            cond: conditioning, handed on to the network.
            additional_model_inputs: handed on to the network.
        """
        sigma = self.quantize_sigma(sigma.to(torch.promote_types(sigma.dtype, torch.float32)))
        c_skip, c_out, c_in, c_noise = self.scaling(append_dims(sigma, input.ndim))
        c_noise = self.quantize_c_noise(c_noise.reshape(sigma.shape))
        x = (input * c_in).to(input.dtype)
        out = network(x, c_noise, cond, **additional_model_inputs)
        return (out * c_out + input * c_skip).to(input.dtype)

    def quantize_sigma(self, sigma: Tensor) -> Tensor:
        """Return the noise level to use for ``sigma``: here, itself."""
        return sigma

    def quantize_c_noise(self, c_noise: Tensor) -> Tensor:
        """Return the noise input of the network for ``c_noise``: here, itself."""
        return c_noise


class DiscreteDenoiser(Denoiser):
    """A denoiser for networks trained on a fixed list of noise levels, named by their index.

    Args:
        scaling_config: config of a class of ``denoiser_scaling``.
        num_idx: number of levels.
        discretization_config: config of the schedule that gives the levels.
        do_append_zero: add the level zero to the list.
        quantize_c_noise: give the network the index of the level (int64) instead of ``c_noise``.
        flip: list the levels in rising order.
    """

    sigmas: Tensor

    def __init__(
        self,
        scaling_config: Mapping[str, Any],
        num_idx: int,
        discretization_config: Mapping[str, Any],
        do_append_zero: bool = False,
        quantize_c_noise: bool = True,
        flip: bool = True,
    ) -> None:
        super().__init__(scaling_config)
        schedule: Discretization = instantiate_from_config(discretization_config)
        sigmas = schedule(num_idx, do_append_zero=do_append_zero, flip=flip)
        self.register_buffer("sigmas", sigmas)
        self.gives_index = quantize_c_noise

    def sigma_to_idx(self, sigma: Tensor) -> Tensor:
        """Return the index of the level nearest to each of ``sigma``, in its shape."""
        return (sigma[..., None] - self.sigmas).abs().argmin(-1)

    def idx_to_sigma(self, idx: Tensor) -> Tensor:
        """Return the level of each index."""
        return self.sigmas[idx]

    def quantize_sigma(self, sigma: Tensor) -> Tensor:
        """Return the nearest level of the list."""
        return self.idx_to_sigma(self.sigma_to_idx(sigma))

    def quantize_c_noise(self, c_noise: Tensor) -> Tensor:
        """Return the index of the level nearest to ``c_noise``, if the network was trained so."""
        return self.sigma_to_idx(c_noise) if self.gives_index else c_noise
