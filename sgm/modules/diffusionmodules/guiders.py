"""Classifier-free guidance (Ho and Salimans 2021), with a scale of its own for every frame.

A guider makes the rows that the network sees (unconditional ones first, conditional ones second)
and merges the two denoised estimates. Legend: ``b`` clips, ``t`` frames of a clip, rows ordered
``(b t)``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sgm.util import append_dims

Cond = Mapping[str, Any]
BATCHED_KEYS = ("vector", "crossattn", "concat")
FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda waves: waves.mean(0),
    "multiply": lambda waves: waves.prod(0),
    "max": lambda waves: waves.amax(0),
}


class Guider(ABC):
    """What a sampler needs of guidance.

    Attributes:
        copies: how many times each row goes through the network.
        interval: noise levels that are guided, (lowest, highest). Outside, the conditional estimate
            stands alone and half of the rows are spared (Kynkaanniemi et al. 2024, arXiv
            2404.07724, algorithm 1): an approximation of guidance at all levels, which is the rule.
    """

    copies = 1
    interval = (0.0, math.inf)

    def guides(self, sigma: float) -> bool:
        """Whether there is guidance at this noise level."""
        lowest, highest = self.interval
        return lowest <= sigma <= highest

    def prepare_inputs(
        self, x: Tensor, s: Tensor, c: Cond, uc: Cond | None
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return data, noise levels and conditioning of all rows that the network is to see.

        Args:
            x: noisy data, ``(b t, ...)``.
            s: noise levels, ``(b t,)``.
            c: conditioning.
            uc: unconditional conditioning.
        """
        return (*self.prepare_rows(x, s), self.prepare_cond(c, uc))

    def prepare_rows(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the part of ``prepare_inputs`` that changes from step to step."""
        return torch.cat([x] * self.copies), torch.cat([s] * self.copies)

    @abstractmethod
    def prepare_cond(self, c: Cond, uc: Cond | None) -> dict[str, Any]:
        """Return the part of ``prepare_inputs`` that stays the same over a run."""

    @abstractmethod
    def __call__(self, x: Tensor, sigma: Tensor, num_frames: int | None = None) -> Tensor:
        """Merge the denoised estimates of all rows.

        Args:
            x: estimates, ``(copies b t, ...)``.
            sigma: noise levels, ``(b t,)``.
            num_frames: frames of a clip, ``t``; by default what the constructor was told, else
                all rows are one clip.

        Returns:
            The guided estimate, ``(b t, ...)``.
        """


class IdentityGuider(Guider):
    """No guidance: the network sees the conditional rows alone."""

    def prepare_cond(self, c: Cond, uc: Cond | None) -> dict[str, Any]:
        """Return ``c``."""
        return dict(c)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        num_frames: int | None = None,
    ) -> Tensor:
        """Return ``x``."""
        return x


class ScaledGuider(Guider):
    """Guidance ``x_u + scale (x_c - x_u)``; subclasses say the scale of each frame.

    Args:
        num_frames: frames of a clip; None leaves it to the call.
        additional_cond_keys: conditioning that differs between the two halves, beside ``vector``,
            ``crossattn`` and ``concat``. All other conditioning must be the same in both.
    """

    copies = 2

    def __init__(
        self,
        num_frames: int | None = None,
        additional_cond_keys: str | Sequence[str] | None = None,
    ) -> None:
        keys = additional_cond_keys or ()
        self.num_frames = num_frames
        self.batched_keys = {*BATCHED_KEYS, *([keys] if isinstance(keys, str) else keys)}
        self._row_scales: dict[tuple[Any, ...], Tensor] = {}

    @abstractmethod
    def frame_scales(self, num_frames: int) -> Tensor:
        """Return the scale of each frame, ``(num_frames,)``, float32 on the CPU."""

    def prepare_cond(self, c: Cond, uc: Cond | None) -> dict[str, Any]:
        """Return the rows of ``uc`` followed by those of ``c``.

        Raises:
            ValueError: ``uc`` is missing, or does not have the keys of ``c``, or differs where
                it may not.
        """
        if uc is None:
            raise ValueError(
                f"{type(self).__name__} needs the unconditional conditioning `uc`; "
                "give it, or use IdentityGuider"
            )
        if c.keys() != uc.keys():
            raise ValueError(
                f"expected `c` and `uc` to have the same keys, got {sorted(c)} and {sorted(uc)}"
            )
        out: dict[str, Any] = {}
        for key in c:
            if key in self.batched_keys:
                out[key] = torch.cat([uc[key], c[key]])
            elif _same(c[key], uc[key]):
                out[key] = c[key]
            else:
                raise ValueError(
                    f"conditioning {key!r} differs between `c` and `uc`; "
                    "name it in additional_cond_keys to guide by it"
                )
        return out

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        num_frames: int | None = None,
    ) -> Tensor:
        """Merge both halves, see ``Guider``; the scale does not depend on the noise level."""
        x_u, x_c = x.chunk(2)
        return torch.lerp(x_u, x_c, self._scales_like(x_u, num_frames or self.num_frames))

    @torch.inference_mode(False)
    def _scales_like(self, x: Tensor, num_frames: int | None) -> Tensor:
        """Return the scale of each row of ``x``, broadcastable, copied to its device only once."""
        rows = x.shape[0]
        frames = num_frames or rows
        key = (rows, frames, x.ndim, x.device, x.dtype)
        if key not in self._row_scales:
            if rows % frames:
                raise ValueError(f"expected rows of whole clips of {frames} frames, got {rows}")
            scales = self.frame_scales(frames).repeat(rows // frames)
            self._row_scales[key] = append_dims(scales.to(x.device, x.dtype), x.ndim)
        return self._row_scales[key]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    return bool(a == b)


class VanillaCFG(ScaledGuider):
    """One scale for all frames.

    Args:
        scale: 1 is the conditional estimate, more exaggerates the conditioning.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def frame_scales(self, num_frames: int) -> Tensor:
        """Return ``scale`` for every frame."""
        return torch.full((num_frames,), float(self.scale), device="cpu")


class PerFrameGuider(ScaledGuider):
    """An explicit scale for each frame.

    Args:
        scales: the scales of frame 0, 1, ...
        additional_cond_keys: see ``ScaledGuider``.
    """

    def __init__(
        self, scales: Sequence[float], additional_cond_keys: str | Sequence[str] | None = None
    ) -> None:
        super().__init__(len(scales), additional_cond_keys)
        self.scales = [float(scale) for scale in scales]

    def frame_scales(self, num_frames: int) -> Tensor:
        """Return the list; raise ``ValueError`` if it has another length."""
        if num_frames != len(self.scales):
            raise ValueError(
                f"expected one guidance scale for each of {num_frames} frames, "
                f"got {len(self.scales)}"
            )
        return torch.tensor(self.scales, dtype=torch.float32, device="cpu")


class LinearPredictionGuider(ScaledGuider):
    """Scales that rise evenly over the clip (SVD, Blattmann et al. 2023, section 4).

    Args:
        max_scale: the highest scale, here that of the last frame.
        num_frames: frames of a clip; None leaves it to the call.
        min_scale: the lowest scale, here that of the first frame.
        additional_cond_keys: see ``ScaledGuider``.
    """

    def __init__(
        self,
        max_scale: float,
        num_frames: int | None = None,
        min_scale: float = 1.0,
        additional_cond_keys: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(num_frames, additional_cond_keys)
        self.max_scale, self.min_scale = max_scale, min_scale

    def frame_scales(self, num_frames: int) -> Tensor:
        """Return the profile stretched to ``[min_scale, max_scale]``."""
        return self.min_scale + (self.max_scale - self.min_scale) * self.profile(num_frames)

    def profile(self, num_frames: int) -> Tensor:
        """Return the course of the scale over the frames, in [0, 1]: here a ramp."""
        return torch.linspace(0, 1, num_frames, device="cpu")


def triangle_wave(values: Tensor, period: float = 1.0) -> Tensor:
    """Return the triangle wave that is 0 at multiples of ``period`` and 1 halfway between."""
    phase = values / period
    return 2 * (phase - (phase + 0.5).floor()).abs()


class TrianglePredictionGuider(LinearPredictionGuider):
    """Scales that rise and fall again, for orbits that end where they began (SV3D, section 3.4).

    Args:
        max_scale: the scale at the tip.
        num_frames: frames of a clip; None leaves it to the call.
        min_scale: the scale at the foot.
        period: length of a wave, 1 being the clip; several waves are fused.
        period_fusing: ``mean``, ``multiply`` or ``max``.
        additional_cond_keys: see ``ScaledGuider``.
    """

    def __init__(
        self,
        max_scale: float,
        num_frames: int | None = None,
        min_scale: float = 1.0,
        period: float | Sequence[float] = 1.0,
        period_fusing: str = "max",
        additional_cond_keys: str | Sequence[str] | None = None,
    ) -> None:
        if period_fusing not in FUSIONS:
            raise ValueError(
                f"expected period_fusing to be one of {sorted(FUSIONS)}, got {period_fusing!r}"
            )
        super().__init__(max_scale, num_frames, min_scale, additional_cond_keys)
        self.periods = [period] if isinstance(period, int | float) else list(period)
        self.period_fusing = period_fusing

    def profile(self, num_frames: int) -> Tensor:
        """Return the fused triangle waves over the clip."""
        ramp = super().profile(num_frames)
        waves = torch.stack([triangle_wave(ramp, period) for period in self.periods])
        return FUSIONS[self.period_fusing](waves)


class TrapezoidPredictionGuider(LinearPredictionGuider):
    """Scales that rise, stay at ``max_scale`` and fall.

    Args:
        max_scale: the scale of the plateau.
        num_frames: frames of a clip; None leaves it to the call.
        min_scale: the scale of the first and the last frame.
        edge_perc: share of the frames that each slope takes, at most 0.5.
        additional_cond_keys: see ``ScaledGuider``.
    """

    def __init__(
        self,
        max_scale: float,
        num_frames: int | None = None,
        min_scale: float = 1.0,
        edge_perc: float = 0.1,
        additional_cond_keys: str | Sequence[str] | None = None,
    ) -> None:
        if not 0 <= edge_perc <= 0.5:
            raise ValueError(f"expected edge_perc between 0 and 0.5, got {edge_perc}")
        super().__init__(max_scale, num_frames, min_scale, additional_cond_keys)
        self.edge_perc = edge_perc

    def profile(self, num_frames: int) -> Tensor:
        """Return slope, plateau, slope."""
        rise = super().profile(int(num_frames * self.edge_perc))
        plateau = torch.ones(num_frames - 2 * len(rise), device="cpu")
        return torch.cat([rise, plateau, rise.flip(0)])
