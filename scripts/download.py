"""Fetch published weights: ``python scripts/download.py svd_xt``.

The file comes from the Hugging Face hub, is checked against the hub's SHA-256 and ends as
checkpoints/NAME.safetensors, where every command finds it. An interrupted download goes on where it
was when the same command is given again. Its licence is its publisher's, and is shown before.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.program import run_program, say
from sgm.errors import one_line
from sgm.inference.files import is_there, user_path
from sgm.inference.specs import SPECS, ModelSpec

DONE, REFUSED, INTERRUPTED = 0, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks; returns the exit code."""
    asked = parse(arguments)
    try:
        folder = user_path(asked.folder)
        for each in wanted(SPECS[asked.version], folder):
            download(each, folder, asked.token)
    except ValueError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return DONE


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Take the command line apart."""
    published = [name for name, spec in SPECS.items() if spec.repository]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:<22}{SPECS[name].about}" for name in published),
    )
    parser.add_argument("version", choices=published, metavar="NAME", help="a model, see below")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("checkpoints"),
        help="where the file goes (default: checkpoints)",
    )
    parser.add_argument(
        "--token",
        help="of an account that has accepted the licence (default: HF_TOKEN, or the one of "
        "'hf auth login')",
    )
    return parser.parse_args(arguments)


def wanted(spec: ModelSpec, folder: Path) -> list[ModelSpec]:
    """The model, and before it the one whose weights it builds on, if that is not there yet."""
    base = SPECS[spec.base] if spec.base else None
    if base is None or base.checkpoint or is_there(folder / f"{base.name}.safetensors"):
        return [spec]
    return [base, spec]


def download(spec: ModelSpec, folder: Path, token: str | None) -> None:
    """Fetch one file, and say what is done.

    Raises:
        ValueError: in one line.
    """
    from sgm.checkpoint.hub import look_up
    from sgm.checkpoint.hub_fetch import download
    from sgm.checkpoint.room import in_bytes

    repository = look_up(str(spec.repository), token)
    say(f"{spec.file} of {repository.page}", f"licence: {repository.licence}")
    path = download(repository, spec.file, folder / f"{spec.name}.safetensors", token)
    say(f"{path}  {in_bytes(path.stat().st_size)}  sha256 {repository.files[spec.file].sha256}")


if __name__ == "__main__":
    sys.exit(run_program(main))
