"""Turn pictures into videos: see ``--help``.

Everything heavy is imported late, so that help and errors in the arguments answer at once.
"""

import logging
import shutil
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports: an end without traceback

from scripts.program import run_program, say
from sgm.errors import one_line
from sgm.inference.batch import Job, Outcome, make_videos, plan_job
from sgm.inference.flags import Request, help_text, refuse_unknown
from sgm.inference.progress import ProgressLine, duration

if TYPE_CHECKING:
    from sgm.inference.pipeline import VideoPipeline

DONE, SOME_FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks.

    Args:
        arguments: without the program's name; None for those of the process.

    Returns:
        The exit code: 0 all done, 1 some input failed, 2 refused, 130 interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments):
        say(*help_text(min(100, shutil.get_terminal_size().columns)).splitlines())
        return DONE
    verbose = "--verbose" in arguments
    try:
        refuse_unknown(arguments)
        return run(parse(arguments))
    except (ValueError, MemoryError) as error:
        report(error, verbose)
        return REFUSED
    except KeyboardInterrupt:
        after_progress = "\n" if sys.stderr.isatty() else ""
        print(f"{after_progress}interrupted: only finished videos are kept", file=sys.stderr)
        return INTERRUPTED


def parse(arguments: Sequence[str]) -> Request:
    """Take the command line apart with fire, which otherwise guesses types: texts stay texts.

    Raises:
        ValueError: a flag without its value.
    """
    import fire
    from fire.decorators import SetParseFn

    def collect(*pictures: str, **flags: str) -> Request:
        return Request.from_texts(pictures, flags)

    texts = SetParseFn(str)(collect)
    request: Request = fire.Fire(texts, list(arguments), serialize=lambda _: None)
    return request


def run(request: Request) -> int:
    """Make the videos, a line for each."""
    if request.verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    job = plan_job(request)
    announce_defaults(request, job)
    line = ProgressLine(sys.stderr) if sys.stderr.isatty() else None
    failed = False
    try:
        for outcome in make_videos(job, lambda job: load(job, line), line):
            if line:
                line.clear()
            print_outcome(outcome, request.verbose)
            failed = failed or outcome.error is not None
    finally:
        if line:
            line.clear()
    return SOME_FAILED if failed else DONE


def load(job: Job, line: ProgressLine | None) -> "VideoPipeline":
    """Load the model; before that, say how long things will take."""
    from sgm.config import check_types
    from sgm.device import keep_freed_memory
    from sgm.inference.estimate import announcement, reading_seconds
    from sgm.inference.pipeline import VideoPipeline

    check_types(job.files.config, f"{job.files.config_path}: model")
    options = job.settings.options
    about = announcement(job.files, job.settings, len(job.inputs) * options.videos_per_image)
    if about:
        print(about, file=sys.stderr)
    if line:
        reading = duration(reading_seconds(job.files.weight_files()))
        line.show(f"loading {job.files.checkpoint.name}, about {reading}")
    if options.device == "cpu":
        keep_freed_memory()
    return VideoPipeline.load(job.files, options, line)


def announce_defaults(request: Request, job: Job) -> None:
    """Say which picture and model a command line without them takes."""
    if request.repeat or (request.input_path and request.version):
        return
    spec = job.files.spec
    pictures = f"{len(job.inputs)} pictures" if len(job.inputs) > 1 else job.inputs[0]
    print(f"{pictures}, with {spec.name} ({spec.about})", file=sys.stderr)


def print_outcome(outcome: Outcome, verbose: bool) -> None:
    """One line on what became of a video."""
    if outcome.error is not None:
        report(outcome.error, verbose)
    elif outcome.seconds is None:
        say(f"{outcome.path}  of {outcome.source}, there already")
    else:
        say(f"{outcome.path}  of {outcome.source}, {outcome.seconds:.1f} s")


def report(error: Exception, verbose: bool) -> None:
    """One line on an error, and where it arose if that is asked for."""
    if verbose:
        traceback.print_exception(error)
    print(f"error: {one_line(error)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_program(main))
