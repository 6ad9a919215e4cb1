"""Compare the approximations of ``--optimize fast`` with the exact path.

    python scripts/measure_fast.py --photos PHOTOS.safetensors --out benchmarks/results/fast.json

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

if TYPE_CHECKING:
    from sgm.inference.pictures import Picture
    from sgm.inference.pipeline import VideoPipeline

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "assets" / "sample.jpg"
STEPS = (4, 8, 25)


def compare(
    exact: "VideoPipeline", fast: "VideoPipeline", picture: "Picture", steps: int
) -> dict[str, float]:
    """Figures of one picture; dB, and ratios."""
    import numpy as np

    from sgm.data.metrics import psnr
    from sgm.inference.options import SamplingOptions
    from sgm.training.metrics import ssim

    options = SamplingOptions(num_steps=steps, seed=1)
    videos, seconds = [], []
    for pipeline in (exact, fast):
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


def measure(pictures: dict[str, "Picture"], device: str, steps: tuple[int, ...]) -> dict[str, Any]:
    """Figures by steps and picture."""
    from sgm.inference.pipeline import VideoPipeline

    exact, fast = (
        VideoPipeline.from_spec("svd_tiny", device=device, dtype="float32", optimize=optimize)
        for optimize in ("exact", "fast")
    )
    table: dict[str, Any] = {}
    for number in steps:
        for name, picture in pictures.items():
            row = compare(exact, fast, picture, number)
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
    parser.add_argument("--device", default="cpu")
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
    table = measure(pictures, arguments.device, tuple(arguments.steps))
    text = summary(table)
    print(f"\n{len(pictures)} pictures, svd_tiny, float32\n\n{text}")
    if arguments.out:
        device = torch.device(arguments.device)
        write_figures(arguments.out, device, model="svd_tiny, float32", steps=table)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
