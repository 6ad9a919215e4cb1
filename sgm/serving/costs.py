"""What a run will take, told before its model is loaded: seconds, and memory of the device.

The multiplications of a run are counted. This machine's own earlier runs, noted in a file of one
JSON object a line, say how fast they go; before there is any, the device's rate of large matrix
products does. Memory is counted by :mod:`sgm.inference.needs`.
"""

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import ceil, log
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Any, TypeVar, cast

import torch
from torch import nn

from sgm.checkpoint.room import in_bytes
from sgm.device import device_name, memory_errors
from sgm.inference.budget import USABLE, MemoryPlan, Needs, free_bytes
from sgm.inference.estimate import count_flops, matmul_rate, network_calls, stage_seconds
from sgm.inference.levels import LEVELS
from sgm.inference.placement import choose_plan, needs_of
from sgm.inference.settings import ModelFiles, Settings, guidance_halves
from sgm.models.diffusion import DiffusionEngine

logger = logging.getLogger(__name__)

T = TypeVar("T")
Noted = dict[str, Any]

STAGES = ("encoding", "sampling", "decoding", "writing")
NEAREST = 5  # earlier runs that an estimate follows
NOTED = 500  # runs that the file keeps
COUNTED = 256  # counts that are kept in memory
SMALLER = 0.8  # share of a count that was too low, where memory ran out all the same


