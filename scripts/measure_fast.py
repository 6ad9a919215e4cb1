"""Compare an approximate level of ``--optimize`` with the exact path.

    python scripts/measure_fast.py --photos PHOTOS.safetensors --out benchmarks/results/fast.json
    python scripts/measure_fast.py --level fp8 ...

Makes a video of every photograph with the bundled model, by both, from the same noise, for several
numbers of steps: PSNR and SSIM of the frames, the motion that is kept (mean absolute difference of
neighbouring frames, over that of the exact video) and the time, both ways called in turn.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sgm.inference.levels import LEVELS
from sgm.inference.options import DTYPES

if TYPE_CHECKING:
    from sgm.inference.pictures import Picture
    from sgm.inference.pipeline import VideoPipeline

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "assets" / "sample.jpg"
STEPS = (4, 8, 25)


def compare(
    exact: "VideoPipeline", other: "VideoPipeline", picture: "Picture", steps: int
) -> dict[str, float]:
    """Figures of one picture; dB, and ratios."""
    import numpy as np

    from sgm.data.metrics import psnr
    from sgm.inference.options import SamplingOptions
    from sgm.training.metrics import ssim

    options = SamplingOptions(num_steps=steps, seed=1)
    videos, seconds = [], []
    for pipeline in (exact, other):
        began = time.perf_counter()
        videos.append(pipeline(picture, options).frames)
        seconds.append(time.perf_counter() - began)
    a, b = videos
    still = [np.abs(np.diff(video.astype(float), axis=0)).mean() for video in videos]
    return {
        "psnr": psnr(a, b),
        "ssim": fmean(ssim(x, y) for x, y in zip(a, b, strict=True)),
        "motion": still[1] / still[0],
        "time": seconds[1] / seconds[0],
    }


def measure(
    level: str, pictures: dict[str, "Picture"], device: str, dtype: str, steps: tuple[int, ...]
) -> dict[str, Any]:
    """Figures of a level by steps and picture."""
    from sgm.inference.pipeline import VideoPipeline

    exact, other = (
        VideoPipeline.from_spec("svd_tiny", device=device, dtype=dtype, optimize=optimize)
        for optimize in ("exact", level)
    )
    table: dict[str, Any] = {}
    for number in steps:
        for name, picture in pictures.items():
            row = compare(exact, other, picture, number)
            table.setdefault(str(number), {})[name] = row
            print(number, name, {key: round(value, 3) for key, value in row.items()}, flush=True)
    return table


def summary(table: dict[str, Any]) -> str:
    """Means over the pictures, of the times the median, as a Markdown table."""
    lines = [
        "| steps | PSNR, dB | lowest | SSIM | motion kept | time |",
        "|---|---|---|---|---|---|",
    ]
    for steps, rows in table.items():
        columns = {key: [row[key] for row in rows.values()] for key in ("psnr", "ssim", "motion")}
        times = median(row["time"] for row in rows.values())
        lines.append(
            f"| {steps} | {fmean(columns['psnr']):.1f} | {min(columns['psnr']):.1f} "
            f"| {fmean(columns['ssim']):.4f} | {fmean(columns['motion']):.3f} | {times:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the measurement from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--level", choices=LEVELS, default="fast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of both")
    parser.add_argument("--photos", type=Path, help="file of scripts/prepare_photos.py")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    import torch
    from PIL import Image

    from scripts.bench.report import write_figures
    from sgm.data.synthetic import read_photos
    from sgm.inference.pictures import load_picture

    pictures = {PICTURE.name: load_picture(PICTURE)}
    if arguments.photos:
        try:
            photos = read_photos(arguments.photos)
        except ValueError as error:
            parser.error(str(error))
        pictures = {
            name: load_picture(Image.fromarray(photo.movedim(0, -1).numpy()))
            for name, photo in photos.items()
        }
    how = arguments.device, arguments.dtype, tuple(arguments.steps)
    table = measure(arguments.level, pictures, *how)
    model = f"svd_tiny, {arguments.dtype}"
    print(f"\n{arguments.level}: {len(pictures)} pictures, {model}\n\n{summary(table)}")
    if arguments.out:
        device = torch.device(arguments.device)
        write_figures(arguments.out, device, model=model, level=arguments.level, steps=table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
