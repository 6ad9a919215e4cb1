"""Where weights live, and in which type."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from sgm.device import has_fast_bfloat16
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


Report = Callable[[int, int], None]


def place(
    engine: DiffusionEngine, device: torch.device, dtype: torch.dtype, report: Report | None = None
) -> None:
    """Bring the parts that sampling uses to a device and type; the others stay where they are.

    The first stage's encoder and the condition autoencoder's decoder are not used: mapped from a
    file, they are never read.

    Args:
        engine: with weights.
        device: where they go.
        dtype: of the U-Net; the autoencoders may need a wider one.
        report: called with the bytes that are placed, and all that will be.
    """
    tensors = [
        (tensor, number)
        for part, number in _used_parts(engine, dtype)
        for tensor in (*part.parameters(), *part.buffers())
    ]
    total = sum(tensor.nbytes for tensor, _ in tensors)
    done = 0
    for tensor, number in tensors:
        done += tensor.nbytes
        tensor.data = tensor.data.to(device, number if tensor.is_floating_point() else None)
        if report:
            report(done, total)
    engine.eval().requires_grad_(False)


def _used_parts(
    engine: DiffusionEngine, dtype: torch.dtype
) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """What sampling uses, with its types."""
    autoencoder_dtype = first_stage_dtype(dtype)
    yield engine.model, dtype
    for part in _without(engine.first_stage_model, "encoder"):
        yield part, autoencoder_dtype
    for embedder in engine.conditioner.embedders:
        encoder = getattr(embedder, "encoder", None)
        if isinstance(encoder, nn.Module):
            yield from ((part, autoencoder_dtype) for part in _without(encoder, "decoder"))
        else:
            yield embedder, dtype


def _without(module: nn.Module, unused: str) -> list[nn.Module]:
    return [child for name, child in module.named_children() if name != unused]
