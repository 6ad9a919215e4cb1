"""How long a run will take, told before a model is loaded.

The multiplications of the networks are counted on the meta device, where nothing is computed, and
divided by the rate at which the device multiplies matrices. Image encoders (two passes over one
picture), sampler arithmetic and writing the file are left out: a few per cent of a long run.

Shapes: t frames, z latent channels, f downsampling factor, h height, w width, d context width.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sgm.device import memory_errors
from sgm.inference.dtypes import decoder_dtype
from sgm.inference.levels import DEFAULT_LEVEL
from sgm.inference.progress import duration
from sgm.inference.settings import SAMPLER_TARGETS, ModelFiles, Settings, guidance_halves
from sgm.modules.autoencoding.temporal_ae import VideoDecoder
from sgm.util import instantiate_from_config

# Share of the rate of large matrix products that whole networks are taken to reach: convolutions,
# normalisation and attention are slower. A rule of thumb: only the order of magnitude is meant.
EFFICIENCY = 0.5
LONG = 120.0  # seconds from which a run is announced
BENCHMARK_SECONDS = 0.2
BYTES_PER_WEIGHT = 2  # at least, in published files
READ_SAMPLE = 16 << 20  # bytes

_CALLS_PER_STEP = {SAMPLER_TARGETS["heun"]: 2, SAMPLER_TARGETS["dpmpp_2s_ancestral"]: 2}


def announcement(files: ModelFiles, settings: Settings, videos: int) -> str | None:
    """How long each of these videos will take, in a line; None where all together are soon made.

    Raises:
        MemoryError: the device has no room to measure its speed.
    """
    with memory_errors(f"{settings.options.device} has no room; free it or take another --device"):
        if videos * bound_seconds(files, settings) <= LONG:
            return None
        seconds = estimate_seconds(files, settings)
    if videos * seconds <= LONG:
        return None
    device = settings.options.device
    place = "this CPU" if device == "cpu" else f"this {device} device"
    return f"{files.spec.name} on {place}: about {duration(seconds)} a video"


def estimate_seconds(files: ModelFiles, settings: Settings) -> float:
    """Seconds that one video will take on the device and in the type of ``settings``."""
    return sum(stage_seconds(*count_flops(files, settings), settings, cache(matmul_rate)))


def stage_seconds(
    network: float,
    decoder: float,
    settings: Settings,
    rate: Callable[[torch.device, torch.dtype], float],
) -> tuple[float, float]:
    """Seconds of sampling and of decoding.

    Args:
        network: floating-point operations of all calls of the U-Net.
        decoder: of the decoder.
        settings: of the run, on a device and in a type.
        rate: of large matrix products, as by `matmul_rate`.
    """
    device, dtype = torch.device(str(settings.options.device)), _dtype(settings)
    wide = decoder_dtype(device, dtype, settings.options.optimize or DEFAULT_LEVEL)
    sampling, decoding = network / rate(device, dtype), decoder / rate(device, wide)
    return sampling / EFFICIENCY, decoding / EFFICIENCY


def bound_seconds(files: ModelFiles, settings: Settings) -> float:
    """Seconds that one video will hardly exceed, found in half a second: whether to look closer.

    As if every weight of the files multiplied at every position of the latents in every call; the
    real U-Net is narrow where it is large, so that it does about a ninth of that.
    """
    with torch.device("meta"):
        first_stage = instantiate_from_config(files.config["params"]["first_stage_config"])
    weights = sum(file.stat().st_size for file in files.weight_files()) / BYTES_PER_WEIGHT
    height, width = settings.size
    positions = settings.frames * height * width / first_stage.downsampling**2
    flops = 2 * weights * positions * network_calls(settings)
    return flops / matmul_rate(torch.device(str(settings.options.device)), _dtype(settings))


def count_flops(files: ModelFiles, settings: Settings) -> tuple[float, float]:
    """Floating-point operations of all calls of the U-Net, and of the decoder, for one video.

    A multiplication and its addition count as two. Takes a second, whatever the size, and three
    more when first called: the meta device then imports a part of PyTorch's compiler.
    """
    params = files.config["params"]
    with torch.device("meta"), torch.inference_mode():
        network = instantiate_from_config(params["network_config"]).eval()
        first_stage = instantiate_from_config(params["first_stage_config"]).eval()
        per_call = _network_flops(network, first_stage, params["network_config"], settings)
        decoding = _decoder_flops(first_stage, network, settings)
    return per_call * network_calls(settings), decoding


def network_calls(settings: Settings) -> int:
    """How often the U-Net sees a whole clip: steps, times solver stages, times guidance halves."""
    steps = settings.options.num_steps or 0
    calls = _CALLS_PER_STEP.get(settings.sampler_config["target"], 1)
    return steps * calls * guidance_halves(settings)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of large matrix products."""
    size = 768 if device.type == "cpu" else 8192
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    fastest = float("inf")
    end = time.perf_counter() + BENCHMARK_SECONDS
    while (began := time.perf_counter()) < end:
        (matrix @ matrix)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 / fastest


def reading_seconds(paths: Sequence[Path]) -> float:
    """Seconds to read files, from how long the middle of the largest takes."""
    sizes = {path: path.stat().st_size for path in paths}
    largest = max(sizes, key=sizes.__getitem__)
    with largest.open("rb", buffering=0) as file:
        file.seek(max(0, sizes[largest] - READ_SAMPLE) // 2)
        began = time.perf_counter()
        read = len(file.read(READ_SAMPLE))
        return (time.perf_counter() - began) * sum(sizes.values()) / max(1, read)


class _Counter(TorchDispatchMode):
    """Counts in its own thread: PyTorch's `FlopCounterMode` hooks into the modules of all."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        count, kwargs = flop_registry.get(func._overloadpacket), kwargs or {}
        if count is None:
            with self:
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        result = func(*args, **kwargs)
        self.flops += count(*args, **kwargs, out_val=result)
        return result


def _network_flops(
    network: Any, first_stage: Any, config: dict[str, Any], settings: Settings
) -> float:
    t, params = settings.frames, config["params"]
    width = params.get("context_dim")
    h, w = _latent_size(network, first_stage, settings)
    x = torch.empty(t, params["in_channels"], h, w)
    context = torch.empty(t, 1, width) if width else None
    vector = torch.empty(t, params["adm_in_channels"]) if params.get("num_classes") else None
    with _Counter() as counter:
        network(
            x,
            torch.empty(t),
            context,
            vector,
            num_video_frames=t,
            image_only_indicator=torch.zeros(1, t),
        )
    return counter.flops


def _decoder_flops(first_stage: Any, network: nn.Module, settings: Settings) -> float:
    t = settings.frames
    chunk = min(t, settings.options.decoding_t or t)
    z = first_stage.decoder.conv_in.in_channels
    timesteps = {"timesteps": chunk} if isinstance(first_stage.decoder, VideoDecoder) else {}
    latents = torch.empty(chunk, z, *_latent_size(network, first_stage, settings))
    with _Counter() as counter:
        first_stage.decode(latents, **timesteps)
    return counter.flops * t / chunk


def _latent_size(network: Any, first_stage: Any, settings: Settings) -> tuple[int, int]:
    """Height and width of the latents, padded to what the network halves."""
    h, w = (
        ceil(side / first_stage.downsampling / network.downsampling) * network.downsampling
        for side in settings.size
    )
    return h, w


def _dtype(settings: Settings) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, str(settings.options.dtype))
    return dtype
