"""Training runs of seconds: recipes around the one-second model, and processes that run them.

The processes are forked off a server that has imported Lightning once, so each begins in a tenth of
a second, and has one thread: equal runs give equal sums.
"""

import io
import json
import multiprocessing
import os
import resource
import socket
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import save_file

from sgm.data.synthetic import SyntheticMotion
from tests.tiny import FRAMES, tiny_config

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
SAVED_AT_THE_END = {"training.plan.save_minutes": 60, "lightning.save.steps": 1000}
"""Changes to a recipe that otherwise saves all the time, which takes longer than its steps."""
PRELOADED = ["sgm.training.run", "sgm.training.samples", "tests.runs"]


def write_photos(path: Path) -> Path:
    """Write three smooth pictures as a tensor file."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 8, 10, generator=g)
    fine = F.interpolate(coarse, size=(80, 100), mode="bicubic").clamp(0, 1)
    save_file({f"photo{i}": picture for i, picture in enumerate((fine * 255).byte())}, path)
    return path


def write_recipe(folder: Path, photos: Path, name: str, **changes: Any) -> Path:
    """Write one of the shipped recipes around the tiny model, made short, and return its path."""
    shipped = OmegaConf.load(ROOT / "configs" / "training" / f"{name}.yaml")
    shipped.pop("include")
    params = {"photos": str(photos), "size": [32, 32], "length": 40}
    if name != "svd_tiny_autoencoder":
        params["frames"] = FRAMES
    short = {
        "training": {
            "optim": {"warmup": 2, "ema": 0.9},
            "plan": {"steps": STEPS, "minutes": None, "save_minutes": 0.002, "log_every": 1},
        },
        "data": {"dataset": {"params": params}, "batch_size": 2, "workers": 0},
        "lightning": {
            "trainer": {
                "max_steps": STEPS,
                "accelerator": "cpu",
                "devices": 1,
                "precision": "32-true",
                "enable_progress_bar": False,
            },
            "save": {"steps": 2},
            "log": {"to": "none"},
        },
    }
    merged = OmegaConf.merge(tiny_config(scale_factor=2.0), shipped, short)
    merged.model.params.conditioner_config.params.emb_models[0].is_trainable = True
    for path, value in changes.items():
        OmegaConf.update(merged, path, value, force_add=True)
    OmegaConf.save(merged, folder / f"{name}.yaml")
    return folder / f"{name}.yaml"


def curve(folder: Path) -> list[tuple[float, ...]]:
    """Step, learning rate, loss and gradient norm of each line of a run's log."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["lr"], line["loss"], line["norm"]) for line in lines]


def start(count: int, arguments: list[str], output: Path, program: str = "main") -> list[Any]:
    """Start main.py, or another program, in so many processes, as torchrun would; what they print
    goes to files."""
    context = _context()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output.mkdir(parents=True, exist_ok=True)
    processes = [
        context.Process(
            target=_run, args=(rank, count, port, arguments, str(output), program), daemon=True
        )
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def _context() -> Any:
    """Where processes are forked off a server that holds what training imports."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if server._preload_modules != PRELOADED:
        server._stop()  # that of other tests, which would import it all for each process
    os.environ["OMP_NUM_THREADS"] = "1"  # of the server
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run(count: int, arguments: list[str], output: Path, program: str = "main") -> list[int | None]:
    """As `start`, and wait; the exit codes."""
    processes = start(count, arguments, output, program)
    for process in processes:
        process.join(timeout=100)
    return [process.exitcode for process in processes]


def kill_at(
    step: int, log: Path, arguments: list[str], output: Path, program: str = "main"
) -> None:
    """As `start` for one process, and kill it once its log has so many steps."""
    (process,) = start(1, arguments, output, program)
    while process.is_alive() and (not log.exists() or log.read_text().count("\n") < step):
        time.sleep(0.002)
    assert process.is_alive(), "the run ended before it could be killed"
    process.kill()
    process.join()


def _run(rank: int, count: int, port: int, arguments: list[str], output: str, program: str) -> None:
    torch.set_num_threads(1)
    if count > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(port)}
    main = import_module(program).main
    file = Path(output) / f"{rank}.err"
    with file.open("w") as err, redirect_stderr(err), redirect_stdout(io.StringIO()):
        code = main(arguments)
    sys.exit(code)


class StopAt(pl.Callback):
    """Ends a run early, as an interruption would that lets it save."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


class SignalAt(pl.Callback):
    """Sends the first process a signal while it works on the step after this one."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.is_global_zero:
            os.kill(os.getpid(), self.number)


class FullDisk(pl.Callback):
    """From some step on, no file may become larger than 100 kB."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


class BrokenMotion(SyntheticMotion):
    """Clips of which number 7 is no number; all have names."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = super().__getitem__(index) | {"index": torch.tensor(index)}
        return item | {"frames": item["frames"] * (float("nan") if index == 7 else 1)}

    def describe(self, index: int) -> str:
        return f"clips/{index}.mp4 at 1.5 s"
