"""What the programs that write checkpoints share: progress, interruption, the last words."""

import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from scripts.program import say
from sgm.errors import one_line
from sgm.inference.progress import ProgressLine, duration

if TYPE_CHECKING:
    from sgm.checkpoint.writing import Progress, Written

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
DONE, REFUSED, INTERRUPTED = 0, 2, 130


def run(write: "Callable[[Progress | None], tuple[Written, ...]]") -> int:
    """Write with progress on a terminal, and print what was written; the exit code.

    Args:
        write: called with what to call after each tensor, or None.
    """
    signal.signal(signal.SIGTERM, interrupt)
    line = ProgressLine(sys.stderr) if sys.stderr.isatty() else None
    try:
        written = write(shower(line) if line else None)
    except ValueError as error:
        failed, code = f"error: {one_line(error)}", REFUSED
    except KeyboardInterrupt:
        failed, code = "interrupted: nothing is left behind", INTERRUPTED
    else:
        failed, code = "", DONE
    if line:
        line.clear()
    if failed:
        print(failed, file=sys.stderr)
        return code
    for file in written:
        say(f"{file.path}  {file.size / 1e9:.3f} GB  sha256 {file.sha256}")
    return code


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
