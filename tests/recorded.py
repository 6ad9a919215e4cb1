"""Recorded outputs of the networks, and the weights and inputs they were recorded with.

``tests/data/parity`` holds what the reference implementation of Stable Video Diffusion computed in
float32 on a CPU. Weights and inputs are not stored: they are drawn from a hash of their name, so
any network with the same state-dict keys and shapes gets the same ones. Large outputs were thinned
before they were stored; a test thins its own in the same way.
"""

import math
import zlib
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.tiny import tiny_config

FOLDER = Path(__file__).parent / "data" / "parity"

# Summing in another order moves a float32 result by up to 4e-6 here; the smallest mistake that the
# cases are made for, a norm's epsilon in the quiet ones, moves it by 1e-3 and more.
TOLERANCE = 2e-5

NETWORK = {
    "model_channels": 32,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
}
AUTOENCODER = {"ch": 32, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}

M = TypeVar("M", bound=nn.Module)


def recorded_config(context_dim: int = 384) -> DictConfig:
    """The parameters of the engine that was recorded: the tiny model's, with every level of svd."""
    embedders = "conditioner_config.params.emb_models"
    changes = {
        "network_config.params": NETWORK | {"context_dim": context_dim},
        f"{embedders}.0.params.open_clip_embedding_config.params": {"arch": "ViT-S-32"},
        f"{embedders}.3.params.encoder_config.params.ddconfig": AUTOENCODER,
        "first_stage_config.params.encoder_config.params": AUTOENCODER,
        "first_stage_config.params.decoder_config.params": AUTOENCODER,
        "sampler_config.params": {"num_steps": 5},
        "sampler_config.params.guider_config.params": {"max_scale": 3.0, "min_scale": 1.5},
    }
    return tiny_config(
        **{f"{path}.{key}": v for path, group in changes.items() for key, v in group.items()}
    ).model.params


def noise(name: str, *shape: int) -> Tensor:
    """Standard normal float32 numbers, the same for the same name and number of elements."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def filled(module: M, quiet: bool = False) -> M:
    """The module in evaluation mode, its weights drawn by their keys.

    A matrix or kernel keeps the variance of what it multiplies, a norm's weight is about one, a
    blend's factor is standard normal, a bias a tenth of that. ``quiet`` makes matrices a hundred
    times smaller and biases zero: activations become so small that a norm's epsilon shows.
    """
    loud = 0.01 if quiet else 1.0
    with torch.no_grad():
        for key, value in module.state_dict().items():
            draw = noise(key, *value.shape)
            if value.ndim > 1:
                draw *= loud / math.sqrt(value[0].numel())
            elif key.endswith("weight"):
                draw = 1 + 0.1 * draw
            elif not key.endswith("mix_factor"):
                draw *= 0.0 if quiet else 0.1
            value.copy_(draw)
    return module.eval()


@cache
def recorded(case: str) -> dict[str, Tensor]:
    """The outputs of one case by name."""
    return load_file(FOLDER / f"{case}.safetensors")


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected; infinite for another shape."""
    if out.shape != expected.shape:
        return math.inf
    distance, size = (out.double() - expected.double()).norm(), expected.double().norm()
    return float(distance / size.clamp_min(1e-12))  # where zero is expected, zero must come


def assert_recorded(case: str, **outputs: Tensor) -> None:
    """Every recorded output of the case is given, and equal to float32 precision."""
    expected = recorded(case)
    assert outputs.keys() == expected.keys()
    errors = {key: relative_error(out, expected[key]) for key, out in outputs.items()}
    assert max(errors.values()) < TOLERANCE, errors
