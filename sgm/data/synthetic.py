"""Clips with exactly known motion, rendered from photographs.

A clip is a window that moves over a photograph, and in most clips an object cut out of another
one that moves before it (see :mod:`sgm.data.scene`). Its first frame is the untransformed window.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from sgm.data.motion import bucket_to_flow, flow_to_bucket
from sgm.data.scene import (
    Draw,
    Layer,
    Shape,
    draw_move,
    draw_shape,
    mean_speed,
    picture_plane,
    solve_amplitude,
)

BUCKETS = (5, 250)
FPS = (6, 24)
SHORT_CROP = 72
"""The smallest short side of a window, in pixels of the stored photograph."""
TEXELS = 1.3
"""How far apart, in pixels of the photograph, bilinear samples may lie without aliasing."""


@dataclass(frozen=True)
class Patch:
    """A part of a photograph, as the content of a layer in frame 0.

    Attributes:
        photo: float32 (3, H, W).
        scale: photograph pixels per output pixel.
        centre: where the origin of the picture plane lies, in photograph pixels.
    """

    photo: Tensor
    scale: float
    centre: complex

    def render(self, layer: Layer, size: tuple[int, int]) -> Tensor:
        """Return the frames (t, 3, h, w) of the patch in motion.

        Each pixel is the mean of n x n bilinear samples, enough of them not to alias.
        """
        n = math.ceil(self.scale * layer.a.abs().max().item() / TEXELS)
        placed = Layer(self.scale * layer.a, self.scale * layer.b + self.centre)
        at = torch.view_as_real(placed(picture_plane(size, n)))  # (t, n * n, h, w, 2)
        grid = at.mul_(2 / torch.tensor(self.photo.shape[:0:-1])).sub_(1)
        samples = F.grid_sample(
            self.photo[None],
            grid.view(1, -1, size[1], 2),
            padding_mode="border",
            align_corners=False,
        )
        return samples.view(3, len(layer.a), n * n, *size).mean(2).transpose(0, 1)


def draw_window(draw: Draw, photo: Tensor, layer: Layer, size: tuple[int, int]) -> Patch:
    """Draw a patch that stays inside the photograph however ``layer`` moves over it."""
    h, w = size
    corners = torch.tensor([complex(x, y) for x in (-w / 2, w / 2) for y in (-h / 2, h / 2)])
    reached = torch.view_as_real(layer(corners)).flatten(0, 1)
    low, high = reached.amin(0), reached.amax(0)
    extent = torch.tensor(photo.shape[:0:-1])
    largest = (extent / (high - low)).min().item()
    finest = layer.a.abs().min().item()  # a close-up should not show the photograph's pixels
    smallest = min(max(SHORT_CROP / min(size), 0.8 / finest), largest)
    scale = draw.uniform(smallest, largest)
    x, y = (
        draw.uniform(-scale * low[axis].item(), extent[axis].item() - scale * high[axis].item())
        for axis in (0, 1)
    )
    return Patch(photo, scale, complex(x, y))


def draw_cutting(draw: Draw, photo: Tensor, shape: Shape) -> Patch:
    """Draw the patch of a photograph that fills an object of this shape."""
    reach = 1.7 * shape.radius
    height, width = photo.shape[1:]
    scale = draw.uniform(min(1.0, height / 2 / reach), min(2.5, height / 2 / reach))
    centre = complex(
        draw.uniform(scale * reach, width - scale * reach),
        draw.uniform(scale * reach, height - scale * reach),
    )
    return Patch(photo, scale, centre - scale * shape.centre)


@dataclass(frozen=True)
class Scene:
    """All that makes a clip: the camera's view, perhaps an object, and what is said about them.

    Attributes:
        camera: the motion of the background.
        window: the content of the background.
        thing: the outline, content and motion of the object in front.
        speed: the mean flow of the clip in pixels per frame.
        fps: the stated frame rate.
    """

    camera: Layer
    window: Patch
    thing: tuple[Shape, Patch, Layer] | None
    speed: float
    fps: int

    def render(self, size: tuple[int, int]) -> Tensor:
        """Return the frames (t, 3, h, w)."""
        frames = self.window.render(self.camera, size)
        if self.thing is not None:
            shape, cutting, motion = self.thing
            cover = shape.mask(motion(picture_plane(size)))
            frames = frames.lerp(cutting.render(motion, size), cover)
        return frames.contiguous()


def read_photos(path: str | Path) -> dict[str, Tensor]:
    """Read the photographs (3, H, W), uint8, of a tensor file, in the order of their names.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"no photographs at {path}: make it by scripts/prepare_photos.py")
    try:
        photos = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"expected a tensor file of photographs, got {path} ({error})") from error
    for name, photo in photos.items():
        if photo.dtype != torch.uint8 or photo.ndim != 3 or len(photo) != 3:
            got = f"{photo.dtype} {tuple(photo.shape)}"
            raise ValueError(f"{path}: expected {name} to be torch.uint8 (3, H, W), got {got}")
    if not photos:
        raise ValueError(f"expected photographs in {path}, found none")
    return dict(sorted(photos.items()))


