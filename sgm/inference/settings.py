"""What one run will really do: flags, the YAML and the model's row brought together.

Nothing here needs weights, so that impossible wishes are refused before a model is loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from reprlib import repr as short_repr
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from sgm.inference.files import user_path
from sgm.inference.options import SamplingOptions
from sgm.inference.specs import SPECS, ModelSpec, default_spec, find_config, get_spec
from sgm.inference.weights import base_of, given_lora, given_weights, own_weights, tell_model

if TYPE_CHECKING:
    from sgm.models.diffusion import DiffusionEngine

Config = dict[str, Any]

_SAMPLING = "sgm.modules.diffusionmodules.sampling"
_GUIDERS = "sgm.modules.diffusionmodules.guiders"
_DISCRETIZATION = {
    "target": "sgm.modules.diffusionmodules.discretizer.EDMDiscretization",
    "params": {"sigma_max": 700.0},
}
_PARTS = ("network_config", "first_stage_config", "conditioner_config", "denoiser_config")
SAMPLER_TARGETS = {
    "euler": f"{_SAMPLING}.EulerEDMSampler",
    "heun": f"{_SAMPLING}.HeunEDMSampler",
    "euler_ancestral": f"{_SAMPLING}.EulerAncestralSampler",
    "dpmpp_2s_ancestral": f"{_SAMPLING}.DPMPP2SAncestralSampler",
    "dpmpp_2m": f"{_SAMPLING}.DPMPP2MSampler",
    "lms": f"{_SAMPLING}.LinearMultistepSampler",
    "lcm": f"{_SAMPLING}.LCMSampler",
}
GUIDER_TARGETS = {
    "constant": f"{_GUIDERS}.VanillaCFG",
    "linear": f"{_GUIDERS}.LinearPredictionGuider",
    "triangle": f"{_GUIDERS}.TrianglePredictionGuider",
    "trapezoid": f"{_GUIDERS}.TrapezoidPredictionGuider",
    "none": f"{_GUIDERS}.IdentityGuider",
}


def read_config(path: str | Path) -> Config:
    """Read the ``model`` section of a YAML as plain dictionaries.

    Raises:
        ValueError: no such file, no YAML, or no ``model`` with all its parts in it.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ValueError("no such file")
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        return _model_section(config)
    except OSError as exc:  # not permitted, or longer than a name can be
        raise ValueError(f"config {str(path)!r}: {exc.strerror}") from exc
    except (YAMLError, OmegaConfBaseException, ValueError) as exc:
        raise ValueError(f"config {str(path)!r}: {str(exc).splitlines()[0]}") from exc


def _model_section(config: Any) -> Config:
    """The model of a YAML, in which everything that is looked up without it being built is there.

    Raises:
        ValueError: something is missing, or is no mapping.
    """
    model = _built(config if isinstance(config, dict) else {}, "model")
    params = _mapping(model, "params")
    for part in _PARTS:
        _built(params, part)
    if params.get("sampler_config") is not None:
        sampler = _mapping(_built(params, "sampler_config"), "params")
        _built(sampler, "discretization_config")
        if sampler.get("guider_config") is not None:
            _built(sampler, "guider_config")
    return model


def _built(parent: Config, name: str) -> Config:
    """An entry from which something is built."""
    entry = _mapping(parent, name)
    if "target" not in entry:
        raise ValueError(f"expected {name!r} with a 'target' in it")
    _mapping(entry, "params")
    return entry


def _mapping(parent: Config, name: str) -> Config:
    """An entry of names and values; empty where it is not given."""
    entry = parent.get(name)
    if not isinstance(entry, dict | None):
        raise ValueError(f"expected {name!r} to hold names and values, got {short_repr(entry)}")
    return cast(Config, entry or {})


@dataclass(frozen=True)
class ModelFiles:
    """Where a model comes from; nothing of it is loaded.

    Attributes:
        spec: its row in the table of models.
        config_path: its YAML.
        config: the ``model`` section of that.
        checkpoint: its weights, a file or a folder.
        base: the weights of what ``checkpoint`` lacks, where that is a U-Net alone.
        loras: files of updates to add to the weights, and how much of each.
    """

    spec: ModelSpec
    config_path: Path
    config: Config
    checkpoint: Path
    base: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()

    def weight_files(self) -> tuple[Path, ...]:
        """All files that weights are read from.

        Raises:
            ValueError: one cannot be read.
        """
        from sgm.checkpoint import open_checkpoint
        from sgm.checkpoint.lora import lora_file

        paths = (self.checkpoint, self.base) if self.base else (self.checkpoint,)
        added = tuple(lora_file(path) for path, _ in self.loras)
        return (*(file for path in paths for file in open_checkpoint(path).files), *added)

    def load(self) -> "DiffusionEngine":
        """The model with its weights, which stay in the mapped files until they are used.

        Raises:
            ValueError: the YAML describes no `DiffusionEngine`, or a file does not fit it.
        """
        from sgm.checkpoint import load_checkpoint
        from sgm.models.diffusion import DiffusionEngine

        engine = DiffusionEngine.without_weights(self.config)
        overlay = self.checkpoint if self.base else None
        load_checkpoint(engine, self.base or self.checkpoint, overlay=overlay, loras=self.loras)
        return engine


