"""Systems side by side: times, memory, share of the floor, error.

On a CPU the weights of convolutions lie channels-last, for all systems alike: diffusers, which
takes weights as they are, is up to a third quicker then.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from scripts.bench.charts import bars
from scripts.bench.floor import count, fastest_rate
from scripts.bench.inputs import inputs_of
from scripts.bench.models import build_engine, lay_channels_last
from scripts.bench.presets import DIFFUSERS, Case, Preset, Target
from scripts.bench.report import Results, gigabytes, markdown, seconds
from scripts.bench.systems import System, make_system
from scripts.bench.timing import Calls, Timing, alternate, give_back
from sgm.device import full_float32, has_fast_bfloat16
from sgm.inference.levels import LEVELS
from sgm.inference.settings import ModelFiles
from sgm.models.diffusion import DiffusionEngine

REFERENCE = "reference"  # the plain networks in full float32, which errors are taken against
COMPARED = ("unet", "decode", "video")  # stages whose results are compared
DTYPES = ("float32", "float16", "bfloat16")
NAMES = {name: f"this project, {name}" for name in LEVELS} | {
    REFERENCE: "this project, plain",
    "none": "this project, plain",
    "exact": "this project",
    "exact compiled": "this project, compiled",
}


@dataclass(frozen=True)
class Row:
    """One system at one stage of one case.

    Attributes:
        case: in words.
        stage: of the run.
        dtype: of the U-Net.
        system: a level of ``--optimize``, diffusers, or the reference.
        seconds: of every call.
        median: of those; None where there are none.
        working_bytes: most memory during a call beyond what was there before; None but on CUDA.
        error: relative difference from the reference, in the Euclidean norm.
        flops: operations that cannot be left out; None where they are not counted.
        share: of the rate of large matrix products that these make.
        failure: why there are no times.
    """

    case: str
    stage: str
    dtype: str
    system: str
    seconds: tuple[float, ...]
    median: float | None
    working_bytes: int | None = None
    error: float | None = None
    flops: float | None = None
    share: float | None = None
    failure: str | None = None


def run(preset: Preset, files: ModelFiles, device: torch.device, results: Results) -> bool:
    """Measure all cases of a preset; returns whether its targets are met.

    Float32 comes first, for the reference; weights of one type are in memory at a time.
    """
    wanted = {dtype for case in preset.cases for dtype in case.dtypes if _is_fast(dtype, device)}
    measuring = _Measuring(preset, files, device, results)
    for dtype in sorted(wanted | {"float32"}, key=DTYPES.index):
        engine = build_engine(files, device, getattr(torch, dtype))
        if dtype == "float32":
            measuring.reference(engine)
        if dtype in wanted:
            measuring.systems(engine, dtype)
        del engine
        give_back()
    rows = measuring.rows
    came = verdicts(preset.targets, rows, results.machine["processor_flags"])
    results.add(targets=came)
    missing = (f"{name} is left out: {why}" for name, why in measuring.left_out.items())
    results.show("\n\n".join([table(rows), "\n".join(_lines(came)), *missing]), chart(rows))
    return all(each["met"] for each in came if each["asked"])


class _Measuring:
    """What is kept from one type to the next."""

    def __init__(
        self, preset: Preset, files: ModelFiles, device: torch.device, results: Results
    ) -> None:
        self.preset, self.files, self.device, self.results = preset, files, device, results
        self.rows: list[Row] = []
        self.rates: dict[str, float] = {}
        self.left_out: dict[str, str] = {}
        self._expected: dict[tuple[str, str], Tensor] = {}

    def reference(self, engine: DiffusionEngine) -> None:
        """The plain networks, and what they give."""
        system = make_system("none", self.files, engine, self.device, torch.float32)
        self.rates["float32"] = fastest_rate(self.device, torch.float32)
        for case in self.preset.cases:
            with inputs_of(self.files, engine, case, self.device) as given, full_float32():
                for stage, call in system.calls(given).items():
                    key = case.name, stage
                    if stage in case.stages and stage in COMPARED and key not in self._expected:
                        timing = alternate({REFERENCE: call}, self.device, 1, warmup=0)
                        if timing[REFERENCE].failure is None:
                            self._expected[key] = timing[REFERENCE].result.cpu()
                        self._add(case, stage, "float32", timing)
            self._report(case)

    def systems(self, engine: DiffusionEngine, dtype: str) -> None:
        """All systems, case by case."""
        if dtype not in self.rates:
            self.rates[dtype] = fastest_rate(self.device, getattr(torch, dtype))
        if self.device.type == "cpu":
            lay_channels_last(engine)
        made = self._made(engine, dtype)
        for case in self.preset.cases:
            if dtype in case.dtypes:
                with inputs_of(self.files, engine, case, self.device) as given:
                    calls = {name: system.calls(given) for name, system in made.items()}
                    for stage in case.stages:
                        self._stage(case, stage, dtype, calls)
                self._report(case)

    def _made(self, engine: DiffusionEngine, dtype: str) -> dict[str, System]:
        made = {}
        number = getattr(torch, dtype)
        for name in self.preset.systems:
            try:
                made[name] = make_system(name, self.files, engine, self.device, number)
            except (ImportError, ValueError) as error:  # not installed, or not for this device
                self.left_out[name] = str(error)
        return made

    def _stage(self, case: Case, stage: str, dtype: str, calls: Mapping[str, Calls]) -> None:
        chosen = {name: each[stage] for name, each in calls.items() if stage in each}
        warmup = 0 if stage == "video" else 1  # its parts are warm
        self._add(case, stage, dtype, alternate(chosen, self.device, case.stages[stage], warmup))

    def _add(self, case: Case, stage: str, dtype: str, timing: Mapping[str, Timing]) -> None:
        flops = count(self.files, case)[stage].exact if stage in COMPARED else None
        expected = self._expected.get((case.name, stage))
        for name, each in timing.items():
            error = None
            if expected is not None and each.failure is None and name != REFERENCE:
                error = relative_error(each.result, expected)
            wrong = error is not None and not math.isfinite(error)
            share = flops / self.rates[dtype] / each.median if flops and each.median else None
            self.rows.append(
                Row(
                    *(case.name, stage, dtype, name, each.seconds, each.median),
                    working_bytes=each.working_bytes,
                    error=None if wrong else error,
                    flops=flops,
                    share=share,
                    failure="the result is not finite" if wrong else each.failure,
                )
            )

    def _report(self, case: Case) -> None:
        self.results.add(rates=self.rates, left_out=self.left_out, rows=self.rows)
        print(f"{time.strftime('%H:%M:%S')} {case.name}: {len(self.rows)} rows", flush=True)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """``|result - expected| / |expected|``, in float64."""
    a, b = result.detach().cpu().double(), expected.cpu().double()
    return ((a - b).norm() / b.norm()).item()


def verdicts(
    targets: Sequence[Target], rows: Sequence[Row], flags: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Every target with the ratio that came out; None where a figure is missing.

    ``flags`` are those of the processor; a target that needs another is not ``asked``.
    """
    found = []
    for target in targets:
        system, dtype = target.against
        ours = _median(rows, target.case, target.stage, target.dtype, "exact")
        theirs = _median(rows, target.case, target.stage, dtype or target.dtype, system)
        ratio = theirs / ours if ours and theirs else None
        met, asked = bool(ratio and ratio >= target.ratio), target.needs in (None, *flags)
        found.append(asdict(target) | {"came": ratio, "met": met, "asked": asked})
    return found


