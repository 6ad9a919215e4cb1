"""Pictures among the clips: single frames keep what a model knows of pictures while it learns
motion (joint training, as in arXiv 2311.15127, section 4.2)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from sgm.config import build

OVER_TIME = ("frames", "latents")


class WithPictures(Dataset[dict[str, Tensor]]):
    """A dataset of clips, and first frames of its clips as clips of one frame.

    Batches are of one shape, so that some are of pictures alone; what trains on them passes layers
    over time through.

    Args:
        dataset: config of the clips.
        share: of the items that are pictures, at least 0 and below 1.

    Attributes:
        groups: numbers of the items of each shape.

    Raises:
        ValueError: another share, or what the dataset refuses.
    """

    def __init__(self, dataset: Mapping[str, Any], share: float) -> None:
        if not 0.0 <= share < 1.0:
            raise ValueError(f"expected a share of pictures of at least 0 and below 1, got {share}")
        self.clips = build(dataset, "data.dataset.params.dataset")
        self.count = len(self.clips)
        self.pictures = round(self.count * share / (1.0 - share))
        clips = getattr(self.clips, "groups", [range(self.count)])
        numbers: dict[int, list[int]] = {clip: [] for clip in range(self.count)}
        for i in range(self.count, len(self)):
            numbers[self._clip(i)].append(i)
        pictures = ([i for clip in group for i in numbers[clip]] for group in clips)
        self.groups: Sequence[Sequence[int]] = [*clips, *filter(None, pictures)]

    def __len__(self) -> int:
        return self.count + self.pictures

    def _clip(self, index: int) -> int:
        """The clip of an item; pictures are of clips evenly spread over the dataset."""
        picture = index - self.count
        return index if picture < 0 else picture * self.count // self.pictures

    def describe(self, index: int) -> str:
        """Say where an item comes from, for messages."""
        describe = getattr(self.clips, "describe", lambda clip: f"clip {clip}")
        return str(describe(self._clip(index)))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return the item; ``index`` from 0 to length - 1."""
        item = dict(self.clips[self._clip(index)])
        if index >= self.count:
            item |= {key: item[key][:1] for key in OVER_TIME if key in item}
        if "index" in item:
            item["index"] = item["index"].new_tensor(index)
        return item
