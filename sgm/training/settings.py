"""The sections of a recipe with fixed keys; `sgm.training.recipe.typed` makes and checks them."""

from dataclasses import dataclass, field
from typing import Any

from sgm.training.optim import Optim

Config = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """Section `training`.

    Attributes:
        seed: of all draws.
        task: config of what a step computes.
        optim: optimiser settings.
        plan: `sgm.training.loop.Plan`, for the plain runner.
        first_stage: weights of a trained autoencoder to start from, for Lightning.
    """

    seed: int
    task: Config
    optim: Optim
    plan: Config = field(default_factory=dict)
    first_stage: str | None = None


@dataclass(frozen=True)
class Data:
    """Section `data`.

    Attributes:
        dataset: config of a dataset whose items depend on their number alone.
        batch_size: items of a batch, on each process.
        workers: processes that load ahead; 0 to load in the one that trains.
        cache: `Cache`, for the plain runner.
    """

    dataset: Config
    batch_size: int
    workers: int
    cache: Config = field(default_factory=dict)


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


@dataclass(frozen=True)
class Log:
    """Section `lightning.log`.

    Attributes:
        every: steps of a line, which gives means over them.
    """

    every: int = 1


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
