"""A collection of videos becomes a collection of clips: what is done once for all of them.

While it is made, ``.work`` in the output folder holds what became of each video; a preparation that
was stopped goes on from there. The index is written last: where it is, all is there.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from sgm.data.index import (
    INDEX,
    LATENTS,
    META,
    VIDEO,
    Entry,
    Place,
    read_index,
    write_index,
    write_whole,
)
from sgm.data.motion import LINEAR, MotionMap, calibrate
from sgm.data.preparing import Found, Outcome, Settings, key_of, prepare_video
from sgm.data.quality import DUPLICATE, Seen
from sgm.data.reading import find_videos
from sgm.data.shards import write_shards
from sgm.data.workers import Crash, map_in_processes


@dataclass(frozen=True)
class Collection:
    """Where a preparation reads and writes, and how.

    Attributes:
        source: a folder of videos, or one video.
        out: folder of the clips.
        settings: what decides about the clips of a video.
        shards: pack the clips into tar archives; else they stay files.
        calibrate: give the collection a motion map of its own; else the linear one.
        heldout: share of the videos whose clips are for validation.
    """

    source: Path
    out: Path
    settings: Settings
    shards: bool = False
    calibrate: bool = False
    heldout: float = 0.0

    @property
    def work(self) -> Path:
        """What is there only while the collection is made."""
        return self.out / ".work"

    @property
    def complete(self) -> bool:
        """Whether all is done."""
        return (self.out / INDEX).is_file()

    @property
    def _root(self) -> Path:
        return self.source.parent if self.source.is_file() else self.source

    def check(self) -> list[str]:
        """Give the names of the videos, if the work can begin or continue; write nothing.

        Raises:
            ValueError: there are no videos, the output is no folder, or has something else.
        """
        there = next(path for path in (self.out, *self.out.parents) if path.exists())
        if not there.is_dir():
            raise ValueError(
                f"the clips need a folder at {self.out}, and {there} is a file: name an empty or "
                "new folder"
            )
        if begun := self._begun():
            _require_equal(begun, self._facts(), self.out)
        elif there == self.out and any(there.iterdir()):
            raise ValueError(f"{self.out} has other files: name an empty or new folder")
        return self._names()

    def begin(self, latents: Mapping[str, Any] | None = None) -> None:
        """Make the output folder, or continue in it, as `check` allows.

        Args:
            latents: what they depend on, if they will be made.

        Raises:
            ValueError: there are latents that depend on something else.
        """
        begun = self._begun()
        before = begun.get("latents")
        if before != latents and any(self._clips.rglob(f"*.{LATENTS}")):
            raise ValueError(
                f"{self.out} has latents of {before}, asked for are {latents}: give the same "
                "--latents, --ckpt_path, --draws and --seed again, or another folder"
            )
        facts = begun | self._facts() | {"latents": latents}
        facts.setdefault("made", not self.out.exists())
        self.work.mkdir(parents=True, exist_ok=True)
        write_whole(self._note, json.dumps(facts))

    def discard(self) -> None:
        """Remove all that was written, and the output folder if it was made for it."""
        made = self._begun().get("made")
        for folder in (self._clips, self.work):
            shutil.rmtree(folder, ignore_errors=True)
        if made:
            with suppress(OSError):  # something else was put there
                self.out.rmdir()

    def reopen(self) -> list[Entry]:
        """Return the clips of a complete collection.

        Raises:
            ValueError: it was made with other settings.
        """
        _require_equal(json.loads((self.out / META).read_text()), self._facts(), self.out)
        return read_index(self.out)

    @property
    def _note(self) -> Path:
        return self.work / "settings.json"

    @property
    def _clips(self) -> Path:
        return (self.work if self.shards else self.out) / "clips"

    def _begun(self) -> dict[str, Any]:
        """What was noted where the work was begun, else nothing."""
        return json.loads(self._note.read_text()) if self._note.is_file() else {}

    def _facts(self) -> dict[str, Any]:
        return {
            "settings": json.loads(json.dumps(asdict(self.settings))),  # lists for tuples
            "format": "shards" if self.shards else "folder",
            "calibrate": self.calibrate,
            "heldout": self.heldout,
        }

    def _names(self) -> list[str]:
        if not self.source.exists():
            raise ValueError(f"no videos at {self.source}: no such file or folder")
        if self.source.is_file():
            return [self.source.name]
        found = find_videos(self.source, leave_out=self.out)
        if not found:
            raise ValueError(f"no videos in {self.source}")
        return [path.relative_to(self.source).as_posix() for path in found]

    def prepare(self, name: str) -> Outcome:
        """Prepare one video, or tell what became of it if that is done.

        Raises:
            OSError: something cannot be written.
        """
        file = self.work / "videos" / f"{key_of(name)}.json"
        if file.is_file():
            return Outcome.read(file)
        clips, rejects = self.clips_of(name), self.rejects_of(name)
        outcome = prepare_video(self._root / name, name, self.settings, clips, rejects)
        outcome.write(file)
        return outcome

    def prepare_all(self, names: Iterable[str], workers: int) -> Iterator[Outcome]:
        """Prepare videos in several processes; give what became of each as they are finished.

        Raises:
            OSError: something cannot be written.
        """
        for name, result in map_in_processes(self.prepare, names, workers):
            if isinstance(result, Crash):
                crashed = Outcome(name, error=str(result))
                crashed.write(self.work / "videos" / f"{key_of(name)}.json")
                yield crashed
            else:
                yield result

    def clips_of(self, name: str) -> Path:
        """Folder of a video's clips."""
        return self._clips / key_of(name)

    def rejects_of(self, name: str) -> Path:
        """Folder of pictures of a video's clips that are left out."""
        return self.work / "rejects" / key_of(name)

    def select(self, outcomes: Iterable[Outcome]) -> "Selection":
        """Leave out duplicates and make the entries of the clips; the order is the names'."""
        outcomes = sorted(outcomes, key=lambda outcome: outcome.name)
        seen = Seen()
        kept: list[tuple[Outcome, Found]] = []
        duplicates: list[tuple[Outcome, Found]] = []
        for outcome in outcomes:
            for clip in outcome.clips:
                if clip.fault is None:
                    new = seen.add(clip.hashes) is None
                    (kept if new else duplicates).append((outcome, clip))
        speeds = [clip.speed for _, clip in kept]
        motion = calibrate(speeds) if self.calibrate else LINEAR
        heldout = self._heldout(outcomes)
        entries = tuple(
            self._entry(outcome, clip, motion, outcome.name in heldout) for outcome, clip in kept
        )
        return Selection(tuple(outcomes), entries, tuple(duplicates), motion)

    def _heldout(self, outcomes: Sequence[Outcome]) -> set[str]:
        """Choose videos by chance that depends on their names alone."""
        names = sorted((o.name for o in outcomes if o.clips), key=lambda name: key_of(name)[-8:])
        return set(names[: ceil(self.heldout * len(names))])

    def _entry(self, outcome: Outcome, clip: Found, motion: MotionMap, heldout: bool) -> Entry:
        file = self.clips_of(outcome.name) / f"{clip.number:04d}.mp4"
        place = Place(file.relative_to(self.out).as_posix(), file.stat().st_size)
        height, width = clip.size
        return Entry(
            key=f"{outcome.key}_{clip.number:04d}",
            source=outcome.name,
            start=clip.start,
            fps=clip.fps,
            frames=self.settings.frames,
            height=height,
            width=width,
            speed=clip.speed,
            motion_bucket_id=motion.bucket(clip.speed),
            heldout=heldout,
            files={VIDEO: place},
        )

    def finish(self, selection: "Selection", shard_bytes: int, **notes: Any) -> None:
        """Write the archives if wanted, the meta data and the index; remove what is not needed.

        Args:
            selection: the clips, with all their files.
            shard_bytes: of an archive.
            notes: for the meta data.
        """
        entries = list(selection.entries)
        if self.shards:
            entries = list(write_shards(entries, self.out, shard_bytes))
        for outcome, clip in selection.duplicates:
            (self.clips_of(outcome.name) / f"{clip.number:04d}.mp4").unlink(missing_ok=True)
        motion = asdict(selection.motion)
        self._write(entries, self._facts() | {"clips": len(entries), "motion": motion} | notes)
        shutil.rmtree(self.work, ignore_errors=True)

    def amend(self, entries: Sequence[Entry], **notes: Any) -> None:
        """Write the index of a complete collection again, with more files and notes."""
        self._write(entries, json.loads((self.out / META).read_text()) | notes)
        shutil.rmtree(self.work, ignore_errors=True)

    def _write(self, entries: Sequence[Entry], meta: dict[str, Any]) -> None:
        write_whole(self.out / META, json.dumps(meta, indent=1) + "\n")
        write_index(self.out, entries)


