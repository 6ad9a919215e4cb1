"""Call things in turn, and keep how long each call took."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

Call = Callable[[], Any]
Calls = dict[str, Call]


@dataclass(frozen=True)
class Timing:
    """What the calls of one thing took.

    Attributes:
        seconds: of every call.
        working_bytes: most memory at a time beyond what was there before; None but on CUDA.
        failure: why there are no times.
        result: of the last call.
    """

    seconds: tuple[float, ...] = ()
    working_bytes: int | None = None
    failure: str | None = None
    result: Any = None

    @property
    def median(self) -> float | None:
        """Of the times; None where there are none."""
        return median(self.seconds) if self.seconds else None


def alternate(
    calls: Mapping[str, Call],
    device: torch.device,
    repeat: int,
    warmup: int = 1,
    inner: int = 1,
) -> dict[str, Timing]:
    """Time several things so that what slows the machine down meets them alike.

    One that fails is left out of the rounds; the others go on.

    Args:
        calls: the things, by name.
        device: that they compute on, and that is waited for.
        repeat: rounds, in each of which every thing is called.
        warmup: calls before that.
        inner: calls that one time is the mean of, for things that are soon over.
    """
    failures: dict[str, str] = {}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    working: dict[str, int | None] = dict.fromkeys(calls)
    results: dict[str, Any] = dict.fromkeys(calls)
    if device.type == "cuda":
        gc.collect()  # once: what a call leaves behind is its own affair
    for number in range(warmup + repeat):
        for name, call in calls.items():
            if name in failures:
                continue
            results[name] = None  # else the last one would count as memory that a call needs
            many = inner if number >= warmup else 1
            try:
                taken, working[name], results[name] = _once(call, device, many)
            except Exception as error:  # noqa: BLE001 - of the thing measured: one row of a table
                failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                continue
            if number >= warmup:
                seconds[name].append(taken)
    return {
        name: Timing(failure=failures[name])
        if name in failures
        else Timing(tuple(seconds[name]), working[name], result=results[name])
        for name in calls
    }


def give_back() -> None:
    """Return to the device all that nothing refers to any more, for what is measured next."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing where CUDA was not used


def _once(call: Call, device: torch.device, inner: int) -> tuple[float, int | None, Any]:
    """Seconds of a call, bytes, and what it gave."""
    cuda = device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    began = time.perf_counter()
    for _ in range(inner):
        result = call()
    if cuda:
        torch.cuda.synchronize(device)
    taken = (time.perf_counter() - began) / inner
    return taken, torch.cuda.max_memory_allocated(device) - before if cuda else None, result
