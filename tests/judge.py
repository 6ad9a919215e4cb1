"""A safety filter of a thousandth of the real one's size, whose findings the test decides."""

import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from sgm.inference.safety import HEADS
from sgm.modules.encoders.image_tower import VisionTransformer
from sgm.towers import tower_spec
from tests.tiny import draw_weights

ARCH = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 16, "layers": 2},
}


def write_head(path: Path, weights: np.ndarray | None = None, bias: float = -5.0) -> None:
    """Write a head as published ones are; without weights it says the same of every picture."""
    weights = np.zeros(ARCH["embed_dim"]) if weights is None else weights
    np.savez(path, weights=weights.astype(np.float32), biases=np.float32([bias]))


def write_filter(folder: Path, finds: bool = False) -> Path:
    """Write a whole filter, in open_clip's layout, that flags everything or nothing."""
    folder.mkdir(exist_ok=True)
    tower = VisionTransformer(tower_spec(ARCH))
    draw_weights(tower, seed=0)
    weights = {f"visual.{name}": value for name, value in tower.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": ARCH}))
    for name in HEADS:
        write_head(folder / name)
    if finds:
        write_head(folder / HEADS[0], bias=5.0)
    return folder
