"""Low-rank updates of a U-Net (LoRA, arXiv 2106.09685) as files, and merged into its weights.

A layer's weight W becomes ``W + scale * alpha / r * up @ down``. The file that is written is the
one that diffusers and peft write: a safetensors file of ``unet.LAYER.lora_A.weight`` (down) and
``unet.LAYER.lora_B.weight`` (up), with peft's settings as JSON in its metadata.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgm.checkpoint.identify import identify
from sgm.checkpoint.reading import is_file, open_file
from sgm.checkpoint.source import InMemory, Source
from sgm.checkpoint.writing import Written, write_file
from sgm.convert.lora import LayerNames, diffusers_names
from sgm.util import counted

# Names of a file within the folders that diffusers and peft save.
_IN_FOLDERS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_PEFT_SETTINGS = "adapter_config.json"  # that peft writes beside its file
_METADATA = "lora_adapter_metadata"  # under which diffusers writes the same in the file

_PART = re.compile(
    r"(?P<layer>.+?)\.(?:(?:lora_A|lora_down|lora\.down)(?P<down>)"
    r"|(?:lora_B|lora_up|lora\.up)(?P<up>))(?:\.default)?\.weight$"
)
_ALPHA = re.compile(r"(?P<layer>.+)\.alpha$")


@dataclass(frozen=True)
class Update:
    """A low-rank update of one layer.

    Attributes:
        down: (r, c_in), or (r, c_in, *kernel) of a convolution.
        up: (c_out, r), or (c_out, r, 1, ...).
        alpha: its weight, as a multiple of 1 / r.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that is updated."""
        return (len(self.up), *self.down.shape[1:])

    def delta(self) -> Tensor:
        """What is added to the weight, in float32 or, from such factors, float64."""
        wide = torch.promote_types(self.down.dtype, torch.float32)
        product = self.up.to(wide).flatten(1) @ self.down.to(wide).flatten(1)
        return (self.alpha / self.rank * product).view(self.shape)


Updates = Mapping[str, Update]
"""Updates by the native keys of the weights."""


def read_lora(path: str | PathLike[str], shapes: Mapping[str, Sequence[int]]) -> dict[str, Update]:
    """Read the updates of a file.

    Args:
        path: a safetensors file of diffusers, peft, kohya's scripts or this project; or the folder
            that diffusers or peft saved.
        shapes: shapes by native key of the model that is to be updated.

    Raises:
        ValueError: it cannot be read, is no such file, or does not fit the model.
    """
    source = open_file(lora_file(Path(path)))
    layers, alphas, strange = _sort(source.tensors)
    if not layers:
        looks = " or ".join(identify(source.shapes))
        raise ValueError(
            f"{path} is no LoRA file: expected tensors such as LAYER.lora_A.weight, got "
            f"{next(iter(source.tensors))}{f'; it looks like {looks}' if looks else ''}"
        )
    names = LayerNames(shapes)
    weights = {layer: names.weight(layer) for layer in layers}
    strange += [layer for layer, key in weights.items() if key is None]
    if strange:
        lost = counted(strange, "name", "unknown")
        raise ValueError(f"{path} does not fit the model: {lost}")
    settings = _Settings.of(source)
    updates = {}
    for layer, parts in layers.items():
        alpha = float(source.read(alphas[layer])) if layer in alphas else None
        updates[str(weights[layer])] = _update(source, layer, parts, settings, alpha)
    _compare(updates, shapes, source.path)
    return updates


def merge(source: Source, updates: Sequence[tuple[Updates, float]]) -> Source:
    """The tensors of a checkpoint with updates added, each computed when it is asked for.

    Args:
        source: in the native layout.
        updates: what :func:`read_lora` gave, and by how much; all are added up.
    """
    return _Merged(source, updates) if updates else source


def write_lora(
    updates: Updates,
    path: str | PathLike[str],
    keys: Iterable[str],
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> tuple[Written, ...]:
    """Write updates as diffusers and peft read them.

    Args:
        updates: by native key; all of one rank and alpha.
        path: ends in ``.safetensors``.
        keys: native keys of the model.
        dtype: the type to write; None keeps each tensor's.
        force: replace a file that is there.

    Raises:
        ValueError: nothing to write, or updates of several ranks; otherwise as in `write_file`.
    """
    forms = {(update.rank, update.alpha) for update in updates.values()}
    if len(forms) != 1:
        raise ValueError(f"expected updates of one rank and alpha to write, got {len(forms)} kinds")
    ((rank, alpha),) = forms
    names = diffusers_names(list(keys))
    tensors: dict[str, Tensor] = {}
    for key, update in updates.items():
        tensors[f"unet.{names[key]}.lora_A.weight"] = update.down
        tensors[f"unet.{names[key]}.lora_B.weight"] = update.up
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": [names[key] for key in updates]}
    prefixed = {f"unet.{name}": value for name, value in settings.items()}
    metadata = {_METADATA: json.dumps(prefixed, indent=2, sort_keys=True)}
    return write_file(InMemory(Path(path), tensors, metadata), path, dtype, force)


class _Merged(Source):
    """Another source's tensors with updates added, in their own types."""

    def __init__(self, source: Source, updates: Sequence[tuple[Updates, float]]) -> None:
        super().__init__(source.path, source.tensors, source.metadata)
        self._source, self._updates = source, updates

    @property
    def files(self) -> tuple[Path, ...]:
        return self._source.files

    def view(self, name: str) -> Tensor:
        return self._updated(name, self._source.view(name))

    def read(self, name: str) -> Tensor:
        return self._updated(name, self._source.read(name))

    def _updated(self, name: str, weight: Tensor) -> Tensor:
        deltas = [scale * each[name].delta() for each, scale in self._updates if name in each]
        if not deltas:
            return weight
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return sum(deltas, wide).to(weight.dtype)

    def require_unchanged(self) -> None:
        self._source.require_unchanged()


