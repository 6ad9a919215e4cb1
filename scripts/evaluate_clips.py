"""Measure models on prepared clips that they have not seen: does motion come as it is asked for?

    python scripts/evaluate_clips.py CLIPS --version svd_tiny --output outputs/clips \\
        --models bundled=checkpoints/svd_tiny.safetensors tuned=run/weights.safetensors \\
        --loras tuned=run/lora.safetensors

Every clip of the folder (made by ``scripts/prepare_videos.py``) is sampled anew by every model from
its first frame, with its frame rate and each of its own motion bucket and the others asked for.
Prints a table and writes ``figures.json`` and ``sheet.png``: for each clip a row of the real frames
and one of each model's.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log2
from pathlib import Path
from statistics import fmean, linear_regression
from typing import TYPE_CHECKING, Any

from sgm.errors import one_line

if TYPE_CHECKING:
    from sgm.data.clips import Clips
    from sgm.data.metrics import Frames
    from sgm.inference.pipeline import VideoPipeline

COLUMNS, ZOOM = 7, 2
STILL = 1e-3  # of a pixel per frame: what is slower counts as this


@dataclass(frozen=True)
class Row:
    """One clip by one model.

    Attributes:
        model: its name.
        clip: its key.
        bucket: that was asked for.
        asked: motion in pixels per frame.
        achieved: likewise.
        psnr: of the first frame against the real one, dB.
        explained: share of a frame's variance that moving the frame before explains.
    """

    model: str
    clip: str
    bucket: int
    asked: float
    achieved: float
    psnr: float
    explained: float


def sample(
    pipeline: "VideoPipeline", clips: "Clips", buckets: Sequence[int], seed: int, steps: int | None
) -> "list[tuple[Row, Frames]]":
    """Sample every clip with its own bucket first, then the others; rows lack the model's name."""
    from sgm.data.metrics import measure_clip
    from sgm.data.motion import bucket_to_flow
    from sgm.inference.options import SamplingOptions

    made = []
    for number, entry in enumerate(clips.entries):
        picture = real_frames(clips, number)[0]
        for bucket in (entry.motion_bucket_id, *buckets):
            options = SamplingOptions(
                num_frames=entry.frames,
                height=entry.height,
                width=entry.width,
                fps_id=max(round(entry.fps) - 1, 0),
                motion_bucket_id=bucket,
                num_steps=steps,
                seed=seed + number,
            )
            clip = pipeline(picture, options).frames
            found = measure_clip(clip, picture)
            asked = bucket_to_flow(bucket, min(entry.height, entry.width))
            row = Row("", entry.key, bucket, asked, found.flow, found.psnr, found.explained)
            made.append((row, clip))
    return made


def real_frames(clips: "Clips", number: int) -> "Frames":
    """A real clip (t, h, w, 3)."""
    from sgm.inference.results import to_frames

    return to_frames(clips[number]["frames"])


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """What a model's rows come to.

    ``motion error`` is the mean of ``|log2(achieved / asked)|``: 1 where motion is twice or half of
    what was asked for. The slope is that of the line of least squares from asked to achieved, 1
    where a pixel more that is asked for gives a pixel more; there is none of a single value.
    """
    from sgm.data.metrics import rank_correlation

    ratios = [log2(max(row.achieved, STILL) / max(row.asked, STILL)) for row in rows]
    asked, achieved = [row.asked for row in rows], [row.achieved for row in rows]
    slope = {}
    if len(set(asked)) > 1:
        slope["slope of motion"] = linear_regression(asked, achieved).slope
    return {
        "motion error": fmean(map(abs, ratios)),
        "motion error, pixels per frame": fmean(abs(row.achieved - row.asked) for row in rows),
        "motion over asked, geometric mean": 2 ** fmean(ratios),
        **slope,
        "rank correlation": rank_correlation(asked, achieved),
        "first frame PSNR, dB": fmean(row.psnr for row in rows),
        "explained variance": fmean(row.explained for row in rows),
    }


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Models side by side as a Markdown table."""
    names = list(next(iter(found.values())))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for model, values in found.items():
        lines.append(f"| {model} | {' | '.join(f'{values[name]:.2f}' for name in names)} |")
    return "\n".join(lines)


def contact_sheet(rows: "Sequence[Frames]") -> Any:
    """One row of frames for each clip."""
    import numpy as np
    from PIL import Image

    strips = []
    for clip in rows:
        chosen = np.linspace(0, len(clip) - 1, COLUMNS).round().astype(int)
        strips.append(np.concatenate(list(clip[chosen]), axis=1))
    sheet = np.concatenate(strips).repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)
    return Image.fromarray(sheet)


def named(pair: str) -> tuple[str, str]:
    """Split ``NAME=FILE``."""
    name, equals, file = pair.partition("=")
    if not (name and equals and file):
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, got {pair}")
    return name, file


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clips", type=Path, help="folder of prepared clips")
    parser.add_argument("--models", nargs="+", type=named, default=[], metavar="NAME=FILE")
    parser.add_argument("--loras", nargs="+", type=named, default=[], metavar="NAME=FILE")
    parser.add_argument("--version", default="svd_tiny", help="model, default: %(default)s")
    parser.add_argument("--buckets", type=int, nargs="*", default=[], help="asked for as well")
    parser.add_argument("--split", choices=("train", "heldout"), help="of the clips; default: all")
    parser.add_argument("--num_steps", type=int, help="default: the model's")
    parser.add_argument("--seed", type=int, default=0, help="of the first clip")
    parser.add_argument("--output", type=Path, default=Path("outputs/clips"))
    arguments = parser.parse_args(argv)
    if not (arguments.models or arguments.loras):
        parser.error("expected --models or --loras")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Sample, measure, print and write."""
    from sgm.data.clips import Clips
    from sgm.inference.pipeline import VideoPipeline

    clips = Clips(arguments.clips, latents=False, split=arguments.split)
    rows: list[Row] = []
    shown: dict[tuple[str, int], list[Frames]] = {}
    models: dict[str, dict[str, Any]] = {name: {"ckpt_path": f} for name, f in arguments.models}
    models |= {name: {"lora": [file]} for name, file in arguments.loras}
    for name, weights in models.items():
        pipeline = VideoPipeline.from_spec(arguments.version, **weights)
        made = sample(pipeline, clips, arguments.buckets, arguments.seed, arguments.num_steps)
        for row, clip in made:
            rows.append(Row(**asdict(row) | {"model": name}))
            shown.setdefault((row.clip, row.bucket), []).append(clip)
    found = {name: figures([row for row in rows if row.model == name]) for name in models}
    print(f"{len(clips)} clips\n\n{table(found)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = {"figures": found, "clips": [asdict(row) for row in rows]}
    (arguments.output / "figures.json").write_text(json.dumps(report, indent=1) + "\n")
    strips = []
    for number, entry in enumerate(clips.entries):
        strips += [real_frames(clips, number), *shown[entry.key, entry.motion_bucket_id]]
    contact_sheet(strips).save(arguments.output / "sheet.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    arguments = parse(argv)
    try:
        run(arguments)
    except (OSError, ValueError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
