"""The evaluation of a model whose answers are known."""

import json

import cv2
import numpy as np
import pytest

from scripts import evaluate_tiny
from sgm.data.evaluation import Row, evaluate, rank_correlations, summarize, table
from sgm.data.metrics import ClipMeasures
from sgm.data.motion import bucket_to_flow

BUCKETS = (20, 127, 230)


def pan(picture, bucket, number, frames=4):
    """The perfect model: it slides a mirrored picture at the asked speed."""
    step = bucket_to_flow(bucket, 64) * (1 if number % 2 else -1)
    views = [
        cv2.warpAffine(
            picture,
            np.float32([[1, 0, i * step], [0, 1, 0]]),
            (64, 64),
            borderMode=cv2.BORDER_REFLECT,
        )
        for i in range(frames)
    ]
    return np.stack(views)


def still(picture, bucket, number):
    """A model that ignores the bucket."""
    return np.stack([picture] * 4)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    blurred = [
        cv2.GaussianBlur(rng.normal(size=(64, 64, 3)), (0, 0), 2.5, borderType=cv2.BORDER_REFLECT)
        for _ in range(10)
    ]
    return {
        f"photo {i}": np.clip(127 + 50 * x / x.std(), 0, 255).astype(np.uint8)
        for i, x in enumerate(blurred)
    }


def figures_of(generate, pictures, autoencoder_psnr):
    rows = [row for row, _ in evaluate(generate, pictures, BUCKETS)]
    return rows, summarize(rows, autoencoder_psnr, 64)


def test_a_perfect_model_meets_every_figure(pictures):
    rows, figures = figures_of(pan, pictures, np.inf)
    failed = [figure.name for figure in figures if not figure.met]
    assert failed == ["autoencoder's own PSNR less that, dB"]  # inf - inf of an exact first frame
    assert [(row.photo, row.bucket) for row in rows[:4]] == [
        ("photo 0", 20),
        ("photo 0", 127),
        ("photo 0", 230),
        ("photo 1", 20),
    ]
    assert list(rank_correlations(rows).values()) == pytest.approx([1] * 10)
    assert len(table(rows, 64).splitlines()) == 1 + len(BUCKETS)


def test_a_still_model_falls_short_in_every_figure_of_motion(pictures):
    _, figures = figures_of(still, pictures, 30.0)
    failed = {figure.name for figure in figures if not figure.met}
    assert {name.split(",")[0] for name in failed} == {
        "flow: smallest step from bucket to bucket",
        "flow: highest bucket over lowest",
        "flow: share of photographs with rank correlation >= 0.9",
        "flow: achieved over asked",
    }


def test_each_figure_has_its_own_bound():
    # By hand: catches means over the wrong axis, a bound turned round, asked over achieved.
    asked = {bucket: bucket_to_flow(bucket, 64) for bucket in BUCKETS}

    def figure(changes, bucket_flow=1.0, autoencoder_psnr=26.0):
        base = {"psnr": 25.0, "explained": 0.9, "sharpness": 1.0, "drift": (1.0, -2.0, 0.0)}
        rows = [
            Row(
                f"p{i}",
                bucket,
                ClipMeasures(flow=bucket_flow * asked[bucket], **{**base, **changes}),
            )
            for i in range(10)
            for bucket in BUCKETS
        ]
        return {f.name: f for f in summarize(rows, autoencoder_psnr, 64)}

    def short(*args, **kwargs):
        return [name for name, f in figure(*args, **kwargs).items() if not f.met]

    assert short({}) == []
    assert figure({})["flow: highest bucket over lowest"].value == pytest.approx(11.5)
    assert figure({})["colour drift, largest channel, of 255"].value == pytest.approx(2)
    assert short({"psnr": 21.0}, autoencoder_psnr=22.0) == [
        "first frame against the picture: PSNR, dB"
    ]
    assert short({}, autoencoder_psnr=27.0) == ["autoencoder's own PSNR less that, dB"]
    assert short({}, bucket_flow=0.4) == ["flow: achieved over asked, least"]
    assert short({}, bucket_flow=1.6) == ["flow: achieved over asked, most"]
    assert short({"explained": 0.7}) == ["variance explained by moving the frame before"]
    assert short({"sharpness": 0.4}) == ["sharpness of the last frame over the first"]
    assert short({"drift": (0.0, 0.0, -6.0)}) == ["colour drift, largest channel, of 255"]


def test_rank_correlation_counts_photographs():
    # Nine photographs follow the bucket, one runs against it: 90 % of them.
    def rows(photo, flows):
        measures = [ClipMeasures(25.0, flow, 0.9, 1.0, (0.0, 0.0, 0.0)) for flow in flows]
        return [Row(photo, b, m) for b, m in zip(BUCKETS, measures, strict=True)]

    good = [row for i in range(9) for row in rows(f"p{i}", (0.1, 0.8, 1.4))]
    figures = {f.name: f for f in summarize(good + rows("bad", (1.4, 0.8, 0.1)), 25.0, 64)}
    share = figures["flow: share of photographs with rank correlation >= 0.9"]
    assert share.value == pytest.approx(0.9)
    assert share.met


def test_report_and_sheet(pictures, tmp_path):
    pairs = list(evaluate(pan, pictures, BUCKETS))
    rows = [row for row, _ in pairs]
    evaluate_tiny.write_report(tmp_path, rows, summarize(rows, 30.0, 64))
    report = json.loads((tmp_path / "figures.json").read_text())
    assert len(report["clips"]) == 30
    assert report["figures"]["photographs"] == {"value": 10, "met": True}
    picture = pictures["photo 0"]
    sheet = np.asarray(
        evaluate_tiny.contact_sheet([(picture, pairs[0][1]), (picture, pairs[1][1])])
    )
    assert sheet.shape == (2 * 64 * 2, 8 * 64 * 2, 3)
    np.testing.assert_array_equal(sheet[:128:2, :128:2], picture)
    np.testing.assert_array_equal(sheet[128::2, -128::2], pairs[1][1][-1])


def test_command_errors_are_one_line(tmp_path, capsys):
    assert evaluate_tiny.main([str(tmp_path / "none.safetensors")]) == 2
    assert evaluate_tiny.main([str(tmp_path / "none.safetensors"), "--buckets", "20"]) == 2
    captured = capsys.readouterr()
    assert "prepare_photos" in captured.err
    assert "two or more different buckets" in captured.err
    assert len(captured.err.splitlines()) == 2
