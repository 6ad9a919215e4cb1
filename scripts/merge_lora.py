"""Merge LoRA files into a checkpoint.

    python scripts/merge_lora.py svd_xt.safetensors motion.safetensors merged.safetensors
    python scripts/merge_lora.py svd_xt.ckpt a.safetensors:0.8 b.safetensors merged.safetensors

The result samples as the checkpoint does with --lora. The checkpoint may be anything that sampling
takes, the LoRA files may be those of this project, diffusers, peft or kohya's scripts, each with
how much of it to add; the result is in the native layout. Tensor by tensor, so little memory is
used; it is verified before it gets its name. Exit code 2 where something is wrong, and then nothing
is left behind.
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
from sgm.inference.files import user_path
from sgm.inference.weights import given_lora, given_weights

if TYPE_CHECKING:
    from sgm.checkpoint.writing import Progress, Written


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge what the command line names; the exit code."""
    options = parse(arguments)
    return run(partial(merge, options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Take the command line apart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="file, folder or repository of the Hugging Face hub")
    parser.add_argument("loras", nargs="+", metavar="lora", help="FILE or FILE:SCALE")
    parser.add_argument("target", type=Path, help="file, ends in .safetensors")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights; default: as they are")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    return parser.parse_args(arguments)


def merge(options: argparse.Namespace, progress: "Progress | None") -> "tuple[Written, ...]":
    """Write the checkpoint that is asked for.

    Raises:
        ValueError: something cannot be read or written, or a LoRA does not fit the checkpoint.
    """
    if options.target.suffix != ".safetensors":
        raise ValueError(f"{options.target}: expected a name that ends in .safetensors")
    loras = [given_lora(each) for each in options.loras]
    checkpoint = given_weights(options.checkpoint)

    import torch

    from sgm.checkpoint import lora, open_native
    from sgm.checkpoint.writing import write_file

    source = open_native(checkpoint)
    updates = [(lora.read_lora(file, source.shapes), scale) for file, scale in loras]
    dtype = getattr(torch, DTYPES[options.dtype]) if options.dtype else None
    return write_file(
        lora.merge(source, updates), user_path(options.target), dtype, options.force, progress
    )


if __name__ == "__main__":
    sys.exit(run_program(main))
