"""What one training step computes; the plain loop and Lightning call the same tasks.

A task is called as ``task(engine, batch, generator)`` and gives the loss and numbers to log; its
``check`` is called before anything of a run is written. Its draws come from ``generator``, which
the runner derives from (seed, step, rank); the runner seeds torch's own generator alike, for
dropout inside networks. Clean latents are the modes of the first stage's distributions, whether
encoded here or beforehand.
Shapes: b clips, t frames, c channels, z latent channels, h height, w width.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.models.autoencoder import AutoencodingEngine
from sgm.models.diffusion import DiffusionEngine
from sgm.modules.autoencoding.temporal_ae import VideoDecoder
from sgm.modules.draws import draw
from sgm.training.batch import condition_batch, precomputed_batch
from sgm.training.latents import latent_modes

Batch = Mapping[str, Tensor]
Logs = dict[str, Tensor]


class Task(Protocol):
    """A training objective."""

    @property
    def trainable(self) -> Sequence[str]:
        """Names of the engine's parts that learn."""

    def check(self, engine: Any, batch: Batch) -> None:
        """Make sure that this can train an engine on such batches.

        Raises:
            ValueError: names what the engine or the data lacks.
        """

    def __call__(
        self, engine: Any, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, Logs]:
        """Return the loss (a scalar) and detached scalars to log."""


