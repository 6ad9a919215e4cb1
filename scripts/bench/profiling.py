"""Where the time of a call goes, and which kind of operation is furthest from its floor."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from scripts.bench.floor import count, fastest_rate
from scripts.bench.inputs import inputs_of
from scripts.bench.models import build_engine
from scripts.bench.ours import Ours
from scripts.bench.presets import Preset
from scripts.bench.report import Results, markdown, seconds
from sgm.inference.settings import ModelFiles

ROWS = 40
# Names of operations and of CUDA kernels, in this order: what multiplies, what convolves. Attention
# is counted on the meta device, where it is two batched products.
KINDS = {
    "attention": ("attention", "flash", "fmha", "sdpa", "bmm"),
    "convolution": ("conv", "fprop", "implicit"),
    "product": ("mm", "linear", "cutlass", "nvjet", "xmma", "matmul"),
}
REST = "memory-bound"


@dataclass(frozen=True)
class Gap:
    """One kind of operation.

    Attributes:
        kind: attention, convolution, product, or all that moves memory and multiplies nothing.
        seconds: that it took.
        flops: its arithmetic.
        gap: seconds beyond its arithmetic at the rate of large matrix products.
    """

    kind: str
    seconds: float
    flops: float
    gap: float


def run(preset: Preset, files: ModelFiles, device: torch.device, results: Results) -> bool:
    """Where U-Net and decoder spend their time, and what is furthest from its floor."""
    case = preset.cases[0]
    dtype = getattr(torch, case.dtypes[0])
    engine = build_engine(files, device, dtype)
    system, flops = Ours(files, engine, device, dtype, "exact"), count(files, case)
    rate, texts, found = fastest_rate(device, dtype), [], {}
    with inputs_of(files, engine, case, device) as given:
        calls = system.calls(given)
        for stage in ("unet", "decode"):
            table, found[stage] = profiled(calls[stage], flops[stage].operations, device, rate)
            header = ["kind", "time", "GFLOP", "beyond its arithmetic"]
            cells = (
                [
                    gap.kind,
                    seconds(gap.seconds),
                    f"{gap.flops / 1e9:.0f}",
                    seconds(max(0.0, gap.gap)),
                ]
                for gap in found[stage]
            )
            title = f"## {stage}, {case.name}, {case.dtypes[0]}"
            texts.append(f"{title}\n\n{markdown(header, cells)}\n\n```\n{table}\n```")
    results.add(rate=rate, profile=found)
    results.show("\n\n".join(texts))
    return True


def profiled(
    call: Callable[[], Any], operations: Mapping[str, float], device: torch.device, rate: float
) -> tuple[str, list[Gap]]:
    """Profile a call, after another one.

    Args:
        call: what.
        operations: its floating-point operations, by operation.
        device: where.
        rate: of large matrix products, in floating-point operations a second.

    Returns:
        PyTorch's table of operations, and the kinds, the largest gap first.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with torch.inference_mode():
        call()
        with profile(activities=activities) as profiler:
            call()
            if cuda:
                torch.cuda.synchronize(device)
    events = profiler.key_averages()
    column = "self_device_time_total" if cuda else "self_cpu_time_total"
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        if not cuda or event.device_type.name == "CUDA":  # kernels, not what launched them
            seconds[kind_of(event.key)] += 1e-6 * getattr(event, column)
    flops: dict[str, float] = defaultdict(float)
    for operation, amount in operations.items():
        flops[kind_of(operation)] += amount
    gaps = [
        Gap(kind, seconds[kind], flops[kind], seconds[kind] - flops[kind] / rate)
        for kind in (*KINDS, REST)
    ]
    table = events.table(sort_by=column, row_limit=ROWS, max_name_column_width=90)
    return table, sorted(gaps, key=lambda each: -each.gap)


def kind_of(name: str) -> str:
    """Of an operation or a kernel, by its name."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(p in lower for p in parts)), REST)
