"""The plain-torch runner: one process, one device, stopped and continued at any moment.

Lightning is not needed. A run lives in a folder: ``state.pt`` (weights, average, optimiser, step)
and ``log.jsonl`` (a line per logged step). What a kill loses is computed again with the same draws.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sgm.modules.ema import Ema
from sgm.training import snapshot
from sgm.training.draws import StepBatches, clip_generators
from sgm.training.log import JsonLines, named_clips
from sgm.training.optim import ADVICE, Optim, set_rate
from sgm.training.signals import outlive_signals, stop_signals
from sgm.training.tasks import Task, select_trainable


@dataclass(frozen=True)
class Plan:
    """How long a run lasts and how often it writes.

    With `minutes` the learning rate follows the clock: only runs counted in `steps` repeat exactly.

    Attributes:
        steps: steps of the whole run, or None where `minutes` counts.
        minutes: training time of the whole run, all parts added, or None where `steps` counts.
        save_minutes: time between two saved states.
        log_every: steps of a line of the log, which gives means over them.
    """

    steps: int | None = None
    minutes: float | None = None
    save_minutes: float = 5.0
    log_every: int = 20

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("training.plan: expected one of steps and minutes")

    def progress(self, step: int, seconds: float) -> float:
        """Return how much of the run is done: 1 or more at its end."""
        if self.steps is not None:
            return step / self.steps
        return seconds / (60.0 * (self.minutes or 1.0))


@dataclass
class Run:
    """An engine in training.

    Attributes:
        engine: the model, on its device.
        task: what a step computes.
        optim: optimiser settings.
        folder: where state and log stand.
        seed: of all draws.
        bfloat16: compute in bfloat16 where that is safe (autocast); weights stay float32.
        step: steps done.
        seconds: training time so far, all parts added.
        optimizer_start: the step at which the optimiser, and so the warm-up, began.
        notes: plain values kept in the state.
    """

    engine: nn.Module
    task: Task
    optim: Optim
    folder: Path
    seed: int = 0
    bfloat16: bool = False
    step: int = 0
    seconds: float = 0.0
    optimizer_start: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = select_trainable(self.engine, self.task.trainable)
        self.device = self.parameters[0].device
        self.optimizer = self.optim.build(self.parameters)
        self.ema = Ema(self.engine.named_parameters(), self.optim.ema)

    @property
    def state_file(self) -> Path:
        """Where the state is kept."""
        return self.folder / "state.pt"

    def save(self) -> None:
        """Write the state; a kill while writing leaves the one before."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "notes": self.notes,
            "model": self.engine.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_start": self.optimizer_start,
        }
        snapshot.save_atomically(state, self.state_file)

    def resume(self) -> bool:
        """Continue from the saved state, if there is one; say whether there was."""
        if not self.state_file.exists():
            return False
        state = snapshot.load(self.state_file)
        # A state that was carried (see `parts`) has neither frozen weights nor an optimiser.
        self.engine.load_state_dict(self.engine.state_dict() | state["model"])
        self.ema.load_state_dict(state["ema"])
        self.step, self.seconds, self.notes = state["step"], state["seconds"], state["notes"]
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
            self.optimizer_start = state.get("optimizer_start", 0)
        else:
            self.optimizer_start = self.step
        return True

    def advance(self, batch: dict[str, Tensor], progress: float) -> dict[str, float]:
        """Take one optimiser step and return what is logged.

        Raises:
            ValueError: the loss or the gradient is not finite.
        """
        count = len(next(iter(batch.values())))
        generator = clip_generators(self.seed, self.step * count, count)
        torch.manual_seed(generator.initial_seed())  # dropout inside networks
        batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        set_rate(self.optimizer, self.optim.rate(self.step - self.optimizer_start, progress))
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)
        with autocast:
            loss, logs = self.task(self.engine, batch, generator)
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss at step {self.step} is {loss.item()}{named_clips(batch)}: {ADVICE}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = self.optim.clip_(self.parameters)
        if not math.isfinite(norm):
            raise ValueError(f"the gradient at step {self.step} is not finite: {ADVICE}")
        self.optimizer.step()
        self.ema.update()
        self.step += 1
        return {"loss": loss.item(), "norm": norm} | {k: float(v) for k, v in logs.items()}

    def fit(self, batches: Iterable[dict[str, Tensor]], plan: Plan, deadline: float | None) -> bool:
        """Train until the plan is done, the deadline has passed, or SIGTERM or SIGINT arrives.

        Args:
            batches: the batches from `step` on.
            plan: how long the whole run is.
            deadline: when to stop (`time.monotonic`), or None.

        Returns:
            Whether the plan is done.
        """
        start = saved = time.monotonic()
        before = self.seconds
        feed = iter(batches)
        log_file = self.folder / "log.jsonl", self.step, plan.log_every
        with stop_signals() as stopped, JsonLines(*log_file) as log:
            while (progress := plan.progress(self.step, self.seconds)) < 1.0 and not stopped:
                values = self.advance(next(feed), progress)
                now = time.monotonic()
                self.seconds = before + now - start
                rate = self.optimizer.param_groups[0]["lr"]
                log.add(self.step, values, seconds=self.seconds, lr=rate)
                if now - saved > 60 * plan.save_minutes:
                    self.save()
                    saved = now
                if deadline is not None and now > deadline:
                    break
        self.save()
        return plan.progress(self.step, self.seconds) >= 1.0


def batches(
    dataset: Dataset[dict[str, Tensor]], batch_size: int, workers: int, seed: int, step: int
) -> Iterator[dict[str, Tensor]]:
    """Give the batches of a run from ``step`` on, without end.

    Args:
        dataset: items are dictionaries of tensors and depend on their number alone.
        batch_size: items of a batch.
        workers: processes that load ahead; 0 to load in this one.
        seed: the run's seed.
        step: the first step.
    """
    groups = getattr(dataset, "groups", None)
    sampler = StepBatches(len(dataset), batch_size, seed, step, groups=groups)  # type: ignore[arg-type]
    return iter(
        DataLoader(
            dataset, batch_sampler=sampler, num_workers=workers, worker_init_fn=outlive_signals
        )
    )
