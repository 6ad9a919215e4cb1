"""Tensors of a file into a model, strictly, without a copy.

A model built under ``torch.device("meta")`` has no memory; its parameters become views of the
mapped file. What no file holds (non-persistent buffers) must be built with an explicit device, as
``torch.tensor(values, device="cpu")``, which the meta context leaves alone.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from sgm.checkpoint.identify import identify
from sgm.checkpoint.lora import merge, read_lora
from sgm.checkpoint.opening import open_native
from sgm.checkpoint.source import each
from sgm.util import counted

logger = logging.getLogger(__name__)

# Belongs to training or is computed: may be in the file or not, may be in the model or not.
_NOT_WEIGHTS = re.compile(
    r"(^|\.)(model_ema|loss|loss_fn)\."
    r"|(^|\.)(attn_mask|attention_mask)$"
    r"|^denoiser\.(log_)?sigmas$"
    # CLIP's text side; the image embedder builds the picture's side alone.
    r"|(^|\.)model\.(positional_embedding|text_projection|logit_scale|token_embedding\.weight"
    r"|ln_final\.(weight|bias))$"
)

# What the condition autoencoder has beside its encoder. No model uses it, and diffusers folders
# lack it: a file holds all of such a part or nothing of it.
_UNUSED = re.compile(r"conditioner\.embedders\.\d+\.encoder\.(decoder|post_quant_conv)(?=\.)")

_WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class LoadReport:
    """How the tensors of a file fit a model.

    Attributes:
        path: the file.
        loaded: keys taken from the file, in the model's order.
        missing: keys of the model that the file lacks and should have.
        unexpected: keys of the file that the model lacks.
        mismatched: (key, shape in the file, shape in the model).
        mistyped: (key, type in the file) of weights that are not in float16, bfloat16 or float32.
        absent: parts of the model that nothing uses and the file lacks.
        ignored: keys of the file that are not used, by name.
        dtype: the type of most values of the file; None for a file of empty tensors.
        file_models: what `identify` makes of the file.
        model_models: what `identify` makes of the model.
    """

    path: Path
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    mistyped: tuple[tuple[str, torch.dtype], ...]
    absent: tuple[str, ...]
    ignored: tuple[str, ...]
    dtype: torch.dtype | None
    file_models: tuple[str, ...]
    model_models: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every key of the one side has its match on the other."""
        return not (self.missing or self.unexpected or self.mismatched or self.mistyped)

    def describe(self) -> str:
        """Say in one line what does not fit, and which model the file looks like."""
        shapes = [
            f"{key}: {list(ours)} in the file, {list(theirs)} in the model"
            for key, ours, theirs in self.mismatched
        ]
        types = [f"{key}: {dtype}" for key, dtype in self.mistyped]
        counts = (
            counted(self.missing, "key", "missing"),
            counted(self.unexpected, "key", "unexpected"),
            counted(shapes, "key", "of another shape"),
            counted(types, "key", "of a type other than float16, bfloat16 and float32"),
        )
        faults = "; ".join(count for count in counts if count)
        return f"{self.path} does not fit the model: {faults}. {self._advice()}"

    def _advice(self) -> str:
        if self.missing or self.unexpected or self.mismatched:
            return self._resemblance()
        if all(dtype == torch.float64 for _, dtype in self.mistyped):
            return "Convert it with scripts/convert.py --dtype fp32."
        return "Quantised weights cannot be used: fetch the file in half or single precision."

    def _resemblance(self) -> str:
        known = _either(self.file_models)
        if not known:
            return "The file looks like no model known here."
        if self.file_models == self.model_models:
            return f"The file looks like {known}, as it should: it is incomplete or was changed."
        model = _either(self.model_models) or "another"
        return f"The file looks like {known}, the model is {model}: change the one or the other."


