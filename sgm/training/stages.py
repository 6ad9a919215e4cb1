"""The stages that make a small model from photographs: autoencoder, temporal decoder, U-Net.

Each stage is a recipe (see `sgm.training.recipe`) trained by the plain runner in a folder of its
own under one output folder: ``autoencoder``, ``decoder``, ``unet``.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import default_collate

from sgm.training import assemble, snapshot
from sgm.training.latents import LatentClips, encode_clips
from sgm.training.loop import Plan, Run, batches
from sgm.training.recipe import engine_config, section, typed
from sgm.training.settings import Cache, Data, Training
from sgm.util import instantiate_from_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """Where and how long one call works on a stage.

    Attributes:
        recipe: the merged recipe.
        out: folder of all stages.
        device: where to compute.
        deadline: when this call must stop (`time.monotonic`), or None.
        bfloat16: compute in bfloat16 under autocast.
    """

    recipe: DictConfig
    out: Path
    device: torch.device
    deadline: float | None = None
    bfloat16: bool = False

    @property
    def training(self) -> Training:
        """The recipe's section `training`."""
        return typed(self.recipe, "training", Training)

    @property
    def data(self) -> Data:
        """The recipe's section `data`."""
        return typed(self.recipe, "data", Data)

    def build(self) -> Any:
        """Build what the recipe trains, from the recipe's seed or its `ckpt_path`, in float32."""
        torch.manual_seed(self.training.seed)
        return instantiate_from_config(engine_config(self.recipe)).float()

    def state(self, name: str) -> dict[str, Any]:
        """Read the state of another stage."""
        return snapshot.load(self.out / name / "state.pt")

    def run(self, name: str, engine: nn.Module) -> Run:
        """Put ``engine`` on the device, make a run of it in the folder ``name``, and resume it."""
        settings = self.training
        run = Run(
            engine=engine.to(self.device),
            task=instantiate_from_config(settings.task),
            optim=settings.optim,
            folder=self.out / name,
            seed=settings.seed,
            bfloat16=self.bfloat16,
        )
        resumed = run.resume()
        logger.info("%s: %s at step %d", name, "goes on" if resumed else "starts", run.step)
        return run

    def dataset(self) -> Any:
        """Build the recipe's dataset."""
        return instantiate_from_config(self.data.dataset)

    def feed(self, dataset: Any, seed: int, step: int) -> Iterable[dict[str, Tensor]]:
        """Give batches from ``step`` on, of the recipe's size."""
        data = self.data
        return batches(dataset, data.batch_size, data.workers, seed, step)

    def fit(self, run: Run, dataset: Any) -> bool:
        """Train; say whether the plan is done."""
        plan = typed(self.recipe, "training.plan", Plan)
        feed = self.feed(dataset, run.seed, run.step)  # refuses a dataset without items
        run.task.check(run.engine, default_collate([dataset[0]]))
        return run.fit(feed, plan, self.deadline)


def train_autoencoder(stage: Stage) -> bool:
    """Train encoder and spatial decoder; when done, note the latents' statistics in the state."""
    run = stage.run("autoencoder", stage.build())
    done = stage.fit(run, stage.dataset())
    if done and not run.notes:
        other = stage.feed(stage.dataset(), run.seed + assemble.OTHER_SEED, 0)
        with run.ema.applied():
            run.notes = assemble.measure_latents(run.engine, other)
        run.save()
    logger.info("latents: %s", run.notes or "to be measured at the end")
    return done


def train_decoder(stage: Stage) -> bool:
    """Train the temporal decoder on clips; the encoder stays as the autoencoder stage left it."""
    engine = stage.build()
    weights = assemble.averaged_weights(stage.state("autoencoder"))
    assemble.start_from_first_stage(engine, weights)
    return stage.fit(stage.run("decoder", engine), stage.dataset())


def encode_latents(stage: Stage) -> bool:
    """Encode the U-Net stage's clips, or those still missing."""
    return _encode(stage, _diffusion_engine(stage))[0]


def train_unet(stage: Stage) -> bool:
    """Encode the clips where that is not done, then train U-Net and image tower on them.

    Raises:
        ValueError: the run began with another autoencoder.
    """
    engine = _diffusion_engine(stage)
    complete, folder = _encode(stage, engine)
    if not complete:
        return False
    encoder = assemble.digest(engine.first_stage_model.encoder.state_dict(), engine.scale_factor)
    run = stage.run("unet", engine)
    if run.notes.setdefault("encoder", encoder) != encoder:
        raise ValueError(f"{run.folder} began with another autoencoder: remove it to start anew")
    return stage.fit(run, LatentClips(folder))


def _encode(stage: Stage, engine: Any) -> tuple[bool, Path]:
    """Encode what is missing; the folder's name stands for what its files depend on."""
    data, cache = stage.data, typed(stage.recipe, "data.cache", Cache)
    weights = engine.first_stage_model.encoder.state_dict()
    name = assemble.digest(weights, engine.scale_factor, data.dataset)
    folder = stage.out / f"latents-{name}"
    done = encode_clips(
        engine,
        stage.dataset(),
        folder,
        clips=cache.clips,
        shard=cache.shard,
        workers=data.workers,
        deadline=stage.deadline,
        bfloat16=stage.bfloat16,
    )
    return done, folder


def _diffusion_engine(stage: Stage) -> Any:
    """Build the engine around the trained autoencoder and its scale factor."""
    state = stage.state("autoencoder")
    scale_factor = _scale_factor(state)
    engine = stage.build()
    assemble.start_from_first_stage(engine, assemble.averaged_weights(state))
    engine.scale_factor = scale_factor
    return engine.to(stage.device)


def _scale_factor(autoencoder: dict[str, Any]) -> float:
    """Return what brings the latents to unit variance, measured at the end of the first stage."""
    if "scale_factor" not in autoencoder["notes"]:
        raise ValueError("the autoencoder stage is not done: finish it first (training.plan)")
    return autoencoder["notes"]["scale_factor"]


def export(stage: Stage, path: Path, **notes: str) -> None:
    """Write the averaged weights of all stages as one checkpoint.

    Args:
        stage: the folder of the stages and the U-Net's recipe.
        path: the safetensors file.
        notes: further metadata, such as the model's name.

    Raises:
        ValueError: a stage is missing, or the YAML's scale factor is not the autoencoder's.
    """
    states = {part: stage.state(part) for part in ("autoencoder", "decoder", "unet")}
    scale = _scale_factor(states["autoencoder"])
    written = section(stage.recipe, "model.params").get("scale_factor")
    if written != scale:
        raise ValueError(f"the model's YAML says scale_factor: {written}; write {scale} there")
    engine = stage.build()
    engine.load_state_dict(assemble.averaged_weights(states["unet"]))
    assemble.install_first_stage(engine, assemble.averaged_weights(states["decoder"]))
    steps = {part: state["step"] for part, state in states.items()}
    hours = {part: round(state["seconds"] / 3600, 2) for part, state in states.items()}
    metadata = notes | {"scale_factor": str(scale), "steps": str(steps), "hours": str(hours)}
    assemble.write_half(engine.state_dict(), path, metadata)
    logger.info("wrote %s, %.1f MB: %s", path, path.stat().st_size / 1e6, metadata)