def select_trainable(engine: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """Freeze ``engine`` except what ``names`` stand for; give the parameters that learn.

    Modules with something that learns are put in training mode, the others in evaluation mode. The
    conditioner itself always trains, so that conditionings drop out where its embedders are frozen.

    Args:
        engine: the model.
        names: of parts or parameters, or patterns of such as in a shell, whose ``*`` also stands
            for dots: ``*.time_stack`` are all temporal layers.

    Raises:
        ValueError: no names, or one that selects nothing or an embedder that is not trainable.
    """
    if not names:
        raise ValueError("training.task.params.trainable: expected names of weights, got none")
    lost = list(names)
    for name, parameter in engine.named_parameters():
        hits = [n for n in names if fnmatchcase(name, n) or fnmatchcase(name, f"{n}.*")]
        parameter.requires_grad_(bool(hits))
        lost = [n for n in lost if n not in hits]
    if lost:
        raise ValueError(f"training.task.params.trainable: no parameters under {', '.join(lost)}")
    _refuse_fixed_embedders(engine)
    _set_modes(engine, training=True)
    conditioner: Any = getattr(engine, "conditioner", None)
    if conditioner is not None:
        conditioner.training = True  # not train(), which would reach the embedders
    return [p for p in engine.parameters() if p.requires_grad]


def _set_modes(module: nn.Module, training: bool) -> None:
    """Put what learns in training mode; what has no parameters follows what it is in."""
    parameters = list(module.parameters())
    module.training = any(p.requires_grad for p in parameters) if parameters else training
    for child in module.children():
        _set_modes(child, module.training)


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


def check_autoencoder(task: Task, autoencoder: Any, batch: Batch) -> None:
    """Make sure that a task gets an autoencoder of clips, and clips.

    Raises:
        ValueError: it does not.
    """
    _require_kind(task, autoencoder, AutoencodingEngine)
    _require_kind(task, autoencoder.decoder, VideoDecoder)
    _require_frames(task, batch)


def _require_kind(task: Task, part: object, kind: type) -> None:
    if not isinstance(part, kind):
        raise ValueError(
            f"training.task: {type(task).__name__} expects the kind {kind.__name__}, "
            f"got {type(part).__name__}: name another task or another model"
        )


def _require_frames(task: Task, batch: Batch) -> None:
    if "frames" not in batch:
        raise ValueError(
            f"data.dataset: {type(task).__name__} needs clips with frames, got {', '.join(batch)}"
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

    def check(self, engine: Any, batch: Batch) -> None:
        """Take an `AutoencodingEngine` of clips, and ``frames``."""
        check_autoencoder(self, engine, batch)

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
        trainable: what learns, see `select_trainable`.
        aug_mean: mean of the logarithm of the condition frame's noise level.
        aug_std: its standard deviation.
        frames_at_once: frames that the first stage encodes at once; None for the engine's own
            number. The result is the same; the fewer, the less memory.

    The dropout of conditionings is the conditioner's own (``ucg_rates``).
    """

    def __init__(
        self,
        trainable: Sequence[str] = ("model",),
        aug_mean: float = -3.0,
        aug_std: float = 0.5,
        frames_at_once: int | None = None,
    ) -> None:
        self.trainable = tuple(trainable)
        self.aug_mean, self.aug_std = aug_mean, aug_std
        self.frames_at_once = frames_at_once

    def check(self, engine: Any, batch: Batch) -> None:
        """Take a `DiffusionEngine` with a loss, and all that its conditioner asks for."""
        _require_kind(self, engine, DiffusionEngine)
        if engine.loss_fn is None:
            raise ValueError("model.params.loss_fn_config: expected a loss to train with, got none")
        if "latents" not in batch:
            _require_frames(self, batch)
        engine.conditioner.require(*self._conditions(engine, batch, 1, torch.Generator()))

    def __call__(
        self, engine: Any, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, Logs]:
        """Take clips: ``frames`` (b, t, 3, h, w) in [-1, 1], or what was computed of them before.

        That is ``latents`` (b, t, z, h / f, w / f), scaled, with ``first_frame`` (b, 3, h, w) or
        with the conditions that `sgm.training.batch.precomputed_batch` takes. Every other entry is
        a number for each clip that the conditioner may ask for; ``index`` is the clip's own.
        """
        latents = self._latents(engine, batch)
        cond, given = self._conditions(engine, batch, latents.shape[1], generator)
        losses = engine.loss_fn(
            engine.model,
            engine.denoiser,
            partial(engine.conditioner, generator=generator, given=given),
            latents.flatten(0, 1),
            cond,
            generator=generator,
        )
        return losses.mean(), {}

    def _latents(self, engine: Any, batch: Batch) -> Tensor:
        """Clean latents (b, t, z, ...) in float32."""
        if "latents" in batch:
            return batch["latents"].float()
        frames = batch["frames"]
        rows = frames.flatten(0, 1)
        with torch.autocast(frames.device.type, enabled=False):  # half types overflow in some
            parts = [latent_modes(engine, x) for x in rows.split(self.frames_at_once or len(rows))]
        return torch.cat(parts).unflatten(0, frames.shape[:2])

    def _conditions(
        self, engine: Any, batch: Batch, frames: int, generator: torch.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Entries for conditioner and network, and embeddings that are there already.

        Raises:
            ValueError: an embedder is to learn whose results the data has.
        """
        scalars = {key: value for key, value in batch.items() if key not in _NOT_SCALARS}
        if "cond_latents" not in batch:
            first = batch["first_frame"] if "first_frame" in batch else batch["frames"][:, 0]
            noise = (self.aug_mean, self.aug_std)
            return condition_batch(first, scalars, frames, generator, *noise), {}
        cond, given = precomputed_batch(batch, frames, generator)
        for number, key in enumerate(engine.conditioner.input_keys):
            learns = any(p.requires_grad for p in engine.conditioner.embedders[number].parameters())
            if key in given and learns:
                raise ValueError(
                    f"training.task.params.trainable names conditioner.embedders.{number}, whose "
                    "results are computed beforehand in this data: leave it out, or train on frames"
                )
        return scalars | cond, given


_NOT_SCALARS = frozenset(
    ("frames", "latents", "first_frame", "cond_latents", "cond_aug", "image_embedding", "index")
)


def _normal(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    return draw(torch.randn, shape, generator).to(like)


def _uniform(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    return draw(torch.rand, shape, generator).to(like)
