"""Convert a checkpoint to another layout or type.

    python scripts/convert.py svd_xt.safetensors half.safetensors --dtype fp16
    python scripts/convert.py stable-video-diffusion-img2vid-xt/ checkpoints/svd_xt.safetensors
    python scripts/convert.py svd_xt.safetensors folder/ --to diffusers
    python scripts/convert.py svd_xt.ckpt svd_xt.safetensors        also MindSpore's .ckpt

The source may be anything that sampling takes. Tensor by tensor, so little memory is used; every
value is checked to be finite; the result is verified before it gets its name. Exit code 2 where
something is wrong, and then nothing is left behind.
"""

import argparse
import json
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
from sgm.inference.weights import given_weights

if TYPE_CHECKING:
    from sgm.checkpoint.source import Source
    from sgm.checkpoint.writing import Progress, Written

LAYOUTS = ("native", "diffusers", "mindspore")


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert what the command line names; the exit code."""
    options = parse(arguments)
    return run(partial(convert, options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Take the command line apart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="file, folder or repository of the Hugging Face hub")
    parser.add_argument("target", type=Path, help="file, or folder for diffusers")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights; default: as they are")
    parser.add_argument("--to", choices=LAYOUTS, default=LAYOUTS[0], help="default: native")
    parser.add_argument(
        "--partial", action="store_true", help="the source is a part alone, such as a U-Net"
    )
    parser.add_argument("--version", help="for --to diffusers: the model, if its name must tell")
    parser.add_argument("--config", help="for --to diffusers: the model's YAML, if it is your own")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Find the files that are meant, and refuse what can be refused without torch.

    Its import takes seconds.

    Raises:
        ValueError: in one line.
    """
    suffix = {"native": ".safetensors", "mindspore": ".ckpt"}.get(options.to)
    if suffix and options.target.suffix != suffix:
        raise ValueError(f"{options.target}: expected a name that ends in {suffix}")
    if options.partial and options.to == "diffusers":
        raise ValueError("a diffusers folder needs all parts of a model: leave --partial out")
    options.source, options.target = given_weights(options.source), user_path(options.target)


def convert(options: argparse.Namespace, progress: "Progress | None") -> "tuple[Written, ...]":
    """Write the checkpoint that is asked for.

    Raises:
        ValueError: it cannot be read, converted or written.
    """
    check(options)
    import torch

    from sgm.checkpoint import open_checkpoint
    from sgm.checkpoint.opening import convert as in_layout
    from sgm.checkpoint.writing import write_file, write_folder

    dtype = getattr(torch, DTYPES[options.dtype]) if options.dtype else None
    native = in_layout(open_checkpoint(options.source), "native", options.partial)
    folder = in_layout(native, "diffusers", options.partial)  # its tables know every tensor
    if options.to == "diffusers":
        texts = folder_texts(folder, options)
        return write_folder(folder, options.target, texts, dtype, options.force, progress)
    result = in_layout(native, options.to, options.partial)
    return write_file(result, options.target, dtype, options.force, progress)


def folder_texts(folder: "Source", options: argparse.Namespace) -> dict[str, str]:
    """The JSON files of a diffusers folder.

    Raises:
        ValueError: the model is not known, or has something that diffusers' classes cannot have.
    """
    from sgm.convert.diffusers.config import folder_configs
    from sgm.inference.settings import find_model

    model = find_model(options.version, options.config, options.source)
    configs = folder_configs(folder.shapes, model.config, model.spec.num_frames)
    return {name: json.dumps(config, indent=2) + "\n" for name, config in configs.items()}


if __name__ == "__main__":
    sys.exit(run_program(main))
