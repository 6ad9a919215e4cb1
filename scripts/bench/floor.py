"""The arithmetic that cannot be left out, and the time that it takes at least.

Shapes: t frames, n rows, z latent channels, h height and w width of the latents.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scripts.bench.presets import Case
from scripts.bench.timing import alternate
from sgm.inference.estimate import matmul_rate
from sgm.inference.optimized import OptimizedDecoder
from sgm.inference.optimized.layers import Linear
from sgm.inference.optimized.unet import OptimizedUNet
from sgm.inference.settings import ModelFiles
from sgm.util import instantiate_from_config

RATE_TRIES = 3
PACKED_SIZE, PACKED_TRIES = 1024, 100


@dataclass(frozen=True)
class Flops:
    """Floating-point operations; a multiplication and its addition are two.

    Attributes:
        plain: of the networks as they are written.
        exact: of the optimised ones, whose result is the same: the floor.
        operations: the latter by operation.
    """

    plain: float
    exact: float
    operations: Mapping[str, float]


def count(files: ModelFiles, case: Case) -> dict[str, Flops]:
    """Count the stages ``unet``, ``decode`` and ``video`` on the meta device.

    A ``video`` is both networks; the image encoders are a hundredth of it.
    """
    size = case.frames, case.clips, case.height, case.width, case.decoding_t
    parts = [files.config["params"][part] for part in ("network_config", "first_stage_config")]
    unet, decode = _count_networks(json.dumps(parts), *size)
    operations = {key: case.steps * value for key, value in unet.operations.items()}
    for key, value in decode.operations.items():
        operations[key] = operations.get(key, 0) + value
    total = case.steps * unet.plain + decode.plain
    return {
        "unet": unet,
        "decode": decode,
        "video": Flops(total, sum(operations.values()), operations),
    }


@cache
def _count_networks(
    parts: str, frames: int, clips: int, height: int, width: int, decoding_t: int
) -> tuple[Flops, Flops]:
    """U-Net and decoder, of which each size takes seconds; ``parts`` is JSON."""
    network_config, first_stage_config = json.loads(parts)
    with torch.device("meta"):
        network = instantiate_from_config(network_config).eval()
        first_stage = instantiate_from_config(first_stage_config).eval()
    factor = first_stage.downsampling
    given = _Given(network_config["params"], frames, clips, (height // factor, width // factor))
    decoder = first_stage.decoder
    with torch.device("meta"), torch.inference_mode():
        plain = given.plain(network), given.decoding(decoder, decoding_t)
        # Only the optimised networks are made of values: of the blends'.
        draw_blends(network, decoder)
        lean = OptimizedDecoder(decoder, _as_it_is)
        exact = given.exact(network), given.decoding(lean, decoding_t)
    unet, decode = (
        Flops(sum(before.values()), sum(after.values()), after)
        for before, after in zip(plain, exact, strict=True)
    )
    return unet, decode


def fastest_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of large matrix products, undisturbed.

    On a CPU also with the weight laid out for oneDNN: twice as quick as PyTorch's plain product
    on some processors.
    """
    rate = max(matmul_rate(device, dtype) for _ in range(RATE_TRIES))
    if device.type != "cpu":
        return rate
    with torch.inference_mode():
        x, weight = (torch.randn(PACKED_SIZE, PACKED_SIZE).to(dtype) for _ in range(2))
        layer = Linear(weight)
        timing = alternate({"packed": lambda: layer(x)}, device, PACKED_TRIES)["packed"]
    return max(rate, 2 * PACKED_SIZE**3 / min(timing.seconds))


def operations_of(call: Callable[[], Any]) -> dict[str, float]:
    """Count a call's matrix products, convolutions and attention, by operation."""
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(key): float(value) for key, value in counter.get_flop_counts()["Global"].items()}


class _Given:
    """What the networks are given, without values; and what they then compute."""

    def __init__(
        self, params: Mapping[str, Any], frames: int, clips: int, size: tuple[int, int]
    ) -> None:
        self.params, self.frames, self.clips, self.size = params, frames, clips, size
        self.n = frames * clips

    def plain(self, network: Any) -> dict[str, float]:
        x = torch.empty(self.n, self.params["in_channels"], *self.size)
        vector = torch.empty(self.n, self.params["adm_in_channels"])
        extra = {
            "num_video_frames": self.frames,
            "image_only_indicator": torch.zeros(self.clips, self.frames),
        }
        args = x, torch.empty(self.n), self.context(), vector
        return operations_of(lambda: network(*args, **extra))

    def exact(self, network: Any) -> dict[str, float]:
        unet, x = OptimizedUNet(network, _as_it_is), self.latents(self.n)
        # Without the vector: that its rows are equal cannot be seen here, and it is computed once.
        condition = unet.condition({"crossattn": self.context(), "concat": x}, self.frames)
        return operations_of(lambda: unet(x, torch.empty(1), condition))

    def decoding(self, decoder: Any, chunk: int) -> dict[str, float]:
        chunks = self.latents(self.frames).split(chunk)
        return operations_of(lambda: [decoder(z, timesteps=len(z)) for z in chunks])

    def context(self) -> Tensor:
        return torch.empty(self.n, 1, self.params["context_dim"])

    def latents(self, rows: int) -> Tensor:
        return torch.empty(rows, self.params["out_channels"], *self.size)


def draw_blends(*modules: nn.Module) -> None:
    """Give values to the parameters of blends, which the optimised networks are made of."""
    for module in modules:
        for part in module.modules():
            if isinstance(getattr(part, "mix_factor", None), nn.Parameter):
                half = torch.zeros(1, device="cpu")
                part.mix_factor = nn.Parameter(half, requires_grad=False)


def _as_it_is(stored: Tensor) -> Tensor:
    return stored
