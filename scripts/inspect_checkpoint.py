"""Say what a checkpoint is, from its headers.

    python scripts/inspect_checkpoint.py checkpoints/svd_xt.safetensors
    python scripts/inspect_checkpoint.py stable-video-diffusion-img2vid-xt/ --hash

Takes everything that sampling takes; a repository of the hub is fetched first. Exit code 2 where it
is no video model, or cannot be read.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.program import run_program, say
from sgm.errors import one_line
from sgm.inference.weights import given_weights

if TYPE_CHECKING:
    from torch import Tensor

    from sgm.checkpoint.opening import Converted

# Parts of a model: their names, and how the names of their tensors begin.
PARTS = {
    "U-Net": ("model.diffusion_model.", "unet/"),
    "autoencoder": ("first_stage_model.", "vae/"),
    "conditioner": ("conditioner.", "image_encoder/"),
}
INDENT = 14


def main(arguments: Sequence[str] | None = None) -> int:
    """Inspect what the command line names; the exit code."""
    options = parse(arguments)
    try:
        path = given_weights(options.path)
        for label, text in describe(path, options.hash):
            say(f"{label:<{INDENT}}{text}")
        if options.values:
            say(f"{'values':<{INDENT}}{check_values(path)}")
    except ValueError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Take the command line apart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="file, folder or repository of the Hugging Face hub")
    parser.add_argument(
        "--hash", action="store_true", help="compute the SHA-256 where it is not remembered"
    )
    parser.add_argument(
        "--values", action="store_true", help="read all values: is each of them finite?"
    )
    return parser.parse_args(arguments)


def describe(path: Path, compute_hash: bool) -> Iterator[tuple[str, str]]:
    """Facts about a checkpoint, with a label each.

    Raises:
        ValueError: it cannot be read, or is no video model.
    """
    from sgm.checkpoint import identify, known_sha256, open_checkpoint, sha256_of
    from sgm.checkpoint.opening import convert
    from sgm.convert import NATIVE, detect

    source = open_checkpoint(path)
    native = convert(source, NATIVE, partial=True)
    yield "path", str(path)
    yield "layout", detect(source.shapes)
    yield "model", " or ".join(identify(native.shapes)) or "unknown: a part of a model"
    yield "types", counts(str(tensor.dtype)[6:] for tensor in source.tensors.values())
    yield "parameters", parameters(source.tensors)
    for file in source.files:
        yield "file", f"{file.stat().st_size / 1e9:.3f} GB  {file}"
        digest = sha256_of(file) if compute_hash else known_sha256(file)
        yield "sha256", digest or "not known yet; --hash computes it"
    for key, value in source.metadata.items():
        yield "metadata", f"{key}: {value[:200]}"
    if native.conversion.absent:
        yield "without", ", ".join(native.conversion.absent)
    yield "missing", missing(native)


def counts(names: Iterable[str]) -> str:
    """How many tensors there are of each type."""
    return ", ".join(f"{name} ({count})" for name, count in Counter(names).most_common())


def parameters(tensors: "Mapping[str, Tensor]") -> str:
    """Numbers of values, in all and by part."""
    sizes = {
        part: sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(prefixes))
        for part, prefixes in PARTS.items()
    }
    sizes["other"] = sum(tensor.numel() for tensor in tensors.values()) - sum(sizes.values())
    parts = ", ".join(f"{part} {size / 1e6:.1f} M" for part, size in sizes.items() if size)
    return f"{sum(sizes.values()) / 1e6:.1f} M: {parts}"


def missing(native: "Converted") -> str:
    """The parts of a model that are not there.

    Raises:
        ValueError: of a part, some tensors are missing, or do not belong to it.
    """
    from sgm.checkpoint.opening import convert

    convert(native, "diffusers", partial=True)  # its tables know every tensor of a part
    absent = [
        part
        for part, (prefix, _) in PARTS.items()
        if not any(name.startswith(prefix) for name in native.tensors)
    ]
    return ", ".join(absent) or "nothing"


def check_values(path: Path) -> str:
    """Read all values.

    Raises:
        ValueError: some are not finite.
    """
    import torch

    from sgm.checkpoint import open_checkpoint

    source = open_checkpoint(path)
    for name, blank in source.tensors.items():
        if blank.is_floating_point() and not torch.isfinite(source.read(name)).all():
            raise ValueError(f"{path}: {name} has values that are not finite (NaN or infinity)")
    return "all finite"


if __name__ == "__main__":
    sys.exit(run_program(main))
