"""The geometry of a synthetic clip: layers that move, and their flow in closed form.

Legend: t frames, h w pixels. Points of the picture plane are complex numbers ``x + iy`` in output
pixels, with the origin in the picture's middle. A layer's motion is one similarity per frame,
``q = a p + b``: the point p of frame k shows what stood at q in frame 0 (``a = 1, b = 0`` there).
A camera pan is b, zoom |a|, rotation arg a. Two such maps give the dense flow in closed form, so
the motion bucket of a clip is exact and not estimated.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

EASINGS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda s: s,
    lambda s: s * s * (3 - 2 * s),
    lambda s: 0.5 * (s + s * s),
    lambda s: 0.5 * (3 * s - s * s),
)
"""Progress of a move over its time, both in 0..1: linear, smooth, ease in, ease out."""


class Draw:
    """Scalars and tensors from one explicit generator."""

    def __init__(self, seed: int, index: int) -> None:
        # The generator keeps 32 bits of its seed, so both numbers are hashed into them.
        state = np.random.SeedSequence((seed, index)).generate_state(1)
        self.generator = torch.Generator().manual_seed(int(state[0]))

    def uniform(self, low: float, high: float) -> float:
        """Return a number in [low, high)."""
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def integer(self, low: int, high: int) -> int:
        """Return an integer in [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=self.generator).item())

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.uniform(0, 1) < probability

    def direction(self) -> complex:
        """Return a unit vector of any direction."""
        angle = self.uniform(0, 2 * math.pi)
        return complex(math.cos(angle), math.sin(angle))


@dataclass(frozen=True)
class Layer:
    """One similarity ``q = a p + b`` per frame; both are complex (t,)."""

    a: Tensor
    b: Tensor

    def __call__(self, points: Tensor) -> Tensor:
        """Map points (...) of every frame to where they stood in frame 0: (t, ...)."""
        shape = (-1, *[1] * points.ndim)
        return self.a.view(shape) * points + self.b.view(shape)

    def flow(self, points: Tensor) -> Tensor:
        """Return the displacement (t - 1, ...) of what is at ``points`` to the next frame."""
        origin = self(points)[:-1]
        shape = (-1, *[1] * points.ndim)
        return (origin - self.b[1:].view(shape)) / self.a[1:].view(shape) - points


@dataclass(frozen=True)
class Shape:
    """A star-shaped outline around a centre: an ellipse, a polygon or a blob."""

    centre: complex
    radius: float
    turn: complex
    stretch: float
    corners: int
    wobble: float

    def mask(self, q: Tensor) -> Tensor:
        """Return the soft-edged cover, in 0..1, of points q."""
        local = (q - self.centre) * self.turn
        local = torch.complex(local.real * self.stretch, local.imag / self.stretch)
        angle = local.angle()
        if self.corners:
            sector = 2 * math.pi / self.corners
            outline = math.cos(sector / 2) / torch.cos(angle % sector - sector / 2)
        else:
            outline = 1 + self.wobble * (torch.cos(2 * angle) + torch.cos(3 * angle + 1))
        return torch.sigmoid(2 * (self.radius * outline - local.abs()))


def draw_shape(draw: Draw, size: tuple[int, int]) -> Shape:
    """Draw an object that covers about 4 to 25 % of a picture of this (h, w)."""
    h, w = size
    return Shape(
        centre=complex(draw.uniform(-0.35, 0.35) * w, draw.uniform(-0.35, 0.35) * h),
        radius=draw.uniform(0.14, 0.3) * min(size),
        turn=draw.direction(),
        stretch=draw.uniform(0.75, 1.33),
        corners=draw.integer(3, 6) if draw.chance(0.3) else 0,
        wobble=draw.uniform(0.05, 0.2) if draw.chance(0.6) else 0.0,
    )


@dataclass(frozen=True)
class Move:
    """The course of a camera, and of an object that it films, for one unit of amplitude."""

    pan: complex
    spin: complex
    progress: Tensor
    parallax: float = 1.0
    drift: complex = 0

    def background(self, amplitude: float) -> Layer:
        """Return what the move does to the picture behind."""
        way = amplitude * self.progress
        return Layer(torch.exp(self.spin * way), self.pan * way)

    def foreground(self, amplitude: float) -> Layer:
        """Return what it does to the object, which is nearer and has a drift of its own."""
        way = amplitude * self.progress
        spin = complex(self.parallax * self.spin.real, self.spin.imag)
        return Layer(torch.exp(spin * way), (self.parallax * self.pan - self.drift) * way)


def draw_move(
    draw: Draw, frames: int, size: tuple[int, int], has_object: bool, approach_share: float = 0.0
) -> Move:
    """Draw a pan, a zoom, a rotation or a mixture, each about one pixel of mean flow in size.

    With the probability ``approach_share`` the camera moves into the scene instead, at an even
    speed and nearly straight: a move that shows nothing new at the borders.
    """
    kind = draw.uniform(0, 1)
    pan, zoom, turn = draw.uniform(0.3, 1), draw.uniform(-1, 1), draw.uniform(-0.5, 0.5)
    easing = EASINGS[draw.integer(0, len(EASINGS) - 1)]
    if draw.chance(approach_share):
        pan, zoom, turn = 0.25 * pan, -1, 0.2 * turn
        easing = EASINGS[0]
    elif kind < 0.4:
        pan, zoom, turn = 1, 0, 0
    elif kind < 0.6:
        pan, zoom, turn = 0, math.copysign(1, zoom), 0
    elif kind < 0.7:
        pan, zoom, turn = 0, 0, math.copysign(1, turn)
    lever = 0.38 * math.sqrt(size[0] * size[1])  # the mean |p| of a square
    return Move(
        pan=pan * draw.direction(),
        spin=complex(zoom, turn) / lever,
        progress=easing(torch.linspace(0, 1, frames)),
        parallax=draw.uniform(1.3, 2.0) if has_object else 1.0,
        drift=draw.uniform(0.4, 1.2) * draw.direction() if has_object else 0,
    )


def picture_plane(size: tuple[int, int], samples: int = 1) -> Tensor:
    """Return the complex positions (n * n, h, w) of n x n evenly spaced samples per pixel."""
    y, x = (torch.arange(n) + 0.5 - n / 2 for n in size)
    offset = (torch.arange(samples) + 0.5) / samples - 0.5
    centres = torch.complex(x.expand(len(y), -1), y[:, None].expand(-1, len(x)))
    offsets = torch.complex(offset.repeat(samples), offset.repeat_interleave(samples))
    return centres + offsets.view(-1, 1, 1)


def mean_speed(move: Move, amplitude: float, shape: Shape | None, points: Tensor) -> float:
    """Return the mean flow magnitude over points and frame pairs, object included."""
    flow = move.background(amplitude).flow(points)
    if shape is not None:
        front = move.foreground(amplitude)
        flow = torch.where(shape.mask(front(points)[:-1]) > 0.5, front.flow(points), flow)
    return flow.abs().mean().item()


def solve_amplitude(move: Move, target: float, shape: Shape | None, points: Tensor) -> float:
    """Return the amplitude whose mean flow is ``target`` pixels per frame."""
    amplitude = target * (len(move.progress) - 1)
    for _ in range(4):
        amplitude *= target / mean_speed(move, amplitude, shape, points)
    return amplitude
