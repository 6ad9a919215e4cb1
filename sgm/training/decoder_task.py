"""Training of the temporal decoder: reconstruction, and against a discriminator.

Shapes: b clips, t frames, h height, w width.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn

from sgm.training.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from sgm.training.metrics import perceptual_distance
from sgm.training.module import TrainingModule
from sgm.training.optim import ADVICE, Optim, set_rate
from sgm.training.tasks import Batch, Logs, check_autoencoder, edges


class DecoderTask:
    """Clips out of their latents: the first half of what a step of the decoder computes.

    The latents are the modes of the encoder, which stays as it is.

    Args:
        trainable: names of the parts that learn; the decoder, or temporal parts of it.
        edge_weight: weight of the absolute error of neighbours' differences, in space and time.
        lpips: ``vgg``, ``alex`` or ``squeeze`` adds a perceptual distance, if installed.
        lpips_weight: its weight.
    """

    def __init__(
        self,
        trainable: Sequence[str] = ("first_stage_model.decoder",),
        edge_weight: float = 1.0,
        lpips: str | None = None,
        lpips_weight: float = 1.0,
    ) -> None:
        self.trainable = tuple(trainable)
        self.edge_weight, self.lpips_weight = edge_weight, lpips_weight
        self.perceptual = perceptual_distance(lpips) if lpips else None

    def check(self, engine: Any, batch: Batch) -> None:
        """Take an autoencoder of clips, alone or in a `DiffusionEngine`, and ``frames``."""
        check_autoencoder(self, first_stage(engine), batch)

    def __call__(
        self, engine: Any, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, Logs]:
        """Take ``frames`` (b, t, 3, h, w) in [-1, 1]; the loss of the reconstruction alone."""
        loss, logs, _ = self.reconstruct(engine, batch)
        return loss, logs

    def reconstruct(self, engine: Any, batch: Batch) -> tuple[Tensor, Logs, Tensor]:
        """Return the loss, what is logged of it, and the decoded clips (b, t, 3, h, w)."""
        frames = batch["frames"]
        b, t = frames.shape[:2]
        stage = first_stage(engine)
        with torch.no_grad():
            moments, _ = stage.encode(frames.flatten(0, 1), unregularized=True)
            z = moments.chunk(2, dim=1)[0]
        x = stage.decode(z, timesteps=t).float().unflatten(0, (b, t))
        pixel = F.l1_loss(x, frames)
        edge = torch.stack([F.l1_loss(a, e) for a, e in zip(edges(x), edges(frames), strict=True)])
        loss = pixel + self.edge_weight * edge.mean()
        logs = {"l1": pixel.detach(), "psnr": _psnr(x.detach(), frames)}
        if self.perceptual is not None:
            distance = self.perceptual.to(x.device)(x.flatten(0, 1), frames.flatten(0, 1)).mean()
            loss = loss + self.lpips_weight * distance
            logs["lpips"] = distance.detach()
        return loss, logs, x


class AdversarialTask(DecoderTask):
    """The same, and from some step on against a discriminator; `AdversarialModule` runs it.

    Args:
        start: the step at which the adversary begins; the decoder should be good by then.
        weight: weight of its loss, on top of the adaptive one.
        channels: of the discriminator's first layer.
        layers: of the discriminator that halve the size.
        params: as in `DecoderTask`.
    """

    def __init__(
        self,
        start: int,
        weight: float = 0.5,
        channels: int = 64,
        layers: int = 3,
        **params: Any,
    ) -> None:
        super().__init__(**params)
        self.start, self.weight = start, weight
        self.channels, self.layers = channels, layers


def first_stage(engine: Any) -> Any:
    """Return the autoencoder of a `DiffusionEngine`, or the engine if it is one."""
    return getattr(engine, "first_stage_model", engine)


def _psnr(x: Tensor, frames: Tensor) -> Tensor:
    return 10 * torch.log10(4.0 / F.mse_loss(x, frames).clamp_min(1e-10))


class AdversarialModule(TrainingModule):
    """Trains a decoder and its discriminator in turn, each by an optimiser of its own.

    Args:
        engine: whose decoder is trained.
        task: what a step computes.
        optim: settings of both optimisers.
        seed: of all draws.
    """

    task: AdversarialTask

    def __init__(self, engine: nn.Module, task: AdversarialTask, optim: Optim, seed: int) -> None:
        super().__init__(engine, task, optim, seed)
        self.automatic_optimization = False
        self.discriminator = PatchDiscriminator(task.channels, task.layers)

    def check(self, trainer: pl.Trainer, batch: Batch) -> None:
        """As in the base class.

        Raises:
            ValueError: the strategy would share weights out, the precision scales losses, or the
                trainer is to do what the steps of two optimisers do themselves.
        """
        super().check(trainer, batch)
        if isinstance(trainer.strategy, ModelParallelStrategy) or trainer.scaler is not None:
            raise ValueError(
                "lightning.trainer: a decoder with an adversary trains on one device or by the "
                "strategy ddp_find_unused_parameters_true, in precision bf16-mixed or 32-true"
            )
        if trainer.accumulate_grad_batches != 1 or trainer.gradient_clip_val:
            raise ValueError(
                "lightning.trainer: a decoder with an adversary trains without "
                "accumulate_grad_batches (raise data.batch_size) and gradient_clip_val (set "
                "training.optim.clip)"
            )

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Make the decoder's optimiser and the discriminator's."""
        return [self.optim.build(p) for p in (self.trained, self.discriminator.parameters())]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set both learning rates of the step."""
        progress = self.global_step / self.trainer.max_steps
        for optimizer in self.trainer.optimizers:
            set_rate(optimizer, self.optim.rate(self.global_step, progress))

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Take a step of the decoder, then one of the discriminator.

        Raises:
            ValueError: a loss or gradient is not finite; names the clips.
        """
        self.generators(batch)  # seeds the dropout
        loss, logs, made = self.task.reconstruct(self.engine, batch)
        fights = self.global_step >= self.task.start
        if fights:
            adversarial = self._adversarial_loss(loss, made)
            loss, logs = loss + adversarial, logs | {"adversarial": adversarial.detach()}
        self.require_finite(loss, batch)
        self._step(0, loss, self.trained)
        if fights:
            logs["discriminator"] = self._train_discriminator(batch, made.detach())
        self.log_dict({"loss": loss.detach(), **logs}, sync_dist=True)

    def _adversarial_loss(self, reconstruction: Tensor, made: Tensor) -> Tensor:
        self.discriminator.requires_grad_(False)
        adversarial = -self.discriminator(made).mean()
        self.discriminator.requires_grad_(True)
        last = first_stage(self.engine).decoder.conv_out.time_mix_conv.weight
        weight = adaptive_weight(reconstruction, adversarial, last)
        return self.task.weight * weight * adversarial

    def _train_discriminator(self, batch: Mapping[str, Tensor], made: Tensor) -> Tensor:
        loss = hinge_loss(self.discriminator(batch["frames"]), self.discriminator(made))
        self.require_finite(loss, batch)
        self._step(1, loss, list(self.discriminator.parameters()))
        return loss.detach()

    def _step(self, number: int, loss: Tensor, parameters: list[nn.Parameter]) -> None:
        """Take a step of one optimiser; those of the decoder count as steps of the run."""
        optimizer: Any = self.trainer.optimizers[number]
        optimizer.zero_grad(set_to_none=True)
        self.manual_backward(loss)
        norm = self.optim.clip_(parameters)
        if not math.isfinite(norm):
            raise ValueError(f"the gradient at step {self.global_step} is not finite: {ADVICE}")
        if number == 0:
            self.log("norm", norm)
            optimizer = self.optimizers()[number]  # type: ignore[index]
        optimizer.step()
        if number == 0:
            self.ema.update()
