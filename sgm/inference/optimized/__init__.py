"""Networks made ready for sampling: the plain ones' numbers from less work.

They are made of the loaded networks, whose weights and keys stay as they are; training and saving
see those alone. docs/performance.md lists what is left out and why that is exact.
"""

from sgm.inference.optimized.decoder import OptimizedDecoder
from sgm.inference.optimized.layers import Place
from sgm.inference.optimized.network import OptimizedNetwork

__all__ = ["OptimizedDecoder", "OptimizedNetwork", "Place"]
