"""The quickest backend of attention is found by measuring, among those that can.

On a CPU PyTorch has two: FlashAttention, and the one that holds all weights in memory.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sgm.kernels import backends
from tests.recorded import noise, relative_error

FLASH, MATH, CUDNN = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.CUDNN_ATTENTION,
)


def qkv(tokens=1024):
    return tuple(noise(name, 1, 4, tokens, 64) for name in "qkv")


def test_the_quicker_one_is_chosen_whatever_the_order(monkeypatch):
    """Catches the first that works taken, the slowest, and the first call's time, in which a
    backend may load or compile."""
    clock, first = [0.0], {FLASH: 100.0, MATH: 1.0}

    def work(*_):
        (chosen,) = backends.torch.nn.attention._cur_sdpa_kernel_backends()
        clock[0] += first.pop(chosen, {FLASH: 2.0, MATH: 3.0}[chosen])

    monkeypatch.setattr(backends, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(F, "scaled_dot_product_attention", work)
    for candidates in ((FLASH, MATH), (MATH, FLASH)):
        monkeypatch.setattr(backends, "_CANDIDATES", candidates)
        assert backends.quickest(*qkv(1)) == FLASH


def test_those_that_cannot_are_passed_over(monkeypatch):
    monkeypatch.setattr(backends, "_CANDIDATES", (CUDNN, MATH))
    assert backends.quickest(*qkv(16)) == MATH
    monkeypatch.setattr(backends, "_CANDIDATES", (CUDNN,))
    assert backends.quickest(*qkv(16)) is None


def test_equally_quick_ones_keep_their_order(monkeypatch):
    """Catches a choice by chance, which would let two runs of one seed differ."""
    monkeypatch.setattr(backends, "_CANDIDATES", (FLASH, MATH, CUDNN))
    times = {FLASH: 1.0, MATH: 0.97, CUDNN: 0.9}
    monkeypatch.setattr(backends, "_time", lambda backend, *_: times[backend])
    assert backends.quickest(*qkv(1)) == CUDNN
    times[CUDNN] = 0.96
    assert backends.quickest(*qkv(1)) == FLASH


def test_no_memory_for_the_first_is_no_reason_to_try_another(monkeypatch):
    """Catches it taken for a backend that cannot, where the memory plan is to step down; and a
    step down for a backend that would only have been tried."""

    def time(backend, *_):
        if backend in full:
            raise torch.OutOfMemoryError
        return 1.0

    monkeypatch.setattr(backends, "_time", time)
    monkeypatch.setattr(backends, "_CANDIDATES", (FLASH, CUDNN))
    full = {FLASH, CUDNN}
    with pytest.raises(torch.OutOfMemoryError):
        backends.quickest(*qkv(1))
    full = {CUDNN}
    assert backends.quickest(*qkv(1)) == FLASH


@pytest.mark.parametrize("backend", [FLASH, MATH])
def test_the_chosen_one_computes(backend):
    """Catches PyTorch's order kept where a backend was chosen, and the choice left in force."""
    q, k, v = qkv(70)
    with sdpa_kernel(backend):
        expected = F.scaled_dot_product_attention(q, k, v)
    default = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(backends._by(backend, q, k, v), expected)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), default)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_each_kind_is_measured_once(monkeypatch):
    calls = []
    real = backends.quickest
    monkeypatch.setattr(backends, "quickest", lambda *x: calls.append(x[0].shape) or real(*x))
    monkeypatch.setattr(backends, "_quickest", {})
    small, large = ([x.cuda().half() for x in qkv(n)] for n in (64, 1024))
    for tensors in (small, large, small, large):
        expected = F.scaled_dot_product_attention(*(x.double() for x in tensors))
        assert relative_error(backends.attend(*tensors).double(), expected) < 2e-3
    assert calls == [small[0].shape, large[0].shape]
