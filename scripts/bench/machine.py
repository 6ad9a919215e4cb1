"""What figures depend on."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sgm.device import device_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "amx_fp16")


def describe(device: torch.device) -> dict[str, Any]:
    """Device, processor and what else runs on it, versions, commit."""
    cpu = _cpu_info()
    found: dict[str, Any] = {
        "device": device_name(device),
        "processor": cpu.get("model name") or platform.machine(),
        "processor_flags": [flag for flag in _CPU_FLAGS if flag in cpu.get("flags", "").split()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
        "commit": commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "device_bytes": properties.total_memory,
        }
    return found


def installed(package: str) -> str | None:
    """The version of a package; None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None outside of one."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def _cpu_info() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
