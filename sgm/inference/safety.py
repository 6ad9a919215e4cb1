"""The safety filter: CLIP looks at every frame, and two linear heads judge what it sees.

The heads are those published with DeepFloyd IF and used by Stability AI's programs: logistic
regressions on the embedding (not normalised) of OpenAI's ViT-L/14 (Radford et al. 2021, arXiv
2103.00020). ``p_head_v1.npz`` finds what is not safe for work, ``w_head_v1.npz`` the visible
watermarks of picture agencies. As there, the square in the middle of a frame is looked at, every
frame is, and more than a half is a finding of either; here one frame's finding blurs them all, for
a video that is sharp now and then hides nothing. It runs on the CPU in float32.

Shapes: t frames, d width of the embedding.
"""

import json
import zipfile
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from sgm.checkpoint import Source, compare, open_checkpoint
from sgm.checkpoint.opening import Converted
from sgm.checkpoint.source import Selection
from sgm.convert.conversion import Conversion
from sgm.convert.diffusers.clip import clip_pairs, foreign_layers
from sgm.convert.matching import Matcher
from sgm.convert.pairs import block
from sgm.inference.files import user_path
from sgm.inference.videos import Frames
from sgm.modules.encoders.image_tower import VisionTransformer
from sgm.towers import ARCHITECTURES, CLIP_MEAN, CLIP_STD, TowerSpec, tower_spec

HEADS = ("p_head_v1.npz", "w_head_v1.npz")
THRESHOLD = 0.5
FRAMES_AT_ONCE = 4
BLUR = 0.1  # standard deviation in parts of the frame's shorter side

_TRANSFORMERS = "image_encoder/"  # before the names of a file that transformers wrote
_PREFERRED = ("model.safetensors", "open_clip_model.safetensors")
_HEAD_ARRAYS = ("weights", "biases")


@dataclass(frozen=True, eq=False)
class FilterFiles:
    """The parts of a filter, found and fitting; nothing large is read.

    Attributes:
        folder: where they lie.
        spec: numbers of the image tower.
        tower: its weights, under native names.
        weights: of the heads, float32 (2, d).
        biases: of the heads, float32 (2,).
    """

    folder: Path
    spec: TowerSpec
    tower: Source
    weights: Tensor
    biases: Tensor

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that decide a finding by their numbers."""
        return (*self.tower.files, *(self.folder / head for head in HEADS))


def find_filter(folder: str | Path) -> FilterFiles:
    """Find the parts of a filter in a folder.

    Args:
        folder: holds the two heads and the image tower: ``model.safetensors`` and ``config.json``
            as transformers writes them (of a whole CLIP or of the tower), or one file with
            open_clip's names and ``open_clip_config.json``; without that, OpenAI's ViT-L/14.

    Raises:
        ValueError: in one line, what is missing or does not fit.
    """
    path = user_path(folder).absolute()
    try:
        if not path.is_dir():
            raise ValueError("no such folder")
        missing = [head for head in HEADS if not (path / head).is_file()]
        if missing:
            raise ValueError(f"{' and '.join(missing)} missing: the folder has to hold the heads")
        return _find(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"safety_filter {str(folder)!r}: {error}") from error


def _find(folder: Path) -> FilterFiles:
    """The parts of a folder that has the heads.

    Raises:
        ValueError: the weights are missing, or something does not fit.
        OSError: a file cannot be read.
    """
    _refuse_programs(folder)
    named = (folder / name for name in _PREFERRED)
    source = open_checkpoint(next(filter(Path.is_file, named), folder))
    transformers = any(name.startswith(_TRANSFORMERS) for name in source.tensors)
    spec, tower = (_of_transformers if transformers else _of_open_clip)(folder, source)
    with torch.device("meta"):
        report = compare(VisionTransformer(spec), tower.tensors, source.path)
    if not report.fits:
        raise ValueError(report.describe())
    heads = [_read_head(folder / name, spec.embed_dim) for name in HEADS]
    weights, biases = (torch.stack(parts) for parts in zip(*heads, strict=True))
    return FilterFiles(folder, spec, tower, weights, biases)


class SafetyFilter:
    """Judges videos.

    Args:
        files: of the filter; the weights are read now.

    Raises:
        ValueError: the weights give no numbers.
    """

    def __init__(self, files: FilterFiles) -> None:
        self.files = files
        with torch.device("meta"):
            self.tower = VisionTransformer(files.spec).eval().requires_grad_(False)
        weights = {name: files.tower.view(name).float() for name in files.tower.tensors}
        self.tower.load_state_dict(weights, strict=True, assign=True)
        side = files.spec.image_size
        self.scores(np.full((1, side, side, 3), 128, np.uint8))

    @torch.inference_mode()
    def embed(self, frames: Frames) -> Tensor:
        """CLIP's embeddings, not normalised: uint8 (t, h, w, 3) -> float32 (t, d)."""
        parts = [frames[k : k + FRAMES_AT_ONCE] for k in range(0, len(frames), FRAMES_AT_ONCE)]
        return torch.cat([self.tower(_preprocess(p, self.files.spec.image_size)) for p in parts])

    def scores(self, frames: Frames) -> Tensor:
        """How sure the heads are of what they look for: uint8 (t, h, w, 3) -> (t, 2) in [0, 1].

        Raises:
            ValueError: the weights give no numbers.
        """
        logits = self.embed(frames) @ self.files.weights.T + self.files.biases
        if not torch.isfinite(logits).all():
            raise ValueError(
                f"safety_filter {str(self.files.folder)!r}: the weights give no finite numbers: "
                "fetch them again"
            )
        return logits.sigmoid()

    def flags(self, frames: Frames) -> bool:
        """Whether a head finds what it looks for in one frame at least of (t, h, w, 3)."""
        return bool((self.scores(frames) > THRESHOLD).any())


