"""Compare what decoding by parts gives with what decoding the whole gives.

    python scripts/measure_tiling.py --out benchmarks/results/tiling.json

Decodes latents that the bundled model samples from the bundled picture, those of a camera that pans
over it, and those of real clips where a folder is named (``--clips``), with the model's trained
temporal decoder. For every way of
splitting: PSNR against the whole decode (of the clip, and of its worst frame); the step across the
edges of chunks and tiles, in units of the same step in the whole decode, beside the largest such
ratio elsewhere; and how many pixels are decoded for one that is kept. Worst figures of all clips.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from sgm.inference.pipeline import VideoPipeline
    from sgm.inference.tiling import Tiling

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "assets" / "sample.jpg"
FRAMES, HEIGHT, WIDTH = 25, 128, 192
STILL = 1e-3  # steps below this, of a range of 2, are no motion whose ratio would mean something


@dataclass(frozen=True)
class Way:
    """A way of decoding: its name, what it does, where its edges are, and its work."""

    name: str
    decode: "Callable[[Tensor], Tensor]"
    frame_edges: list[int]
    column_edges: list[int] = field(default_factory=list)
    work: float = 1.0


def ways(pipeline: "VideoPipeline", shape: tuple[int, ...]) -> Iterator[Way]:
    """All ways of decoding scaled latents of a shape (t, z, h, w)."""
    import torch

    from sgm.inference.lockstep import DecoderInStep
    from sgm.inference.tiling import Tiling, decode_tiled

    engine, f = pipeline.engine, pipeline.downsampling
    t, _, h, w = shape

    def tiled(tiling: "Tiling") -> "Callable[[Tensor], Tensor]":
        return lambda z: decode_tiled(lambda part: next(engine.decode_chunks(part)), z, f, tiling)

    def split(frames: int) -> "Callable[[Tensor], Tensor]":
        return lambda z: torch.cat(list(engine.decode_chunks(z, frames)))

    for frames in (8, 14):
        yield Way(
            f"chunks of {frames}, side by side", split(frames), list(range(frames, t, frames))
        )
    for frames, overlap in ((4, 2), (6, 4), (8, 2), (8, 4), (10, 6), (12, 6)):
        edges, work = edges_of(t, frames, overlap)
        way = tiled(Tiling(frames, overlap))
        yield Way(f"chunks of {frames}, overlap {overlap}", way, edges, work=work)
    for side, overlap in ((16, 8), (24, 12)):
        columns, work = edges_of(w, side, overlap, f)
        way = tiled(Tiling(None, 0, side, overlap))
        name = f"tiles of {side}x{side} latents, overlap {overlap}"
        yield Way(name, way, [], columns, work * edges_of(h, side, overlap)[1])
    plain: Any = engine.first_stage_model.decoder
    for frames, bands in ((1, 1), (4, 4)):
        decoder = DecoderInStep(plain, frames, bands)
        way = partial(_decode_by, engine, decoder)
        yield Way(f"in step, {frames} frames, {bands} bands", way, list(range(frames, t, frames)))


def _decode_by(engine: Any, decoder: Any, z: "Tensor") -> "Tensor":
    frames: Tensor = next(engine.decode_chunks(z, None, decoder))
    return frames


def edges_of(length: int, size: int, overlap: int, scale: int = 1) -> tuple[list[int], float]:
    """First positions of all parts but the first, and how often a position is decoded."""
    from sgm.inference.tiling import split_axis

    parts = split_axis(length, size, overlap, scale)
    middles = [(a.kept.stop + b.kept.start) // 2 for a, b in pairwise(parts)]
    return middles, len(parts) * min(size, length) / length


def compare(video: "Tensor", whole: "Tensor", way: Way) -> dict[str, float]:
    """Figures of a decoded clip (t, 3, h, w) in [-1, 1]."""
    error = ((video - whole) ** 2).flatten(1).mean(1)
    figures = {"psnr": _psnr(float(error.mean())), "worst_frame_psnr": _psnr(float(error.max()))}
    for axis, dim, edges in (("time", 0, way.frame_edges), ("column", 3, way.column_edges)):
        if edges:
            ratios = _steps(video, dim) / _steps(whole, dim).clamp(min=STILL)
            at_edge = ratios[[edge - 1 for edge in edges]]
            inside = [float(r) for k, r in enumerate(ratios, 1) if k not in edges]
            figures[f"{axis}_step_at_edges"] = float(at_edge.max())
            figures[f"{axis}_step_inside"] = max(inside, default=float("nan"))
    return figures


def _psnr(mean_square: float) -> float:
    from math import inf, log10

    return 10 * log10(4 / mean_square) if mean_square else inf


def _steps(video: "Tensor", dim: int) -> "Tensor":
    """Mean absolute difference of neighbours along an axis."""
    return video.diff(dim=dim).abs().transpose(0, dim).flatten(1).mean(1)


def clips(pipeline: "VideoPipeline", folder: Path | None) -> "Iterator[tuple[str, Tensor]]":
    """Names and scaled latents (t, z, h, w)."""
    import torch

    from sgm.inference.options import SamplingOptions
    from sgm.inference.pictures import fit_picture, load_picture

    options = SamplingOptions(
        output="latents", num_frames=FRAMES, height=HEIGHT, width=WIDTH, num_steps=15
    )
    yield "sampled", pipeline(PICTURE, options)
    wide = fit_picture(load_picture(PICTURE), HEIGHT, 2 * WIDTH, "cover", "white")
    starts = (round(k + WIDTH * (k / FRAMES) ** 2 / 2) for k in range(FRAMES))
    pan = torch.stack([wide[:, :, start : start + WIDTH] for start in starts])
    yield "camera that pans", encode(pipeline, pan)
    for path in sorted(folder.iterdir()) if folder else ():
        yield path.stem, encode(pipeline, read_clip(path))


def encode(pipeline: "VideoPipeline", frames: "Tensor") -> "Tensor":
    """Frames (t, 3, h, w) in [-1, 1] -> scaled latents (t, z, h / f, w / f)."""
    import torch

    engine = pipeline.engine
    with torch.inference_mode():
        moments = engine.first_stage_model.moments(frames.to(pipeline.device))
    return engine.scale_factor * moments[:, : pipeline.latent_channels].clone()


def read_clip(path: Path) -> "Tensor":
    """The first frames of a real video, resized: (t, 3, h, w) in [-1, 1]."""
    import av
    import torch
    import torch.nn.functional as F
    from numpy import stack

    with av.open(path) as container:
        pictures = [
            frame.to_ndarray(format="rgb24")
            for _, frame in zip(range(FRAMES), container.decode(video=0), strict=False)
        ]
    frames = torch.from_numpy(stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
    return F.interpolate(frames, size=(HEIGHT, WIDTH), mode="bilinear", antialias=True)


def measure(pipeline: "VideoPipeline", folder: Path | None) -> dict[str, Any]:
    """Figures by way and clip."""
    import torch

    table: dict[str, Any] = {}
    for clip, latents in clips(pipeline, folder):
        with torch.inference_mode():
            z = latents.to(pipeline.device)
            whole = next(pipeline.engine.decode_chunks(z)).clamp(-1, 1).cpu()
            for way in ways(pipeline, tuple(z.shape)):
                video = way.decode(z).clamp(-1, 1).cpu()
                row = table.setdefault(way.name, {"work": round(way.work, 2), "clips": {}})
                row["clips"][clip] = compare(video, whole, way)
                print(clip, way.name, {k: round(v, 3) for k, v in row["clips"][clip].items()})
    return table


def summary(table: dict[str, Any]) -> str:
    """The worst figures as a Markdown table."""
    lines = [
        "| decoded | work | PSNR, dB | worst frame | step at edges / inside |",
        "|---|---|---|---|---|",
    ]
    for name, row in table.items():
        figures = list(row["clips"].values())
        least = {key: min(f[key] for f in figures) for key in ("psnr", "worst_frame_psnr")}
        axis = next((a for a in ("time", "column") if f"{a}_step_at_edges" in figures[0]), "")
        steps = [
            max(f[f"{axis}_step_{place}"] for f in figures) for place in ("at_edges", "inside")
        ]
        lines.append(
            f"| {name} | {row['work']:.2f} | {least['psnr']:.1f} | {least['worst_frame_psnr']:.1f} "
            f"| {axis}: {steps[0]:.3f} / {steps[1]:.3f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the measurement from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clips", type=Path, help="folder of videos to encode and decode as well")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.clips and not arguments.clips.is_dir():
        parser.error(f"--clips: expected a folder, got {arguments.clips}")
    import torch

    from scripts.bench.report import write_figures
    from sgm.inference.pipeline import VideoPipeline

    pipeline = VideoPipeline.from_spec("svd_tiny", device=arguments.device, dtype="float32")
    pipeline.engine.first_stage_model.to(pipeline.device, torch.float32)
    table = measure(pipeline, arguments.clips)
    print(f"\n{summary(table)}")
    if arguments.out:
        clip = f"{FRAMES} frames of {HEIGHT}x{WIDTH}"
        about = {"model": "svd_tiny, float32", "clip": clip, "ways": table}
        write_figures(arguments.out, pipeline.device, **about)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