def find_model(
    name: str | None = None,
    config: str | Path | None = None,
    ckpt_path: str | Path | None = None,
    loras: Sequence[str] | None = None,
) -> ModelFiles:
    """Find the files of a named model, as :meth:`VideoPipeline.from_spec` describes.

    Raises:
        ValueError: unknown name, missing or unfit file.
    """
    spec = get_spec(name) if name else None
    yaml = user_path(config) if config else None
    if yaml is not None:
        model = read_config(yaml)
        spec = spec or SPECS.get(yaml.stem)
    given = given_weights(str(ckpt_path), spec) if ckpt_path else None
    if spec is None:
        spec = _spec_of(yaml, given)
    if yaml is None:
        yaml = find_config(spec.name)
        model = read_config(yaml)
    checkpoint = given or own_weights(spec, (model.get("params") or {}).get("ckpt_path"))
    updates = tuple(map(given_lora, loras or ()))
    return ModelFiles(spec, yaml, model, checkpoint, base_of(spec, checkpoint), updates)


def _spec_of(config: Path | None, weights: Path | None) -> ModelSpec:
    """The row that weights belong to, or the default where no file is given."""
    if weights is not None:
        return tell_model(weights)
    if config is not None:
        raise ValueError(
            f"{config.name}: say with --version which model it is ({', '.join(SPECS)})"
        )
    return default_spec()


