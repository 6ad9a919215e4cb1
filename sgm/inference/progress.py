"""How far a run is: what a callback gets, and the words for it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Optional, TextIO

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 78

Stage = Literal["loading", "encoding", "sampling", "decoding"]


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        stage: what is being done.
        step: steps of the stage that are done; of loading, megabytes.
        total: all steps of the stage.
        sigma: the noise level that the last sampling step began with.
        latents: the clean latents (t, z, h / f, w / f) as estimated there, scaled.
        picture: when encoding is done, the picture that conditions the run, at the size that the
            network takes: (3, h, w) in [-1, 1].
        picture_latents: its latents (z, h / f, w / f), scaled like the video's; None where the
            model sees it in another form.
    """

    stage: Stage
    step: int
    total: int
    sigma: float | None = None
    latents: Optional["Tensor"] = None
    picture: Optional["Tensor"] = None
    picture_latents: Optional["Tensor"] = None


Callback = Callable[[Progress], bool | None]


class SamplingStopped(Exception):  # noqa: N818 - asked for, not an error
    """The callback ended the run."""


def report(callback: Callback | None, progress: Progress) -> None:
    """Tell a callback, if there is one.

    Raises:
        SamplingStopped: it says that the run is to end.
    """
    if callback is not None and callback(progress) is False:
        raise SamplingStopped(f"stopped in {progress.stage}, step {progress.step}")


def duration(seconds: float) -> str:
    """A span of time in words, such as ``40 s``, ``3 min`` or ``4.5 h``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.0f} h" if hours >= 9.95 else f"{hours:.1f} h"


class StageClock:
    """Says in words how far a stage is, and from its steps so far how long it will still take.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage, self._began, self._last = "", clock(), clock()

    def describe(self, progress: Progress) -> str:
        """The stage, its steps and the remaining time, such as ``sampling 3/25, 40 s left``."""
        left = self.seconds_left(progress)
        unit = " MB" if progress.stage == "loading" else ""
        text = f"{progress.stage} {progress.step}/{progress.total}{unit}"
        return f"{text}, {duration(left)} left" if left else text

    def seconds_left(self, progress: Progress) -> float | None:
        """The remaining time of the stage; None before its first step is done."""
        now = self._clock()
        if progress.stage != self._stage:
            # Sampling first reports after a step: it began where the stage before it ended.
            self._stage, self._began = progress.stage, self._last if progress.step else now
        self._last = now
        if not progress.step:
            return None
        return (now - self._began) / progress.step * (progress.total - progress.step)


class ProgressLine:
    """The last line of a terminal, rewritten after each step; a callback of the pipeline.

    Args:
        stream: the terminal.
        clock: seconds.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.title = ""
        self._stream, self._clock = stream, StageClock(clock)

    def __call__(self, progress: Progress) -> None:
        """Show where the run stands."""
        self.show(self._clock.describe(progress))

    def show(self, text: str) -> None:
        """Replace the line."""
        line = f"{self.title}: {text}" if self.title else text
        self._stream.write(f"\r{line[:WIDTH]:<{WIDTH}}")
        self._stream.flush()

    def clear(self) -> None:
        """Take the line away, for other text."""
        self._stream.write(f"\r{'':{WIDTH}}\r")
        self._stream.flush()
