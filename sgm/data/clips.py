"""Prepared clips as a dataset."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.utils.data import Dataset

from sgm.data.index import LATENTS, META, VIDEO, Entry, read_index
from sgm.data.mp4 import decode_mp4

Split = Literal["train", "heldout"]


class Clips(Dataset[dict[str, Tensor]]):
    """The clips that ``scripts/prepare_videos.py`` made, as files or in tar archives.

    An item is a dictionary of ``fps_id`` (the frame rate less one), ``motion_bucket_id``, ``index``
    (the item's number) and

    - ``frames`` (t, 3, h, w) in [-1, 1], or
    - what was precomputed: ``latents`` (t, z, h / f, w / f), scaled; ``cond_latents``
      (k, z, h / f, w / f), unscaled, of the first frame with k draws of noise on it; ``cond_aug``
      (k,), the levels of that noise; ``image_embedding`` (d,) by CLIP.

    All are float32, but for the integers. Item i is the i-th line of the index, or of its lines of
    the split; of several collections, such as one video at two frame rates, the items of one come
    after those of the other. Nothing is drawn.

    Args:
        root: the folder with ``index.jsonl``, or several.
        latents: give what was precomputed; None: if it is there.
        split: ``train`` or ``heldout`` clips alone; None: all.

    Attributes:
        entries: of the items.
        folders: of the items: the collection of each.
        meta: of the collections, by their folders.

    Raises:
        ValueError: no folder is given, there is no such collection, they have no such clips, or no
            latents and these are asked for.
    """

    def __init__(
        self,
        root: str | Path | Sequence[str | Path],
        latents: bool | None = None,
        split: Split | None = None,
    ) -> None:
        if split not in ("train", "heldout", None):
            raise ValueError(f"split: expected train or heldout, got {split!r}")
        roots = [Path(each) for each in ([root] if isinstance(root, str | Path) else root)]
        if not roots:
            raise ValueError("root: expected a folder of prepared clips, or several, got none")
        items = [(folder, entry) for folder in roots for entry in read_index(folder)]
        kept = [item for item in items if split is None or item[1].heldout == (split == "heldout")]
        self.folders = [folder for folder, _ in kept]
        self.entries = [entry for _, entry in kept]
        if not self.entries:
            names = ", ".join(map(str, roots))
            raise ValueError(f"{names}: none of its {len(items)} clips is in {split or 'it'}")
        self.meta: dict[Path, Any] = {
            folder: json.loads((folder / META).read_text()) for folder in roots
        }
        there = all(LATENTS in entry.files for entry in self.entries)
        if latents and not there:
            raise ValueError(f"{root} has no latents: prepare it with --latents")
        self.latents = there if latents is None else latents

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        """Numbers of the items of each shape: those of one can make a batch."""
        shapes: dict[tuple[int, int, int], list[int]] = {}
        for index, e in enumerate(self.entries):
            shapes.setdefault((e.frames, e.height, e.width), []).append(index)
        return [shapes[shape] for shape in sorted(shapes)]

    def describe(self, index: int) -> str:
        """Say where an item comes from, for messages."""
        entry = self.entries[index]
        return f"{entry.key} ({entry.source} at {entry.start:.2f} s)"

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return the item; ``index`` from 0 to length - 1.

        Raises:
            ValueError: its file is missing or damaged.
        """
        folder, entry = self.folders[index], self.entries[index]
        try:
            item = (
                read_latents(folder, entry)
                if self.latents
                else {"frames": read_clip(folder, entry)}
            )
        except ValueError as error:
            raise ValueError(f"{self.describe(index)}: {error}") from error
        return item | {
            "fps_id": torch.tensor(max(round(entry.fps) - 1, 0)),
            "motion_bucket_id": torch.tensor(entry.motion_bucket_id),
            "index": torch.tensor(index),
        }


def read_clip(root: Path, entry: Entry) -> Tensor:
    """Return the frames (t, 3, h, w) of a clip in [-1, 1].

    Raises:
        ValueError: its file is missing or damaged.
    """
    frames = decode_mp4(entry.files[VIDEO].read(root))
    wanted = (entry.frames, entry.height, entry.width, 3)
    if frames.shape != wanted:
        raise ValueError(f"expected frames {wanted} as the index says, got {frames.shape}")
    return torch.from_numpy(frames).movedim(-1, 1).float() / 127.5 - 1


def read_latents(root: Path, entry: Entry) -> dict[str, Tensor]:
    """Return what was precomputed of a clip, in float32.

    Raises:
        ValueError: its file is missing or damaged.
    """
    try:
        tensors = load(entry.files[LATENTS].read(root))
    except SafetensorError as error:
        raise ValueError(f"its latents are damaged: {error}") from error
    return {name: tensor.float() for name, tensor in tensors.items()}
