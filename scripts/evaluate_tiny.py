"""Measure a model on photographs it has not seen: fidelity, motion, coherence, sharpness, colour.

Make the photographs' file by ``scripts/prepare_photos.py`` first, then::

    python scripts/evaluate_tiny.py test.safetensors --output outputs/evaluation

prints a table and writes ``figures.json``, and ``bucket_N.png`` for each motion bucket: a row per
photograph, which is the input picture and seven frames of its video. The exit code is 1 where a
figure falls short.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from sgm.data.evaluation import BUCKETS, Figure, Row, evaluate, summarize, table
from sgm.data.metrics import Frames, psnr
from sgm.data.synthetic import read_photos
from sgm.errors import one_line
from sgm.inference.options import SamplingOptions
from sgm.inference.pictures import fit_picture, load_picture
from sgm.inference.results import to_frames

if TYPE_CHECKING:
    from sgm.inference import VideoPipeline

COLUMNS = 7
ZOOM = 2


def reconstruct(pipeline: "VideoPipeline", picture: Frames, frames: int) -> Frames:
    """Return the first frame of a still clip of the picture, encoded and decoded.

    The condition encoder encodes, the one that sampling uses; its latents are the mode, unscaled.
    """
    engine, conditioner = pipeline.engine, pipeline.engine.conditioner
    x = torch.from_numpy(picture).movedim(-1, 0)[None] / 127.5 - 1
    with torch.no_grad():
        encode = conditioner.embedders[conditioner.input_keys.index("cond_frames")]
        latent = engine.scale_factor * encode(x.to(pipeline.device))
    chunks = engine.decode_chunks(latent.repeat(frames, 1, 1, 1), None, pipeline.placement.decoder)
    return to_frames(next(chunks)[0])


def contact_sheet(picture_rows: Sequence[tuple[Frames, Frames]]) -> Image.Image:
    """Draw (picture, clip) pairs as one row each: the picture, then frames of the clip."""
    rows = []
    for picture, clip in picture_rows:
        chosen = np.linspace(0, len(clip) - 1, COLUMNS).round().astype(int)
        rows.append(np.concatenate([picture, *clip[chosen]], axis=1))
    sheet = np.concatenate(rows, axis=0)
    return Image.fromarray(sheet.repeat(ZOOM, axis=0).repeat(ZOOM, axis=1))


def write_report(folder: Path, rows: Sequence[Row], figures: Sequence[Figure]) -> None:
    """Write figures.json: the judged figures and every clip's measures."""
    report = {
        "figures": {f.name.strip(): {"value": f.value, "met": f.met} for f in figures},
        "clips": [
            {"photo": row.photo, "bucket": row.bucket, **asdict(row.measures)} for row in rows
        ],
    }
    (folder / "figures.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, help="tensor file of uint8 photographs")
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluation"))
    parser.add_argument("--version", default="svd_tiny", help="model, default: %(default)s")
    parser.add_argument("--ckpt-path", type=Path, help="weights, default: the model's own")
    parser.add_argument("--buckets", type=int, nargs="+", default=list(BUCKETS))
    parser.add_argument("--seed", type=int, default=23, help="of the first photograph")
    parser.add_argument("--limit", type=int, help="take the first so many photographs")
    parser.add_argument("--num-steps", type=int, help="sampling steps, default: the model's")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Figure]:
    """Make and measure the clips; print and write the figures."""
    if len(set(args.buckets)) < 2:
        raise ValueError(f"expected two or more different buckets, got {args.buckets}")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    photos = dict(list(read_photos(args.photos).items())[: args.limit])
    args.output.mkdir(parents=True, exist_ok=True)
    from sgm.inference import VideoPipeline  # after the arguments are known to be good

    pipeline = VideoPipeline.from_spec(args.version, ckpt_path=args.ckpt_path)
    options = SamplingOptions(num_steps=args.num_steps)

    def generate(picture: Frames, bucket: int, number: int) -> Frames:
        asked = options.replace(motion_bucket_id=bucket, seed=args.seed + number)
        return pipeline(picture, asked).frames

    stored = {name: photo.movedim(0, -1).numpy() for name, photo in photos.items()}
    t, height, width, _ = generate(next(iter(stored.values())), args.buckets[0], 0).shape
    pictures = {
        name: to_frames(fit_picture(load_picture(photo), height, width))
        for name, photo in stored.items()
    }
    kept = [psnr(reconstruct(pipeline, picture, t), picture) for picture in pictures.values()]

    rows: list[Row] = []
    sheets: dict[int, list[tuple[Frames, Frames]]] = {bucket: [] for bucket in args.buckets}
    start = time.monotonic()
    for row, clip in evaluate(generate, pictures, args.buckets):
        rows.append(row)
        sheets[row.bucket].append((pictures[row.photo], clip))
        seconds = (time.monotonic() - start) / len(rows)
        print(
            f"{row.photo:<32} bucket {row.bucket:>3}  flow {row.measures.flow:.2f}  {seconds:.1f} s"
        )
    figures = summarize(rows, float(np.mean(kept)), min(height, width))

    for bucket, pairs in sheets.items():
        contact_sheet(pairs).save(args.output / f"bucket_{bucket}.png")
    write_report(args.output, rows, figures)
    print(table(rows, min(height, width)), *figures, sep="\n")
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; give the exit code."""
    try:
        figures = run(parse(argv))
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0 if all(figure.met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
