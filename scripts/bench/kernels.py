"""Every function of :mod:`sgm.kernels` at the sizes that the U-Net has, in both forms.

Shapes: n rows, s positions, c channels.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scripts.bench.compare import relative_error
from scripts.bench.models import SEED
from scripts.bench.presets import Case, Preset
from scripts.bench.report import Results, markdown, seconds, shape
from scripts.bench.timing import Call, alternate
from sgm import kernels
from sgm.inference.settings import ModelFiles

GROUPS, EPS, HEAD, EMBEDDING_ROWS = 32, 1e-5, 64, 1
REPEAT, INNER = 9, 10
COPIED = 1 << 28  # values: more than any cache holds
Size = tuple[int, int, int]
ATTENTION = "attention over space"
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")


@dataclass(frozen=True)
class Function:
    """A function at one size.

    Attributes:
        name: its name.
        size: (n, s, c).
        call: it.
        moved: bytes, every input read once and every result written once.
    """

    name: str
    size: Size
    call: Callable[[], Any]
    moved: int


@dataclass(frozen=True)
class Row:
    """One form of a function at one size.

    Attributes:
        name: of the function.
        size: (n, s, c).
        form: ``reference`` or ``triton``; of spatial attention, PyTorch's backend.
        seconds: of every call.
        median: of those; None where there are none.
        rate: bytes a second, or for spatial attention floating-point operations.
        error: relative difference from the reference form, or from the first backend.
        failure: why there are no times.
    """

    name: str
    size: Size
    form: str
    seconds: tuple[float, ...]
    median: float | None
    rate: float | None
    error: float | None
    failure: str | None


def run(preset: Preset, files: ModelFiles, device: torch.device, results: Results) -> bool:
    """Every function on every level of the U-Net; in PyTorch's form, and on CUDA in Triton's."""
    case, copy = preset.cases[0], copy_rate(device)
    dtype = getattr(torch, case.dtypes[0])
    rows = []
    with torch.inference_mode():
        for size in levels(files.config["params"], case):
            rows += measure(size, case.frames, device, dtype)
            results.add(copy_rate=copy, kernels=rows)
    header = ["function", "size", "form", "median", "GB/s or GFLOP/s", "share of copy", "error"]
    text = f"A large copy moves {copy / 1e9:.0f} GB/s. {case.dtypes[0]}."
    results.show(f"{text}\n\n{markdown(header, (_cells(row, copy) for row in rows))}")
    return True


def levels(params: Mapping[str, Any], case: Case) -> Iterator[Size]:
    """(n, s, c) of every level of the U-Net."""
    network = params["network_config"]["params"]
    autoencoder = params["first_stage_config"]["params"]["decoder_config"]["params"]
    factor = 2 ** (len(autoencoder["ch_mult"]) - 1)
    for level, times in enumerate(network["channel_mult"]):
        h, w = (side // factor >> level for side in (case.height, case.width))
        yield case.frames * case.clips, h * w, times * network["model_channels"]


def measure(size: Size, frames: int, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """All functions at one size, and on CUDA attention over space by every backend."""
    forms: tuple[kernels.Form, ...] = ("reference", "triton")
    rows = []
    for each in functions(size, frames, device, dtype):
        chosen = forms if device.type == "cuda" else forms[:1]
        calls: dict[str, Call] = {form: partial(_in_form, form, each.call) for form in chosen}
        rows += _rows(each.name, size, calls, each.moved, device)
    if device.type == "cuda":
        rows += _attention(size, device, dtype)
    return rows


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy, counting those read and those written."""
    count = COPIED if device.type == "cuda" else COPIED // 16
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    timing = alternate({"copy": lambda: target.copy_(source)}, device, 5)["copy"]
    return 2 * source.nbytes / min(timing.seconds)


def functions(
    size: Size, frames: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Function]:
    """All functions, on tokens of this size."""
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    n, s, c = size
    x, y, delta = (normal(*size) for _ in range(3))
    weight, bias, shift = normal(c), normal(c), normal(EMBEDDING_ROWS, c)
    by_frame = normal(frames, c)
    affine = weight, bias

    def norm(x: Tensor, clip: int) -> Tensor:
        return kernels.group_norm(x, *affine, GROUPS, EPS, shift=shift, frames=clip, silu=True)

    block = x.nbytes
    yield Function("group_norm", size, lambda: norm(x, 1), 2 * block)
    yield Function("group_norm over a clip", size, lambda: norm(x, frames), 2 * block)
    yield Function(
        "residual_layer_norm",
        size,
        lambda: kernels.residual_layer_norm(x, delta, by_frame, *affine, EPS),
        4 * block,
    )
    yield Function("blend", size, lambda: kernels.blend(x, y, delta, by_frame, 0.3), 4 * block)
    qkv = normal(n, s, 3 * c)
    heads = max(1, c // HEAD)
    yield Function(
        "temporal_attention",
        size,
        lambda: kernels.temporal_attention(qkv, heads, frames),
        4 * block,
    )
    wide = normal(n, s, 8 * c)
    yield Function("geglu", size, lambda: kernels.geglu(wide), 12 * block)


def _in_form(form: kernels.Form, call: Callable[[], Any]) -> Any:
    with kernels.use(form):
        return call()


def _attention(size: Size, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Attention over space by every backend, as operations a second."""
    n, s, c = size
    heads = max(1, c // HEAD)
    qkv = torch.randn(n, s, 3, heads, c // heads, device=device, dtype=dtype)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))

    def attend(name: str) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return F.scaled_dot_product_attention(q, k, v)

    calls: dict[str, Call] = {name.lower(): partial(attend, name) for name in BACKENDS}
    return _rows(ATTENTION, size, calls, 4 * n * s * s * c, device)


def _rows(
    name: str, size: Size, calls: dict[str, Call], amount: int, device: torch.device
) -> list[Row]:
    timing = alternate(calls, device, REPEAT, inner=INNER if device.type == "cuda" else 1)
    expected, rows = None, []
    for form in calls:
        each, error = timing[form], None
        if each.median:
            result = torch.cat([part.flatten() for part in _tensors(each.result)])
            error = None if expected is None else relative_error(result, expected)
            expected = result if expected is None else expected
        rate = amount / each.median if each.median else None
        rows.append(Row(name, size, form, each.seconds, each.median, rate, error, each.failure))
    return rows


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _cells(row: Row, copy: float) -> list[str]:
    moves = row.rate and row.name != ATTENTION
    return [
        *(row.name, shape(row.size), row.form, seconds(row.median) or row.failure or ""),
        f"{row.rate / 1e9:.0f}" if row.rate else "",
        f"{row.rate / copy:.0%}" if row.rate and moves else "",
        f"{row.error:.1e}" if row.error is not None else "",
    ]
