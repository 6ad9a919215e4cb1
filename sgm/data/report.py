"""What a preparation did, for the eye: histograms and contact sheets as PNG files, and JSON."""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sgm.data.collection import Collection, Selection
from sgm.data.index import VIDEO, write_whole
from sgm.data.mp4 import decode_mp4
from sgm.data.preparing import THUMBNAIL_SIDE, thumbnail
from sgm.data.quality import DUPLICATE

if TYPE_CHECKING:
    from PIL.Image import Image

CLIPS_SHOWN, FRAMES_SHOWN = 40, 7
REJECTS_SHOWN = 120

_PANEL = (420, 220)
_BACKGROUND, _INK, _BAR = "white", "black", (70, 110, 170)
_LABEL = 190

Cell = tuple[str, bytes]
"""A caption and the bytes of a picture file."""


def write_report(collection: Collection, selection: Selection, **notes: Any) -> dict[str, Any]:
    """Write ``report/`` in the output folder; return what ``report.json`` has.

    Args:
        collection: which still has its ``.work``.
        selection: what was made of it.
        notes: further entries.
    """
    folder = collection.out / "report"
    folder.mkdir(exist_ok=True)
    facts = _facts(selection) | notes
    write_whole(folder / "report.json", json.dumps(facts, indent=1) + "\n")
    _histograms(selection).save(folder / "histograms.png")
    if selection.entries:
        _kept(collection, selection).save(folder / "kept.png")
    rejected = list(_rejected(collection, selection))
    if rejected:
        _grid(_spread(rejected, REJECTS_SHOWN)).save(folder / "rejected.png")
    return facts


def _facts(selection: Selection) -> dict[str, Any]:
    entries = selection.entries
    sizes: dict[str, int] = {}
    for entry in entries:
        name = f"{entry.height}x{entry.width}"
        sizes[name] = sizes.get(name, 0) + 1
    levels = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
    return {
        "videos": len(selection.outcomes),
        "counts": selection.counts(),
        "unreadable": {o.name: o.error for o in selection.outcomes if o.error},
        "seconds": round(sum(entry.frames / entry.fps for entry in entries), 1),
        "sizes": sizes,
        "motion": asdict(selection.motion),
        "buckets": _quantiles([entry.motion_bucket_id for entry in entries], levels),
        "speeds": _quantiles([entry.speed for entry in entries], levels),
    }


def _quantiles(values: Sequence[float], levels: Sequence[float]) -> dict[str, float]:
    return {f"{q:g}": round(float(np.quantile(values, q)), 6) for q in levels} if values else {}


