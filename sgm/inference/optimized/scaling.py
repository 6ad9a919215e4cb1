"""A decoder whose residual stream is smaller, so that float16 can hold it.

Everything that reads the stream normalises it first, which takes any scale away; so a decoder whose
stream is a power of two smaller computes the same numbers. What writes to the stream is scaled, and
the norms that read it get their epsilon in the new unit. float16 ends at 65504, and decoders of
latent diffusion come close to that or beyond; at 1/32 of it they are far away.
"""

import copy

import torch
from torch import nn

from sgm.modules.diffusionmodules.blocks import ResBlock
from sgm.modules.diffusionmodules.layers import Upsample
from sgm.modules.diffusionmodules.model import AttnBlock, Decoder, ResnetBlock

FLOAT16_SCALE = 1 / 32  # a power of two: it rounds nothing but float16's smallest numbers


@torch.no_grad()
def scale_stream(plain: Decoder, scale: float) -> Decoder:
    """A copy of the decoder, with other weights and the same results.

    Args:
        plain: the decoder, left as it is.
        scale: a power of two that the residual stream is multiplied by.
    """
    scaled = copy.deepcopy(plain)
    for module in scaled.modules():
        match module:
            case ResnetBlock():
                _read(module.norm1, scale)
                _write(module.conv2, scale)
                _pass(module.nin_shortcut, scale)
            case ResBlock():
                _read(module.in_layers[0], scale)
                _write(module.out_layers[3], scale)
            case AttnBlock():
                _read(module.norm, scale)
                _write(module.proj_out, scale)
            case Upsample():
                _pass(module.conv, scale)
    _write(scaled.conv_in, scale)
    _read(scaled.norm_out, scale)
    return scaled


def _read(norm: nn.Module, scale: float) -> None:
    """A norm of the stream: its epsilon is added to a variance."""
    if isinstance(norm, nn.GroupNorm):
        norm.eps *= scale**2


def _write(layer: nn.Module, scale: float) -> None:
    """A layer whose result is added to the stream."""
    for parameter in layer.parameters():
        parameter.mul_(scale)


def _pass(layer: nn.Module, scale: float) -> None:
    """A layer from the stream to the stream: linear but for its bias."""
    bias = getattr(layer, "bias", None)
    if bias is not None:
        bias.mul_(scale)
