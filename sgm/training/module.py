"""An engine in Lightning: the same tasks, draws and rates as in the plain runner."""

import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from sgm.config import build
from sgm.modules.draws import ClipGenerators
from sgm.modules.ema import Ema
from sgm.training.draws import StepBatches, clip_generators
from sgm.training.log import named_clips
from sgm.training.optim import ADVICE, Optim, set_rate
from sgm.training.signals import outlive_signals
from sgm.training.strategies import shard
from sgm.training.tasks import Batch, Task, select_trainable


class TrainingModule(pl.LightningModule):
    """Trains the parts of ``engine`` that the task names; averages them in ``ema``.

    The learning rate is a function of the step, and all draws for a clip are functions of its
    position in the run. So a run continued from a checkpoint goes on as if it had never stopped,
    also where the processes share its global batch in another way.

    Args:
        engine: `DiffusionEngine` or `AutoencodingEngine`.
        task: what a step computes.
        optim: optimiser settings.
        seed: of all draws.
    """

    ema: Ema

    def __init__(self, engine: nn.Module, task: Task, optim: Optim, seed: int) -> None:
        super().__init__()
        self.engine, self.task, self.optim, self.seed = engine, task, optim, seed
        self.trained = select_trainable(engine, task.trainable)
        self._micro_step = 0

    def check(self, trainer: pl.Trainer, batch: Batch) -> None:
        """Make sure that a run can take its first step.

        Args:
            trainer: of the run.
            batch: such as will come.

        Raises:
            ValueError: what the task or the optimiser needs is missing.
        """
        self.optim.check()
        self.task.check(self.engine, batch)

    def configure_model(self) -> None:
        """Share the parameters out where the strategy asks for it; begin the averages."""
        if self.device_mesh is not None:
            shard(self.engine, self.device_mesh["data_parallel"])
            self.trained = [p for p in self.engine.parameters() if p.requires_grad]
        self.ema = Ema(self.engine.named_parameters(), self.optim.ema)

    def configure_optimizers(self) -> Any:
        """Make the optimiser."""
        return self.optim.build(self.trained)

    def on_fit_start(self) -> None:
        """Bring the averages to the device."""
        self.ema.to(self.device)

    def on_train_start(self) -> None:
        """Take the step from the trainer, which may have continued a run."""
        self._micro_step = self.global_step * self.trainer.accumulate_grad_batches

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of the step."""
        progress = self.global_step / self.trainer.max_steps
        set_rate(self.trainer.optimizers[0], self.optim.rate(self.global_step, progress))

    def generators(self, batch: Mapping[str, Tensor]) -> ClipGenerators:
        """Return the generators of the next batch, and seed torch's own by them."""
        count = len(next(iter(batch.values())))
        first = (self._micro_step * self.trainer.world_size + self.global_rank) * count
        made = clip_generators(self.seed, first, count)
        torch.manual_seed(made.initial_seed())  # dropout inside networks
        self._micro_step += 1
        return made

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor | None:
        """Return the loss of a batch.

        Raises:
            ValueError: the loss is not finite; names the clips.
        """
        generator = self.generators(batch)
        loss, logs = self.task(self.engine, batch, generator)
        self.require_finite(loss, batch)
        self.log_dict({"loss": loss.detach(), **logs}, sync_dist=True)
        return loss

    def require_finite(self, loss: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Make sure that there is something to learn from.

        Raises:
            ValueError: the loss is not finite; names the clips.
        """
        if not torch.isfinite(loss):
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            raise ValueError(
                f"the loss at step {self.global_step} is {loss.item()}"
                f"{named_clips(batch, data.dataset)}: {ADVICE}"
            )

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Limit the gradient's norm as the recipe says.

        Raises:
            ValueError: the gradient is not finite.
        """
        norm = self.optim.clip_(self.trained)
        if not math.isfinite(norm) and self.trainer.scaler is None:  # a scaler skips such steps
            raise ValueError(f"the gradient at step {self.global_step} is not finite: {ADVICE}")
        self.log("norm", norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take an optimiser step, then average the weights."""
        super().optimizer_step(*args, **kwargs)
        self.ema.update()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the averages to a checkpoint."""
        checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the averages from a checkpoint."""
        self.ema.load_state_dict(checkpoint["ema"])


class StepData(pl.LightningDataModule):
    """Batches by step: a continued run gets the batches that it has not seen.

    Args:
        dataset: config of a dataset whose items depend on their number alone.
        batch_size: items of a batch, on each process.
        workers: processes that load ahead.
        seed: the run's seed.
    """

    def __init__(
        self, dataset: Mapping[str, Any], batch_size: int, workers: int, seed: int
    ) -> None:
        super().__init__()
        self.dataset = build(dataset, "data.dataset")
        self.batch_size, self.workers, self.seed = batch_size, workers, seed

    def example(self) -> dict[str, Tensor]:
        """Return a batch of the sizes that will come: one item, repeated.

        Raises:
            ValueError: the dataset is empty, or the item damaged.
        """
        first = next(iter(self._batches()))[0]
        batch: dict[str, Tensor] = default_collate([self.dataset[first]] * self.batch_size)
        return batch

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return endless batches from the trainer's step on."""
        trainer = self.trainer
        if trainer is None:
            raise ValueError("StepData gives batches to a Trainer: call trainer.fit(module, data)")
        sampler = self._batches(
            step=trainer.global_step * trainer.accumulate_grad_batches,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )
        return DataLoader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=self.workers,
            worker_init_fn=outlive_signals,
        )

    def _batches(self, **place: int) -> StepBatches:
        groups = getattr(self.dataset, "groups", None)
        return StepBatches(len(self.dataset), self.batch_size, self.seed, groups=groups, **place)
