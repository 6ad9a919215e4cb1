"""How much memory a training run takes, counted before it starts.

A step is done on the meta device, where tensors have sizes and no values, and its memory followed
(`sgm.inference.footprint`). What autocast does is imitated: as on a GPU, products are taken in the
narrow type and norms in float32. Shapes: b clips, t frames, h height, w width.
"""

import copy
import logging
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from sgm.inference.budget import USABLE, free_bytes
from sgm.inference.footprint import peak_bytes
from sgm.modules.attention import BasicTransformerBlock
from sgm.training.optim import MOMENT_BYTES, Optim
from sgm.training.tasks import Task

logger = logging.getLogger(__name__)

SMALL = 100_000_000
"""Parameters below which nothing is counted: such runs fit, and counting takes seconds."""

_PRODUCTS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_NORMS = (F.layer_norm, F.group_norm)


@dataclass(frozen=True)
class Needs:
    """Bytes that one process takes on its device.

    Attributes:
        weights: all parameters and buffers.
        gradients: of what learns.
        optimizer: its moments.
        average: the moving average of what learns.
        activations: the most that a step takes beside these.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """All together."""
        return sum(asdict(self).values())

    def describe(self) -> str:
        """Say it in a line."""
        parts = (f"{name} {size / 1e9:.1f}" for name, size in asdict(self).items())
        return f"{self.total / 1e9:.1f} GB ({', '.join(parts)})"


def announce(
    engine: nn.Module,
    task: Task,
    optim: Optim,
    batch: Mapping[str, Tensor],
    narrow: torch.dtype | None,
    device: torch.device,
) -> None:
    """Log what a run of a large model will take, and what to change where that is too much.

    Args:
        engine: as in `count_needs`.
        task: as there.
        optim: as there.
        batch: of the sizes that will come.
        narrow: as there.
        device: where the run computes.
    """
    if sum(p.numel() for p in engine.parameters()) < SMALL:
        return
    needs, free = count_needs(engine, task, optim, batch, narrow), free_bytes(device)
    logger.info("training takes about %s of %.1f GB on %s", needs.describe(), free / 1e9, device)
    if needs.total > USABLE * free:
        logger.warning("%s has too little memory: %s", device, advice(engine, needs, batch))


def advice(engine: nn.Module, needs: Needs, batch: Mapping[str, Tensor]) -> str:
    """What would take less, the largest saving first."""
    network: Any = getattr(getattr(engine, "model", None), "diffusion_model", None)
    checkpoints = getattr(network, "use_checkpoint", True)
    learning = needs.gradients + needs.optimizer + needs.average
    ways = {
        "set model.params.network_config.params.use_checkpoint=true": not checkpoints,
        "lower data.batch_size": len(next(iter(batch.values()))) > 1,
        "train a LoRA (svd_xt_lora.yaml)": learning > needs.activations,
        "set training.memory.frozen=bfloat16 and training.memory.feed_forward_chunks=4": True,
        "train on fewer or smaller frames, or on latents (prepare_videos.py --latents)": True,
    }
    return "; ".join(way for way, helps in ways.items() if helps)


def count_needs(
    engine: nn.Module,
    task: Task,
    optim: Optim,
    batch: Mapping[str, Tensor],
    narrow: torch.dtype | None,
) -> Needs:
    """Count what a run takes, without computing anything.

    Args:
        engine: as it trains; it is not touched.
        task: what a step computes.
        optim: optimiser settings.
        batch: of the sizes that will come.
        narrow: the type of autocast, or None without.
    """
    learning = [p for p in engine.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in learning)
    return Needs(
        weights=sum(x.nbytes for x in (*engine.parameters(), *engine.buffers())),
        gradients=sum(p.nbytes for p in learning),
        optimizer=numbers * MOMENT_BYTES[optim.kind],
        average=4 * numbers,
        activations=_step_peak(engine, task, batch, narrow),
    )


def _step_peak(
    engine: nn.Module, task: Task, batch: Mapping[str, Tensor], narrow: torch.dtype | None
) -> int:
    """The most that a step takes at once; gradients are counted as gone when they are complete."""
    twin: Any = _without_values(engine)
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_forget_gradient)
    given = {key: value.to("meta") for key, value in batch.items()}
    encoding = 0
    if hasattr(twin, "conditioner"):
        twin.conditioner.requires_grad_(False)
        if "frames" in given:
            encoding = _encoding_peak(twin, task, given["frames"])
        given = _encoded(twin, given)

    learn: Any = task

    def step() -> None:
        with _Autocast(narrow) if narrow else nullcontext():
            loss, _ = learn(twin, given, None)  # draws have no values either
            _backward(loss)

    return max(encoding, peak_bytes(step, gradients=True))


def _encoding_peak(twin: Any, task: Any, frames: Tensor) -> int:
    """The most that the first stage takes for frames (b, t, 3, h, w)."""
    rows = frames.flatten(0, 1)
    at_once = task.frames_at_once or twin.en_and_decode_n_samples_a_time or len(rows)
    return peak_bytes(lambda: twin.first_stage_model.encoder(rows[:at_once]))


def _encoded(twin: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch as if it had been encoded beforehand: what is left is the network's own step."""
    network, f = twin.model.diffusion_model, twin.first_stage_model.downsampling
    z = network.out[-1].out_channels
    if "latents" in batch:
        latents = batch["latents"]
    else:
        b, t, _, h, w = batch["frames"].shape
        latents = torch.empty(b, t, z, h // f, w // f, device="meta")
    tokens = next(m for m in network.modules() if isinstance(m, BasicTransformerBlock))
    width = tokens.attn2.to_v.in_features
    rest = {k: v for k, v in batch.items() if k not in ("frames", "first_frame")}
    return rest | {
        "latents": latents,
        "cond_latents": torch.empty_like(latents[:, 0]),
        "cond_aug": torch.empty(len(latents), device="meta"),
        "image_embedding": torch.empty(len(latents), width, device="meta"),
    }


def _without_values(engine: nn.Module) -> nn.Module:
    """The same modules, in the same modes, with tensors on the meta device."""
    tensors: Iterable[Tensor] = (*engine.parameters(), *engine.buffers())
    memo: dict[int, Any] = {}
    for each in tensors:
        empty = torch.empty_like(each.data, device="meta")
        is_parameter = isinstance(each, nn.Parameter)
        memo[id(each)] = nn.Parameter(empty, each.requires_grad) if is_parameter else empty
    return copy.deepcopy(engine, memo)


def _backward(loss: Tensor) -> None:
    """As ``loss.backward()``, which would suspend function modes: what checkpoints compute again
    would not be what they computed first."""
    options = {"allow_unreachable": True, "accumulate_grad": True}
    _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), **options)


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Autocast(TorchFunctionMode):
    """What autocast does on a GPU, for the operations that these networks spend memory on."""

    def __init__(self, narrow: torch.dtype) -> None:
        super().__init__()
        self._narrow = narrow

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        wanted = self._narrow if func in _PRODUCTS else torch.float32 if func in _NORMS else None
        if wanted is not None:
            args = tuple(_cast(each, wanted) for each in args)
            kwargs = {name: _cast(each, wanted) for name, each in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    numbers = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if numbers else value
