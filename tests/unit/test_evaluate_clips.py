"""Figures of models on clips: closed forms."""

import pytest

from scripts.evaluate_clips import Row, figures, named, table


def row(asked, achieved, psnr=30.0):
    return Row("m", "clip", 0, asked, achieved, psnr, 0.9)


def test_figures():
    """Catches: a ratio the other way round, errors that cancel, a mean that is not geometric."""
    found = figures([row(1.0, 2.0), row(2.0, 1.0, 20.0), row(4.0, 4.0)])
    assert found["motion error"] == pytest.approx(2 / 3)
    assert found["motion over asked, geometric mean"] == pytest.approx(1.0)
    assert found["rank correlation"] == pytest.approx(0.5)
    assert found["motion error, pixels per frame"] == pytest.approx(2 / 3)
    assert found["slope of motion"] == pytest.approx(11 / 14)  # covariance over variance
    assert found["first frame PSNR, dB"] == pytest.approx(80 / 3)
    assert figures([row(1.0, 0.25)])["motion over asked, geometric mean"] == pytest.approx(0.25)
    assert "slope of motion" not in figures([row(1.0, 0.25)])


def test_a_table_has_a_line_for_each_model():
    text = table({"a": {"x": 1.0}, "b": {"x": 2.345}})
    assert text.splitlines() == ["| | x |", "|---|---|", "| a | 1.00 |", "| b | 2.35 |"]


def test_names_and_files():
    assert named("a=b=c.safetensors") == ("a", "b=c.safetensors")
    with pytest.raises(Exception, match="NAME=FILE, got a"):
        named("a")
