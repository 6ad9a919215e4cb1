"""The layout of a diffusers folder: parts ``unet``, ``vae`` and ``image_encoder``.

Keys are written ``unet/<key>``, ``vae/<key>`` and ``image_encoder/<key>``. The folder's one encoder
and its ``quant_conv`` are those of the condition autoencoder, which sampling uses.
"""

import re
from dataclasses import replace

import torch
from torch import Tensor

from sgm.convert.conversion import Conversion, Entry, Shapes
from sgm.convert.diffusers.architecture import (
    FIRST_STAGE,
    foreign_architecture,
    native_architecture,
)
from sgm.convert.diffusers.vae import current_name
from sgm.convert.matching import Matcher

# Native tensors that a folder has no place for.
_DROPPED = re.compile(
    r"first_stage_model\.(encoder|quant_conv)\."  # the condition autoencoder's stand for them
    r"|conditioner\.embedders\.\d+\.encoder\.(decoder|post_quant_conv)\."  # used by nothing
    r"|conditioner\.embedders\.\d+\.open_clip\.model\.(?!visual\.)"  # CLIP's text side
    r"|(model_ema|loss|loss_fn)\."  # of training
    r"|denoiser\.(log_)?sigmas$"  # computed
)
# Tensors of a folder that the native layout has no place for: computed, saved by some versions.
_COMPUTED = re.compile(r"image_encoder/vision_model\.embeddings\.position_ids$")

_LAST = f"{FIRST_STAGE}encoder.conv_out"
_QUANT = ("vae/quant_conv.weight", "vae/quant_conv.bias")
# A tensor that every part has, whatever its size.
_MARKS = {
    "unet/": "time_embedding.linear_1.weight",
    "vae/": "encoder.conv_norm_out.weight",
    "image_encoder/": "vision_model.embeddings.class_embedding",
}


def recognises(shapes: Shapes) -> bool:
    """Whether these are keys of a folder."""
    return any(part + mark in shapes for part, mark in _MARKS.items())


def folder_part(shapes: Shapes) -> str | None:
    """The part (``unet/``, ``vae/`` or ``image_encoder/``) whose bare keys these are, or None.

    The files of a folder, and a file of one part alone such as AnimateLCM's U-Net, name tensors
    without the part: it has to be put in front of their keys.
    """
    return next((part for part, mark in _MARKS.items() if mark in shapes), None)


def to_native(shapes: Shapes, partial: bool) -> Conversion:
    """The native layout from a folder's; see :func:`sgm.convert.plan`."""
    names = {current_name(key): key for key in shapes}
    architecture = foreign_architecture(names, partial)
    matcher = Matcher(shapes, "diffusers", names)
    entries = matcher.to_native((*architecture.pairs(), *architecture.second_encoder()))
    if architecture.folds:
        entries = [_folded(entry) for entry in entries]
    dropped = matcher.finish(_COMPUTED.match)
    return Conversion(tuple(entries), dropped, architecture.absent())


def from_native(shapes: Shapes, partial: bool) -> Conversion:
    """The layout of a folder from the native one; see :func:`sgm.convert.plan`."""
    matcher = Matcher(shapes, "native")
    entries = matcher.from_native(native_architecture(shapes, partial).pairs())
    return Conversion(tuple(entries), matcher.finish(_DROPPED.match))


def _folded(entry: Entry) -> Entry:
    """Make ``quant_conv`` one with the last convolution of the first stage's encoder."""
    if entry.key == f"{_LAST}.weight":
        return replace(entry, sources=(*entry.sources, _QUANT[0]), make=_folded_kernel)
    if entry.key == f"{_LAST}.bias":
        return replace(entry, sources=(*entry.sources, *_QUANT), make=_folded_bias)
    return entry


def _folded_kernel(kernel: Tensor, quant: Tensor) -> Tensor:
    folded = torch.einsum("om,mihw->oihw", quant.double()[..., 0, 0], kernel.double())
    return folded.to(kernel.dtype)


def _folded_bias(bias: Tensor, quant: Tensor, quant_bias: Tensor) -> Tensor:
    return (quant.double()[..., 0, 0] @ bias.double() + quant_bias.double()).to(bias.dtype)
