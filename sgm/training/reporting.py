"""Where the numbers and videos of a run are shown: TensorBoard, Weights & Biases, or nowhere."""

import io
import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from sgm.inference.videos import Video

logger = logging.getLogger(__name__)


def make_logger(kind: str | None, folder: Path) -> Logger | Literal[False]:
    """Make what shows a run.

    Args:
        kind: ``tensorboard``, whose files go to the run's folder; ``wandb``; or ``none``. None
            stands for TensorBoard, or for a line in the log where that is not installed.
        folder: of the run.

    Raises:
        ValueError: another kind, or its package is not installed.
    """
    if kind is None and find_spec("tensorboard") is None:
        logger.warning("no curves in TensorBoard: pip install tensorboard; log.jsonl has them all")
        return False
    if kind == "none":
        return False
    kind = kind or "tensorboard"
    kinds: dict[str, Callable[[Path], Logger]] = {
        "tensorboard": _tensorboard,
        "wandb": lambda folder: WandbLogger(name=folder.name, save_dir=folder),
    }
    if kind not in kinds:
        raise ValueError(f"lightning.log.to: expected {', '.join(kinds)} or none, got {kind!r}")
    try:
        return kinds[kind](folder)
    except ModuleNotFoundError as exc:
        raise ValueError(
            f"lightning.log.to: {kind} is not installed: pip install {kind}, or write "
            "lightning.log.to=none (log.jsonl has all numbers)"
        ) from exc


def _tensorboard(folder: Path) -> TensorBoardLogger:
    import tensorboard  # noqa: F401 - or Lightning takes another

    return TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False)


def show_numbers(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Show numbers of the present step."""
    for each in trainer.loggers:
        each.log_metrics(dict(values), step=trainer.global_step)


def show_video(trainer: pl.Trainer, name: str, video: Video, file: Path) -> None:
    """Show a video, which is also in ``file``, of the present step."""
    for each in trainer.loggers:
        if isinstance(each, TensorBoardLogger):
            _add_gif(each.experiment, name, video, trainer.global_step)
        elif isinstance(each, WandbLogger):
            each.log_video(name, [str(file)], step=trainer.global_step)


def _add_gif(writer: Any, name: str, video: Video, step: int) -> None:
    """TensorBoard plays GIF files among its images; its own video writer needs more packages."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    first, *rest = (Image.fromarray(frame) for frame in video.frames)
    data = io.BytesIO()
    first.save(data, "GIF", save_all=True, append_images=rest, duration=1000 // video.fps, loop=0)
    height, width = video.frames.shape[1:3]
    image = Summary.Image(
        height=height, width=width, colorspace=3, encoded_image_string=data.getvalue()
    )
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
