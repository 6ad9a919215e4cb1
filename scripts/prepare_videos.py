"""Make training clips of videos: ``python scripts/prepare_videos.py SRC DST``.

SRC is a folder of videos (mp4, mkv, webm, mov, avi, gif; folders of numbered pictures) or one
video. Each is divided at its cuts and fades; the shots become clips of a fixed number of frames at
a fixed rate, cut to the nearest of the sizes. Clips that are black, flat, static or duplicates are
left out. A video that cannot be read is reported and passed over.

DST gets the clips with an index, the measured motion of each, and report/ with counts, histograms
and contact sheets. The same command continues after a stop at any moment. docs/data.md tells more.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.program import OutputLost, discard_output, run_program, say
from sgm.data.sizes import Size, parse_sizes
from sgm.errors import one_line

if TYPE_CHECKING:
    from sgm.data.collection import Collection, Selection
    from sgm.data.index import Entry
    from sgm.data.preparing import Outcome
    from sgm.training.precompute import Encoders

DONE, REFUSED, INTERRUPTED = 0, 2, 130


class Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(REFUSED, f"error: {message} (see --help)\n")


def positive(text: str) -> float:
    """Read a number above zero."""
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return number


def whole(text: str) -> int:
    """Read a number from 1 on."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return number


def several(text: str) -> int:
    """Read a number from 2 on."""
    if (number := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"expected 2 or more, got {text}")
    return number


def share(text: str) -> float:
    """Read a number from 0 to below 1."""
    if not 0 <= (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text}")
    return number