def lora_file(path: Path) -> Path:
    """The file of updates that a path means, which may be a folder of diffusers or peft.

    Raises:
        ValueError: the folder has none.
    """
    if is_file(path) or not path.is_dir():
        return path
    found = [path / name for name in _IN_FOLDERS if (path / name).is_file()]
    if not found:
        raise ValueError(f"expected {' or '.join(_IN_FOLDERS)} in the folder {path}, found none")
    return found[0]


Parts = dict[str, str]
"""Names of a layer's tensors in the file, by ``down`` and ``up``."""


def _sort(names: Iterable[str]) -> tuple[dict[str, Parts], dict[str, str], list[str]]:
    """Tensors by layer and part, those of alphas by layer, and the others."""
    layers: dict[str, Parts] = defaultdict(dict)
    alphas, strange = {}, []
    for name in names:
        if match := _PART.match(name):
            layers[match["layer"]]["up" if match["down"] is None else "down"] = name
        elif match := _ALPHA.match(name):
            alphas[match["layer"]] = name
        else:
            strange.append(name)
    return layers, alphas, strange


def _update(
    source: Source, layer: str, parts: Parts, settings: "_Settings", alpha: float | None
) -> Update:
    if parts.keys() != {"down", "up"}:
        raise ValueError(f"{source.path}: {layer} has half of an update, {next(iter(parts))}")
    down, up = source.read(parts["down"]), source.read(parts["up"])
    if min(down.ndim, up.ndim) < 2:
        raise ValueError(f"{source.path}: expected matrices for {layer}, got {list(down.shape)}")
    rank = len(down)
    return Update(down, up, settings.alpha(layer, rank) if alpha is None else alpha)


def _compare(updates: Updates, shapes: Mapping[str, Sequence[int]], path: Path) -> None:
    wrong = [
        f"{key}: {list(update.shape)} of ranks {update.rank} and {update.up.shape[1]} in the file, "
        f"{list(shapes[key])} in the model"
        for key, update in updates.items()
        if update.shape != tuple(shapes[key]) or update.up.shape[1] != update.rank
    ]
    if wrong:
        raise ValueError(f"{path} does not fit the model: {counted(wrong, 'update', 'misshapen')}")


class _Settings:
    """What peft's settings say of alpha, which is the rank where nothing is said.

    Args:
        values: peft's ``LoraConfig`` as a mapping.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._alpha: float | None = values.get("lora_alpha")
        self._by_layer: Mapping[str, float] = values.get("alpha_pattern") or {}
        self._root = bool(values.get("use_rslora"))

    @classmethod
    def of(cls, source: Source) -> "_Settings":
        """The settings in a file, or beside it.

        Raises:
            ValueError: they are no JSON, or say that the update is of another kind.
        """
        beside = source.path.with_name(_PEFT_SETTINGS)
        text = source.metadata.get(_METADATA) or (beside.read_text() if beside.is_file() else "{}")
        try:
            values = {key.removeprefix("unet."): value for key, value in json.loads(text).items()}
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{source.path}: its settings are no JSON: {error}") from error
        if values.get("use_dora"):
            raise ValueError(f"{source.path} is a DoRA file: expected LoRA without magnitudes")
        return cls(values)

    def alpha(self, layer: str, rank: int) -> float:
        """The alpha of a layer, such that its weight is alpha / rank."""
        by_layer = (
            alpha
            for pattern, alpha in self._by_layer.items()
            if re.match(rf"(.*\.)?({pattern})$", layer)
        )
        alpha = float(next(by_layer, rank if self._alpha is None else self._alpha))
        return alpha * rank**0.5 if self._root else alpha  # arXiv 2312.03732
