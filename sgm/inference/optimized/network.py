"""The optimised U-Net in the place of the plain one: same call, same result."""

import logging
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor

from sgm.inference.optimized.layers import Place
from sgm.inference.optimized.unet import Condition, OptimizedUNet, fits
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
    """

    def __init__(
        self,
        plain: OpenAIWrapper,
        place: Place,
        clips_at_once: int | None = None,
        reuse: int = 1,
    ) -> None:
        self._plain, self._place, self._clips, self._reuse = plain, place, clips_at_once, reuse
        self._network = cast(VideoUNet, plain.diffusion_model)
        self.unet = OptimizedUNet(self._network, place)
        self._plain_placed = False
        self._given: Mapping[str, Tensor] | None = None
        self._conditions: list[Condition] = []
        self._deep: list[Tensor | None] = []
        self._calls = 0

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
            parts = _parts(c, image_only_indicator, len(x), rows, num_video_frames)
            conditions = (self.unet.condition(*part) for part in parts)
            self._conditions = list(conditions) if fits(self._network, c) else []
            self._given, self._calls = c, 0
        if not self._conditions:
            return self._by_plain_network(x, t, c, num_video_frames, image_only_indicator)
        if self._calls % self._reuse == 0:
            self._deep = [None] * len(self._conditions)
        self._calls += 1
        levels = t.split(rows) if len(t) > 1 else [t] * len(self._conditions)
        calls = zip(self._place(x).split(rows), levels, self._conditions, self._deep, strict=True)
        outs, deep = zip(*(self.unet(*call) for call in calls), strict=True)
        self._deep = list(deep) if self._reuse > 1 else []
        return torch.cat(outs).to(x.dtype)

    def forget(self) -> None:
        """Give up what is kept of a run: the next call makes it anew."""
        self._given, self._conditions, self._deep = None, [], []

    def _by_plain_network(
        self, x: Tensor, t: Tensor, c: Mapping[str, Tensor], frames: int, images: Tensor | None
    ) -> Tensor:
        if not self._plain_placed:
            logger.info("the context is not one token: sampling by the plain network")
            for tensor in (*self._plain.parameters(), *self._plain.buffers()):
                tensor.data = self._place(tensor)
            self._plain_placed = True
        return self._plain(x, t, c, num_video_frames=frames, image_only_indicator=images)


def _parts(
    c: Mapping[str, Tensor], images: Tensor | None, n: int, rows: int, frames: int
) -> Iterator[tuple[dict[str, Tensor], int, Tensor | None]]:
    """The conditioning of every part of the rows, as :meth:`OptimizedUNet.condition` takes it."""
    for start in range(0, n, rows):
        part = {key: value[start : start + rows] for key, value in c.items()}
        clips = slice(start // frames, (start + rows) // frames)
        yield part, frames, None if images is None else images[clips]