@dataclass(frozen=True)
class Selection:
    """What was made of the videos.

    Attributes:
        outcomes: of all videos, by name.
        entries: of the clips that are kept.
        duplicates: of the clips that resemble an earlier one too much.
        motion: the map of speeds to buckets.
    """

    outcomes: tuple[Outcome, ...]
    entries: tuple[Entry, ...]
    duplicates: tuple[tuple[Outcome, Found], ...]
    motion: MotionMap

    def counts(self) -> dict[str, int]:
        """Count what was kept and what was left out for which reason."""
        counts = {"kept": len(self.entries), DUPLICATE: len(self.duplicates)}
        for outcome in self.outcomes:
            reasons = [clip.fault for clip in outcome.clips if clip.fault]
            for reason, number in [*((r, 1) for r in reasons), *outcome.left_out.items()]:
                counts[reason] = counts.get(reason, 0) + number
        return counts | {"unreadable": sum(o.error is not None for o in self.outcomes)}


def _require_equal(begun: dict[str, Any], given: dict[str, Any], out: Path) -> None:
    """Make sure that a folder was begun in the same way."""
    flat = begun["settings"] | begun
    for name, value in (given["settings"] | given).items():
        if flat.get(name) != value:
            raise ValueError(
                f"{out} was begun with {name} {flat.get(name)}, now it is {value}: give the same "
                "again, or another folder"
            )