def load_checkpoint(
    model: nn.Module,
    path: str | PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    overlay: str | PathLike[str] | None = None,
    loras: Iterable[tuple[str | PathLike[str], float]] = (),
) -> LoadReport:
    """Give ``model`` the weights of a file or folder: all of them, and no others.

    Parameters and buffers are replaced (``requires_grad`` is kept), so make optimizers afterwards.
    Without ``dtype`` and ``device`` they are views of the mapped files, read when first used, but
    for those that another layout packs, computes, holds once for two or does not align (half of
    MindSpore's): several threads copy these. The values are therefore not looked at here:
    `scripts/convert.py` finds those that are not finite, and so does sampling.

    A part that nothing uses (the condition autoencoder's decoder) is taken out of the model where
    the file lacks it, so that the model's state dict holds no invented values.

    Args:
        model: on any device; the cheapest is meta.
        path: a checkpoint for `open_checkpoint`, in any layout, from training or published.
        dtype: the type for floating-point weights, converted one by one; None keeps the file's.
        device: where the model goes, one tensor at a time; None leaves the weights on the CPU.
        overlay: another checkpoint, such as a U-Net alone, whose tensors stand in place of those of
            ``path``.
        loras: files of low-rank updates and by how much to add each to the weights, which then are
            no views where they change; see `sgm.checkpoint.lora.read_lora`.

    Returns:
        The report; its ``ignored`` tells which keys of the file are not used.

    Raises:
        ValueError: the file cannot be read, does not fit the model, or leaves a part of it on meta.
    """
    path = Path(path)
    base = open_native(path, overlay)
    source = merge(base, [(read_lora(file, base.shapes), scale) for file, scale in loras])
    report = compare(model, source.tensors, path)
    if not report.fits:
        raise ValueError(report.describe())
    for part in report.absent:
        parent, _, name = part.rpartition(".")
        setattr(model.get_submodule(parent), name, None)
    placed = each(lambda key: _place(source.view(key), dtype, device), report.loaded)
    _separate(placed)
    model.load_state_dict(model.state_dict() | placed, strict=True, assign=True)
    _require_material(model, path)
    source.require_unchanged()
    if device is not None:
        model.to(device)
    logger.info("%s: %d tensors, %d ignored", path, len(report.loaded), len(report.ignored))
    return report


def compare(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> LoadReport:
    """Match ``tensors``, named as in the native layout, with the state dict of ``model``.

    Args:
        model: on any device, meta included.
        tensors: the weights by key; on the meta device, as only shapes and types are compared.
        path: where they come from, for the report.
    """
    state = model.state_dict()
    wanted = {key: tuple(tensor.shape) for key, tensor in state.items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    extra = [key for key in found if key not in wanted]
    absent = _unused_parts(wanted) - _unused_parts(found)
    lost = [key for key in wanted if key not in found and _part(key) not in absent]
    return LoadReport(
        path=path,
        loaded=tuple(key for key in wanted if key in found),
        missing=tuple(key for key in lost if not _NOT_WEIGHTS.search(key)),
        unexpected=tuple(key for key in extra if not _NOT_WEIGHTS.search(key)),
        mismatched=tuple(
            (key, found[key], shape)
            for key, shape in wanted.items()
            if found.get(key, shape) != shape
        ),
        mistyped=tuple(
            (key, tensors[key].dtype)
            for key, tensor in state.items()
            if key in found
            and tensor.is_floating_point()
            and tensors[key].dtype not in _WEIGHT_TYPES
        ),
        absent=tuple(sorted(absent)),
        ignored=tuple(key for key in extra if _NOT_WEIGHTS.search(key)),
        dtype=_main_dtype(tensors.values()),
        file_models=identify(found),
        model_models=identify(wanted),
    )


def _part(key: str) -> str | None:
    """The unused part of the model that a key belongs to."""
    found = _UNUSED.match(key)
    return found and found[0]


def _unused_parts(keys: Iterable[str]) -> set[str]:
    return {part for part in map(_part, keys) if part}


def _place(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """Move first and convert there: the device is the faster one."""
    if device is not None:
        tensor = tensor.to(device)
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _separate(tensors: dict[str, Tensor]) -> None:
    """Copy a tensor that is another's memory too, lest training the one change the other.

    Of a diffusers folder's one encoder two are made: sampling uses the first, mapped one.
    """
    places: set[int] = set()
    for key, tensor in tensors.items():
        if tensor.data_ptr() in places:
            tensors[key] = tensor.clone()
        places.add(tensor.data_ptr())


def _require_material(model: nn.Module, path: Path) -> None:
    named = (*model.named_parameters(), *model.named_buffers())
    empty = [name for name, tensor in named if tensor.is_meta]
    if empty:
        keys = counted(empty, "key", "without values")
        raise ValueError(
            f"{path} leaves {keys}: build non-persistent buffers with an explicit device, and "
            "parts that no file holds outside the meta device"
        )


def _main_dtype(tensors: Iterable[Tensor]) -> torch.dtype | None:
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=sizes.__getitem__, default=None)


def _either(names: Sequence[str]) -> str:
    *head, last = names or ("",)
    return f"{', '.join(head)} or {last}" if head else last
