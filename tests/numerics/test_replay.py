"""Recorded calls, with a CUDA that records the function itself: ``tests/e2e/test_cuda.py`` has a
real one."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from sgm.inference.optimized.replay import Replay


class Cuda:
    """What of CUDA a recording uses. A graph does again, in place, what was called in it."""

    def __init__(self, monkeypatch, launching):
        self.recorded = self.replayed = self.called = 0
        self.full = False
        self._clock, self._launching = 0.0, launching
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=self._replay))
        monkeypatch.setattr(torch.cuda, "graph", self._graph)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("stream", device))
        monkeypatch.setattr(torch.cuda, "synchronize", self._wait)
        monkeypatch.setattr("time.perf_counter", lambda: self._clock)
        self.call = Replay(self._function, torch.device("cuda:1"))

    def _function(self, x, level):
        self.called += 1
        self._clock += self._launching
        return x * level, x + level

    @contextmanager
    def _graph(self, _, stream, capture_error_mode):
        assert stream == ("stream", torch.device("cuda:1"))
        assert capture_error_mode == "thread_local"
        self.recorded += 1
        if self.full:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        yield

    def _wait(self, _):
        self._clock += 1 - self._launching  # the device is done a second after the call

    def _replay(self):
        self.replayed += 1
        for kept, new in zip(self.call._result, self._function(*self.call._given), strict=True):
            kept.copy_(new)


def numbers(k):
    return torch.full((2, 3), float(k)), torch.tensor([k + 0.5])


@pytest.mark.parametrize(("launching", "recordings"), [(0.95, 1), (0.5, 0)])
def test_calls_are_recorded_where_launching_takes_the_time(monkeypatch, launching, recordings):
    """Catches: a recording nobody needs, one for each call, results of the call before."""
    cuda = Cuda(monkeypatch, launching)
    for k in range(5):
        x, level = numbers(k)
        product, total = cuda.call(x, level)
        assert torch.equal(product, x * level)
        assert torch.equal(total, x + level)
    assert cuda.recorded == recordings
    assert cuda.replayed == 3 * recordings


def test_what_is_given_may_change_afterwards(monkeypatch):
    """Catches: a recording of the caller's own tensors."""
    cuda = Cuda(monkeypatch, 1.0)
    for k in range(4):
        x, level = numbers(k)
        product, _ = cuda.call(x, level)
        before = product.clone()
        x.zero_()
        assert torch.equal(product, before)


def test_without_memory_for_a_recording_calls_go_on(monkeypatch, caplog):
    """Catches: a run that ends where it fitted without, or that tries again in every step."""
    cuda = Cuda(monkeypatch, 1.0)
    cuda.full = True
    for k in range(5):
        x, level = numbers(k)
        assert torch.equal(cuda.call(x, level)[0], x * level)
    assert (cuda.recorded, cuda.replayed) == (1, 0)
    assert "no memory to record steps in" in caplog.text
