"""Clips encoded once: a folder of tensor files that training reads instead of frames."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

logger = logging.getLogger(__name__)


@torch.no_grad()
def encode_clips(
    engine: Any,
    dataset: Dataset[dict[str, Tensor]],
    folder: Path,
    clips: int,
    shard: int,
    workers: int,
    deadline: float | None = None,
    bfloat16: bool = False,
) -> bool:
    """Encode the first ``clips`` items by the mode of the first stage; files that exist are kept.

    A file holds ``latents`` (n, t, z, h / f, w / f), scaled, in half precision, ``first_frame``
    (n, 3, h, w) in 8 bits, and the items' numbers (n,).

    Args:
        engine: a `DiffusionEngine` whose first stage and scale factor are final.
        dataset: items with ``frames`` (t, 3, h, w) in [-1, 1] and numbers.
        folder: where the files go.
        clips: how many items.
        shard: items of a file.
        workers: processes that load ahead.
        deadline: when to stop (`time.monotonic`), or None.
        bfloat16: compute in bfloat16 under autocast.

    Returns:
        Whether all are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, clips, shard):
        path = folder / f"{first:06d}.safetensors"
        if path.exists():
            continue
        if deadline is not None and time.monotonic() > deadline:
            return False
        part = Subset(dataset, range(first, min(first + shard, clips)))
        items = DataLoader(part, batch_size=None, num_workers=workers)
        rows = [_encode(engine, item, bfloat16) for item in items]
        temporary = path.with_suffix(".part")
        save_file({key: torch.stack([row[key] for row in rows]) for key in rows[0]}, temporary)
        temporary.replace(path)
        logger.info("encoded %d of %d clips", first + len(part), clips)
    return True


def _encode(engine: Any, item: dict[str, Tensor], bfloat16: bool) -> dict[str, Tensor]:
    stage = engine.first_stage_model
    frames = item["frames"].to(next(stage.parameters()).device)
    with torch.autocast(frames.device.type, torch.bfloat16, enabled=bfloat16):
        moments, _ = stage.encode(frames, unregularized=True)
    mode = moments.float().chunk(2, dim=1)[0]
    numbers = {key: value for key, value in item.items() if key != "frames"}
    return numbers | {
        "latents": (engine.scale_factor * mode).half().cpu(),
        "first_frame": ((item["frames"][0] + 1) * 127.5).round().clamp(0, 255).byte(),
    }


class LatentClips(Dataset[dict[str, Tensor]]):
    """The clips of a folder that `encode_clips` wrote, all in memory.

    An item has ``latents`` (t, z, h / f, w / f), ``first_frame`` (3, h, w) in [-1, 1] and numbers.

    Args:
        folder: the folder.

    Raises:
        ValueError: the folder has no clips.
    """

    def __init__(self, folder: Path) -> None:
        shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
        if not shards:
            raise ValueError(f"expected encoded clips in {folder}, found none")
        self.columns = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}

    def __len__(self) -> int:
        return len(self.columns["latents"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return the item; ``index`` from 0 to length - 1."""
        item = {key: column[index] for key, column in self.columns.items()}
        return item | {"first_frame": item["first_frame"] / 127.5 - 1}
