"""Low-rank adapters on the layers of a network (LoRA, arXiv 2106.09685).

A layer with weight W gets two factors beside it and computes with ``W + alpha / r * up down``, by a
branch of its own that costs little: W is neither changed nor given a gradient. Because ``up``
starts as zero, so does the update. The names of all that was there stay; the factors are the
layer's parameters ``lora_down`` and ``lora_up``, its buffer ``lora_alpha`` is alpha.

Letters: r rank, c channels, k kernel.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.checkpoint.lora import Update
from sgm.modules.diffusionmodules.layers import TemporalConv3d

DOWN, UP, ALPHA = "lora_down", "lora_up", "lora_alpha"


class Adapted(nn.Module):
    """What a layer with an adapter does beside its own computation."""

    lora_down: nn.Parameter
    lora_up: nn.Parameter
    lora_alpha: Tensor
    weight: Tensor
    lora_merged = False

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result and its update's."""
        out = super().forward(x)
        if self.lora_merged:
            return out
        # As types: float32 factors beside a layer in half precision.
        branch = self._branch(x, self.lora_down.to(x.dtype), self.lora_up.to(x.dtype))
        return out + branch * (self.lora_alpha / len(self.lora_down)).to(branch.dtype)

    def _branch(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        raise NotImplementedError

    def lora_update(self) -> Update:
        """The update, as files have it."""
        return Update(self.lora_down.detach(), self.lora_up.detach(), float(self.lora_alpha))


class LoraLinear(Adapted, nn.Linear):
    """A linear layer with factors (r, c_in) and (c_out, r)."""

    def _branch(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(F.linear(x, down), up)


class LoraConv2d(Adapted, nn.Conv2d):
    """A convolution with factors (r, c_in, k, k) and (c_out, r, 1, 1)."""

    def _branch(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.conv2d(self._conv_forward(x, down, None), up)


class LoraTemporalConv3d(Adapted, TemporalConv3d):
    """A convolution over frames with factors (r, c_in, k, 1, 1) and (c_out, r, 1, 1, 1)."""

    def _branch(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.conv3d(self._conv_forward(x, down, None), up)


_KINDS: dict[type[nn.Module], type[Adapted]] = {
    nn.Linear: LoraLinear,
    nn.Conv2d: LoraConv2d,
    TemporalConv3d: LoraTemporalConv3d,
}


def add_lora(
    network: nn.Module,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Give layers adapters; the layers stay the objects that they are.

    Args:
        network: what the layers' names begin at.
        targets: patterns of names as in a shell, whose ``*`` also stands for dots:
            ``*.time_stack.*.attn1.to_*``. Of what they match, linear layers and convolutions count.
        rank: r, at least 1; no more than a layer's channels is of use.
        alpha: the update's weight, as a multiple of 1 / r.
        generator: source of the first factor's draws, uniform and of variance 1 / (3 c_in k k).

    Returns:
        The names of the layers.

    Raises:
        ValueError: a rank below 1, or a pattern that matches no layer.
    """
    if rank < 1:
        raise ValueError(f"expected a rank of 1 or more, got {rank}")
    layers = {name: layer for name, layer in network.named_modules() if type(layer) in _KINDS}
    lost = [p for p in targets if not any(fnmatchcase(name, p) for name in layers)]
    if lost or not targets:
        raise ValueError(f"targets: no linear layer or convolution is named {', '.join(lost)}")
    chosen = [name for name in layers if any(fnmatchcase(name, p) for p in targets)]
    for name in chosen:
        _adapt(layers[name], rank, alpha, generator)
    return chosen


def _adapt(layer: Any, rank: int, alpha: float, generator: torch.Generator | None) -> None:
    """Make a layer the kind with an adapter, in place: hooks and those that hold it notice not."""
    c_out, *inputs = layer.weight.shape
    layer.__class__ = _KINDS[type(layer)]
    down = torch.rand(rank, *inputs, generator=generator) * 2 - 1
    up = torch.zeros(c_out, rank, *(1 for _ in inputs[1:]))
    device = layer.weight.device
    layer.lora_down = nn.Parameter((down / layer.weight[0].numel() ** 0.5).to(device))
    layer.lora_up = nn.Parameter(up.to(device))
    layer.register_buffer(ALPHA, torch.tensor(float(alpha), device=device))


def adapted_layers(network: nn.Module) -> dict[str, Adapted]:
    """All layers with adapters, by name."""
    return {name: each for name, each in network.named_modules() if isinstance(each, Adapted)}


@contextmanager
def merged(network: nn.Module) -> Iterator[None]:
    """Have the updates in the weights for the length of a ``with`` block.

    For what reads weights instead of calling layers, such as the optimised networks of sampling.
    """
    layers = adapted_layers(network).values()
    kept = [layer.weight.data for layer in layers]
    try:
        for layer in layers:
            update = layer.lora_update().delta()
            layer.weight.data = (layer.weight.data + update).to(layer.weight.dtype)
            layer.lora_merged = True
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight.data = weight
            layer.lora_merged = False


def split_updates(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Update]]:
    """Part a state dict into that of the network without adapters, and the updates.

    Args:
        state: of a network, with or without adapters.

    Returns:
        The rest; updates by the keys of the weights that they are for.
    """
    layers = [key.removesuffix(f".{DOWN}") for key in state if key.endswith(f".{DOWN}")]
    updates = {
        f"{layer}.weight": Update(
            state[f"{layer}.{DOWN}"], state[f"{layer}.{UP}"], float(state[f"{layer}.{ALPHA}"])
        )
        for layer in layers
    }
    factors = {f"{layer}.{part}" for layer in layers for part in (DOWN, UP, ALPHA)}
    return {key: value for key, value in state.items() if key not in factors}, updates
