"""Shots of videos whose cuts, fades and camera moves are known because they were made here."""

import numpy as np
import pytest

from sgm.data.cuts import analyse, divide, unexplained
from sgm.data.reading import read_frames
from tests.footage import blend, pan, scene, write_video

RATE = 25


def shots(path):
    return analyse(read_frames(path)).shots


def written(folder, *parts):
    path = folder / "video.mp4"
    write_video(path, np.concatenate(parts), RATE)
    return path


@pytest.mark.parametrize("speeds", [(0.0, 0.0), (0.01, 0.03), (0.08, 0.002)])
def test_a_cut_is_found_at_its_frame(tmp_path, speeds):
    # Catches an index that is off by one, which would leave a frame of the other shot in a clip.
    first, second = pan(scene(1), speeds[0], 21), pan(scene(2), speeds[1], 18)
    assert shots(written(tmp_path, first, second)) == ((0, 20), (21, 38))


def test_a_cut_between_views_of_one_scene_is_found(tmp_path):
    picture = scene(3, (160, 640))
    near, far = pan(picture, 0.005, 15), pan(picture[:, 300:], 0.005, 15)
    assert shots(written(tmp_path, near, far)) == ((0, 14), (15, 29))


@pytest.mark.parametrize("speed", [0.05, 0.15, 0.3, 0.45])
def test_no_cut_in_a_fast_pan(tmp_path, speed):
    # 0.45 of the short side per frame is a whole picture in three frames. Catches a detector that
    # looks at each pair of frames alone.
    frames = pan(scene(4, (160, 1200)), speed, 24)
    assert shots(written(tmp_path, frames)) == ((0, 23),)


def test_no_cut_where_the_camera_swings_around(tmp_path):
    # Rest, a swing of up to a third of the picture per frame, rest: the change is sudden.
    picture = scene(5, (160, 600))
    at = 8 + np.cumsum(np.r_[np.zeros(8), 25 * np.hanning(12), np.zeros(8)]).astype(int)
    frames = np.stack([picture[40:112, x : x + 96] for x in at]).astype(np.uint8)
    assert shots(written(tmp_path, frames)) == ((0, len(frames) - 1),)


@pytest.mark.parametrize("length", [8, 16, 30])
def test_a_dissolve_is_left_out_of_both_shots(tmp_path, length):
    before, after = pan(scene(6), 0.004, 20 + length), pan(scene(7), 0.004, 20 + length)
    found = shots(written(tmp_path, blend(before, after, length)))
    assert len(found) == 2
    (start, end), (begin, last) = found
    assert start == 0
    assert last == 39 + length
    assert 10 <= end <= 20 + length / 4
    assert 19 + 3 * length / 4 <= begin <= 30 + length


def test_fades_to_and_from_black_divide(tmp_path):
    black = np.zeros((40, 72, 96, 3), np.uint8)
    out = blend(pan(scene(8), 0.004, 40), black, 15)
    back = blend(black, pan(scene(9), 0.004, 40), 15)
    found = shots(written(tmp_path, out, back))
    lit = [s for s in found if s[0] < 20 or s[1] > 110]
    assert len(lit) == 2
    assert lit[0][1] <= 25 + 6  # of 15 frames that grow darker
    assert lit[1][0] >= 105 - 6


def test_a_change_of_light_is_no_transition(tmp_path):
    frames = pan(scene(10), 0.003, 40) * np.linspace(1.0, 0.5, 40)[:, None, None, None]
    assert shots(written(tmp_path, frames.astype(np.uint8))) == ((0, 39),)


def test_a_camera_move_is_no_transition(tmp_path):
    # Its ends have nothing in common either. Catches a test of the ends alone.
    frames = pan(scene(11, (160, 600)), 0.03, 60)
    assert shots(written(tmp_path, frames)) == ((0, 59),)


def test_unexplained_share_against_its_definition():
    generator = np.random.default_rng(0)
    a, noise = generator.normal(0, 10, (2, 1, 500))
    b = 0.7 * a + noise + 3
    expected = 1 - np.corrcoef(a[0], b[0])[0, 1] ** 2
    np.testing.assert_allclose(unexplained(a, b), [expected], rtol=1e-9)
    np.testing.assert_allclose(unexplained(a, 20 - 2 * a), [1], atol=1e-9)  # a negative
    np.testing.assert_allclose(unexplained(a, 5 + 2 * a), [0], atol=1e-9)
    assert unexplained(a, np.full_like(a, 9)) == [1]
    assert unexplained(np.zeros_like(a), np.full_like(a, 9)) == [0]


def test_shots_lie_between_cuts_and_transitions():
    inside = np.zeros(12, bool)
    inside[[4, 5, 11]] = True
    assert divide([2, 8], inside) == ((0, 1), (2, 3), (6, 7), (8, 10))
    assert divide([], np.ones(3, bool)) == ()
