"""How a program prints, and how it ends when nobody takes what it prints."""

import os
import re
import signal
import sys
from collections.abc import Callable

REFUSED, READER_GONE = 2, 128 + 13  # as a shell reports a program that SIGPIPE has ended

_BREAKS = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029]")


class OutputLost(Exception):  # noqa: N818 - no error where the reader has merely gone
    """Standard output takes no more; the cause is what the system said."""

    @property
    def reader_gone(self) -> bool:
        """Whether nobody reads it any more, as after ``| head -1``."""
        return isinstance(self.__cause__, BrokenPipeError)


def say(*lines: str) -> None:
    """Print lines on standard output, at once; without any, only what waits to be printed.

    Control characters, as a file's name may hold, are escaped: each line stays one.

    Raises:
        OutputLost: they cannot be written.
    """
    text = "".join(f"{_BREAKS.sub(_escape, line)}\n" for line in lines)
    try:
        print(text, end="", flush=True)
    except OSError as error:
        raise OutputLost(f"standard output cannot be written: {error.strerror or error}") from error


def discard_output() -> None:
    """Let what is printed, and what waits to be, go nowhere from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _escape(character: re.Match[str]) -> str:
    return repr(character[0])[1:-1]


def run_program(main: Callable[[], int]) -> int:
    """Call the main function of a program, which is a process of its own.

    What standard output cannot encode is escaped, as Python does on standard error.

    Returns:
        The exit code: that of ``main``; 141 and not a word where the reader of standard output has
        gone (``| head -1``); 2 and one line where it cannot be written, as on a full disk.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # while modules were imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return main()
        finally:
            say()  # of what argparse prints, it ignores the errors
    except OutputLost as lost:
        discard_output()  # what waits is tried again at the exit
        if lost.reader_gone:
            return READER_GONE
        print(f"error: {lost}", file=sys.stderr)
        return REFUSED
