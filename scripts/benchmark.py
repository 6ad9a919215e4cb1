"""Measure this project against diffusers, and each of its parts by itself.

    python scripts/benchmark.py --preset tiny              the bundled model's size: seconds
    python scripts/benchmark.py --preset cpu               full width: minutes, 14 GB of memory
    python scripts/benchmark.py --preset savings           every saving, before and after, likewise
    python scripts/benchmark.py --preset gpu               the real sizes: minutes on a large GPU
    python scripts/benchmark.py --preset gpu --kernels     sgm.kernels at those sizes
    python scripts/benchmark.py --preset gpu --profile     where the time goes
    python scripts/benchmark.py --preset memory            peak memory, one process per system
    python scripts/benchmark.py --preset growth            time against frames, size and steps
    python scripts/benchmark.py --preset training          a training step of the U-Net

Both sides have the same random weights, inputs, threads and type, and are called in turn; errors
are taken against the plain networks in float32. Figures go to a JSON with what they depend on, and
to a table and a chart beside it. Exit code 1 where a target of the preset is missed.
"""

import argparse
import sys
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.bench.presets import PRESETS, SYSTEMS, Preset, small
from sgm.errors import one_line


def run(arguments: argparse.Namespace) -> bool:
    """Do what the command line asks for; returns whether all targets are met."""
    import torch

    from scripts.bench.models import model_files
    from scripts.bench.report import Results
    from sgm.device import default_device, keep_freed_memory, parse_device

    if arguments.keep_memory:
        keep_freed_memory()
    device = parse_device(arguments.device) if arguments.device else default_device()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    _silence_diffusers()
    preset, section = chosen_preset(arguments), arguments.section
    name = arguments.preset if section is None else f"{arguments.preset}-{section}"
    results = Results(name, device, arguments.out)
    action: Any = import_module(f"scripts.bench.{section or preset.section}")
    return action.run(preset, model_files(preset), device, results)


def chosen_preset(arguments: argparse.Namespace) -> Preset:
    """The preset with what the command line changes of it."""
    preset = PRESETS[arguments.preset]
    preset = small(preset) if arguments.small else preset
    if arguments.systems:
        preset = replace(preset, systems=tuple(arguments.systems))
    if arguments.limit:
        preset = replace(preset, limit=int(1e9 * arguments.limit))
    if arguments.repeat:
        cases = (
            replace(case, stages=dict.fromkeys(case.stages, arguments.repeat))
            for case in preset.cases
        )
        preset = replace(preset, cases=tuple(cases))
    return preset


def _silence_diffusers() -> None:
    """Its advice and progress bars are about other things than these."""
    try:
        import diffusers
        import transformers
    except ImportError:
        return
    libraries: tuple[Any, ...] = (diffusers, transformers)
    for library in libraries:
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="diffusers")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--device", help="default: the fastest there is")
    parser.add_argument("--out", type=Path, help="folder for JSON, table and chart")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="others than the preset's")
    parser.add_argument("--repeat", type=int, help="calls of everything, after the first")
    parser.add_argument("--threads", type=int, help="of the processor, for all systems")
    parser.add_argument("--limit", type=float, help="GB that a run of --preset memory may take")
    for section, about in (("kernels", "sgm.kernels"), ("profiling", "U-Net and decoder")):
        flag = "--profile" if section == "profiling" else f"--{section}"
        parser.add_argument(
            flag, action="store_const", const=section, dest="section", help=f"{about} instead"
        )
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="have the C library keep freed memory, for all systems, as the command line does",
    )
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for name in ("repeat", "threads", "limit"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            parser.error(f"--{name}: expected more than 0, got {value}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure from the command line."""
    arguments = parse(argv)
    try:
        return 0 if run(arguments) else 1
    except (ValueError, MemoryError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