class Photographs(Dataset[dict[str, Tensor]]):
    """Training examples made from photographs; item i depends on ``(seed, i)`` alone.

    Args:
        photos: a tensor file of uint8 pictures (3, H, W), as ``scripts/prepare_photos.py`` makes.
        size: (h, w) of the frames.
        seed: of everything drawn.
        length: the number of items; without end for practical purposes.
    """

    def __init__(
        self,
        photos: str | Path,
        size: tuple[int, int] = (64, 64),
        seed: int = 0,
        length: int = 1_000_000,
    ) -> None:
        self.photos = list(read_photos(photos).values())
        self.size = (int(size[0]), int(size[1]))
        self.seed = seed
        self.length = length

    def __len__(self) -> int:
        return self.length

    def draw_photo(self, draw: Draw) -> Tensor:
        """Draw a photograph, mirrored half of the time, as float32 (3, H, W) in [-1, 1]."""
        photo = self.photos[draw.integer(0, len(self.photos) - 1)]
        return (photo.flip(-1) if draw.chance(0.5) else photo) / 127.5 - 1


class PhotoCrops(Photographs):
    """Still pictures, for the autoencoder: {"frames": (1, 3, h, w) in [-1, 1]}."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return the item; ``index`` from 0 to length - 1."""
        draw = Draw(self.seed, index)
        still = Layer(torch.ones(1, dtype=torch.complex64), torch.zeros(1, dtype=torch.complex64))
        window = draw_window(draw, self.draw_photo(draw), still, self.size)
        return {"frames": window.render(still, self.size)}


class SyntheticMotion(Photographs):
    """Clips of a moving camera and, mostly, a moving object.

    An item is {"frames": (t, 3, h, w) float32 in [-1, 1], "fps_id": int, "motion_bucket_id": int}.
    The bucket is the clip's true mean flow by :mod:`sgm.data.motion`. The motion is per frame, so
    the frame rate says nothing about it: ``fps_id`` is drawn at random and tells a model so.

    Args:
        photos: see :class:`Photographs`; so are ``size``, ``seed`` and ``length``.
        frames: the number of frames t.
        object_share: the share of clips with an object.
        approach_share: the share of clips whose camera moves into the scene; the others draw any
            move. A small model learns the motion of a scene sooner where one move is common.
    """

    def __init__(
        self,
        photos: str | Path,
        frames: int = 14,
        size: tuple[int, int] = (64, 64),
        seed: int = 0,
        length: int = 1_000_000,
        object_share: float = 0.6,
        approach_share: float = 0.0,
    ) -> None:
        super().__init__(photos, size, seed, length)
        if frames < 2:
            raise ValueError(f"a clip in motion needs at least 2 frames, got {frames}")
        self.frames = frames
        self.object_share, self.approach_share = object_share, approach_share
        self.probes = picture_plane(self.size)[0, 2::4, 2::4].contiguous()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return the item; ``index`` from 0 to length - 1."""
        scene = self.draw_scene(Draw(self.seed, index))
        return {
            "frames": scene.render(self.size),
            "fps_id": torch.tensor(scene.fps),
            "motion_bucket_id": torch.tensor(flow_to_bucket(scene.speed, min(self.size))),
        }

    def draw_scene(self, draw: Draw) -> Scene:
        """Draw everything that makes a clip."""
        target = bucket_to_flow(draw.uniform(*BUCKETS), min(self.size))
        shape = draw_shape(draw, self.size) if draw.chance(self.object_share) else None
        move = draw_move(draw, self.frames, self.size, shape is not None, self.approach_share)
        amplitude = solve_amplitude(move, target, shape, self.probes)
        camera = move.background(amplitude)
        window = draw_window(draw, self.draw_photo(draw), camera, self.size)
        thing = None
        if shape is not None:
            cutting = draw_cutting(draw, self.draw_photo(draw), shape)
            thing = (shape, cutting, move.foreground(amplitude))
        speed = mean_speed(move, amplitude, shape, self.probes)
        return Scene(camera, window, thing, speed, draw.integer(*FPS))
