"""What one training step computes; the plain loop and Lightning call the same tasks.

A task is called as ``task(engine, batch, generator)`` and gives the loss and numbers to log. Its
draws come from ``generator``, which the runner derives from (seed, step, rank); the runner seeds
torch's own generator alike, for dropout inside networks. Clean latents are the modes of the first
stage's distributions, whether encoded here or beforehand.
Shapes: b clips, t frames, c channels, z latent channels, h height, w width.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.training.batch import condition_batch
from sgm.training.latents import latent_modes

Batch = Mapping[str, Tensor]
Logs = dict[str, Tensor]


class Task(Protocol):
    """A training objective."""

    @property
    def trainable(self) -> Sequence[str]:
        """Names of the engine's parts that learn."""

    def __call__(
        self, engine: Any, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, Logs]:
        """Return the loss (a scalar) and detached scalars to log."""


def select_trainable(engine: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """Freeze ``engine`` except the parameters whose names start with one of ``names``; give those.

    The named modules are put in training mode, the others in evaluation mode; the conditioner
    itself always trains, so that conditionings drop out where its embedders are frozen.

    Raises:
        ValueError: a name selects nothing, or an embedder that is not trainable.
    """
    prefixes = [tuple(name.split(".")) for name in names]
    found: set[tuple[str, ...]] = set()
    for name, parameter in engine.named_parameters():
        path = tuple(name.split("."))
        hits = {prefix for prefix in prefixes if path[: len(prefix)] == prefix}
        parameter.requires_grad_(bool(hits))
        found |= hits
    lost = [".".join(p) for p in prefixes if p not in found]
    if lost:
        raise ValueError(f"training.task.params.trainable: no parameters under {', '.join(lost)}")
    _refuse_fixed_embedders(engine)
    engine.eval()
    modules = dict(engine.named_modules())
    for name in names:
        if name in modules:  # else it is a single parameter
            modules[name].train()
    if "conditioner" in modules:
        modules["conditioner"].training = True  # not train(), which would reach the embedders
    return [p for p in engine.parameters() if p.requires_grad]


def _refuse_fixed_embedders(engine: nn.Module) -> None:
    """Refuse embedders that are to learn but run without gradients."""
    if not hasattr(engine, "conditioner"):
        return
    conditioner: Any = engine.conditioner
    for i, trainable in enumerate(conditioner.trainable):
        learns = any(p.requires_grad for p in conditioner.embedders[i].parameters())
        if learns and not trainable:
            raise ValueError(
                f"training.task.params.trainable names conditioner.embedders.{i}, which cannot "
                f"learn: set conditioner_config.params.emb_models[{i}].is_trainable to true, or "
                "do not name it"
            )


def edges(x: Tensor) -> list[Tensor]:
    """Differences of neighbours along width, height and, in clips, time.

    Args:
        x: (b, t, c, h, w).
    """
    return [x.diff(dim=d) for d in ((-1, -2, 1) if x.shape[1] > 1 else (-1, -2))]


class ReconstructionTask:
    """Autoencoder: absolute error of pixels and of their differences, and the KL divergence.

    The differences keep edges sharp in place, where an adversarial loss would invent them.

    Args:
        trainable: names of the parts that learn.
        video: decode whole clips through the temporal parts; else each frame on its own.
        kl_weight: weight of the divergence (summed over the latents of a picture, in nats).
        edge_weight: weight of the differences.
        latent_noise: standard deviation of noise on the latents relative to theirs, drawn for each
            clip between 0 and this: a decoder will later get latents that a denoiser made.
    """

    def __init__(
        self,
        trainable: Sequence[str] = ("encoder", "decoder"),
        video: bool = False,
        kl_weight: float = 1e-6,
        edge_weight: float = 1.0,
        latent_noise: float = 0.0,
    ) -> None:
        self.trainable = tuple(trainable)
        self.video, self.latent_noise = video, latent_noise
        self.kl_weight, self.edge_weight = kl_weight, edge_weight

    def __call__(
        self, engine: Any, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, Logs]:
        """Take ``frames`` (b, t, 3, h, w) in [-1, 1]; log the parts and the PSNR in dB."""
        frames = batch["frames"]
        b, t = frames.shape[:2]
        moments, _ = engine.encode(frames.flatten(0, 1), unregularized=True)
        mean, log_var = moments.float().chunk(2, dim=1)
        log_var = log_var.clamp(-30.0, 20.0)
        kl = 0.5 * (mean.square() + log_var.exp() - 1.0 - log_var).sum(dim=(1, 2, 3)).mean()
        z = mean + (0.5 * log_var).exp() * _normal(mean.shape, generator, mean)
        if self.latent_noise:
            level = _uniform((b, 1, 1, 1), generator, z).repeat_interleave(t, 0)
            z = z + self.latent_noise * mean.std() * level * _normal(z.shape, generator, z)
        decoded = engine.decode(z, timesteps=t, skip_video=not self.video)
        x = decoded.float().unflatten(0, (b, t))
        pixel = F.l1_loss(x, frames)
        edge = torch.stack([F.l1_loss(a, e) for a, e in zip(edges(x), edges(frames), strict=True)])
        loss = pixel + self.edge_weight * edge.mean() + self.kl_weight * kl
        psnr = 10 * torch.log10(4.0 / F.mse_loss(x, frames).clamp_min(1e-10))
        return loss, {"l1": pixel.detach(), "kl": kl.detach(), "psnr": psnr.detach()}


class DiffusionTask:
    """Image to video: the engine's denoising loss, given the first frame.

    Args:
        trainable: names of the parts that learn.
        aug_mean: mean of the logarithm of the condition frame's noise level.
        aug_std: its standard deviation.

    The dropout of conditionings is the conditioner's own (``ucg_rate`` of an embedder).
    """

    def __init__(
        self,
        trainable: Sequence[str] = ("model",),
        aug_mean: float = -3.0,
        aug_std: float = 0.5,
    ) -> None:
        self.trainable = tuple(trainable)
        self.aug_mean, self.aug_std = aug_mean, aug_std

    def __call__(
        self, engine: Any, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, Logs]:
        """Take clips as ``frames`` (b, t, 3, h, w) in [-1, 1], or as their ``latents``
        (b, t, z, h / f, w / f), scaled, and ``first_frame`` (b, 3, h, w).

        Every other entry of the batch is a number for each clip that the conditioner may ask for.
        """
        if engine.loss_fn is None:
            raise ValueError("model.params.loss_fn_config: expected a loss to train with, got none")
        scalars = {k: v for k, v in batch.items() if k not in _PICTURES}
        latents, first = _latents(engine, batch)
        cond = condition_batch(
            first, scalars, latents.shape[1], generator, self.aug_mean, self.aug_std
        )
        losses = engine.loss_fn(
            engine.model,
            engine.denoiser,
            partial(engine.conditioner, generator=generator),
            latents.flatten(0, 1),
            cond,
            generator=generator,
        )
        return losses.mean(), {}


_PICTURES = ("frames", "latents", "first_frame")


def _latents(engine: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return clean latents (b, t, z, ...) in float32, and first frames."""
    if "latents" in batch:
        return batch["latents"].float(), batch["first_frame"]
    frames = batch["frames"]
    with torch.autocast(frames.device.type, enabled=False):  # half types overflow in some stages
        latents = latent_modes(engine, frames.flatten(0, 1))
    return latents.unflatten(0, frames.shape[:2]), frames[:, 0]


def _normal(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(*shape, generator=generator).to(like)


def _uniform(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.rand(*shape, generator=generator).to(like)