def blur(frames: Frames) -> Frames:
    """Frames in which nothing can be made out: uint8 (t, h, w, 3) -> the same."""
    gaussian = ImageFilter.GaussianBlur(BLUR * min(frames.shape[1:3]))
    return np.stack([np.asarray(Image.fromarray(frame).filter(gaussian)) for frame in frames])


def _preprocess(frames: Frames, size: int) -> Tensor:
    """The middle squares, normalised: uint8 (t, h, w, 3) -> (t, 3, size, size)."""
    height, width = frames.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = np.ascontiguousarray(frames[:, top : top + side, left : left + side])
    x = torch.from_numpy(square).permute(0, 3, 1, 2).float() / 255
    x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std


def _refuse_programs(folder: Path) -> None:
    """Say what to take in place of OpenAI's own file, which is a program that holds the weights.

    Raises:
        ValueError: there is such a file.
    """
    for path in folder.glob("*.pt"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                names = [PurePath(name).name for name in file.namelist()]
            if "constants.pkl" in names:
                raise ValueError(
                    f"{path.name} is a TorchScript program, not weights alone: take config.json "
                    "and model.safetensors of openai/clip-vit-large-patch14, which are the same"
                )


def _of_transformers(folder: Path, source: Source) -> tuple[TowerSpec, Source]:
    """The tower of a file that transformers wrote, which may hold the text side as well.

    Sizes come from the tensors, what these do not tell from ``config.json``; what that leaves out
    is as in the classes there.

    Raises:
        ValueError: one of them is missing, or describes something else.
    """
    layers = foreign_layers({name.removeprefix(_TRANSFORMERS) for name in source.tensors})
    pairs = block("", _TRANSFORMERS, clip_pairs(layers))
    entries = Matcher(source.shapes, "transformers").to_native(pairs)
    tower = Converted(source, Conversion(tuple(entries)))
    config = _read_json(folder / "config.json")
    vision = config.get("vision_config") or config
    try:
        width, _, patch_size, _ = tower.shapes["conv1.weight"]
        tokens, _ = tower.shapes["positional_embedding"]
        spec = TowerSpec(
            embed_dim=tower.shapes["proj"][1],
            layers=layers,
            width=width,
            head_width=width // vision.get("num_attention_heads", 12),
            patch_size=patch_size,
            image_size=isqrt(tokens - 1) * patch_size,
            mlp_ratio=tower.shapes["transformer.resblocks.0.mlp.c_fc.weight"][0] / width,
            quick_gelu={"quick_gelu": True, "gelu": False}[vision.get("hidden_act", "quick_gelu")],
        )
    except (LookupError, TypeError, ArithmeticError):
        raise ValueError("model and config.json are not of a CLIP with a plain tower") from None
    return spec, tower


def _of_open_clip(folder: Path, source: Source) -> tuple[TowerSpec, Source]:
    """The tower of a file with open_clip's names, of a whole CLIP or of the tower alone.

    Raises:
        ValueError: ``open_clip_config.json`` describes something else.
    """
    visual = [name for name in source.tensors if name.startswith("visual.")]
    chosen = {name.removeprefix("visual."): (source, name) for name in visual or source.tensors}
    config = folder / "open_clip_config.json"
    if config.is_file():
        spec = tower_spec(_read_json(config).get("model_cfg") or {})
    else:
        spec = replace(ARCHITECTURES["ViT-L-14"], quick_gelu=True)
    return spec, Selection(source.path, chosen)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing: it describes the weights") from None
    except ValueError:  # no UTF-8, or no JSON
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no JSON of names and values: fetch it again")
    return content


def _read_head(path: Path, width: int) -> tuple[Tensor, Tensor]:
    """A head's weights (d,) and bias (), float32.

    Raises:
        ValueError: it is damaged, or for embeddings of another width.
    """
    try:
        # numpy itself leaves a damaged file open.
        with path.open("rb") as opened, np.load(opened) as file:
            weights, bias = (np.ravel(file[name]).astype(np.float32) for name in _HEAD_ARRAYS)
    except Exception as error:  # on damaged files, numpy raises almost anything
        raise ValueError(
            f"{path.name} is no npz file with {' and '.join(_HEAD_ARRAYS)}: fetch it again"
        ) from error
    if weights.shape != (width,) or bias.shape != (1,):
        raise ValueError(
            f"{path.name}: expected {width} weights, as CLIP's embedding is wide, and a bias, "
            f"got {weights.size} and {bias.size}"
        )
    return torch.from_numpy(weights), torch.from_numpy(bias)[0]
