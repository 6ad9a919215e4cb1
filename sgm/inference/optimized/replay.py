"""Calls recorded as CUDA graphs and played back: one launch for a thousand kernels.

A step of a large video keeps the device busy for longer than the host takes to launch it; that of a
small one does not, and the device waits. Only then is a recording worth its memory.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")

logger = logging.getLogger(__name__)

# Share of a call's time that its launches take, from which on the device has waited for them.
LAUNCH_BOUND = 0.9


class Replay(Generic[R]):
    """A function of tensors on a CUDA device; once it is recorded, calls play it back.

    The first call is as any other: kernels are compiled in it. The second is timed, and where the
    host took most of its time, the third is recorded. What the function uses beside its arguments
    must stay where it is in memory.

    Args:
        call: from tensors to one or several; it waits for nothing that the device computes.
        device: a CUDA device.
    """

    def __init__(self, call: Callable[..., R], device: torch.device) -> None:
        self._call, self._device = call, device
        self._calls, self._wanted = 0, False
        self._graph: Any = None
        self._given: list[Tensor] = []
        self._result: R

    def __call__(self, *given: Tensor) -> R:
        """What the function gives; the next call writes its own over it.

        Args:
            given: tensors of the same shapes and types in every call.
        """
        self._calls += 1
        if self._calls == 2:
            return self._timed(*given)
        if not self._wanted:
            return self._call(*given)
        if self._graph is None and not self._record(*given):
            return self._call(*given)
        for kept, new in zip(self._given, given, strict=True):
            kept.copy_(new)
        self._graph.replay()
        return self._result

    def _timed(self, *given: Tensor) -> R:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        result = self._call(*given)
        launched = time.perf_counter()
        torch.cuda.synchronize(self._device)
        share = (launched - start) / (time.perf_counter() - start)
        self._wanted = share > LAUNCH_BOUND
        logger.info("launching took %.0f %% of a call", 100 * share)
        return result

    def _record(self, *given: Tensor) -> bool:
        """Record a call, whose memory is the graph's own; whether there is enough of it."""
        kept, graph = [each.clone() for each in given], torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            # PyTorch's own stream for this is of the device that was the current one first. Other
            # threads may go on using the device meanwhile.
            stream = torch.cuda.Stream(self._device)
            how: Any = {"stream": stream, "capture_error_mode": "thread_local"}
            try:
                with torch.cuda.graph(graph, **how):
                    result = self._call(*kept)
            except torch.OutOfMemoryError:
                logger.warning("no memory to record steps in: they are launched one by one")
                self._wanted = False
                return False
        self._given, self._graph, self._result = kept, graph, result
        return True
