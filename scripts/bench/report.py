"""The files that figures go to, and their tables."""

import json
import re
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.bench import machine


class Results:
    """The figures of one run.

    Args:
        name: of the files, before the device's name.
        device: that is measured.
        out: folder for JSON, table and chart; None to print alone.
    """

    def __init__(self, name: str, device: torch.device, out: Path | None) -> None:
        self.machine = machine.describe(device)
        self.name, self.out = f"{name}-{slug(self.machine['device'])}", out
        self.figures: dict[str, Any] = {
            "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "machine": self.machine,
        }

    def add(self, **figures: Any) -> None:
        """Take figures in and write all of them: a run that is cut short leaves what it has."""
        self.figures |= figures
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.figures, indent=1, default=_plain, allow_nan=False)
            (self.out / f"{self.name}.json").write_text(text + "\n", encoding="utf-8")

    def show(self, text: str, chart: str | None = None) -> None:
        """Print the tables, and write them with the chart."""
        known = {key: value for key, value in self.machine.items() if value not in (None, [])}
        about = ", ".join(
            f"{key} {' '.join(value) if isinstance(value, list) else value}"
            for key, value in known.items()
        )
        print(f"{text}\n\n{about}")
        if self.out is None:
            return
        picture = f"![chart]({self.name}.svg)\n\n" if chart else ""
        page = f"# {self.name}\n\n`{self.figures['command']}`\n\n{picture}{text}\n\n{about}.\n"
        (self.out / f"{self.name}.md").write_text(page, encoding="utf-8")
        if chart:
            (self.out / f"{self.name}.svg").write_text(chart, encoding="utf-8")


def write_figures(path: Path, device: torch.device, **figures: Any) -> None:
    """Write figures beside what they depend on, as one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine.describe(device), **figures}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def slug(text: str) -> str:
    """A name for files: ``NVIDIA H100 80GB`` becomes ``nvidia-h100-80gb``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; all columns but the first stand to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seconds(value: float | None) -> str:
    """In the unit that fits; nothing for None."""
    if value is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def gigabytes(value: int | None) -> str:
    """In units of 10^9; nothing for None."""
    return "" if value is None else f"{value / 1e9:.2f} GB"


def shape(size: Iterable[int]) -> str:
    """``25x576x1024``."""
    return "x".join(map(str, size))


def _plain(value: Any) -> Mapping[str, Any]:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"expected something that JSON has, got {type(value).__name__}")