def sizes(text: str) -> tuple[Size, ...]:
    """Read sizes."""
    try:
        return parse_sizes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Take the command line apart."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="folder of videos, or one video")
    add("out", type=Path, metavar="DST", help="folder of the clips; new, empty or unfinished")
    add("--fps", type=positive, default=7.0, help="frames per second of the clips (7)")
    add("--frames", type=several, default=14, help="frames of a clip (14)")
    add(
        "--sizes",
        type=sizes,
        default="576x1024",
        metavar="HxW,...",
        help="sizes to choose from by aspect ratio (576x1024)",
    )
    add(
        "--max_upscale",
        type=positive,
        default=1.0,
        help="leave out videos that a size would magnify more (1.0)",
    )
    add("--image_fps", type=positive, help="rate of folders of pictures (that of --fps)")
    add("--min_speed", type=float, default=0.0002, help="clips below are static (0.0002)")
    add(
        "--max_text",
        type=share,
        default=1.0,
        metavar="SHARE",
        help="leave out clips that lines of text cover more of; 0.02 finds subtitles (1.0: none)",
    )
    add("--format", choices=("folder", "shards"), default="folder", help="files or tar archives")
    add("--shard_mb", type=whole, default=512, help="size of an archive (512)")
    add("--calibrate", action="store_true", help="map the median clip's motion to bucket 127")
    add("--heldout", type=share, default=0.0, help="share of the videos kept for validation (0)")
    add("--workers", type=whole, default=os.cpu_count() or 1, help="processes (one per core)")
    add("--ray", metavar="ADDRESS", help="work on a Ray cluster: auto, local or HOST:PORT")
    latents = parser.add_argument_group("latents, so that training needs no encoder")
    add = latents.add_argument
    add("--latents", action="store_true", help="compute them")
    add("--ckpt_path", metavar="FILE", help="the checkpoint whose encoders compute them")
    add("--config", metavar="YAML", help="its model, if the weights do not tell")
    add("--draws", type=whole, default=4, help="draws of the condition frame's noise (4)")
    add("--seed", type=int, default=0, help="of that noise (0)")
    add("--device", help="where to compute (the accelerator if any, else cpu)")
    args = parser.parse_args(arguments)
    if args.latents != (args.ckpt_path is not None):
        parser.error("--latents and --ckpt_path need each other")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks; give the exit code."""
    args = parse(arguments)
    try:
        work(args)
    except (OSError, ValueError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return DONE


def work(args: argparse.Namespace) -> None:
    """Prepare the videos, all or the rest of them.

    Raises:
        ValueError: something that was given is wrong.
        OSError: something cannot be written.
    """
    from sgm.data.collection import Collection
    from sgm.data.preparing import Settings

    collection = Collection(
        args.source.resolve(),
        args.out.resolve(),
        Settings(
            args.fps,
            args.frames,
            args.sizes,
            args.max_upscale,
            args.image_fps or args.fps,
            args.min_speed,
            args.max_text,
        ),
        args.format == "shards",
        args.calibrate,
        args.heldout,
    )
    if collection.complete:
        extend(collection, args)
        return
    names = collection.check()
    encoders = load_encoders(args) if args.latents else None
    facts = encoders.facts() if encoders else None
    collection.begin(facts)
    selection = collection.select(list(prepare(collection, names, args)))
    if not selection.entries:
        collection.discard()
        raise ValueError(f"no clip is left: {reasons(selection)}")
    if encoders:
        entries = encode(encoders, collection, selection.entries)
        selection = replace(selection, entries=tuple(entries))
    finish(collection, selection, args.shard_mb, facts)


def extend(collection: "Collection", args: argparse.Namespace) -> None:
    """Add latents to a complete collection, if they are asked for and not there.

    Raises:
        ValueError: it was made with other settings, or consists of archives.
    """
    from sgm.data.index import LATENTS

    entries = collection.reopen()
    if not args.latents or all(LATENTS in entry.files for entry in entries):
        tell(f"{args.out} is complete: nothing to do")
        return
    if collection.shards:
        raise ValueError(f"{args.out} has finished archives: name another folder for --latents")
    encoders = load_encoders(args)
    facts = encoders.facts()
    collection.begin(facts)
    collection.amend(encode(encoders, collection, entries), latents=facts)


def prepare(
    collection: "Collection", names: Sequence[str], args: argparse.Namespace
) -> "Iterator[Outcome]":
    """Find the clips of all videos; tell of each video."""
    if args.ray:
        from sgm.data.cluster import prepare_on_ray

        outcomes = prepare_on_ray(collection, names, args.ray)
    else:
        outcomes = collection.prepare_all(names, args.workers)
    for number, outcome in enumerate(outcomes, 1):
        faults = sum(clip.fault is not None for clip in outcome.clips)
        told = f"{len(outcome.clips) - faults} clips, {faults} left out"
        if outcome.error:
            told = f"cannot be read: {outcome.error}"
        tell(f"[{number}/{len(names)}] {outcome.name}: {told}")
        yield outcome


def load_encoders(args: argparse.Namespace) -> "Encoders":
    """Load what computes the latents: before the first video, so that it is known to work.

    Raises:
        ValueError: the weights, the configuration or the device are not there or do not fit.
    """
    from sgm.device import default_device, parse_device
    from sgm.training.precompute import Encoders

    device = parse_device(args.device) if args.device else default_device()
    return Encoders(args.ckpt_path, device, args.config, args.draws, args.seed)


def encode(
    encoders: "Encoders", collection: "Collection", entries: "Sequence[Entry]"
) -> "list[Entry]":
    """Compute the latents of all clips; give the clips with them."""
    from sgm.training.precompute import precompute

    done = []
    for entry in precompute(encoders, collection.out, entries):
        done.append(entry)
        if len(done) % 50 == 0 or len(done) == len(entries):
            tell(f"latents: {len(done)} of {len(entries)} clips")
    return done


def finish(
    collection: "Collection",
    selection: "Selection",
    shard_mb: int,
    latents: dict[str, object] | None,
) -> None:
    """Write the report and the index, and say what there is."""
    from sgm.data.report import write_report

    facts = write_report(collection, selection, latents=latents)
    collection.finish(selection, shard_mb * 10**6, latents=latents)
    tell(f"{reasons(selection)}; {facts['seconds']} s of clips")
    tell(f"{collection.out}: report/ has histograms and contact sheets")


def tell(text: str) -> None:
    """Print a line of progress; the work does not depend on whether it is read."""
    try:
        say(text)
    except OutputLost as lost:
        if not lost.reader_gone:
            raise
        discard_output()


def reasons(selection: "Selection") -> str:
    """Tell what was kept and what was left out why."""
    return ", ".join(f"{name} {count}" for name, count in selection.counts().items())


if __name__ == "__main__":
    sys.exit(run_program(main))
