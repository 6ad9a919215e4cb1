"""Stable Video Diffusion: an image goes in, a short video comes out.

The dotted paths of this package are its interface: published YAML files name them and published
checkpoints name the matching state-dict keys. The names below load on first use, so that
``import sgm`` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "AutoencodingEngine": "sgm.models.autoencoder",
    "DiffusionEngine": "sgm.models.diffusion",
    "SamplingOptions": "sgm.inference.options",
    "VideoPipeline": "sgm.inference.pipeline",
}

__all__ = ["__version__", *_LAZY]  # noqa: PLE0604 - the names of _LAZY are strings


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sgm' has no attribute {name!r}")
