"""Validation while training, as Lightning callbacks: the loss by noise level.

All by the averaged weights and from fixed draws, so that steps and runs compare. Callbacks stand in
a recipe under ``lightning.callbacks``; ``configs/training/callbacks`` has examples.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from sgm.config import build
from sgm.training.draws import clip_generators
from sgm.training.log import JsonLines
from sgm.training.module import TrainingModule
from sgm.training.reporting import show_numbers
from sgm.training.strategies import reshard


class Every(pl.Callback):
    """Measures at the start and every so many steps; writes ``NAME.jsonl`` in the run's folder.

    Args:
        name: of what is measured.
        steps: between two measurements.
    """

    def __init__(self, name: str, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"steps: expected 1 or more, got {steps}")
        self.name, self.steps = name, steps
        self._step = -1
        self._log: JsonLines | None = None

    def measure(self, trainer: pl.Trainer, module: TrainingModule) -> Mapping[str, float]:
        """Return the numbers of the present step; called on all processes."""
        raise NotImplementedError

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Go on where the run does; measure what it starts from."""
        self._step = trainer.global_step
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / f"{self.name}.jsonl"
            self._log = JsonLines(path, self._step)
        if self._step == 0:
            self._measure(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        """Measure where it is due."""
        if trainer.global_step != self._step and trainer.global_step % self.steps == 0:
            self._measure(trainer, module)
        self._step = trainer.global_step

    def on_train_end(self, *_: Any) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()

    def _measure(self, trainer: pl.Trainer, module: Any) -> None:
        values = self.measure(trainer, module)
        if self._log is not None:
            self._log.add(trainer.global_step, values)
            show_numbers(trainer, {f"{self.name}/{key}": x for key, x in values.items()})


class LevelLosses(Every):
    """The training loss of fixed clips at fixed noise levels.

    Args:
        dataset: config of a dataset of clips that are not trained on.
        steps: between two measurements.
        clips: how many of its clips, from the first.
        sigmas: the noise levels.
        seed: of the noise.
    """

    def __init__(
        self,
        dataset: Mapping[str, Any],
        steps: int = 500,
        clips: int = 16,
        sigmas: Sequence[float] = (0.1, 0.5, 2.0, 8.0, 32.0),
        seed: int = 0,
    ) -> None:
        super().__init__("losses", steps)
        self.dataset = build(dataset, "dataset")
        if not 1 <= clips <= len(self.dataset) or not sigmas or min(sigmas) <= 0:
            raise ValueError(
                f"expected clips from 1 to {len(self.dataset)} and levels above 0, got {clips} and "
                f"{list(sigmas)}"
            )
        self.clips, self.sigmas, self.seed = clips, tuple(sigmas), seed

    def measure(self, trainer: pl.Trainer, module: TrainingModule) -> dict[str, float]:
        """Return the mean loss at each level, and of all."""
        sums = torch.zeros(len(self.sigmas), device=module.device)
        with averages_in_evaluation(module), trainer.precision_plugin.val_step_context():
            # Each process takes as many: they may have to put weights together for each other.
            rank, world = trainer.global_rank, trainer.world_size
            for number in range(rank, -(-self.clips // world) * world, world):
                losses = self._losses(module, min(number, self.clips - 1))
                sums += losses if number < self.clips else 0
        means = (trainer.strategy.reduce(sums, reduce_op="sum") / self.clips).tolist()
        by_level = {f"sigma {s:g}": mean for s, mean in zip(self.sigmas, means, strict=True)}
        return by_level | {"mean": sum(means) / len(means)}

    def _losses(self, module: TrainingModule, number: int) -> Tensor:
        """The loss of one clip at each level."""
        engine: Any = module.engine
        batch = default_collate([self.dataset[number]])
        batch = {key: value.to(module.device) for key, value in batch.items()}
        losses = []
        for k, sigma in enumerate(self.sigmas):
            generator = clip_generators(self.seed, number * len(self.sigmas) + k, 1)
            with _fixed_level(engine.loss_fn, sigma):
                losses.append(module.task(engine, batch, generator)[0])
        return torch.stack(losses)


@contextmanager
def averages_in_evaluation(module: TrainingModule) -> Iterator[None]:
    """Have the engine compute by its averaged weights, without dropout or gradients."""
    training = [each for each in module.engine.modules() if each.training]
    with torch.no_grad(), module.ema.applied():
        reshard(module.engine)
        module.engine.eval()
        try:
            yield
        finally:
            for each in training:
                each.training = True
    reshard(module.engine)  # what was put together are averages


@contextmanager
def _fixed_level(loss: nn.Module, sigma: float) -> Iterator[None]:
    """Let a loss take one noise level."""

    def fixed(count: int, **_: Any) -> Tensor:
        return torch.full((count,), sigma)

    drawing: Any = loss.sigma_sampler
    loss.sigma_sampler = fixed  # type: ignore[assignment]
    try:
        yield
    finally:
        loss.sigma_sampler = drawing
