"""What every system is given.

Shapes: b clips, t frames, n = b t rows, z latent channels, h height, w width, f pixels per latent.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from scripts.bench.models import SEED
from scripts.bench.presets import Case
from sgm.inference.settings import ModelFiles
from sgm.models.diffusion import DiffusionEngine

FPS_ID, MOTION, COND_AUG = 6.0, 127.0, 0.02
GUIDANCE = 1.0, 3.0
NOISE_LEVEL = 0.4  # c_noise: a noise level of 5


@dataclass(frozen=True)
class Inputs:
    """What every system gets.

    Attributes:
        case: the size.
        picture: of that size.
        frames: (t, h, w, 3) in 0..255, moving.
        x: (n, z, h / f, w / f).
        concat: (n, z, h / f, w / f): condition latents, zeros for the first of two clips.
        context: (n, 1, d), likewise.
        latents: (t, z, h / f, w / f), scaled.
        folder: for what is written.
    """

    case: Case
    picture: Image.Image
    frames: np.ndarray
    x: Tensor
    concat: Tensor
    context: Tensor
    latents: Tensor
    folder: Path


@contextmanager
def inputs_of(
    files: ModelFiles, engine: DiffusionEngine, case: Case, device: torch.device
) -> Iterator[Inputs]:
    """Inputs, the same in every run, for as long as calls may write into a temporary folder."""
    factor = engine.first_stage_model.downsampling
    with TemporaryDirectory() as folder, torch.inference_mode():
        yield _draw(files, factor, case, device, Path(folder))


def _draw(files: ModelFiles, factor: int, case: Case, device: torch.device, folder: Path) -> Inputs:
    generator = torch.Generator().manual_seed(SEED)
    network = files.config["params"]["network_config"]["params"]
    z, size = network["out_channels"], (case.height // factor, case.width // factor)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def by_clip(one: Tensor) -> Tensor:
        clips = [torch.zeros_like(one)] * (case.clips - 1) + [one]
        return torch.cat(clips).repeat_interleave(case.frames, dim=0)

    coarse = torch.rand(1, 3, 6, 8, generator=generator)
    smooth = F.interpolate(coarse, (case.height, case.width), mode="bicubic")[0].clamp(0, 1)
    pixels = (255 * smooth).byte().permute(1, 2, 0).numpy()
    return Inputs(
        case=case,
        picture=Image.fromarray(pixels),
        frames=np.stack([np.roll(pixels, 4 * k, axis=1) for k in range(case.frames)]),
        x=normal(case.frames * case.clips, z, *size),
        concat=by_clip(normal(1, z, *size)),
        context=by_clip(normal(1, 1, network["context_dim"])),
        latents=normal(case.frames, z, *size),
        folder=folder,
    )
