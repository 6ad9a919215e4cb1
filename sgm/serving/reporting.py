"""What a visitor sees of a run: the pipeline's reports as text, share, remaining time, preview."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sgm.inference.progress import Progress, StageClock
from sgm.inference.videos import Frames
from sgm.serving.costs import STAGES
from sgm.serving.preview import LatentPreview

if TYPE_CHECKING:
    from sgm.serving.queue import Ticket


@dataclass(frozen=True, eq=False)
class RunProgress:
    """How far a run is.

    Attributes:
        text: in words, such as ``sampling 3/25, 40 s left``.
        fraction: of the video that is being made, from 0 to 1.
        seconds_left: until this video is done; None while that is unknown.
        picture: which video of the order is being made, from 1.
        pictures: videos of the order.
        preview: roughly what the frames will look like, uint8 (t, h, w, 3), small; None until
            there is something to see.
    """

    text: str
    fraction: float
    seconds_left: float | None
    picture: int
    pictures: int
    preview: Frames | None = None


def in_words(position: int | None, progress: RunProgress | None) -> str:
    """How an order stands, in a line.

    Args:
        position: its place in the queue; None where it does not wait.
        progress: how far its run is; None before its first report.
    """
    if position is not None:
        return f"Waiting: number {position} in the queue"
    if progress is None:
        return "Starting"
    text = progress.text[:1].upper() + progress.text[1:]
    several = progress.pictures > 1
    return f"Video {progress.picture} of {progress.pictures}: {text}" if several else text


class Reporter:
    """A callback of the pipeline for one order; ends the run when its ticket is cancelled.

    Args:
        ticket: gets the progress.
        videos: of the order.
        expected: seconds of each of `STAGES`.
        shown: whether to make previews; no filter sees them.
        clock: seconds.

    Attributes:
        seconds: what each stage of the last video took.
    """

    def __init__(
        self,
        ticket: "Ticket",
        videos: int,
        expected: Mapping[str, float],
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._ticket, self._videos, self._expected = ticket, videos, expected
        self._shown = shown
        self._clock, self._last = clock, clock()
        self._stages = StageClock(clock)
        self._ended = 0
        self._map: LatentPreview | None = None
        self._preview: Frames | None = None

    def __call__(self, progress: Progress) -> bool:
        """Take in a report; False where the run is to stop."""
        if progress.stage == "encoding" and progress.step == 0:
            self._begin()
        self._measure(progress.stage)
        self._look(progress)
        left = self._stages.seconds_left(progress)
        self._ticket.progress = RunProgress(
            self._stages.describe(progress),
            self._fraction(progress),
            None if left is None else left + self._later(progress.stage),
            self._ended + 1,
            self._videos,
            self._preview,
        )
        return not self._ticket.cancelled

    def end_video(self) -> None:
        """Say that a video is written."""
        self._measure("writing")
        self._ended += 1

    def _begin(self) -> None:
        """Begin a video, or begin it again under another memory plan."""
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._last = self._clock()
        self._preview = self._map = None

    def _measure(self, stage: str) -> None:
        now = self._clock()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def _look(self, progress: Progress) -> None:
        """Fit the map from latents to colours, or use it."""
        if not self._shown:
            return
        if progress.picture is not None and progress.picture_latents is not None:
            self._map = LatentPreview.fit(progress.picture_latents, progress.picture)
        if progress.latents is not None and self._map is not None:
            self._preview = self._map.frames(progress.latents)

    def _fraction(self, progress: Progress) -> float:
        """The share of the expected seconds that is over."""
        if progress.stage not in STAGES:
            return 0.0
        own = self._expected[progress.stage]
        done = sum(self._expected[stage] for stage in STAGES[: STAGES.index(progress.stage)])
        whole = sum(self._expected.values())
        return min(1.0, (done + own * progress.step / progress.total) / whole)

    def _later(self, stage: str) -> float:
        """Expected seconds of all stages after one."""
        after = STAGES[STAGES.index(stage) + 1 :] if stage in STAGES else STAGES
        return sum(self._expected[each] for each in after)
