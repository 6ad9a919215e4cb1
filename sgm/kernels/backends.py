"""Attention by the quickest of PyTorch's exact backends.

FlashAttention (arXiv 2307.08691), cuDNN's and the memory-efficient one (arXiv 2112.05682) compute
the same; which is the quickest depends on the GPU, the type, the number of tokens and the width of
a head. So each is timed on the first tensors of a kind, and the quickest serves those that follow.
"""

import logging
import warnings
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_LOG = logging.getLogger(__name__)

# In PyTorch's own order, which decides where two are equally quick.
_CANDIDATES = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
_REPEATS = 3
_CLEARLY = 0.95  # of the time: a smaller gain may be chance, and would make runs differ

_Kind = tuple[torch.device, torch.dtype, torch.Size]
_quickest: dict[_Kind, SDPBackend | None] = {}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention (arXiv 1706.03762, equation 1), with the scale ``d ** -0.5``.

    Elsewhere than on CUDA devices, and while a CUDA graph is captured, PyTorch chooses.

    Args:
        q: (n, heads, s, d).
        k: likewise.
        v: likewise.

    Returns:
        (n, heads, s, d).
    """
    backend = None
    if q.is_cuda:
        kind = (q.device, q.dtype, q.shape)
        if kind not in _quickest and not torch.cuda.is_current_stream_capturing():
            _quickest[kind] = quickest(q, k, v)
        backend = _quickest.get(kind)
    return F.scaled_dot_product_attention(q, k, v) if backend is None else _by(backend, q, k, v)


def quickest(q: Tensor, k: Tensor, v: Tensor) -> SDPBackend | None:
    """Time the backends on these tensors; None where they are for none."""
    best, least = None, float("inf")
    for backend in _CANDIDATES:
        try:
            with warnings.catch_warnings(action="ignore"):  # of why it cannot
                seconds = _time(backend, q, k, v)
        except RuntimeError as error:  # it is not for this device, type or shape
            if best is None and isinstance(error, torch.OutOfMemoryError):
                raise
            continue
        if seconds < _CLEARLY * least:
            best, least = backend, seconds
    _LOG.debug("attention of %s %s: %s", tuple(q.shape), q.dtype, best)
    return best


def _time(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> float:
    """The least of a few times in seconds, after a first call that may compile or load."""
    seconds = []
    for _ in range(1 + _REPEATS):
        start = perf_counter()
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(q, k, v)
        if q.is_cuda:
            torch.cuda.synchronize(q.device)
        seconds.append(perf_counter() - start)
    return min(seconds[1:])


def _by(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # The choice holds for the whole process: others, in another thread, must find one for them.
    with sdpa_kernel([backend, SDPBackend.MATH], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)
