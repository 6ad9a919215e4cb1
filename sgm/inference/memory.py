"""Where weights live, and in which type."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sgm.device import has_fast_bfloat16
from sgm.inference.optimized import OptimizedDecoder, OptimizedNetwork, Place
from sgm.inference.optimized.scaling import FLOAT16_SCALE, scale_stream
from sgm.models.diffusion import DiffusionEngine


def default_dtype(device: torch.device) -> torch.dtype:
    """The type for the U-Net: the half type with the smaller error that the device is fast in.

    float16 keeps three more bits of a value than bfloat16 and every GPU multiplies it natively; a
    CPU with bfloat16 units takes that, one without them float32.
    """
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


def first_stage_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the autoencoders beside a U-Net of ``dtype``: in float16 they overflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def decoder_dtype(device: torch.device, dtype: torch.dtype, optimize: str) -> torch.dtype:
    """The type of the decoder beside a U-Net of ``dtype``.

    The optimised decoder holds in float16 what overflows in the plain one; a CPU computes float32
    faster than float16.
    """
    scaled = optimize != "none" and device.type != "cpu"
    return dtype if scaled else first_stage_dtype(dtype)


# The approximations of ``fast``, as measured on the bundled model (docs/performance.md).
FAST_REUSE = 2
FAST_GUIDED = (0.3, math.inf)

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Networks:
    """What sampling calls.

    Attributes:
        network: called as the engine's ``model``.
        decoder: called as the first stage's ``decoder``.
    """

    network: Callable[..., Tensor]
    decoder: nn.Module


def place(
    engine: DiffusionEngine,
    device: torch.device,
    dtype: torch.dtype,
    optimize: str = "none",
    report: Report | None = None,
) -> Networks:
    """Bring the parts that sampling uses to a device and type; the others stay where they are.

    The first stage's encoder and the condition autoencoder's decoder are not used: mapped from a
    file, they are never read. Optimised networks are made of weights of their own; the engine's
    stay as they are stored.

    Args:
        engine: with weights.
        device: where they go.
        dtype: of the U-Net; the autoencoders may need a wider one.
        optimize: ``none`` for the plain networks, ``exact`` for the optimised ones, ``fast`` for
            those with deep features that serve :data:`FAST_REUSE` calls.
        report: called with the bytes that are placed, and all that will be.
    """
    engine.eval().requires_grad_(False)
    decoding = decoder_dtype(device, dtype, optimize)
    decoder: Any = engine.first_stage_model.decoder
    parts = [(engine.model, dtype), (decoder, decoding), *_other_parts(engine, dtype)]
    loading = _Loading(device, sum(tensor.nbytes for part, _ in parts for tensor in _held(part)))
    loading.report = report
    networks = Networks(engine.model, decoder)
    if optimize != "none":
        parts = parts[2:]
        if decoding == torch.float16:
            decoder = scale_stream(decoder, FLOAT16_SCALE)
        networks = Networks(
            OptimizedNetwork(
                engine.model, loading.to(dtype), reuse=FAST_REUSE if optimize == "fast" else 1
            ),
            OptimizedDecoder(decoder, loading.to(decoding)),
        )
    for part, number in parts:
        to = loading.to(number)
        for tensor in _held(part):
            tensor.data = to(tensor)
    loading.finish()
    return networks


class _Loading:
    """Brings tensors to a device, and reports how many bytes of them there are so far."""

    def __init__(self, device: torch.device, total: int) -> None:
        self.device, self.total, self.done = device, total, 0
        self.report: Report | None = None

    def to(self, dtype: torch.dtype) -> Place:
        """A function that brings a tensor to the device and, if it is of numbers, this type."""

        def place(tensor: Tensor) -> Tensor:
            self.done += tensor.nbytes
            if self.report:
                self.report(min(self.done, self.total), self.total)
            return tensor.detach().to(self.device, dtype if tensor.is_floating_point() else None)

        return place

    def finish(self) -> None:
        """Report the end, and nothing of what optimised networks place later, in a run."""
        if self.report:
            self.report(self.total, self.total)
        self.report = None


def _held(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _other_parts(
    engine: DiffusionEngine, dtype: torch.dtype
) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """What sampling uses beside U-Net and decoder, with its types."""
    autoencoder_dtype = first_stage_dtype(dtype)
    for part in _without(engine.first_stage_model, "encoder", "decoder"):
        yield part, autoencoder_dtype
    for embedder in engine.conditioner.embedders:
        encoder = getattr(embedder, "encoder", None)
        if isinstance(encoder, nn.Module):
            yield from ((part, autoencoder_dtype) for part in _without(encoder, "decoder"))
        else:
            yield embedder, dtype


def _without(module: nn.Module, *unused: str) -> list[nn.Module]:
    return [child for name, child in module.named_children() if name not in unused]