def _histograms(selection: Selection) -> "Image":
    from PIL import Image

    entries = selection.entries
    buckets = np.array([entry.motion_bucket_id for entry in entries])
    percent = np.array([100 * entry.speed for entry in entries])
    per_video = np.array([len(outcome.clips) for outcome in selection.outcomes])
    panels = [
        _panel("motion bucket of a clip", buckets, (0, 255)),
        _panel("speed, % of the short side per frame", percent, (0, _above(percent))),
        _panel("frames per second of a clip", np.array([entry.fps for entry in entries])),
        _panel("clips found in a video", per_video),
    ]
    w, h = _PANEL
    sheet = Image.new("RGB", (2 * w, 2 * h), _BACKGROUND)
    for number, panel in enumerate(panels):
        sheet.paste(panel, (number % 2 * w, number // 2 * h))
    return sheet


def _above(values: "np.ndarray[Any, Any]") -> float:
    """A bound that all but the last hundredth are below."""
    return float(np.quantile(values, 0.99)) * 1.05 + 1e-9 if len(values) else 1.0


def _panel(
    title: str, values: "np.ndarray[Any, Any]", bounds: tuple[float, float] | None = None
) -> "Image":
    """Draw one histogram; values beyond the bounds count in the outermost bars."""
    from PIL import Image, ImageDraw

    w, h = _PANEL
    panel = Image.new("RGB", _PANEL, _BACKGROUND)
    draw = ImageDraw.Draw(panel)
    median = f", median {np.median(values):.3g}" if len(values) else ""
    draw.text((10, 6), f"{title} ({len(values)}{median})", fill=_INK)
    if len(values):
        low, high = bounds or (min(0.0, float(values.min())), float(values.max()) + 1)
        counts, edges = np.histogram(np.clip(values, low, high), bins=32, range=(low, high))
        width = (w - 20) / len(counts)
        for i, count in enumerate(counts):
            top = h - 22 - (h - 60) * count / counts.max()
            draw.rectangle((10 + i * width, top, 9 + (i + 1) * width, h - 22), fill=_BAR)
        draw.text((10, h - 18), f"{edges[0]:.3g}", fill=_INK)
        draw.text((w - 45, h - 18), f"{edges[-1]:.3g}", fill=_INK)
        draw.text((10, 22), f"highest bar {counts.max()}", fill=_INK)
    return panel


def _kept(collection: Collection, selection: Selection) -> "Image":
    """Draw a row of frames for some clips, from the slowest to the fastest."""
    from PIL import Image, ImageDraw

    entries = _spread(sorted(selection.entries, key=lambda e: e.speed), CLIPS_SHOWN)
    rows = []
    for entry in entries:
        frames = decode_mp4(entry.files[VIDEO].read(collection.out))
        chosen = np.linspace(0, len(frames) - 1, FRAMES_SHOWN).round().astype(int)
        rows.append([_picture(thumbnail(frames[i])) for i in chosen])
    widest = max(sum(p.width + 2 for p in row) for row in rows)
    size = _LABEL + widest, len(rows) * (THUMBNAIL_SIDE + 2)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, (entry, row) in enumerate(zip(entries, rows, strict=True)):
        y = number * (THUMBNAIL_SIDE + 2)
        text = (
            f"{Path(entry.source).name[-28:]}\nat {entry.start:.2f} s, {entry.fps:g}/s\n"
            f"{entry.height}x{entry.width}\nbucket {entry.motion_bucket_id}"
        )
        draw.text((4, y + 2), text, fill=_INK)
        x = _LABEL
        for picture in row:
            sheet.paste(picture, (x, y))
            x += picture.width + 2
    return sheet


def _rejected(collection: Collection, selection: Selection) -> Iterator[Cell]:
    """Give a picture of each clip that was left out, by reason."""
    cells = []
    for outcome in selection.outcomes:
        for clip in outcome.clips:
            file = collection.rejects_of(outcome.name) / f"{clip.number:04d}.jpg"
            if clip.fault and file.is_file():
                cells.append((f"{clip.fault}: {Path(outcome.name).name}", file.read_bytes()))
    for outcome, clip in selection.duplicates:
        file = collection.clips_of(outcome.name) / f"{clip.number:04d}.mp4"
        if file.is_file():
            frames = decode_mp4(file.read_bytes())
            picture = thumbnail(frames[len(frames) // 2])
            cells.append((f"{DUPLICATE}: {Path(outcome.name).name}", picture))
    yield from sorted(cells, key=lambda cell: cell[0])


def _grid(cells: Sequence[Cell]) -> "Image":
    """Draw pictures with captions, eight in a row."""
    from PIL import Image, ImageDraw

    columns, width, height = 8, 2 * THUMBNAIL_SIDE, THUMBNAIL_SIDE + 16
    lines = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (width + 4), lines * (height + 4)), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, (caption, data) in enumerate(cells):
        x, y = number % columns * (width + 4), number // columns * (height + 4)
        draw.text((x, y), caption[:26], fill=_INK)
        picture = _picture(data)
        sheet.paste(picture.crop((0, 0, min(width, picture.width), THUMBNAIL_SIDE)), (x, y + 14))
    return sheet


def _picture(data: bytes) -> "Image":
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """Choose so many at most, evenly."""
    chosen = np.linspace(0, len(items) - 1, min(len(items), count)).round().astype(int)
    return [items[i] for i in chosen]
