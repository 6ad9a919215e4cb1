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
from sgm.device import memory_errors
from sgm.errors import one_line
from sgm.training import snapshot
from sgm.training.assemble import OTHER_SEED, measure_latents, start_from_first_stage
from sgm.training.callbacks import JsonLog, LastCheckpoint, StopOnSignal
from sgm.training.decoder_task import AdversarialModule, AdversarialTask
from sgm.training.export import export
from sgm.training.loop import batches
from sgm.training.lora import adapt
from sgm.training.memory import announce
from sgm.training.module import StepData, TrainingModule
from sgm.training.recipe import engine_config, engine_section, typed
from sgm.training.reporting import make_logger
from sgm.training.savings import chunk_feed_forwards, skip_idle_attention, store_weights
from sgm.training.settings import Data, Lightning, Training
from sgm.training.strategies import WholeFiles
from sgm.training.tasks import ReconstructionTask
from sgm.util import counted

logger = logging.getLogger(__name__)

SCALE_TOLERANCE = 0.02

SMALLER = (
    "lower data.batch_size (and raise lightning.trainer.accumulate_grad_batches), train fewer "
    "parts, or share the model out with configs/training/strategies/fsdp2.yaml"
)
"""What to do where memory is too small."""

NARROW = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Types that autocast takes products in, by ``lightning.trainer.precision``."""

_TRAINER = {
    "max_epochs": -1,  # steps count; an epoch has no end
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

    The folder gets ``recipe.yaml``, ``log.jsonl``, ``last.ckpt`` and ``weights.safetensors``, or
    with adapters ``lora.safetensors``.

    Args:
        recipe: the merged recipe.
        folder: of the run.
        resume: continue the run that stands there, from its start if it had not saved yet.

    Raises:
        ValueError: something in the recipe is wrong or missing, or the folder has a run and
            ``resume`` is false. What can be told before the first step leaves nothing written.
        Stopped: SIGTERM or SIGINT came; the state after the last step is saved.
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
    with warnings.catch_warnings():
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message)
        stop = StopOnSignal()
        trainer = _trainer(lightning, folder, stop)
        if last.is_file():  # DeepSpeed's are folders
            _require_state_of(module, last)
        _look_ahead(module, data, trainer)
        # The first that is written: what can be refused has been.
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(recipe, folder / "recipe.yaml", resolve=True)
        with memory_errors(SMALLER):
            trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    stop.require_the_end()
    weights = folder / ("lora.safetensors" if settings.lora else "weights.safetensors")
    notes = {"steps": str(module.ema.updates)} | _measure(module, data)
    if trainer.is_global_zero and last.is_file():
        export(last, weights, dtype=torch.float16, force=True, notes=notes)
    return weights


def _look_ahead(module: TrainingModule, data: StepData, trainer: pl.Trainer) -> None:
    """Make sure that the first step can be taken; log how much memory it will take.

    Strategies that share a model out need less on each device.

    Raises:
        ValueError: it cannot.
    """
    batch = data.example()
    module.check(trainer, batch)
    if trainer.is_global_zero:
        narrow = NARROW.get(str(trainer.precision))
        parts = (module.engine, module.task, module.optim)
        announce(*parts, batch, narrow, trainer.strategy.root_device)


def _require_state_of(module: TrainingModule, path: Path) -> None:
    """Make sure that a state is whole and that of this model.

    Raises:
        ValueError: it is not.
    """
    stored = snapshot.load(path, mapped=True).get("state_dict", {})
    found = {name: x.shape for name, x in stored.items()}
    wanted = {name: x.shape for name, x in module.state_dict().items()}
    differing = sorted(name for name, _ in found.items() ^ wanted.items())
    if differing:
        faults = counted(differing, "tensor", "missing, unexpected or of another shape")
        raise ValueError(f"{path} is of another model, or damaged: {faults}")


def _module(recipe: DictConfig, settings: Training) -> TrainingModule:
    config = engine_config(recipe)
    torch.manual_seed(settings.seed)
    engine = build(config, engine_section(recipe))
    if settings.first_stage:
        start_from_first_stage(engine.float(), read_state_dict(settings.first_stage))
        _compare_scale(engine, settings.first_stage)
    if settings.lora:
        adapt(engine, settings.lora, settings.seed)
    chunk_feed_forwards(engine, settings.memory.feed_forward_chunks)
    skip_idle_attention(engine)
    task = build(settings.task, "training.task")
    kind = AdversarialModule if isinstance(task, AdversarialTask) else TrainingModule
    module = kind(engine, task, settings.optim, settings.seed)
    store_weights(engine, getattr(torch, settings.memory.frozen))
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


def _trainer(lightning: Lightning, folder: Path, stop: StopOnSignal) -> pl.Trainer:
    callbacks = [
        stop,
        JsonLog(folder, lightning.log.every),
        *(build(c, f"lightning.callbacks.{name}") for name, c in lightning.callbacks.items()),
        # The last: what belongs to a step has been done when its state is saved.
        LastCheckpoint(folder, lightning.save.steps, lightning.save.minutes),
    ]
    own = any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks)
    options = {
        "default_root_dir": folder,
        "enable_checkpointing": own,
        "callbacks": callbacks,
        "plugins": [WholeFiles()],
        "logger": make_logger(lightning.log.to, folder),
        "log_every_n_steps": lightning.log.every,
        **{name: _made(name, value) for name, value in lightning.trainer.items()},
    }
    check_arguments(pl.Trainer, lightning.trainer, "lightning.trainer")
    try:
        return pl.Trainer(**_TRAINER | options)
    except (MisconfigurationException, TypeError, ValueError) as exc:
        raise ValueError(f"lightning.trainer: {one_line(exc)}") from exc


def _made(name: str, value: Any) -> Any:
    """An argument of the trainer; a config, such as that of a strategy, is built."""
    described = isinstance(value, dict) and "target" in value
    return build(value, f"lightning.trainer.{name}") if described else value


def _measure(module: TrainingModule, data: StepData) -> dict[str, str]:
    """Of an autoencoder, measure what the latents of its averaged weights look like."""
    if not isinstance(module.task, ReconstructionTask):
        return {}
    other = batches(data.dataset, data.batch_size, 0, module.seed + OTHER_SEED, 0)
    with module.ema.applied():
        latents = json.dumps(measure_latents(module.engine, other))
    logger.info("latents: %s", latents)
    return {"latents": latents}