@dataclass(frozen=True)
class Cost:
    """What one video will take.

    Attributes:
        seconds: from the loaded model to the file.
        bytes: of the device's memory at the peak, weights included.
        free_bytes: that the device has for it.
        measured: the time follows from this machine's own runs; else it is a rough estimate.
        stages: the seconds of each of `STAGES`.
    """

    seconds: float
    bytes: int
    free_bytes: int
    measured: bool
    stages: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What one video takes, whatever computes it.

    Attributes:
        network: floating-point operations of all calls of the U-Net.
        decoder: of the decoder.
        needs: memory under each plan.
    """

    network: float
    decoder: float
    needs: Needs


class Costs:
    """Estimates, from counts that are made once and from the runs of this machine.

    Args:
        path: where the runs are noted; made with its folder when there is the first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counted: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = Lock()

    def estimate(self, files: ModelFiles, settings: Settings, held: int = 0) -> Cost:
        """What a run will take.

        Takes seconds for a size or length that is asked about for the first time, and milliseconds
        after that.

        Args:
            files: of the model.
            settings: of the run, on a device and in a type.
            held: bytes of the device that will be given back before the run.

        Raises:
            MemoryError: the device has no room to measure its speed.
        """
        work = self._work(files, settings)
        free = free_bytes(_device(settings)) + held
        plan = choose_plan(settings, lambda: work.needs, free)
        runs = self._nearest(_kind(files, settings, plan), work)
        stages = _scaled(runs, work) if runs else self._rough(settings, work)
        peaks = [run["peak"] / run["counted"] for run in runs if run["peak"]]
        needed = round(work.needs.peak(plan) * (median(peaks) if peaks else 1))
        return Cost(sum(stages.values()), needed, free, bool(runs), stages)

    def weight_bytes(self, files: ModelFiles, settings: Settings) -> int:
        """What the weights take on the device."""
        return sum(self._work(files, settings).needs.weights.values())

    def note(
        self,
        files: ModelFiles,
        settings: Settings,
        plan: MemoryPlan,
        seconds: Mapping[str, float],
        peak: int | None,
    ) -> None:
        """Note a run of this machine for later estimates.

        Args:
            files: of the model.
            settings: of the run.
            plan: the memory plan it ran under.
            seconds: of each of `STAGES`.
            peak: bytes of the device at the most; None where nobody knows.
        """
        work = self._work(files, settings)
        run = _kind(files, settings, plan) | {
            "seconds": {stage: round(seconds[stage], 4) for stage in STAGES},
            "network": work.network,
            "decoder": work.decoder,
            "peak": peak,
            "counted": work.needs.peak(plan),
        }
        with self._lock:
            self._runs = [*self._read(), run][-NOTED:]  # another process may have noted some
            self._path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self._path.with_suffix(f".{os.getpid()}.part")
            unfinished.write_text("".join(json.dumps(each) + "\n" for each in self._runs))
            unfinished.replace(self._path)

    def advice(self, files: ModelFiles, settings: Settings, held: int = 0) -> str:
        """In a line: what a run needs, what there is, and the single changes that would let it fit.

        Args:
            files: of the model.
            settings: of the run that found no room.
            held: bytes of the device that the run itself holds.
        """
        needs, free = self._work(files, settings).needs, free_bytes(_device(settings)) + held
        needed = needs.peak(choose_plan(settings, lambda: needs, free))
        room = min(USABLE * free, SMALLER * needed)

        def fits(**changes: Any) -> bool:
            changed = replace(settings, options=settings.options.replace(**changes))
            needs = self._work(files, changed).needs
            plan = choose_plan(changed, lambda: needs, int(room / USABLE))
            return needs.peak(plan) <= room

        found = ", or ".join(_changes_that_fit(settings, fits))
        what = f"{settings.frames} frames of {settings.size[0]}x{settings.size[1]}"
        return (
            f"out of memory: {files.spec.name} takes about {in_bytes(needed)} for {what}, and "
            f"{in_bytes(free)} are free; "
            f"{f'this would fit: {found}' if found else 'take a smaller model'}"
        )

    @cached_property
    def _runs(self) -> list[Noted]:
        """The runs that were noted when this process last looked, oldest first."""
        return self._read()

    def _read(self) -> list[Noted]:
        """The runs in the file, oldest first; lines that are none are passed over."""
        found = []
        lines = self._path.read_text(errors="replace").splitlines() if self._path.is_file() else []
        for line in lines:
            try:
                run = json.loads(line)
                _check(run)
                found.append(run)
            except (ValueError, TypeError, LookupError):
                logger.warning("%s: not a line of this program: %.80s", self._path, line)
        return found

    def _nearest(self, kind: Noted, work: Work) -> list[Noted]:
        """The last of the runs of a kind whose work is the most alike."""
        alike = [run for run in reversed(self._runs) if kind.items() <= run.items()]
        return sorted(alike, key=lambda run: abs(log(run["network"] / work.network)))[:NEAREST]

    def _rough(self, settings: Settings, work: Work) -> dict[str, float]:
        """Seconds of each stage from counts and rates alone."""

        def rate(device: torch.device, dtype: torch.dtype) -> float:
            return self._kept(("rate", device, dtype), partial(matmul_rate, device, dtype))

        device = _device(settings)
        with memory_errors(f"{device} has no room to measure its speed; free it or take another"):
            sampling, decoding = stage_seconds(work.network, work.decoder, settings, rate)
        return dict.fromkeys(STAGES, 0.0) | {"sampling": sampling, "decoding": decoding}

    def _work(self, files: ModelFiles, settings: Settings) -> Work:
        options, calls = settings.options, network_calls(settings)
        what = (str(files.config), settings.frames, settings.size, options.decoding_t)
        where = (options.device, options.dtype, options.optimize, guidance_halves(settings))

        def flops() -> tuple[float, float]:
            network, decoder = count_flops(files, settings)
            return network / calls, decoder

        def needs() -> Needs:
            engine = self._kept(("engine", what[0]), lambda: _without_weights(files))
            return needs_of(engine, settings)

        per_call, decoder = self._kept(("flops", what), flops)
        return Work(calls * per_call, decoder, self._kept(("needs", what, where), needs))

    def _kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was made under a key; what has not been asked for the longest is forgotten."""
        with self._lock:
            if key in self._counted:
                self._counted.move_to_end(key)
                return cast(T, self._counted[key])
        made = make()
        with self._lock:
            self._counted[key] = made
            while len(self._counted) > COUNTED:
                self._counted.popitem(last=False)
        return made


def _changes_that_fit(settings: Settings, fits: Callable[..., bool]) -> Iterator[str]:
    """In words, for each way to need less, the least change that is enough, if any is."""
    options, (height, width) = settings.options, settings.size
    movable = _device(settings).type == "cuda" and LEVELS[str(options.optimize)].moves
    if movable and options.memory != "min" and fits(memory="min"):
        yield "memory min"
    at_once = min(options.decoding_t or 1, settings.frames)
    chunk = _largest(at_once, lambda n: fits(decoding_t=n))
    if chunk:
        yield f"decoding_t {chunk}"
    frames = _largest(settings.frames, lambda n: fits(num_frames=n))
    if frames:
        yield f"{frames} frames"

    def size(short: int) -> dict[str, int]:
        """The size whose shorter side is so many times 64, in about the same proportions."""
        unit = min(height, width) / short
        return {"height": 64 * round(height / unit), "width": 64 * round(width / unit)}

    short = _largest(ceil(min(height, width) / 64), lambda n: fits(**size(n)))
    if short:
        yield "{height}x{width}".format(**size(short))


def _largest(beyond: int, fits: Callable[[int], bool]) -> int:
    """The largest number below ``beyond`` that fits, where all smaller ones do; 0 if none does."""
    low, high = 0, beyond
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _scaled(runs: Sequence[Noted], work: Work) -> dict[str, float]:
    """Seconds of each stage, at the rates of earlier runs."""

    def rate(stage: str, flops: str) -> float:
        return median(run["seconds"][stage] / run[flops] for run in runs)

    return {
        "encoding": median(run["seconds"]["encoding"] for run in runs),
        "sampling": work.network * rate("sampling", "network"),
        "decoding": work.decoder * rate("decoding", "decoder"),
        "writing": median(run["seconds"]["writing"] for run in runs),
    }


def _kind(files: ModelFiles, settings: Settings, plan: MemoryPlan) -> Noted:
    """What runs have in common whose speeds can be compared."""
    options = settings.options
    return {
        "version": files.spec.name,
        "device": device_name(_device(settings)),
        "dtype": options.dtype,
        "optimize": options.optimize,
        "plan": plan.name,
    }


def _check(run: Noted) -> None:
    """Raise an error unless a line of the file holds what estimates are made of."""
    numbers = [run["network"], run["decoder"], run["counted"], run["peak"] or 1]
    if min(numbers) <= 0 or min(run["seconds"][stage] for stage in STAGES) < 0:
        raise ValueError("expected positive numbers")


def _without_weights(files: ModelFiles) -> DiffusionEngine:
    """The model on the meta device, but for single numbers, whose values decide what is built."""
    engine = DiffusionEngine.without_weights(files.config)
    for module in engine.modules():
        for name, value in module.named_parameters(recurse=False):
            if value.numel() == 1:
                setattr(module, name, nn.Parameter(torch.zeros(value.shape), False))
    return engine


def _device(settings: Settings) -> torch.device:
    return torch.device(str(settings.options.device))
