"""How much of a model is on the device at once: plans, what they need, and which one fits.

A plan trades time for memory; all but the overlapped chunks of ``low`` leave the numbers as they
are. ``docs/performance.md`` has what each costs.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch

from sgm.inference.streaming import device_bytes
from sgm.inference.tiling import Tiling

logger = logging.getLogger(__name__)

Stage = Literal["encoding", "sampling", "decoding"]

# Share of the free memory that a plan may be expected to fill: the rest is for what libraries
# take inside of operations, and for gaps between tensors.
USABLE = 0.9


@dataclass(frozen=True)
class MemoryPlan:
    """What is on the device at once.

    Attributes:
        name: of the plan.
        unload_between_stages: only the weights of the stage that runs are on the device, of the
            encoders one by one.
        halves_in_turn: the two halves of guidance go through the network one after the other.
        feed_forward_chunks: pieces that feed-forwards are computed in.
        stream_weights: the network's blocks are on the host, and fetched one ahead.
        decode_in_step: layer by layer, one frame at a time (:mod:`sgm.inference.lockstep`); else
            whole chunks at once.
        park_on_host: what is decoded in step waits in the host's memory.
        decode_chunk: overlapped chunks of frames, an approximation; None for ``decoding_t``.
    """

    name: str
    unload_between_stages: bool = False
    halves_in_turn: bool = False
    feed_forward_chunks: int = 1
    stream_weights: bool = False
    decode_in_step: bool = False
    park_on_host: bool = False
    decode_chunk: Tiling | None = None


HIGH = MemoryPlan("high")
LOW = MemoryPlan(
    "low",
    unload_between_stages=True,
    halves_in_turn=True,
    feed_forward_chunks=8,
    decode_in_step=True,
    decode_chunk=Tiling(frames=8, frame_overlap=4),
)
MIN = MemoryPlan(
    "min",
    unload_between_stages=True,
    halves_in_turn=True,
    feed_forward_chunks=8,
    stream_weights=True,
    decode_in_step=True,
    park_on_host=True,
)

# From the fastest to the smallest. Those between are chosen by ``auto`` alone.
PLANS = (
    HIGH,
    MemoryPlan("unload", unload_between_stages=True, decode_in_step=True),
    MemoryPlan("halves", unload_between_stages=True, halves_in_turn=True, decode_in_step=True),
    LOW,
    MIN,
)


@dataclass(frozen=True)
class Needs:
    """What one model takes on the device for one video, in bytes.

    Attributes:
        weights: of the parts that a stage uses.
        blocks: of those of the network, the blocks that can be streamed, in their order.
        activations: the most that a stage takes beside weights, under a plan.
        one_encoder: the most that an encoder takes, its weights included, when it is alone.
    """

    weights: Mapping[Stage, int]
    blocks: tuple[int, ...]
    activations: Callable[[Stage, MemoryPlan], int]
    one_encoder: Callable[[], int]

    def peak(self, plan: MemoryPlan) -> int:
        """The most that any stage takes."""
        return max(self.by_stage(plan).values())

    def by_stage(self, plan: MemoryPlan) -> dict[Stage, int]:
        """What each stage takes, the weights that wait on the device included."""
        weights = dict(self.weights)
        if plan.stream_weights:
            weights["sampling"] += device_bytes(self.blocks, 0) - sum(self.blocks)
        waiting = 0 if plan.unload_between_stages else sum(weights.values())
        needs = {
            stage: max(waiting, each) + self.activations(stage, plan)
            for stage, each in weights.items()
        }
        if plan.unload_between_stages:
            needs["encoding"] = self.one_encoder()
        return needs


def plan_memory(mode: str, free: int, needs: Callable[[], Needs]) -> MemoryPlan:
    """The plan of a mode; for ``auto`` the fastest that fits, or the smallest where none does.

    Args:
        mode: ``auto``, or a plan's name.
        free: bytes that the device has, with nothing of the model on it.
        needs: counts what the model takes; called for ``auto`` alone, as that takes seconds.
    """
    if mode != "auto":
        return next(plan for plan in PLANS if plan.name == mode)
    counted = needs()
    for plan in PLANS:
        peak = counted.peak(plan)
        logger.debug("memory plan %s: %.2f of %.2f GB", plan.name, peak / 1e9, free / 1e9)
        if peak <= USABLE * free:
            return plan
    return PLANS[-1]


def next_smaller(plan: MemoryPlan) -> MemoryPlan | None:
    """The plan to go on with where memory ran out; None after the smallest."""
    return dict(pairwise(PLANS)).get(plan)


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses, or that this process's cache would give up.

    On CUDA no more than ``torch.cuda.set_per_process_memory_fraction`` leaves this process.
    """
    match device.type:
        case "cuda":
            free, total = torch.cuda.mem_get_info(device)
            share = getattr(torch.cuda, "get_per_process_memory_fraction", None)
            limit = int(total * share(device)) if share else total  # not in every PyTorch
            reserved = torch.cuda.memory_reserved(device)
            return min(free + reserved, limit) - torch.cuda.memory_allocated(device)
        case "mps":
            return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    status = Path("/proc/meminfo")  # Linux; elsewhere nobody tells
    if not status.exists():
        return sys.maxsize
    return int(status.read_text().partition("MemAvailable:")[2].split()[0]) * 1024
