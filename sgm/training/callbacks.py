"""Lightning callbacks: when the state is written, the log, and the end of a run before its time."""

import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from sgm.training.log import JsonLines
from sgm.training.signals import Stopped, stop_signals


class LastCheckpoint(pl.Callback):
    """Keeps ``last.ckpt``; `sgm.training.strategies.WholeFiles` writes it.

    Args:
        folder: where it stands.
        steps: optimiser steps between two writes, or None.
        minutes: time between two writes, or None.
    """

    def __init__(self, folder: Path, steps: int | None = None, minutes: float | None = 10) -> None:
        self.path = folder / "last.ckpt"
        self.steps, self.minutes = steps, minutes
        self._saved_step, self._saved_at = -1, time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Save where it is due."""
        step = trainer.global_step
        due = self.steps is not None and step % self.steps == 0
        late = self.minutes is not None and time.monotonic() - self._saved_at > 60 * self.minutes
        # Processes have clocks of their own; the first one's decides for all.
        if step != self._saved_step and trainer.strategy.broadcast(due or late):
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Save the end of the run."""
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        trainer.save_checkpoint(self.path, weights_only=False)


class StopOnSignal(pl.Callback):
    """Ends the run after the step in work once any of its processes got SIGTERM or SIGINT.

    Lightning itself ends at once, with nothing saved.
    """

    def __init__(self) -> None:
        self._step = 0
        self._stopped: Stopped | None = None
        self._received: list[int] = []
        self._listening = ExitStack()

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Listen, in the place of Lightning."""
        self._step = trainer.global_step
        self._received = self._listening.enter_context(stop_signals())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop after an optimiser step, all processes after the same."""
        step, before = trainer.global_step, self._step
        self._step = step
        if step == before:
            return
        told = bool(self._received)
        anyone = trainer.strategy.reduce_boolean_decision(told, all=False)
        if anyone and step < trainer.max_steps:
            number = self._received[0] if told else signal.SIGTERM
            self._stopped = Stopped(number, step)
            trainer.should_stop = True

    def require_the_end(self) -> None:
        """Make sure that the run was not stopped.

        Raises:
            Stopped: it was.
        """
        if self._stopped:
            raise self._stopped

    def teardown(self, *_: Any, **__: Any) -> None:
        """Listen no more."""
        self._listening.close()

    def on_exception(self, *_: Any) -> None:
        """As after the end."""
        self._listening.close()


class JsonLog(pl.Callback):
    """Writes what the module logs to ``log.jsonl``.

    Args:
        folder: where it stands.
        every: steps of a line, which gives means over them.
    """

    def __init__(self, folder: Path, every: int = 1) -> None:
        self.path, self.every = folder / "log.jsonl", every
        self._log: JsonLines | None = None
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Open the log where the run continues."""
        self._step = trainer.global_step
        if trainer.is_global_zero:
            self._log = JsonLines(self.path, self._step, self.every)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Write a line after an optimiser step."""
        step = trainer.global_step
        if self._log is not None and step != self._step:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self._log.add(step, values, lr=rate)
        self._step = step

    def on_train_end(self, *_: Any) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()
