"""What is measured, at which sizes and how often; imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sgm.inference.levels import LEVELS

STAGES = ("load", "encode", "condition", "unet", "decode", "write", "video")
DIFFUSERS = "diffusers"
COMPILED = "exact compiled", "diffusers compiled"
SYSTEMS = (*LEVELS, DIFFUSERS, *COMPILED)

_NETWORK = "params.network_config.params"
_EMBEDDERS = "params.conditioner_config.params.emb_models"
_TOWER = f"{_EMBEDDERS}.0.params.open_clip_embedding_config.params.arch"
# diffusers' pipeline shows the image tower 224 pixels, whatever it was made for.
_SMALL_TOWER = {"image_size": 224, "patch_size": 56, "width": 128, "head_width": 32, "layers": 2}
_AUTOENCODERS = (
    f"{_EMBEDDERS}.3.params.encoder_config.params.ddconfig",
    "params.first_stage_config.params.encoder_config.params",
    "params.first_stage_config.params.decoder_config.params",
)
_TINY_CHANGES = {
    _TOWER: {"embed_dim": 128, "vision_cfg": _SMALL_TOWER},
    # As many residual blocks as diffusers' temporal decoder has in its middle, always two.
    **{f"{part}.num_res_blocks": 2 for part in _AUTOENCODERS},
}
# A tower that is not measured, instead of 2.5 GB.
_WITHOUT_TOWER = {_TOWER: {"embed_dim": 1024, "vision_cfg": _SMALL_TOWER}}


@dataclass(frozen=True)
class Case:
    """One size.

    Attributes:
        frames: of a clip.
        height: in pixels.
        width: in pixels.
        stages: those to measure, and how often.
        dtypes: types of the U-Net; one that the device is slow in is left out.
        clips: that go through the U-Net together, 2 with guidance.
        decoding_t: frames decoded at once.
        steps: of the sampler, where whole videos are made.
    """

    frames: int
    height: int
    width: int
    stages: Mapping[str, int]
    dtypes: tuple[str, ...] = ("float32",)
    clips: int = 2
    decoding_t: int = 14
    steps: int = 25

    @property
    def name(self) -> str:
        """In words."""
        guided = ", guided" if self.clips == 2 else ""
        return f"{self.frames} frames, {self.height}x{self.width}{guided}"


@dataclass(frozen=True)
class Target:
    """How much faster one figure has to be than another.

    Attributes:
        case: its name.
        stage: which.
        dtype: of this project's U-Net.
        ratio: the other's time over this project's, at least.
        against: system and type of the other; the same type where None.
        needs: flag of the processor without which it is no target.
    """

    case: str
    stage: str
    dtype: str
    ratio: float
    against: tuple[str, str | None] = (DIFFUSERS, None)
    needs: str | None = None


@dataclass(frozen=True)
class Growth:
    """Values of each axis; the others stay at the first case's.

    Attributes:
        frames: of a clip.
        sides: height and width in pixels.
        steps: of the sampler.
    """

    frames: tuple[int, ...]
    sides: tuple[int, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Preset:
    """A selection of figures.

    Attributes:
        model: whose YAML is taken; the weights are random.
        cases: sizes.
        systems: what is compared, of :data:`SYSTEMS`.
        changes: to the YAML's ``model`` section, by dotted path.
        targets: what has to come out.
        section: module of this package that measures.
        growth: values, where it is growth that is measured.
        limit: bytes that a process may take, where it is memory that is measured.
    """

    model: str
    cases: tuple[Case, ...] = ()
    systems: tuple[str, ...] = ("exact", DIFFUSERS)
    changes: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()
    section: str = "compare"
    growth: Growth | None = None
    limit: int | None = None


_ALL_STAGES = {"load": 3, "encode": 5, "condition": 5, "unet": 7, "decode": 7, "write": 3}
_HALVES = ("float16", "bfloat16")
_CPU_TYPES = ("float32", "bfloat16")

PRESETS = {
    "tiny": Preset(
        "svd_tiny",
        (Case(14, 64, 64, _ALL_STAGES | {"video": 3}),),
        ("none", "exact", DIFFUSERS),
        _TINY_CHANGES,
    ),
    "cpu": Preset(
        "svd_xt",
        (
            Case(4, 128, 128, {"unet": 7}, _CPU_TYPES, clips=1),
            Case(4, 256, 256, {"condition": 3, "unet": 5}, _CPU_TYPES, clips=1),
            Case(4, 256, 256, {"decode": 3}, clips=1),
        ),
        changes=_WITHOUT_TOWER,
        targets=(
            Target("4 frames, 128x128", "unet", "float32", 1.4),
            Target("4 frames, 256x256", "unet", "float32", 1.2),
            Target("4 frames, 256x256", "decode", "float32", 1.3),
            Target("4 frames, 256x256", "unet", "bfloat16", 2.0, ("exact", "float32"), "amx_bf16"),
        ),
    ),
    "savings": Preset(
        "svd_xt",
        (Case(4, 256, 256, {"unet": 15}, clips=1),),
        changes=_WITHOUT_TOWER,
        section="savings",
    ),
    "savings-gpu": Preset(
        "svd_xt", (Case(25, 576, 1024, {"unet": 15}, ("float16",)),), section="savings"
    ),
    "gpu": Preset(
        "svd_xt",
        (
            Case(25, 576, 1024, _ALL_STAGES | {"video": 2}, ("float16",)),
            Case(25, 576, 1024, {"unet": 7, "decode": 5}, ("bfloat16",)),
            Case(14, 576, 1024, {"unet": 7, "decode": 5}, _HALVES),
        ),
        ("none", "exact", "graphs", "fp8", DIFFUSERS, *COMPILED),
    ),
    "memory": Preset(
        "svd_xt",
        tuple(Case(frames, 576, 1024, {"video": 1}, ("float16",), steps=3) for frames in (14, 25)),
        section="memory",
    ),
    "training": Preset(
        "svd_xt",
        (Case(8, 256, 256, {"train": 5}, clips=1),),
        changes=_WITHOUT_TOWER | {f"{_NETWORK}.model_channels": 128},
        section="training",
    ),
    "training-gpu": Preset(
        "svd_xt", (Case(14, 320, 576, {"train": 5}, ("bfloat16",), clips=1),), section="training"
    ),
    "growth": Preset(
        "svd_tiny",
        (Case(14, 64, 64, {"unet": 5, "decode": 5, "video": 3}),),
        changes=_TINY_CHANGES,
        section="growth",
        growth=Growth((7, 14, 25, 50, 100), (64, 128, 192, 256), (1, 2, 4, 8, 16)),
    ),
    "growth-gpu": Preset(
        "svd_xt",
        (Case(14, 576, 576, {"unet": 3, "decode": 3, "video": 1}, ("float16",)),),
        section="growth",
        growth=Growth((7, 14, 25, 50, 100), (256, 384, 576, 768, 1024), (1, 2, 5, 10)),
    ),
}


def small(preset: Preset) -> Preset:
    """The same selection on a model and at sizes of seconds, to try it out anywhere."""
    cases = tuple(
        replace(case, frames=4, height=64, width=64, steps=2, stages=dict.fromkeys(case.stages, 1))
        for case in preset.cases
    )
    growth = Growth((2, 4), (64, 128), (1, 2)) if preset.growth else None
    return replace(
        preset, model="svd_tiny", cases=cases, changes=_TINY_CHANGES, targets=(), growth=growth
    )
