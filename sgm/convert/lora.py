"""Names of a U-Net's layers in files of low-rank updates (LoRA).

Such a file names the layers that it changes, and there are several ways to write a layer's name.
diffusers and peft write ``unet.down_blocks.0...to_q``, or the same without ``unet.``; kohya's
scripts put ``_`` for every dot, ``lora_unet_down_blocks_0...to_q``; both occur with native names
as well.
"""

from collections.abc import Collection, Iterator

from sgm.convert.diffusers.architecture import UNET
from sgm.convert.diffusers.unet import native_unet, unet_pairs

_WEIGHT = ".weight"
# Longer ones first: a name may begin with several.
_PREFIXES = (
    "base_model.model.unet.",
    "base_model.model.",
    UNET,
    "diffusion_model.",
    "lora_unet_",
    "unet.",
)


def diffusers_names(keys: Collection[str]) -> dict[str, str]:
    """The diffusers names of a U-Net's layers by the native keys of their weights.

    Args:
        keys: native keys of a model.
    """
    return {UNET + native + _WEIGHT: foreign for native, foreign in _layers(keys)}


class LayerNames:
    """Finds layers by any of the names that files give them.

    Args:
        keys: native keys of the model that a file is for.
    """

    def __init__(self, keys: Collection[str]) -> None:
        self._weights: dict[str, str] = {}
        for native, foreign in _layers(keys):
            for name in (native, foreign):
                self._weights[name] = self._weights[name.replace(".", "_")] = (
                    UNET + native + _WEIGHT
                )

    def weight(self, name: str) -> str | None:
        """The native key of a layer's weight; None where the model has no such layer."""
        prefix = next(filter(name.startswith, _PREFIXES), "")
        return self._weights.get(name.removeprefix(prefix))


def _layers(keys: Collection[str]) -> Iterator[tuple[str, str]]:
    """Native and diffusers name of every layer of the U-Net that has a weight."""
    below = {key.removeprefix(UNET) for key in keys if key.startswith(UNET)}
    for pair in unet_pairs(native_unet(below)):
        if pair.native in below and pair.native.endswith(_WEIGHT):
            (foreign,) = pair.foreign
            yield pair.native.removesuffix(_WEIGHT), foreign.removesuffix(_WEIGHT)
