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
    """Catches the first that works taken, and the slowest."""
    for candidates in ((FLASH, MATH), (MATH, FLASH)):
        monkeypatch.setattr(backends, "_CANDIDATES", candidates)
        assert backends.quickest(*qkv()) == FLASH


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


def test_no_memory_is_no_reason_to_try_another(monkeypatch):
    """Catches it taken for a backend that cannot: the memory plan is to step down instead."""

    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(backends, "_time", fail)
    with pytest.raises(torch.OutOfMemoryError):
        backends.quickest(*qkv(1))


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
