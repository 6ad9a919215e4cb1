"""Training by Lightning, from a recipe: what ``main.py`` does after reading its arguments."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from sgm.checkpoint import open_checkpoint, read_state_dict
from sgm.config import build, check_arguments
from sgm.training.assemble import OTHER_SEED, measure_latents, start_from_first_stage, write_half
from sgm.training.callbacks import JsonLog, LastCheckpoint
from sgm.training.loop import batches
from sgm.training.module import StepData, TrainingModule
from sgm.training.recipe import engine_config, engine_section, typed
from sgm.training.settings import Data, Lightning, Training
from sgm.training.tasks import ReconstructionTask

logger = logging.getLogger(__name__)

SCALE_TOLERANCE = 0.02

_TRAINER = {
    "max_epochs": -1,  # steps count; an epoch has no end
    "logger": False,
    "use_distributed_sampler": False,  # StepData shares the items out itself
    "enable_model_summary": False,
}

_EXPECTED = (
    r"Found \d+ module\(s\) in eval mode",  # the frozen ones
    "The 'train_dataloader' does not have many workers",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
)


def train(recipe: DictConfig, folder: Path, resume: bool) -> Path:
    """Train until ``lightning.trainer.max_steps`` and return the file of averaged weights.

    The folder gets ``recipe.yaml``, ``log.jsonl``, ``last.ckpt`` and ``weights.safetensors``.

    Args:
        recipe: the merged recipe.
        folder: of the run.
        resume: continue the run that stands there, from its start if it had not saved yet.

    Raises:
        ValueError: something in the recipe is wrong or missing, or the folder has a run and
            ``resume`` is false.
    """
    last = folder / "last.ckpt"
    if last.exists() and not resume:
        raise ValueError(f"{folder} has a run: continue it with --resume, or name another --logdir")
    if resume and not last.exists():
        logger.warning("%s has no saved run to resume: starting at step 0", folder)
    settings, lightning = typed(recipe, "training", Training), typed(recipe, "lightning", Lightning)
    steps = lightning.trainer.get("max_steps")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"lightning.trainer.max_steps: expected the run's steps, got {steps!r}")
    given = typed(recipe, "data", Data)
    data = StepData(given.dataset, given.batch_size, given.workers, settings.seed)
    module = _module(recipe, settings)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(recipe, folder / "recipe.yaml", resolve=True)
    with warnings.catch_warnings():
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message)
        trainer = _trainer(lightning, folder)
        trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    weights = folder / "weights.safetensors"
    if trainer.is_global_zero:
        _write_averages(module, data, weights)
    return weights


def _module(recipe: DictConfig, settings: Training) -> TrainingModule:
    config = engine_config(recipe)
    torch.manual_seed(settings.seed)
    engine = build(config, engine_section(recipe)).float()
    if settings.first_stage:
        start_from_first_stage(engine, read_state_dict(settings.first_stage))
        _compare_scale(engine, settings.first_stage)
    task = build(settings.task, "training.task")
    module = TrainingModule(engine, task, settings.optim, settings.seed)
    if not (settings.first_stage or _names_weights(config) or _trains_encoder(engine)):
        raise ValueError(
            "the autoencoder would be random: give the weights of a trained one by "
            "training.first_stage=FILE, or those of the whole model by model.params.ckpt_path=FILE"
        )
    return module


def _compare_scale(engine: Any, first_stage: str) -> None:
    """Say so where the latents of this autoencoder were measured to want another scale factor."""
    measured = json.loads(open_checkpoint(first_stage).metadata.get("latents", "{}"))
    wanted, given = measured.get("scale_factor"), getattr(engine, "scale_factor", None)
    if wanted and given and abs(given / wanted - 1) > SCALE_TOLERANCE:
        logger.warning(
            "the latents of %s have unit variance at scale_factor %s, and the recipe has %s: give "
            "model.params.scale_factor=%s, and the same in the YAML that samples",
            *(first_stage, wanted, given, wanted),
        )


def _names_weights(config: dict[str, Any]) -> bool:
    """Whether the model, or its first stage, is loaded from a file."""
    places = ("params.ckpt_path", "params.first_stage_config.params.ckpt_path")
    return any(OmegaConf.select(OmegaConf.create(config), place) for place in places)


def _trains_encoder(engine: Any) -> bool:
    stage = getattr(engine, "first_stage_model", engine)
    return any(p.requires_grad for p in stage.encoder.parameters())


def _trainer(lightning: Lightning, folder: Path) -> pl.Trainer:
    callbacks = [
        LastCheckpoint(folder, lightning.save.steps, lightning.save.minutes),
        JsonLog(folder, lightning.log.every),
        *(build(c, f"lightning.callbacks.{name}") for name, c in lightning.callbacks.items()),
    ]
    own = any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks)
    options = {
        "default_root_dir": folder,
        "enable_checkpointing": own,
        "callbacks": callbacks,
        **lightning.trainer,
    }
    check_arguments(pl.Trainer, lightning.trainer, "lightning.trainer")
    try:
        return pl.Trainer(**_TRAINER | options)
    except (MisconfigurationException, TypeError, ValueError) as exc:
        raise ValueError(f"lightning.trainer: {' '.join(str(exc).split())}") from exc


def _write_averages(module: TrainingModule, data: StepData, path: Path) -> None:
    """Write the averaged weights; of an autoencoder, measure what its latents look like as well."""
    notes = {"steps": str(module.ema.updates)}
    with module.ema.applied():
        if isinstance(module.task, ReconstructionTask):
            other = batches(data.dataset, data.batch_size, 0, module.seed + OTHER_SEED, 0)
            notes["latents"] = json.dumps(measure_latents(module.engine, other))
            logger.info("latents: %s", notes["latents"])
        write_half(module.engine.state_dict(), path, notes)
