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
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sgm.inference.files import user_path
from sgm.inference.progress import ProgressLine, duration
from sgm.inference.weights import given_weights

if TYPE_CHECKING:
    from sgm.checkpoint.source import Source
    from sgm.checkpoint.writing import Progress, Written

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
LAYOUTS = ("native", "diffusers", "mindspore")
DONE, REFUSED, INTERRUPTED = 0, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert what the command line names; the exit code."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, interrupt)
    line = ProgressLine(sys.stderr) if sys.stderr.isatty() else None
    try:
        check(options)
        written = convert(options, shower(line) if line else None)
    except ValueError as error:
        _clear(line)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        _clear(line)
        print("interrupted: nothing is left behind", file=sys.stderr)
        return INTERRUPTED
    _clear(line)
    for file in written:
        print(f"{file.path}  {file.size / 1e9:.3f} GB  sha256 {file.sha256}")
    return DONE


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
    """Write the checkpoint that is asked for, by options that :func:`check` let pass.

    Raises:
        ValueError: it cannot be read, converted or written.
    """
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


def shower(line: ProgressLine) -> "Progress":
    """Show on a terminal how far the conversion is."""
    began: dict[str, float] = {}

    def show(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        spent = now - began.setdefault(stage, now)
        left = f", {duration(spent * (total - done) / done)} left" if spent and done else ""
        line.show(f"{stage} {done / 1e9:.1f} of {total / 1e9:.1f} GB{left}")

    return show


def interrupt(*_: object) -> NoReturn:
    """End as Ctrl-C does, on another signal."""
    raise KeyboardInterrupt


def _clear(line: ProgressLine | None) -> None:
    if line is not None:
        line.clear()


if __name__ == "__main__":
    sys.exit(main())
