"""Which form of the functions a tensor gets."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from sgm.kernels import reference, sizes

Form = Literal["reference", "triton", "sizes"]

_LOG = logging.getLogger(__name__)
_FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ATTENTION_LIMIT = 128  # frames, and channels of a head: a program keeps them in registers

_forced: ContextVar[Form | None] = ContextVar("form of the kernels", default=None)


@contextmanager
def use(form: Form | None) -> Iterator[None]:
    """Take this form of all functions, whatever the device; None chooses by the device.

    For tests and measurements, and ``sizes`` for counting on the meta device. The choice holds for
    the thread. What Triton is not for (float64; attention in float32, over more than 128 frames or
    with wider heads) stays with the reference form.

    Raises:
        ValueError: there is no such form.
    """
    if form not in (None, *get_args(Form)):
        raise ValueError(f"expected {', '.join(get_args(Form))} or None, got {form!r}")
    token = _forced.set(form)
    try:
        yield
    finally:
        _forced.reset(token)


def form_for(x: Tensor) -> ModuleType:
    """The module that has the functions for a tensor."""
    forced = _forced.get()
    if forced == "sizes":
        return sizes
    if forced == "reference" or x.dtype not in _FUSED_DTYPES:
        return reference
    if forced == "triton" or (x.is_cuda and triton_works(x.device)):
        return import_module("sgm.kernels.fused")
    return reference


def attention_form_for(x: Tensor, frames: int, d: int) -> ModuleType:
    """The same for attention, which Triton has for short clips and 16-bit matrix units.

    Without such units, as on NVIDIA GPUs before Ampere, and in full float32, the products spill
    their registers and take minutes to compile.
    """
    if _forced.get() == "sizes":
        return sizes
    native = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0)
    fits = x.dtype != torch.float32 and max(frames, d) <= _ATTENTION_LIMIT
    return form_for(x) if native and fits else reference


def has_triton(device: torch.device) -> bool:
    """Whether tensors of a device get the Triton form, where that is for their type."""
    return device.type == "cuda" and torch.cuda.is_available() and triton_works(device)


@functools.cache
def triton_works(device: torch.device) -> bool:
    """Whether Triton is installed, knows the device and finds the C compiler that it needs."""
    try:
        one = torch.ones(1, 1, 1, device=device)
        import_module("sgm.kernels.fused").blend(one, one, None, None, 0.5)
    except torch.OutOfMemoryError:
        raise  # it says nothing of Triton, and would be remembered
    except Exception as exc:  # noqa: BLE001 - whatever is wrong with it, PyTorch can take its place
        _LOG.warning("Triton does not work here, PyTorch takes its place (slower): %s", exc)
        return False
    return True
