"""A whole model: the parts that names of tensors depend on, told from native keys or a folder's."""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeVar

from sgm.convert.diffusers.clip import clip_pairs, foreign_layers, native_layers
from sgm.convert.diffusers.unet import UNetShape, foreign_unet, native_unet, unet_pairs
from sgm.convert.diffusers.vae import (
    POST_QUANT,
    QUANT,
    CoderShape,
    decoder_pairs,
    encoder_pairs,
    foreign_decoder,
    foreign_encoder,
    native_decoder,
    native_encoder,
)
from sgm.convert.pairs import Pair, block

T = TypeVar("T")

UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
# What stands beside the visual tower of an open_clip model.
_TEXT_SIDE = (
    "ln_final.",
    "logit_scale",
    "positional_embedding",
    "text_projection",
    "token_embedding.",
)


@dataclass(frozen=True)
class Architecture:
    """The parts of a model; None where one is not there.

    Attributes:
        unet: the U-Net.
        clip_layers: layers of the image encoder.
        encoder: the encoder of the condition autoencoder.
        decoder: the decoder of the first stage.
        quantised: the first stage has 1x1 convolutions around its latents.
        clip: number of the embedder with the image encoder.
        vae: number of the embedder with the condition autoencoder.
    """

    unet: UNetShape | None
    clip_layers: int | None
    encoder: CoderShape | None
    decoder: CoderShape | None
    quantised: bool
    clip: int
    vae: int

    @property
    def tower(self) -> str:
        """Native prefix of the image encoder."""
        return f"conditioner.embedders.{self.clip}.open_clip.model.visual."

    @property
    def condition(self) -> str:
        """Native prefix of the condition autoencoder."""
        return f"conditioner.embedders.{self.vae}.encoder."

    def pairs(self) -> Iterator[Pair]:
        """Everything that a folder holds, and where it stands natively."""
        if self.unet is not None:
            yield from block(UNET, "unet/", unet_pairs(self.unet))
        if self.clip_layers is not None:
            yield from block(self.tower, "image_encoder/", clip_pairs(self.clip_layers))
        if self.encoder is not None:
            encoder = encoder_pairs(self.encoder)
            yield from block(f"{self.condition}encoder.", "vae/encoder.", encoder)
            yield from block(self.condition, "vae/", QUANT)
        if self.decoder is not None:
            decoder = decoder_pairs(self.decoder)
            yield from block(f"{FIRST_STAGE}decoder.", "vae/decoder.", decoder)
        if self.quantised:
            yield from block(FIRST_STAGE, "vae/", POST_QUANT)

    def second_encoder(self) -> Iterator[Pair]:
        """The first stage's encoder, which sampling does not use and which a folder does not have.

        It is made from the folder's one. SV3D's first stage has none.
        """
        if self.encoder is not None and (self.quantised or self.folds):
            encoder = encoder_pairs(self.encoder)
            yield from block(f"{FIRST_STAGE}encoder.", "vae/encoder.", encoder)
        if self.quantised:
            yield from block(FIRST_STAGE, "vae/", QUANT)

    @property
    def folds(self) -> bool:
        """Whether the first stage's encoder takes ``quant_conv`` into its last convolution."""
        return self.decoder is not None and self.decoder.temporal and not self.quantised

    def absent(self) -> tuple[str, ...]:
        """Prefixes of native keys that a folder with these parts has no values for."""
        parts = {
            UNET: self.unet,
            self.tower: self.clip_layers,
            f"{self.condition}encoder.": self.encoder,
            f"{self.condition}quant_conv.": self.encoder,
            FIRST_STAGE: self.decoder,
        }
        return (
            f"{self.condition}decoder.",
            f"{self.condition}post_quant_conv.",
            *(self.tower.removesuffix("visual.") + name for name in _TEXT_SIDE),
            *(prefix for prefix, part in parts.items() if part is None),
        )


def foreign_architecture(keys: Collection[str], partial: bool) -> Architecture:
    """Read the architecture from a folder's keys; if ``partial``, a part may have none."""
    part = _Keys(keys, partial).part
    decoder = part("vae/decoder.", foreign_decoder)
    quantised = "vae/post_quant_conv.weight" in keys
    # SV3D's first stage is a decoder of single frames and nothing else; it has fewer embedders.
    orbit = decoder is not None and not decoder.temporal and not quantised
    return Architecture(
        unet=part("unet/", foreign_unet),
        clip_layers=part("image_encoder/", foreign_layers),
        encoder=part("vae/encoder.", foreign_encoder),
        decoder=decoder,
        quantised=quantised,
        clip=0,
        vae=1 if orbit else 3,
    )


def native_architecture(keys: Collection[str], partial: bool) -> Architecture:
    """Read the architecture from native keys; if ``partial``, a part may have none."""
    part = _Keys(keys, partial).part
    clip = _embedder(keys, r"open_clip\.model\.visual", 0)
    vae = _embedder(keys, r"encoder\.encoder", 3)
    return Architecture(
        unet=part(UNET, native_unet),
        clip_layers=part(f"conditioner.embedders.{clip}.open_clip.model.visual.", native_layers),
        encoder=part(f"conditioner.embedders.{vae}.encoder.encoder.", native_encoder),
        decoder=part(f"{FIRST_STAGE}decoder.", native_decoder),
        quantised=f"{FIRST_STAGE}post_quant_conv.weight" in keys,
        clip=clip,
        vae=vae,
    )


@dataclass(frozen=True)
class _Keys:
    keys: Collection[str]
    partial: bool

    def part(self, prefix: str, describe: Callable[[Collection[str]], T]) -> T | None:
        """Read a part from the keys below ``prefix``; None where it may be missing and is."""
        below = {key.removeprefix(prefix) for key in self.keys if key.startswith(prefix)}
        return describe(below) if below or not self.partial else None


def _embedder(keys: Collection[str], holder: str, usual: int) -> int:
    """Number of the embedder that has such a part."""
    pattern = re.compile(rf"conditioner\.embedders\.(\d+)\.{holder}\.")
    found = next(filter(None, map(pattern.match, keys)), None)
    return int(found[1]) if found else usual
