"""A model's figures over photographs and motion buckets, and what is wanted of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sgm.data.metrics import ClipMeasures, Frames, measure_clip, rank_correlation
from sgm.data.motion import bucket_to_flow

BUCKETS = (20, 75, 127, 180, 230)

Generate = Callable[[Frames, int, int], Frames]
"""(picture, bucket, number of the picture) -> clip (t, h, w, 3) of the picture's size."""


@dataclass(frozen=True)
class Row:
    """The measures of one clip."""

    photo: str
    bucket: int
    measures: ClipMeasures


@dataclass(frozen=True)
class Figure:
    """One figure and the closed range that it should lie in."""

    name: str
    value: float
    low: float = -np.inf
    high: float = np.inf

    @property
    def met(self) -> bool:
        """Whether the value is in the range."""
        return self.low <= self.value <= self.high

    def __str__(self) -> str:
        bounds = [f">= {self.low:g}"] * bool(np.isfinite(self.low))
        bounds += [f"<= {self.high:g}"] * bool(np.isfinite(self.high))
        verdict = "ok" if self.met else "SHORT"
        return f"{self.name:<58}{self.value:>8.2f}   {' and '.join(bounds):<18}{verdict}"


def evaluate(
    generate: Generate, pictures: Mapping[str, Frames], buckets: Sequence[int] = BUCKETS
) -> Iterator[tuple[Row, Frames]]:
    """Make and measure a clip of every picture with every bucket; give each as it comes."""
    for number, (photo, picture) in enumerate(pictures.items()):
        for bucket in buckets:
            clip = generate(picture, bucket, number)
            yield Row(photo, bucket, measure_clip(clip, picture)), clip


def mean(rows: Sequence[Row], name: str) -> float:
    """Return the mean of one measure."""
    return float(np.mean([getattr(row.measures, name) for row in rows]))


def by_bucket(rows: Sequence[Row], name: str) -> dict[int, float]:
    """Return the mean of one measure for each bucket, in growing order."""
    buckets = sorted({row.bucket for row in rows})
    return {bucket: mean([row for row in rows if row.bucket == bucket], name) for bucket in buckets}


def rank_correlations(rows: Sequence[Row]) -> dict[str, float]:
    """Return, for each photograph, the rank correlation of the asked and the measured flow."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        series.setdefault(row.photo, []).append((row.bucket, row.measures.flow))
    return {photo: rank_correlation(*zip(*pairs, strict=True)) for photo, pairs in series.items()}


def mean_drift(rows: Sequence[Row]) -> list[float]:
    """Return how far each channel's mean moves in a clip, up or down, on average."""
    drift: list[float] = np.abs([row.measures.drift for row in rows]).mean(axis=0).tolist()
    return drift


def summarize(rows: Sequence[Row], autoencoder_psnr: float, short_side: int) -> list[Figure]:
    """Return the figures that the bundled model is judged by.

    Args:
        rows: all clips, each photograph with the same buckets (two or more).
        autoencoder_psnr: of the same pictures, encoded and decoded, in dB.
        short_side: of the clips in pixels.
    """
    flow = by_bucket(rows, "flow")
    flows = list(flow.values())
    ratios = [flow[bucket] / bucket_to_flow(bucket, short_side) for bucket in flow]
    steps = [after - before for before, after in pairwise(flows)]
    ranks = rank_correlations(rows).values()
    followed = sum(rank > 0.9 - 1e-9 for rank in ranks) / len(ranks)
    psnr = mean(rows, "psnr")
    return [
        Figure("photographs", len(ranks), low=10),
        Figure("first frame against the picture: PSNR, dB", psnr, low=22),
        Figure("autoencoder's own PSNR, dB", autoencoder_psnr),
        Figure("autoencoder's own PSNR less that, dB", autoencoder_psnr - psnr, high=1.5),
        Figure("flow: smallest step from bucket to bucket, px/frame", min(steps), low=1e-6),
        Figure("flow: highest bucket over lowest", flows[-1] / max(flows[0], 1e-6), low=1.6),
        Figure("flow: share of photographs with rank correlation >= 0.9", followed, low=0.8),
        Figure("flow: achieved over asked, least", min(ratios), low=0.5),
        Figure("flow: achieved over asked, most", max(ratios), high=1.5),
        Figure("variance explained by moving the frame before", mean(rows, "explained"), low=0.8),
        Figure("sharpness of the last frame over the first", mean(rows, "sharpness"), 0.5, 1.5),
        Figure("colour drift, largest channel, of 255", max(mean_drift(rows)), high=5),
    ]


def table(rows: Sequence[Row], short_side: int) -> str:
    """Return the means per bucket as lines of text."""
    lines = ["bucket  asked   flow  ratio   PSNR  explained  sharpness"]
    means = [by_bucket(rows, name) for name in ("flow", "psnr", "explained", "sharpness")]
    for bucket, flow in means[0].items():
        asked = bucket_to_flow(bucket, short_side)
        psnr, explained, sharpness = (mean[bucket] for mean in means[1:])
        lines.append(
            f"{bucket:>6} {asked:>6.2f} {flow:>6.2f} {flow / asked:>6.2f}"
            f" {psnr:>6.2f} {explained:>10.2f} {sharpness:>10.2f}"
        )
    return "\n".join(lines)
