"""Clips encoded once: a folder of tensor files that training reads instead of frames."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from sgm.util import default

logger = logging.getLogger(__name__)


@torch.no_grad()
def latent_modes(engine: Any, frames: Tensor) -> Tensor:
    """Encode frames without a draw: (n, 3, h, w) in [-1, 1] -> scaled modes (n, z, h / f, w / f).

    Args:
        engine: a `DiffusionEngine`; it says how many frames are encoded at once.
        frames: on its device.

    Returns:
        The latents in float32.
    """
    at_once = default(engine.en_and_decode_n_samples_a_time, len(frames))
    moments = [
        engine.first_stage_model.encode(part, unregularized=True)[0].float()
        for part in frames.split(at_once)
    ]
    return engine.scale_factor * torch.cat(moments).chunk(2, dim=1)[0]


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
    frames = item["frames"].to(next(engine.parameters()).device)
    with torch.autocast(frames.device.type, torch.bfloat16, enabled=bfloat16):
        modes = latent_modes(engine, frames)
    numbers = {key: value for key, value in item.items() if key != "frames"}
    return numbers | {
        "latents": modes.half().cpu(),
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
