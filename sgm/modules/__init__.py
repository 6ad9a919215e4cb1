"""Networks, embedders and the diffusion mathematics.

``sgm.modules.GeneralConditioner``, the name in published YAML files, loads on first use.
"""

from typing import Any

__all__ = ["GeneralConditioner"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from sgm.modules.encoders.conditioner import GeneralConditioner

        return GeneralConditioner
    raise AttributeError(f"module 'sgm.modules' has no attribute {name!r}")
