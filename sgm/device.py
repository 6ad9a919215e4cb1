"""Which devices there are, what they are called, and what they are fast in; needs torch alone."""

import ctypes
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sgm.errors import let_go

# Flags of processor units that multiply bfloat16 natively; elsewhere it is emulated and slow.
_BFLOAT16_UNITS = frozenset(("avx512_bf16", "amx_bf16", "bf16", "svebf16"))

# What PyTorch and its libraries say in errors that are plain RuntimeErrors on some devices.
# The last is cuDNN's, where no algorithm's working memory fits.
_OUT_OF_MEMORY = re.compile(
    "out of memory|not enough memory|allocate memory|ALLOC_FAILED|unable to find an engine"
)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def parse_device(name: str) -> torch.device:
    """Check that a device exists and holds values, which ``meta`` does not.

    Raises:
        ValueError: it does not.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as exc:
        reason = str(exc).splitlines()[0]
        raise ValueError(f"device {name!r} is not available here: {reason}") from exc
    return device


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turn a lack of memory, which each device reports in its own way, into one line of advice.

    What the failed functions had in memory is given up.

    Raises:
        MemoryError: in place of such an error; all others pass.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not _OUT_OF_MEMORY.search(str(error)):
            raise
        let_go(error)
        raise MemoryError(f"out of memory: {advice}") from error


def keep_freed_memory() -> None:
    """Have the C library keep large pieces of memory that are freed, for the next tensors.

    glibc gives pieces of more than 32 MB back to the system at once, and the page faults of the
    next one take longer than many an operation on a CPU. For whole programs that sample on a CPU:
    the process stays as large as it ever was. Does nothing with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def device_name(device: torch.device) -> str:
    """What the device is called, such as ``NVIDIA A100-SXM4-80GB``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return _cpu_info("model name") or platform.processor() or platform.machine()


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself; where it does not, bfloat16 is emulated."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return not _BFLOAT16_UNITS.isdisjoint(_cpu_info("flags", "Features").split())
    return False


@contextmanager
def full_float32() -> Iterator[None]:
    """Have CUDA convolve float32 numbers with all of their bits; by default it takes 11.

    The switch is the process's.
    """
    cudnn = torch.backends.cudnn  # whose flags() would switch it off as well
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def _cpu_info(*names: str) -> str:
    """The first of these entries in Linux's list of processors; empty elsewhere."""
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123 - a pseudo file, Linux alone
            line = next((line for line in file if line.startswith(names)), "")
    except OSError:
        return ""
    return line.partition(":")[2].strip()
