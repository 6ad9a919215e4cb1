"""What a visitor sees of a run, from the pipeline's reports and a clock."""

import numpy as np
import pytest
import torch

from sgm.inference.progress import Progress
from sgm.serving.reporting import Reporter
from tests.measured import Clock

EXPECTED = {"encoding": 1.0, "sampling": 6.0, "decoding": 2.0, "writing": 1.0}


class Ticket:
    progress = None
    cancelled = False


@pytest.fixture
def ticket():
    return Ticket()


@pytest.fixture
def clock():
    return Clock()


def run(reporter, clock, steps=3):
    """The reports of a video whose stages take 2, 12, 4 and 3 seconds; what is shown after each."""
    shown = []
    picture, latents = torch.rand(3, 16, 16) * 2 - 1, torch.rand(4, 4, 4)
    reports = [(0, Progress("encoding", 0, 1))]
    reports += [(2, Progress("encoding", 1, 1, picture=picture, picture_latents=latents))]
    for step in range(1, steps + 1):
        estimate = latents.expand(2, 4, 4, 4)
        reports += [(12 / steps, Progress("sampling", step, steps, 1.0, estimate))]
    reports += [(0, Progress("decoding", 0, 2)), (4, Progress("decoding", 2, 2))]
    for seconds, report in reports:
        clock.now += seconds
        assert reporter(report)
        shown.append(reporter._ticket.progress)
    clock.now += 3
    reporter.end_video()
    return shown


def test_share_and_remaining_time_count_all_stages(ticket, clock):
    # Catches: a bar of the stage alone, remaining time that forgets decoding and writing.
    reporter = Reporter(ticket, 2, EXPECTED, clock=clock)
    shown = run(reporter, clock)
    assert [each.fraction for each in shown] == pytest.approx([0, 0.1, 0.3, 0.5, 0.7, 0.7, 0.9])
    # Two steps of four seconds are left after the first, then decoding and writing.
    assert shown[2].seconds_left == pytest.approx(8 + 2 + 1)
    assert shown[2].text == "sampling 1/3, 8.0 s left"
    assert shown[5].seconds_left is None
    assert shown[6].seconds_left == pytest.approx(1)
    assert {(each.picture, each.pictures) for each in shown} == {(1, 2)}
    assert {each.picture for each in run(reporter, clock)} == {2}


def test_a_video_that_is_begun_again_is_the_same_video(ticket, clock):
    # Catches: "Video 3 of 2" after a smaller memory plan, the failed try's seconds in the noted.
    reporter = Reporter(ticket, 2, EXPECTED, clock=clock)
    for number in (1, 2):
        reporter(Progress("encoding", 0, 1))
        clock.now += 50
        reporter(Progress("encoding", 1, 1))
        assert {each.picture for each in run(reporter, clock)} == {number}
        assert reporter.seconds["encoding"] == pytest.approx(2)


def test_seconds_of_stages_are_those_of_the_last_video(ticket, clock):
    # Catches: the time of loading or of an earlier video in what estimates are made of.
    reporter = Reporter(ticket, 2, EXPECTED, clock=clock)
    clock.now += 100
    reporter(Progress("loading", 1, 2))
    assert ticket.progress.fraction == 0
    clock.now += 100
    for _ in range(2):
        run(reporter, clock)
        stages = {"encoding": 2, "sampling": 12, "decoding": 4, "writing": 3}
        assert {name: reporter.seconds[name] for name in stages} == pytest.approx(stages)


def test_preview_is_fitted_anew_for_each_picture(ticket, clock):
    # Catches: the first picture's colours on the second's frames; a preview left from before.
    reporter = Reporter(ticket, 2, EXPECTED, clock=clock)
    torch.manual_seed(0)
    first, second = run(reporter, clock), run(reporter, clock)
    assert first[1].preview is None
    assert second[1].preview is None
    assert first[2].preview.shape == second[2].preview.shape == (2, 4, 4, 3)
    assert not np.array_equal(first[2].preview, second[2].preview)


def test_no_preview_passes_the_safety_filter_by(ticket, clock):
    shown = run(Reporter(ticket, 1, EXPECTED, shown=False, clock=clock), clock)
    assert {each.preview is None for each in shown} == {True}


def test_a_cancelled_ticket_ends_the_run(ticket):
    reporter = Reporter(ticket, 1, EXPECTED)
    assert reporter(Progress("encoding", 0, 1))
    ticket.cancelled = True
    assert not reporter(Progress("encoding", 1, 1))
