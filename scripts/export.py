"""Make one checkpoint of a training run, to sample with.

    python scripts/export.py logs/svd_xt_finetune svd_mine.safetensors --dtype fp16
    python scripts/export.py logs/svd_xt_finetune/last.ckpt last.safetensors --no-ema

Takes the averaged weights unless told otherwise, of a run by any strategy; of a run that trained
adapters, these alone, as a LoRA file. Needs as much memory as one tensor. The result is verified
before it gets its name. Exit code 2 where something is wrong, and then nothing is left behind.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.program import run_program
from scripts.writing import DTYPES, run

if TYPE_CHECKING:
    from sgm.checkpoint.writing import Progress, Written


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the checkpoint that the command line names; the exit code."""
    options = parse(arguments)
    return run(partial(export, options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Take the command line apart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run, or a state in it (last.ckpt)")
    parser.add_argument("target", type=Path, help="the file, NAME.safetensors")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="averaged weights, or those of the last step",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights; default: as they are")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    return parser.parse_args(arguments)


def export(options: argparse.Namespace, progress: "Progress | None") -> "tuple[Written, ...]":
    """Write the file that is asked for.

    Raises:
        ValueError: it cannot be read or written.
    """
    if options.target.suffix != ".safetensors":
        raise ValueError(f"{options.target}: expected a name that ends in .safetensors")
    if not options.run.exists():
        raise ValueError(f"{options.run}: there is no such run")
    import torch

    from sgm.training.export import export

    dtype = getattr(torch, DTYPES[options.dtype]) if options.dtype else None
    asked = (options.run, options.target, options.ema, dtype, options.force)
    return export(*asked, progress=progress)


if __name__ == "__main__":
    sys.exit(run_program(main))
