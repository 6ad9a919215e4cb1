"""MindSpore's layout, as its SVD example (mindone, ``examples/svd``) names its parameters.

That model is built like the native one, so most names are equal. The others follow from the classes
of the framework: its norms have ``gamma`` and ``beta``, its embeddings an ``embedding_table``; and
the temporal convolution after the decoder is called ``conv3d`` there. Shapes are the same.
"""

import re

from torch import Tensor

from sgm.convert.conversion import Conversion, Entry, Shapes

# Modules, by the end of their native names, whose tensors have other names.
_NORM = r"norm|norm_in|norm_out|norm[123]|ln_pre|ln_post|ln_[12]|ln_final|(in|out)_layers\.0|out\.0"
_TABLE = (
    # module            native     MindSpore
    (_NORM, "weight", "gamma"),
    (_NORM, "bias", "beta"),
    ("token_embedding", "weight", "embedding_table"),
    ("conv_out", "time_mix_conv.weight", "conv3d.weight"),
    ("conv_out", "time_mix_conv.bias", "conv3d.bias"),
)

# Of training: neither side needs it for sampling.
_NATIVE_DROPPED = re.compile(r"(.*\.)?(model_ema|loss|loss_fn)\.|denoiser\.(log_)?sigmas$")
_DROPPED = re.compile(
    r"(epoch_num|step_num|global_step|learning_rate|scale_sense|beta[12]_power)$"
    r"|(adam_m|adam_v|moment1|moment2|moments)\."
)
_MARK = re.compile(r"(model\.diffusion_model|first_stage_model|conditioner\.embedders)\..*\.gamma$")
_MIXED_PRECISION = "._backbone"  # a wrapper that some versions leave in the names


def recognises(shapes: Shapes) -> bool:
    """Whether these are MindSpore's names."""
    return any(map(_MARK.match, shapes))


def to_native(shapes: Shapes, partial: bool) -> Conversion:  # noqa: ARG001 - names alone decide
    """The native layout from MindSpore's; see :func:`sgm.convert.plan`.

    Tensor by tensor, so that a part is converted like a whole: whether all of a model is there is
    seen when it is loaded.
    """
    dropped = tuple(key for key in shapes if _DROPPED.match(key))
    kept = {native_name(key): key for key in shapes if key not in dropped}
    if len(kept) + len(dropped) < len(shapes):
        raise ValueError("some tensors are there twice, under MindSpore's names and native ones")
    return _renamed(shapes, kept, dropped)


def from_native(shapes: Shapes, partial: bool) -> Conversion:  # noqa: ARG001
    """MindSpore's layout from the native one, likewise."""
    dropped = tuple(key for key in shapes if _NATIVE_DROPPED.match(key))
    kept = {mindspore_name(key): key for key in shapes if key not in dropped}
    return _renamed(shapes, kept, dropped)


def native_name(key: str) -> str:
    """The native name of what MindSpore calls ``key``."""
    key = key.replace(_MIXED_PRECISION, "")
    for module, native, foreign in _TABLE:
        key = re.sub(rf"(?<=\.)({module})\.{re.escape(foreign)}$", rf"\1.{native}", key)
    return key


def mindspore_name(key: str) -> str:
    """MindSpore's name of what is natively called ``key``."""
    for module, native, foreign in _TABLE:
        key = re.sub(rf"(?<=\.)({module})\.{re.escape(native)}$", rf"\1.{foreign}", key)
    return key


def _renamed(shapes: Shapes, names: dict[str, str], dropped: tuple[str, ...]) -> Conversion:
    entries = (Entry(new, tuple(shapes[old]), (old,), _same) for new, old in names.items())
    return Conversion(tuple(entries), dropped)


def _same(tensor: Tensor) -> Tensor:
    return tensor
