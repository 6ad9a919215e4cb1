"""What a run says: one JSON object on a line, by step, and the names of clips."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)


def named_clips(batch: Mapping[str, Tensor], dataset: Any = None) -> str:
    """Name the clips of a batch in a message: ``, with a.mp4, b.mp4``.

    Args:
        batch: ``index`` in it are the clips' numbers; without it there is nothing to say.
        dataset: its ``describe`` names the file of a number; without it the number stands there.
    """
    numbers = [int(i) for i in batch["index"]] if "index" in batch else []
    describe = getattr(dataset, "describe", lambda number: f"clip {number}")
    return f", with {', '.join(map(describe, numbers))}" if numbers else ""


class JsonLines:
    """Appends to a log that says each step once, also after a kill.

    Args:
        path: the file; lines past ``step`` and a last line that was cut off are dropped.
        step: the step that the run continues from.
        every: steps of a line, which gives the means over them.
    """

    def __init__(self, path: Path, step: int, every: int = 1) -> None:
        self._every, self._window = every, list[dict[str, float]]()
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
        self._file = path.open("a", buffering=1)

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, step: int, values: Mapping[str, float], **now: float) -> None:
        """Take the values of a step, and write a line where one is due; numbers keep six digits.

        Args:
            step: steps done.
            values: numbers to average.
            now: numbers to write as they are.
        """
        self._window.append(dict(values))
        if step % self._every:
            return
        # What the decoder's adversary says begins amid a window.
        means = {name: fmean(row[name] for row in self._window if name in row) for name in values}
        line = {"step": step} | {k: float(f"{v:.6g}") for k, v in (now | means).items()}
        self._window.clear()
        self._file.write(json.dumps(line) + "\n")
        logger.info("%s", line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
