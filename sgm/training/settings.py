"""The sections of a recipe with fixed keys; `sgm.training.recipe.typed` makes and checks them."""

from dataclasses import dataclass, field
from typing import Any

from sgm.training.optim import Optim
from sgm.training.recipe import require

Config = dict[str, Any]

FROZEN_TYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Lora:
    """Section `training.lora`: low-rank adapters, see `sgm.modules.lora`.

    Attributes:
        targets: patterns of the layers that get one, by their names in the engine.
        rank: of the updates.
        alpha: their weight, as a multiple of 1 / rank; None for the rank.
    """

    targets: list[str]
    rank: int = 16
    alpha: float | None = None


@dataclass(frozen=True)
class Memory:
    """Section `training.memory`: what makes training take less, see `sgm.training.savings`.

    Attributes:
        frozen: type of the weights that do not learn, but for autoencoders': ``float32``,
            ``bfloat16`` or ``float16``.
        feed_forward_chunks: pieces that feed-forwards are computed in.
    """

    frozen: str = "float32"
    feed_forward_chunks: int = 1

    def __post_init__(self) -> None:
        require(
            "training.memory",
            self,
            frozen=(self.frozen in FROZEN_TYPES, f"one of {', '.join(FROZEN_TYPES)}"),
            feed_forward_chunks=(self.feed_forward_chunks >= 1, "1 or more"),
        )


@dataclass(frozen=True)
class Training:
    """Section `training`.

    Attributes:
        seed: of all draws, 0 to 2**64 - 1.
        task: config of what a step computes.
        optim: optimiser settings.
        plan: `sgm.training.loop.Plan`, for the plain runner.
        first_stage: weights of a trained autoencoder to start from, for Lightning.
        lora: adapters; what learns is still what the task names, such as ``*.lora_*``.
        memory: what makes training take less memory.
    """

    seed: int
    task: Config
    optim: Optim
    plan: Config = field(default_factory=dict)
    first_stage: str | None = None
    lora: Lora | None = None
    memory: Memory = field(default_factory=Memory)

    def __post_init__(self) -> None:
        require("training", self, seed=(0 <= self.seed < 2**64, "0 to 2**64 - 1"))


@dataclass(frozen=True)
class Data:
    """Section `data`.

    Attributes:
        dataset: config of a dataset whose items depend on their number alone.
        batch_size: items of a batch, on each process.
        workers: processes that load ahead; 0 to load in the one that trains.
        cache: `Cache`, for the plain runner.
        root: where the data lies, for recipes whose ``dataset`` refers to it.
    """

    dataset: Config
    batch_size: int
    workers: int
    cache: Config = field(default_factory=dict)
    root: Any = None  # a path, or several

    def __post_init__(self) -> None:
        require(
            "data",
            self,
            batch_size=(self.batch_size >= 1, "1 or more"),
            workers=(self.workers >= 0, "0 or more"),
        )


@dataclass(frozen=True)
class Cache:
    """Section `data.cache`: clips that are encoded once.

    Attributes:
        clips: how many.
        shard: clips of a file.
    """

    clips: int
    shard: int


@dataclass(frozen=True)
class Save:
    """Section `lightning.save`: when the state of a run is written.

    Attributes:
        steps: optimiser steps between two writes, or None.
        minutes: time between two writes, or None.
    """

    steps: int | None = None
    minutes: float | None = 10

    def __post_init__(self) -> None:
        require(
            "lightning.save",
            self,
            steps=(self.steps is None or self.steps >= 1, "1 or more, or null"),
        )


@dataclass(frozen=True)
class Log:
    """Section `lightning.log`.

    Attributes:
        every: steps of a line, which gives means over them.
        to: what also shows the numbers and videos: ``tensorboard``, ``wandb`` or ``none``; None for
            TensorBoard if it is installed.
    """

    every: int = 1
    to: str | None = None

    def __post_init__(self) -> None:
        require("lightning.log", self, every=(self.every >= 1, "1 or more"))


@dataclass(frozen=True)
class Lightning:
    """Section `lightning`.

    Attributes:
        trainer: arguments of Lightning's `Trainer`.
        save: when the state is written.
        log: how often a line is logged.
        callbacks: configs of further callbacks, by any name.
    """

    trainer: Config
    save: Save = field(default_factory=Save)
    log: Log = field(default_factory=Log)
    callbacks: Config = field(default_factory=dict)
