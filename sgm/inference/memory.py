"""Where weights live, and in which type."""

import platform

import torch
from torch import nn

from sgm.models.diffusion import DiffusionEngine

# x86 flags of units that multiply bfloat16 natively; elsewhere it is emulated and slow.
_BFLOAT16_UNITS = frozenset(("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def parse_device(name: str) -> torch.device:
    """Check that a device exists.

    Raises:
        ValueError: it does not.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as exc:
        reason = str(exc).splitlines()[0]
        raise ValueError(f"device {name!r} is not available here: {reason}") from exc
    return device


def device_name(device: torch.device) -> str:
    """What the device is called, such as ``NVIDIA A100-SXM4-80GB``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return _cpu_info("model name") or platform.processor() or platform.machine()


def default_dtype(device: torch.device) -> torch.dtype:
    """The type for the U-Net: the half type with the smaller error that the device is fast in.

    float16 keeps three more bits of a value than bfloat16 and every GPU multiplies it natively; a
    CPU with bfloat16 units takes that, one without them float32.
    """
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively."""
    flags = _cpu_info("flags", "Features")
    return not _BFLOAT16_UNITS.isdisjoint(flags.split())


def _cpu_info(*names: str) -> str:
    """The first of these entries in Linux's list of processors; empty elsewhere."""
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123 - a pseudo file, Linux alone
            line = next((line for line in file if line.startswith(names)), "")
    except OSError:
        return ""
    return line.partition(":")[2].strip()


def place(engine: DiffusionEngine, device: torch.device, dtype: torch.dtype) -> None:
    """Bring the parts that sampling uses to a device and type; the others stay where they are.

    The first stage's encoder and the condition autoencoder's decoder are not used: mapped from a
    file, they are never read. In float16 the autoencoders overflow (black frames), so they run in
    float32 then.
    """
    autoencoder_dtype = torch.float32 if dtype == torch.float16 else dtype
    engine.model.to(device, dtype)
    _place(engine.first_stage_model, device, autoencoder_dtype, unused="encoder")
    for embedder in engine.conditioner.embedders:
        encoder = getattr(embedder, "encoder", None)
        if isinstance(encoder, nn.Module):
            _place(encoder, device, autoencoder_dtype, unused="decoder")
        else:
            embedder.to(device, dtype)
    engine.eval().requires_grad_(False)


def _place(module: nn.Module, device: torch.device, dtype: torch.dtype, unused: str) -> None:
    for name, child in module.named_children():
        if name != unused:
            child.to(device, dtype)