def table(rows: Sequence[Row]) -> str:
    """Systems side by side."""
    header = ["case", "stage", "type", "system", "median", "min to max", "diffusers / this"]
    header += ["share of floor", "error", "working memory"]
    return markdown(header, (_cells(row, rows) for row in rows))


def chart(rows: Sequence[Row]) -> str:
    """A bar for each median; stages that only one system has are left out."""
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.median and row.system != REFERENCE:
            group = groups.setdefault(f"{row.stage}, {row.case}, {row.dtype}", {})
            group[NAMES.get(row.system, row.system)] = row.median
    return bars({title: group for title, group in groups.items() if len(group) > 1})


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    theirs = _median(rows, row.case, row.stage, row.dtype, DIFFUSERS)
    spread = f"{seconds(min(row.seconds))} to {seconds(max(row.seconds))}" if row.seconds else ""
    return [
        *(row.case, row.stage, row.dtype, NAMES.get(row.system, row.system)),
        f"**{seconds(row.median)}**" if row.median else row.failure or "",
        spread,
        f"{theirs / row.median:.2f}" if theirs and row.median else "",
        f"{row.share:.0%}" if row.share else "",
        f"{row.error:.1e}" if row.error is not None else "",
        gigabytes(row.working_bytes),
    ]


def _lines(came: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for each in came:
        system, dtype = each["against"]
        ratio = f"{each['came']:.2f}x" if each["came"] else "not measured"
        word = "met" if each["met"] else "MISSED"
        if not each["asked"]:
            word = f"no target without {each['needs']}"
        yield (
            f"- {word}: {each['stage']}, {each['case']}, "
            f"{each['dtype']}, against {NAMES.get(system, system)}, {dtype or each['dtype']}: "
            f"{ratio}, target {each['ratio']:.1f}x"
        )


def _median(rows: Sequence[Row], case: str, stage: str, dtype: str, system: str) -> float | None:
    wanted = case, stage, dtype, system
    return next(
        (row.median for row in rows if (row.case, row.stage, row.dtype, row.system) == wanted), None
    )


def _is_fast(dtype: str, device: torch.device) -> bool:
    """Whether a type is worth measuring."""
    if dtype == "float16":
        return device.type != "cpu"
    return dtype == "float32" or has_fast_bfloat16(device)
