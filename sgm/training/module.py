"""An engine in Lightning: the same tasks, draws and rates as in the plain runner."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sgm.config import build
from sgm.modules.ema import Ema
from sgm.training.attention import training_attention
from sgm.training.draws import StepBatches, step_generator
from sgm.training.optim import ADVICE, Optim, set_rate
from sgm.training.tasks import Task, select_trainable


class TrainingModule(pl.LightningModule):
    """Trains the parts of ``engine`` that the task names; averages them in ``ema``.

    The learning rate and all draws are functions of the step, so a run continued from a checkpoint
    goes on as if it had never stopped.

    Args:
        engine: `DiffusionEngine` or `AutoencodingEngine`.
        task: what a step computes.
        optim: optimiser settings.
        seed: of all draws.
    """

    def __init__(self, engine: nn.Module, task: Task, optim: Optim, seed: int) -> None:
        super().__init__()
        self.engine, self.task, self.optim, self.seed = engine, task, optim, seed
        self.trained = select_trainable(engine, task.trainable)
        self.ema = Ema(engine.named_parameters(), optim.ema)
        self._micro_step = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
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

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch.

        Raises:
            ValueError: the loss is not finite.
        """
        generator = step_generator(self.seed, self._micro_step, self.global_rank)
        torch.manual_seed(generator.initial_seed())  # dropout inside networks
        self._micro_step += 1
        with training_attention(self.device):
            loss, logs = self.task(self.engine, batch, generator)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss at step {self.global_step} is {loss.item()}: {ADVICE}")
        self.log_dict({"loss": loss.detach(), **logs})
        return loss

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Limit the gradient's norm as the recipe says."""
        self.log("norm", self.optim.clip_(self.trained))

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

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return endless batches from the trainer's step on."""
        trainer = self.trainer
        if trainer is None:
            raise ValueError("StepData gives batches to a Trainer: call trainer.fit(module, data)")
        sampler = StepBatches(
            len(self.dataset),
            self.batch_size,
            self.seed,
            step=trainer.global_step * trainer.accumulate_grad_batches,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )
        return DataLoader(self.dataset, batch_sampler=sampler, num_workers=self.workers)