@dataclass(frozen=True)
class Settings:
    """A run without open questions.

    Attributes:
        options: every option that is a plain value, with its final one. Where no flag changes
            sampler or guidance, those options stay None: the YAML's own are used as they are.
        sampler_config: the sampler, guider and noise schedule to build.
    """

    options: SamplingOptions
    sampler_config: Config

    @property
    def frames(self) -> int:
        """Length of the video."""
        return cast(int, self.options.num_frames)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the video in pixels."""
        return cast(int, self.options.height), cast(int, self.options.width)


def guidance_halves(settings: Settings) -> int:
    """How many clips go through the network for one video: two with guidance."""
    guider = (settings.sampler_config["params"].get("guider_config") or {}).get("target")
    return 1 if guider in (None, GUIDER_TARGETS["none"]) else 2


def resolve(
    options: SamplingOptions, config: Config, spec: ModelSpec, size: tuple[int, int]
) -> Settings:
    """Decide everything that a run needs.

    Args:
        options: the flags.
        config: the ``model`` section of the YAML.
        spec: the model's row.
        size: native height and width in the picture's orientation.

    Raises:
        ValueError: flags that contradict each other or the YAML.
    """
    params = config.get("params") or {}
    given = params.get("sampler_config") or {}
    sampler = given.get("params") or {}
    guider = (sampler.get("guider_config") or {}).get("params") or {}
    sampler_config = _sampler_config(options, given, spec)

    def first(*values: Any) -> Any:
        return next(value for value in values if value is not None)

    height, width = size
    if options.height is not None or options.width is not None:
        height, width = _asked_size(options, size)
    decided = options.replace(
        num_frames=first(options.num_frames, guider.get("num_frames"), spec.num_frames),
        num_steps=first(options.num_steps, sampler.get("num_steps"), spec.num_steps),
        height=height,
        width=width,
        fps_id=first(options.fps_id, options.fps - 1),
        cond_aug=first(options.cond_aug, spec.cond_aug),
        decoding_t=first(
            options.decoding_t, params.get("en_and_decode_n_samples_a_time"), spec.decoding_t
        ),
    )
    for name in ("elevations_deg", "azimuths_deg"):
        _check_angles(name, getattr(options, name), cast(int, decided.num_frames))
    return Settings(_with_filters(decided), sampler_config)


def _asked_size(options: SamplingOptions, native: tuple[int, int]) -> tuple[int, int]:
    """The size of the flags; where one side is given, the other keeps the native proportions."""
    ratio = native[1] / native[0]
    height, width = options.height, options.width
    if height is None:
        height = max(64, 2 * round(cast(int, width) / ratio / 2))
    if width is None:
        width = max(64, 2 * round(height * ratio / 2))
    return height, width


def _check_angles(name: str, angles: tuple[float, ...] | None, frames: int) -> None:
    allowed = (frames,) if name == "azimuths_deg" else (1, frames)
    if angles is not None and len(angles) not in allowed:
        numbers = " or ".join(str(n) for n in allowed)
        raise ValueError(f"{name} must hold {numbers} angles, got {len(angles)}")


def _with_filters(options: SamplingOptions) -> SamplingOptions:
    """Make sure that what is to be done to the frames can be, and say where the filter lies.

    Raises:
        ValueError: it cannot.
    """
    asked = [name for name in ("watermark", "safety_filter") if getattr(options, name)]
    if asked and options.output != "frames":
        raise ValueError(f"{' and '.join(asked)} need output frames, got {options.output}")
    if options.watermark:
        from sgm.inference.watermark import check_watermark

        check_watermark(cast(int, options.height), cast(int, options.width))
    if options.safety_filter is None:
        return options
    from sgm.inference.safety import find_filter  # PyTorch, for this option alone

    return options.replace(safety_filter=str(find_filter(options.safety_filter).folder))


def _sampler_config(options: SamplingOptions, given: Mapping[str, Any], spec: ModelSpec) -> Config:
    """The YAML's sampler, or the row's, with what the flags change."""
    params = dict(given.get("params") or {})
    row_guider = {
        "target": GUIDER_TARGETS[spec.guidance_shape],
        "params": {"min_scale": spec.min_guidance, "max_scale": spec.max_guidance},
    }
    if not given:
        params = {"discretization_config": _DISCRETIZATION, "guider_config": row_guider}
    if _changes_guidance(options):
        base = params.get("guider_config") or row_guider
        params["guider_config"] = _guider_config(options, base, spec)
    target = given.get("target", SAMPLER_TARGETS["euler"])
    if options.sampler is not None and SAMPLER_TARGETS[options.sampler] != target:
        target = SAMPLER_TARGETS[options.sampler]
        shared = ("discretization_config", "guider_config", "num_steps", "verbose")
        params = {key: value for key, value in params.items() if key in shared}
    return {"target": target, "params": params}


def _changes_guidance(options: SamplingOptions) -> bool:
    asked = (options.guidance_shape, options.min_guidance, options.max_guidance)
    return any(value is not None for value in asked)


def _guider_config(options: SamplingOptions, base: Mapping[str, Any], spec: ModelSpec) -> Config:
    params = dict(base.get("params") or {})
    target = base["target"]
    if options.guidance_shape is not None and GUIDER_TARGETS[options.guidance_shape] != target:
        target = GUIDER_TARGETS[options.guidance_shape]
        scales = {
            "min_scale": params.get("min_scale", spec.min_guidance),
            "max_scale": params.get("max_scale", params.get("scale", spec.max_guidance)),
        }
        params = {
            "none": {},
            "constant": {"scale": scales["max_scale"]},
        }.get(options.guidance_shape, scales)
    if target == GUIDER_TARGETS["none"] and options.guidance_shape is None:
        raise ValueError(
            "min_guidance and max_guidance need a guidance_shape here: the config has no guidance"
        )
    if target != GUIDER_TARGETS["none"]:
        params |= _scales(options, target, params)
    return {"target": target, "params": params}


def _scales(options: SamplingOptions, target: str, params: Config) -> Config:
    """The scales that the flags give a guider, which has to know them.

    Raises:
        ValueError: it does not, or the lowest would exceed the highest.
    """
    from sgm.util import get_obj_from_str  # PyTorch, for guidance flags alone

    constant = target == GUIDER_TARGETS["constant"]
    if constant and options.min_guidance is not None:
        raise ValueError("min_guidance has no meaning with constant guidance: use max_guidance")
    asked = {
        "min_scale": options.min_guidance,
        "scale" if constant else "max_scale": options.max_guidance,
    }
    scales = {name: value for name, value in asked.items() if value is not None}
    known = signature(get_obj_from_str(target)).parameters
    if not scales.keys() <= known.keys():
        guider = target.rpartition(".")[2]
        raise ValueError(
            f"min_guidance and max_guidance mean nothing to the config's {guider}: "
            "leave them out, or give a guidance_shape as well"
        )
    defaults = {
        name: each.default for name, each in known.items() if each.default is not each.empty
    }
    final = defaults | params | scales
    lowest, highest = final.get("min_scale", 0.0), final.get("max_scale", float("inf"))
    if lowest > highest:
        raise ValueError(f"min_guidance must not exceed max_guidance, got {lowest} and {highest}")
    return scales
