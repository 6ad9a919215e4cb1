"""The optimised U-Net in the place of the plain one: same call, same result."""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor

from sgm.inference.optimized.layers import Place
from sgm.inference.optimized.replay import Replay
from sgm.inference.optimized.unet import Condition, Deep, OptimizedUNet, fits
from sgm.modules.diffusionmodules.video_model import VideoUNet
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper

logger = logging.getLogger(__name__)


class OptimizedNetwork:
    """Called as :class:`~sgm.modules.diffusionmodules.wrappers.OpenAIWrapper` is.

    What stays the same over a run is computed when a conditioning is first seen, and kept until
    another comes. A context that does not fit (:func:`~sgm.inference.optimized.unet.fits`) goes
    through the plain network.

    Args:
        plain: the network with its stored weights, which stay where they are.
        place: brings a stored tensor to the device and type to compute in.
        clips_at_once: clips that go through the network together, so that 1 takes the two halves
            of guidance in turn: half the memory for the same numbers; None for all.
        reuse: calls that share their deep features; 1 shares none, more is an approximation.
        records: calls are recorded as CUDA graphs (:class:`~sgm.inference.optimized.replay.Replay`)
            on such devices; not with ``reuse``.
    """

    def __init__(
        self,
        plain: OpenAIWrapper,
        place: Place,
        clips_at_once: int | None = None,
        reuse: int = 1,
        records: bool = False,
    ) -> None:
        self._plain, self._place, self._clips = plain, place, clips_at_once
        self._reuse, self._records = reuse, records
        self._network = cast(VideoUNet, plain.diffusion_model)
        self.unet = OptimizedUNet(self._network, place)
        self._plain_placed = False
        self._given: Mapping[str, Tensor] | None = None
        self._parts: list[_Part] = []

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        c: Mapping[str, Tensor],
        num_video_frames: int,
        image_only_indicator: Tensor | None = None,
    ) -> Tensor:
        """(b t, z, h, w) -> (b t, z, h, w); the arguments are those of the plain wrapper."""
        rows = (self._clips or len(x)) * num_video_frames
        if c is not self._given:
            given = _split(c, image_only_indicator, len(x), rows, num_video_frames)
            conditions = (self.unet.condition(*each) for each in given)
            self._parts = list(map(self._part, conditions)) if fits(self._network, c) else []
            self._given = c
        if not self._parts:
            return self._by_plain_network(x, t, c, num_video_frames, image_only_indicator)
        latents = self._place(x).split(rows)
        levels = t.split(rows) if len(t) > 1 else [t] * len(self._parts)
        calls = zip(self._parts, latents, levels, strict=True)
        return torch.cat([part(x, t) for part, x, t in calls]).to(x.dtype)

    def forget(self) -> None:
        """Give up what is kept of a run: the next call makes it anew."""
        self._given, self._parts = None, []

    def _part(self, condition: Condition) -> "_Part":
        return _Part(self.unet, condition, self._reuse, self._records)

    def _by_plain_network(
        self, x: Tensor, t: Tensor, c: Mapping[str, Tensor], frames: int, images: Tensor | None
    ) -> Tensor:
        if not self._plain_placed:
            logger.info("the context is not one token: sampling by the plain network")
            for tensor in (*self._plain.parameters(), *self._plain.buffers()):
                tensor.data = self._place(tensor)
            self._plain_placed = True
        return self._plain(x, t, c, num_video_frames=frames, image_only_indicator=images)


class _Part:
    """The network on some of the clips, and what it keeps of their run.

    Args:
        unet: the network.
        condition: of these clips.
        reuse: calls that share their deep features.
        records: calls are recorded, on CUDA.
    """

    def __init__(
        self, unet: OptimizedUNet, condition: Condition, reuse: int, records: bool
    ) -> None:
        self._step: Callable[..., Tensor] = partial(unet, condition=condition)
        device = condition.rows[0].positions.device
        if records and device.type == "cuda":
            self._step = Replay(partial(unet, condition=condition), device)
        self._reuse, self._calls = reuse, 0
        self._shared: dict[str, Deep] = {}

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """(n, z, h, w) and noise levels -> (n, z, h, w)."""
        if self._reuse > 1 and self._calls % self._reuse == 0:
            self._shared = {"deep": Deep()}
        self._calls += 1
        return self._step(x, t, **self._shared)


def _split(
    c: Mapping[str, Tensor], images: Tensor | None, n: int, rows: int, frames: int
) -> Iterator[tuple[dict[str, Tensor], int, Tensor | None]]:
    """The conditioning of every part of the rows, as :meth:`OptimizedUNet.condition` takes it."""
    for start in range(0, n, rows):
        part = {key: value[start : start + rows] for key, value in c.items()}
        clips = slice(start // frames, (start + rows) // frames)
        yield part, frames, None if images is None else images[clips]
