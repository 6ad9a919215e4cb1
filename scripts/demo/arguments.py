"""What both pages take on their command lines: ``--settings FILE``, what the operator allows."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def page_parser(description: str | None = None, **how: Any) -> argparse.ArgumentParser:
    """A parser that knows the operator's file; ``how`` goes to its constructor."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, **how)
    parser.add_argument(
        "--settings", type=Path, metavar="FILE", help="YAML of what the operator allows"
    )
    return parser


def settings_file(arguments: Sequence[str] | None = None) -> Path | None:
    """The operator's file, for a page that shows an error where a program would end.

    Args:
        arguments: of the command line; None for the program's own.

    Raises:
        ValueError: an unknown argument, which must not pass for a limit.
    """
    parser = page_parser(add_help=False, exit_on_error=False)
    try:
        known, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if rest:
        raise ValueError(f"expected --settings FILE or nothing, got {' '.join(rest)}")
    return Path(known.settings) if known.settings else None
