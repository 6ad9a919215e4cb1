"""Training by Lightning, from a recipe: what ``main.py`` does after reading its arguments."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from sgm.checkpoint import read_state_dict
from sgm.training.assemble import OTHER_SEED, measure_latents, start_from_first_stage, write_half
from sgm.training.callbacks import JsonLog, LastCheckpoint
from sgm.training.loop import batches
from sgm.training.module import StepData, TrainingModule
from sgm.training.optim import Optim
from sgm.training.recipe import engine_config, section
from sgm.training.tasks import ReconstructionTask
from sgm.util import instantiate_from_config

logger = logging.getLogger(__name__)

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
        ValueError: the recipe lacks something, or the folder has a run and ``resume`` is false.
    """
    last = folder / "last.ckpt"
    if last.exists() and not resume:
        raise ValueError(f"{folder} has a run: continue it with --resume, or name another --logdir")
    settings, lightning = section(recipe, "training"), section(recipe, "lightning")
    if lightning["trainer"].get("max_steps", -1) < 1:
        raise ValueError("lightning.trainer.max_steps: expected the number of steps of the run")
    data = StepData(**_data_options(recipe), seed=settings["seed"])
    module = _module(recipe, settings)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(recipe, folder / "recipe.yaml", resolve=True)
    with warnings.catch_warnings():
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message)
        trainer = pl.Trainer(**_TRAINER | _trainer_options(lightning, folder))
        trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    weights = folder / "weights.safetensors"
    if trainer.is_global_zero:
        _write_averages(module, data, weights)
    return weights


def _data_options(recipe: DictConfig) -> dict[str, Any]:
    data = section(recipe, "data")
    return {key: data[key] for key in ("dataset", "batch_size", "workers")}


def _module(recipe: DictConfig, settings: dict[str, Any]) -> TrainingModule:
    torch.manual_seed(settings["seed"])
    engine = instantiate_from_config(engine_config(recipe)).float()
    if settings.get("first_stage"):
        start_from_first_stage(engine, read_state_dict(settings["first_stage"]))
    task = instantiate_from_config(settings["task"])
    return TrainingModule(engine, task, Optim(**settings["optim"]), settings["seed"])


def _trainer_options(lightning: dict[str, Any], folder: Path) -> dict[str, Any]:
    callbacks = [
        LastCheckpoint(folder, **lightning.get("save", {})),
        JsonLog(folder, **lightning.get("log", {})),
        *(instantiate_from_config(c) for c in lightning.get("callbacks", {}).values()),
    ]
    own = any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks)
    return {
        "default_root_dir": folder,
        "enable_checkpointing": own,
        "callbacks": callbacks,
        **lightning["trainer"],
    }


def _write_averages(module: TrainingModule, data: StepData, path: Path) -> None:
    """Write the averaged weights; of an autoencoder, measure what its latents look like as well."""
    notes = {"steps": str(module.ema.updates)}
    with module.ema.applied():
        if isinstance(module.task, ReconstructionTask):
            other = batches(data.dataset, data.batch_size, 0, module.seed + OTHER_SEED, 0)
            notes["latents"] = json.dumps(measure_latents(module.engine, other))
            logger.info("latents: %s", notes["latents"])
        write_half(module.engine.state_dict(), path, notes)
